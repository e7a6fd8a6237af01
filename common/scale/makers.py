"""What makes the pictures of shards: stage 1 in one process, the stages on devices in another."""

import getpass
import hashlib
import json
import os
import pickle
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from common.compute.kept import Kept
from common.compute.platforms import usable_cores
from common.declared import EMBEDDINGS, LATENTS, PICTURES
from common.errors import StageError, UnfitEnvironmentError
from common.files.recipe import FORMAT_VERSION, package_versions, to_json
from common.files.stage_table import DECODE, DENOISE, ENCODE_PICTURES, FIRST, Stage, numbered
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.models.lora import lora_settings
from common.models.textual_inversion import embedding_settings
from common.runs.flags import Given
from common.runs.generation import RunSettings, read_run_settings
from common.runs.in_turn import begins_with_pictures, plan
from common.runs.stage_run import ResidentStage
from common.scale.planning import Format
from common.scale.shard_store import ShardStore, files_of
from common.scale.shards import OF_ROWS, Failure, Line, Shard
from common.scale.sifting import Ends, sift

# Begins a stage, by its number, with a run directory's files; what it returns waits for its end,
# and is told whether this process has failed at it.
Follow = Callable[[int, dict[str, bytes]], Callable[[bool], None]]
LIST_FILE = "prompts.jsonl"
ENCODING, MAKING = "stage 1", "stages 0, 2 and 3"  # pools of processes
MADE = (EMBEDDINGS, LATENTS, PICTURES)
ON_DEVICES = (ENCODE_PICTURES, DENOISE, DECODE)
# Of a run of a shard alone: a grid of it is of no use.
OF_SHARDS: dict[str, Any] = {"grid_images": 0}


@dataclass(frozen=True, kw_only=True)
class Making:
    """How shards are made: the same in every process."""

    flags: dict[str, Any]  # of every run, as `run_all.sh` takes them
    target: str
    content: str = ""  # a hash of `content_here`, on the machine that the list was read on
    form: Format = "folder"
    latents: bool = False
    folder: str = field(default_factory=os.getcwd)  # that paths of flags and rows begin in

    def settings(self) -> RunSettings:
        """Those that rows have where they say nothing.

        Raises:
            BadSettingError: one is wrong.
        """
        return read_run_settings(self.flags.get("config"), Given(FIRST, self.flags).settings())

    def content_here(self) -> dict[str, Any]:
        """What pictures are made of besides settings and rows, by its content on this machine."""
        settings = self.settings()
        names = [*dict.fromkeys(name for artifact in MADE for name in loaded_for(artifact))]
        checkpoint = open_checkpoint(settings, names)
        return {
            "weights": [checkpoint.fingerprints_for(artifact) for artifact in MADE],
            "loras": lora_settings(settings.loras, names),
            "embeddings": embedding_settings(settings.embeddings),
            "versions": package_versions("torch", "diffusers", "transformers", "jax", "torchax"),
            "format_version": FORMAT_VERSION,
        }

    def refuse_other_content(self) -> None:
        """Raise `UnfitEnvironmentError` where this machine would make other pictures."""
        host = socket.gethostname()
        try:
            here = hash_of(self.content_here())
        except StageError as error:
            raise UnfitEnvironmentError(f"on {host}: {error}") from None
        if here != self.content:
            raise UnfitEnvironmentError(
                f"{host} has another checkpoint, LoRA, embedding or version of a package than the "
                "machine that the list was read on: make them the same"
            )

    def store(self) -> ShardStore:
        """Where shards are kept."""
        return ShardStore(self.target, self.form, latents=self.latents)

    def commands(self, run_dir: Path) -> dict[Stage, list[str]]:
        """The arguments of each stage for the list in a run directory."""
        given = {name: value for name, value in self.flags.items() if name not in OF_ROWS}
        given |= {"output_dir": run_dir, "prompts_file": run_dir / LIST_FILE, **OF_SHARDS}
        return {stage: command[2:] for stage, command in plan(given).items()}

    def enter(self) -> None:
        """Work where paths begin; where the machine has no such folder, they have to be absolute.

        Raises:
            UnfitEnvironmentError: this machine has other files than the one that read the list.
        """
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        self.refuse_other_content()


