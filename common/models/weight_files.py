"""Which tensor of which file is which weight of a model, in every layout that tools write.

A file names a model's weights by its library's names (today's or those of before), or by those of
the original code, with or without a beginning that tells the model among others of its checkpoint.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError, listed
from common.models.component_table import component, text_encoders
from common.models.file_flags import FLAGS
from common.models.original_names import (
    Stored,
    earlier_vae_name,
    open_clip_name,
    original_unet_name,
    original_vae_name,
)
from common.models.tensor_files import TensorHeader, read_header, without_ones
from common.text_files import parse_json, read_text

if TYPE_CHECKING:
    import torch

LEAST_FOUND = 0.5  # of a model's weights in a file that is meant to hold it
# What the weight of a module in 8 bits is multiplied by, in ComfyUI's files.
_SCALES = ("scale_weight", "weight_scale")
# What files hold beside weights: that there are scales; those of computing in 8 bits, which we do
# not; a text encoder's positions, which count up, and what only comparing with pictures needs.
_SPARE = ("scaled_fp8", "scale_input", "input_scale", "position_ids", "logit_scale")

# `AutoencoderTiny` by diffusers' names, by its own, and with what tools put before these.
_OF_TINY_AUTOENCODER = re.compile(r"((en|de)coder\.layers\.|taesd_\w+\.)?\d+\.(weight|conv\.0\.)")
_OF_SD_2 = "cond_stage_model.model."

Naming = Callable[[str], Stored | None]  # the library's name of a weight → the file's, or none


@dataclass(frozen=True)
class Place:
    """Where a weight stands."""

    file: Path
    stored: Stored
    shape: tuple[int, ...]  # that it has in the model
    scale: str | None = None  # the tensor by which it is multiplied


@dataclass
class Found:
    """Where all weights of a model stand, and what stands beside them for nothing."""

    places: dict[str, Place] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # weight → what the files would call it
    unused: list[str] = field(default_factory=list)


def find_weights(
    name: str, files: Sequence[Path], shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]
) -> Found:
    """Find a model's weights in its files.

    Args:
        name: the component's.
        files: safetensors, of which shards are used where an index among them names them.
        shapes: of the model's weights, by its library's names.
        config: the model's.

    Raises:
        BadInputFileError: a file is damaged or something else, or holds another model.
    """
    headers = {path: read_header(path, str(path)).tensors for path in _with_values(files)}
    where = {tensor: path for path, tensors in headers.items() for tensor in tensors}
    first = next(iter(headers))
    said = str(first if len(headers) == 1 else first.parent)
    title = component(name).title
    prefix, stored = _best_naming(name, where, shapes, config)
    there = {own: found for own, found in stored.items() if found.name in where}
    if len(there) < LEAST_FOUND * len(shapes):
        few = f"only {len(there)} of {len(shapes)}" if there else "none"
        mend = "choose another file"
        if name == "vae" and any(map(_OF_TINY_AUTOENCODER.match, where)):
            mend = "it is a TAESD; name its folder in diffusers' layout, which has its config"
        raise BadInputFileError(
            f"{said} holds {few} of the weights of a {title}, but {listed(sorted(where))}: {mend}"
        )
    found = Found(missing={own: stored[own].name for own in stored if own not in there})
    for own, each in there.items():
        path = where[each.name]
        module = each.name.removesuffix(".weight")
        scale = next((f"{module}.{s}" for s in _SCALES if f"{module}.{s}" in headers[path]), None)
        place = Place(path, each, tuple(shapes[own]), scale)
        _check(said, place, headers[path], title)
        found.places[own] = place
    used = {each.name for each in there.values()}
    used |= {place.scale for place in found.places.values() if place.scale}
    unused = sorted(t for t in where.keys() - used if t.startswith(prefix) and not _spare(t))
    tops = {each.name.removeprefix(prefix).partition(".")[0] for each in stored.values()}
    layers = {tensor for tensor in unused if _is_further_layer(name, tensor, config)}
    of_model = [t for t in unused if t.removeprefix(prefix).partition(".")[0] in tops]
    if foreign := [tensor for tensor in of_model if tensor not in layers]:
        raise BadInputFileError(
            f"{said} has weights of a {title} of another config: {listed(foreign)}; choose another "
            "file, or name the folder that has its config"
        )
    # SD 2.x takes the last layer but one; its files hold the last as well.
    spared = layers if prefix == _OF_SD_2 else set()
    found.unused = [tensor for tensor in unused if tensor not in spared]
    return found


def _best_naming(
    name: str, where: Container[str], shapes: Iterable[str], config: Mapping[str, Any]
) -> tuple[str, dict[str, Stored]]:
    """The prefix and the names by which most of a model's weights are there."""
    return max(
        (
            (prefix, {own: _stored(own, prefix, naming) for own in shapes})
            for prefix in ("", *component(name).file_prefixes)
            for naming in _namings(name, config)
        ),
        key=lambda each: sum(found.name in where for found in each[1].values()),
    )


