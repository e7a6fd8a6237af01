"""Stage 2: denoise, by diffusers' UNet compiled for TPU, GPU or CPU, or as PyTorch runs it.

    python stages/stage2_unet.py
    python stages/stage2_unet.py --num_inference_steps 30 --mesh data=4

Reads   generation_config.json, stage1_embeddings.safetensors, the checkpoint's UNet and scheduler
        settings (no text encoder).
Writes  stage2_latents.safetensors   latents [B, C, h, w] float32, as the sampler leaves them
        stage2_trajectory.safetensors   with --save_trajectory N: the latents [S, B, C, h, w] after
                                     every N steps, and the numbers of those steps [S]
        stage2_report.json
Takes   some seconds for the demo checkpoint on a CPU once compiled.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from common.compute import sharding, tpu_compiler
from common.compute.backends import refuse_unknown_to_torch, start_backend
from common.compute.groups import group_size, groups, prompt_indices
from common.conditions.sizes import has_own_negative, size_condition_settings, time_ids
from common.errors import BadInputFileError, BadSettingError
from common.files import artifacts
from common.files.artifacts import Artifact, Header, Recipe
from common.files.contracts import embeddings_misfit, empty_embeddings
from common.files.kept_progress import GroupProgress, Progress, progress_of, remove_progress
from common.files.report import Profile, StageReport
from common.files.run_lock import RunLock
from common.models.checkpoint import Checkpoint, open_checkpoint
from common.models.lora import fuse_into_unet, lora_settings
from common.models.weights import (
    import_class,
    load_model,
    quiet_libraries,
    spare_imports,
    with_weights,
)
from common.runs import flags
from common.runs.flags import say, warn
from common.runs.generation import (
    DEFAULT_OUTPUT_DIR,
    GENERATION_CONFIG_FILE,
    STEP_SETTINGS,
    GenerationConfig,
    RunOptions,
    check_size,
    read_generation_config,
    read_run_options,
    write_generation_config,
)
from common.sampling.sampler import Sampler, as_pipeline_reads_it, make_scheduler
from common.stopping import StopRequest, finishing_first
from common.whole_files import remove_file

if TYPE_CHECKING:
    import numpy as np
    import torch

    from common.compute.devices import Devices
    from common.models.weights import Weights
    from common.sampling.denoiser import Denoiser
    from common.sampling.jax_denoiser import JaxDenoiser
    from common.sampling.scheduler_tables import SchedulerTables

COMPONENTS = ("unet", "scheduler")
# Settings that determine the latents just as they stand.
SAMPLING_SETTINGS = (
    *("height", "width", "num_images_per_prompt", "eta"),
    *("guidance_scale", "guidance_rescale", "guidance_start", "guidance_end"),
)


def make_recipe(
    config: GenerationConfig, checkpoint: Checkpoint, embeddings: Artifact, unet_dtype: str
) -> Recipe:
    """All that determines the latents."""
    if embeddings.header is not None:
        prompt_settings = embeddings.header.recipe.settings
    else:
        prompt_settings = config.prompt_settings()
    scheduler, scheduler_options = choose_scheduler(config, checkpoint)
    loras = lora_settings(config.loras, ["unet"])
    return Recipe(
        stage=2,
        settings={
            **prompt_settings,
            **{name: getattr(config, name) for name in SAMPLING_SETTINGS},
            "unet_loras": loras,
            "vae_scale_factor": checkpoint.vae_scale_factor,
            **size_condition_settings(config, checkpoint),
            **{name: value for name, value in steps_of(config).items() if value is not None},
            "seeds": config.image_seeds(),
            "scheduler": scheduler,
            "scheduler_options": scheduler_options,
            "unet_dtype": unet_dtype,
        },
        inputs={artifacts.EMBEDDINGS_FILE: embeddings.data_sha256},
        weights={name: checkpoint.weights_fingerprint(name) for name in COMPONENTS},
        versions=artifacts.package_versions(
            *("torch", "torchax", "jax", "jaxlib", "diffusers", "scipy", "torchsde"),
            *(["peft"] if loras else []),
        ),
    )


def expected_dtype(asked: str, latents_file: Path) -> str:
    """The dtype to expect of fresh latents: `auto` stands for what it gave when they were made."""
    if asked == "auto" and latents_file.exists():
        try:
            header = artifacts.inspect(latents_file, verify=False).header
        except BadInputFileError:
            return asked
        if header is not None and header.provenance.get("unet_dtype_asked") == "auto":
            return str(header.recipe.settings["unet_dtype"])
    return asked


def prompts_misfit(header: Header | None, config: GenerationConfig) -> str | None:
    """Say where the embeddings were made from other prompts than the run's settings name."""
    if header is None:
        return None
    if header.recipe.stage != 1:
        return f"says that stage {header.recipe.stage} made it"
    made = header.recipe.settings
    for name, wanted in config.prompt_settings().items():
        if made.get(name) != wanted:
            return (
                f"was made with other {name} ({str(made.get(name))[:60]}) than "
                f"{GENERATION_CONFIG_FILE} names ({str(wanted)[:60]})"
            )
    return None


