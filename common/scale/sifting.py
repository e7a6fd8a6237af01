"""Rows of a shard that something cannot be done with, told from those that it can."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from common.errors import StageError, UnfitEnvironmentError, error_of
from common.process import explain
from common.scale.shards import Failure, Line

Done = TypeVar("Done")
MOST_ENDS = 2  # of processes at a row alone; then it is left out
CODE_OF_ENDS = 137  # as of a process that is killed
MOST_DEFECTS = 8  # rows of a shard that something else than an input stands in the way of


class Ends(Protocol):
    """What is known of the rows of a shard at which processes end."""

    def begins(self, row: int) -> int:
        """Note that a row is tried alone. Returns how often it was without an end; 0: it ended."""

    def ends(self, row: int) -> None:
        """Note that the process is there still."""


def sift(
    lines: Sequence[Line], do: Callable[[Sequence[Line]], Done], ends: Ends | None = None
) -> tuple[list[Line], list[Failure], Done | None]:
    """Do something with rows, and leave out those that it cannot be done with.

    Returns the rows that it was done with, why not with the others, and what it gave.

    Args:
        ends: of processes at these rows, which are tried alone first.

    Raises:
        UnfitEnvironmentError: no row's fault.
        Exception: a defect at so many rows that it is none of theirs.
    """
    left, failures = (list(lines), list[Failure]()) if ends is None else _alone(lines, do, ends)
    defects = 0
    while left:
        try:
            return left, failures, do(left)
        except Exception as error:
            said = _of_rows(error)
            bad = _first_bad(left, do, said)
        if bad is None:  # each half is good alone
            try:
                return left, failures, do(left)
            except Exception as error:  # they do not go together
                said = _of_rows(error)
                if said.exit_code == UnfitEnvironmentError.exit_code:  # too many for the memory
                    raise said from error
            failures += [_failure_of(line, said) for line in left]
            break
        row, why = bad
        failures.append(_failure_of(row, why))
        if why.__cause__ is not None:
            defects += 1
            if defects == min(MOST_DEFECTS, len(lines)) and len(lines) > 1:
                raise why if why.exit_code == UnfitEnvironmentError.exit_code else why.__cause__
        left = [line for line in left if line.row != row.row]
    return [], failures, None


def _alone(
    lines: Sequence[Line], do: Callable[[Sequence[Line]], Any], ends: Ends
) -> tuple[list[Line], list[Failure]]:
    """Leave out rows at which processes end, such as those that the memory does not suffice for."""
    left, failures = list[Line](), list[Failure]()
    for line in lines:
        times = ends.begins(line.row)
        if times > MOST_ENDS:
            said = f"{line.where}: the process ended at it {times - 1} times, perhaps for memory"
            failures.append(Failure(line.row, line.where, said, CODE_OF_ENDS))
            continue
        if times:
            with suppress(Exception):  # which comes again, with all of them
                do([line])
            ends.ends(line.row)
        left.append(line)
    return left, failures


def _of_rows(error: Exception) -> StageError:
    """What rows may be at fault for, in words; a defect or too little memory has its cause.

    Raises:
        UnfitEnvironmentError: they are not.
    """
    if isinstance(error, UnfitEnvironmentError):
        raise error
    if isinstance(error, StageError):
        return error_of(error.exit_code, str(error))  # of its own kind, whatever caused it
    said = error_of(*explain(error, ""))
    said.__cause__ = error
    if isinstance(error, OSError):
        raise said
    return said


def _failure_of(line: Line, error: StageError) -> Failure:
    return Failure(line.row, line.where, str(error), error.exit_code)


def _first_bad(
    lines: Sequence[Line], do: Callable[[Sequence[Line]], Any], error: StageError
) -> tuple[Line, StageError] | None:
    """The first row that something cannot be done with, by halves, and why.

    Args:
        error: of all of them.
    """
    if len(lines) == 1:
        return lines[0], error
    half = len(lines) // 2
    for some in (lines[:half], lines[half:]):
        try:
            do(some)
        except Exception as own:
            return _first_bad(some, do, _of_rows(own))
    return None
