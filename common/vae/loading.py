"""Load a VAE: by PyTorch, or for the devices of a mesh that suits the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from common import messages
from common.compute import sharding
from common.compute.backends import VAE_BACKENDS, JaxBackend, TorchBackend
from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.models.checkpoint import Checkpoint
from common.models.weights import (
    load_model,
    make_without_weights,
    refuse_decoder_alone,
    with_weights,
)
from common.vae.vae_settings import in_tiles

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from common.compute.devices import Devices, ModelOnDevices
    from common.vae.decoder import Decoder
    from common.vae.encoder import Encoder
    from common.vae.jax_runner import JaxRunner, Programs
    from common.vae.remote_runner import RemoteRunner
    from common.vae.runner import VaeRunner
    from common.vae.tiles import Tiles
    from common.vae.torch_runner import TorchRunner


@dataclass(frozen=True, kw_only=True)
class VaeToLoad:
    """A VAE, and how it is to compute."""

    checkpoint: Checkpoint
    dtype: str  # that it computes in
    tile: bool  # whether pictures larger than a tile are computed in tiles

    def key(self, backend: str, *more: Any) -> tuple[Any, ...]:
        """What tells the loaded VAE from others: its content, not where it was found."""
        return "vae", backend, self.checkpoint.weights_fingerprint("vae"), self.dtype, *more


def open_decoder(
    kept: Kept,
    backend: str,
    vae: VaeToLoad,
    shapes: Sequence[Sequence[int]],
    options: RunOptions,
    report: StageReport,
) -> "Decoder":
    """A decoder for one run, of what is kept or else of what is loaded now.

    Args:
        backend: that has started, by its name.
        shapes: of all latents of one size, [B, C, h, w], and of those of each other one.

    Raises:
        BadSettingError: `--mesh` asks for more devices than there are.
        BadInputFileError: the weights cannot be loaded.
    """
    from common.vae.decoder import Decoder

    tiles = make_tiles(vae, max(shapes, key=lambda shape: max(shape[2:])))
    images = images_to_decode(shapes, tiles)
    return Decoder(open_runner(kept, backend, vae, images, options, report), tiles)


def open_encoder(
    kept: Kept,
    backend: str,
    vae: VaeToLoad,
    shape: Sequence[int],
    options: RunOptions,
    report: StageReport,
) -> "Encoder":
    """An encoder for one run, as `open_decoder`.

    Args:
        shape: of all pictures, [B, 3, H, W].

    Raises:
        BadInputFileError: also where the weights are a decoder's alone.
    """
    from common.vae.encoder import Encoder

    refuse_decoder_alone(vae.checkpoint)
    tiles = make_tiles(vae, latents_of_pictures(shape, vae.checkpoint))
    images = images_to_encode(shape, tiles, vae.checkpoint)
    return Encoder(open_runner(kept, backend, vae, images, options, report), tiles)


def latents_of_pictures(shape: Sequence[int], checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape [B, C, h, w] of the latents of pictures [B, 3, H, W]."""
    factor, channels = checkpoint.vae_scale_factor, checkpoint.config("vae")["latent_channels"]
    return shape[0], channels, shape[2] // factor, shape[3] // factor


@dataclass(frozen=True)
class ImagesToSplit:
    """What a mesh is chosen for."""

    count: int
    rows_of_levels: list[int]


def images_to_decode(shapes: Sequence[Sequence[int]], tiles: "Tiles | None") -> ImagesToSplit:
    """Those of latents [B, C, h, w] of each size, whose rows the decoder only doubles."""
    rows: dict[int, None] = {}
    for shape in shapes:
        is_cut = tiles is not None and tiles.cuts(shape)
        rows |= dict.fromkeys(tiles.rows(shape[2]) if tiles and is_cut else [shape[2]])
    return ImagesToSplit(max(shape[0] for shape in shapes), [*rows])


def images_to_encode(
    shape: Sequence[int], tiles: "Tiles | None", checkpoint: Checkpoint
) -> ImagesToSplit:
    """Those of pictures [B, 3, H, W], whose rows the encoder halves level by level."""
    levels = checkpoint.vae_scale_factor.bit_length()
    pictures = [shape[2]] if tiles is None else tiles.sample_rows(shape[2])
    rows = [rows for each in pictures for rows in sharding.rows_of_levels(each, levels)]
    return ImagesToSplit(shape[0], rows)


