"""Soft masks: diffusers' image to image with the rule of differential diffusion between its steps.

The rule of Levin and Fried 2023: before evaluation i of N, what has the mask m is the noised
picture again while 1 - m > i / N.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image

from common.errors import BadSettingError
from common.runs.jobs import refuse_unfit_inputs
from tests.in_process import (
    Ours,
    generators_of,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
    scheduled,
)
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sdxl

STEPS, SIDE, BATCH = 10, 64, 2
SCHEDULERS = ("euler", "ddim", "dpmpp_2m", "heun", "unipc", "deis", "dpm2")


class Both:
    """A tiny checkpoint by both, two pictures and their masks from white to black."""

    def __init__(self, folder: Path) -> None:
        self.model = save_sdxl(folder / "model")
        self.ours = Ours(self.model)
        self.pipeline: Any = StableDiffusionXLImg2ImgPipeline(
            **load_pipeline(self.model).components
        )
        self.pipeline.set_progress_bar_config(disable=True)
        random, self.files = np.random.default_rng(7), []
        self.masks = np.zeros((BATCH, SIDE, SIDE), np.uint8)
        self.masks[0] = np.linspace(0, 255, SIDE).astype(np.uint8)  # from left to right
        self.masks[1] = random.integers(0, 256, (8, 8), np.uint8).repeat(8, 0).repeat(8, 1)
        for number, mask in enumerate(self.masks):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            names = [str(folder / f"{kind}{number}.png") for kind in ("picture", "mask")]
            Image.fromarray(pixels).save(names[0])
            Image.fromarray(mask).save(names[1])
            self.files.append(names)

    def config(self, **settings: Any) -> Any:
        size = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS}
        prompts = [
            prompt.model_dump() | {"image": image, "mask_image": mask}
            for prompt, (image, mask) in zip(
                make_config(self.model, batch=BATCH).prompts, self.files, strict=True
            )
        ]
        return make_config(
            self.model, **{**size, "prompts": prompts, "soft_mask": True, **settings}
        )

    def by_diffusers(self, config: Any) -> np.ndarray:
        pictures = [Image.open(prompt.image) for prompt in config.prompts]
        encoded = self.pipeline.vae.encode(self.pipeline.image_processor.preprocess(pictures))
        generators = generators_of(config)
        means, stds = encoded.latent_dist.mean, encoded.latent_dist.std
        drawn = [[torch.randn(1, *means.shape[1:], generator=g) for _ in "12"] for g in generators]
        sampled, noise = (torch.cat([each[k] for each in drawn]) for k in (0, 1))
        original = (means + stds * sampled) * self.pipeline.vae.config.scaling_factor
        # Each cell's by the mean of its pixels.
        cells = self.masks.reshape(BATCH, 8, SIDE // 8, 8, SIDE // 8).mean((2, 4)) / 255
        stays_for = 1 - torch.from_numpy(cells)[:, None]

        def lay(pipeline: Any, i: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
            timesteps = pipeline.scheduler.timesteps[-pipeline.num_timesteps :]
            if i + 1 == len(timesteps):
                return given
            noised = pipeline.scheduler.add_noise(original, noise, timesteps[i + 1 : i + 2])
            stays = stays_for > (i + 1) / len(timesteps)
            return {"latents": torch.where(stays, noised, given["latents"])}

        with scheduled(self.pipeline, config), torch.no_grad():
            made = self.pipeline(
                prompt=[prompt.prompt for prompt in config.prompts],
                negative_prompt=[prompt.negative_prompt for prompt in config.prompts],
                image=pictures,
                strength=config.strength,
                num_inference_steps=STEPS,
                guidance_scale=config.guidance_scale,
                generator=generators_of(config),
                output_type="latent",
                callback_on_step_end=lay,
            )
        return np.asarray(made.images.numpy())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("soft"))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_equal_diffusers(both: Both, scheduler: str, strength: float) -> None:
    config = both.config(scheduler=scheduler, strength=strength)
    expected = both.by_diffusers(config)
    assert relative_difference(both.ours.denoise(config), expected) < 1e-4
    hard = both.ours.denoise(config.model_copy(update={"soft_mask": False}))
    assert relative_difference(hard, expected) > 0.01


def test_every_backend_and_the_host_compute_the_same(both: Both) -> None:
    config = both.config(scheduler="dpmpp_2m", strength=0.8)
    expected = both.ours.denoise(config)
    by_torch = Ours(both.model, backend="torch")
    assert relative_difference(by_torch.denoise(config), expected) < 1e-4
    pictures = both.ours.decode(expected)
    assert pixel_difference(by_torch.decode(expected), pictures) <= 2
    clipping = {"scheduler": "ddim", "scheduler_options": {"clip_sample": True}}
    config = both.config(strength=0.8, guidance_scale=1.5, **clipping)
    found = both.ours.denoise(config)
    assert relative_difference(found, both.by_diffusers(config)) < 1e-4


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(both: Both) -> None:
    config = both.config(scheduler="dpmpp_2m", strength=0.8)
    many = Ours(both.model, mesh="data=2,cfg=2,rows=2")
    assert relative_difference(many.denoise(config), both.ours.denoise(config)) < 1e-4


def test_what_is_shown_masks_knows_no_grey(both: Both, tmp_path: Path) -> None:
    ours = Ours(save_sdxl(tmp_path, in_channels=9))
    config = both.config()
    with refusal(BadSettingError, "knows black and white alone", "--soft_mask"):
        refuse_unfit_inputs(config, ours.checkpoint)
