"""Prompts with weights in AUTOMATIC1111's syntax, encoded as its web UI does.

Texts are cut into chunks of 75 tokens, after a comma where one stands among the last 20; each chunk
is encoded for itself, its hidden states multiplied by their tokens' weights and scaled so that
their mean stays. The pooled embedding is the first chunk's, without weights.

Source: the public description of the web UI's features, and of its "Emphasis mode: Original".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.conditions.a1111_syntax import Weighted, parse
from common.conditions.prompt_settings import PromptSettings, ResolvedPrompts
from common.errors import BadSettingError
from common.models.text_pipeline import has_two_encoders, room_of
from common.models.textual_inversion import vectors_of_words

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

LOOK_BACK = 20  # tokens, for a comma to end a chunk after


@dataclass
class TokenChunk:
    """The tokens of a chunk and their weights."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def cut_off(self, place: int) -> "TokenChunk":
        """What stands from a place on, which is taken away."""
        rest = TokenChunk(self.ids[place:], self.weights[place:])
        del self.ids[place:], self.weights[place:]
        return rest


class WeightedTexts:
    """Prompts with weights in AUTOMATIC1111's syntax."""

    def __init__(self, pipeline: Any, config: ResolvedPrompts) -> None:
        self.pipeline, self.config = pipeline, config
        self.tokenizers = [pipeline.tokenizer]
        self.encoders = [pipeline.text_encoder]
        if has_two_encoders(pipeline):
            self.tokenizers.append(pipeline.tokenizer_2)
            self.encoders.append(pipeline.text_encoder_2)

    def chunks_of(self, prompt: PromptSettings) -> dict[str, list[Any] | None]:
        """As `PlainTexts.chunks_of`, for each text encoder the one that it reads, in tokens."""
        chunks: dict[str, list[Any] | None] = {}
        for name in ("prompt", "negative_prompt"):
            first, second = getattr(prompt, name), getattr(prompt, f"{name}_2")
            texts = [first, first if second is None else second]
            for text, tokenizer, key in zip(
                texts, self.tokenizers, (name, f"{name}_2"), strict=False
            ):
                found = None if first is None else token_chunks(self.pipeline, text, tokenizer)
                if found is not None and len(found) > 1 and self.config.long_prompts == "cut":
                    raise BadSettingError(
                        f"the {name} {text[:30]!r}… takes {len(found)} chunks of "
                        f"{room_of(self.pipeline)} tokens: use --long_prompts chunk, or shorten it"
                    )
                chunks[key] = found
        return chunks

    def encode(self, chunk: "dict[str, Any]", known: "Tensors") -> "Tensors":
        """As `PlainTexts.encode`."""
        import torch

        found = dict(known)
        two = has_two_encoders(self.pipeline)
        for name, sign in (("prompt", ""), ("negative_prompt", "negative_")):
            if f"{sign}prompt_embeds" in found:
                continue
            none = chunk[name] is None
            # diffusers leaves layers out for the prompt alone.
            skip = 0 if sign else self.config.clip_skip or 0
            states, pooled = [], None
            for tokenizer, encoder, key in (
                zip(self.tokenizers, self.encoders, (name, f"{name}_2"), strict=True)
                if two
                else [(self.tokenizers[0], self.encoders[0], name)]
            ):
                tokens = TokenChunk() if none else chunk[key]
                each, pooled = encode_chunk(
                    encoder, tokenizer, tokens, -(skip + (2 if two else 1)), normed=not two
                )
                states.append(each)
            assert pooled is not None
            made = {f"{sign}prompt_embeds": torch.cat(states, -1)}
            if two:
                made[f"{sign}pooled_prompt_embeds"] = pooled
            if none and two and self.pipeline.config.force_zeros_for_empty_prompt:
                made = {key: torch.zeros_like(tensor) for key, tensor in made.items()}
            found |= made
        return found

    def empty(self, name: str) -> Any:
        """As `PlainTexts.empty`."""
        return TokenChunk()


def token_chunks(pipeline: Any, text: str, tokenizer: Any) -> list[TokenChunk]:
    """A prompt's tokens in chunks; at least one.

    Args:
        tokenizer: of the pipeline, one for each text encoder.
    """
    room = int(tokenizer.model_max_length) - 2
    chunks: list[TokenChunk] = []
    for part in parse(text):
        chunks += _cut(_token_groups(pipeline, part, tokenizer), room, _comma(tokenizer))
    return chunks


def encode_chunk(
    encoder: Any, tokenizer: Any, chunk: TokenChunk, layer: int, normed: bool
) -> "tuple[torch.Tensor, torch.Tensor]":
    """A chunk's hidden states [1, 77, D] with its weights, and the encoder's own first output.

    Args:
        layer: whose hidden states, from the end: -1 the last one's.
        normed: whether the encoder's last norm follows.
    """
    import torch

    length = int(tokenizer.model_max_length)
    padding = length - 2 - len(chunk.ids)
    ids = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * padding
    weights = torch.tensor([1.0, *chunk.weights, 1.0, *[1.0] * padding])
    output = encoder(torch.tensor([ids]), output_hidden_states=True)
    states = output.hidden_states[layer]
    if normed:
        states = getattr(encoder, "text_model", encoder).final_layer_norm(states)
    if any(weight != 1 for weight in chunk.weights):
        mean = states.float().mean()
        weighted = states.float() * weights[None, :, None]
        states = (weighted * (mean / weighted.mean())).to(states.dtype)
    return states, output[0]


def _token_groups(
    pipeline: Any, texts: Sequence[Weighted], tokenizer: Any
) -> list[tuple[list[int], float]]:
    """The tokens of texts, each with its weight; the vectors of a word that was taught together."""
    together = vectors_of_words(pipeline, tokenizer)
    groups: list[tuple[list[int], float]] = []
    for each in texts:
        converted = pipeline.maybe_convert_prompt(each.text, tokenizer)
        ids = tokenizer(converted, add_special_tokens=False, verbose=False).input_ids
        at = 0
        while at < len(ids):
            count = together.get(ids[at], 1)
            groups.append((ids[at : at + count], each.weight))
            at += count
    return groups


def _cut(groups: Sequence[tuple[list[int], float]], room: int, comma: int) -> list[TokenChunk]:
    """Lay tokens into chunks with room for so many."""
    chunks = [TokenChunk()]
    after_comma: int | None = None  # place in the last chunk
    for ids, weight in groups:
        last = chunks[-1]
        if len(last.ids) + len(ids) > room:
            at_comma = after_comma is not None and len(last.ids) - after_comma < LOOK_BACK
            moves = at_comma and len(ids) == 1 and ids[0] != comma
            place = after_comma if moves and after_comma is not None else len(last.ids)
            chunks.append(last.cut_off(place))
            after_comma = None
        chunks[-1].add(ids, weight)
        if ids == [comma]:
            after_comma = len(chunks[-1].ids)
    return chunks


def _comma(tokenizer: Any) -> int:
    return int(tokenizer(",", add_special_tokens=False).input_ids[0])
