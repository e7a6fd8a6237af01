"""Textual inversions: which word stands for a file, and what it comes to in embeddings.

The reference is diffusers' own pipeline, taught each file under a word that it reads rightly (in
lower case, in angle brackets, of which none begins another), with that word written by hand where
the prompt should have it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.conditions.prompts import encode_prompts, unread
from common.errors import BadInputFileError
from common.models.model_settings import TokenFile
from common.models.text_pipeline import load_text_pipeline
from common.models.textual_inversion import embedding_settings, teach, word_of
from tests.in_process import Ours, load_pipeline, make_config
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sd, save_sdxl

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


def vectors(count: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3


def pair(count: int, seed: int = 1) -> Tensors:
    return {"clip_l": vectors(count, 32, seed), "clip_g": vectors(count, 48, seed + 100)}


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def taught(model: Path, *embeddings: str) -> Any:
    pipeline = load_text_pipeline(Ours(model).checkpoint, torch.float32)
    teach(pipeline, [TokenFile.model_validate(embedding) for embedding in embeddings])
    return pipeline


def encode(model: Path, pipeline: Any, prompt: str, **settings: Any) -> Tensors:
    texts = [{"prompt": prompt, "negative_prompt": "blurry"}]
    config = make_config(model, prompts=texts, **settings)
    return encode_prompts(pipeline, config)


def by_diffusers(model: Path, prompt: str, **words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The prompt's embeddings; `words` are vectors for each encoder, written `<name>`."""
    pipeline = load_pipeline(model)
    for word, each in words.items():
        for number, vector in zip(("", "_2"), each, strict=False):
            pipeline.load_textual_inversion(
                vector,
                token=f"<{word}>",
                tokenizer=getattr(pipeline, f"tokenizer{number}"),
                text_encoder=getattr(pipeline, f"text_encoder{number}"),
            )
    with torch.no_grad():
        return pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]


@pytest.mark.parametrize("word", ["easyneg", "EasyNeg", "EASY neg", "<My-Toy>", "ärger"])
@pytest.mark.parametrize("count", [1, 3])
def test_all_vectors_of_a_word_in_any_letter_case(
    sdxl: Path, tmp_path: Path, word: str, count: int
) -> None:
    tensors = pair(count)
    file = save(tmp_path / "file.safetensors", tensors)
    pipeline = taught(sdxl, f"{file}:{word}")
    expected = by_diffusers(sdxl, "a red <q>, star", q=tuple(tensors.values()))
    for written in (word, word.lower(), word.upper()):
        found = encode(sdxl, pipeline, f"a red {written}, star")["prompt_embeds"]
        torch.testing.assert_close(found, expected)


def test_names_of_which_one_begins_another(sd: Path, tmp_path: Path) -> None:
    words = {"bad-artist": 2, "bad-artist-anime": 3, "bad": 1}
    files = [
        save(tmp_path / f"{word}.safetensors", {"emb_params": vectors(count, 32, count)})
        for word, count in words.items()
    ]
    prompt = "bad-artist-anime, a bad star bad-artist, bad-art badly not-bad Bad-Artist-Anime"
    found = encode(sd, taught(sd, *map(str, files)), prompt)["prompt_embeds"]
    expected = by_diffusers(
        sd,
        "<qc>, a <qa> star <qb>, bad-art badly not-bad <qc>",
        qa=(vectors(1, 32, 1),),
        qb=(vectors(2, 32, 2),),
        qc=(vectors(3, 32, 3),),
    )
    torch.testing.assert_close(found, expected)


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "clip_l, clip_g": lambda t: t,
    "the other way round": lambda t: {"clip_g": t["clip_g"], "clip_l": t["clip_l"]},
    "text_encoders_0 and 1": lambda t: {
        "text_encoders_0": t["clip_l"],
        "text_encoders_1": t["clip_g"],
    },
    "beside other keys": lambda t: t | {"step": torch.tensor(5), "name": torch.zeros(3)},
    "half precision": lambda t: {name: tensor.half() for name, tensor in t.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_for_two_encoders(
    sdxl: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: tensor.half().float() for name, tensor in pair(2).items()}
    file = save(tmp_path / "style.safetensors", LAYOUTS[layout](tensors))
    found = encode(sdxl, taught(sdxl, str(file)), "a style star")["prompt_embeds"]
    expected = by_diffusers(sdxl, "a <q> star", q=tuple(tensors.values()))
    torch.testing.assert_close(found, expected)
    said = capsys.readouterr().err
    assert ("not used: name, step" in said) == (layout == "beside other keys"), said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["dropped", "renamed", "transposed", "added", "retyped"])
