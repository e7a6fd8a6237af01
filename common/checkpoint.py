"""Checkpoints in diffusers' layout: where they are, what their configs say, what they weigh.

Nothing heavy is imported here, so that freshness can be decided before torch is.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import PROJECT_DIR
from common.errors import (
    BadInputFileError,
    BadSettingError,
    UnfitEnvironmentError,
    in_one_line,
)
from common.whole_files import replace_whole

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "staged-diffusion"
SUPPORTED_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionPipeline")
SUPPORTED_CLASSES = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
# What a UNet may be told besides the prompt, by its config's names for it.
SUPPORTED_CONDITIONS = {
    "addition_embed_type": (None, "text_time"),
    "encoder_hid_dim_type": (None,),
    "class_embed_type": (None,),
}
# The files that `from_pretrained` reads when no variant is asked for, whole or in shards.
WEIGHTS_NAME = re.compile(
    r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)
WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. `model_id` is what the settings call it."""

    model_id: str
    folder: Path

    @property
    def pipeline_class(self) -> str:
        """diffusers' pipeline class, one of `SUPPORTED_PIPELINES`."""
        name = self.index().get("_class_name")
        if name not in SUPPORTED_PIPELINES:
            raise BadSettingError(
                f"--model_id {self.model_id} is a checkpoint for {name}; supported: "
                f"{', '.join(SUPPORTED_PIPELINES)}"
            )
        return str(name)

    def check_supported(self, components: Sequence[str]) -> None:
        """Raise `BadSettingError` where a component is of a class that no stage can run."""
        pipeline, index = self.pipeline_class, self.index()
        for name in components:
            # A checkpoint with one text encoder has no second; a scheduler can be any.
            _, class_name = index.get(name) or (None, None)
            if class_name is not None and class_name not in SUPPORTED_CLASSES.get(
                name, (class_name,)
            ):
                raise BadSettingError(
                    f"--model_id {self.model_id}: its {name} is a {class_name}; supported in a "
                    f"{pipeline}: {', '.join(SUPPORTED_CLASSES[name])}"
                )
        if "unet" in components:
            for key, known in SUPPORTED_CONDITIONS.items():
                value = self.config("unet").get(key)
                if value not in known:
                    choices = ", ".join(map(str, known))
                    raise BadSettingError(
                        f"--model_id {self.model_id}: its UNet has {key} {value}; supported: "
                        f"{choices}"
                    )

    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`."""
        return self._read_json(self.folder / "model_index.json")

    def config(self, component: str) -> dict[str, Any]:
        """A component's own config."""
        name = {"scheduler": "scheduler_config.json"}.get(component, "config.json")
        return self._read_json(self.folder / component / name)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell along each axis (diffusers' `vae_scale_factor`)."""
        return int(2 ** (len(self.config("vae")["block_out_channels"]) - 1))

    @property
    def native_size(self) -> int:
        """The height and width, in pixels, that the UNet was trained for."""
        return int(self.config("unet")["sample_size"]) * self.vae_scale_factor

    def weights_fingerprint(self, component: str) -> str:
        """sha256 over the content of all files of a component that a stage reads.

        Hashes of large files are kept in the user's cache folder by path, size, time and inode.
        """
        digest = hashlib.sha256()
        for path in self._files_read(component):
            if path.name in ("config.json", "scheduler_config.json"):
                content = self._read_json(path)
                # Where a file was saved and by which version does not change what it computes.
                for key in ("_name_or_path", "_diffusers_version", "transformers_version"):
                    content.pop(key, None)
                file_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
                digest.update(f"{path.name} {file_hash.hexdigest()}\n".encode())
            else:
                digest.update(f"{path.name} {hash_large_file(path)}\n".encode())
        return digest.hexdigest()

    def _files_read(self, component: str) -> list[Path]:
        folder = self.folder / component
        if not folder.is_dir():
            raise BadInputFileError(
                f"the checkpoint {self.folder} has no folder {component!r}: restore it or choose "
                "another --model_id"
            )
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if component in WITHOUT_WEIGHTS:
            return [path for path in files if path.suffix in (".json", ".txt")]
        weights = [path for path in files if WEIGHTS_NAME.fullmatch(path.name)]
        if not weights:
            raise BadInputFileError(
                f"{folder} holds no safetensors weights (diffusion_pytorch_model.safetensors or "
                "model.safetensors): save the checkpoint with safe_serialization=True"
            )
        return [folder / "config.json", *weights]

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadInputFileError(
                f"{path} is missing: --model_id must name a checkpoint in diffusers' layout"
            ) from None
        except (OSError, ValueError) as error:
            raise BadInputFileError(f"{path} is damaged: {error}") from None
        if not isinstance(content, dict):
            raise BadInputFileError(f"{path} is damaged: it is not a JSON object")
        return content


def open_checkpoint(model_id: str, components: Sequence[str]) -> Checkpoint:
    """Find a checkpoint: an existing folder wins over a hub id.

    A relative folder is looked for in the working directory, then in the project. Of a checkpoint
    on the hub only the configs and the named components are downloaded.

    Raises:
        BadSettingError: neither a folder nor a hub id, or a component that is not supported.
        UnfitEnvironmentError: the hub cannot be reached and the checkpoint is not in its cache.
    """
    checkpoint = Checkpoint(model_id, _find_folder(model_id, components))
    checkpoint.check_supported(components)
    return checkpoint


def _find_folder(model_id: str, components: Sequence[str]) -> Path:
    for folder in (Path(model_id), PROJECT_DIR / model_id):
        if folder.is_dir():
            return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_id):
        raise BadSettingError(f"--model_id {model_id} is neither an existing folder nor a hub id")
    return _download(model_id, components)


def _download(model_id: str, components: Sequence[str]) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/config.json"]
    for component in components:
        patterns += [f"{component}/*.json", f"{component}/*.txt", f"{component}/*model.safetensors"]
        patterns += [f"{component}/*model-?????-of-?????.safetensors"]
    try:
        folder = Path(snapshot_download(model_id, allow_patterns=patterns, local_files_only=True))
        if all((folder / component).is_dir() for component in components):
            return folder
    except OSError:
        pass  # not in the cache yet
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except Exception as error:
        reason = in_one_line(error)
        raise UnfitEnvironmentError(
            f"--model_id {model_id} is no folder here and cannot be had from the hub "
            f"({type(error).__name__}: {reason}): check the name and the network, or give a folder"
        ) from None


def find_weights_file(file: str, flag: str, form: str) -> Path:
    """The safetensors file that a flag names. Raises `BadInputFileError` where there is none."""
    path = Path(file)
    if path.suffix != ".safetensors" or not path.is_file():
        raise BadInputFileError(f"{flag} {path} is no safetensors file: name one, as {form}")
    return path


def hash_large_file(path: Path) -> str:
    """sha256 of a file's content, remembered as long as its size, time and inode stay."""
    status = path.stat()
    identity = [status.st_size, status.st_mtime_ns, status.st_ino]
    memory = CACHE_DIR / "file_hashes.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    key = str(path.resolve())
    entry = known.get(key)
    if isinstance(entry, list) and entry[:3] == identity and len(entry) == 4:
        return str(entry[3])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    known[key] = [*identity, digest]
    try:
        with replace_whole(memory) as temporary:
            temporary.write_text(json.dumps(known), encoding="utf-8")
    except UnfitEnvironmentError:
        pass  # without a memory the next check hashes again
    return digest
