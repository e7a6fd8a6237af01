"""Prompts to embeddings, by diffusers' own `encode_prompt` or by compel."""

import re
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, Protocol

from common.conditions.a1111_syntax import calls_of_loras, looks_weighted
from common.conditions.compel_prompts import encode_with_compel
from common.conditions.prompt_settings import PromptSettings, ResolvedPrompts
from common.conditions.weighted_prompts import WeightedTexts
from common.errors import shorten
from common.files.kept_progress import Progress
from common.files.rows import Rows
from common.files.tensor_rows import TOKENS
from common.messages import say
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


class TakesRows(Protocol):
    """Where embeddings go as they are made, as `TensorWriter` takes them."""

    def put(self, rows: "Tensors") -> None: ...


def encode_prompts(pipeline: Any, config: ResolvedPrompts) -> "Tensors":
    """All prompts of a run, held in memory; as `encode_into` gives them."""
    made = InMemory()
    encode_into(made, pipeline, config)
    return made.take()


def encode_into(
    made: TakesRows,
    pipeline: Any,
    config: ResolvedPrompts,
    rows: Rows | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Encode all prompts of a run. Returns how many were taken from an earlier file.

    `made` is given prompt_embeds, negative_prompt_embeds [N, L, D], and for SDXL
    pooled_prompt_embeds, negative_pooled_prompt_embeds [N, E] of N prompts after N prompts, all in
    the text encoders' dtype. L is 77, or a multiple of it where prompts are encoded in chunks.

    Args:
        rows: those that an earlier file has are taken from there.
        progress: where prompts are kept until all are done, unless compel encodes them at once.
        stop: asked after each prompt.

    Raises:
        StoppedError: a stop was asked for; what is done is kept.
    """
    import torch

    with torch.no_grad():
        if config.prompt_weighting == "compel":
            return _encode_at_once(made, pipeline, config, rows)
        kind = WeightedTexts if config.prompt_weighting == "a1111" else PlainTexts
        return _encode_one_by_one(made, kind(pipeline, config), config, rows, (progress, stop))


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


def _encode_at_once(
    made: TakesRows, pipeline: Any, config: ResolvedPrompts, rows: Rows | None
) -> int:
    """All prompts that are to be made, by compel. Returns how many are not."""
    places = _places(rows, None if config.long_prompts == "chunk" else TOKENS)
    missing = tuple(p for row, p in enumerate(config.prompts) if row not in places)
    encoded: Tensors = {}
    if missing:
        own = config.model_copy(update={"prompts": missing})
        encoded = encode_with_compel(pipeline, own)
    at = 0
    for row in range(len(config.prompts)):
        if rows is not None and row in places:
            made.put(rows.read([row]))
            continue
        made.put({name: tensor[at : at + 1] for name, tensor in encoded.items()})
        at += 1
    return len(config.prompts) - len(missing)


def _places(rows: Rows | None, length: int | None) -> Container[int]:
    """The rows that an earlier file has, if its embeddings are as long as the run's longest.

    Args:
        length: tokens; None where that is not known before.
    """
    if rows is None or rows.earlier is None or not rows.places:
        return ()
    if rows.earlier.tensors["prompt_embeds"].shape[1] == length:
        return rows.places
    say("  all are encoded anew: they are as long as the longest, which may be another one now")
    return ()


def _encode_one_by_one(
    made: TakesRows,
    reader: PlainTexts | WeightedTexts,
    config: ResolvedPrompts,
    rows: Rows | None,
    kept_by: tuple[Progress | None, StopRequest | None],
) -> int:
    """One prompt at a time, so that its embeddings are the same bits in any company.

    Returns how many were taken from the earlier file.
    """
    progress, stop = kept_by
    chunked = [reader.chunks_of(prompt) for prompt in config.prompts]
    length = max(len(chunks) for texts in chunked for chunks in texts.values() if chunks)
    places = _places(rows, length * TOKENS)
    done = kept = _put_finished_groups(made, progress)
    if kept:
        say(f"  goes on after prompt {kept} of {len(chunked)}")
    unkept, taken = InMemory(), 0
    known_negatives: dict[Any, Tensors] = {}
    with progress_bar(len(chunked), "encode", "prompt") as bar:
        bar.skip(kept)
        for row in range(kept, len(chunked)):
            bar.note(config.prompts[row].prompt)
            if rows is not None and row in places:
                encoded = rows.read([row])
                taken += 1
            else:
                encoded = _encode_chunks(reader, chunked[row], length, known_negatives)
            made.put(encoded)
            done += 1
            bar.update()
            if progress is None:
                continue
            unkept.put(encoded)
            # Once: a stop that comes from here on waits for the next prompt.
            number = None if stop is None else stop.number
            if number is not None or progress.is_due() or unkept.bytes > MOST_UNKEPT_BYTES:
                progress.save_group(kept, unkept.take())
                kept = done
            if number is not None:
                said = f"after {kept} of {len(chunked)} prompts, which are kept"
                raise StoppedError(number, f"{said}: the same command goes on from there")
    return taken


class InMemory:
    """Rows that are held in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[torch.Tensor]] = {}
        self.bytes = 0

    def put(self, rows: "Tensors") -> None:
        for name, tensor in rows.items():
            self.tensors.setdefault(name, []).append(tensor)
            self.bytes += tensor.nbytes

    def take(self) -> "Tensors":
        """All of them, which are let go."""
        import torch

        taken = {name: torch.cat(tensors) for name, tensors in self.tensors.items()}
        self.tensors, self.bytes = {}, 0
        return taken


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


def _put_finished_groups(made: TakesRows, progress: Progress | None) -> int:
    """Put what an earlier run kept, each group under the index of its first prompt; how many."""
    done = 0
    while progress is not None and (group := progress.read_group(done)) is not None:
        made.put(group)
        done += len(group["prompt_embeds"])
    return done


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
