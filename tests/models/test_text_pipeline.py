"""diffusers' pipeline with the text parts alone, as diffusers loads it; kept by its content."""

import shutil
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
from tests.original_layout import save_original
from tests.refusals import call, refusal
from tests.tiny_checkpoints import save_sd, save_sdxl

ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=["SDXL", "SD"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = save_sdxl if request.param == "SDXL" else save_sd
    return save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


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


def test_a_text_encoder_without_all_of_its_weights_is_refused(sdxl: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sdxl, tmp_path / "model"))
    file = model / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadInputFileError, match="1 weights are missing, such as text_projection"):
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
