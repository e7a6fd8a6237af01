"""The page in a real browser, in front of a real server."""

import base64
import io
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from common.serving.page import PAGE, policy_of, router_of
from tests.browsers import needs_chromium
from tests.serving.conftest import Server, start_server

HOSTILE = "<img src=x onerror=alert(1)> a red star"
SHOWN = "[...document.querySelectorAll('#gallery img')].filter(i => i.naturalWidth).length"
SHOWN_OF_HOSTILE = (
    "[...document.querySelectorAll('figure')].filter(f => f.innerText.includes('onerror')"
    " && f.querySelector('img').naturalWidth).length"
)
PREVIEW = "document.querySelector('.job .seen')?.src || ''"


class Tab:
    """A page, and what its console and the network heard."""

    def __init__(self, browser: Any, server: Server, **how: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}, **how})
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(server.url)
        self.own = (server.url, "data:", f"blob:{server.url}")

    def until(self, script: str, seconds: float = 90) -> Any:
        """What a script gives once that is something; the page allows no polling of its own."""
        end = time.monotonic() + seconds
        while not (found := self.page.evaluate(script)):
            assert time.monotonic() < end, f"{script}: {self.page.inner_text('body')}"
            time.sleep(0.03)
        return found

    def close(self) -> None:
        assert self.said == [] and all(url.startswith(self.own) for url in self.requests)
        self.page.close()


def drop(tab: Tab, file: bytes) -> None:
    """Drop a PNG on the page, as a hand does."""
    data = base64.b64encode(file).decode()
    moved = tab.page.evaluate_handle(
        """(data) => { const moved = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          moved.items.add(new File([bytes], "a.png", { type: "image/png" })); return moved; }""",
        data,
    )
    tab.page.dispatch_event("#drop", "drop", {"dataTransfer": moved})
    tab.page.locator("#dropped").wait_for()


def test_the_policy_allows_its_own_script_and_nothing_elsewhere() -> None:
    app = FastAPI()
    app.include_router(router_of())
    answer = TestClient(app).get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert policy != policy_of(answer.text.replace('"use strict"', '"use strict" '))
    text = PAGE.read_text()
    assert "innerHTML" not in text and "http:" not in text and "https:" not in text


@needs_chromium
@pytest.mark.slow
def test_a_picture_is_made_and_seen_growing(server: Server, browser: Any) -> None:
    tab, other = Tab(browser, server), Tab(browser, server)
    page = tab.page
    page.fill("#prompt", HOSTILE)
    page.fill("#seed", "11")
    page.keyboard.press("Control+Enter")
    for each in (tab, other):
        each.until(f"{SHOWN_OF_HOSTILE} === 1")
    captions = page.locator("figcaption").all_inner_texts()
    assert f"{HOSTILE}, seed 11" in captions
    time.sleep(5)  # in which previews are fitted
    page.fill("#num_inference_steps", "150")
    page.fill("#width", "128")
    page.fill("#height", "128")
    page.click("#make")
    seen = {tab.until(PREVIEW)}
    page.reload()  # amid it
    words = tab.until("document.querySelector('.job .words')?.textContent")
    assert words == HOSTILE and page.locator(".job").count() == 1
    while len(seen) < 4:
        seen.add(tab.until(f"{PREVIEW} && {PREVIEW} !== {next(iter(seen))!r} && {PREVIEW}"))
        seen.add(other.until(PREVIEW))
    assert all(each.startswith("data:image/jpeg;base64,") for each in seen)
    for each in (tab, other):
        each.until("document.querySelectorAll('.job').length === 0")
        each.until(f"{SHOWN_OF_HOSTILE} === 2")
        assert each.page.locator("img[src=x]").count() == 0
    for each in (tab, other):
        each.close()


