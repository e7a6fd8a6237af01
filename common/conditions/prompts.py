"""Prompts to embeddings, by diffusers' own `encode_prompt` or by compel."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common.conditions.a1111_syntax import calls_of_loras, looks_weighted
from common.conditions.compel_prompts import encode_with_compel
from common.conditions.prompt_settings import PromptSettings, ResolvedPrompts
from common.conditions.weighted_prompts import WeightedTexts
from common.errors import shorten
from common.files.kept_progress import Making
from common.files.made_rows import MadeRows
from common.files.rows import Rows
from common.files.tensor_rows import TOKENS
from common.messages import say
from common.models.model_settings import LoraFile
from common.models.text_pipeline import embeddings_names, first_tokenizer, has_two_encoders, room_of
from common.models.textual_inversion import unused_words
from common.progress import progress_bar
from common.stopping import StoppedError, StopRequest

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

_BREAK = re.compile(r"\s*(?<!\S)BREAK(?!\S)\s*")  # as the web UIs have it
# A tag and the comma or full stop after it, in Latin and East Asian writing.
_TAGS = re.compile(r"[^,.;、。，；]*[,.;、。，；]+|[^,.;、。，；]+")
# In memory beside what is written, until it is kept.
MOST_UNKEPT_BYTES = 1 << 28
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
Chunks = dict[str, list[Any] | None]  # text → its chunks, as they are read


UNKNOWN = Making(None, {})  # of embeddings neither seconds nor options are told


def encode_prompts(pipeline: Any, config: ResolvedPrompts) -> "Tensors":
    """All prompts of a run, held in memory; as `encode_into` gives them."""
    made = MadeRows.numbered(len(config.prompts))
    encode_into(made, lambda _: pipeline, config, length_of(pipeline, config))
    return {name: made.read(range(made.count), name) for name in embeddings_names(pipeline)}


def length_of(pipeline: Any, config: ResolvedPrompts) -> int | None:
    """How many tokens the embeddings of a run's prompts have, as many as the longest needs.

    None where compel says it when it encodes them.
    """
    if config.prompt_weighting == "compel":
        return TOKENS if config.long_prompts == "cut" else None
    reader = _reader(pipeline, config)
    chunked = map(reader.chunks_of, config.prompts)
    return TOKENS * max(len(chunks) for texts in chunked for chunks in texts.values() if chunks)


def rows_as_long(rows: Rows, length: int | None) -> Rows:
    """The rows to write; an earlier file's are not taken where they have another length.

    Args:
        length: of the run's embeddings, as `length_of` tells it.
    """
    if rows.earlier is None or not rows.places:
        return rows
    if rows.earlier.tensors["prompt_embeds"].shape[1] == length:
        return rows
    say("  all are encoded anew: they are as long as the longest, which may be another one now")
    return rows.without(rows.places)


def encode_into(
    made: MadeRows,
    pipeline_of: Callable[[tuple[LoraFile, ...]], Any],
    config: ResolvedPrompts,
    length: int | None,
    stop: StopRequest | None = None,
    loras: Sequence[tuple[LoraFile, ...]] = (),
) -> None:
    """Encode the prompts of a run that are missing.

    `made` is given prompt_embeds, negative_prompt_embeds [N, L, D], and for SDXL
    pooled_prompt_embeds, negative_pooled_prompt_embeds [N, E], all in the text encoders' dtype. L
    is 77, or a multiple of it where prompts are encoded in chunks. What is done is kept there until
    all are, unless compel encodes them at once.

    Args:
        pipeline_of: opens the text pipeline with some LoRAs, after which another one has served.
        length: L, as `length_of` tells it.
        stop: asked after each prompt.
        loras: of each prompt; none: of no prompt.

    Raises:
        StoppedError: a stop was asked for; what is done is kept.
    """
    import torch

    missing, of_loras = made.missing, dict[tuple[LoraFile, ...], list[int]]()
    if made.kept:
        say(f"  goes on after {made.kept} of {made.kept + len(missing)} prompts, which are kept")
    for row in missing:
        of_loras.setdefault(loras[row] if loras else (), []).append(row)
    bar = progress_bar(len(missing), "encode", "prompt")
    with torch.no_grad(), bar:
        for added, rows in of_loras.items():
            if config.prompt_weighting == "compel":
                own = config.model_copy(
                    update={"prompts": tuple(config.prompts[row] for row in rows)}
                )
                made.put(rows, encode_with_compel(pipeline_of(added), own), UNKNOWN, keep=False)
                bar.update(len(rows))
                continue
            assert length is not None
            reader = _reader(pipeline_of(added), config)
            _encode_one_by_one(made, rows, reader, length // TOKENS, stop, bar)
            del reader  # the next one's encoders may need its memory


def _reader(pipeline: Any, config: ResolvedPrompts) -> "PlainTexts | WeightedTexts":
    kind = WeightedTexts if config.prompt_weighting == "a1111" else PlainTexts
    return kind(pipeline, config)


class PlainTexts:
    """Prompts as they stand, by diffusers' own `encode_prompt`."""

    def __init__(self, pipeline: Any, config: ResolvedPrompts) -> None:
        self.pipeline, self.config = pipeline, config
        first = pipeline.text_encoder  # SDXL's refiner has none
        if config.clip_skip is not None and first and not hasattr(first, "text_model"):
            # diffusers 0.42 reads text_model.final_layer_norm, which transformers 5 has moved up.
            first.__dict__["text_model"] = first

    def chunks_of(self, prompt: PromptSettings) -> Chunks:
        """Each text of a prompt in the chunks that are encoded; None stays none."""
        return _chunks_of(prompt, self.pipeline, self.config)

    def encode(self, chunk: "dict[str, Any]", known: "Tensors") -> "Tensors":
        """The embeddings of one chunk of each text; those of the negative ones may be known."""
        import torch

        arguments: dict[str, Any] = {name: _as_list(text) for name, text in chunk.items()}
        if not has_two_encoders(self.pipeline):
            del arguments["prompt_2"], arguments["negative_prompt_2"]
        embeds = self.pipeline.encode_prompt(
            **arguments,
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            clip_skip=self.config.clip_skip,
            **known,
        )
        return dict(zip(embeddings_names(self.pipeline), embeds, strict=True))

    def empty(self, name: str) -> Any:
        """What a shorter text is filled with."""
        return ""


