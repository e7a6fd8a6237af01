"""Where checkpoints and what replaces their parts are found: folders, files, the hub's cache."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from common.declared import LATENTS, PICTURES
from common.errors import BadInputFileError, BadSettingError
from common.models import hub
from common.models.checkpoint import weights_name
from common.models.component_table import loaded_for
from common.models.find import _patterns, find_weights_file, open_checkpoint
from common.models.model_settings import PROJECT_DIR, ModelSettings
from tests.conftest import DEMO, file_contents
from tests.refusals import Error, call, refusal

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_working_directory_comes_before_the_project() -> None:
    settings = ModelSettings(model_id="models/demo")
    assert open_checkpoint(settings, ()).folder == PROJECT_DIR / "models/demo"
    shutil.copytree(DEMO, "models/demo")
    assert open_checkpoint(settings, ()).folder == Path("models/demo")


@pytest.mark.parametrize(
    ("form", "folder", "file"),
    [
        ("other/unet", "other/unet", None),
        ("other", "other/unet", None),
        (f"other/unet/{WEIGHTS}", "other/unet", f"other/unet/{WEIGHTS}"),
        ("files/unet.safetensors", str(DEMO / "unet"), "files/unet.safetensors"),
    ],
)
def test_a_replacement_is_a_model_a_pipeline_or_a_file(
    form: str, folder: str, file: str | None
) -> None:
    """Of one file the config is the one beside it, or else the checkpoint's."""
    shutil.copytree(DEMO, "other")
    Path("files").mkdir()
    shutil.copy(f"other/unet/{WEIGHTS}", "files/unet.safetensors")
    Path("files/config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    settings = ModelSettings.model_validate({"model_id": str(DEMO), "unet": form})
    checkpoint = open_checkpoint(settings, loaded_for(LATENTS))
    source = checkpoint.source("unet")
    assert (source.said, source.folder) == (f"--unet {form}", Path(folder))
    assert source.file == (None if file is None else Path(file))
    assert checkpoint.files_read("unet") == [
        source.folder / "config.json",
        Path(file or f"other/unet/{WEIGHTS}"),
    ]
    assert checkpoint.source("scheduler").folder == DEMO / "scheduler"


def test_a_file_in_the_place_of_another_stages_component_need_not_be_there() -> None:
    settings = ModelSettings.model_validate({"model_id": str(DEMO), "unet": "no.safetensors"})
    assert open_checkpoint(settings, loaded_for(PICTURES)).native_size == 128
    with pytest.raises(BadInputFileError, match=r"--unet no\.safetensors is no safetensors file"):
        open_checkpoint(settings, loaded_for(LATENTS))


def test_a_replacement_is_of_the_variant_where_it_has_that(demo_copy: Path) -> None:
    plain = demo_copy / "unet" / WEIGHTS
    variant = plain.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(plain, variant)
    for place, expected in ((demo_copy, variant.name), (DEMO, plain.name)):
        settings = ModelSettings.model_validate(
            {"model_id": str(demo_copy), "variant": "fp16", "unet": str(place / "unet")}
        )
        files = open_checkpoint(settings, loaded_for(LATENTS)).files_read("unet")
        assert [path.name for path in files] == ["config.json", expected]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_id": "one.safetensors"}, "is one file, which holds no configs"),
        ({"model_id": "one.safetensors", "single_file_config": "c", "variant": "fp16"},
         "--variant is for checkpoints in folders"),
        ({"model_id": "not there"}, "--model_id not there is neither an existing folder nor a hub"),
        ({"model_id": str(DEMO), "unet": "not there"}, "--unet not there is neither an existing"),
        ({"model_id": str(DEMO), "revision": "v1"}, "--revision is for hub ids"),
    ],
)  # fmt: skip
def test_settings_that_name_no_checkpoint(settings: dict[str, str], said: str) -> None:
    with pytest.raises(BadSettingError, match=re.escape(said)):
        open_checkpoint(ModelSettings.model_validate(settings), loaded_for(LATENTS))


def test_a_weights_file_is_a_path_or_a_file_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "find_file", lambda *call: asked.append(call) or Path("cached"))
    Path("own.safetensors").write_bytes(b"")
    assert find_weights_file("own.safetensors", "--lora", "FILE") == Path("own.safetensors")
    assert find_weights_file("who/what/a/b.safetensors", "--lora", "FILE", "v2") == Path("cached")
    assert asked == [("who/what", "a/b.safetensors", "v2", "--lora who/what/a/b.safetensors")]
    Path("own.bin").write_bytes(b"")
    for name in ("own.bin", "own", "b.safetensors"):
        with pytest.raises(BadInputFileError, match=f"--lora {name} is no safetensors file"):
            find_weights_file(name, "--lora", "FILE")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_hub_is_asked_for_what_is_read_and_little_else(variant: str | None) -> None:
    """By the hub's own matching of patterns."""
    v = "" if variant is None else f".{variant}"
    shard = "-00001-of-00002"
    wanted = {
        f"unet/{stem}{kind}"
        for stem in ("diffusion_pytorch_model", "model")
        for kind in (
            *(f"{v}.safetensors", f"{v}{shard}.safetensors", f"{shard}{v}.safetensors"),
            f".safetensors.index{v}.json",
        )
    }
    assert all(weights_name(variant).fullmatch(name.removeprefix("unet/")) for name in wanted)
    wanted |= {"unet/config.json"}
    others = {
        "unet/diffusion_pytorch_model.other.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
        "model.safetensors",
        "unet/model.onnx",
    }
    found = filter_repo_objects(wanted | others, allow_patterns=_patterns("unet/", variant))
    assert set(found) == wanted


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--variant", "fp16"], BadSettingError, ["--variant is for checkpoints in folders"]),
        (["--revision", "v1"], BadSettingError, ["--revision is for hub ids", "is a file"]),
        ([], BadInputFileError, ["one.safetensors is damaged", "--model_id"]),
    ],
)
def test_a_checkpoint_of_one_file(
    tmp_path: Path, flags: list[str], error: Error, words: list[str]
) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"none")
    with refusal(error, *words):
        call(
            *(1, "--output_dir", tmp_path / "run", "--model_id", file),
            *("--single_file_config", DEMO, *flags),
        )
    assert not (tmp_path / "run").exists() or not file_contents(tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "flag", "value", "error", "words"),
    [
        (1, "embedding", "no.safetensors", BadInputFileError,
         ["is no safetensors file", "FILE or FILE:TOKEN"]),
        (2, "lora", "no.safetensors", BadInputFileError,
         ["is no safetensors file", "FILE or FILE:SCALE"]),
        (3, "vae", "no such thing", BadSettingError,
         ["neither an existing folder or .safetensors file nor a hub id"]),
        (2, "single_file_config", "x", BadSettingError, ["is for a --model_id that is one"]),
        (1, "revision", "v1", BadSettingError, ["is for hub ids", "is a folder"]),
    ],
)  # fmt: skip
def test_a_part_that_is_nowhere(
    run_dir: Path, number: int, flag: str, value: str, error: Error, words: list[str]
) -> None:
    before = file_contents(run_dir)
    with refusal(error, f"--{flag}", *words):
        call(number, "--output_dir", run_dir, f"--{flag}", value)
    assert file_contents(run_dir) == before
