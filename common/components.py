"""Load the parts of a checkpoint with diffusers and transformers, from safetensors only."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.checkpoint import Checkpoint
from common.errors import BadInputFileError

if TYPE_CHECKING:
    import torch


def quiet_libraries() -> None:
    """Keep the libraries' own warnings and bars off the terminal; call before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("torchax").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)


def load_text_pipeline(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    """diffusers' own pipeline with the text parts alone, for its `encode_prompt`."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"vae": None, "unet": None, "scheduler": None}
    index = checkpoint.index()
    for name in text_components(checkpoint):
        library, class_name = index[name]
        if library != "transformers":
            raise BadInputFileError(
                f"{checkpoint.folder / 'model_index.json'}: {name} is a {library}.{class_name}; "
                "only transformers' text encoders and tokenizers are supported"
            )
        with reading(checkpoint, name):
            arguments: dict[str, Any] = {"local_files_only": True}
            if not name.startswith("tokenizer"):
                arguments |= {"use_safetensors": True, "dtype": dtype}
            options[name] = getattr(transformers, class_name).from_pretrained(
                checkpoint.folder / name, **arguments
            )
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    if checkpoint.pipeline_class == "StableDiffusionXLPipeline":
        options["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
        options["add_watermarker"] = False
    else:
        options |= {"safety_checker": None, "feature_extractor": None}
        options["requires_safety_checker"] = False
    return pipeline_class(**options)


def text_components(checkpoint: Checkpoint) -> list[str]:
    """The tokenizers and text encoders that `model_index.json` lists."""
    index = checkpoint.index()
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    return [name for name in names if index.get(name, [None])[0] is not None]


def load_unet(checkpoint: Checkpoint, dtype: "torch.dtype") -> "torch.nn.Module":
    """diffusers' UNet2DConditionModel, on the CPU, for inference."""
    from diffusers import UNet2DConditionModel

    return _load_model(UNet2DConditionModel, checkpoint, "unet", dtype)


def load_vae(checkpoint: Checkpoint, dtype: "torch.dtype") -> "torch.nn.Module":
    """diffusers' AutoencoderKL, on the CPU, for inference."""
    from diffusers import AutoencoderKL

    return _load_model(AutoencoderKL, checkpoint, "vae", dtype)


def load_scheduler(checkpoint: Checkpoint, class_name: str) -> Any:
    """A diffusers scheduler of the given class with the checkpoint's scheduler settings."""
    import diffusers

    return getattr(diffusers, class_name).from_config(checkpoint.config("scheduler"))


def _load_model(model_class: Any, checkpoint: Checkpoint, name: str, dtype: "torch.dtype") -> Any:
    from diffusers.utils import logging

    logging.disable_progress_bar()
    with reading(checkpoint, name):
        model = model_class.from_pretrained(
            checkpoint.folder / name,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def reading(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """Turn a library's failure to read a component into one sentence that names it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInputFileError(
            f"{checkpoint.folder / name} cannot be loaded ({type(error).__name__}: {reason}): "
            "restore the checkpoint or choose another --model_id"
        ) from error
