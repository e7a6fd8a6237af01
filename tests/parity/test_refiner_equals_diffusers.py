"""SDXL's refiner equals diffusers': from a base's latents, and from pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image
from safetensors.torch import save_file

from tests.in_process import (
    Ours,
    generators_of,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
)
from tests.tiny_checkpoints import save_refiner, save_sdxl

SIZE = {"height": 64, "width": 64, "num_inference_steps": 12, "batch": 2}


class Refined:
    """A base and a refiner by both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.refiner = save_sdxl(folder / "base"), save_refiner(folder / "refiner")
        self.by_ours = {model: Ours(model) for model in (self.base, self.refiner)}
        self.base_pipeline = load_pipeline(self.base)
        own = StableDiffusionXLImg2ImgPipeline.from_pretrained(self.refiner)
        own.set_progress_bar_config(disable=True)
        self.pipeline: Any = own

    def config(self, model: Path, **settings: Any) -> Any:
        return make_config(model, **SIZE, **settings)

    def ours(self, model: Path, **settings: Any) -> np.ndarray:
        return self.by_ours[model].denoise(self.config(model, **settings))

    def by_diffusers(self, pipeline: Any, image: Any = None, **options: Any) -> Any:
        config = self.config(self.base)
        given = {} if image is None else {"image": image}
        return pipeline(
            prompt=[prompt.prompt for prompt in config.prompts],
            negative_prompt=[prompt.negative_prompt for prompt in config.prompts],
            num_inference_steps=12,
            guidance_scale=config.guidance_scale,
            generator=generators_of(config),
            **given,
            **{"output_type": "latent", **options},
        ).images


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Refined:
    return Refined(tmp_path_factory.mktemp("refined"))


@pytest.mark.parametrize("end", [0.4, 0.8])
def test_an_ensemble_of_experts(refined: Refined, end: float) -> None:
    size = {"height": 64, "width": 64}
    expected = refined.by_diffusers(refined.base_pipeline, denoising_end=end, **size)
    begun = refined.ours(refined.base, denoising_end=end)
    assert relative_difference(begun, expected.numpy()) < 1e-4
    expected = refined.by_diffusers(refined.pipeline, expected, denoising_start=end)
    file = refined.folder / "begun.safetensors"
    save_file({"latents": torch.from_numpy(begun)}, file)
    found = refined.ours(refined.refiner, init_latents=str(file), denoising_start=end)
    assert relative_difference(found, expected.numpy()) < 1e-4
    assert relative_difference(found, begun) > 0.01


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(refined: Refined) -> None:
    """The base up to a cut, the refiner from there."""
    file = refined.folder / "on eight.safetensors"
    for model, flags in (
        (refined.base, {"denoising_end": 0.6}),
        (refined.refiner, {"denoising_start": 0.6, "init_latents": str(file)}),
    ):
        config, many = refined.config(model, **flags), Ours(model, mesh="data=2,cfg=2,rows=2")
        found, expected = many.denoise(config), refined.by_ours[model].denoise(config)
        assert many.denoiser.facts()["devices"] == 8
        assert relative_difference(found, expected) < 1e-4
        save_file({"latents": torch.from_numpy(expected)}, file)


@pytest.mark.parametrize("scores", [{}, {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}])
def test_from_pictures(refined: Refined, scores: dict[str, float]) -> None:
    random = np.random.default_rng(6)
    prompts, opened = [], []
    for number, prompt in enumerate(refined.config(refined.refiner).prompts):
        place = refined.folder / f"{number}.png"
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        opened.append(Image.fromarray(pixels))
        opened[-1].save(place)
        prompts.append(prompt.model_dump() | {"image": str(place)})
    settings = {"prompts": prompts, **scores}
    expected = refined.by_diffusers(refined.pipeline, opened, output_type="pil", **scores)
    ours = refined.by_ours[refined.refiner]
    found = ours.decode(ours.denoise(refined.config(refined.refiner, **settings)))
    assert pixel_difference(found, np.stack([np.asarray(image) for image in expected])) <= 2
    sizes = {"original_size": (80, 96), "negative_crops_coords_top_left": (4, 2)}
    expected = refined.by_diffusers(refined.pipeline, opened, **scores, **sizes)
    found = refined.ours(refined.refiner, **settings, **sizes)
    assert relative_difference(found, expected.numpy()) < 1e-4
