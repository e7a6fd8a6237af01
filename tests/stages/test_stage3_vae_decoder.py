"""Stage 3 as a script: the flags that it refuses."""

from pathlib import Path

import pytest

from tests.refusals import refuse_flag, refuse_flags

# Flag, its value, what is said after the flag.
FLAGS = [
    ("batch_size", "0", "0: input should be greater than or equal to 1"),
]


@pytest.mark.parametrize(("flag", "value", "said"), FLAGS)
def test_a_value_out_of_bounds_names_its_flag_and_the_bound(
    run_dir: Path, flag: str, value: str, said: str
) -> None:
    refuse_flag(run_dir, 3, flag, value, said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "float32", "--vae_dtype", "float32"],
         ["--dtype", "--vae_dtype", "not both"]),
        (["--json", "x"], ["--json is for --topology"]),
        (["--topology", "v6e:1x1", "--profile_dir", "x"], ["--profile_dir is for a run"]),
        (["--topology", "v6e:1x1", "--wait"], ["--wait is for a run, and --topology only"]),
        (["--topology", "v9:2x2"], ["--topology v9:2x2", "chips: v6e"]),
        (["--mesh", "cfg=3"], ["--mesh cfg=3", "1 or 2"]),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(
    run_dir: Path, arguments: list[str], words: list[str]
) -> None:
    refuse_flags(run_dir, 3, arguments, words)
