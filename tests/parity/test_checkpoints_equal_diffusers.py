"""Checkpoints of every form give what diffusers' own pipeline gives with the same parts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from safetensors.torch import load_file, save_file

from common.errors import BadInputFileError, BadSettingError, StageError, UnfitEnvironmentError
from common.models.checkpoint import Checkpoint
from common.models.find import open_checkpoint
from common.models.weights import load_model
from common.runs.generation import RunSettings
from tests.conftest import LONG, Run
from tests.in_process import (
    Ours,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
    run_pipeline,
)
from tests.original_layout import original_unet, save_original
from tests.tiny_checkpoints import save_sd, save_sdxl

SMALL = dict(height=64, width=64, num_inference_steps=3, batch=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, sdxl: Path) -> Path:
    """An SDXL checkpoint whose UNet and VAE differ from the first one's."""
    folder = tmp_path_factory.mktemp("tiny") / "other"
    shutil.copytree(sdxl, folder)
    for name in ("unet", "vae"):
        tensors = load_file(folder / name / WEIGHTS)
        save_file({key: 1.1 * tensor for key, tensor in tensors.items()}, folder / name / WEIGHTS)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub; whatever is not in it cannot be had."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield tmp_path / "hub"


def put_into_hub(hub: Path, repository: str, content: Path, revision: str = "main") -> Path:
    """Lay a folder into the hub's cache as a download would."""
    root = hub / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / revision).write_text(COMMIT)
    shutil.copytree(content, root / "snapshots" / COMMIT)
    # What the hub lists, of which a download by patterns leaves some out.
    names = [str(path.relative_to(content)) for path in content.rglob("*") if path.is_file()]
    entries = {
        name: TreeCacheEntry(size=1, blob_id="0" * 40)
        for name in [*names, "safety_checker/model.bin"]
    }
    write_tree_cache(root, COMMIT, entries)
    return root / "snapshots" / COMMIT


def rename_to_variant(folder: Path, variant: str) -> None:
    """Give all weights of a checkpoint the variant's name."""
    for path in folder.rglob("*model.safetensors"):
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def check_equal(ours: Ours, pipeline: Any, model: str | Path) -> np.ndarray:
    """Latents and pictures beside diffusers'. Returns the latents."""
    config = make_config(Path(model), **SMALL)
    latents = ours.denoise(config)
    expected, expected_pictures = run_pipeline(pipeline, config)
    assert relative_difference(latents, expected) < 1e-4
    assert pixel_difference(ours.decode(latents), expected_pictures) <= 2
    return latents


@pytest.mark.parametrize("family", ["SDXL", pytest.param("SD", marks=LONG)])
def test_a_single_file(family: str, sdxl: Path, sd: Path, tmp_path: Path) -> None:
    folder = {"SDXL": sdxl, "SD": sd}[family]
    file = save_original(folder, tmp_path / "model.safetensors")
    # Only configs, so that no weights can come from there.
    configs = tmp_path / "configs"
    shutil.copytree(folder, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    ours = Ours(file, settings={"single_file_config": str(configs)})
    check_equal(ours, load_pipeline(folder), file)


@pytest.mark.slow
@pytest.mark.long
def test_a_single_file_by_the_stages(sdxl: Path, tmp_path: Path, stage: Run) -> None:
    file = save_original(sdxl, tmp_path / "model.safetensors")
    small = ["--num_inference_steps", 2, "--output_dir"]
    for run_dir, model in (
        ("one", ["--model_id", file, "--single_file_config", sdxl]),
        ("folder", ["--model_id", sdxl]),
    ):
        assert stage(1, *model, *small, tmp_path / run_dir).returncode == 0
        for number in (2, 3):
            result = stage(number, "--output_dir", tmp_path / run_dir)
            assert result.returncode == 0, result.stderr
    latents = [
        load_file(tmp_path / run_dir / "stage2_latents.safetensors")["latents"].numpy()
        for run_dir in ("one", "folder")
    ]
    assert relative_difference(*latents) < 1e-5
    # Another name of the same file changes nothing.
    moved = file.rename(tmp_path / "renamed.safetensors")
    again = ["--model_id", moved, "--single_file_config", sdxl, *small, tmp_path / "one"]
    assert "stage 1: fresh" in stage(1, *again, "--skip_fresh").stdout
    assert "stage 2: fresh" in stage(2, "--output_dir", tmp_path / "one", "--skip_fresh").stdout


@pytest.mark.parametrize(
    "form",
    [
        *("component folder", "original file", "hub file"),
        *(pytest.param(form, marks=LONG) for form in ("pipeline folder", "file", "hub")),
    ],
)
def test_a_unet_from_elsewhere(
    form: str, sdxl: Path, other: Path, tmp_path: Path, hub: Path
) -> None:
    weights = other / "unet" / WEIGHTS
    if form == "original file":
        tensors = {f"model.diffusion_model.{n}": t for n, t in original_unet(other).items()}
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "unet.safetensors")
    if form.startswith("hub"):
        put_into_hub(hub, "maker/unet", other / "unet")
    unet = {
        "component folder": other / "unet",
        "pipeline folder": other,
        "file": weights,
        "original file": tmp_path / "unet.safetensors",
        "hub": "maker/unet",
        "hub file": f"maker/unet/{WEIGHTS}",
    }[form]
    pipeline = load_pipeline(sdxl)
    pipeline.unet = UNet2DConditionModel.from_pretrained(other / "unet")
    latents = check_equal(Ours(sdxl, settings={"unet": str(unet)}), pipeline, sdxl)
    own = Ours(sdxl).denoise(make_config(sdxl, **SMALL))
    assert relative_difference(latents, own) > 1e-3


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_vae_from_elsewhere(form: str, sdxl: Path, other: Path) -> None:
    vae = other / "vae" if form == "folder" else other / "vae" / WEIGHTS
    pipeline = load_pipeline(sdxl)
    pipeline.vae = AutoencoderKL.from_pretrained(other / "vae")
    ours = Ours(sdxl, settings={"vae": str(vae)})
    latents = check_equal(ours, pipeline, sdxl)
    assert pixel_difference(ours.decode(latents), Ours(sdxl).decode(latents)) > 2


