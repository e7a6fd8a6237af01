"""Load the parts of a checkpoint with diffusers and transformers, from safetensors only."""

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError, in_one_line
from common.models.checkpoint import Checkpoint, Source
from common.models.component_table import component

if TYPE_CHECKING:
    import torch

    Weights = Iterator[tuple[str, torch.Tensor]]


def load_model(
    checkpoint: Checkpoint,
    name: str,
    dtype: "torch.dtype",
    *,
    change: Callable[[Any], None] | None = None,
    by_config: bool = False,
) -> tuple[Any, "Weights"]:
    """A diffusers model of a checkpoint, such as "unet", for its code, and its weights.

    Weights under diffusers' names are read from their files one by one, when their turn comes, so
    that the host never holds all. Those in the original layout or under older names, and those
    that are changed, are read by diffusers itself.

    Args:
        change: changes the module's weights, by a LoRA for example.
        by_config: read no weights; theirs stay on torch's meta device.
    """
    source, module = checkpoint.source(name), make_without_weights(checkpoint, name, dtype)
    if by_config:
        return module, weights_of(module)
    files = weights_files(checkpoint, name)
    with reading(source):
        if change is None and _hold_exactly(files, module):
            return module, _read_in_turn(source, files, dtype)
        module = _load_whole(source, module, dtype)
    if change is not None:
        change(module)
    return module, weights_of(module)


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


def weights_files(checkpoint: Checkpoint, name: str) -> list[Path]:
    """The safetensors files that hold a component's weights."""
    return [path for path in checkpoint.files_read(name) if path.suffix == ".safetensors"]


def _hold_exactly(files: Sequence[Path], module: Any) -> bool:
    """Whether files hold a module's parameters and buffers, each once, and nothing else."""
    from safetensors import safe_open

    wanted = {name: list(tensor.shape) for name, tensor in weights_of(module)}
    found: list[tuple[str, list[int]]] = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            found += [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    return dict(found) == wanted and len(found) == len(wanted)


def _read_in_turn(source: Source, files: Sequence[Path], dtype: "torch.dtype") -> "Weights":
    """The weights in files, each mapped into memory or, where its dtype is another, converted."""
    from safetensors import safe_open

    for file in files:
        with reading(source), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name).to(dtype)


def _load_whole(source: Source, without_weights: Any, dtype: "torch.dtype") -> Any:
    """A model with its weights, by diffusers' own loaders."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    if source.file is not None:
        _refuse_other_config(without_weights, source.file)
        model = type(without_weights).from_single_file(
            str(source.file),
            config=str(source.folder),
            torch_dtype=dtype,
            local_files_only=True,
        )
    else:
        model = type(without_weights).from_pretrained(
            source.folder,
            torch_dtype=dtype,
            variant=source.variant,
            use_safetensors=True,
            local_files_only=True,
        )
    check_complete(model)
    return model.eval().requires_grad_(False)


def make_without_weights(checkpoint: Checkpoint, name: str, dtype: "torch.dtype") -> Any:
    """A diffusers model by its config alone, on torch's meta device: enough to compile it."""
    import torch

    with torch.device("meta"), reading(checkpoint.source(name)):
        model = import_class(name).from_config(checkpoint.config(name))
    return model.to(dtype).eval().requires_grad_(False)


def import_class(name: str) -> Any:
    """The class of a diffusers model, such as "unet"; importing it takes a second."""
    import diffusers

    (class_name,) = component(name).classes
    return getattr(diffusers, class_name)


def check_complete(model: Any) -> None:
    """Raise `ValueError` where the file that was read lacked some of a model's weights."""
    parameters = model.named_parameters() if hasattr(model, "named_parameters") else ()
    refuse_missing([name for name, parameter in parameters if parameter.is_meta])


def refuse_missing(names: Sequence[str]) -> None:
    """Raise `ValueError` where there are weights that a file lacks, by their names."""
    if names:
        raise ValueError(f"{len(names)} weights are missing, such as {names[0]}")


def _refuse_other_config(model: Any, file: Path) -> None:
    """Raise `ValueError` where a file in diffusers' layout is for a model of another config.

    diffusers would take it for one in the original layout and fail in words of its own.
    """
    from safetensors import safe_open

    with safe_open(file, "np") as tensors:
        names, own = set(tensors.keys()), set(model.state_dict())
    if not names & own:
        return  # the original layout
    refuse_missing(sorted(own - names))
    if foreign := sorted(names - own):
        raise ValueError(
            f"{len(foreign)} weights are for a model of another config, such as {foreign[0]}: "
            "name the folder that has its config"
        )


@contextlib.contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn a library's failure to read a component into one sentence that names it."""
    try:
        yield
    except Exception as error:
        raise BadInputFileError(
            f"{source.file or source.folder} cannot be loaded ({type(error).__name__}: "
            f"{in_one_line(error)}): restore it, or choose another checkpoint than {source.said}"
        ) from error
