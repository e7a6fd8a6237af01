"""Stage 3: decode the latents to pictures, by diffusers' VAE, compiled or as PyTorch runs it.

    python stages/stage3_vae_decoder.py
    python stages/stage3_vae_decoder.py --image_format webp

Reads   generation_config.json, stage2_latents.safetensors, the checkpoint's VAE (nothing else).
Writes  output_image.png when there is one image; output_image_0000.png … and output_grid.png when
        there are several; all settings in their metadata, as the latents' header records them
        output_trajectory.png, output_trajectory.webp   where stage 2 saved a trajectory: a strip,
        and an animation
        stage3_report.json
Takes   some seconds for the demo checkpoint on a CPU, where PyTorch decodes.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from common.compute import sharding, tpu_compiler
from common.compute.backends import refuse_unknown_to_torch, start_backend
from common.compute.groups import group_size, groups, prompt_indices
from common.errors import NotFiniteError
from common.files import artifacts, picture_files
from common.files.artifacts import Artifact, Header, Recipe
from common.files.contracts import header_misfit, latents_misfit, trajectory_misfit
from common.files.kept_progress import Progress, progress_of, remove_progress
from common.files.report import Profile, StageReport, read_report
from common.files.run_lock import RunLock
from common.models.checkpoint import Checkpoint, open_checkpoint
from common.models.weights import (
    import_class,
    load_model,
    make_without_weights,
    quiet_libraries,
    spare_imports,
    with_weights,
)
from common.runs import flags
from common.runs.flags import say, warn
from common.runs.generation import (
    DEFAULT_OUTPUT_DIR,
    GenerationConfig,
    ModelSettings,
    RunOptions,
    read_generation_config,
    read_run_options,
    write_generation_config,
)
from common.stopping import StopRequest, finishing_first
from common.whole_files import write_bytes_whole

if TYPE_CHECKING:
    import numpy as np
    import torch

    from common.compute.devices import Devices
    from common.vae.decoder import Decoder, Tiles
    from common.vae.jax_decoder import JaxDecoder

COMPONENTS = ("vae",)
MOST_STRIP_PIXELS, MOST_FRAME_PIXELS = 192, 512  # a side of a picture of a trajectory


def make_recipe(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    latents: Artifact,
    vae_dtype: str,
) -> Recipe:
    """All that determines the pictures, what is written into them included."""
    upstream = latents.header.recipe.settings if latents.header is not None else {}
    return Recipe(
        stage=3,
        settings={
            **upstream,
            "vae_dtype": vae_dtype,
            "tile": in_tiles(config, checkpoint, latents.tensors["latents"].shape),
            "image_format": config.image_format,
        },
        inputs={artifacts.LATENTS_FILE: latents.data_sha256},
        weights={"vae": checkpoint.weights_fingerprint("vae")},
        versions=artifacts.package_versions(
            "torch", "torchax", "jax", "jaxlib", "diffusers", "pillow"
        ),
    )


def in_tiles(config: GenerationConfig, checkpoint: Checkpoint, shape: Sequence[int]) -> bool:
    """Whether latents [B, C, h, w] are cut: they are to be, and are larger than diffusers' tile."""
    sample_size = checkpoint.config("vae").get("sample_size", 32)
    if isinstance(sample_size, list):
        sample_size = sample_size[0]
    return config.tile and max(shape[2:]) > sample_size // checkpoint.vae_scale_factor