def test_one_tensor_that_is_not_as_it_was_is_named(
    sdxl: Path, tmp_path: Path, layout: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = dict(LAYOUTS[layout](pair(2)))
    name = sorted(n for n in tensors if tensors[n].ndim == 2)[len(layout + way) % 2]
    encoder = {32: "text_encoder", 48: "text_encoder_2"}[tensors[name].shape[1]]
    told, tensor = {name, encoder}, tensors.pop(name)
    if way == "renamed":
        tensors[f"{name}x"] = tensor
    elif way == "transposed":
        tensors[name] = tensor.T.contiguous()
    elif way == "added":
        told = {"other"}
        tensors |= {name: tensor, "other": tensor.clone()}
    elif way == "retyped":
        tensors[name] = tensor.to(torch.int8)
    file = save(tmp_path / "toy.safetensors", tensors)
    capsys.readouterr()
    try:
        taught(sdxl, str(file))
        said = capsys.readouterr().err
    except BadInputFileError as error:
        said = str(error)
    assert any(word in said for word in told), said


def test_two_files_for_one_word(sdxl: Path, tmp_path: Path) -> None:
    """As diffusers' training script writes them, one for each text encoder."""
    tensors = pair(2)
    files = [
        save(tmp_path / f"learned_embeds{number}.safetensors", {"<Toy>": tensor})
        for number, tensor in zip(("", "_2"), tensors.values(), strict=True)
    ]
    expected = by_diffusers(sdxl, "a <q> star", q=tuple(tensors.values()))
    for order in (files, files[::-1]):
        found = encode(sdxl, taught(sdxl, *map(str, order)), "a <toy> star")["prompt_embeds"]
        torch.testing.assert_close(found, expected)
    with refusal(BadInputFileError, "'<Toy>' has vectors for text_encoder alone", "text_encoder_2"):
        taught(sdxl, str(files[0]))


def test_the_word_is_the_one_given_or_the_files_own_or_its_name(
    sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = save(tmp_path / "learned_embeds.safetensors", {"<my-toy>": vectors(1, 32)[0]})
    plain = save(tmp_path / "Style.safetensors", {"emb_params": vectors(1, 32)})
    assert word_of(TokenFile.model_validate(str(inside))) == "<my-toy>"
    assert word_of(TokenFile.model_validate(f"{inside}:other")) == "other"
    assert word_of(TokenFile.model_validate(str(plain))) == "Style"
    found = encode(sd, taught(sd, str(inside)), "a <my-toy> star")["prompt_embeds"]
    assert "its word in prompts is '<my-toy>'" in capsys.readouterr().out
    torch.testing.assert_close(found, by_diffusers(sd, "a <q> star", q=(vectors(1, 32),)))


def test_the_pooled_embedding_is_the_end_tokens(sdxl: Path, tmp_path: Path) -> None:
    """SDXL's own config has eos_token_id 2, for which transformers takes the highest id's."""
    file = save(tmp_path / "style.safetensors", pair(2))
    new = taught(sdxl, str(file))
    old = load_text_pipeline(Ours(sdxl).checkpoint, torch.float32)
    for module in old.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2
    teach(old, [TokenFile(file=str(file))])
    first, second = (encode(sdxl, pipeline, "a style star") for pipeline in (new, old))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_of_compel_are_for_all_vectors(sdxl: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "Style.safetensors", pair(3))
    pipeline = taught(sdxl, str(file))
    made = {
        prompt: encode(sdxl, pipeline, prompt, prompt_weighting="compel")["prompt_embeds"]
        for prompt in ("a (style)1.5 star", "a (Style)1.5 star", "a style++ star", "a style star")
    }
    weighted, same, plus, plain = made.values()
    assert torch.equal(weighted, same) and not torch.equal(weighted, plain)
    one = encode(sdxl, pipeline, "a (style)++ star", prompt_weighting="compel")["prompt_embeds"]
    assert torch.equal(plus, one)
    torch.testing.assert_close(plain, encode(sdxl, pipeline, "a style star")["prompt_embeds"])


def test_a_word_that_no_prompt_has_is_said(sd: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", {"emb_params": vectors(2, 32)})
    pipeline = taught(sd, str(file), f"{file}:other")
    texts = [{"prompt": "styles, a star", "negative_prompt": "OTHER"}]
    (line,) = unread(pipeline, make_config(sd, prompts=texts))
    assert line == "--embedding 'style' has no effect: no prompt has this word"


def test_the_same_word_twice_is_refused(sd: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", {"emb_params": vectors(1, 32)})
    with refusal(BadInputFileError, "'STYLE' is given more than once"):
        taught(sd, str(file), f"{file}:STYLE")


@pytest.mark.parametrize(
    ("model", "tensors", "words"),
    [
        ("sd", {"emb": vectors(1, 768)}, "(SD 1.x or SDXL's first encoder), but this checkpoint's"),
        ("sd", {"emb_params": vectors(1, 1024)}, "(SD 2.x)"),
        ("sd", pair(1), "clip_g has vectors of 48 numbers, but this checkpoint's text_encoder"),
        ("sdxl", {"emb_params": vectors(1, 32)}, "has vectors for text_encoder alone"),
        (
            "sdxl",
            {"clip_l": vectors(1, 48), "clip_g": vectors(1, 32)},
            "but this checkpoint's text_encoder takes 32",
        ),
        ("sdxl", pair(1) | {"text_encoders_1": vectors(1, 48)}, "remove one"),
        ("sd", {"x": torch.zeros(32), "y": torch.zeros(32)}, "holds no textual inversion"),
        ("sd", {"x": torch.zeros(2, 2, 32)}, "x is float32 [2, 2, 32], no vectors"),
        ("sd", {"x": torch.zeros(2, 32, dtype=torch.int32)}, "x is int32 [2, 32], no vectors"),
        ("sd", {"x": torch.full((1, 32), float("nan"))}, "x holds numbers that are not finite"),
        ("sd", {"x": vectors(76, 32)}, "has 76 vectors, over the 75 tokens"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(
    sd: Path, sdxl: Path, tmp_path: Path, model: str, tensors: Tensors, words: str
) -> None:
    file = save(tmp_path / "style.safetensors", tensors)
    with refusal(BadInputFileError, "--embedding", words):
        taught({"sd": sd, "sdxl": sdxl}[model], f"{file}:style")


def test_a_textual_inversion_counts_by_word_and_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"emb": torch.ones(1, 4)}, tmp_path / f"{name}.safetensors")
    first, second = (
        embedding_settings([TokenFile(file=str(tmp_path / f"{name}.safetensors"), token="x")])
        for name in ("a", "b")
    )
    assert first == second and first[0]["token"] == "x"
