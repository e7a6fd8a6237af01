"""Weights in AUTOMATIC1111's syntax beside a plain reference, with transformers alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.conditions.prompts import encode_prompts, unread
from common.conditions.weighted_prompts import token_chunks
from common.errors import BadSettingError
from common.models.model_settings import TokenFile
from common.models.text_pipeline import load_text_pipeline
from common.models.textual_inversion import teach
from tests.in_process import Ours, load_pipeline, make_config
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sd, save_sdxl

Texts = list[tuple[str, float]]  # of one weight each, as a reader writes them out by hand


@pytest.fixture(scope="module", params=["SDXL", "SD"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    save = {"SDXL": save_sdxl, "SD": save_sd}[request.param]
    model = save(tmp_path_factory.mktemp("tiny") / request.param)
    # Of a norm that nobody trained the states' mean is 0, which no factor can restore.
    for folder in model.glob("text_encoder*"):
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
        tensors[name] = torch.rand(tensors[name].shape)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model, load_text_pipeline(Ours(model).checkpoint, torch.float32)


def config_of(model: Path, prompt: str, negative: str | None = "blurry", **settings: Any) -> Any:
    texts = [{"prompt": prompt, "negative_prompt": negative}]
    return make_config(model, prompts=texts, prompt_weighting="a1111", **settings)


def by_hand(
    model: Path, chunks: list[Texts], skip: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings [1, 77 · chunks, D] and the pooled ones, by the rule in a few lines."""
    pipeline, states, pooled = load_pipeline(model), [], None
    two = hasattr(pipeline, "text_encoder_2")
    for number in ["", "_2"] if two else [""]:
        tokenizer = getattr(pipeline, f"tokenizer{number}")
        encoder = getattr(pipeline, f"text_encoder{number}")
        rows = []
        for k, texts in enumerate(chunks):
            ids, weights = [tokenizer.bos_token_id], [1.0]
            for text, weight in texts:
                new = tokenizer(text).input_ids[1:-1]
                ids, weights = ids + new, weights + [weight] * len(new)
            ids.append(tokenizer.eos_token_id)
            while len(ids) < 77:
                ids.append(tokenizer.pad_token_id)
            weights += [1.0] * (77 - len(weights))
            with torch.no_grad():
                output = encoder(torch.tensor([ids]), output_hidden_states=True)
                z = output.hidden_states[-2 - skip if two else -1 - skip]
                if not two:
                    z = getattr(encoder, "text_model", encoder).final_layer_norm(z)
            before = z.mean()
            z = z * torch.tensor(weights).reshape(1, 77, 1)
            rows.append(z * before / z.mean())
            if two and number and k == 0:
                pooled = output.text_embeds
        states.append(torch.cat(rows, 1))
    return torch.cat(states, -1), pooled


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a star", [[("a star", 1.0)]]),
        ("a (large red:1.4) star", [[("a ", 1.0), ("large red", 1.4), (" star", 1.0)]]),
        ("((a)) [star] on blue", [[("a", 1.21), ("star", 1 / 1.1), ("on blue", 1.0)]]),
        ("a red star BREAK (blue:0.5)", [[("a red star", 1.0)], [("blue", 0.5)]]),
        ("red " * 80 + "(blue:2)", [[("red " * 75, 1.0)], [("red " * 5, 1.0), ("blue", 2.0)]]),
        # A chunk ends after a comma among the last 20 tokens, but not further back.
        (
            "red " * 59 + ", " + "blue " * 20,
            [[("red " * 59 + ",", 1.0)], [("blue " * 20, 1.0)]],
        ),
        (
            "red " * 54 + ", " + "blue " * 25,
            [[("red " * 54 + ", " + "blue " * 20, 1.0)], [("blue " * 5, 1.0)]],
        ),
    ],
)
def test_weights_equal_the_rule_written_out(
    checkpoint: tuple[Path, Any], prompt: str, chunks: list[Texts]
) -> None:
    model, pipeline = checkpoint
    config = config_of(model, prompt, long_prompts="chunk")
    found = encode_prompts(pipeline, config)
    expected, pooled = by_hand(model, chunks)
    torch.testing.assert_close(found["prompt_embeds"], expected, rtol=1e-4, atol=1e-5)
    negative = [[("blurry", 1.0)], *[[("", 1.0)]] * (len(chunks) - 1)]
    expected, negative_pooled = by_hand(model, negative)
    torch.testing.assert_close(found["negative_prompt_embeds"], expected, rtol=1e-4, atol=1e-5)
    if pooled is not None and negative_pooled is not None:
        torch.testing.assert_close(found["pooled_prompt_embeds"], pooled)
        torch.testing.assert_close(found["negative_pooled_prompt_embeds"], negative_pooled)


@pytest.mark.parametrize("skip", [None, 1])
@pytest.mark.parametrize("negative", ["blurry", "", None])
def test_without_weights_it_is_what_diffusers_encodes(
    checkpoint: tuple[Path, Any], negative: str | None, skip: int | None
) -> None:
    model, pipeline = checkpoint
    config = config_of(model, "a red star", negative, clip_skip=skip)
    plain = config.model_copy(update={"prompt_weighting": None})
    found, expected = encode_prompts(pipeline, config), encode_prompts(pipeline, plain)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_more_than_a_chunk_needs_chunks(checkpoint: tuple[Path, Any]) -> None:
    model, pipeline = checkpoint
    for prompt in ("red " * 80, "red BREAK blue"):
        with refusal(BadSettingError, "the prompt 'red", "takes 2 chunks of 75 tokens", "chunk"):
            encode_prompts(pipeline, config_of(model, prompt))


def test_the_vectors_of_a_word_stay_together(tmp_path: Path) -> None:
    model = save_sd(tmp_path / "sd")
    pipeline = load_text_pipeline(Ours(model).checkpoint, torch.float32)
    save_file({"emb_params": torch.randn(4, 32)}, tmp_path / "Style.safetensors")
    teach(pipeline, [TokenFile(file=str(tmp_path / "Style.safetensors"))])
    chunks = token_chunks(pipeline, "red " * 73 + "(style:1.5) blue", pipeline.tokenizer)
    assert [len(chunk.ids) for chunk in chunks] == [73, 5]
    assert chunks[1].weights == [1.5] * 4 + [1.0]


def test_what_is_read_as_text_is_said(checkpoint: tuple[Path, Any]) -> None:
    model, pipeline = checkpoint

    def said(prompt: str, **settings: Any) -> list[str]:
        texts = [{"prompt": prompt, "negative_prompt": "blurry"}]
        return unread(pipeline, make_config(model, prompts=texts, **settings))

    (line,) = said("a (red:1.2) star")
    assert "'a (red:1.2) star' looks like AUTOMATIC1111's weights" in line
    assert "--prompt_weighting a1111 reads them" in line
    assert said("a (red:1.2) star", prompt_weighting="a1111") == []
    assert said("a (red)1.2 star", prompt_weighting="compel") == []
    (line,) = said("a <lora:red:0.8> star", prompt_weighting="a1111")
    assert "<lora:red:0.8> is read as text: give the file by --lora" in line
    (line,) = said("a BREAK b")
    assert "BREAK is read as text: --long_prompts chunk" in line
    assert said("a BREAK b", long_prompts="chunk") == []
