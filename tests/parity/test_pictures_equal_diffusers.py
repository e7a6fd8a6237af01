"""Runs that begin with pictures equal diffusers' image-to-image and inpainting pipelines."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from common.errors import BadSettingError
from common.sampling.sampler import REFUSALS
from common.sampling.schedulers import SCHEDULERS
from common.vae.pasting import paste
from tests.in_process import (
    Ours,
    generators_of,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
    scheduled,
)
from tests.parity.parity_table import ParityTable
from tests.parity.test_init_latents_equal_diffusers import DIFFERENT, NO_CHECKER, STRENGTHS
from tests.tiny_checkpoints import save_sd, save_sdxl

STEPS, SIDE, BATCH = 12, 64, 3
PIPELINES = {
    ("SDXL", "image"): "StableDiffusionXLImg2ImgPipeline",
    ("SDXL", "4 channels"): "StableDiffusionXLInpaintPipeline",
    ("SDXL", "9 channels"): "StableDiffusionXLInpaintPipeline",
    ("SD", "image"): "StableDiffusionImg2ImgPipeline",
    ("SD", "4 channels"): "StableDiffusionInpaintPipeline",
    ("SD", "9 channels"): "StableDiffusionInpaintPipeline",
}
slow = pytest.mark.slow


class Way:
    """One way to begin with pictures, by a tiny checkpoint of ours and diffusers' own pipeline."""

    def __init__(self, family: str, kind: str, folder: Path, **vae: Any) -> None:
        self.family, self.kind = family, kind
        save = {"SDXL": save_sdxl, "SD": save_sd}[family]
        channels = {"8 channels": 8, "9 channels": 9}.get(kind, 4)
        self.model = save(folder / "model", in_channels=channels)
        config = self.model / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | vae))
        self.ours, parts = Ours(self.model), load_pipeline(self.model).components
        extra = {} if family == "SDXL" else NO_CHECKER
        pipeline_class = getattr(diffusers, PIPELINES[family, kind])
        taken = inspect.signature(pipeline_class).parameters
        parts = {name: part for name, part in parts.items() if name in taken}
        self.pipeline = pipeline_class(**parts, **extra)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pictures, self.masks = [], []
        random = np.random.default_rng(4)
        for number in range(BATCH):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            picture, mask = folder / f"picture{number}.png", folder / f"mask{number}.png"
            Image.fromarray(pixels).save(picture)
            white = np.zeros((SIDE, SIDE), np.uint8)
            white[8 * number + 3 : 40, 5 : 24 + 8 * number] = 255
            Image.fromarray(white).save(mask)
            self.pictures.append(str(picture))
            self.masks.append(str(mask))

    @property
    def inpaints(self) -> bool:
        return self.kind in ("4 channels", "9 channels")

    def config(self, *, batch: int = BATCH, **settings: Any) -> Any:
        size = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS}
        config = make_config(self.model, **{"batch": batch, **size})
        prompts = []
        for number, prompt in enumerate(config.prompts):
            own = {"image": self.pictures[number]}
            own |= {"mask_image": self.masks[number]} if self.inpaints else {}
            prompts.append(prompt.model_dump() | own)
        return make_config(self.model, **{**size, "prompts": prompts, **settings})

    def by_diffusers(self, config: Any, output_type: str = "latent", **options: Any) -> Any:
        opened = {"image": [Image.open(prompt.image) for prompt in config.prompts]}
        if self.inpaints:
            opened["mask_image"] = [Image.open(prompt.mask_image) for prompt in config.prompts]
        if "height" in inspect.signature(self.pipeline.__call__).parameters:
            options |= {"height": SIDE, "width": SIDE}
        with scheduled(self.pipeline, config):
            return self.pipeline(
                prompt=[prompt.prompt for prompt in config.prompts],
                negative_prompt=[prompt.negative_prompt for prompt in config.prompts],
                **opened,
                num_inference_steps=STEPS,
                guidance_scale=config.guidance_scale,
                generator=generators_of(config),
                output_type=output_type,
                **options,
            ).images


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(way, id=", ".join(way), marks=[slow] if way[0] == "SD" else [])
        for way in PIPELINES
    ],
)
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return Way(*request.param, tmp_path_factory.mktemp("way"))


@pytest.mark.parametrize(
    "strength", [s if s == 0.5 else pytest.param(s, marks=slow) for s in STRENGTHS]
)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_equals_diffusers(
    way: Way, scheduler: str, strength: float, parity_table: ParityTable
) -> None:
    config = way.config(scheduler=scheduler, strength=strength)
    cell = (f"from pictures, {way.family}, {way.kind}", scheduler, f"strength {strength}")
    if SCHEDULERS[scheduler].class_name in DIFFERENT and strength < 1:
        found = way.ours.denoise(config)
        assert np.isfinite(found).all()
        off = relative_difference(way.by_diffusers(config, strength=strength).numpy(), found)
        parity_table.add(*cell, f"diffusers is {100 * off:.1f} % off")
        return
    try:
        expected = way.by_diffusers(config, strength=strength)
    except REFUSALS as error:
        with pytest.raises(BadSettingError):
            way.ours.denoise(config)
        parity_table.add(*cell, f"diffusers: {type(error).__name__}")
        return
    difference = relative_difference(way.ours.denoise(config), expected.numpy())
    parity_table.add(*cell, f"{difference:.0e}")
    assert difference < 1e-4


