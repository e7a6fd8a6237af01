"""diffusers' own client of hybrid inference against the server, and stages that ask it."""

import asyncio
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import load_file

from common.files.picture_files import read_picture_record, read_pixels
from common.files.report import read_report
from common.serving.catalog import Catalog
from common.serving.http_app import make_app
from common.serving.job_queue import JobQueue
from common.serving.service import Bounds, Service
from tests.conftest import DEMO, Run
from tests.refusals import expect
from tests.serving.conftest import Server

PROCESSOR = VaeImageProcessor()
LATENTS = np.zeros((1, 4, 8, 8), np.float32)
DECODE = {"shape": [1, 4, 8, 8], "dtype": "float32"}
NOWHERE = "http://127.0.0.1:9"


class Made(NamedTuple):
    """A run by the scripts, from a picture, of two images."""

    run_dir: Path
    picture: Path
    latents: torch.Tensor  # [2, 4, h, w], stage 2's
    pixels: np.ndarray  # [2, H, W, 3] uint8, stage 3's


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quick_stage: Run) -> Made:
    folder = tmp_path_factory.mktemp("made")
    picture, run_dir = folder / "picture.png", folder / "run"
    values = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(values).save(picture)
    settings = ("--height=64", "--width=96", "--num_inference_steps=4", "--strength=1")
    asked = (*settings, "--num_images_per_prompt=2", "--image", picture)
    for number, flags in ((1, asked), *((each, ("--mesh=single",)) for each in (0, 2, 3))):
        result = quick_stage(number, "--output_dir", run_dir, *flags)
        assert result.returncode == 0, result.stderr
    latents = load_file(run_dir / "stage2_latents.safetensors")["latents"]
    files = [run_dir / f"output_image_{number:04d}.png" for number in range(2)]
    return Made(run_dir, picture, latents, np.stack([read_pixels(path) for path in files]))


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(DEMO / "vae")


def in_pixels(found: Any, *, zero_to_one: bool = False) -> np.ndarray:
    """What the client returned, as [B, H, W, 3] uint8."""
    if isinstance(found, torch.Tensor):
        if found.dtype == torch.uint8:
            return found.numpy()
        found = found * 2 - 1 if zero_to_one else found
        found = PROCESSOR.postprocess(found, output_type="pil")
    several = found if isinstance(found, list) else [found]
    return np.stack([np.asarray(each) for each in several])


WAYS = [
    way
    for way in itertools.product(("pil", "pt"), ("pil", "pt"), (True, False), (True, False))
    # Which the client itself refuses, or forgets.
    if way[:3] != ("pil", "pt", False) and way != ("pt", "pil", False, False)
]


@pytest.mark.slow
@pytest.mark.parametrize(("output_type", "return_type", "processor", "partial"), WAYS)
def test_pictures_are_those_of_stage_3(
    server: Server,
    made: Made,
    output_type: Any,
    return_type: Any,
    processor: bool,
    partial: bool,
) -> None:
    for image_format, scaling in itertools.product(("png", "jpg"), ("factor", "own", "none")):
        factor = 0.45513
        tensor = made.latents[:1] / (factor if scaling == "none" else 1)
        found = remote_decode(
            f"{server.url}/decode",
            tensor,
            processor=PROCESSOR if processor else None,
            do_scaling=scaling != "none",
            # Which is not sent where nothing is to be scaled.
            scaling_factor=None if scaling == "own" else factor,
            output_type=output_type,
            return_type=return_type,
            image_format=image_format,
            partial_postprocess=partial,
        )
        as_file = output_type == "pil" and not processor
        pixels = in_pixels(found, zero_to_one=output_type == "pil").astype(int)
        assert pixels.shape == (1, 64, 96, 3)
        difference = np.abs(pixels - made.pixels[:1])
        if as_file and image_format == "jpg":
            assert found.format == "jpeg" and difference.mean() < 3
        elif as_file or (output_type == "pt" and partial):
            assert not difference.any()
        else:  # another program's floats, which the client rounds
            assert difference.max() <= 1 and difference.mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [(0.45513, None), (2.0, 0.25), (None, 0.25)], ids=str)