def _encode_one_by_one(
    made: MadeRows,
    rows: Sequence[int],
    reader: PlainTexts | WeightedTexts,
    length: int,
    stop: StopRequest | None,
    bar: Any,
) -> None:
    """One prompt at a time, so that its embeddings are the same bits in any company."""
    known_negatives: dict[Any, Tensors] = {}
    for row in rows:
        prompt = reader.config.prompts[row]
        bar.note(prompt.prompt)
        encoded = _encode_chunks(reader, reader.chunks_of(prompt), length, known_negatives)
        made.put([row], encoded, UNKNOWN, keep=False)
        bar.update()
        if made.progress is None:
            continue
        # Once: a stop that comes from here on waits for the next prompt.
        number = None if stop is None else stop.number
        if number is not None or made.progress.is_due() or made.held_bytes > MOST_UNKEPT_BYTES:
            made.keep_held(UNKNOWN)
        if number is not None:
            said = f"after {made.kept} of {made.kept + len(made.missing)} prompts, which are kept"
            raise StoppedError(number, f"{said}: the same command goes on from there")


def _encode_chunks(
    reader: PlainTexts | WeightedTexts,
    texts: Chunks,
    length: int,
    known_negatives: "dict[Any, Tensors]",
) -> "Tensors":
    """The embeddings of one prompt, in tensors of one row.

    Chunks are encoded each for itself and laid one after the other. The pooled embeddings are the
    first chunk's.

    Args:
        length: chunks of the longest text of the run; a shorter one is filled with empty ones.
        known_negatives: by their texts; those that repeat are encoded once.
    """
    import torch

    parts: dict[str, list[torch.Tensor]] = {}
    for k in range(length):
        chunk = {name: _chunk(reader, name, chunks, k) for name, chunks in texts.items()}
        negative = repr([chunk.get(name) for name in ("negative_prompt", "negative_prompt_2")])
        found = reader.encode(chunk, known_negatives.get(negative, {}))
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
        known_negatives[negative] = {
            name: tensor for name, tensor in found.items() if name.startswith("negative")
        }
    return {
        name: tensors[0] if "pooled" in name else torch.cat(tensors, 1)
        for name, tensors in parts.items()
    }