@needs_chromium
@pytest.mark.slow
def test_pictures_are_begun_with_and_read_by_drop(server: Server, browser: Any) -> None:
    body = {"prompt": "a blue ring", "settings": {"seed": 5, "guidance_scale": 3.5}}
    job = httpx.post(f"{server.url}/jobs", json=body).json()["id"]
    tab = Tab(browser, server)
    tab.until(f"document.querySelectorAll('#gallery [alt=\"a blue ring\"]').length && {SHOWN}")
    drop(tab, httpx.get(f"{server.url}/jobs/{job}/pictures/0").content)
    tab.page.click("#take_settings")
    tab.until("document.querySelector('#prompt').value === 'a blue ring'")
    assert tab.page.input_value("#seed") == "5"
    assert tab.page.input_value("#guidance_scale") == "3.5"
    assert tab.page.locator("#dropped").is_hidden()
    plain = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(plain, "PNG")
    drop(tab, plain.getvalue())
    tab.page.fill("#prompt", "begun with red")
    tab.page.fill("#strength", "0.5")
    tab.page.click("#make")
    tab.until("document.querySelectorAll('#gallery [alt=\"begun with red\"]').length")
    made = next(each for each in httpx.get(f"{server.url}/jobs").json())
    settings = httpx.get(f"{server.url}/jobs/{made['id']}").json()["settings"]
    assert settings["strength"] == 0.5 and settings["prompts"][0]["image"] == "image"
    tab.page.locator("#gallery [alt='begun with red']").click()
    tab.page.click("#use")
    picture = httpx.get(f"{server.url}/jobs/{made['id']}/pictures/0").content
    begun = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    tab.until(f"document.querySelector('#begin').src === {begun!r}")
    tab.said = [line for line in tab.said if "400" not in line]
    tab.close()


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_gallery_by_keyboard(server: Server, browser: Any, width: int, scheme: str) -> None:
    words = f"two, {width} {scheme}"
    body = {"prompt": words, "settings": {"num_images_per_prompt": 2}}
    job = httpx.post(f"{server.url}/jobs", json=body).json()["id"]
    view = {"width": width, "height": 900}
    tab = Tab(browser, server, viewport=view, color_scheme=scheme)
    page = tab.page
    tab.until(f"{SHOWN} > 1 && document.querySelectorAll('#gallery [alt=\"{words}\"]').length")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    unlabelled = "[...document.querySelectorAll('.make input, .make select, .make textarea')]"
    assert page.evaluate(f"{unlabelled}.filter(e => !e.labels.length).length") == 0
    page.locator(".picture").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    large = page.locator("#viewer .large")
    second = large.get_attribute("src")
    page.keyboard.press("ArrowLeft")
    assert large.get_attribute("src") != second and large.get_attribute("alt")
    walls = [r["wall_seconds"] for r in httpx.get(f"{server.url}/jobs/{job}").json()["reports"]]
    for wall in walls:
        assert f"{wall:.2f} s" in page.inner_text("#bars")
    page.click("#again_same")
    assert (
        page.input_value("#prompt") == words and page.input_value("#num_images_per_prompt") == "1"
    )
    page.locator(".picture").first.click()
    page.click("#compare")
    page.locator(".picture").nth(1).click()
    page.click("#compare")
    page.fill("#cut", "20")
    over = "getComputedStyle(document.querySelector('.two .over')).clipPath"
    assert page.evaluate(over) == "inset(0px 0px 0px 20%)"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    tab.close()


@needs_chromium
@pytest.mark.slow
def test_the_key_is_asked_for_once(tmp_path: Path, browser: Any) -> None:
    own = start_server(tmp_path / "jobs", "--api_key=secret")
    try:
        tab = Tab(browser, own)
        tab.page.locator("#ask[open]").wait_for()
        tab.page.fill("#key", "secret")
        tab.page.keyboard.press("Enter")
        tab.until("document.querySelector('#model').textContent")
        tab.page.reload()
        tab.until("document.querySelector('#model').textContent")
        assert tab.page.locator("dialog[open]").count() == 0
        assert {line for line in tab.said if "401" not in line} == set()
    finally:
        own.process.terminate()
        own.process.wait(60)
