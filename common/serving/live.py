"""How far a running job is."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Live:
    """What is known of a job that runs."""

    stage: int  # that runs
    done: int  # steps of stage 2, of `total`
    total: int
    seconds_left: float | None
    preview: bytes | None  # a JPEG of the latents as they are now, of stage 2 alone
