"""Which checkpoint is read, as settings say it."""

import pytest
from pydantic import ValidationError

from common.declared import EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES, declarations
from common.models.component_table import replaceable
from common.models.model_settings import LoraFile, ModelSettings, TokenFile
from common.runs.generation import RunSettings


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("a/b.safetensors", "a/b.safetensors", 1.0),
        ("a/b.safetensors:0.7", "a/b.safetensors", 0.7),
        ("a/b.safetensors:-1e-3", "a/b.safetensors", -1e-3),
        ("C:/b.safetensors", "C:/b.safetensors", 1.0),
        ("who/what/b.safetensors:2", "who/what/b.safetensors", 2.0),
    ],
)
def test_a_lora_as_a_flag_gives_it(text: str, file: str, scale: float) -> None:
    lora = LoraFile.model_validate(text)
    assert (lora.file, lora.scale) == (file, scale)
    assert LoraFile.model_validate(lora.model_dump()) == lora


@pytest.mark.parametrize(
    "value", ["", "a:nan.5", {"file": "a", "scale": float("inf")}, {"file": 3}]
)
def test_a_lora_that_is_none(value: object) -> None:
    if value == "a:nan.5":  # no number, so that it is all one name
        assert LoraFile.model_validate(value).file == value
        return
    with pytest.raises(ValidationError):
        LoraFile.model_validate(value)


@pytest.mark.parametrize(
    "value", ["", "a.safetensors:", {"token": "a"}, {"file": "a", "token": ""}]
)
def test_a_textual_inversion_needs_a_file_and_no_empty_token(value: object) -> None:
    with pytest.raises(ValidationError):
        TokenFile.model_validate(value)


def test_what_may_be_replaced_has_a_setting_after_the_others() -> None:
    declared = dict(declarations(ModelSettings))
    assert list(declared) == [
        *("model_id", "revision", "variant", "single_file_config"),
        *(row.name for row in replaceable()),
    ]
    assert declared["unet"].makes == (LATENTS,)
    assert declared["vae"].makes == (IMAGE_LATENTS, PICTURES)
    assert declared["model_id"].makes == (EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES)
    assert declared["vae"].text == "Another VAE: folder, hub id, file."


def test_only_what_is_given_is_told() -> None:
    settings = ModelSettings.model_validate({"vae": "elsewhere", "variant": "fp16"})
    assert settings.replacements() == {"vae": "elsewhere"}
    given = {"model_id": "models/demo", "variant": "fp16", "vae": "elsewhere"}
    assert settings.model_settings() == given


@pytest.mark.parametrize(
    ("name", "value"), [("unet", ""), ("vae", "a\0b"), ("variant", "a/b"), ("unets", "x")]
)
def test_a_name_that_is_none_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name):
        ModelSettings.model_validate({name: value})


@pytest.mark.parametrize(
    ("text", "file", "token"),
    [
        ("a/cat.safetensors", "a/cat.safetensors", None),
        ("a/cat.safetensors:<kitty>", "a/cat.safetensors", "<kitty>"),
        ("C:/a/cat.safetensors", "C:/a/cat.safetensors", None),
    ],
)
def test_an_embedding_has_a_file_and_may_have_a_token(
    text: str, file: str, token: str | None
) -> None:
    (embedding,) = RunSettings(embeddings=text).embeddings
    assert (embedding.file, embedding.token) == (file, token)
    assert RunSettings(embeddings=[embedding.model_dump()]).embeddings == (embedding,)
