"""Prompts, and how they are encoded."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from common.declared import (
    EMBEDDINGS,
    LATENTS,
    MODEL,
    PROMPTS,
    Dtype,
    Place,
    Settings,
    Text,
    Word,
    setting,
)
from common.models.model_settings import TokenFile

MOST_IMAGES_PER_PROMPT = 10_000  # so that a wrong number is refused before it takes memory


Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _seeds_in(item: str) -> list[Any]:
    """The seeds of `7` or `3-5`; what is neither is left to be refused."""
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", item)
    if match is None:
        return [item.strip()]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MOST_IMAGES_PER_PROMPT:
        raise ValueError(f"the seeds {item.strip()} go backwards, or are too many")
    return [*range(first, last + 1)]


class PromptSettings(Settings):
    """One prompt of a run. `negative_prompt` None means what diffusers does with `None`.

    Those for the second text encoder are those for the first where they are None.
    """

    id: Word | None = None  # names its pictures, and gives its seed where it has none of its own
    prompt: Text
    prompt_2: Text | None = None
    negative_prompt: Text | None
    negative_prompt_2: Text | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    seeds: tuple[Seed, ...] | None = Field(default=None, min_length=2)  # an image for each
    num_images_per_prompt: int | None = Field(default=None, ge=1, le=MOST_IMAGES_PER_PROMPT)
    image: Place | None = None  # to begin with
    mask_image: Place | None = None
    # Settings of the run that it has its own of, by their names; see `own_settings`.
    settings: dict[str, Any] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _a_seed_may_be_several(cls, values: Any) -> Any:
        """Read a list, "1,2,7" and "1-5"."""
        seed = values.get("seed") if isinstance(values, dict) else None
        if isinstance(seed, str):
            seed = [each for item in seed.split(",") for each in _seeds_in(item)]
        if not isinstance(seed, list | tuple):
            return values
        if not 1 <= len(seed) <= MOST_IMAGES_PER_PROMPT:
            raise ValueError(f"seed lists {len(seed)}: give 1 to {MOST_IMAGES_PER_PROMPT}")
        if values.get("seeds") is not None:
            raise ValueError("give either seed or seeds, not both")
        if len(seed) == 1:
            return {**values, "seed": seed[0]}
        return {**values, "seed": None, "seeds": seed}

    @model_validator(mode="after")
    def _seeds_are_as_many_as_images(self) -> Self:
        if self.seeds is not None and (self.num_images_per_prompt or self.seed) is not None:
            raise ValueError(
                "seeds are an image each: leave seed and num_images_per_prompt out beside them"
            )
        return self

    @property
    def has_own_seed(self) -> bool:
        """Whether it has a seed that is not the run's."""
        return self.seed is not None or self.seeds is not None

    @model_validator(mode="after")
    def _second_negative_needs_the_first(self) -> Self:
        if self.negative_prompt_2 is not None and self.negative_prompt is None:
            raise ValueError("negative_prompt_2 needs a negative_prompt, as diffusers reads them")
        return self


class AskedPrompts(Settings):
    """Prompts as they are asked for. Recipes hold those of each prompt, as resolved."""

    prompt: tuple[Text, ...] = setting(
        ("a large red star on a blue background",),
        "What to draw; give it again for more.",
        metavar="TEXT",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        recorded=False,
        many=True,
        shown="",
    )
    prompt_2: tuple[Text, ...] | None = setting(  # one for all prompts, or one for each
        None,
        "For the second encoder.",
        metavar="TEXT",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        recorded=False,
        many=True,
        shown="the prompt",
    )
    prompts_file: Path | None = setting(
        None,
        "Prompts: text, JSONL, JSON, CSV.",
        metavar="FILE",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        recorded=False,
        kind=Path,
        shown="",
    )
    prompt_syntax: Literal["dynamic"] | None = setting(
        None,
        "dynamic: {red|blue} is two prompts.",
        metavar="HOW",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        recorded=False,
        shown="",
    )
    wildcards: Path | None = setting(
        None,
        "Values for __name__, one a line.",
        metavar="DIR",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        recorded=False,
        kind=Path,
        shown="",
    )
    negative_prompt: Text | None = setting(
        "blurry, low quality, distorted, deformed",
        "What not to draw.",
        metavar="TEXT",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        recorded=False,
        shown="blurry, low …",
        none_flag=("no_negative_prompt", 'No negative at all, unlike "".'),
    )
    negative_prompt_2: Text | None = setting(
        None,
        "The same for the negative prompt.",
        metavar="TEXT",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        recorded=False,
        shown="",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lists = ("prompt", "prompt_2", "embeddings", "loras", "image", "mask_image")
        single = {name: [values[name]] for name in lists if isinstance(values.get(name), str)}
        return {**values, **single}


class PromptOptions(Settings):
    """How many pictures each prompt has, and how prompts are encoded."""

    num_images_per_prompt: int = setting(
        1,
        "Pictures of each prompt.",
        metavar="N",
        group=PROMPTS,
        shapes=(LATENTS,),
        ge=1,
        le=MOST_IMAGES_PER_PROMPT,
    )
    clip_skip: int | None = setting(
        None,
        "Layers of the encoders to leave out.",
        metavar="N",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        shown="",
        ge=1,
    )
    long_prompts: Literal["cut", "chunk"] = setting(
        "cut", "Over 77 tokens: cut, chunk.", metavar="HOW", group=PROMPTS, shapes=(EMBEDDINGS,)
    )
    prompt_weighting: Literal["compel", "a1111"] | None = setting(  # whose syntax prompts are in
        None,
        "Weights: compel, a1111.",
        metavar="HOW",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        shown="",
    )
    embeddings: tuple[TokenFile, ...] = setting(
        (),
        "Textual inversion; or FILE:TOKEN.",
        metavar="FILE",
        group=PROMPTS,
        shapes=(EMBEDDINGS,),
        recorded=False,
        many=True,
        flag="embedding",
        shown="",
    )
    text_encoder_dtype: Dtype = setting(
        "float32", "float32, bfloat16.", metavar="DTYPE", group=MODEL, shapes=(EMBEDDINGS,)
    )


class ResolvedPrompts(PromptOptions):
    """The prompts of a run, resolved, and how they are encoded."""

    prompts: tuple[PromptSettings, ...] = Field(min_length=1)

    def prompt_texts(self) -> dict[str, Any]:
        """The prompts' texts as recipes hold them: for each kind those of all prompts."""
        return {
            "prompts": [prompt.prompt for prompt in self.prompts],
            "prompts_2": [prompt.prompt_2 for prompt in self.prompts],
            "negative_prompts": [prompt.negative_prompt for prompt in self.prompts],
            "negative_prompts_2": [prompt.negative_prompt_2 for prompt in self.prompts],
        }
