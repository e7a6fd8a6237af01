"""Stage 3's files: pictures with their settings inside, grids of them, those of a trajectory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.compute.clock import StageReport
from common.declared import EMBEDDINGS, LATENTS, PICTURES, declarations
from common.errors import BadInputFileError, listed
from common.files import picture_files
from common.files.artifacts import Artifact, Header
from common.files.kept_progress import Progress, progress_paths
from common.files.picture_files import TRAJECTORY_ANIMATION, TRAJECTORY_STRIP
from common.files.recipe import Recipe
from common.files.rows import Told, row_hashes, row_recipe, rows_in_words
from common.files.stage_table import DECODE
from common.files.tensor_rows import row_of_picture
from common.messages import say, warn
from common.models.component_table import loaded_for
from common.models.model_settings import ModelSettings
from common.runs.generation import GenerationConfig, RunSettings
from common.runs.recipes import difference_from_report, trajectory_pictures_recipe
from common.sampling.schedulers import web_ui_sampler
from common.stopping import StopRequest
from common.whole_files import copy_whole, remove_file, write_bytes_whole

if TYPE_CHECKING:
    import numpy as np

Record = dict[str, Any]
OTHER_SETTINGS = "was made with other settings"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures that a run is to have."""

    recipe: Recipe  # of all of them
    rows: list[Recipe]  # of each
    names: list[str]
    grids: list[str]
    grid_images: int  # of a whole grid
    grid_recipe: Recipe

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
        of_each = recipe.settings_of(LATENTS).get("num_images_per_prompt", 1)
        rows = []
        for image, data_sha256 in enumerate(images):
            inputs = {latents.path.name: data_sha256}
            if pasted:
                inputs |= [pasted[row_of_picture(image, len(images), len(pasted))]]
            rows.append(row_recipe(recipe, image // of_each, image, inputs))
        names = picture_files.picture_names(len(rows), config.image_format)
        size = config.grid_images
        of_grid = recipe.settings[PICTURES] | {"grid_images": size}
        settings = recipe.settings | {PICTURES: of_grid}
        return cls(
            recipe=recipe,
            rows=rows,
            names=names,
            grids=picture_files.grid_names(len(rows), size, config.image_format),
            grid_images=size,
            grid_recipe=recipe.model_copy(update={"settings": settings}),
        )

    @cached_property
    def fingerprints(self) -> list[str]:
        """Of the rows."""
        return [row.fingerprint() for row in self.rows]

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


class Found:
    """The pictures of ours that a run directory has."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.records: dict[Path, Record] = {}
        self.unread: dict[Path, str] = {}  # why
        aside, _ = progress_paths(run_dir, DECODE.number)
        for path in (*picture_files.find_ours(run_dir), *picture_files.find_pictures(aside)):
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
        own = {
            row: self.run_dir / pictures.names[row] for row in range(len(pictures.names))
        }  # where it is already, if it is there twice
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
    recipes = pictures.recipes()
    stale = found.why_stale({name: each.fingerprint() for name, each in recipes.items()})
    if stale is not None and stale.endswith(OTHER_SETTINGS):
        return difference_from_report(found.run_dir, pictures.recipe) or stale
    return stale


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """What is written into the pictures of a run besides their pixels."""

    config: GenerationConfig
    header: Header | None  # of the latents
    overrides: list[str]

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """A picture's settings; of a grid's or trajectory's recipe those of all images."""
        own = dict(recipe.settings[PICTURES])
        for name in loaded_for(PICTURES):
            if (replaced := getattr(self.config, name, None)) is not None:
                own[name] = replaced
        return picture_settings(recipe, self.header) | own

    def record(self, recipe: Recipe, pixels: "np.ndarray") -> Record:
        """The record inside a picture."""
        return {
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
    settings = {**recipe.settings_of(EMBEDDINGS), **recipe.settings_of(LATENTS)}
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


def web_ui_text(settings: dict[str, Any]) -> str:
    """A picture's settings in the text form that the common web UIs read."""
    names = {name: d.web_ui for name, d in declarations(RunSettings) if d.web_ui is not None}
    shown = dict(settings)
    if "scheduler" in settings:
        options = settings.get("scheduler_options", {})
        shown["scheduler"] = web_ui_sampler(settings["scheduler"], options)
    return picture_files.web_ui_parameters(shown, names)


class PictureWriter:
    """A run's pictures, each in its place as soon as it is decoded."""

    def __init__(
        self, run_dir: Path, pictures: Pictures, facts: PictureFacts, report: StageReport
    ) -> None:
        self.run_dir, self.pictures, self.facts, self.report = run_dir, pictures, facts, report
        self.taken: set[int] = set()  # rows whose pictures are there
        self._written: set[str] = set()  # names
        self._shortened: dict[str, None] = {}  # settings, as they were met

    @property
    def missing(self) -> list[int]:
        """The rows that are to be decoded."""
        return [row for row in range(len(self.pictures.rows)) if row not in self.taken]

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Of one picture, [H, W, 3]."""
        return picture_files.picture_shape(self.run_dir / self.pictures.names[0])

    def take_all(self, found: Found) -> None:
        """Take the pictures that are there, wherever they are, and say how many are not."""
        places, rows = found.places(self.pictures), self.pictures.rows
        gone = found.told(places.values())
        self._take(places)
        if len(rows) > 1 and (gone or places):
            missing = [rows[row] for row in self.missing]
            told = [Told(self.facts.settings(row), row.weights, row.versions) for row in missing]
            say(f"  {rows_in_words(len(rows), told, gone)}")

    def take_done(self, found: Found, progress: Progress | None) -> None:
        """Take the pictures that a stopped run made."""
        kept = None if progress is None else progress.read_steps(0)
        if kept is None or len(kept["done"]) != len(self.pictures.rows):
            return
        places = found.places(self.pictures)
        self._take({row: path for row, path in places.items() if kept["done"][row]})
        if self.taken:
            say(f"  goes on after {len(self.taken)} of {len(self.pictures.rows)} images")

    def _take(self, places: Mapping[int, Path]) -> None:
        """Let pictures stand under the names that they have in this run."""
        names = self.pictures.names
        moved = {row: path for row, path in places.items() if path != self.run_dir / names[row]}
        # All of them stand aside first: a name may be that of one which is to be moved.
        folder, _ = progress_paths(self.run_dir, DECODE.number)
        aside = {
            row: folder / f"{self.pictures.fingerprints[row]}{path.suffix}"
            for row, path in moved.items()
        }
        for row, path in moved.items():
            if path != aside[row]:
                copy_whole(path, aside[row])
        for row, path in aside.items():
            copy_whole(path, self.run_dir / names[row])
        self.taken |= places.keys()
        self._written |= {names[row] for row in places}

    def put(
        self,
        rows: Sequence[int],
        images: "np.ndarray",
        progress: Progress | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """Write pictures [N, H, W, 3] uint8 of some rows.

        Args:
            progress: where it is kept which of them are written, until all are.
            stop: asked then.

        Raises:
            StoppedError: a stop was asked for; what is done is kept.
        """
        for row, image in zip(rows, images, strict=True):
            self._write(self.pictures.names[row], image, self.pictures.rows[row])
        if progress is None:
            return
        import torch

        done = torch.tensor([name in self._written for name in self.pictures.names])
        progress.save_steps(0, {"done": done})
        if stop is not None and not done.all():
            stop.raise_if_asked(
                f"after {int(done.sum())} of {len(done)} images, which are kept: the same command "
                "goes on from there"
            )

    def write_trajectory(
        self, strip: "np.ndarray", frames: "Sequence[np.ndarray]", trajectory: Artifact
    ) -> None:
        """Write a strip [H, W, 3] uint8 and an animation of frames [H, W, 3]."""
        recipe = trajectory_pictures_recipe(self.pictures.recipe, trajectory)
        with self.report.part("image_encoding"):
            record = self.facts.record(recipe, strip)
            text = web_ui_text(record["settings"])
            encoded = {
                TRAJECTORY_STRIP: picture_files.encode_picture(strip, ".png", record, text),
                TRAJECTORY_ANIMATION: picture_files.encode_animation(frames, record, text),
            }
        for name, content in encoded.items():
            self._put_in_place(name, content)

    def finish(self) -> Path:
        """Write grids, remove an earlier run's pictures. Returns the one to look at first."""
        self._write_grids()
        ours = picture_files.find_ours(self.run_dir)
        others = [path for path in ours if path.name not in self._written]
        for path in others:
            remove_file(path)
        if others:
            say(f"  removed {len(others)} picture(s) that an earlier run made: {_some(others)}")
        if self._shortened:
            warn(
                f"a JPEG's metadata hold 64 kB: {listed([*self._shortened])} shortened in the "
                "pictures; the whole is in stage3_report.json"
            )
        return self.run_dir / self.pictures.main

    def _write_grids(self) -> None:
        """By the pictures' files."""
        from common.vae.grids import make_grid

        names, size = self.pictures.names, self.pictures.grid_images
        for number, grid in enumerate(self.pictures.grids):
            paths = [self.run_dir / name for name in names[number * size :][:size]]
            with self.report.part("image_encoding"):
                laid_out = make_grid(picture_files.read_pixels(paths))
            self._write(grid, laid_out, self.pictures.grid_recipe)

    def _write(self, name: str, pixels: "np.ndarray", recipe: Recipe) -> None:
        suffix = Path(name).suffix
        with self.report.part("image_encoding"):
            whole = self.facts.record(recipe, pixels)
            record, cut = picture_files.fit_record(whole, suffix, web_ui_text)
            self._shortened |= dict.fromkeys(cut)
            text = web_ui_text(record["settings"])
            content = picture_files.encode_picture(pixels, suffix, record, text)
        self._put_in_place(name, content)

    def _put_in_place(self, name: str, content: bytes) -> None:
        with self.report.part("writing"):
            write_bytes_whole(self.run_dir / name, content)
        self._written.add(name)


def _some(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names if len(names) <= 3 else [names[0], "…", names[-1]])