def _chunks_of(prompt: PromptSettings, pipeline: Any, config: ResolvedPrompts) -> Chunks:
    """Each text of a prompt in the chunks that are encoded; None stays none."""
    texts = {name: getattr(prompt, name) for name in TEXTS}
    if config.long_prompts == "cut":
        return {name: None if text is None else [text] for name, text in texts.items()}
    counts = token_counts(pipeline)
    return {
        name: None if text is None else split_text(text, counts, room_of(pipeline))
        for name, text in texts.items()
    }


def _chunk(reader: PlainTexts | WeightedTexts, name: str, chunks: list[Any] | None, k: int) -> Any:
    if chunks is None:
        return None
    return chunks[k] if k < len(chunks) else reader.empty(name)


def _as_list(text: str | None) -> list[str] | None:
    """diffusers takes "" for none, but [""] for what it is."""
    return None if text is None else [text]


def token_counts(pipeline: Any) -> Callable[[str], int]:
    """A function that counts a text's tokens, those of textual inversions included."""

    def count(text: str) -> int:
        tokenizer = first_tokenizer(pipeline)
        text = pipeline.maybe_convert_prompt(text, tokenizer)
        return len(tokenizer(text, truncation=False, verbose=False).input_ids) - 2

    return count


def split_text(text: str, count: Callable[[str], int], room: int) -> list[str]:
    """Split a text into as few pieces, from the left, as hold `room` tokens each.

    BREAK, a word of its own, begins a piece. A piece ends between words; a word that is longer
    (tags without spaces, Chinese or Japanese) after a comma or full stop in it, or else between
    two characters.
    """
    pieces: list[str] = []
    for part in _BREAK.split(text):
        own: list[str] = []
        for word in part.split():
            longer = f"{own[-1]} {word}" if own else word
            if own and count(longer) <= room:
                own[-1] = longer
            elif count(word) <= room:
                own.append(word)
            else:
                own += _split_word(word, count, room)
        pieces += own or [part]
    return pieces


def _split_word(word: str, count: Callable[[str], int], room: int) -> list[str]:
    pieces: list[str] = []
    for tag in _TAGS.findall(word):
        if pieces and count(pieces[-1] + tag) <= room:
            pieces[-1] += tag
        elif count(tag) <= room:
            pieces.append(tag)
        else:
            pieces.append("")
            for character in tag:
                if count(pieces[-1] + character) > room:
                    pieces.append("")
                pieces[-1] += character
    return [piece for piece in pieces if piece]


def unread(pipeline: Any, config: ResolvedPrompts) -> list[str]:
    """Say what of prompts and textual inversions has no effect on the embeddings."""
    texts = (getattr(prompt, name) for prompt in config.prompts for name in TEXTS)
    return [
        *unused_words(pipeline, (text for text in texts if text is not None)),
        *_unread_syntax(config),
        *_cut_prompts(pipeline, config),
    ]


def _unread_syntax(config: ResolvedPrompts) -> list[str]:
    """Say what looks like the web UIs' syntax and is read as plain text."""
    texts = {getattr(prompt, name): name for prompt in config.prompts for name in TEXTS}
    weighting, lines = config.prompt_weighting, []
    for text, name in texts.items():
        said = f"the {name} {shorten(text or '', 30)!r}"
        for call in calls_of_loras(text or ""):
            lines.append(f"{said}: {call} is read as text: give the file by --lora FILE:SCALE")
        if weighting == "a1111" or text is None:
            continue
        if looks_weighted(text, brackets_are_read=weighting == "compel"):
            lines.append(
                f"{said} looks like AUTOMATIC1111's weights, which are read as text: "
                "--prompt_weighting a1111 reads them"
            )
        if _BREAK.search(text) and (weighting == "compel" or config.long_prompts == "cut"):
            lines.append(
                f"{said}: BREAK is read as text: --long_prompts chunk, or --prompt_weighting a1111 "
                "with it, begins a chunk there"
            )
    return lines


def _cut_prompts(pipeline: Any, config: ResolvedPrompts) -> list[str]:
    """Say which words of a prompt are beyond the tokenizer's 77 tokens and so not seen."""
    if config.prompt_weighting is not None:
        return []
    tokenizer, room = first_tokenizer(pipeline), room_of(pipeline)
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
