"""Checkpoints in diffusers' layout: where they are, what their configs say, what they weigh.

Nothing heavy is imported here, so that freshness can be decided before torch is.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import private_cache
from common.errors import BadInputFileError, BadSettingError, UnfitEnvironmentError
from common.models import hub
from common.models.component_table import COMPONENTS, config_misfit, index_misfit
from common.runs.generation import PROJECT_DIR, ModelSettings
from common.text_files import parse_json, read_text
from common.whole_files import replace_whole

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
# Modules that diffusers may import for a component; the last holds its own safety checker.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")
NEEDED = ("tokenizer", "text_encoder")  # of every supported pipeline
REPLACEABLE = ("unet", "vae")


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

    def source(self, component: str) -> Source:
        """Where a component is read from."""
        if component in self.replaced:
            return self.replaced[component]
        return Source(
            said=f"--model_id {self.model_id}",
            folder=self.folder / component,
            file=None if component in WITHOUT_WEIGHTS else self.file,
            variant=self.variant,
        )

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
        if missing := set(NEEDED) & set(components) - set(self.listed(NEEDED)):
            raise BadInputFileError(
                f"{self.folder / 'model_index.json'} lists no {min(missing)}: restore it, or "
                "choose another checkpoint"
            )
        for name in self.listed(COMPONENTS):
            library, class_name = index[name]
            if library not in LIBRARIES:
                raise BadSettingError(
                    f"{self.source(name).said}: its {name} is a {class_name} of {library}; only "
                    f"code of {', '.join(LIBRARIES)} is run, none of a checkpoint's own"
                )
        for name in components:
            # A checkpoint with one text encoder has no second; a scheduler can be any.
            _, class_name = index.get(name) or (None, None)
            if name in self.replaced:
                class_name = self._read_json(self._config_file(name)).get("_class_name")
            if class_name is not None and class_name not in SUPPORTED_CLASSES.get(
                name, (class_name,)
            ):
                raise BadSettingError(
                    f"{self.source(name).said}: its {name} is a {class_name}; supported in a "
                    f"{pipeline}: {', '.join(SUPPORTED_CLASSES[name])}"
                )
        if "unet" in components:
            for key, known in SUPPORTED_CONDITIONS.items():
                value = self.config("unet").get(key)
                if value not in known:
                    choices = ", ".join(map(str, known))
                    raise BadSettingError(
                        f"{self.source('unet').said}: its UNet has {key} {value}; supported: "
                        f"{choices}"
                    )

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

    def config(self, component: str) -> dict[str, Any]:
        """A component's own config."""
        path = self._config_file(component)
        content = self._read_json(path)
        if misfit := config_misfit(component, content):
            raise BadInputFileError(
                f"{path} cannot be used ({misfit}): restore it, or choose another checkpoint"
            )
        return content

    def _config_file(self, component: str) -> Path:
        name = {"scheduler": "scheduler_config.json"}.get(component, "config.json")
        return self.source(component).folder / name

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
        digest, files = hashlib.sha256(), self.files_read(component)
        weights = [path for path in files if path.suffix == ".safetensors"]
        only_file = weights[0] if len(weights) == 1 else None  # which may have any name
        for path in files:
            if path.name in ("config.json", "scheduler_config.json"):
                content = self._read_json(path)
                # Where a file was saved and by which version does not change what it computes.
                for key in ("_name_or_path", "_diffusers_version", "transformers_version"):
                    content.pop(key, None)
                file_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
                digest.update(f"{path.name} {file_hash.hexdigest()}\n".encode())
            else:
                name = "weights" if path == only_file else path.name
                digest.update(f"{name} {hash_large_file(path)}\n".encode())
        return digest.hexdigest()

    def files_read(self, component: str) -> list[Path]:
        """The files that a stage reads of a component.

        Raises:
            BadInputFileError: its folder or its weights are missing.
            BadSettingError: it has weights, but not of the variant that is asked for.
        """
        source = self.source(component)
        folder, variant = source.folder, source.variant
        if not folder.is_dir():
            raise BadInputFileError(
                f"{source.said} has no folder {folder}: restore it or choose another checkpoint"
            )
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if component in WITHOUT_WEIGHTS:
            return [path for path in files if path.suffix in (".json", ".txt")]
        if source.file is not None:
            return [folder / "config.json", source.file]
        if any(path.name == "adapter_config.json" for path in files):
            raise BadInputFileError(
                f"{folder} holds an adapter (adapter_config.json), which would be added unasked: "
                "remove it, and name it by --lora"
            )
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
        return [folder / "config.json", *weights]

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


