"""Stage 3's writing: each picture in its place as soon as it is decoded; grids, the index."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.compute.clock import StageReport
from common.compute.options import MadeBy
from common.errors import listed
from common.files import picture_files
from common.files.artifacts import Artifact
from common.files.kept_progress import Progress, progress_paths
from common.files.picture_files import OUR_NAME, TRAJECTORY_ANIMATION, TRAJECTORY_STRIP
from common.files.recipe import Recipe
from common.files.row_places import endings_of
from common.files.rows import Changes, Told
from common.files.stage_table import DECODE
from common.messages import say, warn
from common.runs.pictures import Found, PictureFacts, Pictures, Record, web_ui_text
from common.runs.recipes import trajectory_pictures_recipe
from common.runs.run_index import RunIndex, find_ours, is_ours
from common.stopping import StopRequest
from common.whole_files import copy_whole, remove_file, write_bytes_whole

if TYPE_CHECKING:
    import numpy as np


class PictureWriter:
    """A run's pictures, each in its place as soon as it is decoded."""

    def __init__(
        self, run_dir: Path, pictures: Pictures, facts: PictureFacts, report: StageReport
    ) -> None:
        self.run_dir, self.pictures, self.facts, self.report = run_dir, pictures, facts, report
        self.taken: set[int] = set()  # rows whose pictures are there
        self.made_beside = 0  # of these
        self.made_by: MadeBy = {}  # options that the bits of pictures to come depend on
        self._index = RunIndex(run_dir, pictures.lines, pictures.index)
        self._seconds = 0.0  # of the report, at the last picture
        self._written: set[str] = set()  # names
        self._shortened: dict[str, None] = {}  # settings, as they were met

    @property
    def missing(self) -> list[int]:
        """The rows that are to be decoded."""
        return [row for row in range(len(self.pictures.rows)) if row not in self.taken]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """[N, H, W, 3] of the pictures of each size, as the report has them."""
        names: dict[str, list[str]] = {}
        for name, ending in zip(self.pictures.names, endings_of(self.pictures.rows), strict=True):
            names.setdefault(f"images{ending}", []).append(name)
        return {
            images: [len(own), *picture_files.picture_shape(self.run_dir / own[0])]
            for images, own in names.items()
        }

    def take_all(self, found: Found, asked: set[int]) -> None:
        """Take the pictures that are there, wherever they are, and say how many are not.

        Args:
            asked: rows that are made anew even so.
        """
        places, rows = found.places(self.pictures), self.pictures.rows
        gone = found.told(places.values())
        beside = self._made_beside(found)
        self.made_beside = len(beside)
        asked = asked & places.keys() - beside
        self.take({row: path for row, path in places.items() if row not in asked})
        if len(rows) > 1 and (gone or places):
            missing = [rows[row] for row in self.missing if row not in asked]
            told = [Told(self.facts.settings(row), row.weights, row.versions) for row in missing]
            say(f"  {Changes.of(len(rows), told, gone, len(asked)).in_words()}")

    def take_done(self, found: Found, progress: Progress | None) -> None:
        """Take the pictures that a stopped run made, or this one while stage 2 ran."""
        kept = None if progress is None else progress.read_steps(0)
        places = found.places(self.pictures)
        beside = self._made_beside(found)
        self.made_beside = len(beside)
        if kept is not None and len(kept["done"]) == len(self.pictures.rows):
            done = {row for row in places if kept["done"][row]}
            if done:
                say(f"  goes on after {len(done)} of {len(self.pictures.rows)} images")
            beside |= done
        self.take({row: path for row, path in places.items() if row in beside})

    def _made_beside(self, found: Found) -> set[int]:
        """The rows that were made while stage 2 ran."""
        made = set() if found.beside is None else found.beside.fingerprints
        return {row for row, own in enumerate(self.pictures.fingerprints) if own in made}

    def take(self, places: Mapping[int, Path]) -> None:
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
        for row in places:
            self._index.add(row)
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
        before, self._seconds = self._seconds, self.report.parts().get("run", 0.0)
        seconds = (self._seconds - before) / len(rows)
        for row, image in zip(rows, images, strict=True):
            recipe = self.pictures.rows[row]
            alone = self.facts.alone(row, recipe, self.made_by)
            self._write(self.pictures.names[row], image, recipe, alone)
            self._index.add(row, seconds + self.facts.seconds_of_latents(row))
        self._index.write_if_due()
        if progress is None:
            return
        import torch

        done = torch.tensor([name in self._written for name in self.pictures.names])
        progress.save_steps(0, {"done": done})
        if stop is not None and stop.number is not None and not done.all():
            self._index.write_now()
            stop.raise_if_asked(
                f"after {int(done.sum())} of {len(done)} images, which are kept: the same command "
                "goes on from there"
            )

    def write_index(self) -> None:
        """Write the index as far as it is, if any picture is there."""
        if self._written:
            self._index.write_now()

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
        others = [path for path in find_ours(self.run_dir) if path.name not in self._written]
        others = [path for path in others if OUR_NAME.fullmatch(path.name) or is_ours(path)]
        for path in others:
            remove_file(path)
        self._index.write()
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
                laid_out = make_grid([picture_files.read_pixels(path) for path in paths])
            self._write(grid, laid_out, self.pictures.grid_recipe)

    def _write(
        self, name: str, pixels: "np.ndarray", recipe: Recipe, alone: Record | None = None
    ) -> None:
        suffix = Path(name).suffix
        with self.report.part("image_encoding"):
            whole = self.facts.record(recipe, pixels, alone)
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
