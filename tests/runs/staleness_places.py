"""The checkpoints and files that the tables of staleness name by relative paths."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from tests.conftest import DEMO
from tests.runs.staleness_table import JSON_CHANGES, REPOSITORY


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


def lay_out(root: Path) -> None:
    """Put everything that the tables name into a folder."""
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

    shutil.copytree(DEMO / "vae", root / "vae_of_another_scale")
    change_json(root / "vae_of_another_scale" / "config.json", {"scaling_factor": 0.5})

    for name, value in (("single", 1), ("single_renamed", 1), ("single_other", 2)):
        save_file({"weights": np.full(4, value, "float32")}, root / f"{name}.safetensors")
    for name, value in (("red", 1), ("red_copy", 1), ("blue", 2)):
        save_file({"emb": np.full((1, 4), value, "float32")}, root / f"{name}.safetensors")
    for name, value in (("latents", 1), ("same_latents", 1), ("other_latents", 2)):
        latents = {"latents": np.full((1, 4, 16, 16), value, "float32")}
        save_file(latents, root / f"{name}.safetensors")
    unet, text = "unet.mid_block.to_q", "text_encoder.layers.0.q_proj"
    save_lora(root / "lora_unet.safetensors", unet, value=1)
    save_lora(root / "lora_unet_copy.safetensors", unet, value=1)
    save_lora(root / "lora_unet_other.safetensors", unet, value=2)
    save_lora(root / "lora_text.safetensors", text, value=1)
    save_lora(root / "lora_text_other.safetensors", text, value=2)
    save_lora(root / "lora_both.safetensors", unet, text, value=1)
    (root / "prompts.txt").write_text("a green ring\n")
    for name, values in (("colors", "red\n"), ("colors_copy", "red\n"), ("others", "blue\n")):
        (root / name).mkdir()
        (root / name / "color.txt").write_text(values)

    grey = np.full((128, 128, 3), 90, np.uint8)
    for name, value in (("star", 90), ("star_copy", 90), ("other_star", 91)):
        Image.fromarray(np.full_like(grey, value)).save(root / f"{name}.png")
    for name, rows in (("mask", 64), ("other_mask", 32)):
        mask = np.zeros((128, 128), np.uint8)
        mask[:rows] = 255
        Image.fromarray(mask).save(root / f"{name}.png")
    clear = np.concatenate([grey, np.zeros_like(grey[..., :1])], 2)
    Image.fromarray(clear).save(root / "clear.png")

    put_into_hub(root / "hub", root / "same", "a" * 40, "main")
    put_into_hub(root / "hub", root / "same", "b" * 40, "retagged")
    put_into_hub(root / "hub", root / "other", "c" * 40, "other")
