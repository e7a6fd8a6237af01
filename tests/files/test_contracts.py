"""What each file must hold for the next stage."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.declared import EMBEDDINGS as OF_EMBEDDINGS
from common.declared import LATENTS as OF_LATENTS
from common.errors import BadInputFileError
from common.files import contracts
from common.files.artifacts import Artifact, Row, TensorLayout, make_header
from common.files.contracts import header_misfit
from common.files.recipe import Recipe
from common.files.stage_table import EMBEDDINGS_FILE, LATENTS_FILE, TRAJECTORY_FILE
from common.files.tensor_rows import Dimension, TensorRow
from tests.conftest import Run
from tests.refusals import (
    EMBEDDINGS,
    LATENTS,
    TRAJECTORY,
    Shapes,
    call,
    expect,
    refusal,
    save_with_header,
    zeros,
)

SETTINGS = {
    "prompts": ["a", "b"],
    "prompts_2": [None, None],
    "negative_prompts": ["", None],
    "negative_prompts_2": [None, None],
    "num_images_per_prompt": 2,
    "seeds": [1, 2, 3, 4],
}


def by_artifact(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings as recipes hold them: prompts shape embeddings, the others latents."""
    prompts = {name: value for name, value in settings.items() if "prompts" in name}
    others = {name: value for name, value in settings.items() if name not in prompts}
    return {OF_EMBEDDINGS: prompts, OF_LATENTS: others}


def make_latents(stage: int = 2, images: int = 4, **changes: Any) -> Artifact:
    """Latents whose header names these settings; None takes one away."""
    settings = {k: v for k, v in (SETTINGS | changes).items() if v is not None}
    recipe = Recipe(stage=stage, settings=by_artifact(settings), inputs={}, weights={}, versions={})
    return Artifact(
        path=Path(LATENTS_FILE),
        header=make_header(recipe, {}, ""),
        data_sha256="",
        tensors={"latents": TensorLayout("F32", (images, 4, 8, 8))},
    )


def test_a_header_that_fits_its_latents_passes() -> None:
    assert header_misfit(make_latents()) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": 1}, "stage 1 made it"),
        ({"seeds": "none"}, "no usable seeds"),
        ({"prompts": [1, 2]}, "no usable prompts"),
        ({"num_images_per_prompt": None}, "no usable num_images_per_prompt"),
        ({"prompts_2": []}, "not as many prompts_2"),
        ({"seeds": [1, 2]}, "names 2 seeds"),
        ({"images": 3}, "latents of 3 images"),
    ],
)
def test_a_header_that_does_not_is_named(changes: dict[str, Any], said: str) -> None:
    assert said in str(header_misfit(make_latents(**changes)))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"pooled_prompt_embeds": None}, "lacks pooled_prompt_embeds, which the checkpoint's UNet"),
        ({"prompt_embeds": (1, 77, 80)}, "(1, 77, 80); the checkpoint's UNet needs a width of 160"),
        ({"prompt_embeds": (77, 160)}, "prompt_embeds of shape (77, 160)"),
        ({"negative_pooled_prompt_embeds": (1, 80)}, "(1, 80); the checkpoint's UNet needs a"),
        ({name: (2, *shape[1:]) for name, shape in EMBEDDINGS.items()},
         "holds 2 prompts; generation_config.json has 1"),
        (dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (1, 0, 160)),
         "prompt_embeds of shape (1, 0, 160)"),
        ({"prompt_embeds": (1, 154, 160)}, "prompt_embeds and negative_prompt_embeds of different"),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_fit(
    run_dir: Path, shapes: dict[str, tuple[int, ...] | None], words: str
) -> None:
    path = run_dir / EMBEDDINGS_FILE
    wanted = {name: shape for name, shape in (EMBEDDINGS | shapes).items() if shape is not None}
    save_file(zeros(wanted), path)
    with refusal(BadInputFileError, str(path), words, "make it again: python stages/stage1_text"):
        call(2, "--output_dir", run_dir)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"latent": (1, 4, 8, 8)}, "lacks latents"),
        ({"latents": (1, 3, 8, 8)}, "latents of shape (1, 3, 8, 8); the VAE needs 4 channels"),
        ({"latents": (4, 8, 8)}, "latents of shape (4, 8, 8)"),
        ({"latents": (0, 4, 8, 8)}, "latents of shape (0, 4, 8, 8)"),
    ],
)
def test_latents_that_do_not_fit(run_dir: Path, shapes: Shapes, words: str) -> None:
    path = run_dir / LATENTS_FILE
    save_file(zeros(shapes), path)
    with refusal(BadInputFileError, str(path), words, "make it again: python stages/stage2_unet"):
        call(3, "--output_dir", run_dir)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"latents": (2, 1, 4, 8, 8)}, "lacks steps"),
        ({"latents": (2, 1, 4, 8, 9), "steps": (2,)}, "those of the run are (1, 4, 8, 8)"),
        ({"latents": (3, 1, 4, 8, 8), "steps": (2,)}, "latents of shape (3, 1, 4, 8, 8)"),
        ({"latents": (0, 1, 4, 8, 8), "steps": (0,)}, "latents of shape (0, 1, 4, 8, 8)"),
    ],
)
def test_a_trajectory_that_does_not_fit(run_dir: Path, shapes: Shapes, words: str) -> None:
    path = run_dir / TRAJECTORY_FILE
    save_file(zeros(shapes), path)
    with refusal(BadInputFileError, str(path), words, "make it again", "--save_trajectory N"):
        call(3, "--output_dir", run_dir)


