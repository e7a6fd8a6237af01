"""The end of a process: one sentence, the documented exit code, earlier files as they were."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import StageError, without_controls
from common.stopping import STOP_SIGNALS, StoppedError
from tests.conftest import DEMO, PROJECT_DIR, Run, file_contents
from tests.refusals import expect

FAILING_COMMAND = """
from common.commands import make_command
from common.errors import *
from common.process import run_command

def main(debug: bool = False) -> None:
    raise {error}

run_command(make_command(main))
"""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("BadSettingError('a flag')", 2, ["error: a flag"]),
        ("BadInputFileError('a file')", 3, ["error: a file"]),
        ("NotFiniteError('numbers')", 4, ["error: numbers"]),
        ("UnfitEnvironmentError('a disk')", 5, ["error: a disk"]),
        ("MemoryError", 5, ["out of memory", "--batch_size", "--mesh", "--tile"]),
        (
            "RuntimeError('RESOURCE_EXHAUSTED: Out of memory\\n while allocating 9 bytes')",
            5,
            ["out of memory on the devices", "while allocating 9 bytes", "--batch_size"],
        ),
        ("KeyError('name')", 1, ["a defect of this program: KeyError: 'name'", "--debug"]),
    ],
)
def test_a_process_ends_with_one_sentence_and_the_code(
    error: str, code: int, words: list[str]
) -> None:
    """jax's own error of a device without memory stands in for such a device."""
    result = run_python(FAILING_COMMAND.format(error=error))
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_debug_shows_where_before_the_sentence() -> None:
    result = run_python(FAILING_COMMAND.format(error="BadSettingError('a flag')"), "--debug")
    assert result.returncode == 2
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("error: a flag\n")


def run_python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=PROJECT_DIR
    )


def test_errors_have_the_documented_exit_codes() -> None:
    codes = {error.__name__: error.exit_code for error in StageError.__subclasses__()}
    assert codes == {
        "BadSettingError": 2,
        "BadInputFileError": 3,
        "NotFiniteError": 4,
        "UnfitEnvironmentError": 5,
        "StoppedError": 1,
    }
    assert [StoppedError(number, "").exit_code for number in STOP_SIGNALS] == [130, 143, 129]


def test_a_files_own_text_cannot_break_the_line_or_steer_the_terminal() -> None:
    assert without_controls("a\nb\x1b[2Jc → é") == r"a\nb\x1b[2Jc → é"


@pytest.mark.parametrize(
    ("number", "arguments", "words"),
    [
        (1, ["--num_inference_step", "3"], ["--num_inference_step"]),
        (1, ["--num_inference_steps", "0"], ["--num_inference_steps"]),
        (1, ["--num_inference_steps", "many"], ["--num_inference_steps"]),
        (1, ["--height", "100"], ["--height 100", "multiple of 8", "96 or 104"]),
        (1, ["--seed", "-1"], ["--seed"]),
        (1, ["--scheduler", "eulr"], ["--scheduler", "euler"]),
        (1, ["--dtype", "float16"], ["text_encoder_dtype", "float32"]),
        (1, ["--model_id", "no_such_folder"], ["--model_id no_such_folder"]),
        (1, ["--prompt", "a", "--prompts_file", "b"], ["--prompt", "--prompts_file"]),
        (1, ["--negative_prompt", "a", "--no_negative_prompt"], ["--no_negative_prompt"]),
        (2, ["--num_inference_steps", "0"], ["--num_inference_steps"]),
        (2, ["--width", "131"], ["--width 131"]),
        (2, ["--prompt", "a"], ["--prompt"]),
        (2, ["--mesh", "data=x"], ["--mesh data=x"]),
        (3, ["--image_format", "gif"], ["image_format", "png"]),
        (3, ["--seed", "1"], ["--seed"]),
        (2, ["--save_hlo", "x"], ["--save_hlo", "--topology"]),
        (3, ["--pictures_shape", "1,8,8"], ["--pictures_shape", "--topology"]),
    ],
)
def test_a_bad_flag_exits_2(
    run_copy: Path, stage: Run, number: int, arguments: list[str], words: list[str]
) -> None:
    before = file_contents(run_copy)
    expect(stage(number, "--output_dir", run_copy, *arguments), 2, *words)
    assert file_contents(run_copy) == before


def dangling(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link"


def file_in_its_place(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (dangling, "nothing, which is not there: make that folder, or choose another"),
        (file_in_its_place, "is a file: choose a folder"),
        (lambda folder: file_in_its_place(folder) / "below", "cannot be made: make the folder"),
        (lambda _: Path("/proc/run"), "cannot be made: make the folder above it writable"),
    ],
)
def test_an_output_folder_that_cannot_be_written_is_refused_at_once(
    make: Callable[[Path], Path], words: str, tmp_path: Path, stage: Run
) -> None:
    """Before anything is imported that takes seconds."""
    folder = make(tmp_path)
    flags = ("--output_dir", folder, "--model_id", DEMO)
    expect(stage(1, *flags), 5, f"--output_dir {folder}", words)
    program = f"""
import sys
from common.files.stage_table import ENCODE
from common.runs.stage_run import ResidentStage
try:
    ResidentStage(ENCODE).run(*{[*map(str, flags)]!r})
except Exception as error:
    large = {{"torch", "diffusers", "transformers", "jax"}}
    print(type(error).__name__, *sorted(large & {{*sys.modules}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PROJECT_DIR
    )
    assert result.stdout == "UnfitEnvironmentError\n", result.stderr


def test_what_no_file_holds_is_refused_before_computing(tmp_path: Path, stage: Run) -> None:
    """Prompts over what a header may be, pictures over what a WebP may be."""
    (tmp_path / "prompts.txt").write_text(f"{'星' * 1000}\n" * 4300)
    many = ("--prompts_file", tmp_path / "prompts.txt")
    wide = ("--image_format", "webp", "--width", 16_384)
    for flags, words in (
        (many, "the prompts and images take 14 MB"),
        (wide, "at most 16383 pixels a side"),
    ):
        run_dir = tmp_path / "run"
        expect(stage(1, "--output_dir", run_dir, "--model_id", DEMO, *flags), 2, words)
        assert not run_dir.exists()


SAYING = FAILING_COMMAND.format(error="SystemExit").replace(
    "    raise SystemExit",
    "    import sys\n    for k in range(20000): print('a line', k)\n"
    "    print('warning', file=sys.stderr)",
)


@pytest.mark.parametrize(
    "closed", [">&-", "2>&-", ">&- 2>&- <&-", "<&-", "| head -1", ">/dev/full"]
)
def test_a_stream_that_nobody_reads_is_no_reason_to_end(closed: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SAYING)
    command = f"{sys.executable} {tmp_path / 'program.py'} {closed}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=PROJECT_DIR,
        env=os.environ | {"PYTHONPATH": str(PROJECT_DIR)},
    )
    assert result.returncode == 0, result.stderr
    said = result.stderr.splitlines()
    lost = "warning: standard output cannot be written (No space left on device); it is lost"
    expected = [lost] if closed == ">/dev/full" else []
    assert said == [*expected, *([] if "2>&-" in closed else ["warning"])]


def test_closed_streams_do_not_get_the_files_that_are_opened(tmp_path: Path) -> None:
    program = SAYING.replace("import sys\n", "import sys\n    file = open('made', 'w')\n", 1)
    (tmp_path / "program.py").write_text(program)
    command = f"{sys.executable} program.py >&- 2>&- <&-"
    subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT_DIR)},
        check=True,
    )
    assert (tmp_path / "made").read_text() == ""
