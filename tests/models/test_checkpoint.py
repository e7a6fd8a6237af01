"""A checkpoint's files are found under the names that libraries give them, and count by content."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from common.declared import EMBEDDINGS, LATENTS
from common.errors import BadInputFileError, BadSettingError
from common.models.checkpoint import Checkpoint, Source, hash_large_file
from common.models.component_table import loaded_for
from tests.conftest import DEMO, Run, file_contents
from tests.refusals import DEEP, Error, call, expect, refusal

SD = {  # of a checkpoint with one text encoder
    "_class_name": "StableDiffusionPipeline",
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": [None, None],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def with_index(folder: Path, index: dict[str, object]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    return Checkpoint("m", folder)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_fingerprint_is_of_what_the_files_hold() -> None:
    folder = DEMO / "text_encoder"
    config = json.loads((folder / "config.json").read_text())
    for name in ("_name_or_path", "_diffusers_version", "transformers_version"):
        config.pop(name, None)
    lines = [
        f"config.json {sha256(json.dumps(config, sort_keys=True).encode())}\n",
        f"weights {sha256((folder / 'model.safetensors').read_bytes())}\n",
    ]
    found = Checkpoint("models/demo", DEMO).weights_fingerprint("text_encoder")
    assert found == sha256("".join(lines).encode())


def test_a_fingerprint_is_the_same_wherever_the_same_weights_stand(demo_copy: Path) -> None:
    demo, copied = Checkpoint("models/demo", DEMO), Checkpoint("copy", demo_copy)
    for name in ("unet", "scheduler", "tokenizer"):
        assert copied.weights_fingerprint(name) == demo.weights_fingerprint(name)
    renamed = demo_copy / "mine.safetensors"
    (demo_copy / "unet" / "diffusion_pytorch_model.safetensors").rename(renamed)
    replaced = Checkpoint(
        "c", demo_copy, replaced={"unet": Source("", demo_copy / "unet", renamed)}
    )
    assert replaced.weights_fingerprint("unet") == demo.weights_fingerprint("unet")
    with renamed.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert replaced.weights_fingerprint("unet") != demo.weights_fingerprint("unet")


def test_a_hash_is_remembered_as_long_as_the_file_seems_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    assert hash_large_file(path) == sha256(b"before")
    status = path.stat()
    path.write_bytes(b"behind")  # of the same length
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hash_large_file(path) == sha256(b"before")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert hash_large_file(path) == sha256(b"behind")
    (tmp_path / "cache" / "staged-diffusion" / "file_hashes.json").write_text("damaged")
    assert hash_large_file(path) == sha256(b"behind")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [False, True])
def test_the_weights_are_those_that_libraries_save(
    tmp_path: Path, variant: str | None, shards: bool
) -> None:
    """Whole and in shards, of a variant and not, beside files that are not read."""
    size = "100KB" if shards else "5GB"
    UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).save_pretrained(tmp_path / "unet", variant=variant, max_shard_size=size)
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, vocab_size=2000
    )
    CLIPTextModel(config).save_pretrained(
        tmp_path / "text_encoder", variant=variant, max_shard_size=size
    )
    checkpoint = Checkpoint("m", tmp_path, variant=variant)
    for name in ("unet", "text_encoder"):
        saved = {path.name for path in (tmp_path / name).iterdir()}
        assert (len(saved) > 3) == shards
        for other in ("diffusion_pytorch_model.bin", "model.onnx", "model.other.safetensors"):
            (tmp_path / name / other).write_bytes(b"")
        found = {path.name for path in checkpoint.files_read(name)}
        assert found == saved - {"generation_config.json"}


def test_what_a_checkpoint_has_is_what_it_lists_or_gets_from_elsewhere(tmp_path: Path) -> None:
    sd = with_index(tmp_path / "sd", SD)
    assert sd.components_for(EMBEDDINGS) == ["tokenizer", "text_encoder"]
    assert sd.components_for(LATENTS) == ["unet", "scheduler"]  # which no index need list
    sdxl = Checkpoint("models/demo", DEMO)
    assert sdxl.components_for(EMBEDDINGS) == list(loaded_for(EMBEDDINGS))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({}, None, ""),
        ({"text_encoder": [None, None]}, BadInputFileError, "lists no text_encoder: restore it"),
        ({"tokenizer": None}, BadInputFileError, "lists no tokenizer: restore it"),
        (
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            BadSettingError,
            "--model_id m: its text_encoder is a T5EncoderModel; supported in a "
            "StableDiffusionPipeline: CLIPTextModel",
        ),
        (
            {"safety_checker": ["their_code", "Checker"]},
            BadSettingError,
            "its safety_checker is a Checker of their_code; only code of diffusers, transformers",
        ),
        (
            {"_class_name": "FluxPipeline"},
            BadSettingError,
            "is a checkpoint for FluxPipeline; supported: StableDiffusionXLPipeline",
        ),
    ],
)
def test_only_what_a_stage_can_run_is_supported(
    tmp_path: Path, change: dict[str, object], error: type[Exception] | None, said: str
) -> None:
    checkpoint = with_index(tmp_path / "sd", SD | change)
    if error is None:
        checkpoint.check_supported(loaded_for(EMBEDDINGS))
        return
    with pytest.raises(error) as caught:
        checkpoint.check_supported(loaded_for(EMBEDDINGS))
    assert said in str(caught.value)


def test_sizes_follow_from_the_configs(tmp_path: Path) -> None:
    assert (Checkpoint("m", DEMO).vae_scale_factor, Checkpoint("m", DEMO).native_size) == (8, 128)
    for name in ("unet", "vae"):
        shutil.copytree(DEMO / name, tmp_path / name)
    vae = json.loads((tmp_path / "vae" / "config.json").read_text())
    vae["block_out_channels"] = vae["block_out_channels"][:3]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae))
    assert Checkpoint("m", tmp_path).vae_scale_factor == 4
    assert Checkpoint("m", tmp_path).native_size == 64


def removed(name: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        path = model / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / name).write_bytes(content)

    return write


def changed(name: str, **values: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | values))

    return change


@pytest.mark.parametrize(
    ("number", "damage", "error", "words"),
    [
        (1, removed("model_index.json"), BadInputFileError,
         ["model_index.json is missing", "in diffusers' layout"]),
        (1, removed("vae"), BadInputFileError, ["vae/config.json is missing"]),
        (2, removed("unet/config.json"), BadInputFileError, ["unet/config.json is missing"]),
        (2, removed("scheduler"), BadInputFileError, ["scheduler_config.json is missing"]),
        (2, written("unet/config.json", b"{"), BadInputFileError,
         ["unet/config.json is damaged: Expecting"]),
        (3, written("vae/config.json", b"\xff"), BadInputFileError,
         ["vae/config.json is damaged: line 1 is not UTF-8 text"]),
        (3, written("vae/config.json", DEEP.encode()), BadInputFileError,
         ["vae/config.json is damaged: it is nested too deeply"]),
        (3, written("vae/config.json", b"[1]"), BadInputFileError,
         ["vae/config.json is damaged: it is not a JSON object"]),
        (1, removed("tokenizer"), BadInputFileError,
         ["--model_id", "has no folder", "tokenizer", "restore it or choose another"]),
        (1, changed("model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
         BadSettingError, ["--model_id", "its text_encoder is a T5EncoderModel", "CLIPTextModel"]),
        (2, changed("unet/config.json", addition_embed_type="image"), BadSettingError,
         ["--model_id", "its UNet has addition_embed_type image", "supported: None, text_time"]),
        (2, changed("unet/config.json", encoder_hid_dim_type="text_proj"), BadSettingError,
         ["its UNet has encoder_hid_dim_type text_proj", "supported: None"]),
        (1, changed("unet/config.json", in_channels=5), BadSettingError,
         ["its UNet takes 5 channels and gives 4", "inpainting", "another checkpoint"]),
        (2, changed("unet/config.json", class_embed_type="timestep"), BadSettingError,
         ["its UNet has class_embed_type timestep", "supported: None"]),
        (1, changed("model_index.json", text_encoder="CLIPTextModel"), BadInputFileError,
         ["model_index.json cannot be used (text_encoder: give a library and a", "restore it"]),
        (1, changed("vae/config.json", block_out_channels=[]), BadInputFileError,
         ["vae/config.json cannot be used (block_out_channels: List should have", "restore it"]),
        (1, changed("unet/config.json", sample_size=None), BadInputFileError,
         ["unet/config.json cannot be used (sample_size: Input should be", "restore it"]),
        (1, changed("text_encoder/config.json", num_hidden_layers="x"), BadInputFileError,
         ["text_encoder/config.json cannot be used (num_hidden_layers: Input", "restore it"]),
        (2, changed("unet/config.json", addition_time_embed_dim=None), BadInputFileError,
         ["unet/config.json cannot be used", "text_time needs addition_time_embed_dim"]),
        (2, changed("unet/config.json", in_channels=0), BadInputFileError,
         ["unet/config.json cannot be used (in_channels: Input should be", "restore it"]),
        (2, changed("scheduler/scheduler_config.json", _class_name=None), BadInputFileError,
         ["scheduler_config.json cannot be used (_class_name: Input should be", "restore it"]),
        (3, changed("vae/config.json", scaling_factor="x"), BadInputFileError,
         "scaling_factor: Input should be a valid number"),
        (3, changed("vae/config.json", latent_channels=None), BadInputFileError,
         ["vae/config.json cannot be used (latent_channels: Input should be", "restore it"]),
        (1, written("tokenizer/tokenizer.json", b"{"), BadInputFileError,
         ["tokenizer cannot be loaded", "restore it, or choose another", "--model_id"]),
        (1, written("text_encoder/model.safetensors", b"none"), BadInputFileError,
         ["text_encoder/model.safetensors is damaged or cut short: get it again"]),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint(
    demo_copy: Path,
    run_dir: Path,
    number: int,
    damage: Callable[[Path], None],
    error: Error,
    words: list[str],
) -> None:
    damage(demo_copy)
    before = file_contents(run_dir)
    with refusal(error, str(demo_copy), *words):
        call(number, "--output_dir", run_dir, "--model_id", demo_copy)
    assert file_contents(run_dir) == before


def test_a_checkpoint_without_safetensors_exits_3(
    run_copy: Path, demo_copy: Path, stage: Run
) -> None:
    before = file_contents(run_copy)
    for number, component in ((1, "text_encoder_2"), (2, "unet"), (3, "vae")):
        for weights in (demo_copy / component).glob("*.safetensors"):
            weights.rename(weights.with_suffix(".bin"))
        result = stage(number, "--output_dir", run_copy, "--model_id", demo_copy)
        expect(result, 3, component, "safetensors")
    assert file_contents(run_copy) == before
