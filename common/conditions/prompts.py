"""Prompts to embeddings, by diffusers' own `encode_prompt` or by compel."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common.conditions.prompt_settings import PromptSettings, ResolvedPrompts
from common.errors import BadSettingError, in_one_line
from common.files.kept_progress import Progress
from common.messages import say
from common.stopping import StoppedError, StopRequest

if TYPE_CHECKING:
    import torch

TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
Chunks = dict[str, list[str] | None]


def embeddings_names(pipeline: Any) -> tuple[str, ...]:
    """The tensors that a pipeline's UNet needs, in the order that `encode_prompt` returns them."""
    names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    if has_two_encoders(pipeline):
        names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return names


def has_two_encoders(pipeline: Any) -> bool:
    """Whether a text pipeline is SDXL's."""
    return pipeline.__class__.__name__ == "StableDiffusionXLPipeline"


def encode_prompts(
    pipeline: Any,
    config: ResolvedPrompts,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> "dict[str, torch.Tensor]":
    """Encode all prompts of a run.

    Args:
        progress: where prompts are kept until all are done, unless compel encodes them at once.
        stop: asked after each prompt.

    Returns:
        prompt_embeds, negative_prompt_embeds [P, L, D], and for SDXL pooled_prompt_embeds,
        negative_pooled_prompt_embeds [P, E], all in the text encoders' dtype. L is 77, or a
        multiple of it where prompts are encoded in chunks.

    Raises:
        StoppedError: a stop was asked for; what is done is kept.
    """
    import torch

    with torch.no_grad():
        if config.prompt_weighting == "compel":
            return _encode_with_compel(pipeline, config)
        return _encode_with_diffusers(pipeline, config, progress, stop)


def _encode_with_diffusers(
    pipeline: Any, config: ResolvedPrompts, progress: Progress | None, stop: StopRequest | None
) -> "dict[str, torch.Tensor]":
    """One prompt at a time, so that its embeddings are the same bits in any company."""
    import torch
    from tqdm import tqdm

    if config.clip_skip is not None and not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers 0.42 reads text_model.final_layer_norm, which transformers 5 has moved up.
        pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    chunked = [_chunks_of(prompt, pipeline, config) for prompt in config.prompts]
    length = max(len(chunks) for texts in chunked for chunks in texts.values() if chunks)
    groups = _finished_groups(progress)
    done = sum(len(group["prompt_embeds"]) for group in groups)
    if done:
        say(f"  goes on after prompt {done} of {len(chunked)}")
    encoded: list[dict[str, torch.Tensor]] = []
    known_negatives: dict[Any, dict[str, torch.Tensor]] = {}
    with tqdm(total=len(chunked), desc="encode", unit="prompt", leave=False, disable=None) as bar:
        bar.update(done)
        for texts in chunked[done:]:
            encoded.append(
                _encode_chunks(pipeline, texts, length, config.clip_skip, known_negatives)
            )
            done += 1
            bar.update()
            # Once: a stop that comes from here on waits for the next prompt.
            number = None if stop is None else stop.number
            if progress is not None and (number is not None or progress.is_due()):
                groups.append(_concatenate(encoded))
                progress.save_group(done - len(encoded), groups[-1])
                encoded = []
            if number is not None:
                said = f"after {done} of {len(chunked)} prompts, which are kept"
                raise StoppedError(number, f"{said}: the same command goes on from there")
    return _concatenate([*groups, *encoded])


def _encode_chunks(
    pipeline: Any,
    texts: Chunks,
    length: int,
    clip_skip: int | None,
    known_negatives: "dict[Any, dict[str, torch.Tensor]]",
) -> "dict[str, torch.Tensor]":
    """The embeddings of one prompt, in tensors of one row.

    Chunks are encoded each for itself and laid one after the other. The pooled embeddings are the
    first chunk's.

    Args:
        length: chunks of the longest text of the run; a shorter one is filled with empty ones.
        known_negatives: by their texts; those that repeat are encoded once.
    """
    import torch

    names = embeddings_names(pipeline)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for k in range(length):
        chunk = {name: _chunk(chunks, k) for name, chunks in texts.items()}
        negative = (chunk["negative_prompt"], chunk["negative_prompt_2"])
        arguments: dict[str, Any] = {name: _as_list(text) for name, text in chunk.items()}
        if not has_two_encoders(pipeline):
            del arguments["prompt_2"], arguments["negative_prompt_2"]
        embeds = pipeline.encode_prompt(
            **arguments,
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            clip_skip=clip_skip,
            **known_negatives.get(negative, {}),
        )
        for name, tensor in zip(names, embeds, strict=True):
            parts[name].append(tensor)
        known_negatives[negative] = {
            name: parts[name][-1] for name in names if name.startswith("negative")
        }
    return {
        name: tensors[0] if "pooled" in name else torch.cat(tensors, 1)
        for name, tensors in parts.items()
    }


def _concatenate(groups: "Sequence[dict[str, torch.Tensor]]") -> "dict[str, torch.Tensor]":
    import torch

    return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}


