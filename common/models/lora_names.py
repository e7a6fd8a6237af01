"""Under which names the files of LoRAs and their kin have the modules of a model.

A tensor's name is a module's name and a piece of what is added to it: `…to_q.lora_down.weight`.
Modules are named in the ways of diffusers (old and new), peft, kohya, LyCORIS, OneTrainer, ComfyUI
and the original checkpoints (LDM, SGM).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from common.models.component_table import COMPONENTS, Component
from common.models.original_names import original_unet_name

# How pieces are spelled, the longer before those that they end in. `{peft}` may stand between.
_PEFT = r"(?:\.[^.]+)?"  # the adapter's name, as in lora_A.default.weight
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "down": (
        rf"\.(?:lora_down|lora\.down|lora_linear_layer\.down|lora_A{_PEFT})\.weight",
        r"(?<=_lora)\.down\.weight",
    ),
    "up": (
        rf"\.(?:lora_up|lora\.up|lora_linear_layer\.up|lora_B{_PEFT})\.weight",
        r"(?<=_lora)\.up\.weight",
    ),
    "up_bias": (rf"\.(?:lora_up|lora_B{_PEFT})\.bias",),
    "mid": (r"\.lora_mid\.weight",),
    "alpha": (r"(?:\.lora|\.lora_linear_layer)?\.alpha",),
    "dora_scale": (r"\.dora_scale",),
    "magnitude": (r"\.lora_magnitude_vector(?:\.[^.]+){0,2}",),
    **{
        name: (rf"\.{name}",)
        for name in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            *("diff", "diff_b", "w_norm", "b_norm", "on_input"),
        )
    },
}
_PIECES = [
    (piece, re.compile(rf"(?P<module>.+?)(?:{spelling})\Z"))
    for piece, spellings in _SPELLINGS.items()
    for spelling in spellings
]
_WRAPPER = "base_model.model."  # peft's own module around a model


def split_name(name: str) -> tuple[str, str] | None:
    """A tensor's module and piece, as its file names them; None for no piece that is known."""
    for piece, pattern in _PIECES:
        if found := pattern.match(name):
            return found["module"], piece
    return None


def component_of(name: str) -> str | None:
    """The component that a tensor or module is for, by the beginning of its name."""
    found = _split_prefix(name)
    return None if found is None else found[0]


def names_in_files(
    component: str, modules: Collection[str], config: Mapping[str, Any]
) -> dict[str, str]:
    """All names that files may have for the modules of a model, without what begins a name.

    Args:
        modules: by their paths in the model.
        config: the model's own.

    Returns:
        Name → module, for `module_of`.
    """
    found: dict[str, str] = {}
    for module in modules:
        names = [module]
        if component == "unet":
            names += [name for name in [original_unet_name(module, config)] if name]
            names += _of_attention_processors(module)
        else:
            own = module.removeprefix("text_model.")
            names += [own, f"text_model.{own}", *_of_old_text_attention(own)]
        for name in names:
            found.setdefault(name, module)
            found.setdefault(name.replace(".", "_"), module)
    return found


def module_of(name: str, names: Mapping[str, str]) -> str | None:
    """The module that a file calls so, by `names_in_files`; None where the model has none."""
    split = _split_prefix(name)
    return None if split is None else names.get(split[1])


def _of_attention_processors(module: str) -> list[str]:
    """diffusers' first names, when LoRAs were processors of attention: `processor.to_q_lora`."""
    parent, _, last = module.removesuffix(".0").rpartition(".")
    if not re.search(r"(?:^|\.)attn\d$", parent):
        return []
    return [f"{parent}.processor.{last}_lora"]


def _of_old_text_attention(module: str) -> list[str]:
    """The same for text encoders, under the UNet's words: `self_attn.to_q_lora`."""
    parent, _, last = module.rpartition(".")
    if not parent.endswith("self_attn"):
        return []
    word = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}[last]
    return [f"{start}{parent}.{word}_lora" for start in ("", "text_model.")]


def _split_prefix(name: str) -> tuple[str, str] | None:
    """The component that a name is for, and the rest of the name."""
    name = name.removeprefix(_WRAPPER)
    begins = [
        (prefix, row)
        for row in COMPONENTS
        for prefix in row.lora_prefixes
        if name.startswith(prefix)
    ]
    if begins:
        prefix, row = max(begins, key=_length)
        return row.name, name.removeprefix(prefix).removeprefix(_WRAPPER)
    bare = [row.name for row in COMPONENTS if name.startswith(row.lora_bare) and row.lora_bare]
    return (bare[0], name) if bare else None


def _length(begins: tuple[str, Component]) -> int:
    return len(begins[0])
