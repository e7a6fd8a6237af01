"""What stages 2 and 3 write: latents and trajectories, pictures with their settings inside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.compute.clock import StageReport
from common.compute.groups import prompt_indices
from common.declared import EMBEDDINGS, LATENTS, PICTURES, declarations
from common.errors import listed
from common.files import artifacts, picture_files
from common.files.artifacts import Artifact, Header
from common.files.recipe import Recipe, recipe_of_trajectory
from common.files.rows import Rows
from common.files.stage_table import DENOISE, LATENTS_FILE
from common.messages import warn
from common.models.component_table import loaded_for
from common.models.model_settings import ModelSettings
from common.runs.generation import GenerationConfig, RunSettings
from common.runs.recipes import trajectory_pictures_recipe
from common.runs.stage_run import StageRun
from common.sampling.schedulers import web_ui_sampler
from common.stopping import StopRequest
from common.whole_files import copy_whole, remove_file, write_bytes_whole

if TYPE_CHECKING:
    import numpy as np

    from common.sampling.denoising import Denoised


def write_latents(
    run: StageRun,
    config: GenerationConfig,
    made_by: tuple[Recipe, Rows],
    begin: Artifact | None,
    denoised: "Denoised",
    facts: Mapping[str, Any],
    stop: StopRequest | None = None,
) -> None:
    """Stage 2's end: its files, and its report.

    Args:
        begin: what the latents began with.
        facts: what the report says of the devices.
        stop: asked when all is written.
    """
    recipe, rows = made_by
    path = run.run_dir / LATENTS_FILE
    with run.report.part("writing"):
        devices = {name: facts.get(name) for name in ("backend", "platform", "mesh")}
        made = {**devices, "unet_dtype_asked": config.unet_dtype, "overrides": run.overrides}
        provenance = {**config.model_settings(), **made}
        begun = begin if config.pastes else None
        save_latents(run.run_dir, denoised, recipe, rows, provenance, begun)
        run.settings_written(config)
    if stop is not None:
        stop.raise_if_asked(f"when {path} was written")
    run.finish(
        path,
        shapes={"latents": list(denoised.latents.shape)},
        rows_taken=len(rows.places),
        dtype=recipe.settings_of(LATENTS)["unet_dtype"],
        dtype_asked=config.unet_dtype,
        versions=recipe.versions,
        profile=denoised.profile,
        **facts,
    )


def save_latents(
    run_dir: Path,
    denoised: "Denoised",
    recipe: Recipe,
    rows: Rows,
    provenance: dict[str, Any],
    begun: Artifact | None = None,
) -> None:
    """Write the latents, and the trajectory in place of another run's.

    Args:
        begun: the pictures that stage 3 pastes into, which it finds beside the latents.
    """
    import torch

    latents_file, trajectory_file = (run_dir / name for name in DENOISE.writes)
    remove_file(trajectory_file)
    if begun is not None and begun.path.parent.resolve() != run_dir.resolve():
        copy_whole(begun.path, run_dir / begun.path.name)
    tensors = {"latents": denoised.latents}
    artifacts.save_tensors(latents_file, tensors, recipe, provenance, rows.fingerprints)
    if denoised.trajectory is not None and denoised.trajectory_every is not None:
        artifacts.save_tensors(
            trajectory_file,
            {"latents": denoised.trajectory, "steps": torch.tensor(denoised.kept_after)},
            recipe_of_trajectory(recipe, denoised.trajectory_every),
            provenance,
        )


def picture_settings(header: Header | None, index: int | None) -> dict[str, Any]:
    """One picture's settings, from the latents' header; of a grid (`index` None) those shared."""
    if header is None:
        return {}
    made = header.recipe.settings
    settings = {**made[EMBEDDINGS], **made[LATENTS]}
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


def web_ui_text(settings: dict[str, Any]) -> str:
    """A picture's settings in the text form that the common web UIs read."""
    names = {name: d.web_ui for name, d in declarations(RunSettings) if d.web_ui is not None}
    shown = dict(settings)
    if "scheduler" in settings:
        options = settings.get("scheduler_options", {})
        shown["scheduler"] = web_ui_sampler(settings["scheduler"], options)
    return picture_files.web_ui_parameters(shown, names)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What stage 3 computes, [H, W, 3] uint8 each."""

    images: "np.ndarray"  # [B, H, W, 3]
    strip: "np.ndarray | None" = None  # of the trajectory
    frames: "Sequence[np.ndarray]" = ()


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """What is written into the pictures of a run besides their pixels."""

    config: GenerationConfig
    header: Header | None  # of the latents
    recipe: Recipe
    overrides: list[str]

    def record(
        self, index: int | None, pixels: "np.ndarray", recipe: Recipe | None = None
    ) -> dict[str, Any]:
        """The record inside a picture; `index` None for those of all images."""
        recipe = recipe or self.recipe
        own = dict(self.recipe.settings[PICTURES])
        for name in loaded_for(PICTURES):
            if (replaced := getattr(self.config, name, None)) is not None:
                own[name] = replaced
        return {
            "settings": picture_settings(self.header, index) | own,
            "pixels_sha256": picture_files.hash_pixels(pixels),
            "fingerprint": recipe.fingerprint(),
            "inputs": recipe.inputs,
            "weights": recipe.weights,
            "versions": recipe.versions,
            "overrides": self.overrides,
        }


def encode_pictures(
    decoded: Decoded, facts: PictureFacts, trajectory: Artifact | None
) -> dict[str, bytes]:
    """File name → content of all pictures, the grid, and a trajectory's."""
    from common.vae.grids import make_grid

    shortened: dict[str, None] = {}  # settings, in the order in which they were met

    def encode(pixels: "np.ndarray", name: str, index: int | None) -> bytes:
        suffix = Path(name).suffix
        record, cut = picture_files.fit_record(facts.record(index, pixels), suffix, web_ui_text)
        shortened.update(dict.fromkeys(cut))
        return picture_files.encode_picture(pixels, suffix, record, web_ui_text(record["settings"]))

    names, grid_name = picture_files.picture_names(len(decoded.images), facts.config.image_format)
    encoded: dict[str, bytes] = {}
    for index, (name, image) in enumerate(zip(names, decoded.images, strict=True)):
        encoded[name] = encode(image, name, index)
    if grid_name is not None:
        encoded[grid_name] = encode(make_grid(decoded.images), grid_name, None)
    if decoded.strip is not None and trajectory is not None:
        recipe = trajectory_pictures_recipe(facts.recipe, trajectory)
        record = facts.record(None, decoded.strip, recipe)
        text = web_ui_text(record["settings"])
        strip = picture_files.encode_picture(decoded.strip, ".png", record, text)
        encoded[picture_files.TRAJECTORY_STRIP] = strip
        animation = picture_files.encode_animation(decoded.frames, record, text)
        encoded[picture_files.TRAJECTORY_ANIMATION] = animation
    if shortened:
        warn(
            f"a JPEG's metadata hold 64 kB: {listed([*shortened])} shortened in the pictures; the "
            "whole is in stage3_report.json"
        )
    return encoded


def save_pictures(
    run_dir: Path,
    decoded: Decoded,
    facts: PictureFacts,
    trajectory: Artifact | None,
    report: StageReport,
) -> Path:
    """Save all pictures and the grid, remove those of an earlier run. Returns the main one."""
    with report.part("image_encoding"):
        encoded = encode_pictures(decoded, facts, trajectory)
    with report.part("writing"):
        for name, content in encoded.items():
            write_bytes_whole(run_dir / name, content)
        picture_files.remove_others(run_dir, set(encoded))
    names, grid_name = picture_files.picture_names(len(decoded.images), facts.config.image_format)
    return run_dir / (grid_name or names[0])
