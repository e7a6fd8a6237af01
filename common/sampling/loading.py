"""Load a UNet to denoise with: by PyTorch, or for the devices of a mesh that suits the images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from common import messages
from common.compute import sharding
from common.compute.backends import BACKENDS, JaxBackend, TorchBackend
from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.errors import listed
from common.models.checkpoint import Checkpoint
from common.models.lora import Fusion, lora_settings, plan_fusion
from common.models.model_settings import LoraFile
from common.models.weights import (
    load_model,
    make_without_weights,
    read_model,
    with_weights,
)

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from common.compute.devices import Devices, ModelOnDevices
    from common.models.weights import Weights
    from common.sampling.denoiser import Denoiser
    from common.sampling.jax_denoiser import JaxDenoiser, Programs
    from common.sampling.job import DenoisingJob
    from common.sampling.torch_denoiser import TorchDenoiser


Model = TypeVar("Model")


@dataclass(frozen=True, kw_only=True)
class UNetToLoad:
    """A UNet, and what is added to its weights."""

    checkpoint: Checkpoint
    loras: tuple[LoraFile, ...]
    dtype: str  # that it computes in

    def base(self, backend: str, *more: Any) -> tuple[Any, ...]:
        """What tells it from others, but for LoRAs: its content, not where it was found."""
        return "unet", backend, self.checkpoint.weights_fingerprint("unet"), self.dtype, *more

    def added(self) -> tuple[tuple[str, float], ...]:
        """The LoRAs that change a UNet, by their content and scale."""
        loras = lora_settings(self.loras, ("unet",))
        return tuple((lora["sha256"], lora["scale"]) for lora in loras)

    def load(self, shared: dict[str, Any]) -> "tuple[Any, Fusion, Weights]":
        """diffusers' module without weights, what LoRAs add to them, and those that are to be read.

        Args:
            shared: the checkpoint's weights that are there; those that something is added to are
                taken out, and read.
        """
        import torch

        dtype = getattr(torch, self.dtype)
        module = make_without_weights(self.checkpoint, "unet", dtype)
        fusion = plan_fusion("unet", module, self.checkpoint, self.loras)
        fusion.leave(shared)
        weights = read_model(self.checkpoint, "unet", module, dtype, fusion, but=shared)
        return module, fusion, weights


@dataclass(frozen=True)
class _Loaded(Generic[Model]):
    """A UNet, and those of its weights that nothing is added to, by name.

    Another one of the same checkpoint shares them: its LoRAs are applied by reading what they
    change alone.
    """

    unet: Model
    own: dict[str, Any]


def open_denoiser(
    kept: Kept,
    backend: str,
    unet: UNetToLoad,
    jobs: "Sequence[DenoisingJob]",
    options: RunOptions,
    report: StageReport,
) -> "Denoiser":
    """A denoiser for one run, of what is kept or else of what is loaded now.

    Args:
        backend: that has started, by its name.
        jobs: all of the run, which one mesh is to suit.

    Raises:
        BadSettingError: `--mesh` asks for more devices than there are.
        BadInputFileError: the weights cannot be loaded.
    """
    opener = resolve_name(BACKENDS[backend].denoiser_opener)
    denoiser: Denoiser = opener(kept, unet, jobs, options, report)
    return denoiser


class UNets:
    """The UNet of a run with what is added to it for each job, opened when its turn has come.

    The one before is let go, unless the process keeps it for another run.
    """

    def __init__(
        self,
        kept: Kept,
        backend: str,
        base: UNetToLoad,
        jobs: "Sequence[DenoisingJob]",
        options: RunOptions,
        report: StageReport,
    ) -> None:
        """
        Args:
            base: its LoRAs are each job's own.
            jobs: all of the run.

        Raises:
            BadInputFileError: a LoRA does not fit the UNet, of which nothing is computed then.
        """
        self._base, self._open = base, partial(open_denoiser, kept, backend)
        self._rest = jobs, options, report
        self._several = len({job.loras for job in jobs}) > 1
        self._said: set[str] = set()  # which is the same of all of them
        if self._several:
            self._refuse_unfit_loras([*dict.fromkeys(job.loras for job in jobs)])
        self._there: Denoiser | None = None
        self._loras: tuple[LoraFile, ...] = ()  # that it has

    def _refuse_unfit_loras(self, sets: "list[tuple[LoraFile, ...]]") -> None:
        import torch

        dtype = getattr(torch, self._base.dtype)
        module = make_without_weights(self._base.checkpoint, "unet", dtype)
        with messages.each_once(self._said):
            for loras in sets:
                plan_fusion("unet", module, self._base.checkpoint, loras)

    def denoiser(self, job: "DenoisingJob") -> "Denoiser":
        """A denoiser for a job; one of another job may be of no use after that."""
        if self._there is None or job.loras != self._loras:
            if self._several:
                names = [f"{Path(lora.file).name}:{lora.scale:g}" for lora in job.loras]
                messages.say(f"  with {listed(names)}" if names else "  without LoRAs")
            self._there = None  # before its successor needs the memory
            with messages.each_once(self._said):
                self._there = self._open(replace(self._base, loras=job.loras), *self._rest)
            self._loras = job.loras
        return self._there


def open_torch_denoiser(
    kept: Kept,
    unet: UNetToLoad,
    jobs: "Sequence[DenoisingJob]",
    options: RunOptions,
    report: StageReport,
) -> "TorchDenoiser":
    """`open_denoiser` of PyTorch's backend."""
    from common.sampling.torch_denoiser import TorchDenoiser

    base, load = unet.base(TorchBackend.name), partial(load_torch_unet, unet, report)
    loaded = kept.variant(base, unet.added(), _share, load)
    return TorchDenoiser(loaded.unet, options, report)


