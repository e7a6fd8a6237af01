"""Which stages a change must make stale: of every setting, of packages, of a checkpoint's parts.

`test_recipes.py` holds the recipes to these tables. Paths are in the folder that
`staleness_places.py` lays out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.conditions.prompt_settings import PromptSettings
from common.files.stage_table import TRAJECTORY_FILE
from common.models.model_settings import LoraFile, TokenFile
from common.runs.generation import GenerationConfig, RunSettings

NOTHING: frozenset[int] = frozenset()
PICTURES = frozenset({3})
LATENTS = frozenset({2, 3})
EVERYTHING = frozenset({1, 2, 3})
BEGUN = frozenset({0, 2, 3})  # of runs that begin with pictures

WEIGHTS = "diffusion_pytorch_model.safetensors"
REPOSITORY = "someone/checkpoint"
PROMPT = {"prompt": "a large red star", "negative_prompt": "blurry"}
BEGINS = PROMPT | {"image": "star.png"}
MASKED = BEGINS | {"mask_image": "mask.png"}
# Those of a run, and those of the settings within its settings. Paths are in the folder `places`.
BASE: dict[type[BaseModel], dict[str, Any]] = {
    GenerationConfig: {"prompts": [PROMPT], "height": 128, "width": 128},
    RunSettings: {},
    PromptSettings: PROMPT,
    TokenFile: {"file": "red.safetensors", "token": "red"},
    LoraFile: {"file": "lora_unet.safetensors", "scale": 1.0},
}
# Where settings within settings stand in a run's.
WITHIN = {PromptSettings: "prompts", TokenFile: "embeddings", LoraFile: "loras"}
AS_BEFORE: Any = object()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A change of one field, and the stages that it must make stale."""

    of: Any  # the value before; AS_BEFORE is that of BASE, or the default
    to: Any  # the value after
    stale: frozenset[int]
    said: str  # what the first stale stage says has changed; the field's name where empty
    beside: Mapping[str, Any] = field(default_factory=dict)  # other fields, before and after


def case(
    to: Any, stale: frozenset[int], said: str = "", *, of: Any = AS_BEFORE, **beside: Any
) -> Case:
    return Case(of=of, to=to, stale=stale, said=said, beside=beside)


UNET_LORA, TEXT_LORA = {"file": "lora_unet.safetensors"}, {"file": "lora_text.safetensors"}
SINGLE_FILE = {"model_id": "single.safetensors", "single_file_config": "models/demo"}
WITH_WILDCARD = {"prompt": ("a __color__ star",), "prompt_syntax": "dynamic"}
BY_TIMESTEPS = {"num_inference_steps": None}
NEGATIVE_SIZES = {"negative_original_size": (64, 64), "negative_target_size": (64, 64)}

