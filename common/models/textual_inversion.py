"""Textual inversions: words that files give embeddings for, one vector or several for each.

Each vector becomes a token of its own in the tokenizer, under a name that nobody writes. Before a
text is encoded, each word that was taught is replaced by the tokens of its vectors.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError
from common.messages import say, warn
from common.models.checkpoint import hash_large_file
from common.models.find import find_weights_file
from common.models.model_settings import TokenFile
from common.models.tensor_files import read_header, read_tensors

if TYPE_CHECKING:
    import torch

    Vectors = dict[str, torch.Tensor]  # text encoder → its vectors [K, D]

# Names of tensors that tell which text encoder they are for, and none that do.
_FIRST = ("clip_l", "text_encoders_0", "text_encoder", "clip_h")
_SECOND = ("clip_g", "text_encoders_1", "text_encoder_2")
_ANY = ("emb_params", "*", "string_to_param", "string_to_param.*", "embedding", "vectors")
_ENCODERS = {
    **dict.fromkeys(_FIRST, "text_encoder"),
    **dict.fromkeys(_SECOND, "text_encoder_2"),
}
# Widths of the families that share this layout, for the refusal.
_FAMILIES = {768: "SD 1.x or SDXL's first encoder", 1024: "SD 2.x", 1280: "SDXL's second encoder"}


def embedding_settings(embeddings: Sequence[TokenFile]) -> list[dict[str, str]]:
    """What of textual inversions determines embeddings: word and content."""
    return [
        {"token": word_of(embedding), "sha256": hash_large_file(find_embedding(embedding))}
        for embedding in embeddings
    ]


def find_embedding(embedding: TokenFile) -> Path:
    """The file of a textual inversion. Raises `BadInputFileError` where there is none."""
    return find_weights_file(embedding.file, "--embedding", "FILE or FILE:TOKEN")


def word_of(embedding: TokenFile) -> str:
    """What stands for a textual inversion in prompts.

    The token that is given, or else the one in its file (diffusers' training scripts name the
    tensor by it), or else the file's name.
    """
    if embedding.token is not None:
        return embedding.token
    path = find_embedding(embedding)
    return _word_inside(read_header(path, f"--embedding {path}").tensors) or path.stem


def teach(pipeline: Any, embeddings: Sequence[TokenFile]) -> None:
    """Teach a text pipeline the words of textual inversions.

    Raises:
        BadInputFileError: a file is for another family, or holds no vectors.
    """
    words: dict[str, Vectors] = {}
    spelled: dict[str, str] = {}
    for embedding in embeddings:
        word, path = word_of(embedding), find_embedding(embedding)
        if embedding.token is None and word != path.stem:
            say(f"  {path.name}: its word in prompts is {word!r}, as the file says")
        found = _read_vectors(pipeline, path)
        known = words.setdefault(word.lower(), {})
        if known.keys() & found.keys():
            raise BadInputFileError(
                f"--embedding {path}: {word!r} is given more than once; give one of them another "
                "word (FILE:TOKEN)"
            )
        known |= found
        spelled.setdefault(word.lower(), word)
    for key, vectors in words.items():
        if missing := _encoders(pipeline).keys() - vectors.keys():
            raise BadInputFileError(
                f"--embedding: {spelled[key]!r} has vectors for {' and '.join(vectors)} alone; "
                f"this checkpoint reads prompts by {min(missing)} too: give the file for that "
                "under the same word (FILE:TOKEN), or an embedding of this family"
            )
    if words:
        taught = _Words()
        for k, (key, vectors) in enumerate(sorted(words.items())):
            taught.add(pipeline, k, spelled[key], vectors)
        pipeline.maybe_convert_prompt = taught.convert


def unused_words(pipeline: Any, texts: Iterable[str]) -> list[str]:
    """A sentence for each word that was taught and that no text has."""
    taught = _taught(pipeline)
    if taught is None:
        return []
    used = {found[0].lower() for text in texts for found in taught.pattern.finditer(text)}
    return [
        f"--embedding {word!r} has no effect: no prompt has this word"
        for word in taught.words
        if word.lower() not in used
    ]


def with_weighted_vectors(pipeline: Any, texts: list[str], tokenizer: Any) -> list[str]:
    """Texts in compel's syntax with the tokens of vectors in the place of words.

    A weight that follows a word is for all of its vectors.
    """
    taught = _taught(pipeline)
    return texts if taught is None else taught.convert(texts, tokenizer, weighted=True)


def vectors_of_words(pipeline: Any, tokenizer: Any) -> dict[int, int]:
    """The token id of each word's first vector, with the number of its vectors, which follow."""
    taught = _taught(pipeline)
    if taught is None:
        return {}
    return {
        int(tokenizer.convert_tokens_to_ids(names[0])): len(names)
        for names in taught.tokens[id(tokenizer)].values()
    }


