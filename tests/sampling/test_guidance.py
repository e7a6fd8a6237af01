"""Guidance equals its formulas and diffusers' own, in both backends' arrays."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from common.conditions.base import CONDITIONAL, PICTURE, UNCONDITIONAL
from common.sampling.guidance import EditGuidance, Guidance, guidance_of
from tests.configs import make_config
from tests.conftest import DEMO

ROUNDING = 1e-5  # float32
BACKENDS = {"torch": (torch, torch.from_numpy), "jax": (jnp, jnp.asarray)}


def predictions() -> dict[str, np.ndarray]:
    """Two predictions that are not alike, [B, C, h, w]."""
    generator = np.random.default_rng(3)
    shape = (2, 4, 6, 5)
    return {
        UNCONDITIONAL: generator.normal(0.3, 1.0, shape).astype(np.float32),
        CONDITIONAL: generator.normal(-0.1, 0.7, shape).astype(np.float32),
    }


def combine(guidance: Guidance, predicted: dict[str, np.ndarray], backend: str) -> np.ndarray:
    arrays: Any = BACKENDS[backend][0]
    convert: Any = BACKENDS[backend][1]
    given = {name: convert(array) for name, array in predicted.items()}
    weights = {name: convert(array) for name, array in guidance.weights().items()}
    return np.asarray(guidance.combine(given, weights, arrays))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.5, 7.5, 30.0])
def test_two_predictions_are_one_by_the_formula(backend: str, scale: float) -> None:
    both = predictions()
    negative, positive = (both[name].astype(np.float64) for name in (UNCONDITIONAL, CONDITIONAL))
    expected = negative + scale * (positive - negative)
    found = combine(Guidance(scale=scale), both, backend)
    np.testing.assert_allclose(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling_is_that_of_diffusers_and_of_the_paper(backend: str, rescale: float) -> None:
    """With each image's deviation, as in Lin et al. 2023, equations 14 to 16."""
    both, scale = predictions(), 7.5
    negative, positive = (both[name].astype(np.float64) for name in (UNCONDITIONAL, CONDITIONAL))
    guided = negative + scale * (positive - negative)
    axes = (1, 2, 3)
    ratio = positive.std(axis=axes, keepdims=True) / guided.std(axis=axes, keepdims=True)
    by_formula = rescale * (guided * ratio) + (1 - rescale) * guided
    by_diffusers = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(positive), rescale)
    found = combine(Guidance(scale=scale, rescale=rescale), both, backend)
    np.testing.assert_allclose(found, by_formula, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found, by_diffusers.numpy(), rtol=ROUNDING, atol=ROUNDING)
    images = [
        combine(
            Guidance(scale=scale, rescale=rescale),
            {k: v[i : i + 1] for k, v in both.items()},
            backend,
        )
        for i in range(2)
    ]
    np.testing.assert_allclose(found, np.concatenate(images), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_prediction_stays_as_it_is(backend: str) -> None:
    alone = {CONDITIONAL: predictions()[CONDITIONAL]}
    found = combine(Guidance(scale=7.5, rescale=0.5), alone, backend)
    np.testing.assert_array_equal(found, alone[CONDITIONAL])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_equal_predictions_are_that_one(backend: str) -> None:
    positive = predictions()[CONDITIONAL]
    both = {UNCONDITIONAL: positive, CONDITIONAL: positive}
    np.testing.assert_array_equal(combine(Guidance(scale=9.0), both, backend), positive)


def test_guided_steps_are_those_of_diffusers_guider() -> None:
    for evaluations in (1, 7, 13, 25):
        for start, end in ((0.0, 1.0), (0.1, 0.9), (0.33, 0.34), (0.7, 0.7), (0.99, 1.0)):
            ours = Guidance(scale=5.0, start=start, end=end)
            guider = ClassifierFreeGuidance(guidance_scale=5.0, start=start, stop=end)
            for i in range(evaluations):
                guider.set_state(step=i, num_inference_steps=evaluations, timestep=None)
                predicted = ours.predictions(i, evaluations)
                assert len(predicted) == guider.num_conditions
                assert predicted[-1] == CONDITIONAL


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_scale_of_1_or_less_is_no_guidance(scale: float) -> None:
    assert {Guidance(scale=scale).predictions(i, 9) for i in range(9)} == {(CONDITIONAL,)}


def test_a_runs_guidance_is_what_its_settings_say() -> None:
    given: dict[str, Any] = {"guidance_scale": 5.0, "guidance_rescale": 0.2}
    config = make_config(DEMO, **given, guidance_start=0.1, guidance_end=0.8)
    expected = Guidance(scale=5.0, rescale=0.2, start=0.1, end=0.8)
    assert guidance_of(config, {"time_cond_proj_dim": None}, 1.5) == expected
    # A UNet that is told the scale needs no second prediction.
    told = guidance_of(config, {"time_cond_proj_dim": 16}, 1.5)
    assert {told.predictions(i, 9) for i in range(9)} == {(CONDITIONAL,)}


def test_an_edit_is_guided_by_text_and_picture() -> None:
    """By numbers that a head can check."""
    guidance = guidance_of(make_config(DEMO, guidance_scale=3.0), {"in_channels": 8}, 2.0)
    assert isinstance(guidance, EditGuidance)
    assert guidance.most_predictions() == (UNCONDITIONAL, PICTURE, CONDITIONAL)
    predicted = {
        name: torch.full((1, 1, 1, 2), value)
        for name, value in ((UNCONDITIONAL, 1.0), (PICTURE, 2.0), (CONDITIONAL, 4.0))
    }
    weights = {name: torch.from_numpy(value) for name, value in guidance.weights().items()}
    found = guidance.combine(predicted, weights, torch)
    assert found.flatten().tolist() == [1 + 3 * (4 - 2) + 2 * (2 - 1)] * 2
    only = {CONDITIONAL: predicted[CONDITIONAL]}
    assert guidance.combine(only, weights, torch).equal(predicted[CONDITIONAL])
