"""One declaration gives a setting's bounds, flag, help and place; refusals are one sentence."""

import pytest
from pydantic import ValidationError

from common.declared import (
    EMBEDDINGS,
    FILES,
    LATENTS,
    MODEL,
    PICTURES,
    RUNNING,
    Place,
    Settings,
    Text,
    declarations,
    flag_of,
    option,
    setting,
    validate,
)
from common.errors import BadSettingError


class Group(Settings):
    strength: float = setting(
        0.5,
        "How strong.",
        shapes=(LATENTS,),
        metavar="X",
        group=MODEL,
        web_ui="Strength",
        ge=0,
        le=1,
    )
    names: list[str] = setting(
        [], "Names.", shapes=(EMBEDDINGS, LATENTS), metavar="N", group=FILES, many=True, flag="name"
    )
    file: Place | None = setting(
        None, "A file.", shapes=(PICTURES,), metavar="F", group=FILES, recorded=False, kind=str
    )
    workers: int = option(1, "At once.", helps_make=(PICTURES,), metavar="N", alone=True)
    undeclared: int = 3
    title: Text = "x"


def test_a_declaration_says_all_of_a_setting() -> None:
    found = dict(declarations(Group))
    assert list(found) == ["strength", "names", "file", "workers"]
    strength, names, file, workers = found.values()
    assert (strength.text, strength.metavar, strength.web_ui) == ("How strong.", "X", "Strength")
    assert strength.makes == (LATENTS,) and strength.determines and strength.recorded
    assert names.many and names.makes == (EMBEDDINGS, LATENTS)
    assert not file.recorded and file.determines and file.kind is str
    assert not workers.determines and not workers.recorded and workers.alone
    assert (workers.group, names.group) == (RUNNING, FILES)
    assert all(each.swept and each.shown is None for each in found.values())


def test_flags_have_the_names_of_settings_or_their_own() -> None:
    assert flag_of(Group, "strength") == "strength"
    assert flag_of(Group, "names") == "name"
    assert flag_of(Group, "undeclared") == "undeclared"
    assert flag_of(Group, "elsewhere") == "elsewhere"


def test_values_are_frozen_and_defaults_are_each_ones_own() -> None:
    group = Group()
    with pytest.raises(ValidationError):
        group.strength = 0.1  # type: ignore[misc]
    group.names.append("a")
    assert Group().names == []


@pytest.mark.parametrize(
    ("values", "source", "said"),
    [
        ({"strength": 2}, "flags", "--strength 2: input should be less than or equal to 1"),
        ({"strength": 2}, "a.yaml", "a.yaml: strength 2: input should be less than or equal to 1"),
        ({"strength": float("nan")}, "flags", "--strength nan: input should be a finite number"),
        ({"names": [1]}, "flags", "--name 1: input should be a valid string"),
        ({"names": [1]}, "a.yaml", "a.yaml: names.0 1: input should be a valid string"),
        ({"strenght": 1}, "a.yaml", "unknown setting 'strenght'; did you mean 'strength'?"),
        ({"file": ""}, "flags", "--file '': it is empty: leave it out, or give a name"),
        ({"file": "a\0b"}, "flags", "give a name without NUL characters"),
        ({"title": "\udcff"}, "flags", "it holds bytes that are no UTF-8 text"),
        (3, "a.yaml", "a.yaml: input should be a valid dictionary"),
    ],
)
def test_a_refusal_names_the_source_the_setting_and_the_value(
    values: object, source: str, said: str
) -> None:
    with pytest.raises(BadSettingError) as caught:
        validate(Group, values, source)
    assert said in str(caught.value)


def test_a_value_that_is_missing() -> None:
    class Needs(Settings):
        name: str

    with pytest.raises(BadSettingError, match="--name is missing"):
        validate(Needs, {}, "flags")
    assert validate(Needs, {"name": "a"}, "flags").name == "a"


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(BadSettingError) as caught:
        validate(Group, {"strength": "x" * 1000}, "flags")
    assert len(str(caught.value)) < 200