def _finished_groups(progress: Progress | None) -> "list[dict[str, torch.Tensor]]":
    """What an earlier run kept, each group under the index of its first prompt."""
    groups: list[dict[str, torch.Tensor]] = []
    done = 0
    while progress is not None and (group := progress.read_group(done)) is not None:
        groups.append(group)
        done += len(group["prompt_embeds"])
    return groups


def _chunks_of(prompt: PromptSettings, pipeline: Any, config: ResolvedPrompts) -> Chunks:
    """Each text of a prompt in the chunks that are encoded; None stays none."""
    texts = {name: getattr(prompt, name) for name in TEXTS}
    if config.long_prompts == "cut":
        return {name: None if text is None else [text] for name, text in texts.items()}
    counts = token_counts(pipeline)
    return {
        name: None if text is None else split_at_words(text, counts, room_of(pipeline))
        for name, text in texts.items()
    }


def _chunk(chunks: list[str] | None, k: int) -> str | None:
    if chunks is None:
        return None
    return chunks[k] if k < len(chunks) else ""


def _as_list(text: str | None) -> list[str] | None:
    """diffusers takes "" for none, but [""] for what it is."""
    return None if text is None else [text]


def room_of(pipeline: Any) -> int:
    """The tokens of one chunk between its start and its end token: 75."""
    return int(pipeline.tokenizer.model_max_length) - 2


def token_counts(pipeline: Any) -> Callable[[str], int]:
    """A function that counts a text's tokens, those of textual inversions included."""

    def count(text: str) -> int:
        text = pipeline.maybe_convert_prompt(text, pipeline.tokenizer)
        return len(pipeline.tokenizer(text, truncation=False, verbose=False).input_ids) - 2

    return count


def split_at_words(text: str, count: Callable[[str], int], room: int) -> list[str]:
    """Split a text between words into as few pieces, from the left, as hold `room` tokens each.

    A single word that is longer is a piece of its own.
    """
    pieces: list[str] = []
    for word in text.split():
        longer = f"{pieces[-1]} {word}" if pieces else word
        if pieces and count(longer) <= room:
            pieces[-1] = longer
        else:
            pieces.append(word)
    return pieces or [text]


def cut_prompts(pipeline: Any, config: ResolvedPrompts) -> list[str]:
    """Say which words of a prompt are beyond the tokenizer's 77 tokens and so not seen."""
    if config.prompt_weighting is not None:
        return []
    tokenizer, room = pipeline.tokenizer, room_of(pipeline)
    texts: dict[str, str] = {}
    for prompt in config.prompts:
        for name, chunks in _chunks_of(prompt, pipeline, config).items():
            kind = "negative prompt" if "negative" in name else "prompt"
            texts |= dict.fromkeys(chunks or (), kind)
    lines = []
    for text, kind in texts.items():
        converted = pipeline.maybe_convert_prompt(text, tokenizer)
        ids = tokenizer(converted, truncation=False, verbose=False).input_ids[1:-1]
        if len(ids) > room:
            cut = tokenizer.decode(ids[room:])
            mend = " (--long_prompts chunk reads all)" if config.long_prompts == "cut" else ""
            lines.append(
                f"the {kind} {text[:30]!r}… has {len(ids)} tokens, over the {room} that the text "
                f"encoder reads; cut off: {cut!r}{mend}"
            )
    return lines


def _encode_with_compel(pipeline: Any, config: ResolvedPrompts) -> "dict[str, torch.Tensor]":
    """All prompts in compel's syntax, its chunks filled up to one length.

    Raises:
        BadSettingError: a prompt that compel cannot read, or longer than `long_prompts` lets it be.
    """
    import torch
    from compel import CompelForSD, CompelForSDXL, DiffusersTextualInversionManager

    compel_class = CompelForSDXL if has_two_encoders(pipeline) else CompelForSD
    compel = compel_class(
        pipeline, textual_inversion_manager=DiffusersTextualInversionManager(pipeline)
    )
    negatives = [prompt.negative_prompt for prompt in config.prompts]
    arguments: dict[str, list[str]] = {"negative_prompt": [text or "" for text in negatives]}
    if has_two_encoders(pipeline):
        arguments |= {
            "style_prompt": _second(config.prompts, "prompt"),
            "negative_style_prompt": _second(config.prompts, "negative_prompt"),
        }
    try:
        found = compel([prompt.prompt for prompt in config.prompts], **arguments)
    except Exception as error:
        raise BadSettingError(
            f"--prompt_weighting compel: compel cannot read the prompts ({type(error).__name__}: "
            f"{in_one_line(error)}): see its syntax, or leave the flag out"
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
