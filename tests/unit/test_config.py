"""Settings: order of precedence, resolution, and one clear sentence for each mistake."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import (
    GenerationConfig,
    PromptSettings,
    RunSettings,
    read_generation_config,
    read_prompts_file,
    read_run_settings,
    resolve,
    write_generation_config,
)
from common.errors import BadInputFileError, BadSettingError


def make_config(**changes: object) -> GenerationConfig:
    values = {
        "prompts": [{"prompt": "a red star", "negative_prompt": None}],
        "height": 128,
        "width": 128,
    }
    return GenerationConfig.model_validate(values | changes)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 7\nnum_inference_steps: 30\nprompt: a cross\n")
    settings = read_run_settings(file, {"seed": 9})
    assert (settings.seed, settings.num_inference_steps) == (9, 30)
    assert settings.prompt == ("a cross",)
    assert settings.guidance_scale == RunSettings().guidance_scale


def test_a_prompt_flag_replaces_the_files_prompts_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("prompts_file: elsewhere.txt\n")
    settings = read_run_settings(file, {"prompt": ["a ring"]})
    assert settings.prompts_file is None and settings.prompt == ("a ring",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_inference_step: 3", ["config.yaml", "num_inference_step", "num_inference_steps"]),
        ("num_inference_steps: 0", ["config.yaml", "num_inference_steps", "greater"]),
        ("seed: -1", ["config.yaml", "seed"]),
        ("guidance_scale: .nan", ["config.yaml", "guidance_scale"]),
        ("scheduler: eulr", ["config.yaml", "scheduler", "euler"]),
        ("- a\n- b", ["config.yaml", "mapping"]),
        ("prompt: a\nprompts_file: b", ["prompt", "prompts_file"]),
    ],
)
def test_a_bad_config_file_is_one_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(BadSettingError) as caught:
        read_run_settings(file, {})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_text_that_is_not_yaml_is_a_damaged_input(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: [1")
    with pytest.raises(BadInputFileError, match="not YAML"):
        read_run_settings(file, {})


def test_null_and_absent_and_empty_negative_prompts_stay_distinct(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a"},
        {"prompt": "b", "negative_prompt": None},
        {"prompt": "c", "negative_prompt": "", "seed": 5},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    prompts = read_prompts_file(file, "default")
    assert [p.negative_prompt for p in prompts] == ["default", None, ""]
    assert [p.seed for p in prompts] == [None, None, 5]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n \n", "no prompt"),
        ("p.jsonl", "{", "line 1 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n[1]', "line 2"),
        ("p.jsonl", '{"prompt": "a", "sed": 1}', "did you mean 'seed'"),
        ("p.jsonl", '{"negative_prompt": "a"}', "prompt is missing"),
    ],
)
def test_a_bad_prompts_file_names_the_line(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(BadSettingError, match=words):
        read_prompts_file(file, None)


def test_the_size_is_the_checkpoints_own_unless_given() -> None:
    native = resolve(RunSettings(), native_size=128, size_factor=8)
    assert (native.height, native.width) == (128, 128)
    given_width = resolve(RunSettings(width=192), native_size=128, size_factor=8)
    assert (given_width.height, given_width.width) == (128, 192)
    with pytest.raises(BadSettingError, match=r"--height 130 .* use 128 or 136"):
        resolve(RunSettings(height=130), native_size=128, size_factor=8)


def test_the_written_config_reads_back(tmp_path: Path) -> None:
    config = make_config(seed=3)
    write_generation_config(tmp_path, config)
    assert read_generation_config(tmp_path) == config


def test_a_damaged_generation_config_names_the_mend(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    with pytest.raises(BadInputFileError, match="missing; run stage 1"):
        read_generation_config(tmp_path)
    path.write_text("{")
    with pytest.raises(BadInputFileError, match="damaged"):
        read_generation_config(tmp_path)
    path.write_text('{"seed": 1}')
    with pytest.raises(BadInputFileError, match="missing"):
        read_generation_config(tmp_path)


def test_overrides_say_what_differs() -> None:
    config, lines = make_config().override({"num_inference_steps": 30, "seed": 42})
    assert config.num_inference_steps == 30
    assert lines == ["num_inference_steps 25 → 30"]
    with pytest.raises(BadSettingError, match="--num_inference_steps"):
        make_config().override({"num_inference_steps": 0})


@given(
    own=st.lists(st.one_of(st.none(), st.integers(0, 1000)), min_size=1, max_size=6),
    images=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_image_seeds_are_the_prompts_own_or_the_runs(
    own: list[int | None], images: int, seed: int
) -> None:
    prompts = tuple(PromptSettings(prompt="a", negative_prompt=None, seed=s) for s in own)
    config = make_config(prompts=prompts, num_images_per_prompt=images, seed=seed)
    seeds = config.image_seeds()
    assert len(seeds) == len(own) * images
    for index, value in enumerate(seeds):
        prompt, k = divmod(index, images)
        expected = own[prompt]
        assert value == (seed + index if expected is None else expected + k)
