"""LoRA files in every layout that tools write, each with what it is to add, in float64.

What is expected is computed here from the definitions with numpy, by einsum and kron alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]
Names = Callable[[str, str], str]  # component, module → what a file calls it
# ΔW of strength 1, in float64, of W.
Delta = Callable[[np.ndarray], np.ndarray]


@dataclass
class MadeFile:
    """A file and what it adds: (component, parameter) → ΔW."""

    tensors: Arrays = field(default_factory=dict)
    deltas: dict[tuple[str, str], Delta] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def as_torch(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in self.tensors.items()}


# --- names ---------------------------------------------------------------------------------------

_ENCODERS = {"text_encoder": 1, "text_encoder_2": 2}


def diffusers_names(component: str, module: str) -> str:
    return f"{component}.{_text(component, module)}"


def kohya_names(component: str, module: str) -> str:
    start = "unet" if component == "unet" else f"te{_ENCODERS[component]}"
    return f"lora_{start}_{_text(component, module).replace('.', '_')}"


def kohya_names_of_sd(component: str, module: str) -> str:
    return kohya_names(component, module).replace("lora_te1_", "lora_te_")


def peft_names(component: str, module: str) -> str:
    return f"base_model.model.{_text(component, module)}"


def bare_names(component: str, module: str) -> str:
    return module


def dotted_names(component: str, module: str) -> str:
    start = {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component]
    return f"{start}.{_text(component, module)}"


def old_diffusers_names(component: str, module: str) -> str:
    parent, _, last = _text(component, module).removesuffix(".0").rpartition(".")
    if component == "unet":
        return f"unet.{parent}.processor.{last}_lora"
    return f"{component}.{parent}.{last}.lora_linear_layer"


def old_text_names(component: str, module: str) -> str:
    parent, _, last = _text(component, module).rpartition(".")
    return f"{component}.{parent}.to_{last[0] if last != 'out_proj' else 'out'}_lora"


def original_names(prefix: str, originals: Mapping[str, str]) -> Names:
    """Names of LDM and SGM; `originals` has them by diffusers' own."""

    def names(component: str, module: str) -> str:
        found = originals[module]
        return prefix + (found.replace(".", "_") if prefix.endswith("_") else found)

    return names


def _text(component: str, module: str) -> str:
    """A text encoder's modules as files name them, with `text_model` before all layers."""
    if component == "unet" or module.startswith(("text_model.", "text_projection")):
        return module
    return f"text_model.{module}"


# --- methods: the pieces of one module, and what they come to ------------------------------------


