"""Textual inversions: words that a file gives embeddings for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import BadInputFileError, in_one_line
from common.models.checkpoint import hash_large_file
from common.models.find import find_weights_file
from common.models.model_settings import TokenFile


def embedding_settings(embeddings: Sequence[TokenFile]) -> list[dict[str, str]]:
    """What of textual inversions determines embeddings: token and content."""
    return [
        {"token": embedding.token, "sha256": hash_large_file(find_embedding(embedding))}
        for embedding in embeddings
    ]


def find_embedding(embedding: TokenFile) -> Path:
    """The file of a textual inversion. Raises `BadInputFileError` where there is none."""
    return find_weights_file(embedding.file, "--embedding", "FILE or FILE:TOKEN")


def load_embedding(pipeline: Any, embedding: TokenFile) -> None:
    """Teach a text pipeline a textual inversion's token, by diffusers' own loader.

    Layouts: one tensor under any key (diffusers' and the web UIs'), or SDXL's `clip_l` and
    `clip_g`, one for each text encoder.
    """
    from safetensors.torch import load_file

    path = find_embedding(embedding)
    try:
        tensors = load_file(path)
        encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
        vectors = list(tensors.values())
        if tensors.keys() == {"clip_l", "clip_g"}:
            encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
            vectors = [tensors["clip_l"], tensors["clip_g"]]
        for vector, (tokenizer, text_encoder) in zip(vectors, encoders, strict=True):
            pipeline.load_textual_inversion(
                vector, token=embedding.token, tokenizer=tokenizer, text_encoder=text_encoder
            )
    except Exception as error:
        reason = in_one_line(error)
        raise BadInputFileError(
            f"--embedding {path} cannot be used with this checkpoint ({type(error).__name__}: "
            f"{reason}): choose another file or token (FILE:TOKEN)"
        ) from error
