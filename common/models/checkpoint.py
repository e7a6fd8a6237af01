"""Checkpoints in diffusers' layout: where they are, what their configs say, what they weigh.

Nothing heavy is imported here, so that freshness can be decided before torch is.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import private_cache
from common.errors import BadInputFileError, BadSettingError, UnfitEnvironmentError
from common.models.component_table import (
    AESTHETICS,
    COMPONENTS,
    LIBRARIES,
    PIPELINES,
    REFINERS_LACK,
    Component,
    channels_of,
    component,
    config_files,
    config_misfit,
    edits_pictures,
    index_misfit,
    is_shown_masks,
    loaded_for,
)
from common.models.file_flags import Configs, configs_in_file
from common.text_files import parse_json, read_text
from common.whole_files import replace_whole


@dataclass(frozen=True)
class Source:
    """Where a component is read from."""

    said: str  # the flag that names it and its value, for messages
    folder: Path  # holds its config, and its weights as well unless `file` does
    file: Path | None = None  # one safetensors file, in diffusers' or in the original layout
    variant: str | None = None  # of the weights in `folder`


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: a folder in diffusers' layout, or a single file with such a folder's configs.

    `model_id` is what the settings call it; `replaced` are components that come from elsewhere.
    """

    model_id: str
    folder: Path
    file: Path | None = None
    variant: str | None = None
    replaced: Mapping[str, Source] = field(default_factory=dict)

    def source(self, name: str) -> Source:
        """Where a component is read from."""
        if name in self.replaced:
            return self.replaced[name]
        return Source(
            said=f"--model_id {self.model_id}",
            folder=self.folder / name,
            file=self.file if component(name).has_weights else None,
            variant=self.variant,
        )

    @property
    def pipeline_class(self) -> str:
        """diffusers' text-to-image pipeline with the checkpoint's parts."""
        name = self.index().get("_class_name")
        if not isinstance(name, str) or name not in PIPELINES:
            raise BadSettingError(
                f"--model_id {self.model_id} is a checkpoint for {name}; supported: "
                f"{', '.join(PIPELINES)}"
            )
        return PIPELINES[name]

    def check_supported(self, components: Sequence[str]) -> None:
        """Raise `BadSettingError` where a component is of a class that no stage can run."""
        pipeline, index = self.pipeline_class, self.index()
        rows = [component(name) for name in components]
        # transformers' configs name no class, so that the index must.
        by_index = {row.name for row in rows if self._has(row) and row.library == "transformers"}
        if missing := by_index - set(self.listed(components)):
            raise BadInputFileError(
                f"{self.folder / 'model_index.json'} lists no {min(missing)}: restore it, or "
                "choose another checkpoint"
            )
        for name in self.listed([row.name for row in COMPONENTS]):
            library, class_name = index[name]
            if library not in LIBRARIES:
                raise BadSettingError(
                    f"{self.source(name).said}: its {name} is a {class_name} of {library}; only "
                    f"code of {', '.join(LIBRARIES)} is run, none of a checkpoint's own"
                )
        for row in rows:
            class_name = self._class_of(row.name)
            if class_name is not None and row.classes and class_name not in row.classes:
                raise BadSettingError(
                    f"{self.source(row.name).said}: its {row.name} is a {class_name}; supported "
                    f"in a {pipeline}: {', '.join(row.classes)}"
                )
        for row in rows:
            if self._has(row):
                self._check_config(row)
        if self._config_file("unet").is_file():
            self._check_channels()

    def _class_of(self, name: str) -> str | None:
        """A component's class; None where the checkpoint has none, or does not tell."""
        if name in self.replaced:
            return self._read_json(self._config_file(name)).get("_class_name")
        _, class_name = self.index().get(name) or (None, None)
        return class_name

    def _check_config(self, row: Component) -> None:
        """Raise `BadSettingError` where a component's config asks for what no stage does."""
        for key, known in row.supported.items():
            value = self.config(row.name).get(key)
            if value not in known:
                raise BadSettingError(
                    f"{self.source(row.name).said}: its {row.title} has {key} {value}; supported: "
                    f"{', '.join(map(str, known))}"
                )

    def _check_channels(self) -> None:
        """Raise `BadSettingError` where the UNet wants other channels than stages can give it."""
        takes, gives = self.unet_channels
        if takes not in (gives, 2 * gives, 2 * gives + 1):
            raise BadSettingError(
                f"{self.source('unet').said}: its UNet takes {takes} channels and gives {gives}; "
                f"stages feed {gives}, {2 * gives} for edits by instruction and {2 * gives + 1} "
                "for inpainting: choose another checkpoint"
            )

    @property
    def unet_channels(self) -> tuple[int, int]:
        """The channels that the UNet takes, and those of the latents that it predicts."""
        return channels_of(self.config("unet"))

    @property
    def inpaints_by_channels(self) -> bool:
        """Whether the UNet is shown the mask and the masked picture beside its latents."""
        return is_shown_masks(self.config("unet"))

    @property
    def edits_pictures(self) -> bool:
        """Whether the UNet is shown a picture to edit by instruction."""
        return edits_pictures(self.config("unet"))

    @property
    def upcasts_vae(self) -> bool:
        """Whether the VAE asks for float32."""
        return bool(self.config("vae").get("force_upcast", True))  # diffusers' default

    def components_for(self, artifact: str) -> list[str]:
        """Those of the components that its stage reads to make an artifact, in their order."""
        rows = [component(name) for name in loaded_for(artifact)]
        return [row.name for row in rows if self._has(row)]

    def _has(self, row: Component) -> bool:
        if row.name in self.replaced or self.listed([row.name]):
            return True
        return row.needed and not (row.name in REFINERS_LACK and self.is_refiner)

    @property
    def is_refiner(self) -> bool:
        """Whether it is as SDXL's refiner: with the second text encoder alone."""
        index, second = self.index(), self.listed(["text_encoder_2"])
        return bool(second) and index.get("text_encoder") == [None, None]

    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`."""
        path = self.folder / "model_index.json"
        content = self._read_json(path)
        if misfit := index_misfit(content):
            raise BadInputFileError(
                f"{path} cannot be used ({misfit}): restore it, or choose another checkpoint"
            )
        return content

    def listed(self, components: Sequence[str]) -> list[str]:
        """Those of the components that `model_index.json` lists."""
        index = self.index()
        return [name for name in components if (index.get(name) or [None])[0] is not None]

    def config(self, name: str) -> dict[str, Any]:
        """A component's own config, with what the UNet's file and the index say besides."""
        path = self._config_file(name)
        content = {**self._read_json(path), **self._flags_of_file()[1].get(name, {})}
        has_index = (self.folder / "model_index.json").is_file()
        if name == "unet" and has_index and self.index().get(AESTHETICS):
            content[AESTHETICS] = True
        if misfit := config_misfit(name, content):
            raise BadInputFileError(
                f"{path} cannot be used ({misfit}): restore it, or choose another checkpoint"
            )
        return content

    def said_by_file(self) -> list[str]:
        """What the UNet's file says against the configs, each as a part of a sentence."""
        flags, configs = self._flags_of_file()
        return [
            f"{', '.join(flags)}: {name}'s {key} is {value}"
            + (f", not {before}" if before is not None else "")
            for name, values in configs.items()
            for key, value in values.items()
            if (before := self._read_json(self._config_file(name)).get(key)) != value
        ]

    def _flags_of_file(self) -> tuple[list[str], Configs]:
        file = self.source("unet").file
        if file is None or not file.is_file():  # a stage without a UNet need not have it
            return [], {}
        return configs_in_file(file, self.source("unet").said)

    def _config_file(self, name: str) -> Path:
        return self.source(name).folder / component(name).config_file

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell along each axis (diffusers' `vae_scale_factor`)."""
        config = self.config("vae")
        # `AutoencoderTiny` names the levels of its two halves.
        levels = config.get("decoder_block_out_channels") or config["block_out_channels"]
        return int(2 ** (len(levels) - 1))

    @property
    def native_size(self) -> int:
        """The height and width, in pixels, that the UNet was trained for."""
        return int(self.config("unet")["sample_size"]) * self.vae_scale_factor

    def fingerprints_for(self, artifact: str) -> dict[str, str]:
        """The fingerprint of each component that is read to make an artifact."""
        return {name: self.weights_fingerprint(name) for name in self.components_for(artifact)}

    def weights_fingerprint(self, name: str) -> str:
        """sha256 over the content of all files of a component that a stage reads.

        Hashes of large files are kept in the user's cache folder by path, size, time and inode.
        """
        digest, files = hashlib.sha256(), self.files_read(name)
        weights = [path for path in files if path.suffix.lower() == ".safetensors"]
        only_file = weights[0] if len(weights) == 1 else None  # which may have any name
        for path in files:
            if path.name in config_files():
                content = self._read_json(path)
                # Where a file was saved and by which version does not change what it computes.
                for key in ("_name_or_path", "_diffusers_version", "transformers_version"):
                    content.pop(key, None)
                file_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
                digest.update(f"{path.name} {file_hash.hexdigest()}\n".encode())
            else:
                called = "weights" if path == only_file else path.name
                digest.update(f"{called} {hash_large_file(path)}\n".encode())
        return digest.hexdigest()

    def files_read(self, name: str) -> list[Path]:
        """The files that a stage reads of a component.

        Raises:
            BadInputFileError: its folder or its weights are missing.
            BadSettingError: it has weights, but not of the variant that is asked for.
        """
        source = self.source(name)
        folder, variant = source.folder, source.variant
        if not folder.is_dir():
            raise BadInputFileError(
                f"{source.said} has no folder {folder}: restore it or choose another checkpoint"
            )
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not component(name).has_weights:
            return [path for path in files if path.suffix in (".json", ".txt")]
        if source.file is not None:
            return [folder / component(name).config_file, source.file]
        if any(path.name == "adapter_config.json" for path in files):
            raise BadInputFileError(
                f"{folder} holds an adapter (adapter_config.json), which would be added unasked: "
                "remove it, and name it by --lora"
            )
        return [folder / component(name).config_file, *self._weights_among(files, folder, variant)]

    def _weights_among(
        self, files: Sequence[Path], folder: Path, variant: str | None
    ) -> list[Path]:
        """The weights among the files of a component's folder, with the index of their shards."""
        weights = [path for path in files if weights_name(variant).fullmatch(path.name)]
        if not weights and variant is not None:
            raise BadSettingError(
                f"--variant {variant}: {folder} holds no such weights; it has "
                f"{', '.join(path.name for path in files)}"
            )
        if not weights:
            raise BadInputFileError(
                f"{folder} holds no safetensors weights (diffusion_pytorch_model.safetensors or "
                "model.safetensors): name a --variant if it has one, or save the checkpoint with "
                "safe_serialization=True"
            )
        for index in (path for path in weights if ".index." in path.name):
            weight_map = self._read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(shard, str) for shard in weight_map.values()
            ):
                raise BadInputFileError(f"{index} is damaged: it has no weight_map: restore it")
            shards = set(weight_map.values())
            if missing := sorted(shards - {path.name for path in weights}):
                raise BadInputFileError(
                    f"{folder} lacks {missing[0]}, which {index.name} names: restore it"
                )
        return weights

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = parse_json(read_text(path))
        except FileNotFoundError:
            raise BadInputFileError(
                f"{path} is missing: name a checkpoint, or a part of one, in diffusers' layout"
            ) from None
        except (OSError, ValueError) as error:
            raise BadInputFileError(f"{path} is damaged: {error}") from None
        if not isinstance(content, dict):
            raise BadInputFileError(f"{path} is damaged: it is not a JSON object")
        return content


def weights_name(variant: str | None) -> re.Pattern[str]:
    """The names of the files that `from_pretrained` reads, whole or in shards with their index."""
    shard = r"-\d{5}-of-\d{5}"
    if variant is None:
        names = rf"({shard})?\.safetensors|\.safetensors\.index\.json"
    else:
        v = re.escape(variant)
        names = rf"(\.{v}({shard})?|{shard}\.{v})\.safetensors|\.safetensors\.index\.{v}\.json"
    return re.compile(rf"(diffusion_pytorch_model|model)({names})")


# What this process has hashed or looked up: path and identity → sha256.
_hashed: dict[tuple[str, tuple[int, ...]], str] = {}


def hash_large_file(path: Path) -> str:
    """sha256 of a file's content, remembered as long as its size, time and inode stay."""
    status = path.stat()
    identity = [status.st_size, status.st_mtime_ns, status.st_ino]
    asked = str(path.resolve()), tuple(identity)
    if asked not in _hashed:
        _hashed[asked] = _look_up_or_hash(path, identity)
    return _hashed[asked]


def _look_up_or_hash(path: Path, identity: list[int]) -> str:
    """The hash in the user's cache, or that of the content."""
    memory = private_cache.folder() / "file_hashes.json"
    try:
        known = dict(parse_json(read_text(memory)))
    except (OSError, ValueError, TypeError):
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
