"""Training: resumable to the same bits, and a tokenizer whose words are whole."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from tests.conftest import DEMO
from tools.demo import train
from tools.demo.drawn_shapes import random_scene, vocabulary_words, write_caption

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return train.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for word in vocabulary_words():
        assert len(tokenizer(word).input_ids) == 3, word


def test_no_caption_is_longer_than_the_short_context(tokenizer: CLIPTokenizer) -> None:
    rng = random.Random(0)
    captions = [write_caption(random_scene(rng), rng) for _ in range(3000)]
    assert max(map(len, tokenizer(captions).input_ids)) <= train.SHORT_TOKENS


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["C", "Z"])))
def test_any_text_has_tokens_and_none_is_unknown(text: str) -> None:
    folder = DEMO / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert all(0 <= i < len(tokenizer) for i in ids)
    if text.strip():
        assert len(ids) > 2


def train_a_little(folder: Path) -> dict[str, torch.Tensor]:
    pictures, scenes, captions = train.draw_pictures(0, 64)
    vae = train.train_vae(pictures, folder, 3, 0, CPU)
    latents = train.encode_pictures(vae, pictures, CPU)
    tokenizer = train.make_tokenizer(folder / "tokenizer")
    models = train.train_unet(latents, scenes, captions, tokenizer, folder, 3, 0, CPU, batch_size=4)
    return {
        f"{number}.{key}": tensor
        for number, module in enumerate((vae, *models))
        for key, tensor in module.state_dict().items()
    }


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train_a_little(tmp_path / "whole")

    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    original = train.Trainer.update
    for stop_after in (2, 4):  # in the VAE's part, then in the UNet's
        updates = 0

        def update(self: train.Trainer, loss: torch.Tensor, stop: int = stop_after) -> None:
            nonlocal updates
            updates += 1
            if updates == stop:
                raise KeyboardInterrupt
            original(self, loss)

        monkeypatch.setattr(train.Trainer, "update", update)
        with pytest.raises(KeyboardInterrupt):
            train_a_little(tmp_path / "parts")
    monkeypatch.setattr(train.Trainer, "update", original)
    actual = train_a_little(tmp_path / "parts")
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


@pytest.mark.slow
@pytest.mark.long
def test_a_state_of_another_length_is_refused(tmp_path: Path) -> None:
    pictures = np.zeros((4, 128, 128, 3), np.uint8)
    train.train_vae(pictures, tmp_path, 1, 0, CPU)
    with pytest.raises(SystemExit, match="with 1 steps, not 2"):
        train.train_vae(pictures, tmp_path, 2, 0, CPU)
