"""Long prompts in chunks and weights in prompts, beside transformers and compel themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compel import CompelForSD, CompelForSDXL
from hypothesis import given
from hypothesis import strategies as st

from common.conditions.encoding import check_prompt_options
from common.conditions.prompts import encode_prompts, split_text, token_counts, unread
from common.errors import BadSettingError
from common.runs.generation import GenerationConfig
from tests.in_process import Ours, load_pipeline, make_config, relative_difference
from tests.tiny_checkpoints import save_sd, save_sdxl

WORDS = "a large red star on a blue background and a small green ring "
LONG, LONGER = (WORDS * 8).strip(), (WORDS * 14).strip()  # 104 and 182 words
SMALL = dict(height=64, width=64, num_inference_steps=3)


@pytest.fixture(scope="module", params=["SDXL", "SD"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, Ours]:
    save = {"SDXL": save_sdxl, "SD": save_sd}[request.param]
    model = save(tmp_path_factory.mktemp("tiny") / request.param)
    return model, load_pipeline(model), Ours(model)


def config_of(model: Path, *prompts: tuple[str, str | None], **settings: Any) -> GenerationConfig:
    texts = [{"prompt": prompt, "negative_prompt": negative} for prompt, negative in prompts]
    return make_config(model, prompts=texts, **SMALL, **settings)


def encode_chunks(pipeline: Any, text: str, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of 75 tokens by transformers alone: [1, 77·chunks, D], and the first one's pooled."""
    parts, pooled = [], None
    for number in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{number}", None)
        encoder = getattr(pipeline, f"text_encoder{number}", None)
        if encoder is None:
            continue
        ids = tokenizer(text, verbose=False).input_ids[1:-1]
        rows = []
        for start in range(0, 75 * chunks, 75):
            row = [tokenizer.bos_token_id, *ids[start : start + 75], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
        with torch.no_grad():
            output = encoder(torch.tensor(rows), output_hidden_states=True)
        sdxl = hasattr(pipeline, "text_encoder_2")
        states = output.hidden_states[-2] if sdxl else output.last_hidden_state
        parts.append(states.reshape(1, -1, states.shape[-1]))
        pooled = output.text_embeds[:1] if number else pooled
    return torch.cat(parts, -1), pooled if pooled is not None else torch.empty(0)


def test_long_prompts_in_chunks(checkpoint: tuple[Path, Any, Ours]) -> None:
    model, pipeline, ours = checkpoint
    counts = token_counts(ours.text_pipeline)
    assert counts(LONG) == len(LONG.split()), "the reference splits between words as well"
    config = config_of(model, (LONG, "a ring"), ("a star", LONGER), long_prompts="chunk")
    embeddings = encode_prompts(ours.text_pipeline, config)
    for row, (prompt, negative) in enumerate([(LONG, "a ring"), ("a star", LONGER)]):
        for name, text in (("prompt_embeds", prompt), ("negative_prompt_embeds", negative)):
            expected, pooled = encode_chunks(pipeline, text, 3)
            torch.testing.assert_close(embeddings[name][row : row + 1], expected)
            if f"pooled_{name}" in embeddings or "negative_pooled_prompt_embeds" in embeddings:
                pooled_name = name.replace("prompt_embeds", "pooled_prompt_embeds")
                torch.testing.assert_close(embeddings[pooled_name][row : row + 1], pooled)
    assert unread(ours.text_pipeline, config) == []


def test_short_prompts_are_the_same_in_chunks(checkpoint: tuple[Path, Any, Ours]) -> None:
    model, _, ours = checkpoint
    prompts = [("a red star", "blurry"), ("a ring", ""), ("a cross", None)]
    cut = encode_prompts(ours.text_pipeline, config_of(model, *prompts))
    chunked = encode_prompts(ours.text_pipeline, config_of(model, *prompts, long_prompts="chunk"))
    assert cut.keys() == chunked.keys()
    assert all(torch.equal(cut[name], chunked[name]) for name in cut)


def test_a_long_prompt_denoises_by_what_was_cut_off(checkpoint: tuple[Path, Any, Ours]) -> None:
    """Stage 2 takes embeddings of any length, as diffusers' pipeline does."""
    model, pipeline, ours = checkpoint
    config = config_of(model, (LONG, "blurry"), long_prompts="chunk")
    embeddings = encode_prompts(ours.text_pipeline, config)
    latents = pipeline(
        **embeddings,
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(42)],
        output_type="latent",
    ).images
    assert relative_difference(ours.denoise(config), latents.numpy()) < 1e-4
    cut = config_of(model, (LONG, "blurry"))
    assert relative_difference(ours.denoise(cut), latents.numpy()) > 1e-4
    (line,) = unread(ours.text_pipeline, cut)
    assert "has 104 tokens, over the 75" in line and "--long_prompts chunk" in line


