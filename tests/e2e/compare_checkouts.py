"""Do two checkouts of this project make the same bits? Embeddings, latents and pixels of 12 runs.

    python tests/e2e/compare_checkouts.py BEFORE AFTER

Each runs its own scripts with its own `.venv`, stage by stage, into folders of its own. Then the
tensors' bytes and the decoded pixels are compared, whatever their files say of themselves. At the
end stage 2 of AFTER is given a run directory of BEFORE, and must end as CODE says if that is given:

    python tests/e2e/compare_checkouts.py BEFORE AFTER --older_ends_with 3
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

PROJECT_DIR = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT_DIR))

from tests.tiny_checkpoints import save_sd, save_sdxl

SCRIPTS = ("stage1_text_encoder.py", "stage2_unet.py", "stage3_vae_decoder.py")
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
SMALL = "--height 64 --width 64 --num_inference_steps 4"


def save_lora(folder: Path, file: Path) -> None:
    """A LoRA for the UNet and the first text encoder of a tiny checkpoint, in diffusers' layout."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for part, targets in (("unet", ("to_q", "to_v")), ("text_encoder", ("q_proj", "v_proj"))):
        weights = {}
        for path in (folder / part).glob("*.safetensors"):
            weights |= load_file(path)
        for name, weight in weights.items():
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer.rsplit(".", 1)[-1] in targets:
                rows, columns = weight.shape
                down = torch.randn(4, columns, generator=generator)
                up = torch.randn(rows, 4, generator=generator)
                tensors[f"{part}.{layer}.lora_A.weight"] = down * 0.1
                tensors[f"{part}.{layer}.lora_B.weight"] = up * 0.1
    save_file(tensors, file)


def make_files(folder: Path) -> dict[str, Path]:
    """Tiny checkpoints of both families, a LoRA, a textual inversion."""
    torch.manual_seed(0)
    files = {
        "sdxl": save_sdxl(folder / "sdxl"),
        "sd": save_sd(folder / "sd"),
        "sd_v": save_sd(folder / "sd_v", prediction_type="v_prediction"),
        "lora": folder / "lora.safetensors",
        "embedding": folder / "red.safetensors",
    }
    save_lora(files["sdxl"], files["lora"])
    vectors = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(vectors, files["embedding"])
    return files


def runs_of(files: dict[str, Path]) -> dict[str, dict[Any, str]]:
    """Name → the flags of each stage, and whether a CPU is to show eight devices."""
    sdxl, sd, sd_v = (f"--model_id {files[name]} {SMALL} " for name in ("sdxl", "sd", "sd_v"))
    return {
        "SDXL, demo": {1: "--num_inference_steps 6"},
        "SDXL, guidance off, heun": {1: f"{sdxl} --guidance_scale 1 --scheduler heun"},
        "SDXL, batch in groups, euler_a": {
            1: f"{sdxl} --prompt 'a star' --prompt 'a ring' --scheduler euler_a "
            "--num_images_per_prompt 2",
            2: "--batch_size 3",
        },
        "SDXL, interval and rescale": {
            1: f"{sdxl} --guidance_rescale 0.7 --guidance_start 0.3 --guidance_end 0.8"
        },
        "SDXL, mesh data=2,cfg=2,rows=2": {
            1: f"{sdxl} --num_images_per_prompt 2 --scheduler dpmpp_2m_sde",
            2: "--mesh data=2,cfg=2,rows=2",
            3: "--mesh data=2,rows=2",
            "eight": "devices",
        },
        "SDXL, LoRA": {1: f"{sdxl} --lora {files['lora']}:0.7"},
        "SDXL, embedding, sizes": {
            1: f"{sdxl} --embedding {files['embedding']}:red --prompt 'a red star' --clip_skip 1 "
            "--original_size 128,96 --negative_original_size 32,32 --negative_target_size 64,64",
        },
        "SDXL, torch, LoRA": {
            1: f"{sdxl} --lora {files['lora']} --scheduler dpmpp_2m_karras",
            2: "--backend torch",
            3: "--backend torch",
        },
        "SDXL, bfloat16": {
            1: f"{sdxl} --unet_dtype bfloat16 --num_images_per_prompt 2",
            2: "--backend jax",
            3: "--backend jax --vae_dtype bfloat16",
        },
        "SD, PNDM, long prompt": {1: f"{sd} --long_prompts chunk --prompt '{'a red star ' * 40}'"},
        "SD 2, v_prediction, DDIM, trajectory": {
            1: f"{sd_v} --eta 0.5 --scheduler ddim",
            2: "--save_trajectory 2",
        },
        "SD 2, torch, tiles, a scheduler on the host": {
            1: f"{sd_v} --height 128 --width 96 --tile --image_format webp "
            "--scheduler_option thresholding=true",
            2: "--backend torch",
        },
    }


def run(checkout: Path, number: int, flags: list[str], environment: dict[str, str]) -> Any:
    """Run one stage's script of a checkout."""
    python = checkout / ".venv" / "bin" / "python"
    script = checkout / "stages" / SCRIPTS[number - 1]
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [python, script, *flags],
        capture_output=True,
        text=True,
        env=variables | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=checkout,
    )


def contents(folder: Path) -> dict[str, Any]:
    """File and tensor → values; picture → pixels."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                found[f"{path.name}:{name}"] = tensor.contiguous().view(torch.uint8).numpy()
        elif path.name.startswith("output_"):
            with Image.open(path) as image:
                found[path.name] = np.asarray(image)
    return found


def main() -> int:
    """Compare two checkouts. Ends with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--older_ends_with", type=int, default=None)
    asked = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for index, (name, flags) in enumerate(runs_of(make_files(folder)).items(), 1):
            made = []
            for checkout in (asked.before.resolve(), asked.after.resolve()):
                run_dir = folder / f"{index}_{checkout.name}_{len(made)}"
                for number in range(1, len(SCRIPTS) + 1):
                    own = [*shlex.split(flags.get(number, "")), "--output_dir", str(run_dir)]
                    result = run(checkout, number, own, EIGHT if "eight" in flags else {})
                    if result.returncode != 0:
                        print(f"{checkout}: {name}, stage {number}: {result.stderr}")
                made.append((run_dir, contents(run_dir)))
            (first_dir, first), (_, second) = made
            same = first.keys() == second.keys() and len(first) >= 4
            different = [
                k for k in first if k in second and not np.array_equal(first[k], second[k])
            ]
            good = same and not different
            bad += not good
            what = (
                f"{len(first)} tensors and pictures with the same bits"
                if good
                else (f"DIFFERENT: {', '.join(different) or sorted(first.keys() ^ second.keys())}")
            )
            print(f"{index:2} {name}: {what}", flush=True)
            if index == 1 and asked.older_ends_with is not None:
                result = run(asked.after.resolve(), 2, ["--output_dir", str(first_dir)], {})
                print(f"   stage 2 on the older folder: {result.returncode}, {result.stderr}")
                bad += result.returncode != asked.older_ends_with
    print(f"{bad} of the comparisons failed" if bad else "all are the same")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
