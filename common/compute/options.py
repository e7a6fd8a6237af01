"""How a stage computes, which changes nothing in what it computes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from common.compute.backends import BACKENDS
from common.declared import (
    EMBEDDINGS,
    FILES,
    IMAGE_LATENTS,
    LATENTS,
    PICTURES,
    Settings,
    option,
    validate,
)
from common.errors import BadSettingError

# A server's key: of ours, and of the one that `--remote_vae` names. Other users of the machine, who
# see flags, do not see it.
API_KEY = "STAGED_DIFFUSION_API_KEY"
MadeBy = dict[str, Any]  # option → value
ON_DEVICES = (IMAGE_LATENTS, LATENTS, PICTURES)
ALL = (EMBEDDINGS, *ON_DEVICES)

if TYPE_CHECKING:  # a type checker cannot follow the table
    BackendName = str
else:
    BackendName = Literal["auto", *BACKENDS]


class RunOptions(Settings):
    """How a stage computes, and what it measures and keeps meanwhile."""

    backend: BackendName = option(
        "auto",
        f"{', '.join(row.help for row in BACKENDS.values())}, or auto.",
        metavar="NAME",
        helps_make=ON_DEVICES,
    )
    remote_vae: str | None = option(
        None,
        "Address of a server whose VAE computes.",
        metavar="URL",
        helps_make=(IMAGE_LATENTS, PICTURES),
        swept=False,
        shown="",
    )
    mesh: str = option("auto", "single, or cfg=2,rows=4 ….", metavar="AXES", helps_make=ON_DEVICES)
    batch_size: int = option(
        8, "Most pictures computed at once.", metavar="N", helps_make=ON_DEVICES, ge=1
    )
    fill_groups: bool = option(
        False,
        "Compute as many, whatever there are.",
        metavar=" ",
        helps_make=ON_DEVICES,
        shown="",
    )
    steps_per_call: int | None = option(
        None,
        "Steps in one call.",
        metavar="N",
        helps_make=(LATENTS,),
        shown="all; 1 on CPU",
        ge=1,
    )
    warmup_steps: int = option(
        0, "Steps before the timed ones.", metavar="N", helps_make=(LATENTS,), ge=0
    )
    warmup: bool = option(
        False,
        "Decode once before the timed run.",
        metavar=" ",
        helps_make=(PICTURES,),
        shown="",
    )
    checkpoint_every: int | None = option(
        None,
        "Keep progress after N steps.",
        metavar="N",
        helps_make=(LATENTS,),
        shown="by time",
        ge=1,
    )
    operations: Literal["fast", "torchax"] = option(
        "fast", "fast (ours), torchax.", metavar="WHOSE", helps_make=ON_DEVICES
    )
    distributed: str | None = option(
        None,
        "Of several: auto, or HOST:PORT,COUNT,INDEX.",
        metavar="PLACE",
        helps_make=ON_DEVICES,
        alone=True,
        shown="",
    )
    no_verify: bool = option(
        False,
        "Trust the checksums in the files' headers.",
        metavar=" ",
        helps_make=ON_DEVICES,
        shown="",
    )
    repeat: int = option(
        0, "Measure N further runs.", metavar="N", helps_make=ALL, swept=False, ge=0
    )
    profile: bool = option(
        False, "Trace warm steps, and sum them up.", metavar=" ", helps_make=ALL, shown=""
    )
    profile_dir: Path | None = option(
        None,
        "For traces.",
        metavar="DIR",
        helps_make=ALL,
        kind=Path,
        swept=False,
        shown="profile/ of the run",
    )
    profile_steps: tuple[int, int] | None = option(
        None,
        "Trace steps A to B - 1.",
        metavar="A:B",
        helps_make=(LATENTS,),
        kind=str,
        shown="2:5",
    )
    save_trajectory: int | None = option(
        None,
        "Keep latents after every N steps.",
        metavar="N",
        group=FILES,
        helps_make=(LATENTS,),
        shown="",
        ge=1,
    )

    @field_validator("remote_vae")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        """A server's address, to which paths can be added."""
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give an address, as http://localhost:8000")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(f"give the address alone; a key goes by {API_KEY}")
        return value.rstrip("/")

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _parse_steps(cls, value: Any) -> Any:
        """Read "5:8"."""
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"(\d+):(\d+)", value)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError("give the first step and the one after the last, as 5:8")
        return int(match[1]), int(match[2])

    @model_validator(mode="before")
    @classmethod
    def _profile_where_it_is_placed(cls, values: Any) -> Any:
        """A folder or steps for a profile ask for one."""
        named = values.get("profile_dir") or values.get("profile_steps")
        return values | {"profile": True} if named else values

    @property
    def verify(self) -> bool:
        """Whether files are held against the checksums in their headers."""
        return not self.no_verify

    def at_once(self, images: int) -> int:
        """How many of a run's images are computed at once, as far as options say."""
        return self.batch_size if self.fill_groups else min(images, self.batch_size)

    def made_by(self, facts: Mapping[str, Any], group_size: int) -> MadeBy:
        """By what of these options an image's bits are determined, once they are settled.

        Args:
            facts: what the report says of the devices.
            group_size: images that were computed at once.
        """
        where = {"backend": facts["backend"]}
        if self.remote_vae is not None:
            where = {"remote_vae": self.remote_vae}
        settled = {
            **where,
            "mesh": facts.get("mesh"),
            "batch_size": group_size,
            "fill_groups": True,
        }
        kept = {name: getattr(self, name) for name in ("operations", "steps_per_call")}
        kept = kept if facts["backend"] == "jax" else {}
        return {name: value for name, value in {**settled, **kept}.items() if value is not None}

    def given(self) -> list[str]:
        """The options that are not as they are by default."""
        defaults = RunOptions()
        names = type(self).model_fields
        return [name for name in names if getattr(self, name) != getattr(defaults, name)]

    def writes(self) -> bool:
        """Whether this process is known to write: it is alone, or the first of several."""
        return self.distributed is None or self.distributed.endswith(",0")

    def why_measure(self) -> str | None:
        """Why a stage runs although its output is fresh; None if nothing is to be measured."""
        if self.profile:
            return "it is to be profiled"
        return "it is to be repeated" if self.repeat else None

    def profile_folder(self, run_dir: Path, stage: int) -> Path:
        """Where a stage's trace is written."""
        return (self.profile_dir or run_dir / "profile") / f"stage{stage}"

    def profiled_steps(self, evaluations: int) -> range:
        """The steps to profile: those asked for, else up to three after the first two.

        Raises:
            BadSettingError: the run has no such steps.
        """
        if self.profile_steps is None:
            first = min(2, evaluations - 1)
            return range(first, min(first + 3, evaluations))
        if self.profile_steps[1] > evaluations:
            first, stop = self.profile_steps
            raise BadSettingError(
                f"--profile_steps {first}:{stop}: the run has {evaluations} steps, 0 to "
                f"{evaluations - 1}"
            )
        return range(*self.profile_steps)


def read_run_options(parameters: Mapping[str, Any]) -> RunOptions:
    """Pick a stage's run options out of its command's parameters.

    Raises:
        BadSettingError: a bad value; names the flag.
    """
    names = RunOptions.model_fields.keys()
    given = {name: value for name, value in parameters.items() if name in names}
    return validate(RunOptions, {k: v for k, v in given.items() if v is not None}, "flags")
