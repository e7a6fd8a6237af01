"""Settings: order of precedence, resolution, and one clear sentence for each mistake."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadInputFileError, BadSettingError
from common.runs.generation import (
    GenerationConfig,
    PromptSettings,
    RunSettings,
    parse_scheduler_options,
    read_generation_config,
    read_prompts_file,
    read_run_settings,
    resolve,
    write_generation_config,
)


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
    prompts = read_prompts_file(file, RunSettings(negative_prompt="default"))
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
        read_prompts_file(file, RunSettings())


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


def test_the_steps_are_given_in_one_way(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("timesteps: [999, 500]\n")
    settings = read_run_settings(file, {})
    assert (settings.num_inference_steps, settings.timesteps) == (None, (999, 500))
    settings = read_run_settings(file, {"num_inference_steps": 9})
    assert (settings.num_inference_steps, settings.timesteps) == (9, None)
    settings = read_run_settings(None, {"sigmas": "14.5,1,0"})
    assert (settings.num_inference_steps, settings.sigmas) == (None, (14.5, 1.0, 0.0))
    with pytest.raises(BadSettingError, match="either num_inference_steps or timesteps"):
        read_run_settings(None, {"num_inference_steps": 9, "timesteps": "1,2"})
    with pytest.raises(BadSettingError, match="--timesteps 'x'"):
        read_run_settings(None, {"timesteps": "999,x"})


def test_scheduler_options_belong_to_their_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("scheduler: dpmpp_2m\nscheduler_options: {solver_order: 3}\n")
    added = read_run_settings(file, {"scheduler_options": {"use_karras_sigmas": True}})
    assert added.scheduler_options == {"solver_order": 3, "use_karras_sigmas": True}
    other = read_run_settings(file, {"scheduler": "euler"})
    assert other.scheduler_options == {}
    config, lines = make_config(scheduler="lms", scheduler_options={"a": 1}).override(
        {"scheduler": "heun"}
    )
    assert config.scheduler_options == {}
    assert lines == ["scheduler lms → heun", "scheduler_options {'a': 1} → {}"]


def test_scheduler_options_on_the_command_line() -> None:
    parsed = parse_scheduler_options(["use_karras_sigmas=true", "solver-order=3", "kind=a=b"])
    assert parsed == {"use_karras_sigmas": True, "solver_order": 3, "kind": "a=b"}
    for bad in ("x", "=1", "x=[1"):
        with pytest.raises(BadSettingError, match="--scheduler_option"):
            parse_scheduler_options([bad])


def test_second_prompts_are_one_for_all_or_one_for_each() -> None:
    def seconds(**settings: object) -> list[str | None]:
        config = resolve(RunSettings(**settings), native_size=128, size_factor=8)
        return [prompt.prompt_2 for prompt in config.prompts]

    assert seconds(prompt=["a", "b"]) == [None, None]
    assert seconds(prompt=["a", "b"], prompt_2="c") == ["c", "c"]
    assert seconds(prompt=["a", "b"], prompt_2=["c", "d"]) == ["c", "d"]
    with pytest.raises(BadSettingError, match="--prompt_2 is given 2 times for 3 prompts"):
        seconds(prompt=["a", "b", "c"], prompt_2=["c", "d"])
    with pytest.raises(BadSettingError, match="needs a negative_prompt"):
        seconds(negative_prompt=None, negative_prompt_2="x")


@pytest.mark.parametrize(
    ("text", "file", "token"),
    [
        ("a/cat.safetensors", "a/cat.safetensors", "cat"),
        ("a/cat.safetensors:<kitty>", "a/cat.safetensors", "<kitty>"),
        ("C:/a/cat.safetensors", "C:/a/cat.safetensors", "cat"),
    ],
)
def test_an_embedding_has_a_file_and_a_token(text: str, file: str, token: str) -> None:
    (embedding,) = RunSettings(embeddings=text).embeddings
    assert (embedding.file, embedding.token) == (file, token)
    assert RunSettings(embeddings=[embedding.model_dump()]).embeddings == (embedding,)
