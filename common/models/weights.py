"""Load the parts of a checkpoint with diffusers and transformers, from safetensors only."""

import contextlib
import mmap
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError, StageError, in_one_line, listed
from common.messages import warn
from common.models.checkpoint import Checkpoint, Source
from common.models.component_table import AESTHETICS, component
from common.models.lora import Fusion
from common.models.weight_files import Found, find_weights, read_weights

if TYPE_CHECKING:
    import torch

    Weights = Iterator[tuple[str, torch.Tensor]]

_OF_ENCODING = ("encoder.", "quant_conv.")  # a VAE's weights that no decoding needs


def load_model(
    checkpoint: Checkpoint,
    name: str,
    dtype: "torch.dtype",
    *,
    by_config: bool = False,
) -> tuple[Any, "Weights"]:
    """A diffusers model of a checkpoint, such as "unet", for its code, and its weights.

    Args:
        by_config: read no weights; theirs stay on torch's meta device.
    """
    module = make_without_weights(checkpoint, name, dtype)
    if by_config:
        return module, weights_of(module)
    return module, read_model(checkpoint, name, module, dtype)


def read_model(
    checkpoint: Checkpoint,
    name: str,
    module: Any,
    dtype: "torch.dtype",
    fusion: Fusion | None = None,
    *,
    but: Container[str] = (),
) -> "Weights":
    """A model's weights, with what LoRAs add to them.

    They are read from their files one by one, when their turn comes, so that the host never holds
    all.

    Args:
        module: the model, on any device.
        fusion: of its LoRAs.
        but: weights that are not to be read.

    Raises:
        BadInputFileError: a file cannot be used, or lacks some of them.
    """
    import torch

    found = find_all_weights(checkpoint, name, module)
    places = {own: place for own, place in found.places.items() if own not in but}
    is_changed = fusion is not None and bool(fusion.changes)

    def read() -> "Weights":
        # What is added to weights is added before they are rounded.
        with reading(checkpoint.source(name)):
            yield from read_weights(places, None if is_changed else dtype)
        for own in found.missing:
            yield own, torch.zeros(module.get_parameter(own).shape, dtype=dtype)

    return fusion.fuse(read(), dtype) if fusion is not None and is_changed else read()


def find_all_weights(checkpoint: Checkpoint, name: str, module: Any) -> Found:
    """Where a model's weights stand; what stands beside them for nothing is said.

    Args:
        module: the model, on any device.

    Raises:
        BadInputFileError: a file cannot be used, or lacks some of them.
    """
    source, found = checkpoint.source(name), _find(checkpoint, name, module)
    _refuse_missing_from(source, name, found)
    if found.unused:
        warn(f"{source.file or source.folder}: not used: {listed(found.unused)}")
    return found


def _find(checkpoint: Checkpoint, name: str, module: Any) -> Found:
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    return find_weights(name, checkpoint.files_read(name), shapes, checkpoint.config(name))


def _refuse_missing_from(source: Source, name: str, found: Found) -> None:
    """Raise where a model would go on with weights that nobody trained."""
    missing, where = found.missing, source.file or source.folder
    # A decoder alone is all that decoding uses.
    spared = {own for own in missing if name == "vae" and own.startswith(_OF_ENCODING)}
    if missing and not (spared == missing.keys() and not _encodes(found)):
        raise BadInputFileError(
            f"{where} lacks {len(missing)} weight(s) of the {component(name).title}: "
            f"{listed(sorted(missing.values()))}; restore it, or choose another than {source.said}"
        )


def refuse_decoder_alone(checkpoint: Checkpoint) -> None:
    """Raise `BadInputFileError` where a checkpoint's VAE cannot encode."""
    import torch

    source, module = (
        checkpoint.source("vae"),
        make_without_weights(checkpoint, "vae", torch.float32),
    )
    # What else is wrong is said when the weights are loaded.
    if not _encodes(_find(checkpoint, "vae", module)):
        raise BadInputFileError(
            f"{source.file or source.folder} is a VAE's decoder alone, and pictures are to be "
            f"encoded: choose another than {source.said}"
        )


def _encodes(found: Found) -> bool:
    """Whether a VAE's weights have any of its encoder."""
    return any(own.startswith(_OF_ENCODING) for own in found.places)


def with_weights(module: Any, weights: "Weights") -> Any:
    """A module with its weights; those mapped from files stay so, and are read by now."""
    import torch

    module.load_state_dict(dict(weights), assign=True)
    for _, tensor in [*module.named_parameters(), *module.named_buffers()]:
        # A byte of each page: the first step would wait for the disk otherwise.
        tensor.detach().flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()
    return module


def weights_of(module: Any) -> "Weights":
    """A module's parameters and buffers, one by one; it is left without data (torch's meta)."""
    yield from [*module.named_parameters(), *module.named_buffers()]
    module.to("meta")


def make_without_weights(checkpoint: Checkpoint, name: str, dtype: "torch.dtype") -> Any:
    """A diffusers model by its config alone, on torch's meta device: enough to compile it."""
    import torch

    with torch.device("meta"), reading(checkpoint.source(name)):
        config = {k: v for k, v in checkpoint.config(name).items() if k != AESTHETICS}
        model = import_class(name, config.get("_class_name")).from_config(config)
    return model.to(dtype).eval().requires_grad_(False)


def import_class(name: str, class_name: str | None = None) -> Any:
    """A diffusers model's class, such as a "unet"'s usual one; importing it takes a second."""
    import diffusers

    usual, *_ = classes = component(name).classes
    return getattr(diffusers, class_name if class_name in classes else usual)


@contextlib.contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn a library's failure to read a component into one sentence that names it."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        raise BadInputFileError(
            f"{source.file or source.folder} cannot be loaded ({in_one_line(error)}): restore it, "
            f"or choose another checkpoint than {source.said}"
        ) from error
