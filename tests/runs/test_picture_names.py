"""Pictures are called by number, id or template, safely on every file system."""

from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadSettingError
from common.runs import picture_names
from common.runs.picture_names import (
    MOST_BYTES,
    ImageId,
    ids_of,
    names_of,
    refuse_bad_names,
    safe_name,
)
from tests.configs import make_config
from tests.conftest import DEMO
from tests.refusals import refusal

SETTINGS: list[dict[str, Any]] = [
    {"prompt": "a red star, ★/“big”", "seed": 7, "width": 64, "negative_prompt": None},
    {"prompt": "a ring", "seed": 8, "width": 64, "negative_prompt": "dull"},
]


def called(*ids: str | None, images: int | None = None, **settings: Any) -> list[ImageId]:
    """The ids of the images of prompts, one for each or as many as settings say."""
    own = [{"prompt": "a", "negative_prompt": None, "id": id} for id in ids]
    config = make_config(DEMO, prompts=own, **settings)
    return ids_of(config, len(ids) if images is None else images)


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (None, ["output_image_0000.png", "output_image_0001.png"]),
        ("{index:04d}_{seed}_{prompt:.10}", ["0000_7_a red star.png", "0001_8_a ring.png"]),
        ("{prompt}", ["a red star, _big_.png", "a ring.png"]),
        ("{seed}-{id}{negative_prompt}", ["7-.png", "8-dull.png"]),
        ("../{{{seed}}}/x", ["_7_x.png", "_8_x.png"]),
    ],
)
def test_a_template_names_each(template: str | None, names: list[str]) -> None:
    assert names_of(SETTINGS, called(None, None), template, "png") == names


def test_an_id_is_the_name() -> None:
    both = called("star one", None)
    assert names_of(SETTINGS, both, None, "jpg") == ["star one.jpg", "output_image_0001.jpg"]
    two = called("Ring", images=2, num_images_per_prompt=2)
    assert names_of(SETTINGS, two, None, "png") == ["Ring_0000.png", "Ring_0001.png"]
    assert names_of(SETTINGS[:1], called("x"), None, "png") == ["x.png"]
    # Latents from elsewhere, whose prompts are not those of the run.
    elsewhere = names_of(SETTINGS, called("a", "b", "c", images=2), None, "png")
    assert elsewhere == ["output_image_0000.png", "output_image_0001.png"]


@pytest.mark.parametrize(
    ("template", "ids", "said"),
    [
        (
            "{width}",
            (None, None),
            "'{width}' gives the images 0 and 1 the same name, 64.png: put {index}",
        ),
        (None, ("a", "A"), "the prompts' ids give the images 0 and 1 the same name, A.png"),
        (None, ("x", "output_grid"), "an image cannot be called output_grid.png"),
        ("{prompt.__class__}", (None, None), "{prompt.__class__} is none of {index}, {id}"),
        ("{steps}", (None, None), "{steps} is none of"),
        ("{index:{seed}}", (None, None), "is none of"),
        ("{seed:q}", (None, None), "cannot be read: Unknown format code 'q'"),
        ("{seed", (None, None), "--name_template '{seed' cannot be read: expected '}'"),
    ],
)
def test_what_cannot_be_a_name_is_refused(
    template: str | None, ids: tuple[str | None, ...], said: str
) -> None:
    with refusal(BadSettingError, said):
        names_of(SETTINGS, called(*ids), template, "png")


@given(st.text())
def test_any_text_is_a_safe_name(text: str) -> None:
    name = safe_name(text)
    assert 0 < len(name.encode()) <= MOST_BYTES + 1
    assert name[0] not in " .-" and name[-1] not in " ."
    assert not {*name} & {*'/\\:*?"<>|\0\n'}
    assert not PureWindowsPath(name).is_reserved()
    assert safe_name(name) == name


def test_a_run_is_refused_before_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(DEMO, batch=2, name_template="{seed}")
    refuse_bad_names(config, tmp_path)
    with refusal(BadSettingError, "the same name", "put {index} first"):
        refuse_bad_names(config.model_copy(update={"name_template": "{model_id:.2}"}), tmp_path)
    image = str(tmp_path / f"{config.seed + 1}.png")
    begun = tuple(prompt.model_copy(update={"image": image}) for prompt in config.prompts)
    beside = config.model_copy(update={"prompts": begun})
    with refusal(BadSettingError, f"{image} is a picture that the run begins with"):
        refuse_bad_names(beside, tmp_path)
    refuse_bad_names(beside, tmp_path / "elsewhere")
    (tmp_path / f"{config.seed}.png").write_bytes(b"of the user")
    with refusal(BadSettingError, f"{tmp_path / '42.png'} is there and no picture of ours"):
        refuse_bad_names(config, tmp_path)
    (tmp_path / f"{config.seed}.png").unlink()
    asked = []
    monkeypatch.setattr(picture_names, "require_parquet", lambda: asked.append(1))
    refuse_bad_names(config.model_copy(update={"index": "parquet"}), tmp_path)
    assert asked == [1]


def test_names_are_of_the_settings_that_each_prompt_has(tmp_path: Path) -> None:
    prompts = [
        {"prompt": "a", "negative_prompt": None, "settings": {"num_inference_steps": steps}}
        for steps in (2, 3)
    ]
    config = make_config(DEMO, prompts=prompts, name_template="{prompt}_{num_inference_steps}")
    refuse_bad_names(config, tmp_path)