def load_torch_unet(unet: UNetToLoad, report: StageReport, shared: dict[str, Any]) -> _Loaded[Any]:
    """diffusers' module with its weights; those that others share are not read."""
    with report.part("checkpoint_read"):
        module, fusion, weights = unet.load(shared)
        with_weights(module, chain(report.watch_memory(weights), shared.items()))
    return _loaded(module, module.state_dict(), fusion)


def open_jax_denoiser(
    kept: Kept,
    unet: UNetToLoad,
    jobs: "Sequence[DenoisingJob]",
    options: RunOptions,
    report: StageReport,
) -> "JaxDenoiser":
    """`open_denoiser` of jax's backend."""
    from common.compute.devices import Devices
    from common.compute.programs import compiled_in
    from common.sampling.jax_denoiser import JaxDenoiser

    devices = Devices.present()
    mesh = settle_mesh(unet, jobs, options, devices)
    loaded = kept.variant(
        unet.base(JaxBackend.name, mesh, options.operations),
        unet.added(),
        _share,
        partial(load_unet_on_devices, unet, mesh, devices, options.operations, report),
    ).unet
    programs = kept.programs(compiled_in(loaded.module, mesh, options.operations))
    _say_mesh(loaded)
    return JaxDenoiser(loaded, options, report, programs)


def load_jax_denoiser(
    unet: UNetToLoad,
    jobs: "Sequence[DenoisingJob]",
    options: RunOptions,
    report: StageReport,
    devices: "Devices",
    programs: "Programs",
) -> "JaxDenoiser":
    """The UNet as jax compiles it, of which nothing is kept; also for devices that are not there.

    Args:
        programs: as `JaxDenoiser` takes them.
    """
    from common.sampling.jax_denoiser import JaxDenoiser

    mesh = settle_mesh(unet, jobs, options, devices)
    loaded = load_unet_on_devices(unet, mesh, devices, options.operations, report, {}).unet
    _say_mesh(loaded)
    return JaxDenoiser(loaded, options, report, programs)


def load_unet_on_devices(
    unet: UNetToLoad,
    mesh: "Mesh",
    devices: "Devices",
    operations: str,
    report: StageReport,
    shared: dict[str, Any],
) -> "_Loaded[ModelOnDevices]":
    """diffusers' module for its code, its weights on the devices of a mesh.

    Args:
        shared: weights that others of the same checkpoint have on them.
    """
    import torch

    from common.compute.devices import ModelOnDevices
    from common.compute.fast_ops import arrange_weight

    with report.part("checkpoint_read"):
        if devices.are_there:
            module, fusion, weights = unet.load(shared)
        else:  # LoRAs change no program
            dtype = getattr(torch, unet.dtype)
            module, weights = load_model(unet.checkpoint, "unet", dtype, by_config=True)
            fusion = Fusion("unet", "")
    size = sum(p.numel() for p in module.parameters()) * module.dtype.itemsize
    spread = sharding.axis_to_spread(mesh, size, devices.memory_bytes)
    if spread is not None:
        messages.say(f"  weights do not fit on every device: each step gathers them over {spread}")
    with report.part("host_to_device"):
        parameters = devices.put_weights(
            report.watch_memory(weights),
            lambda name, shape: sharding.split_weight(mesh, name, shape, spread),
            arrange=partial(arrange_weight, operations=operations, platform=devices.platform),
        )
    parameters |= shared
    there = ModelOnDevices(
        module=module, parameters=parameters, mesh=mesh, devices=devices, operations=operations
    )
    return _loaded(there, parameters, fusion)


def _loaded(unet: Model, weights: Mapping[str, Any], fusion: Fusion) -> _Loaded[Model]:
    own = dict(weights)
    fusion.leave(own)
    return _Loaded(unet, own)


def _share(alike: Sequence[_Loaded[Any]]) -> dict[str, Any]:
    return {name: weight for loaded in alike for name, weight in loaded.own.items()}


def _say_mesh(unet: "ModelOnDevices") -> None:
    if unet.mesh.size > 1:
        messages.say(
            f"  mesh {sharding.name_of(unet.mesh)}, {unet.mesh.size} devices; weights: "
            f"{sharding.say_weights(unet.parameters)}"
        )


def settle_mesh(
    unet: UNetToLoad, jobs: "Sequence[DenoisingJob]", options: RunOptions, devices: "Devices"
) -> "Mesh":
    """The mesh that is asked for, or that is best for the images asked for."""
    levels = len(unet.checkpoint.config("unet")["block_out_channels"])
    rows = {job.latent_shape[1]: None for job in jobs}
    choice = devices.choose_mesh(
        sharding.parse_mesh(options.mesh),
        images=options.at_once(max(len(job.own) for job in jobs)),
        predictions=max(len(job.guidance.most_predictions()) for job in jobs),
        rows_of_levels=[each for own in rows for each in sharding.rows_of_levels(own, levels)],
    )
    for note in choice.notes:
        messages.warn(note)
    return sharding.make_mesh(choice.sizes, devices.devices)
