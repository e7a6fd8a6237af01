"""Prompts with settings of their own: each image is as a run of it alone makes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import BadSettingError
from common.files import artifacts
from common.files.report import read_report
from common.files.stage_table import LATENTS_FILE
from common.runs.parts import (
    parts_of,
    refuse_long_prompts,
    refuse_several,
    settled_for,
    warn_of_own_settings,
)
from tests.configs import make_config
from tests.conftest import DEMO, Run
from tests.files.test_artifacts import make_recipe
from tests.refusals import expect, refusal

A = {"prompt": "a", "negative_prompt": None}
EULER_10 = {"scheduler": "euler", "num_inference_steps": 10}


def test_images_with_the_same_settings_are_one_part() -> None:
    prompts = [
        A | {"settings": EULER_10, "seed": 1},
        A,
        A | {"settings": EULER_10, "seeds": [2, 3]},
        A | {"settings": {"guidance_scale": 3.0}},
    ]
    config = make_config(DEMO, prompts=prompts, guidance_scale=5.0)
    parts = parts_of(config)
    assert [part.images for part in parts] == [[0, 2, 3], [1], [4]]
    assert parts[1].config is config
    of_first = parts[0].config
    assert (of_first.scheduler, of_first.num_inference_steps) == ("euler", 10)
    assert of_first.guidance_scale == 5.0 and parts[2].config.guidance_scale == 3.0
    refuse_several(parts[:1], "--save_trajectory")
    with refusal(BadSettingError, "--save_trajectory is for runs whose images have the same"):
        refuse_several(parts, "--save_trajectory")


def test_a_way_of_giving_steps_takes_the_place_of_the_runs() -> None:
    config = make_config(DEMO, prompts=[A | {"settings": {"timesteps": [900, 400]}}])
    own = settled_for(config, config.prompts[0])
    assert own.timesteps == (900, 400) and own.num_inference_steps is None


def test_the_seeds_are_checked_with_those_of_the_run() -> None:
    prompt = A | {"settings": EULER_10, "seeds": [200, 300]}
    config = make_config(DEMO, prompts=[prompt], seed_offset=-100)
    assert parts_of(config)[0].images == [0, 1] and config.image_seeds() == [100, 200]


def test_settings_that_do_not_go_together_are_refused_before_anything_runs(
    tmp_path: Path, quick_stage: Run
) -> None:
    lines = [{"prompt": "a red star", "guidance_start": 0.8}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(lines[0]))
    flags = ("--output_dir", tmp_path / "run", "--prompts_file", path, "--guidance_end", 0.5)
    expect(quick_stage(1, *flags), 2, "the prompt 'a red star'", "guidance_start 0.8 is after")
    assert not (tmp_path / "run").exists()


def test_prompts_that_no_header_holds_are_refused() -> None:
    """Before they are encoded: a file with a longer header would be refused by the next stage."""

    def refuse(prompts: list[str], **more: Any) -> None:
        config = make_config(DEMO, prompts=[A | {"prompt": prompt, **more} for prompt in prompts])
        refuse_long_prompts(make_recipe(prompts=prompts), config)

    refuse(["a red star"] * 10_000)
    with refusal(BadSettingError, "the prompts and images take 18 MB of each file's header"):
        refuse(["a red star"] * 10, num_images_per_prompt=10_000)
    with refusal(BadSettingError, "the prompts and images take 14 MB", "several runs"):
        refuse(["星" * 1000] * 4300)
    loras = [{"file": f"{k}.safetensors", "scale": 0.5} for k in range(10)]
    with refusal(BadSettingError, "the prompts and images take"):
        refuse(["a"] * 8000, settings={"loras": loras})


def test_what_changes_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    some = make_config(DEMO, prompts=[A | {"settings": EULER_10}, A])
    warn_of_own_settings(some, ["num_inference_steps", "seed"])
    assert not capsys.readouterr().err
    every = make_config(DEMO, prompts=[A | {"settings": EULER_10}])
    warn_of_own_settings(every, ["num_inference_steps", "seed"])
    assert "--num_inference_steps has no effect: all prompts have" in capsys.readouterr().err
    others = [
        A | {"settings": {"timesteps": [9, 5], "scheduler": "ddim"}, "seeds": [1, 2]},
        A | {"settings": {"sigmas": [2.0, 0.0], "scheduler": "lms"}, "num_images_per_prompt": 2},
    ]
    given = ["num_inference_steps", "scheduler_options", "num_images_per_prompt"]
    warn_of_own_settings(make_config(DEMO, prompts=others), given)
    said = capsys.readouterr().err
    assert all(flag in said for flag in ("--num_inference_steps", "--scheduler_option", "images"))


LINES: list[dict[str, Any]] = [
    {"prompt": "a red star", "seed": 1, "scheduler": "dpmpp_2m", "num_inference_steps": 4},
    {"prompt": "a blue ring", "seed": 2},
    {"prompt": "a cross", "seed": 3, "guidance_scale": 1.0, "scheduler": "euler_a"},
    {"prompt": "a white circle", "seed": 4, "timesteps": [900, 500, 100]},
    {"prompt": "a star", "seed": [5, 6], "scheduler_options": {"use_karras_sigmas": True}},
    {"prompt": "a green star", "seed": 7, "original_size": [32, 64]},
]


def run(stage: Run, folder: Path, lines: list[dict[str, Any]], *flags: object) -> list[str]:
    path = folder.with_suffix(".jsonl")
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = ("--height", 64, "--width", 64, "--num_inference_steps", 3)
    said = []
    for number, own in ((1, ("--prompts_file", path, *settings)), (2, flags), (3, ())):
        result = stage(number, "--output_dir", folder, "--skip_fresh", *own)
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    return said


def test_each_image_is_that_of_a_run_of_it_alone(tmp_path: Path, quick_stage: Run) -> None:
    mixed, mesh = tmp_path / "mixed", ("--mesh", "single", "--batch_size", 2)
    run(quick_stage, mixed, LINES, *mesh)
    found = load_file(mixed / LATENTS_FILE)["latents"]
    header = artifacts.inspect(mixed / LATENTS_FILE).header
    assert header is not None and found.shape[0] == 7
    report = read_report(mixed, 2)
    # One for images with guidance and one without; each by as many rows of history.
    assert report is not None and report.programs is not None
    assert len({program.name for program in report.programs.each}) == 2
    image = 0
    for number, line in enumerate(LINES):
        alone = tmp_path / f"alone {number}"
        run(quick_stage, alone, [line], *mesh, "--fill_groups")
        own = load_file(alone / LATENTS_FILE)["latents"]
        own_header = artifacts.inspect(alone / LATENTS_FILE).header
        assert own_header is not None
        for k in range(len(own)):
            assert header.rows[image].fingerprint == own_header.rows[k].fingerprint
            largest = float(own[k].abs().max())
            assert float((found[image] - own[k]).abs().max()) <= 1e-5 * largest
            image += 1


def test_a_changed_setting_of_a_prompt_makes_its_image_alone(
    tmp_path: Path, quick_stage: Run
) -> None:
    folder = tmp_path / "run"
    run(quick_stage, folder, LINES)
    before = load_file(folder / LATENTS_FILE)["latents"]
    lines = [*LINES[3:], LINES[0], LINES[1] | {"guidance_scale": 2.0}, LINES[2]]
    said = run(quick_stage, folder, lines)
    assert "1 of 7 to make: 1 changed (guidance_scale)" in said[1]
    assert "1 of 7 to make" in said[2]
    after = load_file(folder / LATENTS_FILE)["latents"]
    assert after[[0, 1, 2, 3, 4, 6]].equal(before[[3, 4, 5, 6, 0, 2]])
    assert not torch.equal(after[5], before[1])
