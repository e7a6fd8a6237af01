"""Peers of a benchmark as processes of their own, which compute when they are asked to.

So the runs of all can be interleaved: while one runs, the others wait and take no time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import typer

# Flags that benchmarks of peers have in common.
Repeat = Annotated[int, typer.Option("--repeat", help="Timed runs of each.", min=1)]
Worker = Annotated[str | None, typer.Option("--worker", hidden=True)]
WorkersFolder = Annotated[Path | None, typer.Option("--folder", hidden=True)]


def peer_flag(known: Collection[str]) -> Any:
    """The flag that chooses among peers."""
    return typer.Option("--peer", help=f"{', '.join(known)}. [all]")


def refuse_unknown(names: Collection[str], known: Collection[str]) -> None:
    """Raise `typer.BadParameter` for names that there are not."""
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name} is none of: {', '.join(known)}")


class PeerProcess:
    """A script started with `--worker NAME --folder DIR`, which calls `answer_requests`."""

    def __init__(
        self, script: Path, worker: str, folder: Path, checkout: Path | None = None
    ) -> None:
        """
        Args:
            script: of this checkout.
            folder: what the worker reads, and where it leaves its results.
            checkout: another one, whose script of the same place is run, by its own `.venv`.
        """
        self.name = worker if checkout is None else f"{checkout}: {worker}"
        self.result = result_file(folder, worker)
        python, own = Path(sys.executable), script.resolve()
        if checkout is not None:
            root = checkout.resolve()
            python, own = python_of(root), root / own.relative_to(own.parents[1])
        self.process = subprocess.Popen(
            [str(python), str(own), "--worker", worker, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Let it load what it needs; it does so from its start.

        Raises:
            RuntimeError: it ended.
        """
        self._read_answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Let it answer one request; it is ready.

        Raises:
            RuntimeError: it ended.
        """
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read_answer()

    def _read_answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        return dict(json.loads(answer))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def python_of(checkout: Path) -> Path:
    """The Python that a checkout has set up."""
    return checkout / ".venv" / "bin" / "python"


def result_file(folder: Path, worker: str) -> Path:
    """What a peer made in its first run, for `compare_results`."""
    return folder / f"{worker}.npz"


def answer_requests(make: Callable[[], Callable[..., dict[str, Any]]]) -> None:
    """Say by a line of JSON that all is loaded, then answer each request by one.

    Args:
        make: loads what is needed, and returns what answers a request.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    answer = make()
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


def compare_results(own: Path, reference: Path) -> tuple[float, np.ndarray | None]:
    """Compare two peers' files of `latents` and, where they decoded, `pictures`.

    Returns the relative difference of the latents, and the differences of all the pictures' values.
    """
    found, expected = np.load(own), np.load(reference)
    difference = np.linalg.norm(found["latents"] - expected["latents"])
    pictures = None
    if "pictures" in found:
        pictures = np.abs(found["pictures"].astype(int) - expected["pictures"].astype(int))
    return float(difference / np.linalg.norm(expected["latents"])), pictures


class LoopClock:
    """The seconds of a denoising loop alone: from its first model evaluation's start to its end."""

    def __init__(self, finish: Callable[[], None] = lambda: None) -> None:
        """`finish` waits for the device."""
        self.finish = finish
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[Any]:
        """Time a block."""
        began = time.perf_counter()
        yield _NoBar()
        self.finish()
        self.seconds = time.perf_counter() - began

    def watch(self, pipeline: Any) -> None:
        """Time the loop of diffusers' pipeline, which runs inside of its progress bar."""
        pipeline.progress_bar = lambda **_: self.running()


class _NoBar:
    def update(self) -> None:
        """Shown to nobody."""
