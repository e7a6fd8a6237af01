"""Which backend is taken, and that each run of a process may take another."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any, get_args

import pytest

from common.compute.backends import (
    BACKENDS,
    JaxBackend,
    RemoteVae,
    TorchBackend,
    expected_backend,
    refuse_unknown_options,
    start_backend,
)
from common.compute.options import RunOptions
from common.errors import BadSettingError
from common.sampling.denoiser import Denoiser
from common.vae.runner import VaeRunner
from tests.refusals import refusal


def test_what_auto_is_where_there_are_only_cpus() -> None:
    """Whatever the run before it asked for."""
    for options, torch_on_cpus, expected in (
        (RunOptions(), True, TorchBackend("cpu")),
        (RunOptions(), False, JaxBackend("cpu")),
        (RunOptions(mesh="single"), True, JaxBackend("cpu")),
        (RunOptions(steps_per_call=2), True, JaxBackend("cpu")),
        (RunOptions(backend="jax"), True, JaxBackend("cpu")),
        (RunOptions(backend="torch"), False, TorchBackend("cpu")),
        (RunOptions(), True, TorchBackend("cpu")),
    ):
        assert expected_backend(options, torch_on_cpus=torch_on_cpus) is type(expected)
        assert start_backend(options, torch_on_cpus=torch_on_cpus) == expected


def test_an_accelerator_is_expected_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax alone knows whether there is one; the devices of these tests are CPUs all the same."""
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert expected_backend(RunOptions(), torch_on_cpus=True) is JaxBackend
    assert start_backend(RunOptions(), torch_on_cpus=True) == TorchBackend("cpu")
    assert expected_backend(RunOptions(backend="torch"), torch_on_cpus=False) is TorchBackend


def test_a_vae_of_a_server_comes_first() -> None:
    """Whatever else is asked for: a run's other stages heed that."""
    for backend in ("auto", "jax", "torch"):
        options = RunOptions(backend=backend, remote_vae="http://localhost:8000", mesh="single")
        assert expected_backend(options, torch_on_cpus=True) is RemoteVae
        started = start_backend(options, torch_on_cpus=True)
        assert started == RemoteVae("cpu") and started.choose_dtype("auto") == "float32"
    assert issubclass(import_module(RemoteVae.vae_module).RemoteRunner, VaeRunner)
    assert callable(resolve_name(RemoteVae.vae_opener))
    for own in ({"profile": True}, {"distributed": "auto"}):
        options = RunOptions.model_validate({"remote_vae": "http://localhost", **own})
        with refusal(BadSettingError, f"--{next(iter(own))} is for a VAE of this machine"):
            start_backend(options, torch_on_cpus=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mesh", "single"), ("steps_per_call", 2), ("operations", "torchax"), ("distributed", "auto")],
)
def test_options_that_torch_does_not_know(name: str, value: Any) -> None:
    options = RunOptions.model_validate({"backend": "torch", name: value})
    message = f"--{name} is for the compiled program: leave it or --backend torch out"
    with pytest.raises(BadSettingError, match=message):
        refuse_unknown_options(options)
    for backend in ("jax", "auto"):
        refuse_unknown_options(options.model_copy(update={"backend": backend}))


def test_rows_name_what_there_is() -> None:
    choices = get_args(RunOptions.model_fields["backend"].annotation)
    assert choices == ("auto", *BACKENDS)
    for row in BACKENDS.values():
        for module, base in ((row.denoiser_module, Denoiser), (row.vae_module, VaeRunner)):
            found = vars(import_module(module)).values()
            classes = [each for each in found if isinstance(each, type) and issubclass(each, base)]
            assert [each for each in classes if each is not base], module
        for opener in (row.denoiser_opener, row.vae_opener):
            assert callable(resolve_name(opener)), opener
        for module in row.libraries:
            assert find_spec(module) is not None, module
        assert set(row.unknown_options) <= RunOptions.model_fields.keys()


def test_auto_dtype() -> None:
    assert TorchBackend("cpu").choose_dtype("auto") == "float32"
    assert JaxBackend("tpu").choose_dtype("auto") == "bfloat16"
    assert JaxBackend("tpu").choose_dtype("auto", force_float32=True) == "float32"
    assert JaxBackend("cpu").choose_dtype("bfloat16", force_float32=True) == "bfloat16"