def test_pixels_equal_diffusers(way: Way) -> None:
    """By default strengths, on both backends; SD's own scheduler is not right in diffusers."""
    config = way.config(**({"scheduler": "ddim"} if way.family == "SD" else {}))
    expected = np.stack([np.asarray(image) for image in way.by_diffusers(config, "pil")])
    for ours in (way.ours, Ours(way.model, backend="torch")):
        found = ours.decode(ours.denoise(config))
        assert pixel_difference(found, expected) <= 2


def test_an_image_is_the_same_alone(way: Way) -> None:
    """Each draws by its own seed what it begins with, also where several begin with one picture."""
    together = way.ours.denoise(way.config(strength=0.6))
    alone = way.ours.denoise(way.config(batch=1, strength=0.6))
    assert relative_difference(alone[0], together[0]) < 1e-5
    several = way.config(batch=1, strength=0.6, num_images_per_prompt=2)
    second = way.config(batch=1, strength=0.6, seed=several.image_seeds()[1])
    found = way.ours.denoise(several)
    assert relative_difference(found[1], way.ours.denoise(second)[0]) < 1e-5
    assert relative_difference(found[1], found[0]) > 0.01


@pytest.mark.slow
def test_a_vae_that_centres_its_latents_equals_diffusers(tmp_path: Path) -> None:
    """As Playground's; diffusers' image to image is right there, its inpainting is not."""
    vae = {"latents_mean": [-1.6, 0.5, 1.2, 0.1], "latents_std": [8.4, 6.1, 5.3, 7.7]}
    way = Way("SDXL", "image", tmp_path, **vae, scaling_factor=0.5)
    config = way.config(strength=0.4)
    expected = way.by_diffusers(config, strength=0.4)
    found = way.ours.denoise(config)
    assert relative_difference(found, expected.numpy()) < 1e-4
    pixels = np.stack([np.asarray(i) for i in way.by_diffusers(config, "pil", strength=0.4)])
    assert pixel_difference(way.ours.decode(found), pixels) <= 2


@pytest.mark.slow
def test_a_region_made_anew_and_pasted_equals_diffusers(tmp_path: Path) -> None:
    way = Way("SDXL", "4 channels", tmp_path)
    config = way.config(batch=1, strength=0.6, padding_mask_crop=6)
    (prompt,) = config.prompts
    (expected,) = way.pipeline(
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        image=Image.open(prompt.image),
        mask_image=Image.open(prompt.mask_image),
        padding_mask_crop=6,
        **{"height": SIDE, "width": SIDE, "strength": 0.6, "num_inference_steps": STEPS},
        guidance_scale=config.guidance_scale,
        generator=generators_of(config),
    ).images
    images = way.ours.decode(way.ours.denoise(config))
    (found,) = paste(images, way.ours.image_latents(config))
    assert pixel_difference(found, np.asarray(expected)) <= 2


def test_a_scheduler_on_the_host_equals_diffusers(way: Way) -> None:
    clipping = dict(scheduler="ddim", scheduler_options={"clip_sample": True}, guidance_scale=2.0)
    config = way.config(strength=0.4, **clipping)
    expected = way.by_diffusers(config, strength=0.4)
    assert relative_difference(way.ours.denoise(config), expected.numpy()) < 1e-4


@pytest.mark.slow
@pytest.mark.long
def test_eight_devices_give_what_one_gives(way: Way) -> None:
    """Encoding, denoising and decoding, each on a mesh of its own kind."""
    config = way.config(batch=2, strength=0.6)
    many = Ours(way.model, mesh="data=2,cfg=2,rows=2")
    expected = way.ours.denoise(config)
    assert relative_difference(many.denoise(config), expected) < 1e-4
    assert many.denoiser.facts()["devices"] == 8
    assert pixel_difference(many.decode(expected), way.ours.decode(expected)) <= 1


def test_one_program_denoises_texts_pictures_and_masks(way: Way) -> None:
    """What a run begins with is data; nine channels have no text alone."""
    ours = Ours(way.model)
    configs = [way.config(strength=0.5), way.config(strength=0.9, scheduler="dpmpp_2m")]
    if way.kind == "4 channels":
        plain = [prompt.model_copy(update={"mask_image": None}) for prompt in configs[0].prompts]
        texts = [prompt.model_copy(update={"image": None}) for prompt in plain]
        configs += [
            configs[0].model_copy(update={"prompts": tuple(plain)}),
            configs[0].model_copy(update={"prompts": tuple(texts), "strength": None}),
        ]
    for config in configs:
        ours.denoise(config)
    compiled = [each.name for each in ours.programs.each if each.name.startswith("denoise")]
    assert compiled == ["denoise_guided"]
