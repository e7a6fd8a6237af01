"""What lies in a run directory: its files, what is in them, and which are fresh."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.declared import PICTURES
from common.errors import StageError
from common.files import artifacts, picture_files
from common.files.artifacts import Artifact
from common.files.recipe import Recipe, difference, recipe_of_its_latents
from common.files.report import Report, read_report
from common.files.rows import told_of
from common.files.stage_table import (
    DECODE,
    DENOISE,
    ENCODE,
    ENCODE_PICTURES,
    IMAGE_LATENTS_FILE,
    LATENTS_FILE,
    STAGES,
    TRAJECTORY_FILE,
    Stage,
)
from common.models.checkpoint import Checkpoint
from common.models.find import open_checkpoint
from common.runs.generation import GenerationConfig, read_generation_config
from common.runs.image_latents import read_inputs
from common.runs.init_latents import find_init_latents
from common.runs.overrides import overrides_of, values_in_words, values_of
from common.runs.pictures import Pictures
from common.runs.recipes import (
    embeddings_recipe,
    expected_unet_dtype,
    expected_vae_dtype,
    image_latents_recipe,
    latents_recipe,
    pictures_recipe,
    trajectory_pictures_recipe,
)
from common.runs.run_index import find_ours

NO_INPUT = "what it was made from is not here"
TRAJECTORY_PICTURES = (picture_files.TRAJECTORY_STRIP, picture_files.TRAJECTORY_ANIMATION)
FRESH, STALE, UNKNOWN, MISSING, DAMAGED = "fresh", "stale", "unknown", "missing", "damaged"


@dataclass(frozen=True, kw_only=True)
class TensorSummary:
    """A tensor's layout and values."""

    name: str
    dtype: str  # as safetensors names it
    shape: list[int]
    min: float | None  # these four of the finite values; None where there are none
    mean: float | None
    max: float | None
    std: float | None
    finite: bool  # all of them


@dataclass(kw_only=True)
class FileRecord:
    """A file of a run."""

    name: str
    stage: int
    state: str  # fresh, stale, unknown, missing, damaged
    why: str = ""  # it is not fresh, in words
    data_sha256: str = ""
    recipe: Recipe | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # of a picture, its own

    @property
    def made_from(self) -> dict[str, str]:
        """File → checksum of what was read."""
        return {} if self.recipe is None else dict(self.recipe.inputs)


@dataclass(kw_only=True)
class RunRecord:
    """All files of a run directory."""

    run_dir: Path
    config: GenerationConfig | None
    problem: str  # with the settings; empty if none
    files: list[FileRecord]
    reports: dict[int, Report]

    def file(self, name: str) -> FileRecord | None:
        """A file by its name."""
        return next((file for file in self.files if file.name == name), None)

    def of_stage(self, stage: int) -> list[FileRecord]:
        """The files that a stage wrote."""
        return [file for file in self.files if file.stage == stage]


def read_run(run_dir: Path, sources: Sequence[Path] = ()) -> RunRecord:
    """Read all files of a run directory, and compare them with its settings and with each other.

    A damaged or missing file is a record like any other, not an error.

    Args:
        sources: other run directories, for inputs that are not in this one.
    """
    config, checkpoint, problem = None, None, ""
    try:
        config = read_generation_config(run_dir)
        checkpoint = open_checkpoint(config, ("unet", "vae"))
    except StageError as error:
        problem = str(error)
    numbers = [stage.number for stage in STAGES]
    reports = {n: report for n in numbers if (report := read_report(run_dir, n)) is not None}
    found: dict[str, Artifact] = {}
    files = [
        _read_artifact(_find(name, [run_dir, *sources]), stage.number, found)
        for stage in STAGES
        for name in stage.writes
        if (run_dir / name).exists() or _is_expected(name, config)
    ]
    files += _read_pictures(run_dir)

    upstream = ""
    for stage in STAGES:
        own = [file for file in files if file.stage == stage.number]
        expected: dict[str, Recipe] = {}
        overridden, why_unknown = "", problem
        if config is not None and checkpoint is not None:
            try:
                settled, overrides = config.override(values_of(overrides_of(run_dir, stage)))
                overridden = values_in_words(overrides)
                expected = _expected_files(stage, settled, checkpoint, found, run_dir)
            except StageError as error:
                why_unknown = str(error)
        unnamed = "the run has no picture of this name" if expected else NO_INPUT
        for file in own:
            _judge(file, expected.get(file.name), why_unknown or unnamed, upstream)
            if file.state == FRESH and overridden:
                file.why = f"overridden: {overridden}"
        if spoiled := [file for file in own if file.state in (STALE, DAMAGED)]:
            upstream = f"{spoiled[0].name} is {spoiled[0].state}"
    return RunRecord(run_dir=run_dir, config=config, problem=problem, files=files, reports=reports)


def _is_expected(name: str, config: GenerationConfig | None) -> bool:
    """Whether a run lacks a file that is not there."""
    if name == IMAGE_LATENTS_FILE:
        return config is not None and config.has_pictures
    return name != TRAJECTORY_FILE


def _find(name: str, folders: Sequence[Path]) -> Path:
    """A file in the first of some folders that has it."""
    return next((f / name for f in folders if (f / name).exists()), folders[0] / name)


