"""Prompts to embeddings: chunks of whole words, and each prompt the same in any company.

tests/parity has them beside diffusers' own pipeline and compel.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.conditions.prompts import (
    embeddings_names,
    encode_into,
    encode_prompts,
    read_texts,
    room_of,
    split_text,
    token_counts,
    unread,
)
from common.files.kept_progress import Progress
from common.files.made_rows import MadeRows
from common.files.tensor_rows import TOKENS
from common.models.find import open_checkpoint
from common.models.text_pipeline import load_text_pipeline
from common.stopping import StoppedError, StopRequest
from tests.configs import make_config
from tests.conftest import DEMO
from tests.refusals import refusal

LONG = " ".join(["red"] * 75) + " green blue"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The demo checkpoint's text parts."""
    checkpoint = open_checkpoint(make_config(DEMO), ["tokenizer", "text_encoder"])
    return load_text_pipeline(checkpoint, torch.float32)


@given(st.text(alphabet="ab \n", min_size=1), st.integers(1, 8))
def test_a_text_is_split_between_words_into_as_few_pieces_as_hold_it(text: str, room: int) -> None:
    pieces = split_text(text, len, room)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    if not text.split():
        return
    assert all(len(piece) <= room for piece in pieces)
    if all(len(word) <= room for word in text.split()):
        assert " ".join(pieces).split() == text.split()
        for first, second in pairwise(pieces):
            assert len(f"{first} {second.split()[0]}") > room


def test_tokens_are_counted_without_start_and_end(pipeline: Any) -> None:
    count = token_counts(pipeline)
    assert (count(""), count("red"), count("a red star")) == (0, 1, 3)
    assert room_of(pipeline) == 75


def test_what_is_cut_off_is_said_once(pipeline: Any) -> None:
    config = make_config(DEMO, prompts=[{"prompt": LONG, "negative_prompt": "blurry"}] * 2)
    (line,) = unread(pipeline, config)
    assert line.startswith("the prompt 'red red") and "has 77 tokens, over the 75" in line
    assert "cut off: 'green blue'" in line and "--long_prompts chunk" in line
    assert unread(pipeline, config.model_copy(update={"long_prompts": "chunk"})) == []


def test_a_prompt_has_the_same_bits_in_any_company(pipeline: Any) -> None:
    together = encode_prompts(pipeline, make_config(DEMO, batch=3))
    assert tuple(together) == embeddings_names(pipeline)
    for index in range(3):
        prompts = make_config(DEMO, batch=3).prompts[index : index + 1]
        alone = encode_prompts(pipeline, make_config(DEMO, prompts=prompts))
        for name, tensor in together.items():
            assert torch.equal(tensor[index : index + 1], alone[name]), name


def test_chunks_fill_up_to_the_longest_prompt(pipeline: Any) -> None:
    prompts = [{"prompt": text, "negative_prompt": "blurry"} for text in (LONG, "a red star")]
    config = make_config(DEMO, prompts=prompts, long_prompts="chunk")
    chunked = encode_prompts(pipeline, config)
    assert chunked["prompt_embeds"].shape == (2, 2 * 77, 160)
    cut = encode_prompts(pipeline, config.model_copy(update={"long_prompts": "cut"}))
    assert torch.equal(chunked["prompt_embeds"][1, :77], cut["prompt_embeds"][1])
    assert torch.equal(chunked["pooled_prompt_embeds"][1], cut["pooled_prompt_embeds"][1])


def test_an_encoding_that_is_stopped_goes_on_with_the_same_bits(
    pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, stop = make_config(DEMO, batch=3), StopRequest()
    expected = encode_prompts(pipeline, config)
    texts = read_texts(pipeline, config)
    assert texts.length == TOKENS
    stop.number = 2

    def made() -> MadeRows:
        return MadeRows.numbered(3, Progress(tmp_path, 1, {}))

    with refusal(StoppedError, "interrupted after 1 of 3 prompts, which are kept"):
        encode_into(made(), lambda _: pipeline, config, texts, stop)
    again = made()
    encode_into(again, lambda _: pipeline, config, texts)
    assert "goes on after 1 of 3 prompts, which are kept" in capsys.readouterr().out
    found = {name: again.read(range(3), name) for name in expected}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "text",
    [
        ",".join(["masterpiece", "best_quality", "red_star", "blue_background"] * 20),
        "大きな赤い星、青い背景。" * 20,
        "q" * 500,
        "red " * 70 + "q" * 300 + " blue",
        "🌟" * 200,
    ],
    ids=["tags", "Japanese", "one word", "a word among others", "emoji"],
)
def test_chunks_hold_all_of_a_text_without_spaces(pipeline: Any, text: str) -> None:
    count = token_counts(pipeline)
    pieces = split_text(text, count, room_of(pipeline))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < count(piece) <= room_of(pipeline) for piece in pieces)
    config = make_config(DEMO, prompts=[{"prompt": text, "negative_prompt": "blurry"}])
    assert unread(pipeline, config.model_copy(update={"long_prompts": "chunk"})) == []
    assert len(unread(pipeline, config)) == 1


def test_break_begins_a_chunk(pipeline: Any) -> None:
    def encode(text: str) -> torch.Tensor:
        prompts = [{"prompt": text, "negative_prompt": "blurry"}]
        config = make_config(DEMO, prompts=prompts, long_prompts="chunk")
        return encode_prompts(pipeline, config)["prompt_embeds"]

    count = token_counts(pipeline)
    assert split_text("a BREAK b  BREAK\nc", count, 75) == ["a", "b", "c"]
    assert split_text("BREAKFAST b break", count, 75) == ["BREAKFAST b break"]
    both = encode("a red star BREAK a ring")
    assert torch.equal(both[:, :77], encode("a red star"))
    assert torch.equal(both[:, 77:], encode("a ring"))
