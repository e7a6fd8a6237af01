"""Which stages a change makes stale: of every setting, of every file of a checkpoint, of packages.

The tables of `staleness_table.py` say what must be so; the recipes are those of the stages
themselves, one chained to the next. A field of the settings that has no row there fails, and so
does a row without a field.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel
from safetensors.numpy import save_file

from common import declared
from common.compute.options import RunOptions, read_run_options
from common.errors import BadInputFileError, BadSettingError, StageError
from common.files import artifacts, recipe
from common.files.artifacts import Artifact, TensorLayout
from common.files.recipe import Recipe, difference
from common.files.stage_table import (
    DENOISE,
    EMBEDDINGS_FILE,
    IMAGE_LATENTS_FILE,
    LATENTS_FILE,
    STAGES,
)
from common.models.component_table import COMPONENTS as ROWS
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.runs import recipes
from common.runs.flags import Given
from common.runs.generation import GenerationConfig, RunSettings, resolve
from common.runs.image_latents import read_inputs
from common.runs.init_latents import find_init_latents
from common.runs.jobs import latent_shape
from common.runs.setting_groups import SHARED
from tests.conftest import DEMO, Run, file_contents
from tests.refusals import EMBEDDINGS, call, expect, refusal, save_with_header
from tests.runs.staleness_places import change_file, change_json, lay_out
from tests.runs.staleness_table import (
    AS_BEFORE,
    BASE,
    BEGINS,
    BEGUN,
    COMPONENTS,
    EVERYTHING,
    LATENTS,
    NOTHING,
    PICTURES,
    RUN_OPTIONS,
    TABLE,
    VERSIONS,
    WITHIN,
    Case,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the tables name by a relative path."""
    root = tmp_path_factory.mktemp("places")
    lay_out(root)
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
        checkpoint = open_checkpoint(settings, loaded_for(declared.EMBEDDINGS))
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
    """The stages' own recipes, each with the files of those before it as its input.

    Args:
        checksum: of the data that a stage makes by a recipe.
    """

    def made(name: str, recipe: Recipe, tensors: dict[str, TensorLayout]) -> Artifact:
        header = artifacts.make_header(recipe, {}, checksum(recipe))
        return Artifact(
            path=Path(name), header=header, data_sha256=checksum(recipe), tensors=tensors
        )

    first = recipes.embeddings_recipe(
        config, open_checkpoint(config, loaded_for(declared.EMBEDDINGS))
    )
    checkpoint = open_checkpoint(config, loaded_for(declared.LATENTS))
    of_vae = open_checkpoint(config, loaded_for(declared.PICTURES))
    found = {1: first}
    if config.has_pictures:
        vae_dtype = used_on_cpu(config.vae_dtype)
        found[0] = recipes.image_latents_recipe(config, of_vae, read_inputs(config), vae_dtype)
        begin: Artifact | None = made(IMAGE_LATENTS_FILE, found[0], {})
    else:
        begin = find_init_latents(config, checkpoint, Path("run"), verify=True)
    embeddings = made(EMBEDDINGS_FILE, first, {})
    second = recipes.latents_recipe(
        config, checkpoint, embeddings, used_on_cpu(config.unet_dtype), begin
    )
    shape = (len(config.image_seeds()), *latent_shape(config, checkpoint))
    third = recipes.pictures_recipe(
        config,
        of_vae,
        made(LATENTS_FILE, second, {"latents": TensorLayout("F32", shape)}),
        used_on_cpu(config.vae_dtype),
        begin if config.pastes else None,
    )
    return found | {2: second, 3: third}


def base_config(**changes: Any) -> GenerationConfig:
    return GenerationConfig.model_validate(BASE[GenerationConfig] | changes)


def stale_stages(before: dict[int, Recipe], after: dict[int, Recipe]) -> set[int]:
    return {stage for stage in before if before[stage].fingerprint() != after[stage].fingerprint()}


def check_what_is_said(before: Recipe, after: Recipe, said: str) -> None:
    """The difference of two recipes names what changed, and an old and a new value that differ."""
    words = difference(before, after)
    assert words is not None and said in words
    if "→" in words:
        assert difference(after, before) != words, f"{words}: both values look the same"


# --- every setting -------------------------------------------------------------------------------


def fields_of(model: type[BaseModel]) -> list[str]:
    """The fields that need a row."""
    shared = (
        {name for group in SHARED for name in group.model_fields} if model is RunSettings else set()
    )
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
            assert all(
                one.stale in (NOTHING, PICTURES, LATENTS, BEGUN, EVERYTHING) for one in cases
            )


def test_latents_know_how_what_they_begin_with_is_scaled() -> None:
    """By a VAE's config, when stage 2 reads it; stage 0's data are as before."""

    def made_with(**settings: Any) -> dict[int, Recipe]:
        return recipes_of(base_config(prompts=[BEGINS], **settings), lambda _: "0" * 64)

    before, after = made_with(), made_with(vae="vae_of_another_scale")
    assert stale_stages(before, after) == {0, 2, 3}
    check_what_is_said(before[2], after[2], "vae_scaling_factor")
    texts = [recipes_of(base_config(**own)) for own in ({}, {"vae": "vae_of_another_scale"})]
    assert stale_stages(*texts) == {3}  # nothing is begun with


# --- how a stage computes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A folder with latents, and the recipe that they were made by."""
    import torch

    made = recipes_of(base_config())[2]
    folder = tmp_path_factory.mktemp("fresh")
    provenance = {"unet_dtype_asked": "auto"}
    artifacts.save_tensors(
        folder / LATENTS_FILE, {"latents": torch.zeros(1, 4, 16, 16)}, made, provenance
    )
    return folder, made


