"""Load the parts of a checkpoint with diffusers and transformers, from safetensors only."""

import contextlib
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError, in_one_line
from common.models.checkpoint import SUPPORTED_CLASSES, Checkpoint, Source, find_weights_file
from common.runs.generation import TokenFile

if TYPE_CHECKING:
    import torch

    Weights = Iterator[tuple[str, torch.Tensor]]


def quiet_libraries() -> None:
    """Keep the libraries' own warnings and bars off the terminal; call before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("torchax").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)


def spare_imports(*packages: str) -> None:
    """Let diffusers do without packages that it imports wherever it finds them.

    peft, scipy and transformers take two fifths of the time to import a UNet, which needs none of
    them. Call before diffusers' classes are imported.
    """
    import diffusers.utils

    if "diffusers.models.modeling_utils" in sys.modules:
        return  # it has them already
    for package in packages:
        setattr(diffusers.utils.import_utils, f"_{package}_available", False)
    if "peft" in packages:
        # Asked for at every call of a UNet, whose LoRAs it would scale.
        diffusers.utils.USE_PEFT_BACKEND = False


def import_text_classes(checkpoint: Checkpoint) -> None:
    """Import what `load_text_pipeline` needs, which takes longer than small weights do."""
    import diffusers
    import transformers

    getattr(diffusers, checkpoint.pipeline_class)
    for name in text_components(checkpoint):
        getattr(transformers, checkpoint.index()[name][1])


def load_text_pipeline(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    """diffusers' own pipeline with the text parts alone, for its `encode_prompt`."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    index = checkpoint.index()
    options: dict[str, Any] = {"vae": None, "unet": None, "scheduler": None}
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    if checkpoint.pipeline_class == "StableDiffusionXLPipeline":
        options["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
        options["add_watermarker"] = False
    else:
        options |= {"safety_checker": None, "feature_extractor": None}
        options["requires_safety_checker"] = False
    if checkpoint.file is not None:
        with reading(checkpoint.source("text_encoder")):
            pipeline = pipeline_class.from_single_file(
                str(checkpoint.file),
                config=str(checkpoint.folder),
                torch_dtype=dtype,
                local_files_only=True,
                **options,
            )
            for name in text_components(checkpoint):
                _check_complete(getattr(pipeline, name))
        return pipeline
    for name in text_components(checkpoint):
        source = checkpoint.source(name)
        _, class_name = index[name]
        with reading(source):
            component_class = getattr(transformers, class_name)
            if name.startswith("tokenizer"):
                options[name] = component_class.from_pretrained(
                    source.folder, local_files_only=True
                )
                continue
            options[name], found = component_class.from_pretrained(
                source.folder,
                local_files_only=True,
                use_safetensors=True,
                variant=source.variant,
                dtype=dtype,
                # Named, so that no config can have another one fetched.
                attn_implementation="sdpa",
                output_loading_info=True,
            )
            _refuse_missing(sorted(found["missing_keys"]))
    return pipeline_class(**options)


def find_embedding(embedding: TokenFile) -> Path:
    """The file of a textual inversion. Raises `BadInputFileError` where there is none."""
    return find_weights_file(embedding.file, "--embedding", "FILE or FILE:TOKEN")


def load_embedding(pipeline: Any, embedding: TokenFile) -> None:
    """Teach a text pipeline a textual inversion's token, by diffusers' own loader.

    Layouts: one tensor under any key (diffusers' and the web UIs'), or SDXL's `clip_l` and
    `clip_g`, one for each text encoder.
    """
    from safetensors.torch import load_file

    path = find_embedding(embedding)
    try:
        tensors = load_file(path)
        encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
        vectors = list(tensors.values())
        if tensors.keys() == {"clip_l", "clip_g"}:
            encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
            vectors = [tensors["clip_l"], tensors["clip_g"]]
        for vector, (tokenizer, text_encoder) in zip(vectors, encoders, strict=True):
            pipeline.load_textual_inversion(
                vector, token=embedding.token, tokenizer=tokenizer, text_encoder=text_encoder
            )
    except Exception as error:
        reason = in_one_line(error)
        raise BadInputFileError(
            f"--embedding {path} cannot be used with this checkpoint ({type(error).__name__}: "
            f"{reason}): choose another file or token (FILE:TOKEN)"
        ) from error


def text_components(checkpoint: Checkpoint) -> list[str]:
    """The tokenizers and text encoders that `model_index.json` lists."""
    return checkpoint.listed(("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"))


def load_model(
    checkpoint: Checkpoint,
    name: str,
    dtype: "torch.dtype",
    *,
    change: Callable[[Any], None] | None = None,
    by_config: bool = False,
) -> tuple[Any, "Weights"]:
    """diffusers' UNet ("unet") or VAE ("vae") of a checkpoint, for its code, and its weights.

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
    _check_complete(model)
    return model.eval().requires_grad_(False)


def make_without_weights(checkpoint: Checkpoint, name: str, dtype: "torch.dtype") -> Any:
    """A UNet or VAE by its config alone, on torch's meta device: enough to compile it."""
    import torch

    with torch.device("meta"), reading(checkpoint.source(name)):
        model = import_class(name).from_config(checkpoint.config(name))
    return model.to(dtype).eval().requires_grad_(False)


def import_class(name: str) -> Any:
    """diffusers' class of a UNet ("unet") or VAE ("vae"); importing it takes a second."""
    import diffusers

    (class_name,) = SUPPORTED_CLASSES[name]
    return getattr(diffusers, class_name)


def _check_complete(model: Any) -> None:
    """Raise `ValueError` where the file that was read lacked some of a model's weights."""
    parameters = model.named_parameters() if hasattr(model, "named_parameters") else ()
    _refuse_missing([name for name, parameter in parameters if parameter.is_meta])


def _refuse_missing(names: list[str]) -> None:
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
    _refuse_missing(sorted(own - names))
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
