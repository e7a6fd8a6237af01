"""Prompts to embeddings, by diffusers' own `encode_prompt` or by compel."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.conditions.a1111_syntax import calls_of_loras, looks_weighted
from common.conditions.compel_prompts import encode_with_compel
from common.conditions.prompt_settings import PromptSettings, ResolvedPrompts
from common.conditions.weighted_prompts import WeightedTexts
from common.errors import shorten
from common.files.kept_progress import UNTOLD
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


@dataclass(frozen=True)
class ReadTexts:
    """The texts of a run's prompts as they are encoded."""

    chunks: list[Chunks]  # of each prompt; none where compel reads them
    length: int | None  # tokens of the embeddings; None where compel says it when it encodes them


def read_texts(pipeline: Any, config: ResolvedPrompts) -> ReadTexts:
    """Read them all: embeddings are as long as the longest needs."""
    if config.prompt_weighting == "compel":
        return ReadTexts([], TOKENS if config.long_prompts == "cut" else None)
    chunked = [*map(_reader(pipeline, config).chunks_of, config.prompts)]
    most = max(len(chunks) for texts in chunked for chunks in texts.values() if chunks)
    return ReadTexts(chunked, TOKENS * most)


def encode_prompts(pipeline: Any, config: ResolvedPrompts) -> "Tensors":
    """All prompts of a run, held in memory; as `encode_into` gives them."""
    made = MadeRows.numbered(len(config.prompts))
    encode_into(made, lambda _: pipeline, config, read_texts(pipeline, config))
    return {name: made.read(range(made.count), name) for name in embeddings_names(pipeline)}


def rows_as_long(rows: Rows, length: int | None) -> Rows:
    """The rows to write; an earlier file's are not taken where they have another length.

    Args:
        length: of the run's embeddings, as `read_texts` tells it.
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
    texts: ReadTexts,
    stop: StopRequest | None = None,
    loras: Sequence[tuple[LoraFile, ...]] = (),
) -> None:
    """Encode the prompts of a run that are missing.

    `made` is given prompt_embeds, negative_prompt_embeds [N, L, D], and for SDXL
    pooled_prompt_embeds, negative_pooled_prompt_embeds [N, E], all in the text encoders' dtype. L
    is 77, or a multiple of it where prompts are encoded in chunks.

    Args:
        pipeline_of: opens the text pipeline with some LoRAs, after which another one has served.
        stop: asked after each prompt; of compel, which encodes many at once, after these.
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
                prompts = tuple(config.prompts[row] for row in rows)
                own = config.model_copy(update={"prompts": prompts})
                made.put(rows, encode_with_compel(pipeline_of(added), own), UNTOLD, keep=False)
                bar.update(len(rows))
                _keep_if_due(made, stop)
                continue
            reader = _reader(pipeline_of(added), config)
            known_negatives: dict[Any, Tensors] = {}
            for row in rows:
                # One at a time, so that its embeddings are the same bits in any company.
                bar.note(config.prompts[row].prompt)
                encoded = _encode_chunks(reader, texts, row, known_negatives)
                made.put([row], encoded, UNTOLD, keep=False)
                bar.update()
                _keep_if_due(made, stop)
            del reader  # the next one's encoders may need its memory


def _keep_if_due(made: MadeRows, stop: StopRequest | None) -> None:
    """Keep what was encoded, where it is time to, and stop where that is asked for."""
    if made.progress is None:
        return
    # Once: a stop that comes from here on waits for the next prompt.
    number = None if stop is None else stop.number
    if number is not None or made.progress.is_due() or made.held_bytes > MOST_UNKEPT_BYTES:
        made.keep_held(UNTOLD)
    if number is not None:
        said = f"after {made.kept} of {made.kept + len(made.missing)} prompts, which are kept"
        raise StoppedError(number, f"{said}: the same command goes on from there")


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


def _encode_chunks(
    reader: PlainTexts | WeightedTexts,
    read: ReadTexts,
    row: int,
    known_negatives: "dict[Any, Tensors]",
) -> "Tensors":
    """The embeddings of one prompt, in tensors of one row.

    Chunks are encoded each for itself and laid one after the other. The pooled embeddings are the
    first chunk's.

    Args:
        read: a text shorter than the longest is filled with empty chunks.
        row: the prompt's.
        known_negatives: by their texts; those that repeat are encoded once.
    """
    import torch

    parts: dict[str, list[torch.Tensor]] = {}
    for k in range((read.length or TOKENS) // TOKENS):
        chunk = {name: _chunk(reader, name, own, k) for name, own in read.chunks[row].items()}
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
