"""What requests may name, as folders have it, and pictures that are made of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import BadSettingError, UnfitEnvironmentError
from common.files.picture_files import read_pixels
from common.serving.catalog import Catalog
from tests.browsers import needs_chromium
from tests.conftest import DEMO, Run
from tests.refusals import refusal
from tests.serving.conftest import SMALL, Server, start_server
from tests.serving.test_page import Tab
from tests.tiny_checkpoints import save_demo_lora


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Two checkpoints, two LoRAs, a textual inversion, and what is none of these."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("models", "loras", "embeddings")}
    (folders["models"] / "copy").symlink_to(DEMO.resolve())
    (folders["models"] / "notes").mkdir()
    (folders["models"] / "one file.safetensors").write_bytes(b"")
    blob = save_demo_lora(folders["models"] / "blob", size=0.1)
    (folders["loras"] / "fine.safetensors").symlink_to(blob)  # as hubs' caches have it
    for name in (".hidden", "a:b", "a,b", "a\nb", "\udcff"):
        (folders["loras"] / f"{name}.safetensors").write_bytes(b"")
    save_demo_lora(folders["loras"] / "other.v2.safetensors", seed=1, size=0.1)
    (folders["loras"] / "old.pt").write_bytes(b"")
    vectors = {  # one for each of the two text encoders
        "clip_l": torch.randn(2, 64, generator=torch.Generator().manual_seed(0)),
        "clip_g": torch.randn(2, 96, generator=torch.Generator().manual_seed(1)),
    }
    save_file(vectors, folders["embeddings"] / "glow.safetensors")
    return Catalog(own_model="models/demo", **{f"{k}_dir": v for k, v in folders.items()})


def test_what_lies_in_the_folders(catalog: Catalog) -> None:
    assert catalog.models() == ["models/demo", "copy"]
    assert catalog.loras() == ["fine", "other.v2"]
    assert catalog.embeddings() == ["glow"]
    catalog.check({})
    empty = Catalog(own_model="mine")
    assert (empty.models(), empty.loras(), empty.embeddings()) == (["mine"], [], [])
    assert empty.flags(None, {}, []) == empty.flags("mine", {}, []) == {}
    gone = Catalog(own_model="mine", loras_dir=Path("nowhere"))
    with refusal(BadSettingError, "--loras_dir nowhere is no folder"):
        gone.check({})
    assert gone.flags("mine", {}, []) == {}
    with refusal(UnfitEnvironmentError, "--loras_dir cannot be read (No such file"):
        gone.loras()


def test_what_does_not_go_with_folders(catalog: Catalog, tmp_path: Path) -> None:
    with refusal(BadSettingError, "--vae is of one checkpoint", "--models_dir"):
        catalog.check({"vae": "other"})
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"loras": ["a.safetensors"]}))
    with refusal(BadSettingError, "--config has loras", "by --lora"):
        catalog.check({"config": config})
    config.write_text(json.dumps({"revision": "main"}))
    with refusal(BadSettingError, "--revision is of one checkpoint"):
        catalog.check({"config": config})


def test_names_become_flags(catalog: Catalog) -> None:
    assert catalog.models_dir and catalog.loras_dir and catalog.embeddings_dir
    found = catalog.flags("copy", {"fine": 0.5, "other.v2": -1}, ["glow", "glow"])
    folder = catalog.loras_dir.resolve()
    assert found == {
        "model_id": str(catalog.models_dir.resolve() / "copy"),
        "lora": [f"{folder / 'fine.safetensors'}:0.5", f"{folder / 'other.v2.safetensors'}:-1"],
        "embedding": [f"{catalog.embeddings_dir.resolve() / 'glow.safetensors'}:glow"],
    }
    assert catalog.embeddings_in(["a (Glow:1.2) star", ""], []) == ["glow"]
    assert catalog.embeddings_in(["a glowing star, glow-worm", ""], []) == []
    assert catalog.embeddings_in(["a glow", ""], ["GLOW"]) == []


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (("nope", {}, []), "model 'nope' is not here: there is models/demo, copy"),
        (("../copy", {}, []), "model '../copy' is not here"),
        ((None, {"old": 1.0}, []), "lora 'old' is not here: there is fine, other.v2"),
        ((None, {"/etc/passwd": 1.0}, []), "lora '/etc/passwd' is not here"),
        ((None, {"fine": float("nan")}, []), "lora fine: give a scale from -100 to 100"),
        ((None, {}, ["x" * 200]), "is not here: there is glow"),
        ((None, {}, ["glow"] * 17), "17 textual inversions are more than 16"),
        ((None, {f"{k}": 1.0 for k in range(17)}, []), "17 LoRAs are more than 16"),
    ],
)
def test_what_is_not_there(catalog: Catalog, named: Any, said: str) -> None:
    with refusal(BadSettingError, said):
        catalog.flags(*named)


@pytest.fixture(scope="module")
def server(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    names = ("models_dir", "loras_dir", "embeddings_dir")
    folders = [f"--{name}={getattr(catalog, name)}" for name in names]
    found = start_server(tmp_path_factory.mktemp("server") / "jobs", *folders)
    yield found
    found.process.terminate()
    found.process.wait(60)


def picture(server: Server, path: str, body: dict[str, Any]) -> np.ndarray:
    """Of a job that a request has made, [H, W, 3]."""
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    job = httpx.get(f"{server.url}/jobs").json()[0]["id"]
    return read_pixels(server.jobs_dir / "runs" / job / "output_image.png")


@pytest.mark.slow
def test_what_is_named_is_in_the_picture(
    server: Server, catalog: Catalog, quick_stage: Run, tmp_path: Path
) -> None:
    """By either API as by the scripts with the files; what was named before is in no later one."""
    words = "a glow star"
    ours = {"prompt": words, "seed": 4, "negative_prompt": "", "model": "copy"}
    named = {"loras": {"fine": 2.0}, "embeddings": ["glow"]}
    by_name = picture(server, "/v1/images/generations", ours | named)
    plain = picture(server, "/v1/images/generations", ours)
    web_ui = {
        "prompt": f"{words}<lora:fine:2>",
        **{"seed": 4, "steps": 2, "width": 64, "height": 64, "cfg_scale": 5.0},
        "override_settings": {"sd_model_checkpoint": "copy"},
    }
    by_web_ui = picture(server, "/sdapi/v1/txt2img", web_ui)
    flags = catalog.flags("copy", {"fine": 2.0}, ["glow"])
    given = [f"--model_id={flags['model_id']}", f"--lora={flags['lora'][0]}"]
    given += [f"--embedding={flags['embedding'][0]}", f"--prompt={words}", "--seed=4"]
    web_uis = ("--prompt_weighting=a1111", "--long_prompts=chunk", "--guidance_scale=5")
    for found, own in ((by_name, ()), (by_web_ui, (*web_uis, "--scheduler=euler"))):
        run_dir = tmp_path / ("ours" if found is by_name else "web_ui")
        first = (*given, *SMALL[:3], "--negative_prompt=", *own)
        for number, asked in ((1, first), (2, SMALL[3:]), (3, SMALL[3:])):
            result = quick_stage(number, f"--output_dir={run_dir}", *asked)
            assert result.returncode == 0, result.stderr
        assert np.array_equal(found, read_pixels(run_dir / "output_image.png"))
    assert np.abs(plain.astype(int) - by_name).max() > 8


@pytest.mark.slow
def test_what_there_is_is_told_without_folders(server: Server, catalog: Catalog) -> None:
    asked = ("/options", "/v1/models", "/sdapi/v1/sd-models", "/sdapi/v1/loras")
    answers = [httpx.get(f"{server.url}{path}") for path in (*asked, "/sdapi/v1/embeddings")]
    folders = (catalog.models_dir, catalog.loras_dir, catalog.embeddings_dir)
    assert not any(str(folder) in each.text for each in answers for folder in folders)
    options, models, checkpoints, loras, embeddings = (each.json() for each in answers)
    assert options["loras"] == [each["name"] for each in loras] == ["fine", "other.v2"]
    assert [*embeddings["loaded"]] == options["embeddings"] == ["glow"]
    assert [each["id"] for each in models["data"]] == options["models"] == catalog.models()
    assert [each["model_name"] for each in checkpoints] == catalog.models()
    assert catalog.loras_dir is not None
    new = save_demo_lora(catalog.loras_dir / "new.safetensors", seed=3)
    assert "new" in httpx.get(f"{server.url}/options").json()["loras"]
    new.unlink()
    wrong = ({"nope": 1}, {"fine": "x"}, {"fine": None}, "[" * 100_000, '{"fine": 1, "fine": 2}')
    for body in ({"model": "nope"}, *({"loras": each} for each in wrong)):
        answer = httpx.post(f"{server.url}/jobs", json={"prompt": "a", **body})
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


@needs_chromium
@pytest.mark.slow
def test_the_page_names_checkpoints_and_loras(server: Server, browser: Any) -> None:
    tab = Tab(browser, server, viewport={"width": 390, "height": 900})
    page = tab.page
    tab.until("document.querySelectorAll('#checkpoint option').length === 2")
    page.fill("#prompt", "by the page")
    page.click("summary")
    page.select_option("#checkpoint", "copy")
    page.fill("#loras", " fine:2, other.v2")
    page.click("#make")
    tab.until("document.querySelectorAll('#gallery [alt=\"by the page\"]').length")
    job = httpx.get(f"{server.url}/jobs").json()[0]["id"]
    settings = httpx.get(f"{server.url}/jobs/{job}").json()["settings"]
    assert [(each["file"], each["scale"]) for each in settings["loras"]] == [
        ("fine.safetensors", 2.0),
        ("other.v2.safetensors", 1.0),
    ]
    page.fill("#loras", "")
    page.locator(".picture").first.click()
    page.click("#again")
    assert page.input_value("#loras") == "fine:2, other.v2:1"
    tab.close()