def why_stale(
    run_dir: Path,
    count: int,
    config: GenerationConfig,
    recipe: Recipe,
    trajectory: Artifact | None,
) -> str | None:
    """Say why the pictures must be made anew, or None where all of them are fresh and whole."""
    if trajectory is not None:
        fingerprint = trajectory_recipe(recipe, trajectory).fingerprint()
        for name in (picture_files.TRAJECTORY_STRIP, picture_files.TRAJECTORY_ANIMATION):
            found = picture_files.read_picture_record(run_dir / name) or {}
            if found.get("fingerprint") != fingerprint:
                return f"{name} is not there or of another trajectory"
    names, grid = picture_files.picture_names(count, config.image_format)
    for name in [*names, *([grid] if grid else [])]:
        if not (run_dir / name).exists():
            return f"{name} is not there"
        record = picture_files.read_picture_record(run_dir / name)
        if record is None:
            return f"{name} is damaged or not of ours"
        if record.get("fingerprint") != recipe.fingerprint():
            report = read_report(run_dir, 3)
            made = report.recipe if report is not None else None
            known = artifacts.difference(Recipe(**made), recipe) if made else None
            return known or f"{name} was made with other settings"
    return None


def expected_dtype(asked: str, run_dir: Path) -> str:
    """The dtype to expect of fresh pictures: `auto` stands for what it gave when they were made."""
    report = read_report(run_dir, 3)
    if asked == "auto" and report is not None and report.dtype_asked == "auto":
        return report.dtype
    return asked


