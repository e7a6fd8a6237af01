"""Arrays on the wire are torch's, to the bit."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import _to_ndarray

from common.errors import BadSettingError
from common.vae.hybrid_format import from_8_bits, read_array, to_8_bits, write_array
from tests.refusals import refusal


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_an_array_is_that_of_torch(dtype: str) -> None:
    """As diffusers' client makes its bytes."""
    values = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(1)) * 255
    tensor = values.to(getattr(torch, dtype))
    found = read_array(_to_ndarray(tensor)[0].tobytes(), tensor.shape, dtype)
    expected = tensor if dtype == "uint8" else tensor.float()
    assert found.dtype == expected.numpy().dtype
    np.testing.assert_array_equal(found, expected.numpy())
    body, sent = write_array(found)
    again = torch.frombuffer(bytearray(body), dtype=getattr(torch, sent)).reshape(found.shape)
    np.testing.assert_array_equal(again.numpy(), found)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 4, 2, 2), "the body has 60 bytes, which is no float32 of shape"),
        ((2**40, 2**40), "the body has 60 bytes"),
        ((-1, -15), "give numbers from 1 on"),
        ((0, 4), "give numbers from 1 on"),
        ((), "which is no float32"),
    ],
)
def test_bytes_that_are_no_such_array(shape: Sequence[int], said: str) -> None:
    with refusal(BadSettingError, said):
        read_array(bytes(60), shape, "float32")


def test_pictures_in_8_bits() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    processor = VaeImageProcessor(vae_scale_factor=1)
    pictures = processor.preprocess(Image.fromarray(pixels[0])).numpy()
    found = to_8_bits(pictures)
    assert found is not None
    np.testing.assert_array_equal(found, pixels.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(from_8_bits(found), pictures)
    masked = pictures * (np.arange(16) < 8)  # zeros, which are between 127 and 128
    for other in (masked, pictures * 2, pictures * np.float32(np.nan)):
        assert to_8_bits(other.astype(np.float32)) is None
