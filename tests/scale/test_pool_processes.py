"""What of Ray's errors is the cluster's, and what is a defect of ours."""

from collections.abc import Iterator
from typing import Any

import pytest

pool_processes = pytest.importorskip("common.scale.pool_processes")

from ray.exceptions import ActorDiedError, OutOfDiskError, RayTaskError, UserCodeException

from common.errors import UnfitEnvironmentError
from tests.refusals import refusal


class Dataset:
    """Two rows, then an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        yield from ({"row": 0}, {"row": 1})
        raise self.error


def by_ray(cause: Exception) -> RayTaskError:
    """An error in a process, as Ray hands it on."""
    return RayTaskError("map", "a trace", cause).as_instanceof_cause()


def test_a_cluster_that_cannot_go_on_is_told() -> None:
    for error in (ActorDiedError(), OutOfDiskError("the disk is full"), by_ray(ActorDiedError())):
        rows = pool_processes.rows_of(Dataset(error))
        assert [next(rows)["row"], next(rows)["row"]] == [0, 1]
        with refusal(UnfitEnvironmentError, "the cluster cannot go on", "makes what is missing"):
            next(rows)


def test_a_defect_of_ours_stays_one() -> None:
    """Ray Data has exceptions of its processes in one of its own."""
    for cause in (UserCodeException("KeyError: 'x'"), KeyError("x")):
        rows = pool_processes.rows_of(Dataset(by_ray(cause)))
        next(rows), next(rows)
        with pytest.raises(type(cause)):
            next(rows)
