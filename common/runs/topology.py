"""What stages 0, 2 and 3 compile for a TPU that is not there, in place of a run (`--topology`)."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.compute.backends import JaxBackend
from common.compute.chips import Chip
from common.compute.clock import StageReport
from common.compute.groups import group_size, groups
from common.compute.options import RunOptions
from common.compute.tpu_compiler import (
    EstimateOf,
    chip_of,
    compile_and_say,
    devices_of,
    prepare_environment,
)
from common.errors import BadSettingError
from common.files.contracts import empty_embeddings
from common.files.run_files import GENERATION_CONFIG_FILE
from common.messages import warn
from common.models.checkpoint import Checkpoint
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.models.library_imports import quiet_libraries
from common.models.model_settings import ModelSettings
from common.runs.flags import Given
from common.runs.generation import (
    GenerationConfig,
    check_size,
    read_generation_config,
    read_run_settings,
    resolve,
)
from common.runs.image_latents import cells_of
from common.runs.jobs import denoising_job, empty_beginning, make_sampler
from common.sampling.share import Share

if TYPE_CHECKING:
    from common.compute.devices import Devices
    from common.vae.runner import Program

COMPILED_BY = ("backend", "mesh", "batch_size", "steps_per_call", "operations")  # options


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What is compiled for, and by which settings."""

    topology: str
    chip: Chip
    config: GenerationConfig
    checkpoint: Checkpoint
    options: RunOptions
    devices: "Devices"

    def estimate_of(self, mesh: Any, title: str, *, images: int, steps: int) -> EstimateOf:
        """What the estimate says of the program."""
        return EstimateOf(
            chip=self.chip,
            topology=self.topology,
            mesh=mesh,
            title=title,
            images=images,
            steps=steps,
        )


def estimate_denoising(given: Given) -> None:
    """Compile one denoising step for a TPU that is not there, and print what it would cost."""
    target = _prepare(given)
    config, checkpoint, options = target.config, target.checkpoint, target.options
    from common.sampling.loading import UNetToLoad, load_jax_denoiser
    from common.sampling.scheduler_tables import NotLinearError, make_tables

    dtype = "bfloat16" if config.unet_dtype == "auto" else config.unet_dtype
    sampler = make_sampler(config, checkpoint)
    unet_config = checkpoint.config("unet")
    empty = empty_embeddings(len(config.prompts), unet_config)
    job = denoising_job(config, checkpoint, empty, sampler)
    begin = empty_beginning(checkpoint, len(job.seeds), cells_of(config, checkpoint))
    job = replace(job, begin=begin)
    unet = UNetToLoad(checkpoint=checkpoint, loras=config.loras, dtype=dtype)
    denoiser = load_jax_denoiser(unet, [job], options, StageReport(2), target.devices, {})
    try:
        tables = make_tables(sampler)
    except NotLinearError as reason:
        raise BadSettingError(
            f"--topology compiles schedulers that are data; {sampler.name} steps on the host "
            f"({reason}): choose another --scheduler or --scheduler_option"
        ) from None
    if any(prompt.settings for prompt in config.prompts):
        warn("the settings that prompts have of their own are not estimated: those of the run are")
    if config.guidance_start > 0 or config.guidance_end < 1:
        warn("--guidance_start and --guidance_end: the steps without guidance are not estimated")
    size = group_size(options.at_once(len(job.seeds)), denoiser.devices_of_images)
    denoiser.start(Share(job, next(groups(len(job.seeds), size))[0], tables))
    compile_and_say(
        lambda: denoiser.lower(denoiser.plan.fullest()),
        target.estimate_of(
            denoiser.mesh,
            f"one step of {config.model_id}, {config.width}×{config.height}, {dtype}",
            images=size,
            steps=denoiser.evaluations,
        ),
        hlo_file=given.flags.save_hlo,
        json_file=given.flags.json_file,
    )


def estimate_decoding(given: Given) -> None:
    """Compile the decoding program for a TPU that is not there, and print what it would cost."""
    _estimate_vae(given, decodes=True)


def estimate_encoding(given: Given) -> None:
    """Compile the encoding program for a TPU that is not there, and print what it would cost."""
    _estimate_vae(given, decodes=False)