@dataclass
class _Words:
    """The words that were taught to a pipeline: the tokens of each, by tokenizer."""

    words: list[str] = field(default_factory=list)
    tokens: dict[int, dict[str, list[str]]] = field(default_factory=dict)
    pattern: re.Pattern[str] = re.compile("(?!)")

    def add(self, pipeline: Any, k: int, word: str, vectors: "Vectors") -> None:
        """Teach one word, as number `k`."""
        slug = re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_")
        for name, (tokenizer, text_encoder) in _encoders(pipeline).items():
            room = int(tokenizer.model_max_length) - 2
            if len(vectors[name]) > room:
                raise BadInputFileError(
                    f"--embedding: {word!r} has {len(vectors[name])} vectors, over the {room} "
                    "tokens that a text encoder reads at once: choose another embedding"
                )
            names = [f"<{slug}_{k}_{n}>" for n in range(len(vectors[name]))]
            _extend(tokenizer, text_encoder, names, vectors[name])
            self.tokens.setdefault(id(tokenizer), {})[word.lower()] = names
        self.words.append(word)
        # The longer first: another may begin as it does.
        longest = sorted(self.words, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(word_pattern, longest)), re.IGNORECASE)

    def convert(self, prompt: Any, tokenizer: Any, weighted: bool = False) -> Any:
        """As diffusers' `maybe_convert_prompt`: for each word the tokens of its vectors."""
        if isinstance(prompt, list):
            return [self.convert(text, tokenizer, weighted) for text in prompt]
        tokens = self.tokens[id(tokenizer)]

        def replacement(found: re.Match[str]) -> str:
            text = " ".join(tokens[found[0].lower()])
            follows = prompt[found.end() : found.end() + 2]
            if weighted and re.match(r"[+-]|\.\w", follows):
                return f"({text})"
            return text

        return self.pattern.sub(replacement, prompt)


def _taught(pipeline: Any) -> _Words | None:
    owner = getattr(pipeline.maybe_convert_prompt, "__self__", None)
    return owner if isinstance(owner, _Words) else None


def word_pattern(word: str) -> str:
    """A pattern for a word where it stands alone, not within a longer one (`art-word`, `words`)."""
    before = r"(?<!\w)(?<!\w-)" if re.match(r"\w", word) else ""
    after = r"(?!\w)(?!-\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"


def _extend(
    tokenizer: Any, text_encoder: Any, names: Sequence[str], vectors: "torch.Tensor"
) -> None:
    """Add tokens to a tokenizer, and their vectors [K, D] to the embeddings of its encoder."""
    tokenizer.add_tokens(list(names))
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(list(names))
    embeddings = text_encoder.get_input_embeddings()
    # A copy: where the checkpoint had rows to spare, others may have the same memory.
    weight = embeddings.weight.detach().clone()
    weight[ids] = vectors.to(weight.dtype)
    embeddings.weight = type(embeddings.weight)(weight, requires_grad=False)
    # Configs of before transformers' PR 24773 say 2, for which the pooled embedding is taken at
    # the highest id: with tokens added that is no longer the end token.
    for module in text_encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id


def _encoders(pipeline: Any) -> dict[str, tuple[Any, Any]]:
    """A pipeline's tokenizers and text encoders, by the encoders' names."""
    encoders = {}
    if pipeline.text_encoder is not None:
        encoders["text_encoder"] = (pipeline.tokenizer, pipeline.text_encoder)
    if getattr(pipeline, "text_encoder_2", None) is not None:
        encoders["text_encoder_2"] = (pipeline.tokenizer_2, pipeline.text_encoder_2)
    return encoders


def _word_inside(names: Collection[str]) -> str | None:
    """The word that a file's only tensor is named by, if it is."""
    own = [name for name in names if name not in _ENCODERS and name not in _ANY]
    return own[0] if len(own) == len(names) == 1 else None


def _read_vectors(pipeline: Any, path: Path) -> "Vectors":
    """The vectors of a file for each text encoder that it has some for.

    Layouts: one tensor under any name (diffusers' and the web UIs'), for the encoder of its width;
    or one for each encoder under their names (`clip_l` and `clip_g`, `text_encoders_0` and `_1`).
    """
    said = f"--embedding {path}"
    tensors = read_tensors(path, said)
    encoders = _encoders(pipeline)
    widths = {
        name: int(encoder.get_input_embeddings().weight.shape[1])
        for name, (_, encoder) in encoders.items()
    }
    named = {name: tensors[name] for name in tensors if name in _ENCODERS}
    others = {name: tensor for name, tensor in tensors.items() if name not in named}
    single = named or {
        name: tensor for name, tensor in others.items() if name in _ANY or len(others) == 1
    }
    if unused := sorted(tensors.keys() - single.keys()):
        warn(f"{said}: not used: {', '.join(unused)}")
    if not single:
        raise BadInputFileError(
            f"{said} holds no textual inversion (one tensor, or clip_l and clip_g): choose "
            "another file"
        )
    found: Vectors = {}
    for name, tensor in single.items():
        vectors = _checked(tensor, name, said)
        width = vectors.shape[1]
        encoder = _ENCODERS.get(name) or next((e for e in widths if widths[e] == width), "")
        if encoder in found:
            raise BadInputFileError(f"{said} has {name} beside another for {encoder}: remove one")
        if widths.get(encoder) != width:
            family = _FAMILIES.get(width)
            raise BadInputFileError(
                f"{said}: {name} has vectors of {width} numbers"
                f"{f' ({family})' if family else ''}, but this checkpoint's "
                f"{_say_widths(widths)}: choose an embedding of this family"
            )
        found[encoder] = vectors
    return found


def _checked(tensor: "torch.Tensor", name: str, said: str) -> "torch.Tensor":
    """Vectors [K, D] in float32."""
    if tensor.ndim not in (1, 2) or not tensor.is_floating_point() or not tensor.numel():
        raise BadInputFileError(
            f"{said}: {name} is {str(tensor.dtype).removeprefix('torch.')} "
            f"{list(tensor.shape)}, no vectors: choose another file"
        )
    vectors = tensor.float().reshape(-1, tensor.shape[-1])
    if not vectors.isfinite().all():
        raise BadInputFileError(f"{said}: {name} holds numbers that are not finite: get it again")
    return vectors


def _say_widths(widths: Mapping[str, int]) -> str:
    return " and ".join(f"{name} takes {width}" for name, width in widths.items())
