"""Stage 3's files: pictures with their settings inside, grids of them, those of a trajectory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.compute.options import MadeBy
from common.declared import EMBEDDINGS, LATENTS, PICTURES, declarations
from common.errors import BadInputFileError, BadSettingError
from common.files import picture_files
from common.files.artifacts import Artifact, Header
from common.files.kept_progress import progress_paths
from common.files.picture_files import TRAJECTORY_ANIMATION, TRAJECTORY_STRIP
from common.files.recipe import Recipe, to_json
from common.files.rows import OWN, Told, prompts_of_images, row_hashes, row_recipe, without_own
from common.files.stage_table import DECODE, DENOISE, ENCODE_PICTURES, LATENTS_FILE
from common.files.tensor_rows import row_of_picture
from common.models.component_table import loaded_for
from common.models.model_settings import ModelSettings
from common.runs.generation import GenerationConfig, RunSettings
from common.runs.overrides import Overrides, checked, values_of
from common.runs.parts import loras_of_prompts
from common.runs.picture_names import ImageId, ids_of, names_of
from common.runs.recipes import difference_from_report, recorded, trajectory_pictures_recipe
from common.runs.redo import Redo
from common.runs.run_index import (
    Format,
    Line,
    differing,
    find_ours,
    refuse_foreign,
    why_index_stale,
)
from common.sampling.schedulers import web_ui_sampler

if TYPE_CHECKING:
    import numpy as np

Record = dict[str, Any]
IMAGE_LATENTS_MADE_BY = "image_latents_made_by"  # of latents' provenance: options of stage 0
OTHER_SETTINGS = "was made with other settings"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures that a run is to have."""

    recipe: Recipe  # of all of them
    rows: list[Recipe]  # of each
    fingerprints: list[str]  # of these
    prompt_of: list[int]  # each one's prompt
    names: list[str]
    grids: list[str]
    grid_images: int  # of a whole grid
    grid_recipe: Recipe
    lines: list[Line]  # of the index
    index: Format | None  # in which that is written besides

    @classmethod
    def of(
        cls, config: GenerationConfig, recipe: Recipe, latents: Artifact, begun: Artifact | None
    ) -> "Pictures":
        """Those of some latents.

        Args:
            recipe: of all of them.
            begun: what they are pasted into.
        """
        images = row_hashes(latents)
        pasted = [] if begun is None else [(begun.path.name, own) for own in row_hashes(begun)]
        prompt_of, rows = prompts_of_images(recipe, len(images)), []
        if latents.header is None and len(config.prompt_of_images()) == len(images):
            prompt_of = config.prompt_of_images()
        for image, (data_sha256, prompt) in enumerate(zip(images, prompt_of, strict=True)):
            inputs = {latents.path.name: data_sha256}
            if pasted:
                inputs |= [pasted[row_of_picture(prompt, len(pasted))]]
            rows.append(row_recipe(recipe, prompt, image, inputs))
        fingerprints = [row.fingerprint() for row in rows]
        settings = [picture_settings(row, latents.header) for row in rows]
        ids = ids_of(config, len(rows))
        names = names_of(settings, ids, config.name_template, config.image_format)
        size = config.grid_images
        of_grid = recipe.settings[PICTURES] | {"grid_images": size}
        with_grids = recipe.settings | {PICTURES: of_grid}
        return cls(
            recipe=recipe,
            rows=rows,
            fingerprints=fingerprints,
            names=names,
            grids=picture_files.grid_names(len(rows), size, config.image_format),
            grid_images=size,
            grid_recipe=recipe.model_copy(update={"settings": with_grids}),
            prompt_of=prompt_of,
            lines=_index_lines(names, fingerprints, _with_loras(settings, config, prompt_of), ids),
            index=config.index,
        )

    def settle(self, row: int, data_sha256: str) -> None:
        """Take note of a picture's latents that were not there before."""
        own = self.rows[row]
        inputs = own.inputs | {LATENTS_FILE: data_sha256}
        self.rows[row] = own.model_copy(update={"inputs": inputs})
        self.fingerprints[row] = self.rows[row].fingerprint()
        self.lines[row]["fingerprint"] = self.fingerprints[row]

    @property
    def main(self) -> str:
        """The picture to look at first."""
        return [*self.grids, *self.names][0]

    def recipes(self) -> dict[str, Recipe]:
        """File name → what determines it."""
        return {
            **dict(zip(self.names, self.rows, strict=True)),
            **dict.fromkeys(self.grids, self.grid_recipe),
        }