@pytest.mark.parametrize("name", RunOptions.model_fields)
def test_how_a_stage_computes_makes_nothing_stale(
    name: str, fresh_run: tuple[Path, Recipe]
) -> None:
    if name not in RUN_OPTIONS:
        pytest.fail(f"RunOptions.{name} has no row in RUN_OPTIONS: add another value for it")
    value, why = RUN_OPTIONS[name]
    options = read_run_options({name: value})
    assert getattr(options, name) != getattr(RunOptions(), name)

    assert Given(DENOISE, {name: value}).settings() == {}
    with pytest.raises(BadSettingError, match=name):
        base_config().override({name: value})

    folder, made = fresh_run
    assert recipes.why_latents_stale(folder, made, RunOptions()) is None
    assert recipes.why_latents_stale(folder, made, options) == why
    assert artifacts.why_stale(folder / LATENTS_FILE, made) is None


def test_no_recipe_is_told_how_a_stage_computes() -> None:
    begun = base_config(prompts=[BEGINS])
    for make in (
        recipes.embeddings_recipe,
        recipes.image_latents_recipe,
        recipes.latents_recipe,
        recipes.pictures_recipe,
    ):
        kinds = [p.annotation for p in inspect.signature(make).parameters.values()]
        assert GenerationConfig in kinds and RunOptions not in kinds
    for stage in STAGES:
        for settings in recipes_of(begun)[stage.number].settings.values():
            assert not settings.keys() & RunOptions.model_fields.keys()


def test_a_trajectory_has_a_recipe_of_its_own() -> None:
    latents = recipes_of(base_config())[2]
    every_5, every_6 = (recipe.recipe_of_trajectory(latents, every) for every in (5, 6))
    assert difference(every_5, every_6) == "save_trajectory 5 → 6"
    for trajectory in (every_5, every_6):
        assert recipe.recipe_of_its_latents(trajectory) == latents


@pytest.mark.parametrize(
    ("asked", "said"),
    [("auto", None), ("float32", None), ("bfloat16", "unet_dtype float32 → bfloat16")],
)
def test_an_auto_dtype_is_what_it_was_when_the_latents_were_made(
    asked: str, said: str | None, fresh_run: tuple[Path, Recipe]
) -> None:
    folder, made = fresh_run
    file = folder / LATENTS_FILE
    config = base_config(unet_dtype=recipes.expected_unet_dtype(asked, file))
    assert difference(made, recipes_of(config)[2]) == said


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
    config, version = base_config(**settings), recipe.version
    before = recipes_of(config)
    monkeypatch.setattr(
        recipe, "version", lambda name: "0.0.1" if name == package else version(name)
    )
    after = recipes_of(config)
    assert stale_stages(before, after) == stale
    if stale:
        stage = min(stale)
        said = f"{package} {version(package)} → 0.0.1"
        assert difference(before[stage], after[stage]) == said


def test_the_table_knows_every_package_that_recipes_name() -> None:
    found: set[str] = set()
    for rows in VERSIONS.values():
        for settings, _ in rows:
            for made in recipes_of(base_config(**settings)).values():
                found |= made.versions.keys()
    assert found == VERSIONS.keys()


def test_the_table_knows_every_component() -> None:
    assert COMPONENTS.keys() == {row.name for row in ROWS if row.loaded_for}
    made = recipes_of(base_config()).values()
    assert COMPONENTS.keys() == set[str]().union(*(one.weights for one in made))


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
        assert difference(before[min(stale)], after[min(stale)]) == said


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
    config, version = base_config(), recipe.version
    before = recipes_of(config, lambda made: str(made.stage))
    monkeypatch.setattr(
        recipe, "version", lambda name: "0.0.1" if name == "tokenizers" else version(name)
    )
    assert stale_stages(before, recipes_of(config, lambda made: str(made.stage))) == {1}


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_an_adapter_that_changes_a_text_encoder_makes_everything_stale(
    name: str, demo_copy: Path
) -> None:
    """transformers reads an adapter that stands in a text encoder's folder."""
    import torch

    from common.models.text_pipeline import load_text_pipeline

    def state() -> tuple[dict[int, Recipe], torch.Tensor]:
        config = base_config(model_id=str(demo_copy))
        checkpoint = open_checkpoint(config, loaded_for(declared.EMBEDDINGS))
        encoder = getattr(load_text_pipeline(checkpoint, torch.float32), name)
        with torch.no_grad():
            states = encoder(torch.arange(77)[None], output_hidden_states=True).hidden_states
        return recipes_of(config), states[-1]

    without, plain = state()
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
    assert stale_stages(without, with_adapter) == expected


# --- what does not belong together --------------------------------------------------------------


def test_embeddings_of_another_stage(run_dir: Path) -> None:
    path = run_dir / EMBEDDINGS_FILE
    save_with_header(path, EMBEDDINGS, 2, {}, {})
    with refusal(BadInputFileError, f"{path} says that stage 2 made it", "make it again: python"):
        call(2, "--output_dir", run_dir)


def test_embeddings_of_other_prompts_exit_3(run_copy: Path, stage: Run) -> None:
    path = run_copy / "generation_config.json"
    config = json.loads(path.read_text())
    config["prompts"][0]["prompt"] = "a green ring"
    path.write_text(json.dumps(config))
    before = file_contents(run_copy)
    expect(stage(2, "--output_dir", run_copy), 3, EMBEDDINGS_FILE, "other prompts")
    assert file_contents(run_copy) == before
