"""How long a list takes on how many hosts: a formula over estimates and measured shares.

The seconds of a shard on a host are those of its pictures on the chips (estimates by the TPU
compiler, docs/tpu.md), of their encoding on the host's cores, and of what each shard costs whatever
it holds; text encoders run beside them, on cores of their own:

    shard   = pictures · (steps · step / at once + decode + encode / cores) + own
    rate    = pictures / shard, at most cores of text encoders / their seconds a picture
    lost    = preemptions · (restart + shard / 2), of a host's time
    hours   = images / (hosts · rate · (1 - lost))
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from common.errors import BadInputFileError, BadSettingError, in_one_line
from common.text_files import read_text

Format = Literal["folder", "webdataset", "parquet"]  # of shards

SECONDS_A_DAY = 86_400
FURTHEST = 0.9  # of one: how busy what all hosts share may be


@dataclass(frozen=True, kw_only=True)
class Chips:
    """What an estimate says of a host's chips: SDXL, 1024×1024, bfloat16, with guidance."""

    chips: int
    images: int  # at once
    step: float  # seconds of a step of all of them
    decode: float  # seconds of a picture, by all chips
    cores: int = 180  # of their host: those of its VM type


# By `benchmarks/tpu_estimates.py`: the rows "v6e-8, eight images", "v6e-1", "VAE 1024², v6e-1",
# whose programs have no collectives, so that another number of chips makes as many pictures each.
ESTIMATES: Mapping[str, Chips] = {
    "v6e:2x4": Chips(chips=8, images=8, step=0.03713, decode=0.13909 / 8),
    "v6e:2x2": Chips(chips=4, images=4, step=0.03713, decode=0.13909 / 4),
    "v6e:1x1": Chips(chips=1, images=1, step=0.03909, decode=0.13909, cores=44),
}


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What a picture, or a shard, takes of a host besides its chips.

    Measured by `benchmarks/host_shares.py` on one core of an AMD EPYC machine (docs/scale.md).
    """

    text: float = 1.89  # core seconds of SDXL's text encoders for a prompt and its negative one
    encode: float = 0.562  # core seconds to make a PNG of 1024×1024
    shard: float = 0.11  # seconds of a process, whatever the shard holds
    program: float = 0.0122  # seconds of the program that hands out shards, for each
    row: float = 0.000086  # seconds of the program that reads the list, before it begins
    picture_bytes: int = 1_140_000
    # By their shapes, for a prompt and a negative one, float32: 77 × 2048, and what is pooled.
    embeddings_bytes: int = 2 * (77 * 2048 + 1280) * 4
    latents_bytes: int = 4 * 128 * 128 * 4
    index_bytes: int = 200


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts of a plan."""

    topology: str
    chips: Chips
    cores: int  # of each
    cores_of_text: int  # of these, for text encoders, whatever the number of their processes
    preemptions: float = 0.0  # a day, of each
    restart: float = 300.0  # seconds until a new one makes pictures


