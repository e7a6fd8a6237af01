"""Arrays as Hugging Face's hybrid inference sends them: raw bytes, their shape and dtype beside.

`diffusers.utils.remote_utils` is its client. A VAE's server and ours (`remote_runner`) say in it
also which VAE computes, and in which dtype.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from common.errors import BadSettingError

DECODE_PATH, ENCODE_PATH = "/decode", "/encode"
SHAPE, DTYPE = "shape", "dtype"  # headers of an answer
VAE, VAE_DTYPE = "vae", "vae_dtype"  # headers and parameters of ours
WireDtype = Literal["float32", "float16", "bfloat16", "uint8"]
_STORED: dict[str, str] = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",  # which numpy does not have: a float32's upper half
    "uint8": "u1",
}


def read_array(body: bytes, shape: Sequence[int], dtype: str) -> np.ndarray:
    """An array as float32, uint8 as it is; values are kept exactly.

    Raises:
        BadSettingError: the bytes are not as many as the shape says.
    """
    stored = np.dtype(_STORED[dtype])
    if min(shape, default=1) < 1:
        raise BadSettingError(f"shape {[*shape]}: give numbers from 1 on")
    if math.prod(shape) * stored.itemsize != len(body):
        raise BadSettingError(
            f"the body has {len(body)} bytes, which is no {dtype} of shape {[*shape]}: send the "
            "tensor's own bytes"
        )
    found = np.frombuffer(body, stored).reshape(shape)
    if dtype == "bfloat16":
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.uint8 if dtype == "uint8" else np.float32)


def write_array(array: np.ndarray) -> tuple[bytes, WireDtype]:
    """The bytes of an array, and their dtype: uint8, or float32."""
    dtype: WireDtype = "uint8" if array.dtype == np.uint8 else "float32"
    return np.ascontiguousarray(array, _STORED[dtype]).tobytes(), dtype


def to_8_bits(pictures: np.ndarray) -> np.ndarray | None:
    """Pictures in [-1, 1] as the 8 bits that they were made of; None where that loses something."""
    if not np.abs(pictures).max() <= 1:
        return None
    pixels = np.round((pictures / 2 + 0.5) * 255).astype(np.uint8)
    return pixels if np.array_equal(from_8_bits(pixels), pictures) else None


def from_8_bits(pixels: np.ndarray) -> np.ndarray:
    """8 bits as float32 in [-1, 1], as diffusers' `VaeImageProcessor` does it."""
    return np.float32(2) * (pixels.astype(np.float32) / np.float32(255)) - np.float32(1)