@dataclass
class Made:
    """A shard on its way through the processes."""

    shard: Shard
    is_done: bool = False  # in its store already, or now
    lines: list[Line] = field(default_factory=list)  # with prompts that could be encoded
    failures: list[Failure] = field(default_factory=list)
    ids: dict[int, str | None] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # of the run directory
    seconds: dict[str, float] = field(default_factory=dict)  # by pool

    def to_row(self) -> dict[str, Any]:
        """As a row that goes from one process to the next."""
        told = asdict(self)
        del told["files"]
        return {"told": json.dumps(told), "files": pickle.dumps(self.files)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        told = json.loads(row["told"])
        told["shard"] = Shard.from_json(json.dumps(told["shard"]))
        told["lines"] = [
            Line._make([*line[:5], *map(tuple, line[5:7]), None]) for line in told["lines"]
        ]
        told["failures"] = [Failure(*each) for each in told["failures"]]
        told["ids"] = {int(row): id for row, id in told["ids"].items()}
        return cls(**told, files=pickle.loads(row["files"]))


class Encoder:
    """Stage 1, open for many shards."""

    def __init__(self, making: Making) -> None:
        making.enter()
        self._making, self._settings = making, making.settings()
        self._store, self._stage = making.store(), ResidentStage(FIRST, Kept(most_models=2))
        self._stage.open()

    def __call__(self, shard: Shard, ends: Ends | None = None) -> Made:
        """Read a shard's rows, and encode their prompts.

        Args:
            ends: where processes have ended at the shard; its rows are tried alone first.
        """
        began, made = time.monotonic(), Made(shard)
        if self._store.is_done(shard.name):
            made.is_done = True
            return made
        for line in shard.lines(self._settings):
            if line.failure is None:
                made.lines.append(line)
                made.ids[line.row] = line.own_id
            else:
                made.failures.append(line.failure)

        def encode(lines: Sequence[Line]) -> dict[str, bytes]:
            with own_folder() as run_dir:
                write_list(run_dir, lines)
                self._stage.run(*self._making.commands(run_dir)[FIRST])
                return contents_of(run_dir)

        made.lines, failures, files = sift(made.lines, encode, ends)
        made.failures += failures
        made.files = files or {}
        made.seconds[ENCODING] = time.monotonic() - began
        return made


class Follower:
    """The stages on devices of a process that computes together with a `Maker` on another host."""

    def __init__(self, making: Making) -> None:
        """
        Args:
            making: with `distributed` among its flags.
        """
        making.enter()
        self._making, self._stages = making, _open_on_devices(making)

    def __call__(self, number: int, files: Mapping[str, bytes]) -> None:
        """Do this process's part of a stage.

        Args:
            files: of the run directory, as the first process has them.
        """
        with own_folder() as run_dir:
            for name, content in files.items():
                (run_dir / name).write_bytes(content)
            stage = numbered(number)
            self._stages[stage].run(*self._making.commands(run_dir)[stage])


class Maker:
    """The stages on devices, open for many shards; all chips that its process sees."""

    def __init__(self, making: Making, followers: Sequence[Follow] = ()) -> None:
        """
        Args:
            followers: of the processes on other hosts that compute together with this one, each
                begins a stage with the run directory's files, and returns how to wait for it.
        """
        making.enter()
        self._making, self._store, self._followers = making, making.store(), followers
        self._stages = _open_on_devices(making)

    def __call__(self, made: Made, ends: Ends | None = None) -> Made:
        """Make a shard's pictures, and put them into the store.

        Args:
            ends: as of an `Encoder`.
        """
        began, name = time.monotonic(), made.shard.name
        if made.is_done or self._store.is_done(name):
            return self._found(made)
        with own_folder() as run_dir:
            encoded = made.files

            def make(lines: Sequence[Line]) -> Path:
                write_list(run_dir, lines)
                if encoded and len(lines) == len(made.lines):
                    for own, content in encoded.items():
                        (run_dir / own).write_bytes(content)
                else:
                    self._stages[FIRST].run(*self._making.commands(run_dir)[FIRST])
                for stage in ON_DEVICES:
                    if stage is not ENCODE_PICTURES or begins_with_pictures(run_dir):
                        self._run(stage, run_dir)
                return run_dir

            lines, failures, run = sift(made.lines, make, ends)
            made.failures = sorted([*made.failures, *failures])
            images = sum(line.images for line in lines)
            self._store.commit(name, run if lines else None, images, made.ids, made.failures)
        made.is_done, made.files, made.lines = True, {}, []
        made.seconds[MAKING] = time.monotonic() - began
        return made

    def _run(self, stage: Stage, run_dir: Path) -> None:
        """Run a stage on all hosts, of which this one writes."""
        files = contents_of(run_dir) if self._followers else {}
        waits = [begin(stage.number, files) for begin in self._followers]
        has_failed = True
        try:
            self._stages[stage].run(*self._making.commands(run_dir)[stage])
            has_failed = False
        finally:
            for wait in waits:
                wait(has_failed)

    def _found(self, made: Made) -> Made:
        """A shard that another process has put there."""
        made.failures = self._store.failures([made.shard.name])
        made.is_done, made.files, made.lines = True, {}, []
        return made


def _open_on_devices(making: Making) -> dict[Stage, ResidentStage]:
    """Stages that share models, all but stage 1 open, on all cores: Ray has set threads to one."""
    import torch

    torch.set_num_threads(usable_cores())
    kept = Kept(most_models=4)  # two checkpoints or sets of LoRAs
    stages = {stage: ResidentStage(stage, kept) for stage in (FIRST, *ON_DEVICES)}
    own = {"backend": "auto", **making.flags}
    flags = [f"--{name}={own[name]}" for name in ("backend", "distributed") if name in own]
    for stage in ON_DEVICES:
        stages[stage].open(*flags)
    return stages


def contents_of(run_dir: Path) -> dict[str, bytes]:
    """A run directory's files that are whole, by their names."""
    return {path.name: path.read_bytes() for path in files_of(run_dir)}


def folder_of_shards() -> Path:
    """Where processes of this user work at shards, each in a folder that begins with its number."""
    return Path(tempfile.gettempdir()) / f"staged-diffusion-shards-{getpass.getuser()}"


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for one run; those of processes that are no more go."""
    parent = folder_of_shards()
    parent.mkdir(mode=0o700, exist_ok=True)
    for left in parent.iterdir():
        if not psutil.pid_exists(int(left.name.partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{os.getpid()}-", dir=parent) as name:
        yield Path(name)


def write_list(run_dir: Path, lines: Sequence[Line]) -> None:
    """Write a run's list of prompts."""
    text = "".join(f"{line.text}\n" for line in lines)
    (run_dir / LIST_FILE).write_text(text, encoding="utf-8")


def hash_of(value: Any) -> str:
    """A hash of what JSON can say."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()
