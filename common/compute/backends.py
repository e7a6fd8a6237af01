"""The backends that a stage can compute with, and which one is taken.

A backend is a row of `BACKENDS`: a class that says where its denoiser and its VAE are, what it
does not know of the options, and how it is started. Nothing else lists backends.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Self

from common.compute.allocator import keep_freed_memory
from common.compute.platforms import has_only_cpus, refuse_unfit_environment
from common.errors import BadSettingError, UnfitEnvironmentError, in_one_line
from common.models.weights import import_class

if TYPE_CHECKING:  # options know the backends' names
    from common.compute.options import RunOptions

# What a stage reports of where PyTorch computes.
TORCH_FACTS: dict[str, Any] = {"backend": "torch", "platform": "cpu", "device": "cpu", "devices": 1}


@dataclass(frozen=True)
class Backend(ABC):
    """A backend that is started."""

    name: ClassVar[str]  # as `--backend` takes it
    help: ClassVar[str]  # what stands for it in the help page
    denoiser_module: ClassVar[str]
    vae_module: ClassVar[str]
    # MODULE:FUNCTION, called as `sampling.loading.open_denoiser` and `vae.loading.open_runner`.
    denoiser_opener: ClassVar[str]
    vae_opener: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]]  # a stage imports them while the one before it runs
    unknown_options: ClassVar[tuple[str, ...]] = ()  # those of others, which it would not heed

    platform: str  # of its devices: cpu, gpu or tpu
    is_first_process: bool = True  # which writes; of several that compute together

    @classmethod
    @abstractmethod
    def start(cls, options: "RunOptions") -> Self:
        """Start it; one that has started in this process goes on.

        Raises:
            UnfitEnvironmentError: it finds no device.
        """

    def import_denoiser(self) -> None:
        """Import what denoising takes: seconds that belong to no part of it."""
        import_module(self.denoiser_module)
        import_class("unet")

    def import_vae(self) -> None:
        """Import what encoding and decoding take."""
        import_module(self.vae_module)
        import_class("vae")

    def choose_dtype(self, asked: str, *, force_float32: bool = False) -> str:
        """Settle `auto`: float32 on CPU and where the model asks for it, else bfloat16."""
        if asked != "auto":
            return asked
        return "float32" if force_float32 or self.platform == "cpu" else "bfloat16"


class JaxBackend(Backend):
    """Programs that jax compiles, for TPU, GPU or CPU."""

    name = "jax"
    help = "jax"
    denoiser_module = "common.sampling.jax_denoiser"
    vae_module = "common.vae.jax_runner"
    denoiser_opener = "common.sampling.loading:open_jax_denoiser"
    vae_opener = "common.vae.loading:open_jax_runner"
    libraries = (
        *("torch", "diffusers.utils"),
        *("common.compute.jax_start", "common.compute.torchax_runtime"),
    )

    @classmethod
    def start(cls, options: "RunOptions") -> Self:
        refuse_unfit_environment()
        try:
            from common.compute import jax_start, processes
        except ValueError as error:  # by which jax refuses its own variables
            raise UnfitEnvironmentError(
                f"jax refuses its environment ({in_one_line(error)}): mend or unset that variable"
            ) from None

        jax_start.set_up_jax(options.distributed)
        return cls(jax_start.platform(), processes.is_first_process())


class TorchBackend(Backend):
    """The modules as PyTorch runs them, on the CPU."""

    name = "torch"
    help = "torch (on the CPU)"
    denoiser_module = "common.sampling.torch_denoiser"
    vae_module = "common.vae.torch_runner"
    denoiser_opener = "common.sampling.loading:open_torch_denoiser"
    vae_opener = "common.vae.loading:open_torch_runner"
    libraries = ("torch", "diffusers.utils")
    unknown_options = ("mesh", "steps_per_call", "operations", "distributed")

    @classmethod
    def start(cls, options: "RunOptions") -> Self:
        keep_freed_memory()
        return cls("cpu")


BACKENDS: dict[str, type[Backend]] = {row.name: row for row in (JaxBackend, TorchBackend)}


class RemoteVae(Backend):
    """The VAE of a server (`--remote_vae`), in place of the one that `--backend` computes with."""

    name = "remote"
    vae_module = "common.vae.remote_runner"
    vae_opener = "common.vae.loading:open_remote_runner"
    libraries = ("torch", "diffusers.utils")

    @classmethod
    def start(cls, options: "RunOptions") -> Self:
        for name in ("profile", "distributed"):
            if getattr(options, name):
                raise BadSettingError(
                    f"--{name} is for a VAE of this machine: leave it or --remote_vae out"
                )
        return cls("cpu")  # as which this machine would compute: `auto` is float32


# What computes VAEs.
VAE_BACKENDS: dict[str, type[Backend]] = {**BACKENDS, RemoteVae.name: RemoteVae}


def start_backend(options: "RunOptions", *, torch_on_cpus: bool) -> Backend:
    """Start the backend that is asked for; the next run of a process may ask for another.

    Args:
        torch_on_cpus: what `auto` is where jax has nothing but CPUs: PyTorch, or jax there too.

    Raises:
        UnfitEnvironmentError: jax finds no device.
    """
    started = expected_backend(options, torch_on_cpus=torch_on_cpus).start(options)
    if isinstance(started, RemoteVae):
        return started
    if started.platform == "cpu" and _leaves_cpus_to_torch(options, torch_on_cpus):
        return TorchBackend.start(options)
    return started


def expected_backend(options: "RunOptions", *, torch_on_cpus: bool) -> type[Backend]:
    """The backend that `start_backend` takes, as far as that can be told without importing jax."""
    if options.remote_vae is not None:
        return RemoteVae
    if options.backend in BACKENDS:
        return BACKENDS[options.backend]
    to_torch = _leaves_cpus_to_torch(options, torch_on_cpus) and has_only_cpus()
    return TorchBackend if to_torch else JaxBackend


def _leaves_cpus_to_torch(options: "RunOptions", torch_on_cpus: bool) -> bool:
    """Whether `auto` is PyTorch on CPUs: it knows all that is asked."""
    return options.backend == "auto" and torch_on_cpus and not _unknown_to(TorchBackend, options)


def refuse_unknown_options(options: "RunOptions") -> None:
    """Raise `BadSettingError` for options that the backend asked for does not know."""
    if options.backend in BACKENDS and (unknown := _unknown_to(BACKENDS[options.backend], options)):
        raise BadSettingError(
            f"--{unknown[0]} is for the compiled program: leave it or --backend "
            f"{options.backend} out"
        )


def _unknown_to(backend: type[Backend], options: "RunOptions") -> list[str]:
    return [name for name in options.given() if name in backend.unknown_options]