def open_checkpoint(settings: ModelSettings, components: Sequence[str]) -> Checkpoint:
    """Find a checkpoint and what replaces its parts: an existing folder or file wins over a hub id.

    A relative path is looked for in the working directory, then in the project. Of a checkpoint
    on the hub only the configs and the named components are downloaded.

    Raises:
        BadSettingError: neither a path nor a hub id, settings that do not go together, or a
            component that is not supported.
        UnfitEnvironmentError: the hub cannot be reached and the checkpoint is not in its cache.
    """
    elsewhere = [name for name in REPLACEABLE if getattr(settings, name) is not None]
    own = [name for name in components if name not in elsewhere]
    if settings.model_id.endswith(".safetensors"):
        checkpoint = _open_single_file(settings, own)
    else:
        checkpoint = _open_folder(settings, own)
    replaced = {
        name: _find_replacement(
            name, getattr(settings, name), checkpoint, needed=name in components
        )
        for name in elsewhere
    }
    checkpoint = replace(checkpoint, replaced=replaced)
    checkpoint.check_supported(components)
    return checkpoint


def _open_folder(settings: ModelSettings, components: Sequence[str]) -> Checkpoint:
    if settings.single_file_config is not None:
        raise BadSettingError(
            "--single_file_config is for a --model_id that is one .safetensors file; "
            f"{settings.model_id} has its own configs"
        )
    said, variant = f"--model_id {settings.model_id}", settings.variant
    folder = _find_folder(settings.model_id, settings.revision, said, components, variant)
    return Checkpoint(settings.model_id, folder, variant=variant)


def _open_single_file(settings: ModelSettings, components: Sequence[str]) -> Checkpoint:
    if settings.single_file_config is None:
        raise BadSettingError(
            f"--model_id {settings.model_id} is one file, which holds no configs: name a "
            "checkpoint of its family in diffusers' layout with --single_file_config"
        )
    if settings.variant is not None:
        raise BadSettingError("--variant is for checkpoints in folders, not for one file")
    file = find_weights_file(settings.model_id, "--model_id", "FILE", settings.revision)
    folder = _find_folder(
        settings.single_file_config,
        None,
        f"--single_file_config {settings.single_file_config}",
        [name for name in components if name in WITHOUT_WEIGHTS],
        None,
    )
    return Checkpoint(settings.model_id, folder, file)


def _find_folder(
    model_id: str,
    revision: str | None,
    said: str,
    components: Sequence[str],
    variant: str | None,
) -> Path:
    folder = _find_local(model_id)
    if folder is not None and folder.is_dir():
        if revision is not None:
            raise BadSettingError(f"--revision is for hub ids; {model_id} is a folder")
        return folder
    if folder is not None or not hub.REPOSITORY.fullmatch(model_id):
        raise BadSettingError(f"{said} is neither an existing folder nor a hub id")

    def is_complete(folder: Path) -> bool:
        checkpoint = Checkpoint(model_id, folder, variant=variant)
        return _is_there(checkpoint, lambda: checkpoint.listed(components))

    configs = ["model_index.json", "*/config.json", "scheduler/*.json"]
    return hub.find_snapshot(
        model_id,
        revision,
        said,
        [configs + [p for name in components for p in _patterns(f"{name}/", variant)]],
        is_complete,
    )


