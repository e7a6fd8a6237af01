"""Every prompt option gives the latents that diffusers' own pipeline gives for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.conditions.encoding import check_prompt_options
from common.errors import BadSettingError
from tests.conftest import Run
from tests.in_process import Ours, load_pipeline, make_config, relative_difference, run_pipeline
from tests.tiny_checkpoints import save_sd, save_sdxl

SMALL = dict(height=64, width=64, num_inference_steps=3, batch=2)
LONG = "a large red star on a blue background and " * 12


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Ours]:
    model = save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")
    return model, load_pipeline(model), Ours(model)


def mend(pipeline: Any) -> Any:
    """diffusers 0.42 reads text_model.final_layer_norm, which transformers 5 has moved up."""
    encoder = pipeline.text_encoder
    if not hasattr(encoder, "text_model"):
        encoder.__dict__["text_model"] = encoder
    return pipeline


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Ours]:
    model = save_sd(tmp_path_factory.mktemp("tiny") / "sd")
    return model, mend(load_pipeline(model)), Ours(model)


def prompts(*texts: str, **shared: str | None) -> list[dict[str, Any]]:
    return [{"prompt": text, "negative_prompt": "blurry", **shared} for text in texts]


@pytest.mark.parametrize(
    "settings",
    [
        dict(prompts=prompts("a red star", "a ring", prompt_2="a cross")),
        dict(prompts=prompts("a red star", "a ring", negative_prompt_2="noisy")),
        dict(prompts=prompts("a red star", "a ring", prompt_2="a", negative_prompt_2="")),
        dict(clip_skip=1),
        dict(prompts=prompts(LONG, "a ring")),
        dict(original_size=(512, 768), target_size=(64, 96)),
        dict(crops_coords_top_left=(16, 32)),
        dict(
            negative_original_size=(32, 48),
            negative_target_size=(64, 64),
            negative_crops_coords_top_left=(8, 8),
        ),
        dict(negative_original_size=(32, 48)),  # diffusers asks for both sizes
    ],
    ids=str,
)
def test_sdxl_options(sdxl: tuple[Path, Any, Ours], settings: dict[str, Any]) -> None:
    model, pipeline, ours = sdxl
    plain = ours.denoise(make_config(model, **SMALL))
    # diffusers lays out the negative sizes of several prompts wrongly: [neg, pos, neg, pos] beside
    # embeddings [neg, neg, pos, pos]; one prompt at a time is right.
    batch = 1 if "negative_target_size" in settings else 2
    config = make_config(model, **{**SMALL, "batch": batch}, **settings)
    latents = ours.denoise(config)
    assert relative_difference(latents, run_pipeline(pipeline, config)[0]) < 1e-4
    plain = plain[:batch]
    has_effect = settings != dict(negative_original_size=(32, 48))
    assert (relative_difference(latents, plain) > 1e-4) == has_effect


@pytest.mark.parametrize("settings", [dict(clip_skip=1), dict(prompts=prompts(LONG, "a ring"))])
def test_sd_options(sd: tuple[Path, Any, Ours], settings: dict[str, Any]) -> None:
    model, pipeline, ours = sd
    config = make_config(model, **SMALL, **settings)
    assert relative_difference(ours.denoise(config), run_pipeline(pipeline, config)[0]) < 1e-4


def test_options_for_two_encoders_are_refused_where_there_is_one(
    sd: tuple[Path, Any, Ours],
) -> None:
    config = make_config(sd[0], prompts=prompts("a ring", prompt_2="a cross"))
    with pytest.raises(BadSettingError, match="--prompt_2 is for checkpoints with two"):
        check_prompt_options(config, sd[2].checkpoint)


@pytest.mark.parametrize(("family", "most"), [("SDXL", 2), ("SD", 3)])
def test_clip_skip_beyond_the_layers_is_refused(
    family: str, most: int, sd: tuple[Path, Any, Ours], sdxl: tuple[Path, Any, Ours]
) -> None:
    model, pipeline, ours = sdxl if family == "SDXL" else sd
    config = make_config(model, **SMALL, clip_skip=most)
    check_prompt_options(config, ours.checkpoint)
    assert relative_difference(ours.denoise(config), run_pipeline(pipeline, config)[0]) < 1e-4
    with pytest.raises(BadSettingError, match=f"at most {most}"):
        check_prompt_options(config.model_copy(update={"clip_skip": most + 1}), ours.checkpoint)


def test_sizes_are_refused_where_the_unet_takes_none(
    sd: tuple[Path, Any, Ours], tmp_path: Path, quick_stage: Run
) -> None:
    result = quick_stage(1, "--model_id", sd[0], "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    result = quick_stage(2, "--output_dir", tmp_path, "--original_size", "64,64")
    assert result.returncode == 2
    assert "--original_size is for SDXL checkpoints" in result.stderr


Layout = Callable[[], dict[str, torch.Tensor]]
VECTORS = torch.Generator().manual_seed(4)
LAYOUTS: dict[str, dict[str, torch.Tensor]] = {
    "emb_params": {"emb_params": torch.randn(1, 32, generator=VECTORS)},
    "several vectors": {"emb_params": torch.randn(3, 32, generator=VECTORS)},
    "diffusers": {"<mark>": torch.randn(32, generator=VECTORS)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_textual_inversion_for_one_encoder(
    sd: tuple[Path, Any, Ours], tmp_path: Path, layout: str
) -> None:
    file = tmp_path / "style.safetensors"
    save_file(LAYOUTS[layout], file)
    token = "<mark>" if layout == "diffusers" else "style"
    text = [f"a red star in {token}", "a ring"]
    config = make_config(sd[0], **SMALL, prompts=prompts(*text))
    pipeline = load_pipeline(sd[0])
    pipeline.load_textual_inversion(str(file), token=token)
    latents = Ours(sd[0], embeddings=[f"{file}:{token}"]).denoise(config)
    assert relative_difference(latents, run_pipeline(pipeline, config)[0]) < 1e-4
    assert relative_difference(latents, sd[2].denoise(config)) > 1e-4


def test_textual_inversion_for_both_encoders(sdxl: tuple[Path, Any, Ours], tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}, file)
    config = make_config(sdxl[0], **SMALL, prompts=prompts("a star in style", "a ring"))
    pipeline, tensors = load_pipeline(sdxl[0]), load_file(file)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            tensors[key],
            token="style",
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
            text_encoder=getattr(pipeline, f"text_encoder{number}"),
        )
    latents = Ours(sdxl[0], embeddings=[str(file)]).denoise(config)
    assert relative_difference(latents, run_pipeline(pipeline, config)[0]) < 1e-4
    assert relative_difference(latents, sdxl[2].denoise(config)) > 1e-4


@pytest.mark.slow
def test_embeddings_computed_elsewhere(
    sdxl: tuple[Path, Any, Ours], tmp_path: Path, stage: Run
) -> None:
    """Any file with the right tensors does, also with more than 77 tokens of context."""
    model, pipeline, _ = sdxl
    run_dir = tmp_path / "run"
    small = ["--model_id", model, "--output_dir", run_dir, "--num_inference_steps", 3]
    assert stage(1, *small, "--prompt", "anything").returncode == 0
    g = torch.Generator().manual_seed(7)
    tensors = {
        "prompt_embeds": torch.randn(1, 154, 80, generator=g),
        "negative_prompt_embeds": torch.randn(1, 154, 80, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 24, generator=g),
        "negative_pooled_prompt_embeds": torch.randn(1, 24, generator=g),
    }
    save_file(tensors, run_dir / "stage1_embeddings.safetensors")
    result = stage(2, "--output_dir", run_dir)
    assert result.returncode == 0, result.stderr
    assert "warning" in result.stderr
    expected: dict[str, torch.Tensor] = {}
    pipeline(
        **tensors,
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(42)],
        callback_on_step_end=lambda _, __, ___, values: expected.update(values) or values,
        output_type="latent",
    )
    latents = load_file(run_dir / "stage2_latents.safetensors")["latents"].numpy()
    assert relative_difference(latents, expected["latents"].numpy()) < 1e-4
