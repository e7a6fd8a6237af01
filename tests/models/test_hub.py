"""Files of the hub: from its cache without a question, else no more than is needed."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from common.errors import UnfitEnvironmentError
from common.models import hub
from tests.conftest import Run, file_contents
from tests.refusals import call, expect, refusal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with one repository of one file, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "models--maker--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    (root / "snapshots" / COMMIT / "a.safetensors").write_bytes(b"")
    return root / "snapshots" / COMMIT


def has(*names: str) -> hub.Callable[[Path], bool]:
    return lambda folder: all((folder / name).exists() for name in names)


def test_what_the_cache_has_needs_no_network(cache: Path) -> None:
    assert hub.find_snapshot("maker/model", None, "x", [["*"]], has("a.safetensors")) == cache
    assert hub.find_file("maker/model", "a.safetensors", None, "x") == cache / "a.safetensors"


def test_what_it_has_not_is_fetched_until_it_is_complete(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's download stands aside: it notes what is asked of it, and brings one file each."""
    asked = []

    def download(repository: str, **how: object) -> str:
        if how.get("local_files_only"):
            raise LocalEntryNotFoundError("nothing cached")
        asked.append((repository, how))
        (cache / str(len(asked))).write_bytes(b"")
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    tries = [["first*"], ["second*"], ["third*"]]
    assert hub.find_snapshot("maker/model", "v1", "x", tries, has("1", "2")) == cache
    assert asked == [
        ("maker/model", {"revision": "v1", "allow_patterns": patterns}) for patterns in tries[:2]
    ]


@pytest.mark.parametrize("offline", [True, False])
def test_what_cannot_be_had_is_one_sentence(
    cache: Path, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hub.OFFLINE, "1" if offline else "0")
    said = "--offline (or HF_HUB_OFFLINE=1) forbids" if offline else "cannot be had from the hub"
    for find in (
        lambda: hub.find_snapshot("who/knows", None, "--model_id who/knows", [["*"]], has("a")),
        lambda: hub.find_file("who/knows", "a.safetensors", None, "--model_id who/knows"),
    ):
        with pytest.raises(UnfitEnvironmentError) as caught:
            find()
        message = str(caught.value)
        assert message.startswith("--model_id who/knows is not on this machine")
        assert said in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "is_id"),
    [("maker/model", True), ("maker/model-1.0_x", True), ("model", False), ("a/b/c", False)],
)
def test_a_hub_id_has_two_parts(text: str, is_id: bool) -> None:
    assert (hub.REPOSITORY.fullmatch(text) is not None) == is_id


@pytest.mark.parametrize(
    ("number", "flag", "value"),
    [
        (1, "model_id", "who/knows"),
        (1, "lora", "who/knows/this.safetensors"),
        (1, "embedding", "who/knows/this.safetensors"),
        (2, "unet", "who/knows/this.safetensors"),
        (2, "lora", "who/knows/this.safetensors"),
        (3, "vae", "who/knows/this.safetensors"),
    ],
)
def test_a_part_that_the_hub_does_not_give(
    run_dir: Path, number: int, flag: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's library has read already that tests are offline; the sentence depends on now."""
    before = file_contents(run_dir)
    said = f"--{flag} {value} is not on this machine"
    with refusal(UnfitEnvironmentError, said, "--offline (or HF_HUB_OFFLINE=1)", "fetch it once"):
        call(number, "--output_dir", run_dir, f"--{flag}", value)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with refusal(UnfitEnvironmentError, said, "cannot be had from", "the name and the network"):
        call(number, "--output_dir", run_dir, f"--{flag}", value)
    assert file_contents(run_dir) == before


def test_offline_forbids_to_fetch_a_checkpoint(tmp_path: Path, stage: Run) -> None:
    result = stage(1, "--output_dir", tmp_path / "run", "--offline", "--model_id", "org/name")
    expect(result, 5, "--model_id org/name", "--offline")
    assert not (tmp_path / "run").exists()