@pytest.mark.parametrize(
    ("number", "name", "shapes"),
    [
        (2, EMBEDDINGS_FILE, EMBEDDINGS),
        (3, LATENTS_FILE, LATENTS),
        (3, TRAJECTORY_FILE, TRAJECTORY),
    ],
)
def test_whole_numbers_are_no_tensors_of_ours(
    run_dir: Path, number: int, name: str, shapes: Shapes
) -> None:
    save_file(zeros(shapes, torch.int32), run_dir / name)
    with refusal(BadInputFileError, name, "as I32, not as floating-point numbers", "make it again"):
        call(number, "--output_dir", run_dir)


OF_ONE_IMAGE: dict[str, Any] = {
    **{key: ["a"] for key in ("prompts", "prompts_2", "negative_prompts", "negative_prompts_2")},
    "num_images_per_prompt": 1,
    "seeds": [42],
}


@pytest.mark.parametrize(
    ("stage", "inputs", "settings", "words"),
    [
        (1, {}, {}, "says that stage 1 made it"),
        (2, {}, {"prompts": "a"}, "has no usable prompts in its header"),
        (2, {}, {"num_images_per_prompt": 0}, "has no usable num_images_per_prompt in its header"),
        (2, {}, {"prompts_2": []}, "has not as many prompts_2 as prompts in its header"),
        (2, {}, {"seeds": [1, 2]}, "holds latents of 1 images, its header names 2 seeds"),
        (2, {"other": "0"}, {}, "says that it was made from 'other', which no stage makes"),
        (2, {EMBEDDINGS_FILE: "0" * 64}, {}, "was made from other data (checksum 000000000000…)"),
    ],
)
def test_latents_whose_header_does_not_fit(
    run_dir: Path, stage: int, inputs: dict[str, str], settings: dict[str, Any], words: str
) -> None:
    path = run_dir / LATENTS_FILE
    save_with_header(path, LATENTS, stage, inputs, by_artifact(OF_ONE_IMAGE | settings))
    with refusal(BadInputFileError, f"{path} {words}", "make it again: python stages/stage2_unet"):
        call(3, "--output_dir", run_dir)


def test_files_in_each_others_place_exit_3(run_copy: Path, stage: Run) -> None:
    shutil.copy(run_copy / EMBEDDINGS_FILE, run_copy / LATENTS_FILE)
    expect(stage(3, "--output_dir", run_copy), 3, LATENTS_FILE, "lacks latents")


A_ROW = TensorRow(
    file=EMBEDDINGS_FILE,
    name="image_embeds",
    shape=("P", "K", "D"),
    read_by="stage 2: an adapter's cross-attention",
    needed_by=("encoder_hid_dim_type", "ip_image_proj"),
)
A_DIMENSION = Dimension("image tokens", lambda unet: int(unet["image_tokens"]))
UNET = {"cross_attention_dim": 8}


def layouts(**shapes: tuple[int, ...]) -> dict[str, TensorLayout]:
    return {name: TensorLayout("F32", shape) for name, shape in shapes.items()}


