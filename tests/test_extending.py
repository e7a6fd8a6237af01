"""What docs/extending.md promises: each of its changes is applied to a copy and tried.

That they apply, and look as the code does, is seen at each run; that they work, by the slow tests.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.numpy import load_file, save_file

from common.files import artifacts, picture_files
from common.files.report import read_report
from common.files.stage_table import EMBEDDINGS_FILE, LATENTS_FILE
from tests.configs import PROMPTS
from tests.conftest import DEMO, PROJECT_DIR
from tests.own_process import Ended, Pages, read_pages, run_stages
from tests.tiny_checkpoints import save_sdxl

PAGE = PROJECT_DIR / "docs" / "extending.md"
SECTION = re.compile(r"^## (.+?)$.*?^```diff\n(.*?)^```$", re.M | re.S)
DIFFS = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))
SETTING, SCHEDULER, COMPONENT = "A setting", "A scheduler", "A component"
TENSOR, CONDITION, BACKEND = "A tensor between the stages", "A condition", "A backend"
WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
BLOCKS = ("num_encoder_blocks", "num_decoder_blocks")
SMALL = ("--prompt", PROMPTS[0], "--num_inference_steps", 2, "--height", 64, "--width", 64)


class Extended:
    """A copy of the tree with one of the page's changes, and runs by its code."""

    def __init__(self, folder: Path, section: str) -> None:
        self.folder, self.tree, self.run_dir = folder, folder / "tree", folder / "run"
        for name in ("common", "stages", "tools"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PROJECT_DIR / name, self.tree / name, ignore=ignored)
        (self.tree / "models").symlink_to(PROJECT_DIR / "models")
        applied = subprocess.run(
            ["git", "apply", "-"],
            input=DIFFS[section],
            cwd=self.tree,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder)},
            capture_output=True,
            text=True,
        )
        assert applied.returncode == 0, f"{PAGE.name}, {section}: {applied.stderr}"

    def pages(self) -> Pages:
        return read_pages(tree=self.tree)

    def run(self, *runs: list[Any], devices: int = 1) -> list[Ended]:
        return run_stages(runs, tree=self.tree, devices=devices)

    def stage(self, number: int, *flags: Any) -> list[Any]:
        return [number, "--output_dir", self.run_dir, *flags]


@pytest.fixture
def extended(tmp_path: Path, request: pytest.FixtureRequest) -> Extended:
    return Extended(tmp_path, request.param)


