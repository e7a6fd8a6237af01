"""What a module's pieces in a LoRA file come to, by each method's definition.

    LoRA    ΔW = alpha / rank · up · down                       (kohya, peft, diffusers)
    LoCon   ΔW = alpha / rank · up · mid · down, for a convolution's kernel (LyCORIS)
    LoHa    ΔW = alpha / rank · (w1_a · w1_b) ∘ (w2_a · w2_b)     (LyCORIS)
    LoKr    ΔW = alpha / rank · w1 ⊗ w2, each whole or a product (LyCORIS); whole ones unscaled
    (IA)³   ΔW = W · w, along the outputs or, `on_input`, the inputs
    full    ΔW = diff, w_norm; Δb = diff_b, b_norm
    DoRA    W + ΔW is scaled to the norms of `dora_scale`, for each output or each input

All is computed in float32 and scaled by the strength s asked for: W' = W + s · ΔW; with DoRA
W' = W + s · (dora(W + ΔW) − W), so that 0 is the model as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.models.tensor_files import without_ones

if TYPE_CHECKING:
    import torch

    Pieces = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A way to change a weight: the pieces that it needs, and those that it may have."""

    title: str
    needs: frozenset[str]
    may_have: frozenset[str] = frozenset()


OF_BIAS = {"diff_b", "b_norm", "up_bias"}  # pieces that change a bias
_SCALED = ("alpha", "dora_scale", "magnitude")
_WITH_LORA = ("mid", "up_bias", "diff_b", *_SCALED)


def _methods() -> list[Method]:
    methods = [
        Method("LoRA", frozenset({"down", "up"}), frozenset(_WITH_LORA)),
        Method(
            "LoHa",
            frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
            frozenset({"hada_t1", "hada_t2", "diff_b", *_SCALED}),
        ),
        Method("(IA)³", frozenset({"weight", "on_input"})),
        Method("full", frozenset({"diff"}), frozenset({"diff_b", *_SCALED[1:]})),
        Method("full", frozenset({"diff_b"})),
        Method("full", frozenset({"w_norm"}), frozenset({"b_norm"})),
        Method("full", frozenset({"b_norm"})),
    ]
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")):
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")):
            more = ("lokr_t2",) if len(second) == 2 else ()
            may_have = frozenset({"diff_b", *_SCALED, *more})
            methods.append(Method("LoKr", frozenset({*first, *second}), may_have))
    return methods


METHODS = _methods()


def method_of(pieces: frozenset[str]) -> Method | None:
    """The method that needs what is there; None where pieces are missing.

    Of several the one that needs most; pieces beyond what it may have are not used.
    """
    fit = [method for method in METHODS if method.needs <= pieces]
    return max(fit, key=lambda method: len(method.needs | (method.may_have & pieces)), default=None)


def missing_pieces(pieces: frozenset[str]) -> list[str]:
    """What the method lacks that pieces are most likely of."""
    nearest = max(METHODS, key=lambda method: len(method.needs & pieces))
    return sorted(nearest.needs - pieces)


def rank_of(pieces: "Pieces") -> int | None:
    """The rank by which alpha is divided; None where nothing is a product."""
    for name, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if name in pieces:
            return int(pieces[name].shape[axis])
    return None


def change(weight: "torch.Tensor", pieces: "Pieces", scaling: float) -> "torch.Tensor":
    """ΔW [the weight's shape], float32, of strength 1.

    Args:
        weight: W, float32.
        pieces: of one module, float32.
        scaling: alpha / rank.

    Raises:
        RuntimeError: the shapes of the pieces do not fit each other or the weight.
    """
    import torch

    delta = _without_norms(weight, pieces, scaling)
    scale = next((pieces[name] for name in ("dora_scale", "magnitude") if name in pieces), None)
    if scale is None:
        return delta
    changed = weight + delta
    if "magnitude" in pieces or dora_axis(weight.shape, scale.shape) == 0:
        axes = tuple(range(1, weight.ndim))  # a norm for each output
        scale = scale.reshape(-1, *([1] * (weight.ndim - 1)))
    else:
        axes = (0, *range(2, weight.ndim))  # a norm for each input
        scale = scale.reshape(1, -1, *([1] * (weight.ndim - 2)))
    norm = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
    if norm.shape != scale.shape:
        raise RuntimeError(f"{scale.numel()} norms for {norm.numel()}")
    return changed * (scale / norm) - weight