@torch.no_grad()
def test_floats_are_those_of_diffusers(
    server: Server, made: Made, vae: Any, dtype: torch.dtype, factors: Any
) -> None:
    tensor, (scaling, shift) = made.latents.to(dtype), factors
    found = remote_decode(
        f"{server.url}/decode",
        tensor,
        scaling_factor=scaling,
        shift_factor=shift,
        output_type="pt",
        return_type="pt",
    )
    # The client asks for the VAE's own factor where it is given none.
    unscaled = tensor.float() / (scaling or vae.config.scaling_factor) + (shift or 0)
    torch.testing.assert_close(found, vae.decode(unscaled).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_several_pictures_at_once(server: Server, made: Made) -> None:
    url, scaling = f"{server.url}/decode", {"scaling_factor": 0.45513}
    found = remote_decode(url, made.latents, output_type="pt", partial_postprocess=True, **scaling)
    assert np.array_equal(in_pixels(found), made.pixels)
    listed = remote_decode(url, made.latents, processor=PROCESSOR, **scaling)
    assert np.abs(in_pixels(listed).astype(int) - made.pixels).max() <= 1
    with pytest.raises(RuntimeError, match="is one picture, and these are 2: ask for pt"):
        remote_decode(url, made.latents, **scaling)
    with pytest.raises(RuntimeError, match="output_type mp4 is of videos"):
        remote_decode(url, made.latents, output_type="mp4", return_type="mp4", **scaling)


@pytest.mark.slow
@torch.no_grad()
def test_latents_are_those_of_stage_0_and_of_diffusers(
    server: Server, made: Made, vae: Any
) -> None:
    url = f"{server.url}/encode"
    with Image.open(made.picture) as picture:
        found = remote_encode(url, picture)
        # Of another tensor the client makes a copy, and frees it before it is sent.
        tensor = PROCESSOR.preprocess(picture).contiguous()
    written = load_file(made.run_dir / "stage0_latents.safetensors")["image_latents_mean"]
    assert torch.equal(found, written)
    mode = vae.encode(tensor).latent_dist.mode()
    torch.testing.assert_close(found, mode, atol=1e-4, rtol=1e-4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = tensor.to(dtype)
        scaled = remote_encode(url, given, scaling_factor=2.0, shift_factor=0.25)
        expected = (vae.encode(given.float()).latent_dist.mode() - 0.25) * 2
        torch.testing.assert_close(scaled, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_nothing_is_left_of_a_request(server: Server, made: Made) -> None:
    before = {*(server.jobs_dir / "runs").iterdir()}
    jobs = JobQueue(server.jobs_dir).jobs()
    url = f"{server.url}/decode"
    remote_decode(url, made.latents[:1], scaling_factor=1.0)
    for wrong, said in (
        (made.latents[:, :3], "has 3 channels: this VAE takes 4"),
        (made.latents * 1e38, "values that are not finite"),
    ):
        with pytest.raises(RuntimeError, match=said):
            remote_decode(url, wrong[:1], scaling_factor=0.5)
    assert {*(server.jobs_dir / "runs").iterdir()} == before
    assert JobQueue(server.jobs_dir).jobs() == jobs


@pytest.mark.slow
def test_stages_that_ask_a_server_make_the_same(
    server: Server, made: Made, quick_stage: Run, tmp_path: Path
) -> None:
    elsewhere = ("--remote_vae", server.url)
    to = ("--input_dir", made.run_dir, "--output_dir", tmp_path)
    assert quick_stage(0, *to, *elsewhere).returncode == 0
    name = "stage0_latents.safetensors"
    found, expected = (load_file(folder / name) for folder in (tmp_path, made.run_dir))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[each], expected[each]) for each in expected)
    assert quick_stage(3, *to, *elsewhere).returncode == 0
    for number in range(2):
        path = tmp_path / f"output_image_{number:04d}.png"
        assert np.array_equal(read_pixels(path), made.pixels[number])
        records = [read_picture_record(each) for each in (path, made.run_dir / path.name)]
        assert records[0] is not None and records[1] is not None
        assert records[0]["fingerprint"] == records[1]["fingerprint"]
    report = read_report(tmp_path, 3)
    assert report is not None and (report.backend, report.dtype) == ("remote", "float32")
    assert report.weights_bytes is None and report.programs is None
    again = quick_stage(3, "--output_dir", made.run_dir, "--skip_fresh", "--remote_vae", NOWHERE)
    assert again.returncode == 0 and "fresh" in again.stdout


@pytest.mark.slow
def test_tiles_are_a_servers_as_well(server: Server, quick_stage: Run, tmp_path: Path) -> None:
    """Cut and blended here, and so where the server has other flags."""
    run_dir = tmp_path / "run"
    flags = ("--height=192", "--width=64", "--num_inference_steps=1")
    assert quick_stage(1, "--output_dir", run_dir, *flags).returncode == 0
    assert quick_stage(2, "--output_dir", run_dir, "--mesh=single").returncode == 0
    pixels = []
    for name, own in (("here", "--mesh=single"), ("there", f"--remote_vae={server.url}")):
        to = ("--input_dir", run_dir, "--output_dir", tmp_path / name)
        assert quick_stage(3, *to, "--tile", own).returncode == 0
        pixels.append(read_pixels(tmp_path / name / "output_image.png"))
    assert np.array_equal(*pixels)


@pytest.mark.slow
def test_a_run_of_all_stages(server: Server, made: Made, run_all: Run, tmp_path: Path) -> None:
    shutil.copytree(made.run_dir, tmp_path / "run")
    (tmp_path / "run" / "stage0_latents.safetensors").unlink()
    settings = ("--height=64", "--width=96", "--num_inference_steps=4", "--strength=1")
    asked = (*settings, "--num_images_per_prompt=2", "--image", made.picture, "--mesh=single")
    result = run_all("--output_dir", tmp_path / "run", *asked, "--remote_vae", server.url)
    assert result.returncode == 0, result.stderr
    assert "stage 2: fresh" in result.stdout and "stage 3: fresh" in result.stdout


@pytest.mark.slow
def test_a_stage_whose_server_is_away(made: Made, quick_stage: Run, tmp_path: Path) -> None:
    to = ("--input_dir", made.run_dir, "--output_dir", tmp_path)
    expect(
        quick_stage(3, *to, "--remote_vae", NOWHERE), 5, f"--remote_vae {NOWHERE} cannot be reached"
    )
    assert not [*tmp_path.glob("output_*")]
    expect(quick_stage(3, *to, "--remote_vae", "ftp://a"), 2, "--remote_vae", "give an address")
    said = "--profile is for a VAE of this machine"
    expect(quick_stage(3, *to, "--remote_vae", NOWHERE, "--profile"), 2, said)


# --- without stages ------------------------------------------------------------------------------


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    service = Service(tmp_path / "jobs", {}, Bounds(images=2, pixels=4096, body_bytes=100_000))
    app = make_app(service, Catalog(own_model="models/demo"), None, lambda: True)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as found:
        yield found
    service.close()
    assert not [*(tmp_path / "jobs" / "runs").iterdir()]
    assert not JobQueue(tmp_path / "jobs").jobs()


@pytest.mark.parametrize(
    ("path", "asked", "body", "status", "said"),
    [
        ("decode", DECODE, b"", 400, "the body has 0 bytes, which is no float32"),
        ("decode", DECODE | {"shape": [1, 4, 8, 2**62]}, b"a", 400, "the body has 1 bytes"),
        ("decode", DECODE | {"shape": [1, 4, 8, -8]}, b"a", 400, "give numbers from 1 on"),
        ("decode", DECODE | {"shape": [4, 8, 8]}, b"a", 400, "are of packed latents"),
        ("decode", DECODE | {"shape": [8]}, b"a", 400, "each of 4 dimensions: it has 1"),
        ("decode", DECODE | {"shape": "x"}, b"a", 400, "shape.0: Input should be a valid integer"),
        ("decode", {"shape": DECODE["shape"]}, b"a", 400, "give the dtype, and shape"),
        ("decode", DECODE | {"dtype": "int4"}, b"a", 400, "dtype: Input should be 'float32', "),
        ("decode", DECODE | {"dtype": "uint8"}, bytes(256), 400, "dtype uint8: latents are"),
        ("decode", DECODE | {"height": 64, "width": 64}, b"a", 400, "height and width are of"),
        ("decode", DECODE | {"colour": "red"}, b"a", 400, "colour: Extra inputs are not"),
        ("decode", DECODE | {"scaling_factor": "nan"}, b"a", 400, "scaling_factor: "),
        ("decode", DECODE | {"scaling_factor": 0}, b"a", 400, "scaling_factor: "),
        ("decode", DECODE | {"shift_factor": "inf"}, b"a", 400, "shift_factor: "),
        ("decode", DECODE | {"output_type": "mp4"}, b"a", 400, "output_type mp4 is of videos"),
        ("decode", DECODE | {"image_format": "gif"}, b"a", 400, "image_format: Input should be"),
        (
            "decode",
            DECODE | {"do_scaling": "True", "scaling_factor": 2},
            LATENTS.tobytes(),
            400,
            "either do_scaling or scaling_factor",
        ),
        ("decode", DECODE, (LATENTS * np.nan).tobytes(), 400, "values that are not finite"),
        (
            "decode",
            DECODE | {"shape": [3, 4, 8, 8], "output_type": "pt"},
            LATENTS.tobytes() * 3,
            400,
            "3 images are more than the 2",
        ),
        ("decode", DECODE, bytes(100_001), 413, "is longer than 100000 bytes"),
        ("encode", {}, b"GIF89a", 400, "the body is no PNG, JPEG or WebP"),
        ("encode", {"moments": True, "scaling_factor": 2}, b"a", 400, "moments are not scaled"),
        ("encode", {"shape": [1, 3, 8, 8]}, b"a", 400, "give the dtype, and shape"),
    ],
    ids=str,
)
def test_what_is_refused_before_a_job_is_made(
    client: TestClient, path: str, asked: dict[str, Any], body: bytes, status: int, said: str
) -> None:
    answer = client.post(f"/{path}", params=asked, content=body)
    assert answer.status_code == status and said in answer.json()["error"]["message"]


def test_pictures_are_no_larger_than_may(client: TestClient, tmp_path: Path) -> None:
    for size, said in (((72, 64), "the body has 72×64 pixels, more than"), ((64, 64), "damaged")):
        Image.new("RGB", size, "red").save(tmp_path / "picture.png")
        data = (tmp_path / "picture.png").read_bytes()
        answer = client.post("/encode", content=data if said != "damaged" else data[:-40])
        assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_a_request_whose_client_goes_is_cancelled(tmp_path: Path) -> None:
    service = Service(tmp_path / "jobs", {})
    app = make_app(service, Catalog(own_model="models/demo"), None, lambda: True)
    states: list[str] = []

    async def ask() -> None:
        watching = asyncio.create_task(service.watch())
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": LATENTS.tobytes()})

        async def go() -> None:
            while not (jobs := await service.jobs()):
                await asyncio.sleep(0.01)
            states.append(jobs[0].state)
            messages.put_nowait({"type": "http.disconnect"})

        going = asyncio.create_task(go())

        async def send(_: Any) -> None:
            """Nobody reads it."""

        query = "shape=1&shape=4&shape=8&shape=8&dtype=float32&output_type=pt"
        scope = {"type": "http", "method": "POST", "path": "/decode", "raw_path": b"/decode"}
        scope |= {"query_string": query.encode(), "headers": [(b"host", b"localhost")]}
        await asyncio.wait_for(app(scope | {"http_version": "1.1"}, messages.get, send), 30)
        service.ends = True
        await asyncio.wait_for(watching, 10)
        await going

    asyncio.run(ask())
    service.close()
    assert states[0] == "waiting"
    assert not JobQueue(tmp_path / "jobs").jobs()
    assert not [*(tmp_path / "jobs" / "runs").iterdir()]