def _find_replacement(component: str, value: str, checkpoint: Checkpoint, needed: bool) -> Source:
    """A component from elsewhere: a file, a folder or hub id of a model or of a whole pipeline.

    Its weights are of the checkpoint's variant where it has that.
    """
    said = f"--{component} {value}"
    own_folder = checkpoint.folder / component
    if value.endswith(".safetensors"):
        file = find_weights_file(value, f"--{component}", "FILE") if needed else Path(value)
        return Source(said, own_folder, file)

    def source(folder: Path, variant: str | None) -> Source:
        inner = folder if (folder / "config.json").is_file() else folder / component
        return Source(said, inner, variant=variant)

    def has_weights(folder: Path, variant: str | None) -> bool:
        replaced = {component: source(folder, variant)}
        return _is_there(replace(checkpoint, replaced=replaced), lambda: [component])

    variants = tuple(dict.fromkeys((checkpoint.variant, None)))
    folder = _find_local(value)
    if folder is None or not folder.is_dir():
        if folder is not None or not hub.REPOSITORY.fullmatch(value):
            raise BadSettingError(
                f"{said} is neither an existing folder or .safetensors file nor a hub id"
            )
        configs = ["config.json", f"{component}/config.json"]
        tries = [
            configs + [p for inner in ("", f"{component}/") for p in _patterns(inner, variant)]
            for variant in variants
        ]
        folder = hub.find_snapshot(
            value,
            None,
            said,
            tries if needed else [configs],
            lambda folder: (
                any(has_weights(folder, v) for v in variants)
                or (not needed and source(folder, None).folder.is_dir())
            ),
        )
    found = [variant for variant in variants if has_weights(folder, variant)]
    return source(folder, found[0] if found else None)


def _is_there(checkpoint: Checkpoint, components: Callable[[], list[str]]) -> bool:
    try:
        return all(checkpoint.files_read(name) for name in components())
    except (BadInputFileError, BadSettingError):
        return False


def _find_local(path: str) -> Path | None:
    """An existing path, from the working directory or else from the project."""
    try:
        return next((p for p in (Path(path), PROJECT_DIR / path) if p.exists()), None)
    except OSError:
        return None  # longer than a name can be, or out of reach


def _patterns(folder: str, variant: str | None) -> list[str]:
    """Patterns of the files in a folder of a repository, by `weights_name`.

    The hub's star crosses folders, so no pattern begins with one.
    """
    v = "" if variant is None else f".{variant}"
    shard = "-?????-of-?????"
    weights = [
        f"{folder}{stem}{kind}"
        for stem in ("diffusion_pytorch_model", "model")
        for kind in (
            f"{v}.safetensors",
            f"{v}{shard}.safetensors",
            f"{shard}{v}.safetensors",
            f".safetensors.index{v}.json",
        )
    ]
    texts = [f"{folder}*.json", f"{folder}*.txt"] if folder else []
    return [*texts, *weights]


def find_weights_file(file: str, flag: str, form: str, revision: str | None = None) -> Path:
    """The safetensors file that a flag names: a path, or ORG/NAME/FILE on the hub.

    Args:
        form: what the flag takes, for the error message.

    Raises:
        BadInputFileError: there is none, or its name does not end in .safetensors.
    """
    path = _find_local(file)
    if path is not None and path.is_file() and path.suffix == ".safetensors":
        if revision is not None:
            raise BadSettingError(f"--revision is for hub ids; {file} is a file")
        return path
    on_the_hub = hub.FILE_IN_REPOSITORY.fullmatch(file)
    if path is None and on_the_hub is not None:
        return hub.find_file(on_the_hub[1], on_the_hub[2], revision, f"{flag} {file}")
    raise BadInputFileError(f"{flag} {file} is no safetensors file: name one, as {form}")


def hash_large_file(path: Path) -> str:
    """sha256 of a file's content, remembered as long as its size, time and inode stay."""
    status = path.stat()
    identity = [status.st_size, status.st_mtime_ns, status.st_ino]
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
