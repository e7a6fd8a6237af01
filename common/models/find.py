"""Find a checkpoint and what replaces its parts: folders, single files, hub ids."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import BadInputFileError, BadSettingError
from common.models import hub
from common.models.checkpoint import Checkpoint, Source
from common.models.component_table import component, config_files
from common.models.model_settings import PROJECT_DIR, ModelSettings
from common.text_files import parse_json, read_text


def open_checkpoint(settings: ModelSettings, components: Sequence[str]) -> Checkpoint:
    """Find a checkpoint and what replaces its parts: an existing folder or file wins over a hub id.

    A relative path is looked for in the working directory, then in the project. Of a checkpoint
    on the hub only the configs and the named components are downloaded.

    Raises:
        BadSettingError: neither a path nor a hub id, settings that do not go together, or a
            component that is not supported.
        UnfitEnvironmentError: the hub cannot be reached and the checkpoint is not in its cache.
    """
    elsewhere = settings.replacements()
    own = [name for name in components if name not in elsewhere]
    if _is_one_file(settings.model_id):
        checkpoint = _open_single_file(settings, own)
    else:
        checkpoint = _open_folder(settings, own)
    replaced = {
        name: _find_replacement(name, value, checkpoint, needed=name in components)
        for name, value in elsewhere.items()
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
        [name for name in components if not component(name).has_weights],
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

    configs = ["model_index.json", *(f"*/{name}" for name in config_files())]
    return hub.find_snapshot(
        model_id,
        revision,
        said,
        [configs + [p for name in components for p in _patterns(f"{name}/", variant)]],
        is_complete,
    )


def _find_replacement(name: str, value: str, checkpoint: Checkpoint, needed: bool) -> Source:
    """A component from elsewhere: a file, a folder or hub id of a model or of a whole pipeline.

    Its weights are of the checkpoint's variant where it has that.
    """
    said = f"--{name} {value}"
    own_folder, config_file = checkpoint.folder / name, component(name).config_file
    if _is_one_file(value):
        file = find_weights_file(value, f"--{name}", "FILE") if needed else Path(value)
        return Source(said, file.parent if _has_config_of(name, file.parent) else own_folder, file)

    def source(folder: Path, variant: str | None) -> Source:
        inner = folder if (folder / config_file).is_file() else folder / name
        return Source(said, inner, variant=variant)

    def has_weights(folder: Path, variant: str | None) -> bool:
        replaced = {name: source(folder, variant)}
        return _is_there(replace(checkpoint, replaced=replaced), lambda: [name])

    variants = tuple(dict.fromkeys((checkpoint.variant, None)))
    folder = _find_local(value)
    if folder is None or not folder.is_dir():
        if folder is not None or not hub.REPOSITORY.fullmatch(value):
            raise BadSettingError(
                f"{said} is neither an existing folder or .safetensors file nor a hub id"
            )
        configs = [config_file, f"{name}/{config_file}"]
        tries = [
            configs + [p for inner in ("", f"{name}/") for p in _patterns(inner, variant)]
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


def _is_one_file(value: str) -> bool:
    return value.lower().endswith(".safetensors")


def _has_config_of(name: str, folder: Path) -> bool:
    """Whether a component's config stands beside its file, as where folders are downloaded."""
    try:
        config = parse_json(read_text(folder / component(name).config_file))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") in component(name).classes


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
    if path is not None and path.is_file() and _is_one_file(path.name):
        if revision is not None:
            raise BadSettingError(f"--revision is for hub ids; {file} is a file")
        return path
    on_the_hub = hub.FILE_IN_REPOSITORY.fullmatch(file)
    if path is None and on_the_hub is not None:
        return hub.find_file(on_the_hub[1], on_the_hub[2], revision, f"{flag} {file}")
    raise BadInputFileError(f"{flag} {file} is no safetensors file: name one, as {form}")
