"""diffusers' pipeline with the text parts alone, as diffusers loads it; kept by its content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from common.compute.kept import Kept
from common.declared import EMBEDDINGS
from common.errors import BadInputFileError
from common.models.checkpoint import Checkpoint
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.models.model_settings import LoraFile, ModelSettings, TokenFile
from common.models.text_pipeline import (
    import_text_classes,
    load_text_pipeline,
    open_text_pipeline,
)
from tests.original_layout import open_clip, save_original
from tests.refusals import call, refusal
from tests.tiny_checkpoints import save_sd, save_sdxl

ENCODERS = ("text_encoder", "text_encoder_2")
Tensors = dict[str, torch.Tensor]
LDM, SD_2 = "cond_stage_model.transformer.", "cond_stage_model.model."


def as_transformers(prefix: str, bare: bool = False) -> Callable[[Tensors], Tensors]:
    """transformers' names, with `text_model.` or, as version 5 has them, without."""

    def change(tensors: Tensors) -> Tensors:
        made = {}
        for name, tensor in tensors.items():
            beside = bare or name.startswith("text_projection.")
            start = "" if beside else "text_model."
            made[f"{prefix}{start}{name.removeprefix('text_model.')}"] = tensor
        return made

    return change


def as_open_clip(prefix: str, *, more: int = 0) -> Callable[[Tensors], Tensors]:
    """OpenCLIP's names, with layers after those that the config has."""

    def change(tensors: Tensors) -> Tensors:
        own = as_transformers("")(tensors)
        named = open_clip({"text_projection.weight": torch.ones(2, 2), **own})
        last = max(int(n.split(".")[2]) for n in named if n.startswith("transformer."))
        further = {
            n.replace(f".{last}.", f".{last + k}."): t
            for n, t in named.items()
            for k in range(1, more + 1)
            if n.startswith(f"transformer.resblocks.{last}.")
        }
        return {f"{prefix}{n}": t for n, t in {**named, **further}.items()}

    return change


