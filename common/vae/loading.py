"""Load a VAE to decode with: by PyTorch, or for the devices of a mesh that suits the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from common import messages
from common.compute import sharding
from common.compute.backends import BACKENDS, JaxBackend, TorchBackend
from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.models.checkpoint import Checkpoint
from common.models.weights import load_model, make_without_weights, with_weights
from common.vae.vae_settings import in_tiles

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from common.compute.devices import Devices, ModelOnDevices
    from common.vae.decoder import Decoder
    from common.vae.jax_decoder import JaxDecoder, Programs
    from common.vae.tiles import Tiles
    from common.vae.torch_decoder import TorchDecoder


@dataclass(frozen=True, kw_only=True)
class VaeToLoad:
    """A VAE, and how it is to decode."""

    checkpoint: Checkpoint
    dtype: str  # that it computes in
    tile: bool  # whether pictures larger than a tile are decoded in tiles

    def key(self, backend: str, *more: Any) -> tuple[Any, ...]:
        """What tells the loaded VAE from others: its content, not where it was found."""
        return "vae", backend, self.checkpoint.weights_fingerprint("vae"), self.dtype, *more


def open_decoder(
    kept: Kept,
    backend: str,
    vae: VaeToLoad,
    shape: Sequence[int],
    options: RunOptions,
    report: StageReport,
) -> "Decoder":
    """A decoder for one run, of what is kept or else of what is loaded now.

    Args:
        backend: that has started, by its name.
        shape: of all latents, [B, C, h, w].

    Raises:
        BadSettingError: `--mesh` asks for more devices than there are.
        BadInputFileError: the weights cannot be loaded.
    """
    opener = resolve_name(BACKENDS[backend].decoder_opener)
    decoder: Decoder = opener(kept, vae, shape, options, report)
    return decoder


def open_torch_decoder(
    kept: Kept, vae: VaeToLoad, shape: Sequence[int], options: RunOptions, report: StageReport
) -> "TorchDecoder":
    """`open_decoder` of PyTorch's backend."""
    from common.vae.torch_decoder import TorchDecoder

    module = kept.model(vae.key(TorchBackend.name), partial(load_torch_vae, vae, report))
    return TorchDecoder(module, make_tiles(vae, shape), report)


def load_torch_vae(vae: VaeToLoad, report: StageReport) -> Any:
    """diffusers' module with its weights."""
    import torch

    with report.part("checkpoint_read"):
        module, weights = load_model(vae.checkpoint, "vae", getattr(torch, vae.dtype))
        return with_weights(module, report.watch_memory(weights))


def open_jax_decoder(
    kept: Kept, vae: VaeToLoad, shape: Sequence[int], options: RunOptions, report: StageReport
) -> "JaxDecoder":
    """`open_decoder` of jax's backend."""
    from common.compute.devices import Devices
    from common.compute.programs import compiled_in
    from common.vae.jax_decoder import JaxDecoder

    devices, tiles = Devices.present(), make_tiles(vae, shape)
    mesh = settle_mesh(options, shape, tiles, devices)
    loaded = kept.model(
        vae.key(JaxBackend.name, mesh, options.operations),
        partial(load_vae_on_devices, vae, mesh, devices, options.operations, report),
    )
    programs = kept.programs(compiled_in(loaded.module, mesh, options.operations))
    return JaxDecoder(loaded, tiles, report, programs)


def load_jax_decoder(
    vae: VaeToLoad,
    shape: Sequence[int],
    options: RunOptions,
    report: StageReport,
    devices: "Devices",
    programs: "Programs",
) -> "JaxDecoder":
    """The VAE as jax compiles it, of which nothing is kept; also for devices that are not there.

    Args:
        shape: of all latents, [B, C, h, w].
        programs: as `JaxDecoder` takes them.
    """
    from common.vae.jax_decoder import JaxDecoder

    tiles = make_tiles(vae, shape)
    mesh = settle_mesh(options, shape, tiles, devices)
    loaded = load_vae_on_devices(vae, mesh, devices, options.operations, report)
    return JaxDecoder(loaded, tiles, report, programs)


def load_vae_on_devices(
    vae: VaeToLoad, mesh: "Mesh", devices: "Devices", operations: str, report: StageReport
) -> "ModelOnDevices":
    """diffusers' module for its code, its weights on the devices of a mesh."""
    import torch

    from common.compute.devices import ModelOnDevices
    from common.compute.fast_ops import arrange_weight

    dtype = getattr(torch, vae.dtype)
    with report.part("checkpoint_read"):
        module, weights = load_model(vae.checkpoint, "vae", dtype, by_config=not devices.are_there)
    with report.part("host_to_device"):
        parameters = devices.put_weights(
            report.watch_memory(weights),
            lambda *_: sharding.replicated(mesh),
            arrange=partial(arrange_weight, operations=operations, platform=devices.platform),
        )
    return ModelOnDevices(
        module=module, parameters=parameters, mesh=mesh, devices=devices, operations=operations
    )


def make_tiles(vae: VaeToLoad, shape: Sequence[int]) -> "Tiles | None":
    """How latents [B, C, h, w] are cut; None where they are decoded whole."""
    if not in_tiles(vae.tile, vae.checkpoint, shape):
        return None
    import torch

    from common.vae.tiles import Tiles

    return Tiles(make_without_weights(vae.checkpoint, "vae", getattr(torch, vae.dtype)))


def settle_mesh(
    options: RunOptions, shape: Sequence[int], tiles: "Tiles | None", devices: "Devices"
) -> "Mesh":
    """The mesh that is asked for, or that is best for so many images.

    A decoding has one prediction of an image and splits no weights: `cfg` and `tensor` of a mesh
    that is asked for go to the rows.
    """
    asked = sharding.parse_mesh(options.mesh)
    if asked is not None:
        rows = asked["rows"] * asked["cfg"] * asked["tensor"]
        asked = sharding.SINGLE | {"data": asked["data"], "rows": rows}
    choice = devices.choose_mesh(
        asked,
        images=min(shape[0], options.batch_size),
        predictions=1,
        # The decoder only doubles rows.
        rows_of_levels=[shape[2]] if tiles is None else tiles.rows(shape[2]),
    )
    for note in choice.notes:
        messages.warn(note)
    return sharding.make_mesh(choice.sizes, devices.devices)
