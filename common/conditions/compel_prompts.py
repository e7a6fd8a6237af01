"""Prompts in compel's syntax, encoded by compel."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from common.conditions.prompt_settings import PromptSettings, ResolvedPrompts
from common.errors import BadSettingError, in_one_line
from common.models.text_pipeline import embeddings_names, has_two_encoders
from common.models.textual_inversion import with_weighted_vectors

if TYPE_CHECKING:
    import torch


def encode_with_compel(pipeline: Any, config: ResolvedPrompts) -> "dict[str, torch.Tensor]":
    """All prompts in compel's syntax, its chunks filled up to one length.

    Raises:
        BadSettingError: a prompt that compel cannot read, or longer than `long_prompts` lets it be.
    """
    import torch
    from compel import CompelForSD, CompelForSDXL

    compel = (CompelForSDXL if has_two_encoders(pipeline) else CompelForSD)(pipeline)
    negatives = [prompt.negative_prompt for prompt in config.prompts]
    taught = partial(with_weighted_vectors, pipeline)
    texts = taught([prompt.prompt for prompt in config.prompts], pipeline.tokenizer)
    none_is_empty = [text or "" for text in negatives]
    arguments = {"negative_prompt": taught(none_is_empty, pipeline.tokenizer)}
    if has_two_encoders(pipeline):
        for argument, name in (
            ("style_prompt", "prompt"),
            ("negative_style_prompt", "negative_prompt"),
        ):
            arguments[argument] = taught(_second(config.prompts, name), pipeline.tokenizer_2)
    try:
        found = compel(texts, **arguments)
    except Exception as error:
        raise BadSettingError(
            f"--prompt_weighting compel: compel cannot read the prompts ({in_one_line(error)}): "
            "see its syntax, or leave the flag out"
        ) from error
    tensors = [found.embeds, found.negative_embeds]
    if has_two_encoders(pipeline):
        tensors += [found.pooled_embeds, found.negative_pooled_embeds]
    length, room = found.embeds.shape[1], int(pipeline.tokenizer.model_max_length)
    if config.long_prompts == "cut" and length > room:
        raise BadSettingError(
            f"the prompts take {length} tokens in compel's chunks, over the {room} of one: use "
            "--long_prompts chunk, or shorten them"
        )
    dtype = pipeline.text_encoder.dtype
    embeddings = {
        name: tensor.to(dtype)
        for name, tensor in zip(embeddings_names(pipeline), tensors, strict=True)
    }
    if has_two_encoders(pipeline) and pipeline.config.force_zeros_for_empty_prompt:
        # No negative prompt is zeros, as in diffusers' own encode_prompt.
        none = torch.tensor([text is None for text in negatives])
        for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
            embeddings[name][none] = 0
    return embeddings


def _second(prompts: Sequence[PromptSettings], name: str) -> list[str]:
    """What the second text encoder reads: the first one's texts where it has none of its own."""
    texts = ((getattr(p, f"{name}_2"), getattr(p, name)) for p in prompts)
    return [(first if second is None else second) or "" for second, first in texts]
