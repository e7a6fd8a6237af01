"""A run that is cut in two takes the steps of the run in one, whatever the scheduler."""

from typing import Any

import pytest
import torch

from common.errors import BadSettingError
from common.sampling.beginning import FromLatents, FromNoise, Image
from common.sampling.sampler import Sampler, make_scheduler
from common.sampling.schedulers import SCHEDULERS
from common.sampling.step_range import StepRange, first_timesteps
from tests.refusals import refusal
from tests.tiny_checkpoints import SCHEDULER

SHAPE = (4, 6, 6)
STEPS = 25
WHOLE = StepRange()
# Their steps know nothing of those before: the second part ends with the first one's bits.
WITHOUT_HISTORY = ("euler", "euler_karras", "ddim", "heun", "dpm2")
# They grow their order anew after a cut.
WITH_HISTORY = ("lms", "lms_karras", "pndm", "dpmpp_2m", "dpmpp_2s", "unipc", "deis")


def build(name: str, step_range: StepRange, *, steps: int = STEPS, **changes: Any) -> Sampler:
    row, settings = SCHEDULERS[name], SCHEDULER | {"timestep_spacing": "leading"}
    scheduler = make_scheduler(settings, row.class_name, {**row.options, **changes})
    return Sampler(scheduler, num_inference_steps=steps, step_range=step_range)


def predict(sampler: Sampler, scaled: torch.Tensor, timestep: float) -> torch.Tensor:
    """What a model says that knows its data exactly: pictures of deviation 0.5."""
    cumulative = sampler.scheduler.alphas_cumprod
    low = int(timestep)
    alpha = torch.lerp(cumulative[low], cumulative[min(low + 1, 999)], timestep - low)
    prediction: torch.Tensor = scaled * (1 - alpha) ** 0.5 / (0.25 * alpha + 1 - alpha)
    return prediction


def denoise(sampler: Sampler, x: torch.Tensor) -> torch.Tensor:
    """All steps of the sampler's own range."""
    generator = torch.Generator().manual_seed(1)
    for timestep in sampler.restart():
        scaled = sampler.scale_model_input(x, timestep)
        x = sampler.step(predict(sampler, scaled, float(timestep)), timestep, x, [generator])
    return x


def part(name: str, step_range: StepRange, given: torch.Tensor | None = None) -> torch.Tensor:
    """A run of a range of steps, from noise or from given latents."""
    sampler = build(name, step_range)
    sampler.restart()
    begin = FromNoise() if given is None else FromLatents(given)
    generator = torch.Generator().manual_seed(0)
    image = Image(index=0, generator=generator, sampler=sampler, shape=SHAPE)
    return denoise(sampler, begin.draw(image).latents)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"edm_euler"}))
def test_both_parts_together_take_every_step_once(name: str, share: float) -> None:
    whole = build(name, WHOLE)
    whole.restart()
    before = build(name, StepRange(denoising_end=share)).restart()
    after = build(name, StepRange(denoising_start=share)).restart()
    steps = first_timesteps(whole.scheduler)
    cut = 1000 - share * 1000
    assert float(before[0]) == float(steps[0])
    if name == "pndm":  # the first step is two evaluations, in both parts where they have two
        own = [len(each) - (len(each) > 1) for each in (before, after)]
        assert sum(own) == len(steps)
    else:
        assert torch.equal(torch.cat([before, after]), whole.scheduler.timesteps)
    if whole.scheduler.order == 1:
        assert float(after[0]) < cut <= float(steps[steps >= cut].min())


@pytest.mark.parametrize("share", [0.35, 0.8])
@pytest.mark.parametrize("name", [*WITHOUT_HISTORY, *WITH_HISTORY])
def test_a_run_cut_in_two_is_the_run_in_one(name: str, share: float) -> None:
    whole = part(name, WHOLE)
    between = part(name, StepRange(denoising_end=share))
    both = part(name, StepRange(denoising_start=share), between)
    distance = float((both - whole).norm() / whole.norm())
    assert distance < (1e-5 if name in WITHOUT_HISTORY else 0.05)


@pytest.mark.parametrize("strength", [0.3, 0.7])
@pytest.mark.parametrize("name", [*WITHOUT_HISTORY, *WITH_HISTORY])
def test_noised_pictures_come_out_as_pictures(name: str, strength: float) -> None:
    """Their deviation is the data's; of LMS and PNDM in diffusers it is not."""
    generator = torch.Generator().manual_seed(5)
    pictures, noise = torch.randn((2, 64, *SHAPE), generator=generator)
    sampler = build(name, StepRange(strength=strength), steps=200)
    found = denoise(sampler, sampler.add_noise(pictures * 0.5, noise))
    assert float(found.std()) == pytest.approx(0.5, rel=0.06)


def test_strength_counts_steps_as_diffusers_does() -> None:
    ranges = {s: build("euler", StepRange(strength=s), steps=50) for s in (1, 0.5, 0.58)}
    assert [len(sampler.restart()) for sampler in ranges.values()] == [50, 25, 28]
    for step_range in (StepRange(strength=0.03), StepRange(denoising_end=0.001)):
        with refusal(BadSettingError, f"{step_range.in_words()} leaves none of the 25 steps"):
            build("euler", step_range).restart()
    with refusal(BadSettingError, "EDMEulerScheduler has none: choose another --scheduler"):
        build("edm_euler", StepRange(denoising_start=0.5)).restart()
    with refusal(BadSettingError, "PNDMScheduler with Runge–Kutta steps", "skip_prk_steps=true"):
        build("pndm", StepRange(strength=0.5), skip_prk_steps=False).restart()