def dora_axis(weight: Sequence[int], scale: Sequence[int]) -> int:
    """The weight's axis along which `dora_scale` has its norms: 0, outputs, or 1, inputs."""
    if len(scale) > 1 and scale[0] == 1 != scale[1]:
        return 1
    if len(scale) > 1:
        return 0
    return 0 if scale[0] == weight[0] else 1


def bias_change(pieces: "Pieces", scaling: float) -> "torch.Tensor":
    """Δb [outputs] of strength 1, by whichever piece is `OF_BIAS`."""
    for name in ("diff_b", "b_norm"):
        if name in pieces:
            return pieces[name]
    return pieces["up_bias"] * scaling


def _without_norms(weight: "torch.Tensor", pieces: "Pieces", scaling: float) -> "torch.Tensor":
    import torch

    if "weight" in pieces:
        on_input = bool(pieces["on_input"].reshape(-1)[0]) if weight.device.type != "meta" else None
        return _ia3(weight, pieces["weight"], on_input)
    if "down" in pieces:
        up, down = pieces["up"], pieces["down"]
        if "mid" in pieces:
            delta = _with_core(pieces["mid"], up.flatten(1).T, down.flatten(1))
        else:
            delta = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        if without_ones(up.shape) != (*up.shape[:2],):
            raise RuntimeError(f"up {list(up.shape)} has a kernel")
    elif "hada_w1_a" in pieces:
        delta = _hada(pieces, 1) * _hada(pieces, 2)
    elif "diff" in pieces or "w_norm" in pieces:
        return _as_weight(pieces["diff" if "diff" in pieces else "w_norm"], weight)
    elif "lokr_w2" in pieces or "lokr_w2_a" in pieces:
        first = pieces["lokr_w1"] if "lokr_w1" in pieces else _product(pieces, "lokr_w1")
        if "lokr_w2" in pieces:
            second = pieces["lokr_w2"]
        elif "lokr_t2" in pieces:
            second = _with_core(pieces["lokr_t2"], pieces["lokr_w2_a"], pieces["lokr_w2_b"])
        else:
            second = _product(pieces, "lokr_w2")
        first = first.reshape(*first.shape, *([1] * (second.ndim - first.ndim)))
        delta = torch.kron(first.contiguous(), second.contiguous())
    else:
        return torch.zeros_like(weight)  # a bias alone
    return _as_weight(delta, weight) * scaling


def _hada(pieces: "Pieces", number: int) -> "torch.Tensor":
    name = f"hada_w{number}"
    if f"hada_t{number}" not in pieces:
        return _product(pieces, name)
    return _with_core(pieces[f"hada_t{number}"], pieces[f"{name}_a"], pieces[f"{name}_b"])


def _product(pieces: "Pieces", name: str) -> "torch.Tensor":
    return pieces[f"{name}_a"].flatten(1) @ pieces[f"{name}_b"].flatten(1)


def _with_core(
    core: "torch.Tensor", outputs: "torch.Tensor", inputs: "torch.Tensor"
) -> "torch.Tensor":
    """A convolution's weight [O, I, h, w] from a core [r, s, h, w], [r, O] and [s, I] (Tucker)."""
    import torch

    return torch.einsum("rshw,ro,si->oihw", core, outputs, inputs)


def _ia3(weight: "torch.Tensor", scale: "torch.Tensor", on_input: bool | None) -> "torch.Tensor":
    """W · w; `on_input` None: not known, where only shapes are asked for."""
    axis = int(bool(on_input))
    if on_input is not None and scale.numel() != weight.shape[axis]:
        raise RuntimeError(f"{scale.numel()} numbers for {weight.shape[axis]}")
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * scale.reshape(shape) if on_input is not None else weight


def _as_weight(delta: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """A change in its weight's shape: a convolution of size 1 and a linear layer are the same."""
    flat = delta.ndim == 2 and delta.shape == weight.flatten(1).shape
    if not flat and without_ones(delta.shape) != without_ones(weight.shape):
        raise RuntimeError(f"a change of {list(delta.shape)} for a weight of {list(weight.shape)}")
    return delta.reshape(weight.shape)
