"""The prompts of a run, from flags or from a file."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.conditions.prompt_settings import AskedPrompts
from common.declared import EMBEDDINGS, LATENTS
from common.errors import BadSettingError
from common.files.stage_table import LATENTS_FILE
from common.runs.generation import RunSettings, resolve
from common.runs.prompts_file import read_prompts_file
from tests.conftest import Run, file_contents
from tests.printed import header_of
from tests.refusals import DEEP, call, expect, refusal


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"', "is not JSON: Expecting"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        (DEEP, "is not JSON: it is nested too deeply"),
        ("[1]", "is not a JSON object"),
        ('{"prompt": null}', ": prompt None: input should be a valid string"),
        ('{"prompt": "a", "seed": -1}', ": seed -1: input should be greater than or equal to 0"),
        ('{"prompt": "a", "negative_prompt": null, "negative_prompt_2": "b"}',
         ": negative_prompt_2 needs a negative_prompt"),
    ],
)  # fmt: skip
def test_a_bad_line_of_a_prompts_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + text + "\n")
    with refusal(BadSettingError, f"{file}, line 3{'' if words[0] == ':' else ' '}{words}"):
        read_prompts_file(file, RunSettings())


@pytest.mark.parametrize("mark", "\u2028 \u2029 \x85 \v \f \x1c \x1e \r".split(" "))
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv"])
def test_only_line_feeds_end_a_line(tmp_path: Path, name: str, mark: str) -> None:
    text, file = f"a red{mark}star", tmp_path / name
    as_json = json.dumps({"prompt": text}, ensure_ascii=False)
    content = {
        "p.txt": f"{text}\r\n\r\n",
        "p.jsonl": f"{as_json}\r\n",
        "p.json": f"[{as_json},\n\r\n  {json.dumps(text)}]",
        "p.csv": f'prompt\r\n"{text}"\r\n',
    }[name]
    file.write_bytes(content.encode())
    assert {p.prompt for p in read_prompts_file(file, RunSettings())} == {text}


FORMS = [
    ("p.JSONL", '{"prompt": "a", "seed": 3}\n{"prompt": "b, c", "negative_prompt": "d"}'),
    ("p.ndjson", '{"prompt": "a", "seed": 3}\n\n{"prompt": "b, c", "negative_prompt": "d"}'),
    ("by content", '{"prompt": "a", "seed": 3}\n{"prompt": "b, c", "negative_prompt": "d"}'),
    ("p.json", '[{"prompt": "a", "seed": 3},\n {"prompt": "b, c", "negative_prompt": "d"}\n]'),
    ("p.CSV", 'prompt,Seed,negative_prompt\na,3,\n\n"b, c",,d\n'),
]


@pytest.mark.parametrize(("name", "text"), FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_same_prompts_in_each_form(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (tmp_path / name).write_text(text, encoding)
    prompts = read_prompts_file(tmp_path / name, RunSettings(negative_prompt="default"))
    assert [(p.prompt, p.negative_prompt, p.seed) for p in prompts] == [
        ("a", "default", 3),
        ("b, c", "d", None),
    ]


def test_text_in_braces_is_text_unless_each_line_is_json(tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"prompt": "a"}\n{a|b} star')
    prompts = read_prompts_file(tmp_path / "p", RunSettings())
    assert [p.prompt for p in prompts] == ['{"prompt": "a"}', "{a|b} star"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "seed": true}',
         "line 2: seed True: give a number or text, not true or false"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1 is not JSON: the key 'prompt'"),
        ("p.json", '{"prompt": "a"}', "is not a JSON list"),
        ("p.json", '[{"prompt": "a"}\n{"prompt": "b"}]', "line 2 is not JSON: give a comma"),
        ("p.json", '["a",\n]', "line 2 is not JSON: give a comma between two values and ] after"),
        ("p.json", '["a"', "line 1 is not JSON: give a comma"),
        ("p.json", '["a"]\n]', "line 2 is not JSON: ']' follows the list"),
        ("p.json", '["a",\n3]', "line 2 is neither a JSON object nor a text"),
        ("p.json", '["a",\n{"prompt": "b",\n"sed": 1}]', "line 2: unknown setting 'sed'"),
        ("p.csv", "text,seed\na,1", "line 1 is the header, and names no column `prompt`"),
        ("p.csv", "prompt,seed,seed\na,1,2", "line 1: the column 'seed' stands twice"),
        ("p.csv", "prompt,seed\na,1\n\nb,c,2", "line 4 has 3 cells under a header of 2"),
        ("p.csv", 'prompt\n"a', "line 2 is not CSV: unexpected end of data"),
        ("p.csv", "prompt,seed\na,x", "line 2: seed 'x': input should be a valid integer"),
        ("p.csv", "prompt,size\na,1", "line 2: unknown setting 'size'"),
    ],
)  # fmt: skip
def test_what_a_form_does_not_allow_is_named_with_its_line(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with refusal(BadSettingError, f"{tmp_path / name}", words):
        read_prompts_file(tmp_path / name, RunSettings())


def test_an_empty_prompts_file_exits_2(run_copy: Path, stage: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n")
    before = file_contents(run_copy)
    result = stage(1, "--prompts_file", tmp_path / "prompts.txt", "--output_dir", run_copy)
    expect(result, 2, "prompts.txt", "no prompt")
    assert file_contents(run_copy) == before


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


def test_prompts_from_a_file_with_their_own_seeds(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a small green ring on a white background", "seed": 5},
        {"prompt": "a black cross", "negative_prompt": None},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run_dir = tmp_path / "run"
    settings = ("--num_inference_steps", 2, "--num_images_per_prompt", 2)
    call(1, "--prompts_file", tmp_path / "p.jsonl", "--output_dir", run_dir, *settings)
    for number in (2, 3):
        call(number, "--output_dir", run_dir, "--backend", "torch")
    settings = header_of(run_dir / LATENTS_FILE)["recipe"]["settings"]
    assert settings[LATENTS]["seeds"] == [5, 6, 44, 45]
    assert settings[EMBEDDINGS]["negative_prompts"][1] is None
    assert len(list(run_dir.glob("output_image_*.png"))) == 4
    embeddings = load_file(run_dir / "stage1_embeddings.safetensors")
    assert not embeddings["negative_prompt_embeds"][1].any()
    assert embeddings["negative_prompt_embeds"][0].any()


def test_a_prompt_has_settings_of_its_own(tmp_path: Path) -> None:
    """As the run's are called in a config file, in every form of file."""
    jsonl, table = tmp_path / "p.jsonl", tmp_path / "p.csv"
    values = {
        "guidance_scale": 3,
        "scheduler_options": {"shift": 2},
        "height": 96,
        "width": None,
        "loras": ["x y.safetensors:0.5", "z.safetensors"],
    }
    jsonl.write_text(json.dumps({"prompt": "a"} | values))
    table.write_text(
        "prompt,guidance_scale,scheduler_options,height,loras\n"
        "a,3,shift=2,96,x y.safetensors:0.5; z.safetensors\nb,,,,\n"
    )
    loras = [("x y.safetensors", 0.5), ("z.safetensors", 1.0)]
    own = {
        "guidance_scale": 3.0,
        "scheduler_options": {"shift": 2},
        "height": 96,
        "loras": [{"file": file, "scale": scale} for file, scale in loras],
    }
    for path in (jsonl, table):
        assert read_prompts_file(path, AskedPrompts())[0].settings == own
    assert read_prompts_file(table, AskedPrompts())[1].settings == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"guidance_scale": -1}, "guidance_scale -1"),
        ({"scheduler": "eulr"}, "did you mean 'euler'"),
        ({"vae_dtype": "float32"}, "vae_dtype is a setting of the whole run"),
        ({"model_id": "x"}, "model_id is a setting of the whole run"),
        ({"timesteps": [9, 5], "num_inference_steps": 2}, "give either"),
        ({"guidance": 3}, "unknown setting 'guidance'"),
        ({"settings": {"eta": 1}}, "settings stand beside the prompt, each by its name"),
    ],
)
def test_settings_that_a_prompt_cannot_have(
    tmp_path: Path, line: dict[str, object], said: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a"} | line))
    with refusal(BadSettingError, f"{path}, line 1", said):
        read_prompts_file(path, AskedPrompts())