def _estimate_vae(given: Given, *, decodes: bool) -> None:
    target = _prepare(given)
    config, checkpoint, options = target.config, target.checkpoint, target.options
    from common.vae.loading import (
        VaeToLoad,
        images_to_decode,
        images_to_encode,
        latents_of_pictures,
        load_jax_runner,
        make_tiles,
    )

    dtype = config.vae_dtype
    if dtype == "auto":
        dtype = "float32" if checkpoint.upcasts_vae else "bfloat16"
    factor = checkpoint.vae_scale_factor
    count, height, width = pictures_shape(given.flags.pictures_shape, config, factor)
    pictures = (count, 3, height, width)
    latents = latents_of_pictures(pictures, checkpoint)
    vae = VaeToLoad(checkpoint=checkpoint, dtype=dtype, tile=config.tile)
    tiles = make_tiles(vae, latents)
    if decodes:
        shape, images = latents, images_to_decode([latents], tiles)
    else:
        shape, images = pictures, images_to_encode(pictures, tiles, checkpoint)
    report = StageReport(given.stage.number)
    runner = load_jax_runner(vae, images, options, report, target.devices, {})
    size = group_size(options.at_once(count), runner.devices_of_images)
    computed, what = (size, *shape[1:]), f"{width}×{height}"
    program: Program = "decode_whole" if decodes else "encode_whole"
    if tiles is not None:
        largest = tiles.size if decodes else tiles.sample_size
        tile = [min(largest, extent) for extent in shape[2:]]
        computed, what = (*computed[:2], *tile), f"the largest tile of {what}"
        program = "decode_tile" if decodes else "encode_tile"
    title = f"{'decoding' if decodes else 'encoding'} {config.model_id}, {what}, {dtype}"
    compile_and_say(
        lambda: runner.lower(program, computed),
        target.estimate_of(runner.mesh, title, images=size, steps=0),
        hlo_file=given.flags.save_hlo,
        json_file=given.flags.json_file,
    )


def _prepare(given: Given) -> _Target:
    """Settle what is compiled, and keep jax from looking for a chip.

    Settings are the built-in ones and the flags, or those of the run in a folder that is named; of
    the checkpoint only configs are read. Imports jax and torchax.
    """
    assert given.flags.topology is not None
    chip = chip_of(given.flags.topology)
    refuse_flags_of_a_run(given)
    prepare_environment()
    config, checkpoint = read_settings(given)
    quiet_libraries()
    from common.compute.devices import Devices

    return _Target(
        topology=given.flags.topology,
        chip=chip,
        config=config,
        checkpoint=checkpoint,
        options=given.options,
        devices=Devices.described(devices_of(given.flags.topology), int(chip.memory_bytes)),
    )


def refuse_flags_of_a_run(given: Given) -> None:
    """Raise `BadSettingError` for flags that would change nothing in what is compiled."""
    backend = given.options.backend
    if backend not in ("auto", JaxBackend.name):
        raise BadSettingError(f"--topology compiles by jax: leave it or --backend {backend} out")
    asked = [name for name in given.options.given() if name not in COMPILED_BY]
    asked += [n for n in ("wait", "skip_fresh", "only", "stream") if getattr(given.flags, n)]
    if asked:
        # The last: --profile_dir asks for --profile as well.
        raise BadSettingError(
            f"--{asked[-1]} is for a run, and --topology only compiles: leave one of them out"
        )


def read_settings(given: Given) -> tuple[GenerationConfig, Checkpoint]:
    """The settings to compile for: those of a run, or the built-in ones, with the flags.

    A folder without a run may be named as the output's, as in a script whose other commands run.
    """
    source_dir: Path | None = given.flags.input_dir or given.flags.output_dir
    is_run = source_dir is not None and (source_dir / GENERATION_CONFIG_FILE).exists()
    if source_dir is not None and (is_run or given.flags.input_dir is not None):
        config, _ = read_generation_config(source_dir).override(given.settings())
        checkpoint = _open_configs(config, given.stage.makes)
        check_size(config, checkpoint.vae_scale_factor)
        return config, checkpoint
    settings = read_run_settings(None, given.settings())
    checkpoint = _open_configs(settings, given.stage.makes)
    config = resolve(
        settings, native_size=checkpoint.native_size, size_factor=checkpoint.vae_scale_factor
    )
    return config, checkpoint


def _open_configs(settings: ModelSettings, artifact: str) -> Checkpoint:
    """A checkpoint of which no weights are needed, to make an artifact."""
    checkpoint = open_checkpoint(settings, ())
    checkpoint.check_supported(loaded_for(artifact))
    return checkpoint


def pictures_shape(text: str | None, config: GenerationConfig, factor: int) -> tuple[int, int, int]:
    """Number, height and width of the pictures to decode, as `N,H,W` or else by the settings.

    Args:
        factor: what height and width must be multiples of.

    Raises:
        BadSettingError: not of that form, or no such multiples.
    """
    if text is None:
        return len(config.image_seeds()), config.height, config.width
    match = re.fullmatch(r"([1-9]\d{0,5}),([1-9]\d{0,5}),([1-9]\d{0,5})", text)
    if match is None:
        raise BadSettingError(f"--pictures_shape {text} is not understood: give N,HEIGHT,WIDTH")
    count, height, width = map(int, match.groups())
    if height % factor or width % factor:
        raise BadSettingError(
            f"--pictures_shape {text}: give height and width as multiples of {factor}, which the "
            f"checkpoint {config.model_id} needs"
        )
    return count, height, width
