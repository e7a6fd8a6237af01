"""What clients of AUTOMATIC1111's API ask for, as settings of ours.

Its fields with null or with the values that it has by itself are taken; another value is refused
where it would change the picture and nothing here does so.
"""

import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.conditions.a1111_syntax import calls_of_loras
from common.errors import BadSettingError, shorten
from common.serving.a1111_names import sampler_flags
from common.serving.request_pictures import (
    blurred,
    check_mask,
    check_picture,
    decoded,
    encode,
    filled,
    mask_in,
    pixels_of,
)

MOST_NAMED = 40  # characters of what is refused
SEEDS = 2**32 - 1  # that the web UI chooses among
DEFAULT_SAMPLER = "Euler"
# Fields of what is not here, with the values besides empty ones by which they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("enable_hr", "restore_faces", "tiling", "disable_extra_networks"), (False,)),
    **dict.fromkeys(("subseed_strength", "s_churn", "s_min_uncond"), (0,)),
    **dict.fromkeys(("seed_resize_from_h", "seed_resize_from_w"), (0, -1)),
    **dict.fromkeys(("firstphase_width", "firstphase_height"), (0,)),
    **dict.fromkeys(("s_noise", "initial_noise_multiplier"), (1,)),
    **dict.fromkeys(("script_name", "refiner_checkpoint"), ("None",)),
    **dict.fromkeys(("styles", "alwayson_scripts", "controlnet_units", "infotext"), ()),
    **dict.fromkeys(("firstpass_image", "latent_mask"), ()),
}
# Fields that change nothing: pictures are kept in any case, and the others go with those above.
IDLE = (
    *("do_not_save_samples", "do_not_save_grid", "save_images", "force_task_id", "comments"),
    *("override_settings_restore_afterwards", "script_args", "subseed", "refiner_switch_at"),
    *("s_tmin", "s_tmax", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x"),
    *("hr_resize_y", "hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt"),
    "hr_negative_prompt",
)
FORMATS = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp"}  # its name → ours
RESIZE_MODES = ("default", "crop", "fill")  # by their numbers there
FILL, ORIGINAL = 0, 1  # what a masked part begins with
# Prompts that change with the steps, [a:b:0.5] and [a|b], and several in one.
_CHANGING = re.compile(r"(?<!\\)\[[^\[\]]*(?::\s*[\d.]+\s*|\|[^\[\]]*)\]")
_SEVERAL = re.compile(r"\bAND\b")
# A LoRA by its name, and how much of it; the web UI takes further numbers, which are refused.
_CALL = re.compile(r"<lora:(?P<name>[^<>:]+)(?::(?P<scale>-?(?:\d+\.?\d*|\.\d+)))?>")


class OverrideSettings(BaseModel):
    """The web UI's options that a request may set for itself."""

    model_config = ConfigDict(extra="forbid")

    sd_model_checkpoint: str | None = None
    clip_stop: Annotated[int | None, Field(ge=1, le=12, alias="CLIP_stop_at_last_layers")] = None
    samples_format: Literal["png", "jpg", "jpeg", "webp"] | None = None
    # What has one value here.
    sd_vae: Literal["Automatic", "None"] | None = None
    eta_noise_seed_delta: Annotated[int, Field(ge=0, le=0)] | None = None


class TextRequest(BaseModel):
    """What `txt2img` takes."""

    model_config = ConfigDict(extra="allow")

    prompt: Annotated[str, Field(max_length=4000)] = ""
    negative_prompt: Annotated[str, Field(max_length=4000)] = ""
    seed: Annotated[int, Field(ge=-1, lt=2**63)] = -1
    steps: Annotated[int, Field(ge=1)] = 50
    cfg_scale: Annotated[float, Field(ge=0)] = 7.0
    width: Annotated[int, Field(ge=8, le=16384)] = 512
    height: Annotated[int, Field(ge=8, le=16384)] = 512
    batch_size: Annotated[int, Field(ge=1, le=100)] = 1
    n_iter: Annotated[int, Field(ge=1, le=100)] = 1
    sampler_name: str | None = None
    sampler_index: str | None = None  # its name of old
    scheduler: str | None = None
    eta: Annotated[float, Field(ge=0)] | None = None
    denoising_strength: Annotated[float, Field(ge=0, le=1)] = 0.75
    override_settings: OverrideSettings = OverrideSettings()
    send_images: bool = True

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        return given if given.get("mask") != "" else given | {"mask": None}

    @property
    def sampler(self) -> str:
        """The sampler's name; clients send another one by the name of old as well."""
        return self.sampler_name or self.sampler_index or DEFAULT_SAMPLER

    def refuse_what_is_not_here(self) -> None:
        """Raise `BadSettingError` for what would change the picture and does not."""
        for name, value in (self.model_extra or {}).items():
            said = shorten(name, MOST_NAMED)
            if name in IDLE or (name in NEUTRAL and value in ("", [], {}, *NEUTRAL[name])):
                continue
            if name in NEUTRAL:
                asked = shorten(repr(value), MOST_NAMED)
                raise BadSettingError(f"{said} {asked} is not supported here: leave it out")
            raise BadSettingError(f"{said} is no field that is known here: leave it out")
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            calls = calls_of_loras(text)
            unread = [each for each in calls if name != "prompt" or not _CALL.fullmatch(each)]
            if unread:
                raise BadSettingError(
                    f"{name}: {shorten(unread[0], MOST_NAMED)} is not supported here: leave it "
                    "out; a prompt may have <lora:NAME:SCALE>"
                )
            if found := _CHANGING.search(text) or _SEVERAL.search(text):
                raise BadSettingError(
                    f"{name}: {shorten(found[0], MOST_NAMED)!r} stands for several prompts, which "
                    r"is not supported here: leave it out, or write \[ for a bracket"
                )

    def text(self) -> str:
        """The prompt without its calls of LoRAs."""
        return _CALL.sub("", self.prompt)

    def loras(self) -> dict[str, float]:
        """Those that the prompt calls, and how much of each is added."""
        found = dict[str, float]()
        for call in calls_of_loras(self.prompt):
            if (match := _CALL.fullmatch(call)) is not None:
                found[match["name"]] = found.get(match["name"], 0.0) + float(match["scale"] or 1)
        return found

    def flags(self) -> dict[str, Any]:
        """As `run_all.sh` takes them; each call chooses a seed where none is asked for.

        What is asked for by name is in the prompt and in `override_settings`.

        Raises:
            BadSettingError: as `sampler_flags` and `refuse_what_is_not_here`.
        """
        self.refuse_what_is_not_here()
        options = self.override_settings
        # Layers that are left out, where the web UI counts to the one that is the last.
        skipped = (options.clip_stop or 1) - 1
        format = options.samples_format
        return {
            "prompt": [self.text()],
            "negative_prompt": self.negative_prompt,
            "prompt_weighting": "a1111",
            "long_prompts": "chunk",
            "seed": secrets.randbelow(SEEDS) if self.seed == -1 else self.seed,
            "num_inference_steps": self.steps,
            "guidance_scale": self.cfg_scale,
            "width": self.width,
            "height": self.height,
            "num_images_per_prompt": self.batch_size * self.n_iter,
            "clip_skip": skipped or None,
            "image_format": None if format is None else FORMATS[format],
            **sampler_flags(self.sampler, self.scheduler, self.eta),
        }

    def told(self) -> dict[str, Any]:
        """What an answer repeats of the request: what counts here."""
        return self.model_dump(by_alias=True, exclude={*(self.model_extra or {})})


class PictureRequest(TextRequest):
    """What `img2img` takes."""

    init_images: Annotated[list[str], Field(min_length=1)]
    mask: str | None = None  # white is what is made anew
    mask_blur: Annotated[int, Field(ge=0, le=256)] | None = None  # in both directions
    mask_blur_x: Annotated[int, Field(ge=0, le=256)] = 4
    mask_blur_y: Annotated[int, Field(ge=0, le=256)] = 4
    mask_round: bool = True  # to black and white
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] = 0
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] = FILL
    inpaint_full_res: bool = True  # to work on what is masked, in the size that is asked for
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=8192)] = 0
    resize_mode: Annotated[int, Field(ge=0, le=3)] = 0
    image_cfg_scale: Annotated[float, Field(ge=0)] | None = None
    include_init_images: bool = False

    def flags(self) -> dict[str, Any]:
        """As `run_all.sh` takes them."""
        if self.resize_mode >= len(RESIZE_MODES):
            raise BadSettingError("resize_mode 3 is not supported here: give 0, 1 or 2")
        flags = super().flags() | {
            "strength": self.denoising_strength,
            "image_guidance_scale": self.image_cfg_scale,
        }
        crops = self.mask is not None and self.inpaint_full_res
        if not crops:  # which fills the size in its own way
            flags["resize_mode"] = RESIZE_MODES[self.resize_mode]
        if self.mask is not None:
            flags["keep_unmasked"] = True
            flags["padding_mask_crop"] = self.inpaint_full_res_padding if crops else None
        return flags

    def pictures(self, most_pixels: int) -> dict[str, bytes]:
        """What a run begins with: the picture, and its mask.

        Args:
            most_pixels: that a picture may have.

        Raises:
            BadSettingError: they are none, several, too large or of different sizes.
        """
        if len(self.init_images) != 1:
            raise BadSettingError(
                f"init_images has {len(self.init_images)} pictures: give one a request"
            )
        image = decoded(self.init_images[0], "init_images")
        if self.mask is None:
            return {"image": image}
        if self.inpainting_fill not in (FILL, ORIGINAL):
            raise BadSettingError(
                f"inpainting_fill {self.inpainting_fill} is not supported here: give 0, which "
                "begins with the colours around the mask, or 1, with the picture itself"
            )
        size = check_picture(image, "init_images", most_pixels)
        mask = mask_in(decoded(self.mask, "mask"), most_pixels)
        if self.mask_round:
            mask = ((mask > 128) * 255).astype("uint8")
        if self.inpainting_mask_invert:
            mask = 255 - mask
        blurs = (self.mask_blur_x, self.mask_blur_y)
        mask = blurred(mask, blurs if self.mask_blur is None else (self.mask_blur,) * 2)
        check_mask(mask, size)
        if self.inpainting_fill == FILL:
            image = encode(filled(pixels_of(image, "init_images", most_pixels), mask))
        return {"image": image, "mask_image": encode(mask)}

    def told(self) -> dict[str, Any]:
        """What an answer repeats of the request: its pictures where that is asked for."""
        without = {} if self.include_init_images else {"init_images": None, "mask": None}
        return super().told() | without
