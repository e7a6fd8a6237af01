"""The table of conditions; a new one comes from one module, and reaches all that a run has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from common.conditions.guidance_scale import GuidanceScale
from common.conditions.prompt_condition import PromptCondition
from common.conditions.sizes import SizeCondition
from common.conditions.table import CONDITIONS, conditions_of
from common.files import artifacts
from common.files.stage_table import LATENTS_FILE
from tests.configs import PROMPTS, make_config
from tests.conftest import DEMO
from tests.in_process import load_pipeline, relative_difference, run_pipeline
from tests.own_process import import_from, run_stages
from tests.tiny_checkpoints import save_sdxl

SHIFT = 0.3
# All that a condition needs: its settings, what it prepares, what it tells, its row in the table.
NEW_CONDITION = """
from common.conditions.base import Condition
from common.conditions.table import CONDITIONS
from common.declared import LATENTS, SAMPLING, Settings, setting


class ShiftSettings(Settings):
    mid_block_shift: float = setting(
        0.0, "Added to the output of the UNet's mid block.", metavar="X", group=SAMPLING,
        shapes=(LATENTS,), web_ui="Mid block shift",
    )


class MidBlockShift(Condition):
    settings = ShiftSettings

    def __init__(self, shift, skips):
        self.shift, self.skips = shift, skips

    @classmethod
    def of(cls, config, unet_config):
        if not config.mid_block_shift:
            return None
        blocks, layers = len(unet_config["block_out_channels"]), unet_config["layers_per_block"]
        # Of the first convolution, of the layers, of the downsamplers between the blocks.
        return cls(config.mid_block_shift, 1 + blocks * layers + blocks - 1)

    def prepare(self, images, prediction):
        import torch

        shift = torch.full((images.count, 1, 1, 1), self.shift, dtype=images.dtype)
        return {"mid_block_shift": shift}

    def tell(self, tensors, call):
        call["mid_block_additional_residual"] = tensors["mid_block_shift"]
        call["down_block_additional_residuals"] = [0 * tensors["mid_block_shift"]] * self.skips


CONDITIONS.append(MidBlockShift)
"""


def run_with_it(folder: Path, runs: list[list[Any]]) -> str:
    """Run stages by their flags in a process that imports the condition. Returns what they say."""
    ended = run_stages(runs, first=import_from(folder, "new_condition"), devices=8)
    assert not [each.error for each in ended if each.code]
    return "".join(each.said for each in ended)


class Shifted:
    """Two pictures by both backends and on two meshes, with the shift and without."""

    def __init__(self, folder: Path) -> None:
        (folder / "new_condition.py").write_text(NEW_CONDITION)
        self.folder, self.model = folder, save_sdxl(folder / "model")
        base = self.folder / "run"
        settings = ["--model_id", self.model, "--prompt", PROMPTS[0], "--negative_prompt", "blurry"]
        settings += ["--num_inference_steps", 3, "--num_images_per_prompt", 2]
        settings += ["--mid_block_shift", SHIFT]

        def denoise(name: str, *flags: Any) -> list[Any]:
            return [2, "--input_dir", base, "--output_dir", folder / name, *flags]

        jax, torch = ("--backend", "jax"), ("--backend", "torch")
        self.said = run_with_it(
            folder,
            [
                [1, "--output_dir", base, *settings],
                denoise("jax", *jax, "--mesh", "single"),
                denoise("torch", *torch),
                denoise("jax 0", *jax, "--mesh", "single", "--mid_block_shift", 0),
                denoise("torch 0", *torch, "--mid_block_shift", 0),
                denoise("again", *torch, "--mid_block_shift", 0),
                denoise("again", *torch, "--skip_fresh"),
                denoise("jax", *jax, "--skip_fresh"),
                [3, "--output_dir", folder / "jax", "--backend", "torch"],
                denoise("mesh", *jax, "--mesh", "data=2,cfg=2,rows=2"),
            ],
        )

    def latents(self, name: str) -> np.ndarray:
        return np.asarray(load_file(self.folder / name / LATENTS_FILE)["latents"])

    def by_diffusers(self, shift: float) -> np.ndarray:
        """Its own pipeline, with a mid block that gives more."""
        pipeline = load_pipeline(self.model)
        pipeline.unet.mid_block.register_forward_hook(lambda _, __, output: output + shift)
        config = make_config(
            self.model,
            negative_prompt="blurry",
            height=64,
            width=64,
            num_inference_steps=3,
            num_images_per_prompt=2,
        )
        return run_pipeline(pipeline, config)[0]


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Shifted:
    return Shifted(tmp_path_factory.mktemp("new condition"))


@pytest.mark.slow
def test_a_new_condition_reaches_both_backends_and_every_mesh(shifted: Shifted) -> None:
    """Told by the UNet's own arguments, it gives what diffusers' changed UNet gives."""
    expected, without = shifted.by_diffusers(SHIFT), shifted.by_diffusers(0)
    assert relative_difference(expected, without) > 1e-2
    for name in ("jax", "torch", "mesh", "again"):
        assert relative_difference(shifted.latents(name), expected) < 1e-5, name
    for name in ("jax 0", "torch 0"):
        assert relative_difference(shifted.latents(name), without) < 1e-5, name


@pytest.mark.slow
def test_its_setting_is_a_setting_as_any_other(shifted: Shifted) -> None:
    for name, shift in (("jax", SHIFT), ("torch", SHIFT), ("mesh", SHIFT), ("jax 0", 0.0)):
        header = artifacts.inspect(shifted.folder / name / LATENTS_FILE).header
        assert header is not None
        assert header.recipe.settings["latents"]["mid_block_shift"] == shift
        assert "mid_block_shift" not in header.recipe.settings["embeddings"]
    said = shifted.said.splitlines()
    assert sum(line.startswith("stage 2: fresh") for line in said) == 1
    # Latents without it are stale for the run.
    assert any(f"mid_block_shift 0.0 → {SHIFT}" in line for line in said)
    with Image.open(shifted.folder / "jax" / "output_image_0000.png") as image:
        assert f"Mid block shift: {SHIFT}" in image.info["parameters"]


def test_a_run_has_the_conditions_of_its_unet() -> None:
    config = make_config(DEMO, guidance_scale=3.0)

    def kinds(**unet_config: Any) -> list[type]:
        return [type(condition) for condition in conditions_of(config, unet_config)]

    assert kinds() == [PromptCondition]
    assert kinds(addition_embed_type="text_time") == [PromptCondition, SizeCondition]
    assert kinds(time_cond_proj_dim=16) == [PromptCondition, GuidanceScale]
    widest = dict(addition_embed_type="text_time", time_cond_proj_dim=16)
    by_channels = kinds(**widest, in_channels=9), kinds(**widest, in_channels=8)
    assert {*by_channels[0]} | {*by_channels[1]} == {*CONDITIONS}
    assert {*by_channels[0]} & {*by_channels[1]} == {*kinds(**widest)}