def decode_groups(
    decoder: "Decoder",
    latents: "np.ndarray",
    options: RunOptions,
    *,
    bar: bool = True,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> "np.ndarray":
    """Decode latents [B, C, h, w] in groups of one shape. Returns [B, H, W, 3] uint8.

    Args:
        progress: where each group's pictures are kept until all are done, if there are several.
        stop: asked after each group.

    Raises:
        NotFiniteError: the VAE gave infinities or not-a-numbers.
        StoppedError: a stop was asked for; what is done is kept.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    size = group_size(len(latents), options.batch_size, decoder.devices_of_images)
    decoded = []
    hidden = None if bar else True  # None: where there is no terminal
    with tqdm(
        total=len(latents), desc="decode", unit="image", leave=False, disable=hidden
    ) as bar_of_images:
        for number, (chosen, real) in enumerate(groups(len(latents), size)):
            finished = progress.read_group(number) if progress is not None else None
            if finished is not None:
                decoded.append(finished["images"].numpy())
                bar_of_images.update(real)
                continue
            pixels, finite = decoder.decode(latents[chosen], warm_up=options.warmup)
            if not finite:
                dtype = str(decoder.dtype).removeprefix("torch.")
                raise NotFiniteError(
                    f"the VAE in {dtype} gave values that are not finite, so no picture "
                    "was written: use --vae_dtype float32"
                )
            decoded.append(pixels[:real])
            bar_of_images.update(real)
            if progress is not None and len(latents) > size:
                progress.save_group(number, {"images": torch.from_numpy(pixels[:real].copy())})
            if stop is not None and len(latents) > size:
                done = sum(map(len, decoded))
                stop.raise_if_asked(
                    f"after {done} of {len(latents)} images, which are kept: the same command goes "
                    "on from there"
                )
    return np.concatenate(decoded)


def measure(
    decoder: "Decoder", latents: "np.ndarray", options: RunOptions, profile_folder: Path
) -> Profile | None:
    """Decode the first group again, as often as `--repeat` and `--profile` ask for."""
    size = group_size(len(latents), options.batch_size, decoder.devices_of_images)
    first = latents[next(groups(len(latents), size))[0]]
    decoder.repeat(first, options.repeat)
    if not options.profile:
        return None
    return decoder.profile(first, profile_folder)


def find_trajectory(source_dir: Path, latents: Artifact, *, verify: bool) -> Artifact | None:
    """The trajectory that belongs to the latents, where stage 2 saved one."""
    path = source_dir / artifacts.TRAJECTORY_FILE
    if not path.exists():
        return None
    trajectory = artifacts.inspect(path, verify=verify)
    artifacts.refuse_misfit(trajectory, trajectory_misfit(trajectory.tensors, latents.tensors))
    if trajectory.header is not None and latents.header is not None:
        own = artifacts.recipe_of_its_latents(trajectory.header.recipe)
        if other := artifacts.difference(own, latents.header.recipe):
            warn(f"{path} is not decoded: it is of other latents ({other})")
            return None
    return trajectory


def trajectory_recipe(recipe: Recipe, trajectory: Artifact) -> Recipe:
    """All that determines a trajectory's pictures, by that of the run's pictures."""
    inputs = {artifacts.TRAJECTORY_FILE: trajectory.data_sha256}
    return recipe.model_copy(update={"inputs": inputs})


def decode_trajectory(
    decoder: "Decoder", trajectory: "np.ndarray", options: RunOptions
) -> tuple["np.ndarray", list["np.ndarray"]]:
    """Decode the latents [S, B, C, h, w] that stage 2 kept.

    Returns:
        A strip [H, W, 3] uint8 with a row for each image and a column for each step, and frames
        [H, W, 3] with all images as they are after one step.
    """
    import numpy as np
    from tqdm import tqdm

    from common.vae.decoder import make_grid, shrink

    columns, frames = [], []
    with decoder.counting_as("trajectory"):
        for latents in tqdm(trajectory, desc="trajectory", unit="step", leave=False, disable=None):
            images = decode_groups(decoder, latents, options, bar=False)
            columns.append(np.concatenate([shrink(image, MOST_STRIP_PIXELS) for image in images]))
            frames.append(make_grid(np.stack([shrink(i, MOST_FRAME_PIXELS) for i in images])))
    return np.concatenate(columns, axis=1), frames


def load_decoder(
    backend: str,
    shape: tuple[int, ...],
    config: GenerationConfig,
    checkpoint: Checkpoint,
    vae_dtype: str,
    options: RunOptions,
    report: StageReport,
) -> "Decoder":
    """The VAE of a backend.

    Args:
        shape: of all latents, [B, C, h, w].
    """
    if backend == "torch":
        return load_torch_decoder(shape, config, checkpoint, vae_dtype, report)
    from common.compute.devices import Devices

    devices = Devices.present()
    return load_jax_decoder(shape, config, checkpoint, vae_dtype, options, report, devices)


def load_torch_decoder(
    shape: tuple[int, ...],
    config: GenerationConfig,
    checkpoint: Checkpoint,
    vae_dtype: str,
    report: StageReport,
) -> "Decoder":
    """The VAE in PyTorch, for latents [B, C, h, w]."""
    import torch

    from common.vae.torch_decoder import TorchDecoder

    dtype = getattr(torch, vae_dtype)
    with report.part("checkpoint_read"):
        vae, weights = load_model(checkpoint, "vae", dtype)
        vae = with_weights(vae, report.watch_memory(weights))
    return TorchDecoder(vae, make_tiles(shape, config, checkpoint, dtype), report)


def make_tiles(
    shape: Sequence[int], config: GenerationConfig, checkpoint: Checkpoint, dtype: "torch.dtype"
) -> "Tiles | None":
    """How latents [B, C, h, w] are cut; None where they are decoded whole."""
    from common.vae.decoder import Tiles

    if not in_tiles(config, checkpoint, shape):
        return None
    return Tiles(make_without_weights(checkpoint, "vae", dtype))


def load_jax_decoder(
    shape: tuple[int, ...],
    config: GenerationConfig,
    checkpoint: Checkpoint,
    vae_dtype: str,
    options: RunOptions,
    report: StageReport,
    devices: "Devices",
) -> "JaxDecoder":
    """The VAE as jax compiles it: PyTorch's module for its code, its weights on the devices."""
    import torch

    from common.compute.fast_ops import arrange_weight
    from common.vae.jax_decoder import JaxDecoder

    dtype = getattr(torch, vae_dtype)
    with report.part("checkpoint_read"):
        vae, weights = load_model(checkpoint, "vae", dtype, by_config=not devices.are_there)
    tiles = make_tiles(shape, config, checkpoint, dtype)
    # The decoder only doubles rows.
    rows = [shape[2]] if tiles is None else tiles.rows(shape[2])
    choice = settle_mesh(options, shape[0], rows, devices)
    for note in choice.notes:
        warn(note)
    mesh = sharding.make_mesh(choice.sizes, devices.devices)
    with report.part("host_to_device"):
        parameters = devices.put_weights(
            report.watch_memory(weights),
            lambda *_: sharding.replicated(mesh),
            arrange=partial(
                arrange_weight, operations=options.operations, platform=devices.platform
            ),
        )
    return JaxDecoder(vae, parameters, mesh, devices, tiles, options.operations, report)


def settle_mesh(
    options: RunOptions, images: int, rows_of_levels: list[int], devices: "Devices"
) -> sharding.MeshChoice:
    """The mesh that is asked for, or that is best for so many images.

    There are no halves of guidance any more: `cfg` and `tensor` of a mesh that is asked for go to
    the rows.
    """
    asked = sharding.parse_mesh(options.mesh)
    if asked is not None:
        rows = asked["rows"] * asked["cfg"] * asked["tensor"]
        asked = sharding.SINGLE | {"data": asked["data"], "rows": rows}
    return devices.choose_mesh(
        asked,
        images=min(images, options.batch_size),
        guided=False,
        rows_of_levels=rows_of_levels,
    )


def compile_for_tpu(topology: str, parameters: dict[str, Any], source_dir: Path | None) -> None:
    """Compile the decoding program for a TPU that is not there, and print what it would cost."""
    chip, config, checkpoint, options, devices = tpu_compiler.prepare(
        topology, parameters, source_dir, "vae_dtype", COMPONENTS
    )
    vae_config, factor = checkpoint.config("vae"), checkpoint.vae_scale_factor
    dtype = config.vae_dtype
    if dtype == "auto":
        dtype = "float32" if vae_config.get("force_upcast", True) else "bfloat16"
    count, height, width = tpu_compiler.pictures_shape(parameters["pictures_shape"], config, factor)
    shape = (count, vae_config["latent_channels"], height // factor, width // factor)

    decoder = load_jax_decoder(shape, config, checkpoint, dtype, options, StageReport(3), devices)
    size = group_size(count, options.batch_size, decoder.devices_of_images)
    decoded, what = (size, *shape[1:]), f"{width}×{height}"
    if decoder.tiles is not None:
        tile = [min(decoder.tiles.size, extent) for extent in shape[2:]]
        decoded, what = (*decoded[:2], *tile), f"the largest tile of {what}"
    tpu_compiler.compile_and_say(
        lambda: decoder.lower(decoded),
        chip,
        decoder.mesh,
        title=f"decoding {config.model_id}, {what}, {dtype}",
        images=size,
        steps=0,
        topology=topology,
        hlo_file=parameters["save_hlo"],
        json_file=parameters["json"],
    )


def picture_settings(header: Header | None, index: int | None) -> dict[str, Any]:
    """One picture's settings, from the latents' header; of a grid (`index` None) those shared."""
    if header is None:
        return {}
    settings = dict(header.recipe.settings)
    prompts, negatives = settings.pop("prompts", []), settings.pop("negative_prompts", [])
    seconds = settings.pop("prompts_2", prompts)
    negative_seconds = settings.pop("negative_prompts_2", negatives)
    seeds = settings.pop("seeds", [])
    settings |= {
        name: header.provenance[name]
        for name in ModelSettings.model_fields
        if name in header.provenance
    }
    if index is not None and index < len(seeds):
        prompt = prompt_indices(len(prompts), settings["num_images_per_prompt"])[index]
        settings |= {
            "prompt": prompts[prompt],
            "prompt_2": seconds[prompt],
            "negative_prompt": negatives[prompt],
            "negative_prompt_2": negative_seconds[prompt],
            "seed": seeds[index],
            "image_index": index,
        }
    return settings


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What stage 3 computes, [H, W, 3] uint8 each."""

    images: "np.ndarray"  # [B, H, W, 3]
    strip: "np.ndarray | None" = None  # of the trajectory
    frames: "Sequence[np.ndarray]" = ()


def save_pictures(
    run_dir: Path,
    decoded: Decoded,
    config: GenerationConfig,
    header: Header | None,
    recipe: Recipe,
    trajectory: Artifact | None,
    overrides: list[str],
    report: StageReport,
) -> Path:
    """Save all pictures and the grid, remove those of an earlier run. Returns the main one."""
    from common.vae.decoder import make_grid

    images = decoded.images

    names, grid_name = picture_files.picture_names(len(images), config.image_format)
    own = {name: recipe.settings[name] for name in ("vae_dtype", "tile", "image_format")}
    if config.vae is not None:
        own["vae"] = config.vae
    files: list[tuple[str, Any, int | None]] = [
        (name, image, index) for index, (name, image) in enumerate(zip(names, images, strict=True))
    ]
    if grid_name is not None:
        files.append((grid_name, make_grid(images), None))

    def record(index: int | None, image: "np.ndarray", recipe: Recipe) -> dict[str, Any]:
        return {
            "settings": picture_settings(header, index) | own,
            "pixels_sha256": picture_files.hash_pixels(image),
            "fingerprint": recipe.fingerprint(),
            "inputs": recipe.inputs,
            "weights": recipe.weights,
            "versions": recipe.versions,
            "overrides": overrides,
        }

    encoded: dict[str, bytes] = {}
    with report.part("image_encoding"):
        for name, image, index in files:
            kept = record(index, image, recipe)
            encoded[name] = picture_files.encode_picture(image, Path(name).suffix, kept)
        if decoded.strip is not None and trajectory is not None:
            kept = record(None, decoded.strip, trajectory_recipe(recipe, trajectory))
            strip = picture_files.encode_picture(decoded.strip, ".png", kept)
            encoded[picture_files.TRAJECTORY_STRIP] = strip
            animation = picture_files.encode_animation(decoded.frames, kept)
            encoded[picture_files.TRAJECTORY_ANIMATION] = animation
    with report.part("writing"):
        for name, content in encoded.items():
            write_bytes_whole(run_dir / name, content)
        picture_files.remove_others(run_dir, set(encoded))
    return run_dir / files[-1][0]


def main(
    context: typer.Context,
    model_id: flags.ModelId = None,
    revision: flags.Revision = None,
    variant: flags.Variant = None,
    single_file_config: flags.SingleFileConfig = None,
    vae: flags.Vae = None,
    dtype: flags.StageDtype = None,
    vae_dtype: flags.VaeDtype = None,
    input_dir: flags.InputDir = None,
    output_dir: flags.OutputDir = None,
    tile: flags.Tile = None,
    image_format: flags.ImageFormatFlag = None,
    backend: flags.Backend = None,
    mesh: flags.Mesh = None,
    batch_size: flags.BatchSize = None,
    warmup: flags.Warmup = False,
    operations: flags.Operations = None,
    distributed: flags.Distributed = None,
    offline: flags.Offline = False,
    no_verify: flags.NoVerify = False,
    wait: flags.Wait = False,
    repeat: flags.Repeat = None,
    profile: flags.Profile = False,
    profile_dir: flags.ProfileDir = None,
    topology: flags.Topology = None,
    pictures_shape: flags.PicturesShape = None,
    save_hlo: flags.SaveHlo = None,
    json: flags.JsonFile = None,
    skip_fresh: flags.SkipFresh = False,
    debug: flags.Debug = False,
) -> None:
    """Decode the latents with the checkpoint's VAE and save the pictures.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    report = StageReport(3)
    run_dir = output_dir or input_dir or DEFAULT_OUTPUT_DIR
    source_dir = input_dir or run_dir
    if topology is not None:
        compile_for_tpu(topology, context.params, input_dir or output_dir)
        return
    flags.refuse_topology_flags(context.params)

    # 1. Settings: the run's, and what the flags override for this run of this stage
    report.phase("settings")
    options = read_run_options(context.params)
    sharding.parse_mesh(options.mesh)
    refuse_unknown_to_torch(options)
    lock = RunLock.of_stage(run_dir, wait=wait, writes=options.writes())
    context.call_on_close(lock.release)
    lock.acquire(make_folder=False)
    config = read_generation_config(source_dir)
    config, overrides = flags.apply_overrides(config, context.params, "vae_dtype")
    checkpoint = open_checkpoint(config, COMPONENTS)

    # 2. The input, whole and fitting; and are the pictures fresh already?
    latents = artifacts.inspect(source_dir / artifacts.LATENTS_FILE, verify=not no_verify)
    vae_config = checkpoint.config("vae")
    misfit = latents_misfit(latents.tensors, vae_config) or header_misfit(latents)
    artifacts.refuse_misfit(latents, misfit or artifacts.inputs_misfit(latents))
    count = latents.tensors["latents"].shape[0]
    recipe = make_recipe(config, checkpoint, latents, expected_dtype(config.vae_dtype, run_dir))
    trajectory = find_trajectory(source_dir, latents, verify=not no_verify)
    stale = why_stale(run_dir, count, config, recipe, trajectory) or options.why_measure()
    if skip_fresh and stale is None:
        names, grid = picture_files.picture_names(count, config.image_format)
        say(f"stage 3: fresh ({run_dir / (grid or names[0])})")
        return
    lock.acquire()
    say(f"stage 3: decode {count} image(s)")
    flags.say_why(stale if skip_fresh else None, overrides)

    # 3. Start the backend
    report.phase("imports")
    if not debug:
        quiet_libraries()
    started = start_backend(options, torch_on_cpus=True)
    spare_imports("peft", "scipy", "transformers")
    import_module(f"common.vae.{started.name}_decoder")
    import_class("vae")
    upcast = bool(vae_config.get("force_upcast", True))  # True is diffusers' own default
    dtype_used = started.choose_dtype(config.vae_dtype, force_float32=upcast)
    report.phase("other")

    # 4. Decode
    tensor = artifacts.load_tensors(latents, warn)["latents"].float().numpy()
    decoder = load_decoder(
        started.name, tensor.shape, config, checkpoint, dtype_used, options, report
    )
    recipe = make_recipe(config, checkpoint, latents, dtype_used)
    progress = progress_of(run_dir, recipe, options, decoder.facts())
    several = count > group_size(count, options.batch_size, decoder.devices_of_images)
    keeps = several and progress is not None
    with finishing_first() if keeps else nullcontext() as stop:
        images = decode_groups(decoder, tensor, options, progress=progress, stop=stop)
    profiled = measure(decoder, tensor, options, options.profile_folder(run_dir, 3))
    decoded = Decoded(images=images)
    if trajectory is not None:
        kept = artifacts.load_tensors(trajectory, warn)["latents"].float().numpy()
        strip, frames = decode_trajectory(decoder, kept, options)
        decoded = replace(decoded, strip=strip, frames=frames)
    if not started.is_first_process:
        say("  the first process writes")
        return

    # 5. Write
    main_picture = save_pictures(
        run_dir, decoded, config, latents.header, recipe, trajectory, overrides, report
    )
    if run_dir.resolve() != source_dir.resolve():
        write_generation_config(run_dir, config)
    remove_progress(run_dir, 3)
    report.write(
        run_dir,
        shapes={"images": list(images.shape)},
        dtype=dtype_used,
        dtype_asked=config.vae_dtype,
        versions=recipe.versions,
        recipe=recipe.model_dump(),
        profile=profiled,
        **decoder.facts(),
    )
    flags.say_times(report, main_picture, profiled)


if __name__ == "__main__":
    flags.run_command(flags.make_command(main))
