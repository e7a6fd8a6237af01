"""AUTOMATIC1111's syntax: weights, escapes, BREAK."""

import pytest

from common.conditions.a1111_syntax import calls_of_loras, looks_weighted, parse


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a star", [[("a star", 1.0)]]),
        ("", [[]]),
        ("a (red) star", [[("a ", 1.0), ("red", 1.1), (" star", 1.0)]]),
        ("a ((red))", [[("a ", 1.0), ("red", 1.21)]]),
        ("[red] [[star]]", [[("red", 1 / 1.1), (" ", 1.0), ("star", 1 / 1.21)]]),
        ("(red:1.3)(star: 0.5 )", [[("red", 1.3), ("star", 0.5)]]),
        ("(a (red:1.5) star:0.5)", [[("a ", 0.5), ("red", 0.75), (" star", 0.5)]]),
        ("(red:-1)", [[("red", -1.0)]]),
        (r"\(red\) \[a\] \\", [[("(red) [a] \\", 1.0)]]),
        (r"(a \(red\):1.2)", [[("a (red)", 1.2)]]),
        ("a (red, (star", [[("a ", 1.0), ("red, ", 1.1), ("star", 1.21)]]),
        ("red) star] :1.2)", [[("red) star] :1.2)", 1.0)]]),
        ("[red:1.2]", [[("red:1.2", 1 / 1.1)]]),
        ("a: b", [[("a: b", 1.0)]]),
        ("red BREAK star", [[("red", 1.0)], [("star", 1.0)]]),
        ("(red BREAK star:1.2)", [[("red", 1.2)], [("star", 1.2)]]),
        ("BREAK\nred", [[], [("red", 1.0)]]),
        ("BREAKFAST break", [[("BREAKFAST break", 1.0)]]),
    ],
)
def test_weights_and_chunks(prompt: str, parts: list[list[tuple[str, float]]]) -> None:
    found = [[(each.text, each.weight) for each in part] for part in parse(prompt)]
    assert [[text for text, _ in part] for part in found] == [[t for t, _ in p] for p in parts]
    for part, expected in zip(found, parts, strict=True):
        assert [weight for _, weight in part] == pytest.approx([w for _, w in expected])


@pytest.mark.parametrize(
    ("prompt", "plain", "compel"),
    [
        ("a star", False, False),
        ("(red:1.2)", True, True),
        ("[red]", True, True),
        ("(red)", True, False),
        ("(red)1.2", True, False),
        (r"\(red\)", False, False),
        ("smile :)", False, False),
        ("a[0]", False, False),
    ],
)
def test_what_looks_like_weights(prompt: str, plain: bool, compel: bool) -> None:
    assert looks_weighted(prompt) == plain
    assert looks_weighted(prompt, brackets_are_read=True) == compel


def test_calls_of_loras_are_found() -> None:
    found = calls_of_loras("a <lora:red:0.8> star <lyco:x> <my-toy> a<b")
    assert found == ["<lora:red:0.8>", "<lyco:x>"]