def _with_loras(
    settings: Sequence[Mapping[str, Any]], config: GenerationConfig, prompt_of: Sequence[int]
) -> list[Mapping[str, Any]]:
    """Pictures' settings with LoRAs as they are given, in place of their content by component."""
    of_prompts = loras_of_prompts(config)
    if len({*of_prompts}) == 1 or max(prompt_of) >= len(of_prompts):
        return [*settings]
    by_content = ("unet_loras", "text_encoder_loras")
    return [
        {name: value for name, value in own.items() if name not in by_content}
        | {"loras": [f"{lora.file}:{lora.scale:g}" for lora in of_prompts[prompt]]}
        for own, prompt in zip(settings, prompt_of, strict=True)
    ]


def _index_lines(
    names: Sequence[str],
    fingerprints: Sequence[str],
    settings: Sequence[Mapping[str, Any]],
    ids: Sequence[ImageId],
) -> list[Line]:
    """What the index says of each picture: its file, and what it does not share with all."""
    shown = ["prompt", "seed", *sorted(differing(settings) - {"prompt", "seed"})]
    lines = []
    for index, (name, fingerprint, own) in enumerate(
        zip(names, fingerprints, settings, strict=True)
    ):
        id = ids[index].id
        line: Line = {"file": name, "index": index} | ({} if id is None else {"id": id})
        line |= {setting: own[setting] for setting in shown if setting in own}
        lines.append(line | {"fingerprint": fingerprint})
    return lines


@dataclass(frozen=True, kw_only=True)
class MadeBeside:
    """What was decoded while stage 2 ran."""

    fingerprints: set[str]
    dtype: str  # that the model computed in
    facts: Mapping[str, Any]  # what the report says of the devices


class Found:
    """The pictures of ours that a run directory has."""

    def __init__(
        self, run_dir: Path, names: Sequence[str] = (), beside: MadeBeside | None = None
    ) -> None:
        """
        Args:
            names: of the run's pictures, should its index not be there.
            beside: those that this process has made already.

        Raises:
            BadSettingError: what has such a name is no picture of ours, and would be replaced.
        """
        self.run_dir, self.beside = run_dir, beside
        self.records: dict[Path, Record] = {}
        self.unread: dict[Path, str] = {}  # why
        aside, _ = progress_paths(run_dir, DECODE.number)
        refuse_foreign(run_dir, names)
        own = [path for name in names if (path := run_dir / name).exists()]
        ours = dict.fromkeys([*find_ours(run_dir), *own, *picture_files.find_pictures(aside)])
        for path in ours:
            try:
                record = picture_files.read_picture_record(path)
            except BadInputFileError:
                self.unread[path] = f"{path.name} is of an older format"
                continue
            if record is None:
                self.unread[path] = f"{path.name} is damaged or not of ours"
            else:
                self.records[path] = record

    def why_stale(self, wanted: Mapping[str, str]) -> str | None:
        """Why pictures have to be made: what is wrong with the first that is not as wanted.

        Args:
            wanted: file name → fingerprint.
        """
        for name, fingerprint in wanted.items():
            path = self.run_dir / name
            record = self.records.get(path)
            if record is None:
                return self.unread.get(path, f"{name} is not there")
            if record.get("fingerprint") != fingerprint:
                return f"{name} {OTHER_SETTINGS}"
        return None

    def places(self, pictures: Pictures) -> dict[int, Path]:
        """Row → where its picture is, of those that are there."""
        known = {record.get("fingerprint"): path for path, record in self.records.items()}
        own = [self.run_dir / name for name in pictures.names]  # where it is, if it is there twice
        return {
            row: own[row]
            if self.records.get(own[row], {}).get("fingerprint") == fingerprint
            else known[fingerprint]
            for row, fingerprint in enumerate(pictures.fingerprints)
            if fingerprint in known
        }

    def told(self, taken: Iterable[Path]) -> list[Told]:
        """What those tell that are not taken."""
        left = self.records.keys() - {*taken}
        return [
            Told(record["settings"], record.get("weights", {}), record.get("versions", {}))
            for path, record in self.records.items()
            if path in left and "seed" in record["settings"]
        ]


