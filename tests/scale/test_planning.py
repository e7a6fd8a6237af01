"""Plans: the formula by hand, and estimates of other topologies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import BadInputFileError, BadSettingError
from common.scale.planning import ESTIMATES, Chips, Hosts, Plan, Shared, Shares, Work, chips_of
from tests.refusals import refusal

CHIPS = Chips(chips=4, images=4, step=0.04, decode=0.05)
PLAN = Plan(
    work=Work(images=360_000, steps=20, shard_images=100),
    hosts=Hosts(topology="v6e:2x2", chips=CHIPS, cores=10, cores_of_text=5),
    shares=Shares(text=0.5, encode=0.25, shard=10.0, picture_bytes=1000, index_bytes=24),
)


def test_hours_by_hand() -> None:
    # A picture: 20 steps of 0.01, decoded in 0.05, encoded on five cores in 0.05.
    assert PLAN.shard_seconds == pytest.approx(100 * (0.2 + 0.05 + 0.05) + 10)
    assert PLAN.rate == PLAN.rate_of_chips == pytest.approx(100 / 40)
    assert PLAN.rate_of_text == pytest.approx(10)
    assert PLAN.hours == pytest.approx(40)
    assert PLAN.chip_hours == pytest.approx(160)
    four = replace(PLAN, count=4)
    assert (four.hours, four.chip_hours) == (pytest.approx(10), pytest.approx(160))
    assert PLAN.within(10).count == 4 and PLAN.within(9.99).count == 5
    assert PLAN.storage_bytes == 360_000 * 1024
    kept = replace(PLAN, work=replace(PLAN.work, latents=True))
    assert kept.storage_bytes == 360_000 * (1024 + 4 * 128 * 128 * 4)


def test_text_encoders_may_be_what_is_slow() -> None:
    slow = replace(PLAN, shares=replace(PLAN.shares, text=5.0))
    assert slow.rate == slow.rate_of_text == pytest.approx(1)


def test_preemptions_take_half_a_shard_and_a_restart() -> None:
    spot = replace(PLAN, hosts=replace(PLAN.hosts, preemptions=24.0, restart=340.0))
    assert spot.lost == pytest.approx(360 / 3600)
    assert spot.hours == pytest.approx(40 / 0.9)
    never = replace(PLAN, hosts=replace(PLAN.hosts, preemptions=1e6))
    with refusal(BadSettingError, "make nothing"):
        never.check()


def test_what_hosts_share_has_room_for_some() -> None:
    shared = Shared(bytes_per_second=1024 * 25.0, objects_per_second=0.5)
    # A host: 2.5 images or 0.025 shards a second.
    assert PLAN.most_hosts(shared) == {
        "the target's bytes": 9,
        "the target's files": 9,
        "the program": int(0.9 / (0.025 * PLAN.shares.program)),
    }


def write(path: Path, **changes: Any) -> Path:
    figures = {"topology": "v5e:2x4", "images": 2, "images_per_second": 1.6, "steps": 25}
    path.write_text(json.dumps(figures | changes))
    return path


def test_estimates_of_another_topology(tmp_path: Path) -> None:
    assert chips_of("v6e:2x4", None, None, 25) is ESTIMATES["v6e:2x4"]
    unet = write(tmp_path / "unet.json")
    vae = write(tmp_path / "vae.json", images=1, images_per_second=4.0, steps=0)
    found = chips_of("v5e:2x4", unet, vae, 20)
    assert found == Chips(chips=8, images=2, step=pytest.approx(0.05), decode=0.25)
    for only in ((unet, None), (None, vae), (None, None)):
        with refusal(BadSettingError, "--topology v5e:2x4: estimates are there for v6e:2x4"):
            chips_of("v5e:2x4", *only, 25)
    with refusal(BadInputFileError, "is an estimate for v5e:2x4, not v6e:2x4"):
        chips_of("v6e:2x4", unet, None, 25)


@pytest.mark.parametrize(
    "changes", [{"images_per_second": 0}, {"images": None}, {"images_per_second": "1"}]
)
def test_a_file_that_is_no_estimate(tmp_path: Path, changes: dict[str, Any]) -> None:
    with refusal(BadInputFileError, "is no estimate of a stage"):
        chips_of("v5e:2x4", write(tmp_path / "a.json", **changes), tmp_path / "a.json", 25)
    (tmp_path / "b.json").write_text("[]")
    with refusal(BadInputFileError, "is no estimate of a stage"):
        chips_of("v5e:2x4", tmp_path / "b.json", tmp_path / "b.json", 25)
    with refusal(BadInputFileError, "is no estimate of a stage"):
        chips_of("v5e:2x4", tmp_path / "none.json", tmp_path / "none.json", 25)