def test_a_word_longer_than_a_chunk_is_read_in_several(checkpoint: tuple[Path, Any, Ours]) -> None:
    model, _, ours = checkpoint
    config = config_of(model, ("star" + "q" * 200 + " ring", None), long_prompts="chunk")
    assert encode_prompts(ours.text_pipeline, config)["prompt_embeds"].shape[1] == 3 * 77
    assert unread(ours.text_pipeline, config) == []


@given(
    st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1), max_size=40),
    st.integers(1, 12),
)
def test_pieces_hold_all_words_and_are_as_few_as_can_be(words: list[str], room: int) -> None:
    text = " ".join(words)
    pieces = split_text(text, lambda piece: len(piece.split()), room)
    assert " ".join(pieces).split() == text.split()
    assert len(pieces) == max(1, -(-len(text.split()) // room))
    assert all(len(piece.split()) <= room for piece in pieces)


WEIGHTED = [("a (large red)1.4 star", "blurry-- noise"), ("a ring++ (on blue)0.6", "")]


def test_weights_equal_compel_with_diffusers(checkpoint: tuple[Path, Any, Ours]) -> None:
    model, pipeline, ours = checkpoint
    config = config_of(model, *WEIGHTED, prompt_weighting="compel")
    compel = (CompelForSDXL if hasattr(pipeline, "text_encoder_2") else CompelForSD)(pipeline)
    found = compel([p for p, _ in WEIGHTED], negative_prompt=[n for _, n in WEIGHTED])
    pooled = {}
    if found.pooled_embeds is not None:
        pooled = dict(
            pooled_prompt_embeds=found.pooled_embeds,
            negative_pooled_prompt_embeds=found.negative_pooled_embeds,
        )
    latents = pipeline(
        prompt_embeds=found.embeds,
        negative_prompt_embeds=found.negative_embeds,
        **pooled,
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (42, 43)],
        output_type="latent",
    ).images
    assert relative_difference(ours.denoise(config), latents.numpy()) < 1e-4
    plain = ours.denoise(config_of(model, *WEIGHTED))
    assert relative_difference(plain, latents.numpy()) > 1e-4


def test_compel_without_weights_changes_nothing(checkpoint: tuple[Path, Any, Ours]) -> None:
    model, _, ours = checkpoint
    prompts = [("a red star", "blurry"), ("a ring", ""), ("a cross", None)]
    plain = encode_prompts(ours.text_pipeline, config_of(model, *prompts))
    config = config_of(model, *prompts, prompt_weighting="compel")
    weighted = encode_prompts(ours.text_pipeline, config)
    assert plain.keys() == weighted.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(weighted[name], tensor)


def test_long_weighted_prompts_need_chunks(checkpoint: tuple[Path, Any, Ours]) -> None:
    model, _, ours = checkpoint
    prompt = (LONG.replace("red", "red++", 1), "blurry")
    with pytest.raises(BadSettingError, match="use --long_prompts chunk"):
        encode_prompts(ours.text_pipeline, config_of(model, prompt, prompt_weighting="compel"))
    config = config_of(model, prompt, prompt_weighting="compel", long_prompts="chunk")
    shapes = {
        tensor.shape[1]
        for name, tensor in encode_prompts(ours.text_pipeline, config).items()
        if "pooled" not in name
    }
    assert len(shapes) == 1 and shapes.pop() > 77


def test_what_compel_cannot_read_is_refused(checkpoint: tuple[Path, Any, Ours]) -> None:
    model, _, ours = checkpoint
    config = config_of(model, ('("a star", "a ring").blend(1)', None), prompt_weighting="compel")
    with pytest.raises(BadSettingError, match="compel cannot read the prompts"):
        encode_prompts(ours.text_pipeline, config)


def test_clip_skip_and_weights_do_not_go_together(checkpoint: tuple[Path, Any, Ours]) -> None:
    config = config_of(checkpoint[0], ("a", None), prompt_weighting="compel", clip_skip=1)
    with pytest.raises(BadSettingError, match="--clip_skip and --prompt_weighting"):
        check_prompt_options(config, checkpoint[2].checkpoint)
