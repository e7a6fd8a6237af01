"""The seed of every image of a run: what gives it, and what is said of that."""

import hashlib
from collections.abc import Collection, Sequence

from common.conditions.prompt_settings import PromptSettings
from common.messages import warn
from common.sampling.sampling_settings import SamplingSettings

MOST_SEED = 2**63  # not itself
MOVED = (
    "an image that moves has another seed, which counts from --seed: --same_seed, or seeds or ids "
    "in the prompts file keep it"
)
SEEDS_OF_IDS = 2**32  # as many as an id chooses among


def images_of(prompts: Sequence[PromptSettings], images: int) -> list[int]:
    """How many images each prompt has: one for each of its seeds, or its own number.

    Args:
        images: of a prompt that says nothing of it.
    """
    return [
        len(prompt.seeds) if prompt.seeds else prompt.num_images_per_prompt or images
        for prompt in prompts
    ]


def seeds_of(
    prompts: Sequence[PromptSettings],
    images: Sequence[int],
    settings: SamplingSettings,
    before: int = 0,
) -> list[int]:
    """The seeds of all images, prompt-major; those of one prompt follow each other.

    A prompt's are those that it lists. Else the first is its own; else the run's, with `same_seed`;
    else the run's and what the prompt's id gives; else the run's and the number of images before.

    Args:
        images: of each prompt.
        before: images of other prompts that the run begins with.
    """
    seeds: list[int] = []
    for prompt, count in zip(prompts, images, strict=True):
        if prompt.seeds is not None:
            seeds += [seed + settings.seed_offset for seed in prompt.seeds]
            continue
        first = settings.seed + before + len(seeds)
        if prompt.id is not None:
            first = settings.seed + seed_of_id(prompt.id)
        if settings.same_seed:
            first = settings.seed
        if prompt.seed is not None:
            first = prompt.seed
        seeds += [first + settings.seed_offset + k for k in range(count)]
    return seeds


def seed_of_id(id: str) -> int:
    """A number for an id, the same on every machine."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]) % SEEDS_OF_IDS


def warn_of_seeds(prompts: Sequence[PromptSettings], given: Collection[str]) -> None:
    """Say what `--seed` and `--same_seed` change nothing in.

    Args:
        given: the settings that flags gave.
    """
    own = sum(prompt.has_own_seed for prompt in prompts)
    for name in ("seed", "same_seed"):
        if name in given and own:
            whose = "all prompts have" if own == len(prompts) else f"{own} of {len(prompts)} have"
            warn(
                f"--{name} has no effect where prompts have seeds of their own: {whose}; "
                "--seed_offset N moves these"
            )
