"""Settings: order of precedence, resolution, and one clear sentence for each mistake."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.conditions.prompt_settings import PromptSettings
from common.errors import BadInputFileError, BadSettingError
from common.files.run_files import GENERATION_CONFIG_FILE
from common.runs.generation import (
    GenerationConfig,
    RunSettings,
    read_generation_config,
    read_run_settings,
    resolve,
    write_generation_config,
)
from tests.conftest import Run, file_contents
from tests.refusals import DEEP, call, expect, refusal


def make_small_config(**changes: object) -> GenerationConfig:
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt: []", ["no prompt", "--prompt", "--prompts_file"]),
        ("num_inference_steps: null", ["config.yaml", "num_inference_steps, timesteps, sigmas"]),
        ("guidance_start: 0.8\nguidance_end: 0.2", ["config.yaml", "is after guidance_end 0.2"]),
        ("scheduler_options: {a: .inf}", ["config.yaml: scheduler_options", "finite numbers"]),
        ("scheduler_options: 3", ["config.yaml: scheduler_options 3", "dictionary"]),
        ("loras: [{file: a, strength: 2}]", ["config.yaml", "loras.0.strength"]),
        ("embeddings: [{token: a}]", ["config.yaml", "embeddings.0.file is missing"]),
        ("prompt: [a, 3]", ["config.yaml: prompt.1 3", "string"]),
    ],
)
def test_a_bad_setting_in_a_file_is_named_with_the_file(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with refusal(BadSettingError, *words):
        resolve(read_run_settings(file, {}), native_size=128, size_factor=8)


def test_text_that_is_not_yaml_is_a_damaged_input(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: [1")
    with pytest.raises(BadInputFileError, match="not YAML"):
        read_run_settings(file, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: [1", "while parsing"),
        ("seed: 2020-13-45", "month must be in 1..12"),
        ("seed: !!int x", "invalid literal for int()"),
        ("prompt: &a [x]\nprompt_2: *a", "write the alias's value out"),
        (DEEP, "nested too deeply"),
    ],
)
def test_a_config_file_that_is_not_plain(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with refusal(BadInputFileError, f"--config {file} is not YAML", words):
        read_run_settings(file, {})


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("num_steps: 3", 2, ["config.yaml", "num_steps", "did you mean"]),
        ("height: 100", 2, ["--height 100"]),
        ("seed: [", 3, ["config.yaml", "not YAML"]),
    ],
)
def test_a_bad_config_file(
    run_copy: Path, stage: Run, tmp_path: Path, text: str, code: int, words: list[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    before = file_contents(run_copy)
    expect(stage(1, "--config", file, "--output_dir", run_copy), code, *words)
    assert file_contents(run_copy) == before


def test_the_size_is_the_checkpoints_own_unless_given() -> None:
    native = resolve(RunSettings(), native_size=128, size_factor=8)
    assert (native.height, native.width) == (128, 128)
    given_width = resolve(RunSettings(width=192), native_size=128, size_factor=8)
    assert (given_width.height, given_width.width) == (128, 192)
    with pytest.raises(BadSettingError, match=r"--height 130 .* use 128 or 136"):
        resolve(RunSettings(height=130), native_size=128, size_factor=8)


def test_the_written_config_reads_back(tmp_path: Path) -> None:
    config = make_small_config(seed=3)
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", "is damaged (line 1 is not UTF-8"),
        (b"[1, 2", "is damaged (Expecting"),
        (b"[1, 2]", "valid dictionary"),
        (DEEP.encode(), "is damaged (it is nested too deeply)"),
        (b'{"prompts": []}', "prompts []: tuple should have at least 1 item"),
        (
            b'{"prompts": [{"prompt": "a", "negative_prompt": null}], "height": 64, "width": 64, '
            b'"num_inference_steps": null}',
            "give one of num_inference_steps, timesteps, sigmas, not 0 of them",
        ),
    ],
)
def test_a_damaged_generation_config(run_dir: Path, content: bytes, words: str) -> None:
    path = run_dir / GENERATION_CONFIG_FILE
    path.write_bytes(content)
    for number in (2, 3):
        with refusal(BadInputFileError, str(path), words, "run stage 1 to make it: python stages"):
            call(number, "--output_dir", run_dir)


def test_a_missing_generation_config_exits_3(run_copy: Path, stage: Run) -> None:
    (run_copy / "generation_config.json").unlink()
    for number in (2, 3):
        expect(stage(number, "--output_dir", run_copy), 3, "generation_config.json", "stage 1")


def test_overrides_say_what_differs() -> None:
    config, changes = make_small_config().override({"num_inference_steps": 30, "seed": 42})
    assert config.num_inference_steps == 30
    assert changes == {"num_inference_steps": [25, 30]}
    with pytest.raises(BadSettingError, match="--num_inference_steps"):
        make_small_config().override({"num_inference_steps": 0})


def test_a_setting_that_no_run_has_cannot_be_overridden() -> None:
    with refusal(BadSettingError, "not a setting of a run: prompts_file, wait"):
        make_small_config().override({"wait": True, "seed": 1, "prompts_file": "x"})


@given(
    own=st.lists(st.one_of(st.none(), st.integers(0, 1000)), min_size=1, max_size=6),
    images=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_image_seeds_are_the_prompts_own_or_the_runs(
    own: list[int | None], images: int, seed: int
) -> None:
    prompts = tuple(PromptSettings(prompt="a", negative_prompt=None, seed=s) for s in own)
    config = make_small_config(prompts=prompts, num_images_per_prompt=images, seed=seed)
    seeds = config.image_seeds()
    assert len(seeds) == len(own) * images
    for index, value in enumerate(seeds):
        prompt, k = divmod(index, images)
        expected = own[prompt]
        assert value == (seed + index if expected is None else expected + k)


def test_a_format_that_does_not_hold_the_pictures_is_refused() -> None:
    """Before anything is computed; by stage 3's flag as well."""
    size = {"native_size": 128, "size_factor": 1}
    flags = {"image_format": "webp", "width": 16_383, "height": 8}
    assert resolve(read_run_settings(None, flags), **size).width == 16_383
    flags |= {"width": 16_384}
    with refusal(BadSettingError, "image_format webp holds at most 16383 pixels a side"):
        resolve(read_run_settings(None, flags), **size)
    wide = resolve(read_run_settings(None, flags | {"image_format": "png"}), **size)
    with refusal(BadSettingError, "image_format webp holds at most", "use png or jpg"):
        wide.override({"image_format": "webp"})
