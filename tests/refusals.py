"""How a refusal is looked at: its class or its exit code, and one sentence with the mend in it.

A class has one exit code (`test_errors_have_the_documented_exit_codes`), and `run_command` ends the
process with it (`test_a_process_ends_with_one_sentence_and_the_code`), so most refusals are looked
at here and not in a process of their own.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import BadSettingError, StageError
from common.files import artifacts
from common.files.recipe import Recipe
from common.files.stage_table import numbered
from tests.conftest import file_contents

Error = type[StageError]
Shapes = dict[str, tuple[int, ...]]

# The tensors of a run of one image of 64×64 by the demo checkpoint.
EMBEDDINGS: Shapes = {
    "prompt_embeds": (1, 77, 160),
    "negative_prompt_embeds": (1, 77, 160),
    "pooled_prompt_embeds": (1, 96),
    "negative_pooled_prompt_embeds": (1, 96),
}
LATENTS: Shapes = {"latents": (1, 4, 8, 8)}
TRAJECTORY: Shapes = {"latents": (2, 1, 4, 8, 8), "steps": (2,)}
# Of libraries, in place of words for people: an exception's class, a module's path, torch's device.
INNER_WORDS = re.compile(
    r"\w(Error|Exception):|\bmeta (tensor|device)"
    r"|(?<![\w.])(torch|diffusers|transformers|safetensors)\.\w"
)
DEEP = "[" * 100_000  # JSON and YAML that no parser may follow down


@contextmanager
def refusal(error: Error, *words: str) -> Iterator[None]:
    """The block raises just this class, and its sentence is one line with the words in it."""
    with pytest.raises(StageError) as caught:
        yield
    said = str(caught.value)
    assert type(caught.value) is error, said
    assert "\n" not in said and "Traceback" not in said
    assert not INNER_WORDS.search(said), said
    for word in words:
        assert word in said, said


def expect(result: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    """A process said one sentence on standard error with the words in it, and has the code."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert result.returncode == code, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert not INNER_WORDS.search(result.stderr), result.stderr
    for word in words:
        assert word in result.stderr


def call(number: int, *arguments: object) -> None:
    """Run a stage here, by the flags of its script."""
    # Imported late: the modules below it have tests that need none of it.
    from common.runs.stage_run import ResidentStage

    stage = ResidentStage(numbered(number))
    stage.open()
    stage.run(*map(str, arguments))


def refuse_flag(run_dir: Path, number: int, flag: str, value: str, said: str) -> None:
    """A stage refuses a flag's value, says what of it, and leaves every file as it was."""
    refuse_flags(run_dir, number, [f"--{flag}", value], [f"--{flag} {said}"])


def refuse_flags(run_dir: Path, number: int, arguments: list[Any], words: list[str]) -> None:
    """A stage refuses its flags, and leaves every file as it was."""
    before = file_contents(run_dir)
    with refusal(BadSettingError, *words):
        call(number, "--output_dir", run_dir, *arguments)
    assert file_contents(run_dir) == before


def zeros(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of zeros."""
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def save_with_header(
    path: Path,
    shapes: Shapes,
    stage: int,
    inputs: dict[str, str],
    settings: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write tensors of zeros as a stage of ours would have."""
    recipe = Recipe(stage=stage, settings=settings or {}, inputs=inputs, weights={}, versions={})
    artifacts.save_tensors(path, zeros(shapes), recipe, {})
