"""Rows that cannot be made are left out; what is none of theirs ends the list."""

from collections.abc import Callable, Sequence

import pytest

from common.errors import BadInputFileError, BadSettingError, UnfitEnvironmentError
from common.scale.shards import Failure, Line
from common.scale.sifting import MOST_DEFECTS, sift
from tests.refusals import refusal

LINES = [Line(row, f"a.jsonl, line {row + 1}", 1, f'{{"prompt": "é{row}"}}') for row in range(13)]


def do_without(
    bad: dict[int, Exception],
) -> tuple[Callable[[Sequence[Line]], list[int]], list[int]]:
    """Something that cannot be done with some rows, and how many rows each call had."""
    calls: list[int] = []

    def do(lines: Sequence[Line]) -> list[int]:
        calls.append(len(lines))
        for line in lines:
            if line.row in bad:
                raise bad[line.row]
        return [line.row for line in lines]

    return do, calls


def test_bad_rows_are_left_out_each_with_its_error() -> None:
    do, calls = do_without({0: BadSettingError("no 0"), 7: BadInputFileError("no 7")})
    lines, failures, done = sift(LINES, do)
    good = [line for line in LINES if line.row not in (0, 7)]
    assert lines == good and done == [line.row for line in good]
    assert failures == [
        Failure(0, "a.jsonl, line 1", "no 0", 2),
        Failure(7, "a.jsonl, line 8", "no 7", 3),
    ]
    assert len(calls) < 3 + 2 * 2 * 4
    assert sift(LINES, do_without({})[0]) == (LINES, [], list(range(13)))
    all_bad = {line.row: BadSettingError("no") for line in LINES}
    lines, failures, nothing = sift(LINES, do_without(all_bad)[0])
    assert lines == [] and nothing is None and len(failures) == 13


def test_rows_that_do_not_go_together_all_fail() -> None:
    def do(lines: Sequence[Line]) -> None:
        if len(lines) == len(LINES):
            raise BadSettingError("not together")

    lines, failures, _ = sift(LINES, do)
    assert lines == [] and {failure.error for failure in failures} == {"not together"}
    assert [failure.row for failure in failures] == list(range(13))


def test_what_passes_is_no_rows_fault() -> None:
    calls = []

    def do(lines: Sequence[Line]) -> int:
        calls.append(len(lines))
        if len(calls) == 1:
            raise BadInputFileError("not readable now")
        return len(lines)

    assert sift(LINES, do) == (LINES, [], 13)


def test_the_environment_is_no_rows_fault() -> None:
    do, _ = do_without({5: UnfitEnvironmentError("the disk is full")})
    with refusal(UnfitEnvironmentError, "the disk is full"):
        sift(LINES, do)


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (KeyError("x"), "a defect of this program: KeyError: 'x' (--debug shows where)", 1),
        (MemoryError(), "out of memory: ask for fewer", 5),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "out of memory on the devices", 5),
    ],
)
def test_a_row_alone_may_be_at_fault_for_anything(error: Exception, said: str, code: int) -> None:
    lines, failures, done = sift(LINES, do_without({4: error})[0])
    assert [line.row for line in lines] == done == [row for row in range(13) if row != 4]
    ((row, _, why, own),) = failures
    assert (row, own) == (4, code) and why.startswith(said)


def test_bad_rows_are_no_defect_whatever_has_caused_their_errors() -> None:
    def do(lines: Sequence[Line]) -> None:
        if bad := [line for line in lines if line.row < 10]:
            raise BadSettingError(f"no {bad[0].row}") from KeyError("x")

    lines, failures, _ = sift(LINES, do)
    assert len(lines) == 3 and [failure.error for failure in failures[:2]] == ["no 0", "no 1"]
    assert {failure.exit_code for failure in failures} == {2} and len(failures) == 10


def test_a_defect_at_many_rows_is_none_of_theirs() -> None:
    do, calls = do_without({line.row: KeyError(line.row) for line in LINES})
    with pytest.raises(KeyError):
        sift(LINES, do)
    assert len(calls) < MOST_DEFECTS * 6
    with refusal(UnfitEnvironmentError, "out of memory"):
        sift(LINES[:2], do_without({0: MemoryError(), 1: MemoryError()})[0])


def test_too_many_rows_for_the_memory_end_the_list() -> None:
    def do(lines: Sequence[Line]) -> None:
        if len(lines) > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED")

    with refusal(UnfitEnvironmentError, "out of memory on the devices", "--batch_size"):
        sift(LINES, do)


def test_a_full_disk_is_no_rows_fault() -> None:
    with refusal(UnfitEnvironmentError, "No space left"):
        sift(LINES, do_without({4: OSError(28, "No space left on device", "/tmp/a")})[0])


class Known:
    """What is known of rows at which processes end."""

    def __init__(self, **times: int) -> None:
        self.times = {int(row[1:]): count for row, count in times.items()}
        self.ended: list[int] = []

    def begins(self, row: int) -> int:
        return self.times.get(row, 1)

    def ends(self, row: int) -> None:
        self.ended.append(row)


def test_a_row_at_which_processes_end_is_left_out() -> None:
    do, calls = do_without({6: BadSettingError("no 6")})
    known = Known(_2=3, _3=2, _5=0)
    lines, failures, _ = sift(LINES, do, known)
    assert known.ended == [line.row for line in LINES if line.row not in (2, 5)]
    assert [failure.row for failure in failures] == [2, 6] and len(lines) == 11
    assert failures[0].exit_code == 137 and "ended at it 2 times" in failures[0].error
    assert calls[:11] == [1] * 11 and calls[11] == 12
