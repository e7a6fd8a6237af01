"""LoRAs and their kin, added to weights as these are read: in float32, rounded once at the end."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError, listed
from common.messages import warn
from common.models.checkpoint import Checkpoint, hash_large_file
from common.models.component_table import component, text_encoders
from common.models.find import find_weights_file
from common.models.lora_file import LoraContent, Module, is_bundled
from common.models.lora_formulas import OF_BIAS, bias_change, change, dora_axis, rank_of
from common.models.lora_names import names_in_files
from common.models.model_settings import LoraFile

if TYPE_CHECKING:
    import torch

    Weights = Iterator[tuple[str, torch.Tensor]]

LEAST_KEPT = 0.9  # of a LoRA after rounding, below which a warning says so
# Of the stages: what of a file is for no component is said by the first that reads it.
_ORDER = [*text_encoders(), "unet"]


def lora_settings(loras: Sequence[LoraFile], components: Sequence[str]) -> list[dict[str, Any]]:
    """What of the LoRAs determines the given components: content and scale, in their order."""
    return [
        {"sha256": hash_large_file(find_lora(lora)), "scale": lora.scale}
        for lora in loras_for(loras, components)
    ]


def loras_for(loras: Sequence[LoraFile], components: Sequence[str]) -> tuple[LoraFile, ...]:
    """Those that change one of the given components."""
    return tuple(lora for lora in loras if parts_of(lora) & set(components))


def find_lora(lora: LoraFile) -> Path:
    """The file of a LoRA. Raises `BadInputFileError` where there is none."""
    return find_weights_file(lora.file, "--lora", "FILE or FILE:SCALE")


def parts_of(lora: LoraFile) -> set[str]:
    """The components that a LoRA file changes.

    Raises:
        BadInputFileError: there is no such safetensors file, or it changes none of them.
    """
    content = LoraContent(find_lora(lora))
    if not content.parts():
        raise BadInputFileError(
            f"{content.said} holds no LoRA layers for a UNet or text encoder in a known layout, "
            f"but {listed(sorted(content.others)) or 'no tensors'}: choose another file"
        )
    return content.parts()


@dataclass
class Fusion:
    """What LoRAs add to the weights of one component."""

    component: str
    source: str  # of the weights, for messages
    changes: dict[str, list["_Change"]] = field(default_factory=dict)  # module → in their order
    changed: float = 0.0  # ‖ΔW‖² of all weights together
    kept: float = 0.0  # ⟨what rounding leaves of ΔW, ΔW⟩

    def fuse(self, weights: "Weights", dtype: "torch.dtype") -> "Weights":
        """Weights with what is added to them, in a dtype that each is rounded to once.

        Args:
            weights: by their names in the model, in the dtype of their file.
        """
        for name, weight in weights:
            changes, kind = self._changes_of(name), name.rpartition(".")[2]
            if not changes:
                yield name, weight.to(dtype)
                continue
            before = weight.float()
            after = before
            for each in changes:
                after = each.apply(after, kind)
            rounded, delta = after.to(dtype), after - before
            self.changed += float(delta.square().sum())
            self.kept += float(((rounded.float() - before.to(dtype).float()) * delta).sum())
            yield name, rounded
        self._say_what_is_kept(dtype)

    def leave(self, weights: dict[str, Any]) -> None:
        """Take out of a model's weights, by name, those that something is added to."""
        for name in [*weights]:
            if self._changes_of(name):
                del weights[name]

    def _changes_of(self, name: str) -> list["_Change"]:
        module, _, kind = name.rpartition(".")
        return [each for each in self.changes.get(module, ()) if each.is_of(kind)]

    def _say_what_is_kept(self, dtype: "torch.dtype") -> None:
        if self.changed and self.kept < LEAST_KEPT * self.changed:
            name = str(dtype).removeprefix("torch.")
            warn(
                f"--lora: rounded to {name}, the {component(self.component).title} keeps "
                f"{max(self.kept, 0) / self.changed:.0%} of what is added to it, since its weights "
                f"are {name} already ({self.source}): take a checkpoint in float16 or float32, or "
                "compute in float32"
            )


@dataclass(frozen=True)
class _Change:
    """What one file adds to one module."""

    content: LoraContent
    module: Module
    scaling: float  # alpha / rank
    strength: float

    def is_of(self, kind: str) -> bool:
        """Whether a module's parameter of a kind, such as "bias", is changed."""
        return kind == "weight" or (kind == "bias" and bool(OF_BIAS & self.module.tensors.keys()))

    def apply(self, weight: "torch.Tensor", kind: str) -> "torch.Tensor":
        """A weight or bias, float32, with what is added to it."""
        by_piece = {name: piece for piece, name in self.module.tensors.items()}
        pieces = {by_piece[k]: v for k, v in self.content.read([*by_piece]).items()}
        if kind == "weight":
            delta = change(weight, pieces, self.scaling)
        else:
            delta = bias_change(pieces, self.scaling).reshape(weight.shape)
        if not delta.isfinite().all():
            raise BadInputFileError(
                f"{self.content.said}: what {listed(sorted(by_piece))} add is not finite: get the "
                "file again"
            )
        return weight + self.strength * delta