def read_weights(
    places: Mapping[str, Place], dtype: "torch.dtype | None"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Weights one by one, each mapped into memory or, where its dtype is another, converted.

    Args:
        dtype: None leaves each in its own, those in 8 bits in float32.
    """
    import torch
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for own, place in places.items():
        by_file.setdefault(place.file, []).append(own)
    for path, names in by_file.items():
        with safe_open(path, "pt") as file:
            order = {tensor: k for k, tensor in enumerate(file.keys())}
            for own in sorted(names, key=lambda own: order[places[own].stored.name]):
                place, stored = places[own], places[own].stored
                tensor = file.get_tensor(stored.name)
                if place.scale is not None:
                    scale = file.get_tensor(place.scale).float()
                    tensor = tensor.float() * scale.reshape(-1, *([1] * (tensor.ndim - 1)))
                if stored.third is not None:
                    tensor = tensor.chunk(3)[stored.third]
                if stored.transposed:
                    tensor = tensor.T.contiguous()
                tensor = tensor.reshape(place.shape)
                if tensor.dtype.itemsize == 1:
                    tensor = tensor.to(torch.float32)
                yield own, tensor if dtype is None else tensor.to(dtype)


def _with_values(files: Sequence[Path]) -> list[Path]:
    """Of files that hold the same weights those that diffusers reads: shards with an index."""
    weights = [path for path in files if path.suffix.lower() == ".safetensors"]
    for index in (path for path in files if path.suffix == ".json" and ".index." in path.name):
        shards = set(parse_json(read_text(index))["weight_map"].values())
        return [path for path in weights if path.name in shards]
    return weights


def _namings(name: str, config: Mapping[str, Any]) -> list[Naming]:
    def of_modules(rename: Callable[..., str | None]) -> Naming:
        def naming(weight: str) -> Stored | None:
            module, _, kind = weight.rpartition(".")
            called = rename(module, config=config)
            return None if called is None else Stored(f"{called}.{kind}")

        return naming

    if name in text_encoders():
        # transformers has written them with and without; a projection stands beside the model.
        return [
            Stored,
            lambda weight: Stored(f"text_model.{weight}"),
            lambda weight: Stored(weight.removeprefix("text_model.")),
            open_clip_name,
        ]
    others = {"unet": [original_unet_name], "vae": [original_vae_name, earlier_vae_name]}
    return [Stored, *map(of_modules, others.get(name, ()))]


def _stored(own: str, prefix: str, naming: Naming) -> Stored:
    found = naming(own)
    return Stored(own) if found is None else replace(found, name=f"{prefix}{found.name}")


def _spare(tensor: str) -> bool:
    name = tensor.removesuffix(".weight").rpartition(".")[2]
    return tensor in FLAGS or name in _SPARE or name == "text_projection"


def _is_further_layer(name: str, tensor: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a text encoder's layer after the last that its config has."""
    layer = re.search(r"(?:^|\.)(?:resblocks|layers)\.(\d+)\.", tensor)
    return (
        name in text_encoders()
        and layer is not None
        and int(layer[1]) >= int(config["num_hidden_layers"])
    )


def _check(said: str, place: Place, tensors: Mapping[str, TensorHeader], title: str) -> None:
    """Raise where a tensor is not what a weight of its shape can be read from."""
    stored, shape = place.stored, place.shape
    header, wanted = tensors[stored.name], list(shape)
    if stored.third is not None:
        wanted[0] *= 3
    if stored.transposed:
        wanted.reverse()
    if without_ones(header.shape) != without_ones(wanted):
        raise BadInputFileError(
            f"{said} is for a {title} of another config: {stored.name} is {list(header.shape)}, "
            f"not {wanted}: choose another file, or name the folder that has its config"
        )
    if not header.dtype.startswith(("F", "BF")):
        raise BadInputFileError(
            f"{said}: {stored.name} is {header.dtype}, no kind of weights that is read: get the "
            "file in float16 or bfloat16"
        )
    if place.scale is not None:
        count = prod(tensors[place.scale].shape)
        if count not in (1, header.shape[0]):
            raise BadInputFileError(
                f"{said}: {place.scale} has {count} scales for the {header.shape[0]} rows of "
                f"{stored.name}: get the file in float16 or bfloat16"
            )