def test_a_vae_of_its_own_scaling(sdxl: Path, tmp_path: Path) -> None:
    """Like sdxl-vae-fp16-fix: its config replaces the checkpoint's."""
    vae = tmp_path / "vae"
    shutil.copytree(sdxl / "vae", vae)
    config = json.loads((vae / "config.json").read_text())
    config |= {"scaling_factor": 0.3, "force_upcast": False}
    (vae / "config.json").write_text(json.dumps(config))
    pipeline = load_pipeline(sdxl)
    pipeline.vae = AutoencoderKL.from_pretrained(vae)
    pipeline.vae.to(torch.float32)
    check_equal(Ours(sdxl, settings={"vae": str(vae)}), pipeline, sdxl)


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_a_variant(source: str, sdxl: Path, other: Path, tmp_path: Path, hub: Path) -> None:
    """The variant's weights, even where there are plain ones beside them."""
    folder = tmp_path / "both"
    shutil.copytree(other, folder)
    rename_to_variant(folder, "fp16")
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        for path in (sdxl / name).glob("*.safetensors"):
            shutil.copy(path, folder / name)
    model: str | Path = folder
    if source == "hub":
        put_into_hub(hub, "maker/both", folder)
        model = "maker/both"
    pipeline = load_pipeline(other)
    check_equal(Ours(model, settings={"variant": "fp16"}), pipeline, model)
    plain, variant = (
        open_checkpoint(RunSettings(model_id=str(model), variant=name), ["unet"])
        for name in (None, "fp16")
    )
    assert plain.weights_fingerprint("unet") != variant.weights_fingerprint("unet")


def test_a_revision_of_a_hub_id(sdxl: Path, other: Path, tmp_path: Path, hub: Path) -> None:
    put_into_hub(hub, "maker/model", other, revision="v2")
    check_equal(
        Ours("maker/model", settings={"revision": "v2"}), load_pipeline(other), "maker/model"
    )
    with pytest.raises(UnfitEnvironmentError, match="maker/model is not on this machine"):
        open_checkpoint(RunSettings(model_id="maker/model", revision="v1"), ["unet"])


def test_a_hub_id_with_one_encoder_needs_no_network(sd: Path, hub: Path) -> None:
    put_into_hub(hub, "maker/sd", sd)
    settings = RunSettings(model_id="maker/sd")
    checkpoint = open_checkpoint(settings, ("tokenizer", "text_encoder", "text_encoder_2"))
    assert checkpoint.pipeline_class == "StableDiffusionPipeline"