def why_pictures_stale(found: Found, pictures: Pictures, trajectory: Artifact | None) -> str | None:
    """Say why pictures must be made anew, or None where all of them are fresh and whole."""
    if trajectory is not None:
        wanted = trajectory_pictures_recipe(pictures.recipe, trajectory).fingerprint()
        names = (TRAJECTORY_STRIP, TRAJECTORY_ANIMATION)
        if found.why_stale(dict.fromkeys(names, wanted)) is not None:
            return "the trajectory's pictures are not there or of another one"
    of_pictures = zip(pictures.names, pictures.fingerprints, strict=True)
    of_grids = dict.fromkeys(pictures.grids, pictures.grid_recipe.fingerprint())
    stale = found.why_stale(dict(of_pictures) | of_grids)
    if stale is not None and stale.endswith(OTHER_SETTINGS):
        return difference_from_report(found.run_dir, pictures.recipe) or stale
    stale = stale or why_index_stale(found.run_dir, pictures.lines, pictures.index)
    return stale or (None if found.beside is None else "its report is not written")


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """What is written into the pictures of a run besides their pixels."""

    config: GenerationConfig
    header: Header | None  # of the latents
    overrides: Overrides

    @cached_property
    def _redo(self) -> Redo | None:
        """None where it is not known how the latents were made, or they are not of this run."""
        if self.header is None or len(self.header.rows) != len(self.config.image_seeds()):
            return None
        of_latents = checked(self.header.provenance.get("overrides"))
        own = {**values_of(of_latents), **values_of(self.overrides)}
        try:
            as_made, _ = self.config.override(own)
        except BadSettingError:
            return None
        made = self.header.recipe.settings_of(LATENTS)
        wanted = {**recorded(as_made, LATENTS), "seeds": as_made.image_seeds()}
        del wanted["num_images_per_prompt"]  # of which each prompt may have its own
        if any(to_json(made.get(name)) != to_json(value) for name, value in wanted.items()):
            return None
        dtype = made.get("unet_dtype")
        return Redo(as_made, {} if dtype is None else {"unet_dtype": dtype})

    def alone(self, row: int, recipe: Recipe, made_by: MadeBy) -> Record:
        """What makes an image alone again: a run's flags, and the stages' options.

        Args:
            made_by: stage 3's.
        """
        if self._redo is None or self.header is None:
            return {}
        of_latents = {str(DENOISE.number): self.header.made_by(row)}
        if known := self.header.provenance.get(IMAGE_LATENTS_MADE_BY):
            of_latents[str(ENCODE_PICTURES.number)] = known
        dtype = {"vae_dtype": str(recipe.settings_of(PICTURES)["vae_dtype"])}
        return {
            "flags": self._redo.flags(row) | dtype,
            "made_by": {**of_latents, str(DECODE.number): made_by},
        }

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """A picture's settings; of a grid's or trajectory's recipe those of all images."""
        own = _shared(recipe, PICTURES)
        for name in loaded_for(PICTURES):
            if (replaced := getattr(self.config, name, None)) is not None:
                own[name] = replaced
        return picture_settings(recipe, self.header) | own

    def seconds_of_latents(self, row: int) -> float:
        """How long an image was denoised; 0 where that is not known."""
        rows = [] if self.header is None else self.header.rows
        return (rows[row].seconds or 0.0) if row < len(rows) else 0.0

    def record(self, recipe: Recipe, pixels: "np.ndarray", alone: Record | None = None) -> Record:
        """The record inside a picture.

        Args:
            alone: of one of the run's images, what makes it alone again.
        """
        return {
            **(alone or {}),
            "settings": self.settings(recipe),
            "pixels_sha256": picture_files.hash_pixels(pixels),
            "fingerprint": recipe.fingerprint(),
            "inputs": recipe.inputs,
            "weights": recipe.weights,
            "versions": recipe.versions,
            "overrides": self.overrides,
        }


def picture_settings(recipe: Recipe, header: Header | None) -> dict[str, Any]:
    """One picture's settings by its row's recipe; those shared, by that of several.

    Args:
        header: of the latents, where they have one.
    """
    if header is None:
        return {}
    settings = {**_shared(recipe, EMBEDDINGS), **_shared(recipe, LATENTS)}
    prompts, negatives = settings.pop("prompts", []), settings.pop("negative_prompts", [])
    seconds = settings.pop("prompts_2", prompts)
    negative_seconds = settings.pop("negative_prompts_2", negatives)
    seeds = settings.pop("seeds", [])
    settings |= {
        name: header.provenance[name]
        for name in ModelSettings.model_fields
        if name in header.provenance
    }
    if len(seeds) == 1:
        settings |= {
            "prompt": prompts[0],
            "prompt_2": seconds[0],
            "negative_prompt": negatives[0],
            "negative_prompt_2": negative_seconds[0],
            "seed": seeds[0],
        }
    return settings


def _shared(recipe: Recipe, artifact: str) -> dict[str, Any]:
    """An artifact's settings without those of which single rows have their own."""
    of_rows = {name for own in recipe.settings_of(artifact).get(OWN, ()) for name in own}
    settings = without_own(recipe.settings_of(artifact))
    return {name: value for name, value in settings.items() if name not in of_rows}


def web_ui_text(settings: dict[str, Any]) -> str:
    """A picture's settings in the text form that the common web UIs read."""
    names = {name: d.web_ui for name, d in declarations(RunSettings) if d.web_ui is not None}
    shown = dict(settings)
    if "scheduler" in settings:
        options = settings.get("scheduler_options", {})
        shown["scheduler"] = web_ui_sampler(settings["scheduler"], options)
    return picture_files.web_ui_parameters(shown, names)
