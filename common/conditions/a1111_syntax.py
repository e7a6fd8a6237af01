"""Prompts in AUTOMATIC1111's syntax: texts with weights, in chunks.

    (text)       weight × 1.1; ((text)) × 1.21
    [text]       weight ÷ 1.1
    (text:1.3)   weight × 1.3
    \\( \\) \\[ \\] \\\\   the characters themselves
    BREAK        the rest begins a chunk of its own

A bracket that is not closed reaches to the end; one that was not opened is text. Source: the public
description of the web UI's features ("Attention/emphasis", "BREAK keyword").
"""

import re
from dataclasses import dataclass

UP, DOWN = 1.1, 1 / 1.1
# A token of the syntax: an escaped character, a bracket, a weight that closes one, or text.
_TOKENS = re.compile(
    r"\\(?P<escaped>[()\[\]\\])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|[\\:])"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
# What looks like weights: with a number, in double or square brackets, in any round ones.
_NUMBERED = re.compile(r"(?<!\\)\([^()]*:\s*[+-]?[.\d]+\s*\)|(?<![\w\\])\[[^\[\]]+\]")
_IN_BRACKETS = re.compile(r"(?<!\\)\([^()]+\)")
_LIKE_LORA = re.compile(r"<(lora|lyco|hypernet):[^<>]+>")


@dataclass
class Weighted:
    """A text and its weight."""

    text: str
    weight: float = 1.0


def parse(prompt: str) -> list[list[Weighted]]:
    """The texts of each part between BREAKs, of one weight each; an empty part is left in place."""
    parts: list[list[Weighted]] = [[]]
    opened: list[tuple[str, int]] = []  # bracket, and how many texts were there before it
    texts: list[Weighted | None] = []  # None: a BREAK

    def close(bracket: str, factor: float) -> None:
        _, start = opened.pop()
        for each in texts[start:]:
            if each is not None:
                each.weight *= factor

    for found in _TOKENS.finditer(prompt):
        kind, text = found.lastgroup, found[0]
        innermost = opened[-1][0] if opened else ""
        if kind == "open":
            opened.append((text, len(texts)))
        elif (
            kind == "weight"
            and innermost == "("
            and (weight := _number(found["weight"])) is not None
        ):
            close("(", weight)
        elif kind == "close" and innermost == {")": "(", "]": "["}[text]:
            close(innermost, UP if text == ")" else DOWN)
        else:
            _add(texts, found["escaped"] if kind == "escaped" else text, kind == "text")
    while opened:
        bracket = opened[-1][0]
        close(bracket, UP if bracket == "(" else DOWN)
    for each in texts:
        if each is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1].weight == each.weight:
            parts[-1][-1].text += each.text
        elif each.text:
            parts[-1].append(each)
    return parts


def looks_weighted(prompt: str, brackets_are_read: bool = False) -> bool:
    """Whether a prompt that is not read in this syntax has weights in it.

    Args:
        brackets_are_read: round ones without a number are meant for another syntax.
    """
    found = _NUMBERED.search(prompt)
    return bool(found or (not brackets_are_read and _IN_BRACKETS.search(prompt)))


def calls_of_loras(prompt: str) -> list[str]:
    """The web UI's calls of LoRAs in a prompt, such as `<lora:name:0.8>`, which are text here."""
    return [found[0] for found in _LIKE_LORA.finditer(prompt)]


def _add(texts: list[Weighted | None], text: str, may_break: bool) -> None:
    for k, piece in enumerate(_BREAK.split(text) if may_break else [text]):
        if k:
            texts.append(None)
        texts.append(Weighted(piece))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # such as 1.2.3
