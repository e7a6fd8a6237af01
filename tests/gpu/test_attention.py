"""What only a GPU can show; each test is a process that sees it."""

import os
import subprocess
import sys

import pytest

from tests.conftest import PROJECT_DIR

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp, numpy as np, torch
from common.compute.fast_ops import attention

generator = torch.Generator().manual_seed(0)
shape = (2, 10, 4096, 64)
q, k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
arrays = [jnp.asarray(tensor.float().numpy(), jnp.bfloat16) for tensor in (q, k, v)]
ours = jax.jit(lambda *a: attention(*a, layout=None, platform="gpu"))
plain = jax.jit(lambda *a: attention(*a, layout=None, platform="cpu"))
assert "cudnn" in ours.lower(*arrays).as_text()
def error(result):
    return np.linalg.norm(np.asarray(result, np.float64) - exact.numpy()) / exact.norm().item()
print(error(ours(*arrays)), error(plain(*arrays)))
"""


@pytest.mark.gpu
def test_cudnns_attention_is_as_exact_as_ours() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(PROJECT_DIR)],
        env=environment | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    cudnn, plain = map(float, result.stdout.split())
    assert cudnn < 1.5 * plain < 0.02
