"""Jobs that are no run: a VAE decodes latents or encodes pictures that a request brought.

A run directory holds what is asked, the process that holds the devices computes with the VAE that
stages 0 and 3 keep, and leaves the answer there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import typer
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.numpy import save
from typer.core import TyperCommand

from common.compute.backends import start_backend
from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.declared import PICTURES, Dtype
from common.errors import BadSettingError
from common.files.stage_table import DECODE, ENCODE_PICTURES, FIRST
from common.models.checkpoint import Checkpoint
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.progress import Shown
from common.runs.flags import Given, add_flags, all_flags
from common.runs.generation import read_run_settings
from common.runs.in_turn import plan
from common.serving.jobs import Step
from common.vae.hybrid_format import VAE, VAE_DTYPE, from_8_bits
from common.vae.latent_scale import scale_latents, unscale_latents
from common.whole_files import write_bytes_whole

if TYPE_CHECKING:
    from common.vae.decoder import Decoder
    from common.vae.encoder import Encoder

VAE_JOB = "vae_job"  # an argument of a step, where a stage's command has flags alone
REQUEST_FILE, ANSWER_FILE = "vae_request.safetensors", "vae_answer.safetensors"
_ARRAY, _ASKED = "array", "asked"


class VaeRequest(BaseModel, frozen=True):
    """What is asked of a VAE."""

    # [B, H, W, 3] uint8; [B, 3, H, W] float32 of which [-1, 1] is shown; the posterior's mode
    # [B, C, h, w], or its parameters [B, 2C, h, w].
    output: Literal["pixels", "floats", "latents", "moments"]
    do_scaling: bool = False  # by the VAE's own factors
    scaling_factor: float | None = None
    shift_factor: float | None = None
    vae: str | None = None  # the fingerprint that it must have; None: any
    vae_dtype: Dtype | None = None  # None: as the server's flags say
    tile: bool | None = None  # likewise
    most_pixels: int  # of a picture

    @property
    def encodes(self) -> bool:
        """Whether pictures are encoded."""
        return self.output in ("latents", "moments")

    def unscale(self, latents: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
        """A request's latents as the VAE takes them."""
        if self.do_scaling:
            latents = unscale_latents(latents, config)
        elif self.scaling_factor is not None:
            latents = latents / np.float32(self.scaling_factor)
        return latents if self.shift_factor is None else latents + np.float32(self.shift_factor)

    def scale(self, latents: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
        """The VAE's latents as the request wants them: what `unscale` undoes."""
        if self.shift_factor is not None:
            latents = latents - np.float32(self.shift_factor)
        if self.do_scaling:
            return scale_latents(latents, config)
        factor = 1 if self.scaling_factor is None else self.scaling_factor
        return latents * np.float32(factor)


class Answer(NamedTuple):
    """What a VAE gave."""

    array: np.ndarray  # uint8 or float32
    vae: str  # its fingerprint
    vae_dtype: str  # that it computed in


# --- who asks ------------------------------------------------------------------------------------


def write_request(
    request: VaeRequest, array: np.ndarray, run_dir: Path, flags: Mapping[str, Any]
) -> list[Step]:
    """Write what is asked of a VAE to a new run directory. Returns the job's steps.

    Args:
        array: latents [B, C, h, w] float32, or pictures [B, 3, H, W]: uint8, or float32 in [-1, 1].
        flags: of every run, as `run_all.sh` takes them; they name the checkpoint.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    asked = {_ASKED: request.model_dump_json()}
    content = save({_ARRAY: np.ascontiguousarray(array)}, asked)
    write_bytes_whole(run_dir / REQUEST_FILE, content)
    commands = plan({**flags, "output_dir": run_dir})
    arguments = dict.fromkeys(each for stage in (FIRST, DECODE) for each in commands[stage][2:])
    stage = ENCODE_PICTURES if request.encodes else DECODE
    return [Step(stage.number, [VAE_JOB, *arguments])]


def read_answer(run_dir: Path) -> Answer:
    """What a job that is done has left."""
    array, said = _read(run_dir / ANSWER_FILE)
    return Answer(array, said[VAE], said[VAE_DTYPE])


def _read(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    with safe_open(path, "numpy") as file:
        return file.get_tensor(_ARRAY), file.metadata()


# --- who computes --------------------------------------------------------------------------------


def is_vae_job(step: Step) -> bool:
    """Whether a job's step is one of these, and no stage's command."""
    return step.arguments[:1] == [VAE_JOB]


def make_command(kept: Kept) -> TyperCommand:
    """The command of such a step's arguments, without the first.

    Args:
        kept: by the process, of the stages on devices.
    """

    def answer(context: typer.Context) -> None:
        """Decode or encode what a request brought."""
        _answer(Given(DECODE, context.params), kept)

    return add_flags(answer, [f for f in all_flags() if f.is_of(FIRST) or f.is_of(DECODE)])


def _answer(given: Given, kept: Kept) -> None:
    """Compute what a run directory's request asks, and write the answer.

    Raises:
        BadSettingError: what is asked does not suit the server's VAE.
        NotFiniteError: the VAE gave infinities or not-a-numbers.
    """
    from common.vae.loading import VaeToLoad, open_decoder, open_encoder

    if given.options.remote_vae is not None:
        raise BadSettingError("this server's own VAE is another's (--remote_vae): ask that one")
    array, said = _read(given.run_dir / REQUEST_FILE)
    request = VaeRequest.model_validate_json(said[_ASKED])
    settings = read_run_settings(given.flags.config, given.settings())
    checkpoint = open_checkpoint(settings, loaded_for(PICTURES))
    fingerprint = checkpoint.weights_fingerprint("vae")
    if request.vae not in (None, fingerprint):
        raise BadSettingError(
            "vae: the server has another one: serve the checkpoint that is asked for, --model_id "
            "and --vae"
        )
    _refuse_misfit(request, array.shape, checkpoint)
    backend = start_backend(given.options, torch_on_cpus=True)
    dtype = request.vae_dtype or backend.choose_dtype(
        settings.vae_dtype, force_float32=checkpoint.upcasts_vae
    )
    tile = settings.tile if request.tile is None else request.tile
    vae = VaeToLoad(checkpoint=checkpoint, dtype=dtype, tile=tile)
    report = StageReport(given.stage.number, since_process_began=False)
    if request.encodes:
        pictures = from_8_bits(array) if array.dtype == np.uint8 else array
        encoder = open_encoder(kept, backend.name, vae, array.shape, given.options, report)
        found = _encode(encoder, pictures, request, given.options)
    else:
        decoder = open_decoder(kept, backend.name, vae, [array.shape], given.options, report)
        found = _decode(decoder, array, request, given.options)
    content = save({_ARRAY: np.ascontiguousarray(found)}, {VAE: fingerprint, VAE_DTYPE: dtype})
    write_bytes_whole(given.run_dir / ANSWER_FILE, content)


def _refuse_misfit(request: VaeRequest, shape: tuple[int, ...], checkpoint: Checkpoint) -> None:
    """Raise `BadSettingError` where an array [B, C, h, w] is none that the VAE takes."""
    factor, (channels, *sides) = checkpoint.vae_scale_factor, shape[1:]
    if request.encodes:
        needed = 3
        if any(side % factor for side in sides):
            raise BadSettingError(
                f"the picture is {sides[1]}×{sides[0]}: sides are to be multiples of {factor}"
            )
    else:
        needed, sides = checkpoint.config("vae")["latent_channels"], [s * factor for s in sides]
    if channels != needed:
        raise BadSettingError(
            f"shape {[*shape]} has {channels} channels: this VAE takes {needed} here"
        )
    if (pixels := sides[0] * sides[1]) > request.most_pixels:
        raise BadSettingError(
            f"{pixels} pixels are more than the {request.most_pixels} that are allowed"
        )


def _decode(
    decoder: "Decoder", latents: np.ndarray, request: VaeRequest, options: RunOptions
) -> np.ndarray:
    unscaled = request.unscale(latents, decoder.runner.config)

    def decode(chosen: np.ndarray) -> dict[str, np.ndarray]:
        if request.output == "pixels":
            found, finite = decoder.decode_unscaled(chosen)
        else:
            found = decoder.decode_to_floats(chosen)
            finite = bool(np.isfinite(found).all())
        decoder.runner.refuse_infinities(finite, "picture was")
        return {_ARRAY: found}

    shown = Shown(len(latents), "decode", "image")
    return decoder.runner.in_groups(unscaled, decode, options, bar=shown, units="images")[_ARRAY]


def _encode(
    encoder: "Encoder", pictures: np.ndarray, request: VaeRequest, options: RunOptions
) -> np.ndarray:
    def encode(chosen: np.ndarray) -> dict[str, np.ndarray]:
        moments = encoder.encode_to_moments(chosen)
        encoder.runner.refuse_infinities(bool(np.isfinite(moments).all()), "latents were")
        if request.output == "moments":
            return {_ARRAY: moments}
        mode = encoder.posterior(moments).mean
        return {_ARRAY: request.scale(mode, encoder.runner.config)}

    shown = Shown(len(pictures), "encode", "picture")
    return encoder.runner.in_groups(pictures, encode, options, bar=shown, units="pictures")[_ARRAY]