def test_a_variant_of_the_checkpoint_need_not_be_the_vaes(sdxl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp16"
    shutil.copytree(sdxl, folder)
    rename_to_variant(folder, "fp16")
    settings = RunSettings(model_id=str(folder), variant="fp16", vae=str(sdxl / "vae"))
    checkpoint = open_checkpoint(settings, ["vae"])
    assert [path.name for path in checkpoint.files_read("vae")] == ["config.json", WEIGHTS]
    unet = checkpoint.files_read("unet")
    assert [path.name for path in unet] == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    ]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"revision": "v1"}, BadSettingError, "--revision is for hub ids"),
        ({"variant": "fp16"}, BadSettingError, "--variant fp16: .* holds no such weights"),
        ({"single_file_config": "x"}, BadSettingError, "is for a --model_id that is one"),
        ({"unet": "nothing here"}, BadSettingError, "--unet nothing here is neither"),
        ({"unet": "no.safetensors"}, BadInputFileError, "--unet no.safetensors is no safetensors"),
        ({"unet": "who/knows"}, UnfitEnvironmentError, "--unet who/knows is not on this machine"),
        ({"model_id": "no.safetensors"}, BadSettingError, "--single_file_config"),
        ({"model_id": "who/knows"}, UnfitEnvironmentError, "--model_id who/knows is not on"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, str], error: type[StageError], words: str, sdxl: Path, hub: Path
) -> None:
    with pytest.raises(error, match=words):
        checkpoint = open_checkpoint(RunSettings(**{"model_id": str(sdxl), **settings}), ["unet"])
        checkpoint.weights_fingerprint("unet")


def test_a_vae_in_place_of_the_unet_is_refused(sdxl: Path) -> None:
    settings = RunSettings(model_id=str(sdxl), unet=str(sdxl / "vae"))
    with pytest.raises(BadSettingError, match="its unet is a AutoencoderKL"):
        open_checkpoint(settings, ["unet"])


@pytest.mark.parametrize("form", ["folder", "file"])
def test_weights_that_lack_some_are_refused(form: str, sdxl: Path, tmp_path: Path) -> None:
    """A model must not go on with weights that nobody trained."""
    unet = tmp_path / "unet"
    shutil.copytree(sdxl / "unet", unet)
    tensors = load_file(unet / WEIGHTS)
    del tensors["conv_out.weight"]
    save_file(tensors, unet / WEIGHTS)
    source = unet if form == "folder" else unet / WEIGHTS
    checkpoint = open_checkpoint(RunSettings(model_id=str(sdxl), unet=str(source)), ["unet"])
    with pytest.raises(BadInputFileError, match=r"lacks 1 weight\(s\) of the UNet: conv_out"):
        load_model(checkpoint, "unet", torch.float32)


def test_a_file_for_another_config_is_refused(sdxl: Path, tmp_path: Path) -> None:
    """A consistency model's UNet has one weight more, without which it draws something else."""
    tensors = load_file(sdxl / "unet" / WEIGHTS)
    tensors["time_embedding.cond_proj.weight"] = torch.zeros(128, 32)
    save_file(tensors, tmp_path / "lcm.safetensors")
    settings = RunSettings(model_id=str(sdxl), unet=str(tmp_path / "lcm.safetensors"))
    with pytest.raises(BadInputFileError, match=r"of another config: time_embedding\.cond_proj"):
        load_model(open_checkpoint(settings, ["unet"]), "unet", torch.float32)


def test_a_shard_that_is_missing_is_named(sdxl: Path, tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    shutil.copytree(sdxl / "unet", unet)
    stem = WEIGHTS.removesuffix(".safetensors")
    (unet / WEIGHTS).rename(unet / f"{stem}-00001-of-00002.safetensors")
    index = {"weight_map": {"a": f"{stem}-00001-of-00002.safetensors"}}
    index["weight_map"]["b"] = f"{stem}-00002-of-00002.safetensors"
    (unet / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(RunSettings(model_id=str(sdxl), unet=str(unet)), ["unet"])
    with pytest.raises(BadInputFileError, match=r"lacks .*00002-of-00002"):
        checkpoint.weights_fingerprint("unet")


def test_other_stages_need_no_unet_file(sdxl: Path) -> None:
    settings = RunSettings(model_id=str(sdxl), unet="elsewhere.safetensors")
    assert open_checkpoint(settings, ["vae"]).native_size == 64


def test_a_checkpoint_is_found_by_its_folder_alone(sdxl: Path) -> None:
    assert Checkpoint(str(sdxl), sdxl).source("unet").folder == sdxl / "unet"