def _random(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return (generator.standard_normal(shape) * 0.3).astype(np.float32)


def lora(
    shape: tuple[int, ...],
    generator: np.random.Generator,
    *,
    rank: int = 3,
    alpha: float | None = 2.0,
    down: str = "lora_down.weight",
    up: str = "lora_up.weight",
) -> tuple[Arrays, Delta]:
    """alpha / rank · up · down; a convolution's down has its kernel."""
    ones = (1,) * (len(shape) - 2)
    b, a = _random(generator, shape[0], rank, *ones), _random(generator, rank, *shape[1:])
    pieces = {down: a, up: b} | ({} if alpha is None else {"alpha": np.float32(alpha)})
    scaling = 1.0 if alpha is None else alpha / rank
    product = np.einsum("or,ri->oi", b.reshape(-1, rank).astype(float), a.reshape(rank, -1))
    return pieces, lambda _: scaling * product.reshape(shape)


def locon(shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Arrays, Delta]:
    """A convolution's Tucker form: up · mid · down."""
    rank, alpha = 3, 1.5
    out, into, *kernel = shape
    up, down = _random(generator, out, rank, 1, 1), _random(generator, rank, into, 1, 1)
    mid = _random(generator, rank, rank, *kernel)
    pieces = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    product = np.einsum("or,rskl,si->oikl", up[..., 0, 0].astype(float), mid, down[..., 0, 0])
    return pieces | {"alpha": np.float32(alpha)}, lambda _: alpha / rank * product


def with_dora(
    method: Callable[..., tuple[Arrays, Delta]], axis: int, name: str = "dora_scale"
) -> Callable[..., tuple[Arrays, Delta]]:
    """W' = m · (W + ΔW) / ‖W + ΔW‖, a norm for each output (0) or each input (1)."""

    def made(
        shape: tuple[int, ...], generator: np.random.Generator, **options: Any
    ) -> tuple[Arrays, Delta]:
        pieces, delta = method(shape, generator, **options)
        axes = tuple(k for k in range(len(shape)) if k != axis)
        scale = 1 + np.abs(
            _random(generator, *(n if k == axis else 1 for k, n in enumerate(shape)))
        )
        as_saved = scale
        if name != "dora_scale":  # peft's are flat for linear layers, [1, O, 1, 1] for convolutions
            as_saved = scale.reshape(1, -1, 1, 1) if len(shape) > 2 else scale.reshape(-1)

        def decomposed(weight: np.ndarray) -> np.ndarray:
            changed = weight + delta(weight)
            norm = np.sqrt(np.square(changed).sum(axes, keepdims=True))
            return np.asarray(scale.astype(float) * changed / norm - weight)

        return pieces | {name: as_saved}, decomposed

    return made


def loha(
    shape: tuple[int, ...], generator: np.random.Generator, tucker: bool = False
) -> tuple[Arrays, Delta]:
    rank, alpha = 3, 2.0
    out, into, *kernel = shape
    pieces: Arrays = {"alpha": np.float32(alpha)}
    factors = []
    for number in "12":
        if tucker:
            t = _random(generator, rank, rank, *kernel)
            a, b = _random(generator, rank, out), _random(generator, rank, into)
            pieces |= {f"hada_t{number}": t, f"hada_w{number}_a": a, f"hada_w{number}_b": b}
            factors.append(np.einsum("rskl,ro,si->oikl", t.astype(float), a, b))
        else:
            a = _random(generator, out, rank)
            b = _random(generator, rank, into * int(np.prod(kernel)))
            pieces |= {f"hada_w{number}_a": a, f"hada_w{number}_b": b}
            factors.append(np.einsum("or,ri->oi", a.astype(float), b).reshape(shape))
    return pieces, lambda _: alpha / rank * factors[0] * factors[1]


def lokr(
    shape: tuple[int, ...],
    generator: np.random.Generator,
    first: str = "whole",
    second: str = "product",
) -> tuple[Arrays, Delta]:
    """w1 ⊗ w2, each whole or a product; whole both, alpha does not count."""
    rank, alpha = 2, 3.0
    out, into, *kernel = shape
    m, n = (2 if out % 2 == 0 else 1), (4 if into % 4 == 0 else 1)
    pieces: Arrays = {"alpha": np.float32(alpha)}
    if first == "whole":
        w1 = _random(generator, m, n)
        pieces["lokr_w1"] = w1
    else:
        a, b = _random(generator, m, rank), _random(generator, rank, n)
        pieces |= {"lokr_w1_a": a, "lokr_w1_b": b}
        w1 = a.astype(float) @ b
    o, i = out // m, into // n
    if second == "whole":
        w2 = _random(generator, o, i, *kernel)
        pieces["lokr_w2"] = w2
    elif second == "tucker":
        t = _random(generator, rank, rank, *kernel)
        a, b = _random(generator, rank, o), _random(generator, rank, i)
        pieces |= {"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}
        w2 = np.einsum("rskl,ro,si->oikl", t.astype(float), a, b)
    else:
        a, b = _random(generator, o, rank), _random(generator, rank, i * int(np.prod(kernel)))
        pieces |= {"lokr_w2_a": a, "lokr_w2_b": b}
        w2 = (a.astype(float) @ b).reshape(o, i, *kernel)
    scaling = 1.0 if first == second == "whole" else alpha / rank
    whole = np.einsum("mn,oi...->moni...", w1.astype(float), w2).reshape(shape)
    return pieces, lambda _: scaling * whole


def ia3(
    shape: tuple[int, ...], generator: np.random.Generator, on_input: bool = False
) -> tuple[Arrays, Delta]:
    axis = int(on_input)
    w = _random(generator, shape[axis])
    size = [1] * len(shape)
    size[axis] = -1
    pieces = {"weight": w, "on_input": np.bool_(on_input)}
    return pieces, lambda weight: weight * w.astype(float).reshape(size)


def full(shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Arrays, Delta]:
    diff = _random(generator, *shape)
    return {"diff": diff}, lambda _: diff.astype(float)


# --- files ---------------------------------------------------------------------------------------

# Of the tiny checkpoints: linear layers of attention and of the rest, convolutions of size 3 and 1.
ATTENTION = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
)
LINEAR = (
    *ATTENTION,
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.1.attentions.0.proj_in",
    "time_embedding.linear_1",
    "down_blocks.0.resnets.0.time_emb_proj",
)
CONVOLUTIONS = (
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv",
    "conv_out",
)
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj")
MLP = ("encoder.layers.0.mlp.fc1", "encoder.layers.2.mlp.fc2")
ALL_TEXT = {"text_encoder": (*TEXT, *MLP), "text_encoder_2": (*TEXT, *MLP)}


@dataclass(frozen=True)
class Format:
    """A layout that tools write."""

    title: str
    names: str  # of `NAMES`, or a prefix of the original code's names
    method: Callable[..., tuple[Arrays, Delta]]
    modules: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method
    varies: bool = False  # ranks and alphas, from module to module


NAMES: dict[str, Names] = {
    "kohya": kohya_names,
    "diffusers": diffusers_names,
    "peft": peft_names,
    "bare": bare_names,
    "OneTrainer": dotted_names,
    "diffusers, processors": old_diffusers_names,
    "diffusers, text of before": old_text_names,
}
_PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
_ADAPTER = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
_OLD = {"down": "down.weight", "up": "up.weight", "alpha": None}
_UNET, _EVERY = {"unet": LINEAR}, {"unet": LINEAR, **ALL_TEXT}
_CONV = {"unet": CONVOLUTIONS}
_BOTH = {"unet": (*LINEAR, *CONVOLUTIONS)}

FORMATS = (
    Format("kohya LoRA", "kohya", lora, _EVERY),
    Format("kohya LoRA with convolutions (LoCon, C3Lier)", "kohya", lora, _CONV | ALL_TEXT),
    Format("kohya LoRA resized: ranks and alphas vary", "kohya", lora, _EVERY, varies=True),
    Format("kohya LoRA without alphas", "kohya", lora, _EVERY, {"alpha": None}),
    Format("LoCon with lora_mid", "kohya", locon, _CONV),
    Format("diffusers", "diffusers", lora, _EVERY | _BOTH, {**_PEFT, "alpha": None}),
    Format("diffusers with alphas", "diffusers", lora, _EVERY, _PEFT, varies=True),
    Format(
        "diffusers, `.lora.down.weight`",
        "diffusers",
        lora,
        _UNET,
        {"down": "lora.down.weight", "up": "lora.up.weight", "alpha": None},
    ),
    Format("diffusers, attention processors", "diffusers, processors", lora,
           {"unet": ATTENTION}, _OLD),
    Format("diffusers, text layers", "diffusers, processors", lora,
           {"text_encoder": TEXT, "text_encoder_2": TEXT}, _OLD),
    Format("diffusers, text attention in the UNet's words", "diffusers, text of before", lora,
           {"text_encoder": TEXT}, _OLD),
    Format("peft", "peft", lora, _UNET, {**_PEFT, "alpha": None}),
    Format("peft with the adapter's name and alphas", "peft", lora, _UNET, _ADAPTER, varies=True),
    Format("OneTrainer", "OneTrainer", lora, _EVERY, varies=True),
    Format("ComfyUI, `diffusion_model.`", "diffusion_model.", lora, _BOTH),
    Format("LDM, `model.diffusion_model.`", "model.diffusion_model.", lora, _UNET),
    Format("kohya with SGM names", "lora_unet_", lora, _BOTH),
    Format("without a prefix", "bare", lora, _UNET, _PEFT),
    Format("DoRA, a norm for each output", "kohya", with_dora(lora, 0), _EVERY | _BOTH),
    Format("DoRA, a norm for each input", "kohya", with_dora(lora, 1), _EVERY | _BOTH),
    Format("DoRA of peft", "diffusers", with_dora(lora, 0, "lora_magnitude_vector"),
           _BOTH, _PEFT),
    Format("LoHa", "kohya", loha, _EVERY | _BOTH),
    Format("LoHa with Tucker cores", "kohya", loha, _CONV, {"tucker": True}),
    Format("LoHa with DoRA", "kohya", with_dora(loha, 1), _UNET),
    *(
        Format(f"LoKr, w1 {first}, w2 {second}", "kohya", lokr,
               _CONV if second == "tucker" else _EVERY | _BOTH,
               {"first": first, "second": second})
        for first in ("whole", "product")
        for second in ("whole", "product", "tucker")
    ),
    Format("(IA)³ of outputs", "kohya", ia3, _EVERY),
    Format("(IA)³ of inputs", "kohya", ia3, _EVERY, {"on_input": True}),
    Format("full differences", "kohya", full, _EVERY | _BOTH),
)  # fmt: skip


def make_file(
    kind: Format,
    shapes: Mapping[tuple[str, str], tuple[int, ...]],
    originals: Mapping[str, str],
    seed: int = 0,
) -> MadeFile:
    """A file of a layout for a model.

    Args:
        shapes: (component, module) → of its weight; modules that are not there are left out.
        originals: the UNet's modules → their names in the original code.
    """
    generator, made = np.random.default_rng(seed), MadeFile()
    names = NAMES.get(kind.names) or original_names(kind.names, originals)
    for component, modules in kind.modules.items():
        for number, module in enumerate(modules):
            own = next(
                (m for m in (module, f"text_model.{module}") if (component, m) in shapes), ""
            )
            if not own:
                continue
            options = dict(kind.options)
            if kind.varies:
                options |= {"rank": 1 + number % 3, "alpha": 0.5 + number}
            pieces, delta = kind.method(shapes[component, own], generator, **options)
            name = names(component, module)
            made.tensors |= {f"{name}.{piece}": array for piece, array in pieces.items()}
            made.deltas[component, f"{own}.weight"] = delta
    return made