def of_section(title: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("extended", [title], indirect=True, ids=[title])


def recipe_settings(run_dir: Path, artifact: str) -> dict[str, Any]:
    header = artifacts.inspect(run_dir / LATENTS_FILE).header
    assert header is not None
    return dict(header.recipe.settings[artifact])


def record_of(picture: Path) -> dict[str, Any]:
    record = picture_files.read_picture_record(picture)
    assert record is not None
    return record


def picture_of(run_dir: Path) -> tuple[dict[str, Any], str]:
    """The settings inside a picture, and its text for web UIs."""
    path = run_dir / "output_image.png"
    with Image.open(path) as image:
        return dict(record_of(path)["settings"]), str(image.info["parameters"])


def latents_of(run_dir: Path) -> np.ndarray:
    return np.asarray(load_file(run_dir / LATENTS_FILE)["latents"])


def test_every_block_of_the_page_is_tried_and_looks_as_the_code_does(tmp_path: Path) -> None:
    assert list(DIFFS) == [SETTING, SCHEDULER, COMPONENT, TENSOR, CONDITION, BACKEND]
    assert PAGE.read_text(encoding="utf-8").count("```diff") == len(DIFFS)
    ruff = Path(sys.executable).with_name("ruff")
    config = ("--config", PROJECT_DIR / "pyproject.toml")
    for k, title in enumerate(DIFFS):
        tree = Extended(tmp_path / str(k), title).tree
        for command in (("format", "--check"), ("check",)):
            arguments = map(str, (ruff, *command, *config, tree))
            result = subprocess.run([*arguments], capture_output=True, text=True)
            assert result.returncode == 0, f"{title}: {result.stdout}"


@pytest.mark.slow
@pytest.mark.long
@of_section(SETTING)
def test_a_setting(extended: Extended) -> None:
    pages = extended.pages()
    text = "Of the noise that pictures begin as. \\[1.0]"
    assert pages.stages_with("noise_scale") == {1: text, 2: text}
    row = ["`--noise_scale`", "`X`", "Of the noise that pictures begin as.", "1.0", "> 0", "1, 2"]
    assert pages.row("--noise_scale") == [*row, "latents", "Noise scale"]
    assert "noise_scale" in pages.swept

    config, torch_too = extended.folder / "settings.yaml", ("--backend", "torch")
    config.write_text("noise_scale: 1.2\n")
    again = extended.folder / "again"
    ended = extended.run(
        extended.stage(1, "--config", config, *SMALL),
        extended.stage(2, *torch_too),
        extended.stage(3, *torch_too),
        extended.stage(2, *torch_too, "--skip_fresh"),
        extended.stage(2, *torch_too, "--skip_fresh", "--noise_scale", 1.4),
        extended.stage(3, *torch_too, "--skip_fresh"),
        extended.stage(2, *torch_too, "--noise_scale", 0),
        [2, "--input_dir", extended.run_dir, "--output_dir", again, *torch_too],
    )
    assert [each.code for each in ended] == [0, 0, 0, 0, 0, 0, 2, 0]
    assert "fresh" in ended[3].said
    assert "because noise_scale 1.2 → 1.4" in ended[4].said
    assert "because noise_scale 1.2 → 1.4" in ended[5].said
    assert ended[6].error == "--noise_scale 0.0: input should be greater than 0"
    settings, text = picture_of(extended.run_dir)
    assert settings["noise_scale"] == 1.4 and ", Noise scale: 1.4" in text
    assert recipe_settings(extended.run_dir, "latents")["noise_scale"] == 1.4
    assert "noise_scale" not in recipe_settings(extended.run_dir, "embeddings")
    assert recipe_settings(again, "latents")["noise_scale"] == 1.2
    assert not np.allclose(latents_of(extended.run_dir), latents_of(again), atol=1e-2)


@pytest.mark.slow
@pytest.mark.long
@of_section(SCHEDULER)
def test_a_scheduler(extended: Extended) -> None:
    name, class_name = "dpmpp_2m_exponential", "DPMSolverMultistepScheduler"
    row = [f"`{name}`", f"`{class_name}`", "`use_exponential_sigmas=True`", "DPM++ 2M Exponential"]
    assert extended.pages().row(name) == row
    torch_too = ("--backend", "torch")
    first, *ended = extended.run(
        extended.stage(1, *SMALL, "--scheduler", "unknown"),
        extended.stage(1, *SMALL, "--scheduler", name),
        extended.stage(2, *torch_too),
        extended.stage(3, *torch_too),
    )
    assert first.code == 2 and f", {name}, " in first.error
    assert [each.code for each in ended] == [0, 0, 0]
    made = recipe_settings(extended.run_dir, "latents")
    assert made["scheduler"] == class_name
    assert made["scheduler_options"] == {"use_exponential_sigmas": True}
    assert "Sampler: DPM++ 2M Exponential," in picture_of(extended.run_dir)[1]


@pytest.mark.slow
@pytest.mark.long
@of_section(COMPONENT)
def test_a_component(extended: Extended) -> None:
    assert extended.pages().stages_with("tiny_vae") == dict.fromkeys(
        (1, 3), "Another tiny VAE: folder, hub id, file."
    )
    tiny = extended.folder / "tiny"
    torch.manual_seed(0)
    widths, blocks = dict.fromkeys(WIDTHS, (8,) * 4), dict.fromkeys(BLOCKS, (1,) * 4)
    AutoencoderTiny(**widths, **blocks).save_pretrained(tiny)
    damaged = Path(shutil.copytree(tiny, extended.folder / "damaged"))
    content = json.loads((tiny / "config.json").read_text()) | {"latent_channels": None}
    (damaged / "config.json").write_text(json.dumps(content))
    by_torch, by_jax = ("--backend", "torch"), ("--backend", "jax")
    with_it = extended.folder / "with"
    to = [3, "--input_dir", extended.run_dir, "--output_dir", with_it]
    ended = extended.run(
        extended.stage(1, *SMALL),
        extended.stage(2, *by_torch, "--save_trajectory", 1),
        extended.stage(3, *by_torch),
        [*to, *by_torch, "--tiny_vae", tiny],
        [*to, *by_torch, "--tiny_vae", tiny, "--skip_fresh"],
        [*to, *by_jax, "--tiny_vae", tiny],
        [*to, *by_torch, "--tiny_vae", DEMO / "vae"],
        [*to, *by_torch, "--tiny_vae", damaged],
    )
    assert [each.code for each in ended] == [0, 0, 0, 0, 0, 0, 2, 3]
    assert "fresh" in ended[4].said
    assert "its tiny_vae is a AutoencoderKL; supported" in ended[6].error
    assert "latent_channels" in ended[7].error
    name = picture_files.TRAJECTORY_STRIP
    without, own = (record_of(folder / name) for folder in (extended.run_dir, with_it))
    assert own["weights"].keys() - without["weights"].keys() == {"tiny_vae"}
    assert own["settings"]["tiny_vae"] == str(tiny)
    strips = [np.asarray(Image.open(folder / name)) for folder in (extended.run_dir, with_it)]
    assert strips[0].shape == strips[1].shape and (strips[0] != strips[1]).mean() > 0.5
    whole = [
        np.asarray(Image.open(folder / "output_image.png")).astype(int)
        for folder in (extended.run_dir, with_it)
    ]
    assert np.abs(whole[0] - whole[1]).max() <= 1  # by the VAE itself


@pytest.mark.slow
@pytest.mark.long
@of_section(TENSOR)
def test_a_tensor(extended: Extended) -> None:
    checkpoint = Path(shutil.copytree(DEMO, extended.folder / "checkpoint"))
    config = checkpoint / "unet" / "config.json"
    needs_it = {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 24}
    config.write_text(json.dumps(json.loads(config.read_text()) | needs_it))
    (first,) = extended.run(extended.stage(1, *SMALL, "--model_id", checkpoint))
    assert first.code == 0
    tensors = load_file(extended.run_dir / EMBEDDINGS_FILE)
    for k, width in enumerate((None, 16, 24)):
        own = {} if width is None else {"image_embeds": np.zeros((1, width), np.float32)}
        (extended.folder / str(k)).mkdir()
        shutil.copy(extended.run_dir / "generation_config.json", extended.folder / str(k))
        save_file(tensors | own, extended.folder / str(k) / EMBEDDINGS_FILE)
    lacking, narrow, fitting = extended.run(
        *([2, "--output_dir", extended.folder / str(k), "--backend", "torch"] for k in range(3))
    )
    assert lacking.code == 3
    assert "lacks image_embeds, which the checkpoint's UNet needs" in lacking.error
    assert narrow.code == 3
    said = "holds image_embeds of shape (1, 16); the checkpoint's UNet needs a width of 24"
    assert said in narrow.error
    assert str(checkpoint / "unet") in fitting.error  # whose weights are of another UNet
    program = (
        "from common.files.contracts import empty_embeddings, tensor_table as t; print(t(), "
        f"empty_embeddings(2, {needs_it | {'cross_attention_dim': 8}})['image_embeds'].shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=extended.tree, capture_output=True, text=True
    )
    assert "| `image_embeds` | [P, K] |" in result.stdout
    assert "by UNets with `encoder_hid_dim_type` image_proj" in result.stdout
    assert "torch.Size([2, 24])" in result.stdout


@pytest.mark.slow
@pytest.mark.long
@of_section(CONDITION)
def test_a_condition(extended: Extended) -> None:
    """Both backends, and one over several devices, tell the UNet the same; so it is by class."""
    pages = extended.pages()
    assert pages.stages_with("class_label").keys() == {1, 2}
    assert pages.row("--class_label")[-2:] == ["latents", "Class"]
    model = save_sdxl(extended.folder / "model", num_class_embeds=3)
    base = extended.run_dir

    def denoise(name: str, label: int, *flags: Any) -> list[Any]:
        where = ["--input_dir", base, "--output_dir", extended.folder / name]
        return [2, *where, "--class_label", label, *flags]

    by_torch = ("--backend", "torch")
    ended = extended.run(
        extended.stage(1, *SMALL, "--model_id", model, "--class_label", 2),
        denoise("torch 2", 2, *by_torch),
        denoise("torch 0", 0, *by_torch),
        denoise("jax 2", 2, "--mesh", "single"),
        denoise("jax 0", 0, "--mesh", "single"),
        denoise("mesh 2", 2, "--mesh", "cfg=2"),
        denoise("torch 2", 1, *by_torch, "--skip_fresh"),
        denoise("torch 3", 3, *by_torch),
        [3, "--output_dir", extended.folder / "torch 2", *by_torch],
        devices=2,
    )
    assert [each.code for each in ended] == [0, 0, 0, 0, 0, 0, 0, 2, 0]
    assert "because class_label 2 → 1" in ended[6].said
    assert ended[7].error == "--class_label 3: the UNet has classes 0 to 2"
    assert ", Class: 1" in picture_of(extended.folder / "torch 2")[1]
    again = read_report(extended.folder / "jax 0", 2)
    assert again is not None and again.programs is None  # compiled for the other class
    found = {name: latents_of(extended.folder / name) for name in ("torch 0", "jax 0", "jax 2")}
    np.testing.assert_allclose(found["jax 0"], found["torch 0"], atol=1e-4)
    np.testing.assert_allclose(latents_of(extended.folder / "mesh 2"), found["jax 2"], atol=1e-4)
    assert np.abs(found["jax 2"] - found["jax 0"]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.long
@of_section(BACKEND)
def test_a_backend(extended: Extended) -> None:
    text = "jax, torch (on the CPU), channels_last, or auto. \\[auto]"
    assert extended.pages().stages_with("backend") == dict.fromkeys((0, 2, 3), text)
    own, torch_too = ("--backend", "channels_last"), ("--backend", "torch")
    beside = extended.folder / "torch"
    ended = extended.run(
        extended.stage(1, *SMALL),
        extended.stage(2, *own),
        extended.stage(3, *own),
        [2, "--input_dir", extended.run_dir, "--output_dir", beside, *torch_too],
        extended.stage(2, *own, "--mesh", "single"),
        extended.stage(2, "--backend", "unknown"),
    )
    assert [each.code for each in ended] == [0, 0, 0, 0, 2, 2]
    assert "leave it or --backend channels_last out" in ended[4].error
    assert "input should be 'auto', 'jax', 'torch' or 'channels_last'" in ended[5].error
    report = read_report(extended.run_dir, 2)
    assert report is not None and report.backend == "channels_last"
    expected = latents_of(beside)
    np.testing.assert_allclose(latents_of(extended.run_dir), expected, atol=1e-3)
