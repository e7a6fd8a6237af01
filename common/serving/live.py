"""How far the jobs that run are: a small file for each, written by the process that runs it.

Another process has no other way to learn it: the queue's file is for what has to be on the disk.
Only where the jobs folder has the files' own folder, which a server makes, is anything written.
"""

import io
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.progress import Look, Shown

if TYPE_CHECKING:
    import numpy as np

LIVE_FOLDER = "live"  # of the jobs folder: a file for each job that runs, of its run's name
SECONDS_BETWEEN_FILES = 0.1
LEAST_PREVIEW_PIXELS = 128  # of the longer side


@dataclass(frozen=True, kw_only=True)
class Live:
    """How far a running job is."""

    stage: int  # that runs
    done: int  # of `total`: steps in stage 2, else prompts or pictures
    total: int
    seconds_left: float | None
    preview: bytes | None  # a JPEG of the latents as they are now, stage 2's alone


class LiveWriter:
    """Watches what this process does for one job, and keeps its file.

    A look tells each image's own latents: where a group holds several jobs' images, each job's
    writer takes those of its own.
    """

    def __init__(self, jobs_dir: Path, name: str, stage: int, weights: "np.ndarray | None") -> None:
        """
        Args:
            name: of the job's run directory.
            weights: of previews, as `PreviewFit` gives them; None: there are none.
        """
        self._path, self._weights = jobs_dir / LIVE_FOLDER / name, weights
        self._now = Live(stage=stage, done=0, total=0, seconds_left=None, preview=None)
        self._looked = self._began = time.monotonic()
        self._wrote = 0.0

    def wants_look(self) -> bool:
        """Whether it is time for a preview."""
        now = time.monotonic()
        if self._weights is None or now - self._looked < SECONDS_BETWEEN_FILES:
            return False
        self._looked = now
        return True

    def hear(self, shown: Shown, look: Look | None) -> None:
        """Write how far it is, unless that was done a moment ago."""
        now = time.monotonic()
        if look is None and now - self._wrote < SECONDS_BETWEEN_FILES:
            return
        self._wrote = now
        left = shown.seconds_left
        self._now = replace(
            self._now,
            done=shown.done,
            total=shown.total,
            seconds_left=None if left is None else round(left, 2),
            preview=self._now.preview if look is None else self._preview(look),
        )
        with suppress(OSError):  # nothing depends on it
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            temporary.write_bytes(to_bytes(self._now))
            temporary.replace(self._path)

    def _preview(self, look: Look) -> bytes:
        from PIL import Image

        from common.vae.grids import make_grid
        from common.vae.preview import preview_of

        assert self._weights is not None
        latents = look()
        colours = make_grid([preview_of(latents[n], self._weights) for n in sorted(latents)])
        image = Image.fromarray(colours)
        times = -(-LEAST_PREVIEW_PIXELS // max(image.size))
        larger = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        encoded = io.BytesIO()
        larger.save(encoded, "JPEG", quality=85)
        return encoded.getvalue()

    def end(self) -> None:
        """Remove the file."""
        remove_live(self._path.parent.parent, self._path.name)


def has_listeners(jobs_dir: Path) -> bool:
    """Whether a server reads how far jobs are."""
    return (jobs_dir / LIVE_FOLDER).is_dir()


def read_live(jobs_dir: Path, name: str, stage: int) -> Live | None:
    """How far a job is with a stage; None where nothing is known of it."""
    try:
        head, _, preview = (jobs_dir / LIVE_FOLDER / name).read_bytes().partition(b"\n")
        found = Live(**json.loads(head), preview=preview or None)
    except (OSError, ValueError, TypeError):  # it is gone, or of another version
        return None
    return found if found.stage == stage else None  # it may be of a process that died


def to_bytes(live: Live) -> bytes:
    """A line of JSON, and the preview's bytes."""
    head = asdict(live)
    preview = head.pop("preview")
    return json.dumps(head).encode() + b"\n" + (preview or b"")


def remove_live(jobs_dir: Path, name: str) -> None:
    """Remove a job's file, which may not be there."""
    with suppress(OSError):
        (jobs_dir / LIVE_FOLDER / name).unlink(missing_ok=True)
