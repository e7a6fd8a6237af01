"""Which stages a change makes stale: of every setting, of every file of a checkpoint, of packages.

The tables below say what must be so; the recipes are those of the stages themselves, one chained
to the next. A field of the settings that has no row here fails, and so does a row without a field.
"""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel
from safetensors.numpy import save_file

from common.errors import BadSettingError, StageError
from common.files import artifacts
from common.files.artifacts import Artifact, Recipe, TensorLayout
from common.models.checkpoint import SUPPORTED_CLASSES, WITHOUT_WEIGHTS, open_checkpoint
from common.runs.flags import given_settings
from common.runs.generation import (
    GenerationConfig,
    LoraFile,
    PromptSettings,
    RunOptions,
    RunSettings,
    SamplingSettings,
    TokenFile,
    read_run_options,
    resolve,
)
from stages import stage1_text_encoder, stage2_unet, stage3_vae_decoder
from tests.conftest import DEMO

NOTHING: frozenset[int] = frozenset()
PICTURES = frozenset({3})
LATENTS = frozenset({2, 3})
EVERYTHING = frozenset({1, 2, 3})
STAGES = {1: stage1_text_encoder, 2: stage2_unet, 3: stage3_vae_decoder}

WEIGHTS = "diffusion_pytorch_model.safetensors"
REPOSITORY = "someone/checkpoint"
PROMPT = {"prompt": "a large red star", "negative_prompt": "blurry"}
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
    "num_inference_steps": [case(26, LATENTS)],
    "timesteps": [case((999, 400), LATENTS, of=(999, 500), **BY_TIMESTEPS)],
    "sigmas": [case((14.0, 0.5, 0.0), LATENTS, of=(14.0, 1.0, 0.0), **BY_TIMESTEPS)],
    "guidance_scale": [case(5.0, LATENTS)],
    "guidance_rescale": [case(0.7, LATENTS)],
    "guidance_start": [case(0.25, LATENTS)],
    "guidance_end": [case(0.75, LATENTS)],
    "seed": [
        case(43, LATENTS, "seeds"),
        case(43, NOTHING, prompts=[PROMPT | {"seed": 7}]),
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
        case("bfloat16", PICTURES),
        case("float32", NOTHING),
    ],
    "tile": [
        case(True, PICTURES, height=256),
        case(True, NOTHING),  # all of it is in one tile
    ],
    "image_format": [case("webp", PICTURES)],
    "prompts": [case([PROMPT, PROMPT | {"prompt": "a ring"}], EVERYTHING)],
    "height": [case(256, LATENTS)],
    "width": [case(256, LATENTS)],
}
# Of the settings as they are asked for, those that are gone once they are resolved.
ASKED: dict[str, list[Case]] = {
    "prompt": [case(("a green ring",), EVERYTHING, "prompts")],
    "prompts_file": [
        case(Path("prompts.txt"), EVERYTHING, "prompts"),
        case(Path("prompts.txt"), NOTHING, prompt=("a green ring",)),
    ],
    "prompt_2": [case(("a green ring",), EVERYTHING, "prompts_2")],
    "negative_prompt": [
        case("ugly", EVERYTHING, "negative_prompts"),
        case(None, EVERYTHING, "negative_prompts"),
    ],
    "negative_prompt_2": [case("ugly", EVERYTHING, "negative_prompts_2")],
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
    "mesh": ("single", None),
    "batch_size": (1, None),
    "steps_per_call": (3, None),
    "warmup_steps": (1, None),
    "warmup": (True, None),
    "operations": ("torchax", None),
    "distributed": ("localhost:1234,2,0", None),
    "repeat": (2, "it is to be repeated"),
    "profile": (True, "it is to be profiled"),
    "profile_dir": (Path("traces"), "it is to be profiled"),
    "profile_steps": ("5:8", "it is to be profiled"),
    "save_trajectory": (5, f"{artifacts.TRAJECTORY_FILE} is not there"),
    "checkpoint_every": (5, None),
    "no_verify": (True, None),
}
# The packages whose arithmetic a stage's result depends on; LoRAs and weighted prompts have more.
VERSIONS: dict[str, list[tuple[dict[str, Any], frozenset[int]]]] = {
    **{name: [({}, EVERYTHING)] for name in ("torch", "transformers", "diffusers", "tokenizers")},
    **{name: [({}, LATENTS)] for name in ("torchax", "jax", "jaxlib", "scipy", "torchsde")},
    "pillow": [({}, PICTURES)],
    "peft": [
        ({}, NOTHING),
        ({"loras": [UNET_LORA]}, LATENTS),
        ({"loras": [TEXT_LORA]}, EVERYTHING),
    ],
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


# --- the checkpoints and files that the tables name -----------------------------------------------


def change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_json(path: Path, changes: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_file(checkpoint: Path, name: str) -> None:
    """Change what one file of a copy of the demo checkpoint means."""
    if name in JSON_CHANGES:
        change_json(checkpoint / name, JSON_CHANGES[name])
    elif name.endswith("tokenizer.json"):
        vocabulary = json.loads((checkpoint / name).read_text())
        vocabulary["model"]["continuing_subword_prefix"] = "#"
        (checkpoint / name).write_text(json.dumps(vocabulary))
    else:
        change_last_byte(checkpoint / name)


def save_lora(path: Path, *layers: str, value: float) -> None:
    save_file(
        {f"{layer}.lora_A.weight": np.full((1, 2), value, "float32") for layer in layers}, path
    )


def put_into_hub(hub: Path, content: Path, commit: str, *revisions: str) -> None:
    """Lay a folder into the hub's cache, as a download of these revisions would."""
    root = hub / f"models--{REPOSITORY.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    for revision in revisions:
        (root / "refs" / revision).write_text(commit)
    shutil.copytree(content, root / "snapshots" / commit)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the tables name by a relative path."""
    root = tmp_path_factory.mktemp("places")
    names = sorted(str(p.relative_to(DEMO)) for p in DEMO.rglob("*") if p.is_file())
    for name in ("same", "other", "other_scheduler", "other_vae", "variants"):
        shutil.copytree(DEMO, root / name)
    for name in names:
        change_file(root / "other", name)
    change_file(root / "other_scheduler", "scheduler/scheduler_config.json")
    change_file(root / "other_vae", "vae/config.json")
    for path in (root / "variants").rglob("*.safetensors"):
        for variant in ("fp16", "again"):
            shutil.copy(path, path.with_name(f"{path.stem}.{variant}.safetensors"))
    for path in (root / "variants").rglob("*.fp16.safetensors"):
        change_last_byte(path)

    shutil.copytree(DEMO / "vae", root / "vae_of_factor_4")
    vae = json.loads((DEMO / "vae" / "config.json").read_text())
    vae |= {
        name: vae[name][:3] for name in ("block_out_channels", "down_block_types", "up_block_types")
    }
    (root / "vae_of_factor_4" / "config.json").write_text(json.dumps(vae))

    for name, value in (("single", 1), ("single_renamed", 1), ("single_other", 2)):
        save_file({"weights": np.full(4, value, "float32")}, root / f"{name}.safetensors")
    for name, value in (("red", 1), ("red_copy", 1), ("blue", 2)):
        save_file({"emb": np.full((1, 4), value, "float32")}, root / f"{name}.safetensors")
    unet, text = "unet.mid_block.to_q", "text_encoder.layers.0.q_proj"
    save_lora(root / "lora_unet.safetensors", unet, value=1)
    save_lora(root / "lora_unet_copy.safetensors", unet, value=1)
    save_lora(root / "lora_unet_other.safetensors", unet, value=2)
    save_lora(root / "lora_text.safetensors", text, value=1)
    save_lora(root / "lora_text_other.safetensors", text, value=2)
    save_lora(root / "lora_both.safetensors", unet, text, value=1)
    (root / "prompts.txt").write_text("a green ring\n")

    put_into_hub(root / "hub", root / "same", "a" * 40, "main")
    put_into_hub(root / "hub", root / "same", "b" * 40, "retagged")
    put_into_hub(root / "hub", root / "other", "c" * 40, "other")
    return root


@pytest.fixture(scope="module", autouse=True)
def at_places(places: Path) -> Iterator[None]:
    """Relative paths, the hub's cache and the memory of hashes are in the tests' own folder."""
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(places)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(places / "hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("XDG_CACHE_HOME", str(places / "cache"))
        yield


# --- recipes -------------------------------------------------------------------------------------


def config_of(model: type[BaseModel], values: dict[str, Any]) -> GenerationConfig:
    """A run's settings in which those of one model have the values."""
    if model is RunSettings:
        settings = RunSettings.model_validate(values)
        checkpoint = open_checkpoint(settings, stage1_text_encoder.COMPONENTS)
        return resolve(
            settings,
            native_size=checkpoint.native_size,
            size_factor=checkpoint.vae_scale_factor,
        )
    if model in WITHIN:
        values = BASE[GenerationConfig] | {WITHIN[model]: [values]}
    return GenerationConfig.model_validate(values)


def from_fingerprint(recipe: Recipe) -> str:
    """The data's checksum where another recipe always gives other data."""
    return hashlib.sha256(f"data of {recipe.fingerprint()}".encode()).hexdigest()


def used_on_cpu(dtype: str) -> str:
    return "float32" if dtype == "auto" else dtype


def recipes_of(
    config: GenerationConfig, checksum: Callable[[Recipe], str] = from_fingerprint
) -> dict[int, Recipe]:
    """The three stages' own recipes, each with the files of those before it as its input.

    Args:
        checksum: of the data that a stage makes by a recipe.
    """

    def made(name: str, recipe: Recipe, tensors: dict[str, TensorLayout]) -> Artifact:
        header = artifacts.make_header(recipe, {}, checksum(recipe))
        return Artifact(
            path=Path(name), header=header, data_sha256=checksum(recipe), tensors=tensors
        )

    first = stage1_text_encoder.make_recipe(
        config, open_checkpoint(config, stage1_text_encoder.COMPONENTS)
    )
    checkpoint = open_checkpoint(config, stage2_unet.COMPONENTS)
    second = stage2_unet.make_recipe(
        config,
        checkpoint,
        made(artifacts.EMBEDDINGS_FILE, first, {}),
        used_on_cpu(config.unet_dtype),
    )
    shape = (len(config.image_seeds()), *stage2_unet.latent_shape(config, checkpoint))
    third = stage3_vae_decoder.make_recipe(
        config,
        open_checkpoint(config, stage3_vae_decoder.COMPONENTS),
        made(artifacts.LATENTS_FILE, second, {"latents": TensorLayout("F32", shape)}),
        used_on_cpu(config.vae_dtype),
    )
    return {1: first, 2: second, 3: third}


def base_config(**changes: Any) -> GenerationConfig:
    return GenerationConfig.model_validate(BASE[GenerationConfig] | changes)


def stale_stages(before: dict[int, Recipe], after: dict[int, Recipe]) -> set[int]:
    return {stage for stage in before if before[stage].fingerprint() != after[stage].fingerprint()}


def check_what_is_said(before: Recipe, after: Recipe, said: str) -> None:
    """The difference of two recipes names what changed, and an old and a new value that differ."""
    words = artifacts.difference(before, after)
    assert words is not None and said in words
    if "→" in words:
        assert artifacts.difference(after, before) != words, f"{words}: both values look the same"


# --- every setting -------------------------------------------------------------------------------


def fields_of(model: type[BaseModel]) -> list[str]:
    """The fields that need a row."""
    shared = SamplingSettings.model_fields if model is RunSettings else {}
    return [name for name in model.model_fields if name not in shared]


def all_cases() -> list[Any]:
    """A parameter for each case of each field, and one without a case for a field without any."""
    found = []
    for model, rows in TABLE.items():
        for name in fields_of(model):
            cases: list[Case | None] = [*rows.get(name, [])] or [None]
            for number, one in enumerate(cases):
                label = f"{model.__name__}.{name}"
                label += f"-{number}" if len(cases) > 1 else ""
                found.append(pytest.param(model, name, one, id=label))
    return found


def nested_models(annotation: Any) -> set[type[BaseModel]]:
    """The models within a field's type, and those within them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        below = (nested_models(f.annotation) for f in annotation.model_fields.values())
        return {annotation}.union(*below)
    return set[type[BaseModel]]().union(*map(nested_models, get_args(annotation)))


@pytest.mark.parametrize(("model", "name", "change"), all_cases())
def test_a_setting_makes_stale_what_depends_on_it(
    model: type[BaseModel], name: str, change: Case | None
) -> None:
    if change is None:
        pytest.fail(
            f"{model.__name__}.{name} has no row in TABLE: say there which stages a change of it "
            "must make stale"
        )
    values = {**BASE[model], **change.beside}
    if change.of is not AS_BEFORE:
        values[name] = change.of
    before = config_of(model, values)
    after = config_of(model, values | {name: change.to})

    old, new = model.model_validate(values), model.model_validate(values | {name: change.to})
    changed = {key for key in model.model_fields if getattr(old, key) != getattr(new, key)}
    assert changed == {name}, "the row is to change this field alone"

    first, second = recipes_of(before), recipes_of(after)
    assert stale_stages(first, second) == change.stale
    if change.stale:
        stage = min(change.stale)
        check_what_is_said(first[stage], second[stage], change.said or name)


def test_the_table_names_no_field_that_is_gone() -> None:
    for model, rows in TABLE.items():
        gone = rows.keys() - set(fields_of(model))
        assert not gone, f"{model.__name__} has no field {', '.join(sorted(gone))}: drop its row"
    gone = RUN_OPTIONS.keys() - RunOptions.model_fields.keys()
    assert not gone, f"RunOptions has no field {', '.join(sorted(gone))}: drop its row"


def test_the_table_knows_every_model_of_the_settings() -> None:
    found = nested_models(GenerationConfig) | nested_models(RunSettings)
    assert found == TABLE.keys()


def test_every_case_is_stale_to_the_end() -> None:
    """Pictures are made of latents, and latents of embeddings."""
    for rows in TABLE.values():
        for cases in rows.values():
            assert all(one.stale in (NOTHING, PICTURES, LATENTS, EVERYTHING) for one in cases)


# --- how a stage computes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A folder with latents, and the recipe that they were made by."""
    import torch

    recipe = recipes_of(base_config())[2]
    folder = tmp_path_factory.mktemp("fresh")
    provenance = {"unet_dtype_asked": "auto"}
    artifacts.save_tensors(
        folder / artifacts.LATENTS_FILE, {"latents": torch.zeros(1, 4, 16, 16)}, recipe, provenance
    )
    return folder, recipe


@pytest.mark.parametrize("name", RunOptions.model_fields)
def test_how_a_stage_computes_makes_nothing_stale(
    name: str, fresh_run: tuple[Path, Recipe]
) -> None:
    if name not in RUN_OPTIONS:
        pytest.fail(f"RunOptions.{name} has no row in RUN_OPTIONS: add another value for it")
    value, why = RUN_OPTIONS[name]
    options = read_run_options({name: value})
    assert getattr(options, name) != getattr(RunOptions(), name)

    assert given_settings({name: value}) == {}
    with pytest.raises(BadSettingError, match=name):
        base_config().override({name: value})

    folder, recipe = fresh_run
    assert stage2_unet.why_stale(folder, recipe, RunOptions()) is None
    assert stage2_unet.why_stale(folder, recipe, options) == why
    assert artifacts.why_stale(folder / artifacts.LATENTS_FILE, recipe) is None


def test_no_recipe_is_told_how_a_stage_computes() -> None:
    for stage, module in STAGES.items():
        kinds = [p.annotation for p in inspect.signature(module.make_recipe).parameters.values()]
        assert GenerationConfig in kinds and RunOptions not in kinds
        settings = recipes_of(base_config())[stage].settings
        assert not settings.keys() & RunOptions.model_fields.keys()


def test_a_trajectory_has_a_recipe_of_its_own() -> None:
    latents = recipes_of(base_config())[2]
    every_5, every_6 = (artifacts.recipe_of_trajectory(latents, every) for every in (5, 6))
    assert artifacts.difference(every_5, every_6) == "save_trajectory 5 → 6"
    for trajectory in (every_5, every_6):
        assert artifacts.recipe_of_its_latents(trajectory) == latents


@pytest.mark.parametrize(
    ("asked", "said"),
    [("auto", None), ("float32", None), ("bfloat16", "unet_dtype float32 → bfloat16")],
)
def test_an_auto_dtype_is_what_it_was_when_the_latents_were_made(
    asked: str, said: str | None, fresh_run: tuple[Path, Recipe]
) -> None:
    folder, made = fresh_run
    file = folder / artifacts.LATENTS_FILE
    config = base_config(unet_dtype=stage2_unet.expected_dtype(asked, file))
    assert artifacts.difference(made, recipes_of(config)[2]) == said


# --- packages and files --------------------------------------------------------------------------


def settings_of_versions() -> list[Any]:
    return [
        pytest.param(package, settings, stale, id=f"{package}-{'-'.join(settings) or 'plain'}")
        for package, rows in VERSIONS.items()
        for settings, stale in rows
    ]


@pytest.mark.parametrize(("package", "settings", "stale"), settings_of_versions())
def test_another_version_makes_stale_what_the_package_computed(
    package: str, settings: dict[str, Any], stale: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, version = base_config(**settings), artifacts.version
    before = recipes_of(config)
    monkeypatch.setattr(
        artifacts, "version", lambda name: "0.0.1" if name == package else version(name)
    )
    after = recipes_of(config)
    assert stale_stages(before, after) == stale
    if stale:
        stage = min(stale)
        said = f"{package} {version(package)} → 0.0.1"
        assert artifacts.difference(before[stage], after[stage]) == said


def test_the_table_knows_every_package_that_recipes_name() -> None:
    found: set[str] = set()
    for rows in VERSIONS.values():
        for settings, _ in rows:
            for recipe in recipes_of(base_config(**settings)).values():
                found |= recipe.versions.keys()
    assert found == VERSIONS.keys()


def test_the_table_knows_every_component() -> None:
    assert COMPONENTS.keys() == SUPPORTED_CLASSES.keys() | set(WITHOUT_WEIGHTS)
    recipes = recipes_of(base_config()).values()
    assert COMPONENTS.keys() == set[str]().union(*(recipe.weights for recipe in recipes))


def demo_files() -> list[str]:
    return sorted(str(path.relative_to(DEMO)) for path in DEMO.rglob("*") if path.is_file())


def stale_of_file(name: str) -> frozenset[int]:
    return {"README.md": NOTHING, "model_index.json": EVERYTHING}.get(
        name, COMPONENTS.get(name.split("/")[0], EVERYTHING)
    )


@pytest.mark.parametrize("name", demo_files())
def test_a_file_of_the_checkpoint_makes_stale_what_was_made_with_it(
    name: str, demo_copy: Path
) -> None:
    config = base_config(model_id=str(demo_copy))
    before, content = recipes_of(config), (demo_copy / name).read_bytes()
    change_file(demo_copy, name)
    assert (demo_copy / name).read_bytes() != content
    after = recipes_of(config)
    stale = stale_of_file(name)
    assert stale_stages(before, after) == stale
    if stale:
        said = {"model_index.json": "force_zeros_for_empty_prompt true → false"}.get(
            name, f"weights of {name.split('/')[0]} changed"
        )
        assert artifacts.difference(before[min(stale)], after[min(stale)]) == said


def test_what_no_stage_reads_of_a_checkpoint_makes_nothing_stale(demo_copy: Path) -> None:
    config = base_config(model_id=str(demo_copy))
    before = recipes_of(config)
    for name in demo_files():
        if name.endswith("config.json") and not name.startswith("tokenizer"):
            saved_by = {"_name_or_path": "/elsewhere", "_diffusers_version": "0.1"}
            change_json(demo_copy / name, saved_by | {"transformers_version": "4.0"})
    change_json(demo_copy / "model_index.json", {"_diffusers_version": "0.1"})
    for component in COMPONENTS:
        for other in ("model.fp16.safetensors", "pytorch_model.bin", "README.md", "model.onnx"):
            (demo_copy / component / other).write_bytes(b"other")
    (demo_copy / "safety_checker").mkdir()
    (demo_copy / "safety_checker" / "model.safetensors").write_bytes(b"other")
    assert stale_stages(before, recipes_of(config)) == set()


def test_the_same_numbers_made_anew_leave_the_later_stages_fresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another version that computes the same: what was made of it needs no second making."""
    config, version = base_config(), artifacts.version
    before = recipes_of(config, lambda recipe: str(recipe.stage))
    monkeypatch.setattr(
        artifacts, "version", lambda name: "0.0.1" if name == "tokenizers" else version(name)
    )
    assert stale_stages(before, recipes_of(config, lambda recipe: str(recipe.stage))) == {1}


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_an_adapter_that_changes_a_text_encoder_makes_everything_stale(
    name: str, demo_copy: Path
) -> None:
    """transformers reads an adapter that stands in a text encoder's folder."""
    import torch

    from common.models.weights import load_text_pipeline

    def state() -> tuple[dict[int, Recipe], torch.Tensor]:
        config = base_config(model_id=str(demo_copy))
        checkpoint = open_checkpoint(config, stage1_text_encoder.COMPONENTS)
        encoder = getattr(load_text_pipeline(checkpoint, torch.float32), name)
        with torch.no_grad():
            states = encoder(torch.arange(77)[None], output_hidden_states=True).hidden_states
        return recipes_of(config), states[-1]

    recipes, plain = state()
    folder = demo_copy / name
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    random, tensors = np.random.default_rng(0), {}
    # The layer's name in one version of transformers, or another.
    for prefix in ("", "text_model."):
        layer = f"base_model.model.{prefix}encoder.layers.0.self_attn.q_proj"
        for matrix, shape in (("lora_A", (2, width)), ("lora_B", (width, 2))):
            tensors[f"{layer}.{matrix}.weight"] = random.normal(size=shape).astype("float32")
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["layers.0.self_attn.q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    try:
        with_adapter, changed = state()
    except StageError as error:
        assert "adapter" in str(error)
        return  # refused, which does as well
    expected = NOTHING if torch.equal(plain, changed) else EVERYTHING
    assert stale_stages(recipes, with_adapter) == expected
