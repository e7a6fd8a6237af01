"""What is compiled, whether it came from the cache, and which modules share it."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL

from common.compute.clock import StageReport
from common.compute.programs import compile_program, compiled_in
from common.compute.sharding import SINGLE, make_mesh


def lower(factor: float) -> Any:
    return jax.jit(lambda x: jnp.sin(x) @ x * factor).lower(np.ones((8, 8), np.float32))


def test_a_program_from_the_cache_is_told(cache: Path) -> None:
    report = StageReport(2, since_process_began=False)
    first = compile_program(partial(lower, 2.0), "first", report)
    again = compile_program(partial(lower, 2.0), "again", report)
    other = compile_program(partial(lower, 3.0), "other", report)
    assert [(each.name, each.from_cache) for each in report.programs.each] == [
        ("first", False),
        ("again", True),
        ("other", False),
    ]
    assert (report.programs.compiled, report.programs.from_cache) == (2, 1)
    x = np.ones((8, 8), np.float32)
    np.testing.assert_allclose(first(x), np.sin(x) @ x * 2, rtol=1e-6)
    np.testing.assert_array_equal(first(x), again(x))
    assert other.flops == first.flops and first.flops >= 2 * 8**3


def test_a_hit_in_another_thread_is_not_counted(cache: Path) -> None:
    """One thread fetches programs from the cache while another one compiles."""
    compile_program(partial(lower, 5.0), "known", StageReport(2, since_process_began=False))
    entered, leave = threading.Event(), threading.Event()
    report = StageReport(2, since_process_began=False)

    class Slow:
        """A lowered program that begins to compile when the other thread is done."""

        def compile(self) -> Any:
            entered.set()
            assert leave.wait(30)
            return lower(7.0).compile()

    thread = threading.Thread(target=compile_program, args=(Slow, "slow", report))
    thread.start()
    assert entered.wait(30)
    mine = StageReport(2, since_process_began=False)
    compile_program(partial(lower, 5.0), "known", mine)
    leave.set()
    thread.join()
    assert mine.programs.from_cache == 1
    assert (report.programs.compiled, report.programs.from_cache) == (1, 0)


def vae(**changes: Any) -> Any:
    with torch.device("meta"):
        return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **changes)


def test_modules_of_one_architecture_share_their_programs() -> None:
    mesh = make_mesh(SINGLE, jax.devices())
    key = compiled_in(vae(), mesh, "fast")
    same = vae()
    same.register_to_config(_name_or_path="elsewhere", _diffusers_version="0.1")
    assert compiled_in(same, make_mesh(SINGLE, jax.devices()), "fast") == key
    others = [
        compiled_in(vae(latent_channels=8), mesh, "fast"),
        compiled_in(vae().to(torch.bfloat16), mesh, "fast"),
        compiled_in(vae(), mesh, "torchax"),
        compiled_in(vae(), make_mesh(SINGLE, jax.devices()[1:]), "fast"),
        compiled_in(vae(), make_mesh(SINGLE | {"data": 2}, jax.devices()), "fast"),
        compiled_in(vae(), make_mesh(SINGLE | {"rows": 2}, jax.devices()), "fast"),
    ]
    assert len({key, *others}) == 1 + len(others)
