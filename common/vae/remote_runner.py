"""The VAE of a server: each program is a request of Hugging Face's hybrid inference.

The server has to be one of ours (`./run_all.sh --serve`): it says which VAE it has, which has to be
the checkpoint's, computes in the dtype that is asked for, and gives a posterior's parameters.
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests

from common.compute.backends import RemoteVae
from common.compute.clock import StageReport
from common.compute.options import API_KEY
from common.compute.profile_tables import Profiler
from common.errors import (
    BadSettingError,
    NotFiniteError,
    StageError,
    UnfitEnvironmentError,
    in_one_line,
    shorten,
)
from common.models.checkpoint import Checkpoint
from common.vae.hybrid_format import (
    DECODE_PATH,
    DTYPE,
    ENCODE_PATH,
    SHAPE,
    VAE,
    VAE_DTYPE,
    read_array,
    to_8_bits,
    write_array,
)
from common.vae.runner import Program, VaeRunner, has_posterior

SECONDS_TO_CONNECT = 10.0
SECONDS_TO_ANSWER = 600.0  # other jobs come first, and a program may have to be compiled
MOST_SAID = 300  # characters of a server's error


class RemoteRunner(VaeRunner):
    """One run's VAE on a server."""

    devices_of_images = 1

    def __init__(self, vae: Any, checkpoint: Checkpoint, url: str, report: StageReport) -> None:
        """
        Args:
            vae: without weights.
            checkpoint: whose VAE the server must have.
            url: the server's address.
        """
        super().__init__(vae, report)
        self._url, self._factor = url, checkpoint.vae_scale_factor
        self._fingerprint = checkpoint.weights_fingerprint("vae")
        self._dtype = str(self.dtype).removeprefix("torch.")
        self._warm = False

    def compute(self, program: Program, array: np.ndarray, *, warm_up: bool = False) -> Any:
        ask = self._decode if program.startswith("decode") else self._encode
        if warm_up and not self._warm:
            with self.report.part("warm_up"):
                ask(program, array)
        self._warm = True
        with self._running():
            found = ask(program, array)
        return (found, True) if program == "decode_whole" else found

    def _decode(self, program: Program, latents: np.ndarray) -> np.ndarray:
        count, _, *cells = latents.shape
        in_pixels = program == "decode_whole"
        asked = {"output_type": "pt", "partial_postprocess": in_pixels}
        found = self._ask(DECODE_PATH, asked, latents)
        sides = [side * self._factor for side in cells]
        expected = (count, *sides, 3) if in_pixels else (count, 3, *sides)
        return self._checked(found, expected, np.uint8 if in_pixels else np.float32)

    def _encode(self, program: Program, pictures: np.ndarray) -> np.ndarray:
        count, _, *sides = pictures.shape
        in_8_bits = to_8_bits(pictures)  # a quarter of what is sent
        given = pictures if in_8_bits is None else in_8_bits
        found = self._ask(ENCODE_PATH, {"moments": True}, given)
        channels = self.config["latent_channels"] * (2 if has_posterior(self.module) else 1)
        expected = (count, channels, *(side // self._factor for side in sides))
        return self._checked(found, expected, np.float32)

    def _checked(self, found: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        if found.shape != shape or found.dtype != dtype:
            raise UnfitEnvironmentError(
                f"--remote_vae {self._url} gave {found.dtype} of shape {[*found.shape]} in place "
                f"of {np.dtype(dtype)} of shape {[*shape]}: it is to be of this project's version"
            )
        return found

    def _ask(self, path: str, asked: dict[str, Any], array: np.ndarray) -> np.ndarray:
        """What the server gives for an array."""
        body, dtype = write_array(array)
        own = {VAE: self._fingerprint, VAE_DTYPE: self._dtype, "tile": False}
        response = self._post(path, {**asked, **own, SHAPE: array.shape, DTYPE: dtype}, body)
        said = response.headers.get(VAE), response.headers.get(VAE_DTYPE)
        if said != (self._fingerprint, self._dtype):
            raise BadSettingError(
                f"--remote_vae {self._url} does not say that it has the checkpoint's VAE: name a "
                "server of this project that serves the same checkpoint"
            )
        try:
            shape, wire_dtype = json.loads(response.headers[SHAPE]), response.headers[DTYPE]
            return read_array(response.content, shape, wire_dtype)
        except (LookupError, TypeError, ValueError, StageError) as error:
            raise UnfitEnvironmentError(
                f"--remote_vae {self._url} gave what cannot be read ({in_one_line(error)}): it is "
                "to be of this project's version"
            ) from None

    def _post(self, path: str, asked: dict[str, Any], body: bytes) -> requests.Response:
        try:
            response = requests.post(
                f"{self._url}{path}",
                params=asked,
                data=body,
                headers={"Content-Type": "tensor/binary", "Accept": "tensor/binary"},
                timeout=(SECONDS_TO_CONNECT, SECONDS_TO_ANSWER),
                allow_redirects=False,  # which would lose the body
                auth=_with_key,
            )
        except requests.ReadTimeout:
            raise UnfitEnvironmentError(
                f"--remote_vae {self._url} gave no answer in {SECONDS_TO_ANSWER:.0f} s: try again, "
                "or leave the flag out"
            ) from None
        except requests.ConnectionError:
            raise UnfitEnvironmentError(
                f"--remote_vae {self._url} cannot be reached, or broke off: start the server, or "
                "leave the flag out"
            ) from None
        except (requests.RequestException, UnicodeError) as error:
            raise BadSettingError(
                f"--remote_vae {self._url} cannot be asked ({in_one_line(error)}): give another "
                "address, or leave the flag out"
            ) from None
        if response.status_code != requests.codes.ok:
            raise self._refusal(response)
        return response

    def _refusal(self, response: requests.Response) -> StageError:
        """Of a server's error, whose sentence is told."""
        status = response.status_code
        server = f"--remote_vae {self._url}"
        if status in (401, 403):
            return BadSettingError(f"{server} wants its key: set {API_KEY} to it")
        try:
            said = response.json()["error"]
            said = str(said["message"] if isinstance(said, dict) else said)
        except (ValueError, LookupError, TypeError):
            said = response.reason or "no word"
        said = shorten(said, MOST_SAID)
        if status == 422:
            return NotFiniteError(f"{server}: {said}")
        if status in (408, 429) or status >= 500:
            return UnfitEnvironmentError(f"{server} failed with {status}: {said}")
        return BadSettingError(f"{server} refuses with {status}: {said}")

    def facts(self) -> dict[str, Any]:
        where = {"platform": "remote", "device": urlsplit(self._url).netloc, "devices": 1}
        return {"backend": RemoteVae.name, **where}

    def profiler(self, folder: Path) -> Profiler:
        raise NotImplementedError  # `RemoteVae.start` refuses `--profile`


def _with_key(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """The server's key on a request, where there is one; not what a .netrc says."""
    if key := os.environ.get(API_KEY):
        request.headers["Authorization"] = f"Bearer {key}"
    return request