def warn_of_idle_settings(config: GenerationConfig, checkpoint: Checkpoint) -> None:
    """Say which settings change nothing, as diffusers leaves them without a word."""
    partial = (config.negative_original_size is None) != (config.negative_target_size is None)
    if partial or (
        config.negative_crops_coords_top_left != (0, 0) and not has_own_negative(config)
    ):
        warn(
            "the negative size conditions have no effect: they need both --negative_original_size "
            "and --negative_target_size"
        )
    distilled = checkpoint.config("unet").get("time_cond_proj_dim") is not None
    interval = (config.guidance_rescale, config.guidance_start, config.guidance_end)
    if distilled and interval != (0, 0, 1):
        warn(
            "--guidance_rescale, --guidance_start and --guidance_end have no effect: this UNet is "
            "told the guidance scale and computes no unconditional half"
        )


def choose_scheduler(
    config: GenerationConfig, checkpoint: Checkpoint
) -> tuple[str, dict[str, Any]]:
    """diffusers' class of the scheduler, and its settings besides the checkpoint's own."""
    return config.scheduler_choice(checkpoint.config("scheduler")["_class_name"])


def packages_to_spare(config: GenerationConfig, checkpoint: Checkpoint) -> list[str]:
    """What diffusers need not import for these settings, as `spare_imports` takes it."""
    class_name, options = choose_scheduler(config, checkpoint)
    settings = {**checkpoint.config("scheduler"), **options}
    needs_scipy = class_name == "LMSDiscreteScheduler" or settings.get("use_beta_sigmas")
    return [] if config.loras else ["peft", "transformers", *([] if needs_scipy else ["scipy"])]


def steps_of(config: GenerationConfig) -> dict[str, Any]:
    """The number of steps, or the timesteps or sigmas in its place; None for the others."""
    return {name: getattr(config, name) for name in STEP_SETTINGS}


def make_sampler(config: GenerationConfig, checkpoint: Checkpoint) -> Sampler:
    """The scheduler that the settings ask for, with the checkpoint's own settings.

    Raises:
        BadSettingError: diffusers refuses its settings or its steps.
    """
    class_name, options = choose_scheduler(config, checkpoint)
    settings = checkpoint.config("scheduler")
    if checkpoint.pipeline_class == "StableDiffusionPipeline":
        settings = as_pipeline_reads_it(settings, class_name)
    scheduler = make_scheduler(settings, class_name, options)
    sampler = Sampler(scheduler, **steps_of(config), eta=config.eta)
    if config.eta > 0 and not sampler.takes_eta:
        warn(f"--eta {config.eta} has no effect: {class_name} takes none")
    sampler.restart()
    return sampler


def load_denoiser(
    backend: str,
    config: GenerationConfig,
    checkpoint: Checkpoint,
    unet_dtype: str,
    options: RunOptions,
    report: StageReport,
) -> "Denoiser":
    """The UNet of a backend."""
    if backend == "torch":
        return load_torch_denoiser(config, checkpoint, unet_dtype, options, report)
    from common.compute.devices import Devices

    return load_jax_denoiser(config, checkpoint, unet_dtype, options, report, Devices.present())


def load_torch_denoiser(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    unet_dtype: str,
    options: RunOptions,
    report: StageReport,
) -> "Denoiser":
    """The UNet in PyTorch."""
    import torch

    from common.sampling.torch_denoiser import TorchDenoiser

    with report.part("checkpoint_read"):
        unet, weights = load_unet(config, checkpoint, getattr(torch, unet_dtype))
        unet = with_weights(unet, report.watch_memory(weights))
    return TorchDenoiser(unet, options, report)