def in_8_bits(tensors: Tensors) -> Tensors:
    """ComfyUI's float8 with scales; what it holds, to compare with."""
    made: Tensors = {}
    for name, tensor in as_transformers("text_encoders.clip_l.transformer.")(tensors).items():
        if tensor.ndim < 2:
            made[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        made[name] = (tensor / scale).to(torch.float8_e4m3fn)
        made[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    return made


# Title, the checkpoint's family, each text encoder's layout.
LAYOUTS: tuple[tuple[str, str, tuple[Callable[[Tensors], Tensors], ...]], ...] = (
    (
        "SGM, `conditioner.embedders.`",
        "SDXL",
        (
            as_transformers("conditioner.embedders.0.transformer."),
            as_open_clip("conditioner.embedders.1.model."),
        ),
    ),
    (
        "ComfyUI, `text_encoders.`",
        "SDXL",
        (
            as_transformers("text_encoders.clip_l.transformer."),
            as_transformers("text_encoders.clip_g.transformer."),
        ),
    ),
    ("LDM, `cond_stage_model.transformer.`", "SD", (as_transformers(LDM),)),
    ("LDM without `text_model.`", "SD", (as_transformers(LDM, bare=True),)),
    ("SD 2.x, OpenCLIP with its last layer", "SD", (as_open_clip(SD_2, more=1),)),
    ("float8 with scales", "SD", (in_8_bits,)),
)


@pytest.fixture(scope="module", params=["SDXL", "SD"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = save_sdxl if request.param == "SDXL" else save_sd
    return save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


def make_file(layout: Any, folder: Path) -> tuple[Path, Path]:
    """A tiny checkpoint, and its text encoders in one file of a layout."""
    _, family, changes = layout
    model = {"SDXL": save_sdxl, "SD": save_sd}[family](folder / "model")
    # What tools write beside weights, which is computed or of no use here.
    tensors: Tensors = {"scaled_fp8": torch.zeros(2), "model.diffusion_model.x": torch.zeros(1)}
    for name, change in zip(ENCODERS, changes, strict=False):
        changed = change(load_file(model / name / "model.safetensors"))
        prefix = next(iter(changed)).partition("text_model")[0]
        tensors |= changed | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)}
    file = folder / "model.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
    return model, file


def weights_in(pipeline: Any, name: str) -> Tensors:
    return {
        key.removeprefix("text_model."): tensor.detach()
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def open_model(model: Path, **settings: str) -> Checkpoint:
    return open_checkpoint(
        ModelSettings.model_validate({"model_id": str(model), **settings}), loaded_for(EMBEDDINGS)
    )


def encode(pipeline: Any, prompt: str = "a large red star") -> list[torch.Tensor]:
    with torch.no_grad():
        embeds = pipeline.encode_prompt(
            prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt="blurry",
        )
    return list(embeds)


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_it_encodes_as_diffusers_own_pipeline(model: Path, form: str, tmp_path: Path) -> None:
    """The same bits, and nothing else of the checkpoint loaded."""
    expected = DiffusionPipeline.from_pretrained(model)
    checkpoint = open_model(model)
    if form == "file":
        file = str(save_original(model, tmp_path / "model.safetensors"))
        configs = str(tmp_path / "configs")
        shutil.copytree(model, configs, ignore=shutil.ignore_patterns("*.safetensors"))
        expected = type(expected).from_single_file(file, config=configs, local_files_only=True)
        checkpoint = open_model(Path(file), single_file_config=configs)
    import_text_classes(checkpoint)
    pipeline = load_text_pipeline(checkpoint, torch.float32)
    assert type(pipeline) is type(expected)
    assert equal(encode(pipeline), encode(expected))
    loaded = {name for name, part in pipeline.components.items() if part is not None}
    assert loaded == set(checkpoint.components_for(EMBEDDINGS))
    shared = {"force_zeros_for_empty_prompt", "requires_safety_checker"} & expected.config.keys()
    assert shared
    assert all(pipeline.config[name] == expected.config[name] for name in shared)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_every_layout_gives_the_text_encoders_own_weights(
    layout: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = make_file(layout, tmp_path)
    expected = load_text_pipeline(open_model(model), torch.float32)
    capsys.readouterr()
    found = load_text_pipeline(open_model(file, single_file_config=str(model)), torch.float32)
    for name in ENCODERS[: len(layout[2])]:
        own = weights_in(expected, name)
        for key, tensor in weights_in(found, name).items():
            if "float8" in layout[0] and tensor.ndim > 1:
                most = own[key].abs().max().item()
                torch.testing.assert_close(tensor, own[key], rtol=0.1, atol=0.1 * most)
                assert not torch.equal(tensor, own[key])
            else:
                assert torch.equal(tensor, own[key]), key
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
@pytest.mark.parametrize("way", ["dropped", "renamed", "shortened", "added", "retyped"])
def test_one_tensor_that_is_not_as_it_was_is_named(
    layout: Any, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = make_file(layout, tmp_path)
    tensors = load_file(file)
    layer = ("layers.0.", "resblocks.0.")
    inner = sorted(n for n in tensors if any(part in n for part in layer) and "scale_" not in n)
    told = name = inner[sum(map(ord, layout[0] + way)) % len(inner)]
    tensor = tensors.pop(name)
    if way == "renamed":
        tensors[f"{name}x"] = tensor
    elif way == "shortened":
        tensors[name] = tensor[:-1].clone()
    elif way == "added":
        told = f"{name.rpartition('.')[0]}.other"
        tensors |= {name: tensor, told: tensor.clone()}
    elif way == "retyped":
        tensors[name] = tensor.to(torch.int8)
    save_file(tensors, file)
    with refusal(BadInputFileError, told):
        load_text_pipeline(open_model(file, single_file_config=str(model)), torch.float32)


def test_further_layers_of_a_text_encoder_are_named(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config that takes fewer layers than there are, as some skip them; diffusers is silent."""
    model = Path(shutil.copytree(sdxl, tmp_path / "model"))
    config = model / "text_encoder" / "config.json"
    layers = json.loads(config.read_text())["num_hidden_layers"]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    pipeline = load_text_pipeline(open_model(model), torch.float32)
    assert len(pipeline.text_encoder.encoder.layers) == 1 < layers
    said = capsys.readouterr().err
    assert "text_encoder: not used: " in said and f"encoder.layers.{layers - 1}." in said


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model, file = make_file(LAYOUTS[-1], tmp_path)
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.scale_weight"))
    save_file(tensors | {name: torch.ones(7)}, file)
    with refusal(BadInputFileError, f"{name} has 7 scales for the", "get the file in float16"):
        load_text_pipeline(open_model(file, single_file_config=str(model)), torch.float32)


def test_a_text_encoder_without_all_of_its_weights_is_refused(sdxl: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sdxl, tmp_path / "model"))
    file = model / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with refusal(
        BadInputFileError, "lacks 1 weight(s) of the second text encoder: text_projection.weight"
    ):
        load_text_pipeline(open_model(model), torch.float32)


def test_what_is_kept_is_kept_by_its_content(sdxl: Path, tmp_path: Path) -> None:
    """The same content under another name is no other pipeline; any other content is."""
    kept = Kept(most_models=100)
    moved = shutil.copytree(sdxl, tmp_path / "moved")
    lora, token = tmp_path / "lora.safetensors", tmp_path / "cat.safetensors"
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    torch.manual_seed(0)
    matrices = {f"{layer}.lora_A.weight": (2, 32), f"{layer}.lora_B.weight": (32, 2)}
    save_file({name: torch.randn(shape) for name, shape in matrices.items()}, lora)
    of_unet = tmp_path / "unet.safetensors"
    save_file({"unet.mid_block.to_q.lora_A.weight": torch.zeros(2, 32)}, of_unet)
    save_file({"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 48)}, token)
    shutil.copy(lora, tmp_path / "same.safetensors")

    def open_with(
        model: Path = sdxl, dtype: str = "float32", loras: Any = (), embeddings: Any = ()
    ) -> Any:
        given = [LoraFile.model_validate(str(text)) for text in loras]
        tokens = [TokenFile.model_validate(str(text)) for text in embeddings]
        return open_text_pipeline(kept, open_model(model), dtype, given, tokens)

    plain = open_with()
    assert open_with(moved) is plain
    assert open_with(loras=[of_unet]) is plain  # it changes no text encoder
    with_lora = open_with(loras=[f"{lora}:0.5"])
    assert open_with(loras=[f"{tmp_path / 'same.safetensors'}:0.5"]) is with_lora
    with_token = open_with(embeddings=[f"{token}:<cat>"])
    others = [
        with_lora,
        with_token,
        open_with(dtype="bfloat16"),
        open_with(loras=[lora]),
        open_with(loras=[f"{lora}:0.5", lora]),
        open_with(embeddings=[f"{token}:<dog>"]),
    ]
    assert len({id(pipeline) for pipeline in [plain, *others]}) == 1 + len(others)

    # Each is what was asked for, and left the others as they were
    assert others[2].text_encoder.dtype == torch.bfloat16
    expected = DiffusionPipeline.from_pretrained(sdxl)
    assert equal(encode(plain), encode(expected))
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        expected.load_textual_inversion(
            load_file(token)[name],
            token="<cat>",
            tokenizer=getattr(expected, f"tokenizer{number}"),
            text_encoder=getattr(expected, f"text_encoder{number}"),
        )
    assert equal(encode(with_token, "a <cat>"), encode(expected, "a <cat>"))
    assert not equal(encode(with_token, "a <cat>"), encode(plain, "a <cat>"))
    weights = with_lora.text_encoder.state_dict(), plain.text_encoder.state_dict()
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert len(changed) == 1 and next(iter(changed)).endswith("layers.0.self_attn.q_proj.weight")

    # What nothing is added to is there once
    own = plain.text_encoder.get_parameter
    for pipeline, apart in (
        (with_lora, changed),
        (with_token, {"embeddings.token_embedding.weight"}),
    ):
        weights_of_its_own = {
            name
            for name, weight in pipeline.text_encoder.named_parameters()
            if weight.data_ptr() != own(name).data_ptr()
        }
        assert weights_of_its_own == apart


def test_a_token_takes_no_row_of_another_pipeline(sdxl: Path, tmp_path: Path) -> None:
    """Where a checkpoint's embeddings have rows to spare, adding one makes them no larger."""
    model, token = Path(shutil.copytree(sdxl, tmp_path / "model")), tmp_path / "cat.safetensors"
    for name in ("text_encoder", "text_encoder_2"):
        config = model / name / "config.json"
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"vocab_size": values["vocab_size"] + 1}))
        file = model / name / "model.safetensors"
        tensors = load_file(file)
        (key,) = (key for key in tensors if key.endswith("token_embedding.weight"))
        tensors[key] = torch.cat([tensors[key], torch.zeros_like(tensors[key][:1])])
        save_file(tensors, file, {"format": "pt"})
    torch.manual_seed(1)
    save_file({"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 48)}, token)
    kept, tokens = Kept(), [TokenFile.model_validate(f"{token}:<cat>")]
    plain = open_text_pipeline(kept, open_model(model), "float32", (), ())
    before = plain.text_encoder.get_input_embeddings().weight.clone()
    taught = open_text_pipeline(kept, open_model(model), "float32", (), tokens)
    own = taught.text_encoder.get_input_embeddings().weight
    assert own.shape == before.shape and torch.equal(own[-1], load_file(token)["clip_l"][0])
    assert torch.equal(plain.text_encoder.get_input_embeddings().weight, before)


def test_weights_that_change_under_the_same_path_are_read_anew(sdxl: Path, tmp_path: Path) -> None:
    kept, model = Kept(), Path(shutil.copytree(sdxl, tmp_path / "model"))
    before = open_text_pipeline(kept, open_model(model), "float32", (), ())
    file = model / "text_encoder" / "model.safetensors"
    save_file({n: 2 * t for n, t in load_file(file).items()}, file, {"format": "pt"})
    after = open_text_pipeline(kept, open_model(model), "float32", (), ())
    assert after is not before
    assert not equal(encode(after), encode(before))


def test_a_damaged_embedding_names_the_mend(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"none")
    with refusal(BadInputFileError, f"--embedding {file} is damaged", "get it again"):
        call(1, "--output_dir", tmp_path / "run", "--embedding", file)
