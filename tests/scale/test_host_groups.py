"""Processes that compute together: what one of them says of an error."""

from typing import Any

import pytest

host_groups = pytest.importorskip("common.scale.host_groups")

from common.errors import BadInputFileError
from common.scale.makers import Made, Making
from common.scale.shards import Shard

SHARD = Shard(0, 0, 1, 1, (), (), "", "ab" * 32)


def refuse(*_: Any) -> None:
    raise BadInputFileError("no such file")


def test_errors_of_a_process_are_told_with_their_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(Making, "enter", refuse)
    for index in (0, 1):
        member = host_groups.Member()
        making = Making(flags={"distributed": f"host:1,2,{index}"}, target=str(tmp_path))
        assert member.open(making, []) == ("no such file", 3)
    member._maker = member._follower = refuse
    assert member.make(Made(SHARD).to_row(), None) == ({}, ("no such file", 3))
    assert member.follow(2, {}) == ("no such file", 3)
    member._maker, member._follower = (lambda made, ends: made), lambda number, files: None
    assert member.follow(2, {}) == ("", 0)
    row, told = member.make(Made(SHARD).to_row(), None)
    assert told == ("", 0) and Made.from_row(row).shard == SHARD