@dataclass(frozen=True, kw_only=True)
class Work:
    """The list of a plan."""

    images: int
    form: Format = "webdataset"
    steps: int = 25
    shard_images: int = 128  # whole groups of eight, and of more
    latents: bool = False


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all hosts share: the target and the program."""

    bytes_per_second: float = 25e9  # that the target takes
    objects_per_second: float = 1000.0  # files that it takes
    object_store_bytes: float = 30e9  # of Ray, on each host


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What hosts make of a list."""

    work: Work
    hosts: Hosts
    shares: Shares
    count: int = 1

    @property
    def shard_seconds(self) -> float:
        """A shard's on a host."""
        chips, own = self.hosts.chips, self.shares
        cores = max(1, self.hosts.cores - self.hosts.cores_of_text)
        on_chips = self.work.steps * chips.step / chips.images + chips.decode
        return self.work.shard_images * (on_chips + own.encode / cores) + own.shard

    @property
    def rate_of_chips(self) -> float:
        """Images a second that a host's chips and their process make."""
        return self.work.shard_images / self.shard_seconds

    @property
    def rate_of_text(self) -> float:
        """Images a second whose prompts a host's text encoders encode."""
        return self.hosts.cores_of_text / self.shares.text

    @property
    def lost(self) -> float:
        """The part of a host's time that preemptions take."""
        each = self.hosts.restart + self.shard_seconds / 2
        return min(1.0, self.hosts.preemptions * each / SECONDS_A_DAY)

    @property
    def rate(self) -> float:
        """Images a second of a host."""
        return min(self.rate_of_chips, self.rate_of_text) * (1 - self.lost)

    @property
    def hours(self) -> float:
        """Of all hosts together, from the first picture to the last one."""
        return self.work.images / (self.rate * self.count) / 3600

    @property
    def chip_hours(self) -> float:
        return self.hours * self.count * self.hosts.chips.chips

    @property
    def storage_bytes(self) -> int:
        """In the target."""
        own = self.shares
        latents = own.latents_bytes if self.work.latents else 0
        return self.work.images * (own.picture_bytes + own.index_bytes + latents)

    @property
    def files_of_shard(self) -> int:
        """A tar or table and its index; of a folder a file for each picture, settings, reports."""
        return self.work.shard_images + 8 if self.work.form == "folder" else 2

    def check(self) -> None:
        """Raise `BadSettingError` where preemptions leave no time."""
        if self.rate <= 0:
            raise BadSettingError(
                f"--preemptions {self.hosts.preemptions:g}: hosts that are lost so often make "
                "nothing: give smaller shards (--shard_images)"
            )

    @property
    def list_minutes(self) -> float:
        """In which the program reads the list, before anything begins."""
        return self.work.images * self.shares.row / 60

    def within(self, hours: float) -> Self:
        """The same with as few hosts as make it in so many hours."""
        one = replace(self, count=1)
        return replace(self, count=math.ceil(one.hours / hours))

    def most_hosts(self, shared: Shared) -> dict[str, int]:
        """What all hosts share → the hosts with which it would be as busy as it may be."""
        shards = self.rate / self.work.shard_images  # a second, of a host
        bytes_each = self.storage_bytes / self.work.images
        uses = {
            "the target's bytes": self.rate * bytes_each / shared.bytes_per_second,
            "the target's files": shards * self.files_of_shard / shared.objects_per_second,
            "the program": shards * self.shares.program,
        }
        return {name: int(FURTHEST / use) for name, use in uses.items()}


def chips_of(topology: str, unet: Path | None, vae: Path | None, steps: int) -> Chips:
    """What is known of a host's chips.

    Args:
        unet, vae: files that `--topology … --json FILE` of stages 2 and 3 wrote, which come before
            what is known.

    Raises:
        BadSettingError: nothing is known of that topology.
        BadInputFileError: a file has no such figures, or they are of another topology.
    """
    known = ESTIMATES.get(topology)
    if known is None and (unet is None or vae is None):
        raise BadSettingError(
            f"--topology {topology}: estimates are there for {', '.join(ESTIMATES)}; for others "
            "give --unet_json and --vae_json, which stages 2 and 3 write with --topology and --json"
        )
    found = known or Chips(chips=0, images=1, step=0.0, decode=0.0)
    if unet is not None:
        told = _figures(unet, topology)
        seconds = told["images"] / told["images_per_second"]
        found = replace(
            found,
            chips=_chips_in(topology),
            images=told["images"],
            step=seconds / (told["steps"] or steps),
        )
    if vae is not None:
        found = replace(found, decode=1 / _figures(vae, topology)["images_per_second"])
    return found


def _figures(file: Path, topology: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(read_text(file))
        of = found["topology"]
        _ = found["images"] / found["images_per_second"], found["steps"]
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError) as error:
        raise BadInputFileError(
            f"{file} is no estimate of a stage ({in_one_line(error)}): give what --json wrote"
        ) from None
    if of != topology:
        raise BadInputFileError(f"{file} is an estimate for {of}, not {topology}: give its own")
    return found


def _chips_in(topology: str) -> int:
    return math.prod(int(side) for side in topology.partition(":")[2].split("x"))
