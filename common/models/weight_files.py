"""Which tensor of which file is which weight of a model, in every layout that tools write.

A file names a model's weights by diffusers' names (today's or those of before), or by those of the
original code, with or without a beginning that tells the model among others of its checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError, listed
from common.models.component_table import component
from common.models.file_flags import FLAGS
from common.models.original_names import earlier_vae_name, original_unet_name, original_vae_name
from common.models.tensor_files import TensorHeader, read_header, without_ones
from common.text_files import parse_json, read_text

if TYPE_CHECKING:
    import torch

LEAST_FOUND = 0.5  # of a model's weights in a file that is meant to hold it
# What the weight of a module in 8 bits is multiplied by, in ComfyUI's files.
_SCALES = ("scale_weight", "weight_scale")
# That there are such; the scales of computing in 8 bits, which we do not.
_SPARE = ("scaled_fp8", "scale_input", "input_scale")

Naming = Callable[[str], str | None]  # diffusers' path of a module → a file's, or none


@dataclass(frozen=True)
class Place:
    """Where a weight stands."""

    file: Path
    name: str
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
        shapes: of the model's weights, by diffusers' names.
        config: the model's.

    Raises:
        BadInputFileError: a file is damaged or something else, or holds another model.
    """
    headers = {path: read_header(path, str(path)).tensors for path in _with_values(files)}
    where = {tensor: path for path, tensors in headers.items() for tensor in tensors}
    first = next(iter(headers))
    said = str(first if len(headers) == 1 else first.parent)
    title = component(name).title
    best = max(
        (
            (prefix, {own: _named(own, prefix, naming) for own in shapes})
            for prefix in ("", *component(name).file_prefixes)
            for naming in _namings(name, config)
        ),
        key=lambda each: sum(tensor in where for tensor in each[1].values()),
    )
    prefix, names = best
    there = {own: tensor for own, tensor in names.items() if tensor in where}
    if len(there) < LEAST_FOUND * len(shapes):
        few = f"only {len(there)} of {len(shapes)}" if there else "none"
        raise BadInputFileError(
            f"{said} holds {few} of the weights of a {title}, but {listed(sorted(where))}: choose "
            "another file"
        )
    found = Found(missing={own: names[own] for own in names if own not in there})
    for own, tensor in there.items():
        path = where[tensor]
        module = tensor.removesuffix(".weight")
        scale = next((f"{module}.{s}" for s in _SCALES if f"{module}.{s}" in headers[path]), None)
        _check(said, tensor, headers[path][tensor], shapes[own], title)
        found.places[own] = Place(path, tensor, tuple(shapes[own]), scale)
    used = set(there.values()) | {p.scale for p in found.places.values() if p.scale}
    found.unused = sorted(
        tensor for tensor in where.keys() - used if tensor.startswith(prefix) and not _spare(tensor)
    )
    tops = {tensor.removeprefix(prefix).partition(".")[0] for tensor in names.values()}
    foreign = [t for t in found.unused if t.removeprefix(prefix).partition(".")[0] in tops]
    if foreign:
        raise BadInputFileError(
            f"{said} has weights of a {title} of another config: {listed(foreign)}; choose another "
            "file, or name the folder that has its config"
        )
    return found


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
            for own in sorted(names, key=lambda own: order[places[own].name]):
                place = places[own]
                tensor = file.get_tensor(place.name).reshape(place.shape)
                if place.scale is not None:
                    scale = file.get_tensor(place.scale).float()
                    tensor = tensor.float() * scale.reshape(-1, *([1] * (tensor.ndim - 1)))
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
    def own(module: str) -> str:
        return module

    others: dict[str, list[Callable[..., str | None]]] = {
        "unet": [original_unet_name],
        "vae": [original_vae_name, earlier_vae_name],
    }
    return [own, *(partial(other, config=config) for other in others.get(name, ()))]


def _named(own: str, prefix: str, naming: Naming) -> str:
    module, _, kind = own.rpartition(".")
    called = naming(module)
    return own if called is None else f"{prefix}{called}.{kind}"


def _spare(tensor: str) -> bool:
    return tensor in FLAGS or tensor.rpartition(".")[2] in _SPARE


def _check(said: str, tensor: str, header: TensorHeader, shape: Sequence[int], title: str) -> None:
    """Raise where a tensor is not what a weight of that shape can be read from."""
    if without_ones(header.shape) != without_ones(shape):
        raise BadInputFileError(
            f"{said} is for a {title} of another config: {tensor} is {list(header.shape)}, not "
            f"{list(shape)}: choose another file, or name the folder that has its config"
        )
    if not header.dtype.startswith(("F", "BF")):
        raise BadInputFileError(
            f"{said}: {tensor} is {header.dtype}, no kind of weights that is read: get the "
            "file in float16 or bfloat16"
        )