def load_unet(
    config: GenerationConfig, checkpoint: Checkpoint, dtype: "torch.dtype", **how: bool
) -> "tuple[Any, Weights]":
    """diffusers' module without weights, and its weights, the LoRAs fused into them."""
    fuse = partial(fuse_into_unet, loras=config.loras) if config.loras else None
    return load_model(checkpoint, "unet", dtype, change=fuse, **how)


def load_jax_denoiser(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    unet_dtype: str,
    options: RunOptions,
    report: StageReport,
    devices: "Devices",
) -> "JaxDenoiser":
    """The UNet as jax compiles it: PyTorch's module for its code, its weights on the devices."""
    import torch

    from common.compute.fast_ops import arrange_weight
    from common.sampling.jax_denoiser import JaxDenoiser

    choice = settle_mesh(config, checkpoint, options, devices)
    for note in choice.notes:
        warn(note)
    mesh = sharding.make_mesh(choice.sizes, devices.devices)
    dtype = getattr(torch, unet_dtype)
    with report.part("checkpoint_read"):
        unet, weights = load_unet(config, checkpoint, dtype, by_config=not devices.are_there)
    size = sum(parameter.numel() for parameter in unet.parameters()) * dtype.itemsize
    spread = sharding.axis_to_spread(mesh, size, devices.memory_bytes)
    if spread is not None:
        say(f"  weights do not fit on every device: each step gathers them over {spread}")
    with report.part("host_to_device"):
        parameters = devices.put_weights(
            report.watch_memory(weights),
            lambda name, shape: sharding.split_weight(mesh, name, shape, spread),
            arrange=partial(
                arrange_weight, operations=options.operations, platform=devices.platform
            ),
        )
    if mesh.size > 1:
        say(f"  mesh {choice}, {mesh.size} devices; weights: {sharding.say_weights(parameters)}")
    return JaxDenoiser(unet, parameters, mesh, devices, options, report)


def settle_mesh(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    options: RunOptions,
    devices: "Devices",
) -> sharding.MeshChoice:
    """The mesh that is asked for, or that is best for the pictures asked for."""
    unet_config = checkpoint.config("unet")
    return devices.choose_mesh(
        sharding.parse_mesh(options.mesh),
        images=min(len(config.image_seeds()), options.batch_size),
        guided=config.guidance_scale > 1 and unet_config.get("time_cond_proj_dim") is None,
        rows_of_levels=sharding.rows_of_levels(
            config.height // checkpoint.vae_scale_factor, len(unet_config["block_out_channels"])
        ),
    )


def latent_shape(config: GenerationConfig, checkpoint: Checkpoint) -> tuple[int, int, int]:
    """One image's latents, [C, h, w]."""
    factor, channels = checkpoint.vae_scale_factor, checkpoint.config("unet")["in_channels"]
    return channels, config.height // factor, config.width // factor


def start_group(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    embeddings: "dict[str, torch.Tensor]",
    denoiser: "Denoiser",
    sampler: Sampler,
    tables: "SchedulerTables | None",
    chosen: "np.ndarray",
) -> None:
    """Make the denoiser ready for the chosen images, by their indices."""
    from common.sampling.denoiser import Guidance

    seeds = config.image_seeds()
    prompt_of = prompt_indices(len(config.prompts), config.num_images_per_prompt)
    takes_sizes = checkpoint.config("unet").get("addition_embed_type") == "text_time"
    denoiser.start(
        {key: tensor[prompt_of[chosen]] for key, tensor in embeddings.items()},
        [seeds[index] for index in chosen],
        sampler,
        tables,
        Guidance(
            scale=config.guidance_scale,
            rescale=config.guidance_rescale,
            start=config.guidance_start,
            end=config.guidance_end,
        ),
        time_ids(config) if takes_sizes else None,
        latent_shape(config, checkpoint),
    )


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """What stage 2 computes."""

    latents: "torch.Tensor"  # [B, C, h, w] float32
    kept_after: list[int]  # numbers of steps
    trajectory: "torch.Tensor | None"  # the latents after each of them [S, B, C, h, w]
    profile: Profile | None  # of the first group