def _expected_files(
    stage: Stage,
    config: GenerationConfig,
    checkpoint: Checkpoint,
    found: dict[str, Artifact],
    run_dir: Path,
) -> dict[str, Recipe]:
    """The files that a stage would write now, each with its recipe; none without its input."""
    recipe = _recipe_now(stage, config, checkpoint, found, run_dir)
    if recipe is None:
        return {}
    if stage is not DECODE:
        return dict.fromkeys(stage.writes, recipe)
    begun = found.get(IMAGE_LATENTS_FILE) if config.pastes else None
    expected = Pictures.of(config, recipe, found[LATENTS_FILE], begun).recipes()
    if (trajectory := found.get(TRAJECTORY_FILE)) is not None:
        of_trajectory = trajectory_pictures_recipe(recipe, trajectory)
        expected |= dict.fromkeys(TRAJECTORY_PICTURES, of_trajectory)
    return expected


def _recipe_now(
    stage: Stage,
    config: GenerationConfig,
    checkpoint: Checkpoint,
    found: dict[str, Artifact],
    run_dir: Path,
) -> Recipe | None:
    """The recipe that a stage would use now; None where its input is not there."""
    if stage is ENCODE:
        return embeddings_recipe(config, checkpoint)
    if stage is ENCODE_PICTURES:
        if not config.has_pictures:
            return None
        dtype = expected_vae_dtype(config.vae_dtype, run_dir, stage)
        return image_latents_recipe(config, checkpoint, read_inputs(config), dtype)
    source, begun = found.get(stage.reads or ""), found.get(IMAGE_LATENTS_FILE)
    if source is None:
        return None
    if stage is DENOISE:
        latents = found.get(LATENTS_FILE)
        path = run_dir / LATENTS_FILE if latents is None else latents.path
        dtype = expected_unet_dtype(config.unet_dtype, path)
        if not config.has_pictures:
            begun = find_init_latents(config, checkpoint, run_dir, verify=False)
        return latents_recipe(config, checkpoint, source, dtype, begun)
    dtype = expected_vae_dtype(config.vae_dtype, run_dir)
    return pictures_recipe(config, checkpoint, source, dtype, begun if config.pastes else None)


def _read_artifact(path: Path, stage: int, found: dict[str, Artifact]) -> FileRecord:
    if not path.exists():
        return FileRecord(name=path.name, stage=stage, state=MISSING, why="it is not there")
    try:
        artifact = artifacts.inspect(path)
    except StageError as error:
        return FileRecord(name=path.name, stage=stage, state=DAMAGED, why=str(error))
    found[path.name] = artifact
    header = artifact.header
    return FileRecord(
        name=path.name,
        stage=stage,
        state=UNKNOWN,
        why="it has no header of ours" if header is None else "",
        data_sha256=artifact.data_sha256,
        recipe=None if header is None else header.recipe,
        provenance={} if header is None else header.provenance,
    )


def _read_pictures(run_dir: Path) -> list[FileRecord]:
    files = []
    for path in find_ours(run_dir):
        why = "it is damaged or not ours"
        try:
            record = picture_files.read_picture_record(path)
            if record is None:
                raise ValueError
            settings = dict(record["settings"])
            if loras := record.get("flags", {}).get("lora"):
                settings["loras"] = loras
            recipe = Recipe(
                stage=DECODE.number,
                settings={PICTURES: settings},
                **{name: record[name] for name in ("inputs", "weights", "versions")},
            )
        except (StageError, ValueError, LookupError, TypeError) as error:
            why = str(error) if isinstance(error, StageError) else why
            record_of = FileRecord(name=path.name, stage=DECODE.number, state=DAMAGED, why=why)
            files.append(record_of)
            continue
        files.append(
            FileRecord(
                name=path.name,
                stage=DECODE.number,
                state=UNKNOWN,
                data_sha256=str(record.get("pixels_sha256", "")),
                settings=settings,
                provenance={"fingerprint": record.get("fingerprint")},
                recipe=recipe,
            )
        )
    return files


def _judge(file: FileRecord, expected: Recipe | None, why_unknown: str, upstream: str) -> None:
    """Say whether a file is what its stage would make now."""
    if file.state != UNKNOWN or file.recipe is None:
        return
    if expected is None:
        file.why = why_unknown
        return
    if file.stage == DECODE.number:
        changed = _picture_difference(file, expected)
    else:
        changed = difference(recipe_of_its_latents(file.recipe), expected)
    if changed is None and upstream:
        changed = upstream
    file.state, file.why = (FRESH, "") if changed is None else (STALE, changed)


def _picture_difference(file: FileRecord, expected: Recipe) -> str | None:
    """The difference between a picture's record and the recipe that it would have now."""
    assert file.recipe is not None
    if file.provenance["fingerprint"] == expected.fingerprint():
        return None
    # Compare what both have.
    made = file.recipe.settings[PICTURES]
    wanted = told_of(expected).settings
    shared = made.keys() & wanted.keys()

    def with_shared(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
        own = {name: settings[name] for name in shared}
        return recipe.model_copy(update={"settings": {PICTURES: own}})

    changed = difference(with_shared(file.recipe, made), with_shared(expected, wanted))
    return changed or "it was made with other settings"


def summarize_tensors(path: Path) -> list[TensorSummary]:
    """Layout and values of all tensors in a safetensors file."""
    import torch
    from safetensors.torch import load_file

    layout = artifacts.inspect(path).tensors
    summaries = []
    for name, tensor in load_file(path).items():
        values = tensor.to(torch.float64)
        finite = values[values.isfinite()]
        some = finite.numel() > 0
        summaries.append(
            TensorSummary(
                name=name,
                dtype=layout[name].dtype,
                shape=list(tensor.shape),
                min=float(finite.min()) if some else None,
                mean=float(finite.mean()) if some else None,
                max=float(finite.max()) if some else None,
                std=float(finite.std(correction=0)) if some else None,
                finite=finite.numel() == values.numel(),
            )
        )
    return summaries