def plan_fusion(
    name: str, module: Any, checkpoint: Checkpoint, loras: Sequence[LoraFile]
) -> Fusion:
    """What LoRAs add to a component, all of it checked before a weight is read.

    Args:
        name: the component's.
        module: the model, with its weights or on torch's meta device.

    Raises:
        BadInputFileError: a file does not fit the model. What of it is not used is said.
    """
    fusion = Fusion(name, checkpoint.source(name).said)
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters()}
    targets = [key[: -len(".weight")] for key in shapes if key.endswith(".weight")]
    biases = [key[: -len(".bias")] for key in shapes if key.endswith(".bias")]
    added = [lora for lora in loras if name in parts_of(lora)]
    names = names_in_files(name, targets, checkpoint.config(name)) if added else {}
    for lora in added:
        content = LoraContent(find_lora(lora))
        found, unused = content.fitting(name, names)
        _say_other_family(content, checkpoint, fits=bool(found))
        if not found:
            raise BadInputFileError(
                f"{content.said} fits no layer of this checkpoint's {component(name).title}: not "
                f"used would be {listed(sorted(unused))}; choose a LoRA for this family"
            )
        for target, each in found.items():
            scaling = content.scaling(each, target, name, rank_of(_on_meta(content, each)))
            _check_shapes(content, each, target, shapes)
            entry = _Change(content, each, scaling, lora.scale)
            fusion.changes.setdefault(target, []).append(entry)
        for line in content.warnings(found, biases):
            warn(line)
        _say_axes(content, found, shapes)
        _say_the_rest(content, name, unused)
    return fusion


def _on_meta(content: LoraContent, module: Module) -> "dict[str, torch.Tensor]":
    import torch

    return {
        piece: torch.empty(content.tensors[name].shape, device="meta")
        for piece, name in module.tensors.items()
    }


def _check_shapes(
    content: LoraContent, module: Module, target: str, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raise where a module's pieces do not fit its weight, by computing on shapes alone."""
    import torch

    pieces = _on_meta(content, module)
    shape, bias = shapes[f"{target}.weight"], shapes.get(f"{target}.bias")
    try:
        change(torch.empty(shape, device="meta"), pieces, 1.0)
        if OF_BIAS & pieces.keys():
            of_bias = bias_change(pieces, 1.0)
            if bias is None or of_bias.numel() != bias[0]:
                raise RuntimeError(f"a change of {list(of_bias.shape)} for a bias of {bias}")
        scale = pieces.get("weight")
        if scale is not None and scale.numel() not in shape[:2]:
            raise RuntimeError(f"{scale.numel()} numbers for a weight of {list(shape)}")
    except (RuntimeError, IndexError, ValueError):
        assert module.method is not None
        have = ", ".join(
            f"{name} {list(content.tensors[name].shape)}" for name in module.tensors.values()
        )
        lacks = [
            module.spelled(piece)
            for piece in sorted(module.method.may_have - module.tensors.keys())
            if piece in ("mid", "hada_t1", "hada_t2", "lokr_t2")
        ]
        perhaps = f" (or it lacks {' and '.join(lacks)})" if lacks else ""
        raise BadInputFileError(
            f"{content.said} does not fit this checkpoint{_trained_for(content)}: {have} for a "
            f"weight of {list(shape)}{perhaps}: choose a LoRA for this family"
        ) from None


def _trained_for(content: LoraContent) -> str:
    family = content.family()
    return f", trained for {family} as it says" if family else ""


def _say_other_family(content: LoraContent, checkpoint: Checkpoint, fits: bool) -> None:
    said = content.family()
    if said is None or not fits:
        return
    own = family_of(checkpoint)
    if own not in (None, said):
        warn(f"{content.said} says that it was trained for {said}; this checkpoint is {own}")


def family_of(checkpoint: Checkpoint) -> str | None:
    """A checkpoint's family, as LoRAs' metadata name it; None: not known."""
    if checkpoint.pipeline_class == "StableDiffusionXLPipeline":
        return "SDXL"
    width = checkpoint.config("unet").get("cross_attention_dim")
    return {768: "SD 1.x", 1024: "SD 2.x"}.get(width) if isinstance(width, int) else None


def _say_the_rest(content: LoraContent, name: str, unused: list[str]) -> None:
    """Say what of a file has no effect; what is for no component, in the first stage it is for."""
    if name == min(content.parts(), key=_ORDER.index):
        unused = unused + [other for other in content.others if not is_bundled(other)]
        if bundled := content.bundled():
            warn(
                f"{content.said} also holds textual inversions ({', '.join(bundled)}), which are "
                "not used: save each as a file for --embedding"
            )
    if unused:
        share = 1 - len(unused) / len(content.tensors)
        warn(f"{content.said}: {share:.0%} of it is used; not used: {listed(sorted(unused))}")


def _say_axes(
    content: LoraContent, found: Mapping[str, Module], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Say where DoRA's norms may be meant along another axis than they are read."""
    axes: dict[int, list[str]] = {}
    for target, module in found.items():
        tensor = module.tensors.get("dora_scale")
        if tensor is None:
            continue
        norms, weight = content.tensors[tensor].shape, shapes[f"{target}.weight"]
        if len(norms) == 1 and weight[0] == weight[1]:
            warn(
                f"{content.said}: {tensor} does not tell whether its norms are of outputs or of "
                "inputs; read as of outputs"
            )
        axes.setdefault(dora_axis(weight, norms), []).append(tensor)
    if len(axes) > 1:
        fewer = min(axes.values(), key=len)
        warn(f"{content.said}: unlike the others, {listed(fewer)} has its norms along another axis")