def denoise_images(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    embeddings: "dict[str, torch.Tensor]",
    denoiser: "Denoiser",
    sampler: Sampler,
    options: RunOptions,
    profile_folder: Path | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> Denoised:
    """Denoise all images, in groups of one shape.

    Args:
        profile_folder: for a profile of the first group.
        progress: what a stopped run left, to go on from, and where this one leaves its own.
        stop: asked after each range of steps.

    Raises:
        StoppedError: a stop was asked for; what is done is kept.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from common.sampling.scheduler_tables import NotLinearError, SchedulerTables, make_tables

    # The scheduler as data, probed on the CPU
    with denoiser.report.part("scheduler_tables"):
        try:
            tables: SchedulerTables | None = make_tables(sampler)
        except NotLinearError as reason:
            say(f"  {sampler.name} steps on the host between model evaluations ({reason})")
            tables = None
            if options.checkpoint_every is not None:
                warn(f"--checkpoint_every has no effect: {sampler.name} steps on the host")
    count = len(config.image_seeds())
    latents = np.empty((count, *latent_shape(config, checkpoint)), np.float32)
    size = group_size(count, options.batch_size, denoiser.devices_of_images)
    evaluations = len(sampler.restart())
    profiler, profile = None, None
    if profile_folder is not None:
        steps = options.profiled_steps(evaluations)
        profiler = denoiser.profiler(profile_folder, steps)
    kept_after = steps_to_keep(evaluations, options.save_trajectory)
    trajectory = np.empty((len(kept_after), *latents.shape), np.float32)
    is_first = True
    with tqdm(
        total=-(-count // size) * evaluations, desc="denoise", unit="step", disable=None
    ) as bar:
        for number, (chosen, real) in enumerate(groups(count, size)):
            group = GroupProgress(progress, stop, options.checkpoint_every, number, bar)
            finished = group.finished()
            if finished is not None:
                latents[chosen[:real]] = finished["latents"].numpy()
                trajectory[:, chosen[:real]] = finished["trajectory"].numpy()
                bar.update(evaluations)
                continue
            start_group(config, checkpoint, embeddings, denoiser, sampler, tables, chosen)
            if is_first and (freed := denoiser.freed_half()):
                say(f"  steps without guidance: {freed}")
            denoiser.compile()
            denoiser.warm_up(options.warmup_steps if is_first else 0)
            group.resume(denoiser)
            bar.unpause()
            for _ in denoiser.run(
                keep_after=kept_after,
                rest_after=group.rest_after(evaluations),
                rest=group.wants_rest,
                profiler=profiler if is_first else None,
            ):
                group.after_a_range(denoiser)
            made = denoiser.latents()
            own = made[:real]
            kept = np.reshape(denoiser.trajectory, (-1, *made.shape))[:, :real]
            latents[chosen[:real]], trajectory[:, chosen[:real]] = own, kept
            if count > size:
                group.keep_finished({"latents": own, "trajectory": kept})
            if is_first:
                denoiser.repeat(options.repeat)
            if is_first and profiler is not None:
                profile = profiler.result()
            is_first = False
    return Denoised(
        latents=torch.from_numpy(latents),
        kept_after=kept_after,
        trajectory=torch.from_numpy(trajectory) if kept_after else None,
        profile=profile,
    )


def steps_to_keep(evaluations: int, every: int | None) -> list[int]:
    """The numbers of steps after which a trajectory has latents; the last is always among them."""
    if every is None:
        return []
    return sorted({*range(every, evaluations + 1, every), evaluations})


def why_stale(run_dir: Path, recipe: Recipe, options: RunOptions) -> str | None:
    """Say why the stage has to run, or None where all that is asked of it is there and fresh."""
    verify = not options.no_verify
    stale = artifacts.why_stale(run_dir / artifacts.LATENTS_FILE, recipe, verify=verify)
    if stale is None and options.save_trajectory is not None:
        wanted = artifacts.recipe_of_trajectory(recipe, options.save_trajectory)
        stale = artifacts.why_stale(run_dir / artifacts.TRAJECTORY_FILE, wanted, verify=verify)
    return stale or options.why_measure()


def save_outputs(
    run_dir: Path,
    denoised: Denoised,
    recipe: Recipe,
    options: RunOptions,
    provenance: dict[str, Any],
) -> None:
    """Write the latents, and the trajectory in place of another run's."""
    import torch

    trajectory_file = run_dir / artifacts.TRAJECTORY_FILE
    remove_file(trajectory_file)
    latents_file = run_dir / artifacts.LATENTS_FILE
    artifacts.save_tensors(latents_file, {"latents": denoised.latents}, recipe, provenance)
    if denoised.trajectory is not None and options.save_trajectory is not None:
        artifacts.save_tensors(
            trajectory_file,
            {"latents": denoised.trajectory, "steps": torch.tensor(denoised.kept_after)},
            artifacts.recipe_of_trajectory(recipe, options.save_trajectory),
            provenance,
        )


def compile_for_tpu(
    topology: str,
    parameters: dict[str, Any],
    source_dir: Path | None,
) -> None:
    """Compile one denoising step for a TPU that is not there, and print what it would cost."""
    chip, config, checkpoint, options, devices = tpu_compiler.prepare(
        topology, parameters, source_dir, "unet_dtype", COMPONENTS
    )
    from common.sampling.scheduler_tables import NotLinearError, make_tables

    dtype = "bfloat16" if config.unet_dtype == "auto" else config.unet_dtype
    denoiser = load_jax_denoiser(config, checkpoint, dtype, options, StageReport(2), devices)
    sampler = make_sampler(config, checkpoint)
    size = group_size(len(config.image_seeds()), options.batch_size, denoiser.devices_of_images)
    embeddings = empty_embeddings(size, checkpoint.config("unet"))
    group = next(groups(len(config.image_seeds()), size))[0]
    try:
        tables = make_tables(sampler)
    except NotLinearError as reason:
        raise BadSettingError(
            f"--topology compiles schedulers that are data; {sampler.name} steps on the host "
            f"({reason}): choose another --scheduler or --scheduler_option"
        ) from None
    if config.guidance_start > 0 or config.guidance_end < 1:
        warn("--guidance_start and --guidance_end: the steps without guidance are not estimated")
    start_group(config, checkpoint, embeddings, denoiser, sampler, tables, group)
    tpu_compiler.compile_and_say(
        lambda: denoiser.lower(bool(denoiser.guided)),
        chip,
        denoiser.mesh,
        title=f"one step of {config.model_id}, {config.width}×{config.height}, {dtype}",
        images=size,
        steps=denoiser.evaluations,
        topology=topology,
        hlo_file=parameters["save_hlo"],
        json_file=parameters["json"],
    )


def main(
    context: typer.Context,
    num_images_per_prompt: flags.NumImagesPerPrompt = None,
    height: flags.Height = None,
    width: flags.Width = None,
    num_inference_steps: flags.NumInferenceSteps = None,
    timesteps: flags.Timesteps = None,
    sigmas: flags.Sigmas = None,
    guidance_scale: flags.GuidanceScale = None,
    guidance_rescale: flags.GuidanceRescale = None,
    guidance_start: flags.GuidanceStart = None,
    guidance_end: flags.GuidanceEnd = None,
    seed: flags.Seed = None,
    original_size: flags.OriginalSize = None,
    target_size: flags.TargetSize = None,
    crops_coords_top_left: flags.CropsCoords = None,
    negative_original_size: flags.NegativeOriginalSize = None,
    negative_target_size: flags.NegativeTargetSize = None,
    negative_crops_coords_top_left: flags.NegativeCropsCoords = None,
    scheduler: flags.Scheduler = None,
    scheduler_option: flags.SchedulerOption = None,
    eta: flags.Eta = None,
    model_id: flags.ModelId = None,
    revision: flags.Revision = None,
    variant: flags.Variant = None,
    single_file_config: flags.SingleFileConfig = None,
    unet: flags.Unet = None,
    lora: flags.Lora = None,
    dtype: flags.StageDtype = None,
    unet_dtype: flags.UnetDtype = None,
    input_dir: flags.InputDir = None,
    output_dir: flags.OutputDir = None,
    backend: flags.Backend = None,
    mesh: flags.Mesh = None,
    batch_size: flags.BatchSize = None,
    steps_per_call: flags.StepsPerCall = None,
    warmup_steps: flags.WarmupSteps = None,
    checkpoint_every: flags.CheckpointEvery = None,
    operations: flags.Operations = None,
    distributed: flags.Distributed = None,
    offline: flags.Offline = False,
    no_verify: flags.NoVerify = False,
    wait: flags.Wait = False,
    repeat: flags.Repeat = None,
    profile: flags.Profile = False,
    profile_dir: flags.ProfileDir = None,
    profile_steps: flags.ProfileSteps = None,
    save_trajectory: flags.SaveTrajectory = None,
    topology: flags.Topology = None,
    save_hlo: flags.SaveHlo = None,
    json: flags.JsonFile = None,
    skip_fresh: flags.SkipFresh = False,
    debug: flags.Debug = False,
) -> None:
    """Denoise latents with the checkpoint's UNet, by one compiled program or by PyTorch.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    report = StageReport(2)
    run_dir = output_dir or input_dir or DEFAULT_OUTPUT_DIR
    source_dir = input_dir or run_dir
    path = run_dir / artifacts.LATENTS_FILE
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
    config, overrides = flags.apply_overrides(config, context.params, "unet_dtype")
    checkpoint = open_checkpoint(config, COMPONENTS)
    check_size(config, checkpoint.vae_scale_factor)

    # 2. The input, whole and fitting; and are the latents fresh already?
    embeddings_file = source_dir / artifacts.EMBEDDINGS_FILE
    embeddings = artifacts.inspect(embeddings_file, verify=not no_verify)
    misfit = embeddings_misfit(embeddings.tensors, len(config.prompts), checkpoint.config("unet"))
    artifacts.refuse_misfit(embeddings, prompts_misfit(embeddings.header, config) or misfit)
    recipe = make_recipe(config, checkpoint, embeddings, expected_dtype(config.unet_dtype, path))
    stale = why_stale(run_dir, recipe, options)
    if skip_fresh and stale is None:
        say(f"stage 2: fresh ({path})")
        return
    lock.acquire()
    say(f"stage 2: denoise {len(config.image_seeds())} image(s), {config.width}×{config.height}")
    flags.say_why(stale if skip_fresh else None, overrides)

    warn_of_idle_settings(config, checkpoint)

    # 3. Start the backend
    report.phase("imports")
    if not debug:
        quiet_libraries()
    in_16_bits = config.unet_dtype not in ("auto", "float32")
    started = start_backend(options, torch_on_cpus=in_16_bits)  # XLA's are slow there
    spare_imports(*packages_to_spare(config, checkpoint))
    import_module(f"common.sampling.{started.name}_denoiser")
    import_class("unet")
    dtype_used = started.choose_dtype(config.unet_dtype)
    report.phase("other")

    # 4. Denoise
    tensors = artifacts.load_tensors(embeddings, warn)
    with report.part("scheduler_tables"):
        sampler = make_sampler(config, checkpoint)
    if options.profile:
        options.profiled_steps(len(sampler.restart()))  # refused before weights are read
    denoiser = load_denoiser(started.name, config, checkpoint, dtype_used, options, report)
    recipe = make_recipe(config, checkpoint, embeddings, dtype_used)
    facts = denoiser.facts()
    progress = progress_of(
        run_dir, recipe, options, facts, loops_on_device=denoiser.loops_on_device
    )
    if progress is None and options.checkpoint_every is not None:
        warn("--checkpoint_every has no effect with --profile, --repeat or --distributed")
    with finishing_first() if progress is not None else nullcontext() as stop:
        denoised = denoise_images(
            config,
            checkpoint,
            tensors,
            denoiser,
            sampler,
            options,
            profile_folder=options.profile_folder(run_dir, 2) if options.profile else None,
            progress=progress,
            stop=stop,
        )
        if not started.is_first_process:
            say("  the first process writes")
            return

        # 5. Write
        with report.part("writing"):
            provenance = {
                **config.model_settings(),
                **{name: facts.get(name) for name in ("backend", "platform", "mesh")},
                "unet_dtype_asked": config.unet_dtype,
                "overrides": overrides,
            }
            save_outputs(run_dir, denoised, recipe, options, provenance)
            if run_dir.resolve() != source_dir.resolve():
                write_generation_config(run_dir, config)
            remove_progress(run_dir, 2)
        if stop is not None:
            stop.raise_if_asked(f"when {path} was written")
    report.write(
        run_dir,
        shapes={"latents": list(denoised.latents.shape)},
        dtype=dtype_used,
        dtype_asked=config.unet_dtype,
        versions=recipe.versions,
        profile=denoised.profile,
        **denoiser.facts(),
    )
    flags.say_times(report, path, denoised.profile)


if __name__ == "__main__":
    flags.run_command(flags.make_command(main))
