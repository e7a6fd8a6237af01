"""The latents that `--save_trajectory` keeps are those that diffusers' step-end callback sees."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.files.picture_files import read_picture_record
from common.sampling.denoising import Denoised
from common.sampling.schedulers import scheduler_choice
from tests.conftest import Run
from tests.in_process import Ours, load_pipeline, make_config, relative_difference
from tests.tiny_checkpoints import save_sdxl

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="module")
def ours(model: Path) -> Ours:
    return Ours(model)


def by_diffusers(model: Path, config: Any) -> dict[int, np.ndarray]:
    """Number of steps → latents after them, as diffusers' callback is given them."""
    pipeline = load_pipeline(model)
    own = type(pipeline.scheduler).__name__
    name, options = scheduler_choice(config.scheduler, config.scheduler_options, own)
    module = __import__("diffusers")
    pipeline.scheduler = getattr(module, name).from_config(pipeline.scheduler.config, **options)
    seen: dict[int, np.ndarray] = {}

    def keep(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen[step + 1] = values["latents"].numpy().copy()
        return values

    pipeline(
        prompt=[prompt.prompt for prompt in config.prompts],
        negative_prompt=[prompt.negative_prompt for prompt in config.prompts],
        height=config.height,
        width=config.width,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in config.image_seeds()],
        callback_on_step_end=keep,
        output_type="latent",
    )
    return seen


@pytest.mark.parametrize(
    ("scheduler", "options", "every", "steps_per_call"),
    [
        ("euler", {}, 1, None),
        ("ddim", {"clip_sample": True}, 2, None),  # steps on the host
        pytest.param("dpmpp_2m", {}, 4, None, marks=pytest.mark.slow),
        # two evaluations for each step but the last
        pytest.param("heun", {}, 3, None, marks=pytest.mark.slow),
        pytest.param("heun", {}, 3, 4, marks=pytest.mark.slow),
    ],
)
def test_a_trajectory_equals_diffusers(
    ours: Ours,
    model: Path,
    scheduler: str,
    options: dict[str, Any],
    every: int,
    steps_per_call: int | None,
) -> None:
    config = make_config(
        model, batch=2, scheduler=scheduler, scheduler_options=options, num_inference_steps=STEPS
    )

    def denoise(every: int | None) -> Denoised:
        return ours.denoised(config, save_trajectory=every, steps_per_call=steps_per_call)

    with_trajectory, without = denoise(every), denoise(None)
    assert with_trajectory.latents.equal(without.latents)
    assert without.trajectory is None and with_trajectory.trajectory is not None
    expected = by_diffusers(model, config)
    last = max(expected)
    assert with_trajectory.kept_after == sorted({*range(every, last + 1, every), last})
    for number, latents in zip(
        with_trajectory.kept_after, with_trajectory.trajectory.numpy(), strict=True
    ):
        assert relative_difference(latents, expected[number]) < 1e-4
    assert with_trajectory.trajectory[-1].equal(with_trajectory.latents)


def test_stage_3_shows_the_trajectory_of_its_latents(run_copy: Path, quick_stage: Run) -> None:
    result = quick_stage(2, "--output_dir", run_copy, "--save_trajectory", 2)
    assert result.returncode == 0, result.stderr
    kept = load_file(run_copy / "stage2_trajectory.safetensors")
    assert kept["steps"].tolist() == [2, 4] and kept["latents"].shape == (2, 2, 4, 16, 16)
    latents = load_file(run_copy / "stage2_latents.safetensors")["latents"]
    assert kept["latents"][-1].equal(latents)

    result = quick_stage(3, "--output_dir", run_copy, "--skip_fresh")
    assert result.returncode == 0, result.stderr
    strip = np.asarray(Image.open(run_copy / "output_trajectory.png"))
    assert strip.shape == (2 * 128, 2 * 128, 3)  # two images down, two steps across
    pictures = [np.asarray(Image.open(run_copy / f"output_image_000{i}.png")) for i in (0, 1)]
    assert np.array_equal(strip[:, 128:], np.concatenate(pictures))
    assert not np.array_equal(strip[:, :128], strip[:, 128:])
    with Image.open(run_copy / "output_trajectory.webp") as animation:
        assert getattr(animation, "n_frames", 1) == 2
    record = read_picture_record(run_copy / "output_trajectory.webp")
    assert record is not None and list(record["inputs"]) == ["stage2_trajectory.safetensors"]

    # Fresh now; another run's trajectory is not shown, and a new run removes the old one.
    assert "stage 3: fresh" in quick_stage(3, "--output_dir", run_copy, "--skip_fresh").stdout
    saved = (run_copy / "stage2_trajectory.safetensors").read_bytes()
    for number, flags in ((2, ("--seed", 7, "--num_inference_steps", 2)), (3, ())):
        result = quick_stage(number, "--output_dir", run_copy, *flags)
        assert result.returncode == 0, result.stderr
    assert not list(run_copy.glob("*trajectory*"))
    (run_copy / "stage2_trajectory.safetensors").write_bytes(saved)
    result = quick_stage(3, "--output_dir", run_copy)
    assert result.returncode == 0, result.stderr
    assert "stage2_trajectory.safetensors is not decoded" in result.stderr
    assert "seeds [42, 43] → [7, 8]" in result.stderr
    assert not list(run_copy.glob("output_trajectory*"))