GENERATION: dict[str, list[Case]] = {
    # A checkpoint counts by its content, wherever it is and whatever it is called.
    "model_id": [
        case("same", NOTHING),
        case("other", EVERYTHING, "weights of text_encoder changed"),
        case("other_scheduler", LATENTS, "weights of scheduler changed"),
        case("other_vae", PICTURES, "weights of vae changed"),
        case(REPOSITORY, NOTHING),
        case("single_renamed.safetensors", NOTHING, **SINGLE_FILE),
        case(
            "single_other.safetensors",
            EVERYTHING,
            "weights of text_encoder changed",
            **SINGLE_FILE,
        ),
    ],
    "revision": [
        case("main", NOTHING, model_id=REPOSITORY),
        case("retagged", NOTHING, model_id=REPOSITORY),
        case("other", EVERYTHING, "weights of text_encoder changed", model_id=REPOSITORY),
    ],
    "variant": [
        case("fp16", EVERYTHING, "weights of text_encoder changed", model_id="variants"),
        case("again", NOTHING, model_id="variants"),
    ],
    "single_file_config": [
        case("same", NOTHING, **SINGLE_FILE),
        case("other", EVERYTHING, "weights of tokenizer changed", **SINGLE_FILE),
        case("other_scheduler", LATENTS, "weights of scheduler changed", **SINGLE_FILE),
        case("other_vae", PICTURES, "weights of vae changed", **SINGLE_FILE),
    ],
    "unet": [
        case("models/demo/unet", NOTHING),
        case("same", NOTHING),
        case(REPOSITORY, NOTHING),
        case(f"models/demo/unet/{WEIGHTS}", NOTHING),
        case("other", LATENTS, "weights of unet changed"),
        case("other/unet", LATENTS, "weights of unet changed"),
        case(f"other/unet/{WEIGHTS}", LATENTS, "weights of unet changed"),
    ],
    "vae": [
        case("models/demo/vae", NOTHING),
        case("same", NOTHING),
        case(f"models/demo/vae/{WEIGHTS}", NOTHING),
        case("other", PICTURES, "weights of vae changed"),
        case(f"other/vae/{WEIGHTS}", PICTURES, "weights of vae changed"),
        case("other", BEGUN, "weights of vae changed", prompts=[BEGINS]),
        # Four pixels a latent cell in place of eight: the latents get another shape.
        case("vae_of_factor_4", LATENTS, "vae"),
    ],
    "num_images_per_prompt": [case(2, LATENTS)],
    "clip_skip": [case(1, EVERYTHING)],
    "long_prompts": [case("chunk", EVERYTHING)],
    "prompt_weighting": [case("compel", EVERYTHING)],
    "embeddings": [
        case([{"file": "red.safetensors", "token": "red"}], EVERYTHING),
    ],
    "loras": [
        case([UNET_LORA], LATENTS, "unet_loras"),
        case([TEXT_LORA], EVERYTHING, "text_encoder_loras"),
        case([{"file": "lora_both.safetensors"}], EVERYTHING, "text_encoder_loras"),
        case([TEXT_LORA, UNET_LORA], LATENTS, "unet_loras", of=[TEXT_LORA]),
    ],
    # Size conditions count by what the UNet is told in the end.
    "original_size": [
        case((256, 256), LATENTS, "time_ids"),
        case((128, 128), NOTHING),
    ],
    "target_size": [
        case((256, 256), LATENTS, "time_ids"),
        case((128, 128), NOTHING),
    ],
    "crops_coords_top_left": [case((8, 0), LATENTS, "time_ids")],
    "negative_original_size": [
        case((64, 64), LATENTS, "negative_time_ids", negative_target_size=(64, 64)),
        case((64, 64), NOTHING),
    ],
    "negative_target_size": [
        case((64, 64), LATENTS, "negative_time_ids", negative_original_size=(64, 64)),
        case((64, 64), NOTHING),
    ],
    "negative_crops_coords_top_left": [
        case((8, 0), LATENTS, "negative_time_ids", **NEGATIVE_SIZES),
        case((8, 0), NOTHING),
    ],
    # Only refiners are told them.
    "aesthetic_score": [case(7.0, NOTHING)],
    "negative_aesthetic_score": [case(1.0, NOTHING)],
    "num_inference_steps": [case(26, LATENTS)],
    "timesteps": [case((999, 400), LATENTS, of=(999, 500), **BY_TIMESTEPS)],
    "sigmas": [case((14.0, 0.5, 0.0), LATENTS, of=(14.0, 1.0, 0.0), **BY_TIMESTEPS)],
    "guidance_scale": [case(5.0, LATENTS)],
    "guidance_rescale": [case(0.7, LATENTS)],
    "init_latents": [
        case("other_latents.safetensors", LATENTS, of="latents.safetensors"),
        case("same_latents.safetensors", NOTHING, of="latents.safetensors"),
        case("latents.safetensors", LATENTS),
    ],
    "strength": [
        case(0.5, LATENTS, init_latents="latents.safetensors"),
        case(0.5, LATENTS, prompts=[BEGINS]),
    ],
    "upscale": [
        case(1.5, LATENTS, init_latents="latents.safetensors", height=192, width=192, of=1.49),
    ],
    "resize_mode": [case("crop", BEGUN, prompts=[BEGINS])],
    "padding_mask_crop": [case(8, BEGUN, prompts=[MASKED])],
    "outpaint": [case((8, 0, 0, 0), BEGUN, of=(0, 8, 0, 0), prompts=[BEGINS])],
    "image_guidance_scale": [case(2.0, LATENTS)],
    "soft_mask": [case(True, BEGUN, prompts=[MASKED])],
    "keep_unmasked": [case(True, PICTURES, prompts=[MASKED])],
    # It counts by the pixels that it gives.
    "image_background": [
        case("#000000", BEGUN, "pictures", prompts=[PROMPT | {"image": "clear.png"}]),
        case("#000000", NOTHING, prompts=[BEGINS]),
    ],
    "denoising_start": [case(0.5, LATENTS, init_latents="latents.safetensors")],
    "denoising_end": [case(0.5, LATENTS)],
    "guidance_start": [case(0.25, LATENTS)],
    "guidance_end": [case(0.75, LATENTS)],
    "seed": [
        case(43, LATENTS, "seeds"),
        case(43, NOTHING, prompts=[PROMPT | {"seed": 7}]),
    ],
    "same_seed": [
        case(True, NOTHING),  # the first is the run's
        case(True, LATENTS, "seeds", prompts=[PROMPT, PROMPT]),
    ],
    "seed_offset": [
        case(1, LATENTS, "seeds"),
        case(1, LATENTS, "seeds", prompts=[PROMPT | {"seed": 7}]),
    ],
    "scheduler": [
        case("ddim", LATENTS),
        case("euler", NOTHING),
        case("EulerDiscreteScheduler", NOTHING),
        case("euler_karras", LATENTS, "scheduler_options"),
    ],
    "scheduler_options": [
        case({"use_karras_sigmas": True}, LATENTS),
        case({"use_karras_sigmas": True}, NOTHING, scheduler="euler_karras"),
    ],
    "eta": [case(0.5, LATENTS, scheduler="ddim")],
    "text_encoder_dtype": [case("bfloat16", EVERYTHING)],
    "unet_dtype": [
        case("bfloat16", LATENTS),
        case("float32", NOTHING),
    ],
    "vae_dtype": [
        case("bfloat16", BEGUN, prompts=[BEGINS]),
        case("bfloat16", PICTURES),
        case("float32", NOTHING),
    ],
    "tile": [
        case(True, PICTURES, height=256),
        case(True, BEGUN, height=256, prompts=[BEGINS]),
        case(True, NOTHING),  # all of it is in one tile
    ],
    "image_format": [case("webp", PICTURES)],
    "grid_images": [case(4, NOTHING)],  # grids say it themselves
    "name_template": [case("{seed}", NOTHING)],
    "index": [case("csv", NOTHING)],
    "prompts": [case([PROMPT, PROMPT | {"prompt": "a ring"}], EVERYTHING)],
    "height": [case(256, LATENTS), case(256, BEGUN, prompts=[BEGINS])],
    "width": [case(256, LATENTS)],
}
# Of the settings as they are asked for, those that are gone once they are resolved.
ASKED: dict[str, list[Case]] = {
    "prompt": [case(("a green ring",), EVERYTHING, "prompts")],
    "prompts_file": [
        case(Path("prompts.txt"), EVERYTHING, "prompts"),
        case(Path("prompts.txt"), NOTHING, prompt=("a green ring",)),
    ],
    "prompt_syntax": [
        case("dynamic", EVERYTHING, "prompts", prompt=("a {red|blue} star",)),
        case("dynamic", NOTHING),
    ],
    "wildcards": [
        case(Path("others"), EVERYTHING, "prompts", of=Path("colors"), **WITH_WILDCARD),
        case(Path("colors_copy"), NOTHING, of=Path("colors"), **WITH_WILDCARD),
    ],
    "prompt_2": [case(("a green ring",), EVERYTHING, "prompts_2")],
    "negative_prompt": [
        case("ugly", EVERYTHING, "negative_prompts"),
        case(None, EVERYTHING, "negative_prompts"),
    ],
    "negative_prompt_2": [case("ugly", EVERYTHING, "negative_prompts_2")],
    "image": [
        case(("other_star.png",), BEGUN, "pictures", of=("star.png",)),
        case(("star_copy.png",), NOTHING, of=("star.png",)),
    ],
    "mask_image": [
        case(("other_mask.png",), BEGUN, "masks", of=("mask.png",), image=("star.png",)),
        case(("mask.png",), BEGUN, "masks", image=("star.png",)),
    ],
    "height": [case(256, LATENTS), case(128, NOTHING)],
    "width": [case(256, LATENTS), case(128, NOTHING)],
}
TABLE: dict[type[BaseModel], dict[str, list[Case]]] = {
    GenerationConfig: GENERATION,
    RunSettings: ASKED,
    PromptSettings: {
        "prompt": [
            case("a green ring", EVERYTHING, "prompts"),
            case(
                "a large red star on a blue background, dark",
                EVERYTHING,
                "prompts",
                of="a large red star on a blue background, light",
            ),
        ],
        "prompt_2": [case("a green ring", EVERYTHING, "prompts_2")],
        "negative_prompt": [
            case("ugly", EVERYTHING, "negative_prompts"),
            case("", EVERYTHING, "negative_prompts"),
            case(None, EVERYTHING, "negative_prompts"),
        ],
        "negative_prompt_2": [case("ugly", EVERYTHING, "negative_prompts_2")],
        "seed": [
            case(7, LATENTS, "seeds"),
            case(42, NOTHING),  # the run's own
        ],
        "settings": [
            case({"guidance_scale": 3.0}, LATENTS, "own"),
            case({"scheduler": "ddim", "eta": 0.5}, LATENTS, "own"),
            case({"original_size": [64, 64]}, LATENTS, "own"),
            case({"height": 256}, LATENTS, "own"),
            case({"loras": [UNET_LORA]}, LATENTS, "own"),
            case({"loras": [TEXT_LORA]}, EVERYTHING, "own"),
            case({"guidance_scale": 7.5}, NOTHING),  # the run's own
        ],
        "seeds": [case((7, 8), LATENTS, "seeds")],
        "num_images_per_prompt": [case(2, LATENTS), case(1, NOTHING)],
        "id": [
            case("star", LATENTS, "seeds"),
            case("star", NOTHING, seed=7),
        ],
        "image": [
            case("other_star.png", BEGUN, "pictures", of="star.png"),
            case("star_copy.png", NOTHING, of="star.png"),
            case("star.png", LATENTS, "stage0_latents.safetensors changed"),
        ],
        "mask_image": [
            case("other_mask.png", BEGUN, "masks", of="mask.png", image="star.png"),
            case("mask.png", BEGUN, "masks", image="star.png"),
        ],
    },
    TokenFile: {
        "file": [
            case("red_copy.safetensors", NOTHING),
            case("blue.safetensors", EVERYTHING, "embeddings"),
        ],
        "token": [case("<red>", EVERYTHING, "embeddings")],
    },
    LoraFile: {
        "file": [
            case("lora_unet_copy.safetensors", NOTHING),
            case("lora_unet_other.safetensors", LATENTS, "unet_loras"),
            case(
                "lora_text_other.safetensors",
                EVERYTHING,
                "text_encoder_loras",
                of="lora_text.safetensors",
            ),
        ],
        "scale": [
            case(0.5, LATENTS, "unet_loras"),
            case(0.5, EVERYTHING, "text_encoder_loras", file="lora_text.safetensors"),
        ],
    },
}
# How a stage computes: another value, and why stage 2 runs again although its latents are fresh.
RUN_OPTIONS: dict[str, tuple[Any, str | None]] = {
    "backend": ("torch", None),
    "remote_vae": ("http://localhost:8000", None),
    "mesh": ("single", None),
    "batch_size": (1, None),
    "fill_groups": (True, None),
    "steps_per_call": (3, None),
    "warmup_steps": (1, None),
    "warmup": (True, None),
    "operations": ("torchax", None),
    "distributed": ("localhost:1234,2,0", None),
    "repeat": (2, "it is to be repeated"),
    "profile": (True, "it is to be profiled"),
    "profile_dir": (Path("traces"), "it is to be profiled"),
    "profile_steps": ("5:8", "it is to be profiled"),
    "save_trajectory": (5, f"{TRAJECTORY_FILE} is not there"),
    "checkpoint_every": (5, None),
    "no_verify": (True, None),
}
# The packages whose arithmetic a stage's result depends on; LoRAs and weighted prompts have more.
VERSIONS: dict[str, list[tuple[dict[str, Any], frozenset[int]]]] = {
    **{name: [({}, EVERYTHING)] for name in ("torch", "transformers", "diffusers", "tokenizers")},
    **{name: [({}, LATENTS)] for name in ("torchax", "jax", "jaxlib", "scipy", "torchsde")},
    "pillow": [({}, PICTURES)],
    "compel": [({}, NOTHING), ({"prompt_weighting": "compel"}, EVERYTHING)],
}
COMPONENTS = {
    **dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), EVERYTHING),
    **dict.fromkeys(("unet", "scheduler"), LATENTS),
    "vae": PICTURES,
}
# Changes of the demo checkpoint's JSON files that mean something.
JSON_CHANGES: dict[str, dict[str, Any]] = {
    "model_index.json": {"force_zeros_for_empty_prompt": False},
    "scheduler/scheduler_config.json": {"beta_end": 0.013},
    "text_encoder/config.json": {"hidden_act": "quick_gelu"},
    "text_encoder_2/config.json": {"hidden_act": "quick_gelu"},
    "tokenizer/tokenizer_config.json": {"model_max_length": 70},
    "tokenizer_2/tokenizer_config.json": {"model_max_length": 70},
    "unet/config.json": {"norm_eps": 1e-4},
    "vae/config.json": {"scaling_factor": 0.5},
}