def test_a_tensor_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its row, a tensor is demanded, checked, made empty and documented."""
    monkeypatch.setattr(contracts, "TENSORS", (*contracts.TENSORS, A_ROW))
    monkeypatch.setitem(contracts.DIMENSIONS, "K", A_DIMENSION)
    adapted = UNET | {"encoder_hid_dim_type": "ip_image_proj", "image_tokens": 4}
    texts = layouts(prompt_embeds=(2, 77, 8), negative_prompt_embeds=(2, 77, 8))

    def misfit(*shape: int) -> str | None:
        return contracts.embeddings_misfit(texts | layouts(image_embeds=shape), 2, adapted)

    assert contracts.embeddings_misfit(texts, 2, UNET) is None
    missing = "lacks image_embeds, which the checkpoint's UNet needs"
    assert contracts.embeddings_misfit(texts, 2, adapted) == missing
    assert misfit(2, 4, 8) is None
    assert misfit(2, 4, 9) == (
        "holds image_embeds of shape (2, 4, 9); the checkpoint's UNet needs a width of 8"
    )
    assert misfit(2, 5, 8) is not None and misfit(2, 4) is not None
    assert misfit(3, 4, 8) == "holds 3 prompts; generation_config.json has 2"

    assert "image_embeds" not in contracts.empty_embeddings(2, UNET)
    empty = contracts.empty_embeddings(2, adapted)
    assert {name: tuple(tensor.shape) for name, tensor in empty.items()} == {
        "prompt_embeds": (2, 77, 8),
        "negative_prompt_embeds": (2, 77, 8),
        "image_embeds": (2, 4, 8),
    }
    table = contracts.tensor_table().splitlines()
    assert table[-1] == "| K | image tokens |"
    (line,) = (line for line in table if "image_embeds" in line)
    assert "[P, K, D]" in line and "`encoder_hid_dim_type` ip_image_proj" in line


def test_a_row_of_latents_is_demanded_and_must_agree_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = TensorRow(file=LATENTS_FILE, name="mask", shape=("B", "h", "w"), read_by="stage 3")
    monkeypatch.setattr(contracts, "TENSORS", (*contracts.TENSORS, row))

    def misfit(**others: tuple[int, ...]) -> str | None:
        tensors = layouts(latents=(2, 4, 8, 16), **others)
        found = Artifact(path=Path(LATENTS_FILE), header=None, data_sha256="", tensors=tensors)
        return contracts.latents_misfit(found, {"latent_channels": 4})

    assert misfit() == "lacks mask"
    assert misfit(mask=(2, 8, 16)) is None
    assert misfit(mask=(2, 16, 16)) == "holds latents and mask of different shapes"


def test_latents_of_several_sizes() -> None:
    def misfit(**tensors: tuple[int, ...]) -> str | None:
        found = make_latents()
        assert found.header is not None
        own = [Row("", "", ending=ending) for ending in ("_64x32", "_32x64", "_64x32")]
        header = found.header.model_copy(update={"rows": own})
        found = replace(found, header=header, tensors=layouts(**tensors))
        return contracts.latents_misfit(found, {"latent_channels": 4})

    both = {"latents_64x32": (2, 4, 4, 8), "latents_32x64": (1, 4, 8, 4)}
    assert misfit(**both) is None
    assert "the VAE needs 4 channels" in str(misfit(**both | {"latents_32x64": (1, 3, 8, 4)}))
    assert misfit(latents_64x32=(2, 4, 4, 8)) == "lacks latents"


def image_layouts(**changes: tuple[int, ...]) -> dict[str, TensorLayout]:
    """Stage 0's tensors of two pictures of 64×32 with masks; a changed shape is floating point."""
    cells = (2, 4, 4, 8)
    names = [f"{part}image_latents_{kind}" for part in ("", "masked_") for kind in ("mean", "std")]
    return {
        **layouts(**dict.fromkeys(names, cells), latent_masks=(2, 1, 4, 8)),
        "pictures": TensorLayout("U8", (2, 32, 64, 3)),
        "masks": TensorLayout("U8", (2, 32, 64)),
        **layouts(**changes),
    }


@pytest.mark.parametrize(
    ("changes", "prompts", "said"),
    [
        ({}, 2, None),
        ({}, 3, "holds 2 pictures; generation_config.json has 3 prompts"),
        ({"masks": (2, 32, 64)}, 2, "holds masks of shape"),
        ({"latent_masks": (2, 1, 4, 4)}, 2, "the run is of 64×32 pixels"),
        ({"latent_masks": (1, 1, 4, 8)}, 2, "of different shapes"),
        ({"image_latents_std": (2, 16, 4, 8)}, 2, "its VAE of 4 channels"),
    ],
)
def test_pictures_latents_are_of_the_run(
    changes: dict[str, tuple[int, ...]], prompts: int, said: str | None
) -> None:
    found = contracts.image_latents_misfit(
        image_layouts(**changes),
        {"latent_channels": 4},
        prompts=prompts,
        size=(32, 64),
        cells=(4, 8),
        settings=["a mask"],
    )
    if "masks" in changes:
        said = "holds masks as F32"
    assert found is None if said is None else found is not None and said in found


def test_tensors_of_settings_are_demanded_with_them_alone() -> None:
    tensors = {n: t for n, t in image_layouts().items() if "mask" not in n}

    def misfit(*settings: str) -> str | None:
        return contracts.image_latents_misfit(
            tensors,
            {"latent_channels": 4},
            prompts=2,
            size=(32, 64),
            cells=(4, 8),
            settings=settings,
        )

    assert misfit() is None
    lacked = misfit("a mask")
    assert lacked is not None and "lacks masked_image_latents_mean" in lacked
    lacked = misfit("`--padding_mask_crop`")
    assert lacked is not None and "lacks crops" in lacked