def open_runner(
    kept: Kept,
    backend: str,
    vae: VaeToLoad,
    images: ImagesToSplit,
    options: RunOptions,
    report: StageReport,
) -> "VaeRunner":
    """The VAE for one run, by its backend."""
    opener = resolve_name(VAE_BACKENDS[backend].vae_opener)
    runner: VaeRunner = opener(kept, vae, images, options, report)
    return runner


def open_torch_runner(
    kept: Kept, vae: VaeToLoad, images: ImagesToSplit, options: RunOptions, report: StageReport
) -> "TorchRunner":
    """`open_runner` of PyTorch's backend."""
    from common.vae.torch_runner import TorchRunner

    module = kept.model(vae.key(TorchBackend.name), partial(load_torch_vae, vae, report))
    return TorchRunner(module, report)


def open_remote_runner(
    kept: Kept, vae: VaeToLoad, images: ImagesToSplit, options: RunOptions, report: StageReport
) -> "RemoteRunner":
    """`open_runner` of a server's VAE, of which only the config is read here."""
    import torch

    from common.vae.remote_runner import RemoteRunner

    assert options.remote_vae is not None
    module = make_without_weights(vae.checkpoint, "vae", getattr(torch, vae.dtype))
    return RemoteRunner(module, vae.checkpoint, options.remote_vae, report)


def load_torch_vae(vae: VaeToLoad, report: StageReport) -> Any:
    """diffusers' module with its weights."""
    import torch

    with report.part("checkpoint_read"):
        module, weights = load_model(vae.checkpoint, "vae", getattr(torch, vae.dtype))
        return with_weights(module, report.watch_memory(weights))


def open_jax_runner(
    kept: Kept, vae: VaeToLoad, images: ImagesToSplit, options: RunOptions, report: StageReport
) -> "JaxRunner":
    """`open_runner` of jax's backend."""
    from common.compute.devices import Devices
    from common.compute.programs import compiled_in
    from common.vae.jax_runner import JaxRunner

    devices = Devices.present()
    mesh = settle_mesh(options, images, devices)
    loaded = kept.model(
        vae.key(JaxBackend.name, mesh, options.operations),
        partial(load_vae_on_devices, vae, mesh, devices, options.operations, report),
    )
    programs = kept.programs(compiled_in(loaded.module, mesh, options.operations))
    return JaxRunner(loaded, report, programs)


def load_jax_runner(
    vae: VaeToLoad,
    images: ImagesToSplit,
    options: RunOptions,
    report: StageReport,
    devices: "Devices",
    programs: "Programs",
) -> "JaxRunner":
    """The VAE as jax compiles it, of which nothing is kept; also for devices that are not there.

    Args:
        programs: as `JaxRunner` takes them.
    """
    from common.vae.jax_runner import JaxRunner

    mesh = settle_mesh(options, images, devices)
    loaded = load_vae_on_devices(vae, mesh, devices, options.operations, report)
    return JaxRunner(loaded, report, programs)


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
    """How latents [B, C, h, w] are cut; None where they stay whole."""
    if not in_tiles(vae.tile, vae.checkpoint, shape):
        return None
    import torch

    from common.vae.tiles import Tiles

    return Tiles(make_without_weights(vae.checkpoint, "vae", getattr(torch, vae.dtype)))


def settle_mesh(options: RunOptions, images: ImagesToSplit, devices: "Devices") -> "Mesh":
    """The mesh that is asked for, or that is best for so many images.

    A VAE has one prediction of an image and splits no weights: `cfg` and `tensor` of a mesh that
    is asked for go to the rows.
    """
    asked = sharding.parse_mesh(options.mesh)
    if asked is not None:
        rows = asked["rows"] * asked["cfg"] * asked["tensor"]
        asked = sharding.SINGLE | {"data": asked["data"], "rows": rows}
    choice = devices.choose_mesh(
        asked,
        images=options.at_once(images.count),
        predictions=1,
        rows_of_levels=images.rows_of_levels,
    )
    for note in choice.notes:
        messages.warn(note)
    return sharding.make_mesh(choice.sizes, devices.devices)
