"""Full-size SDXL on one GPU: ours beside diffusers in PyTorch, with random weights.

    python benchmarks/gpu_sdxl.py --json gpu.json
    python benchmarks/gpu_sdxl.py --tiny --peer "diffusers eager" --peer "ours, jax"

Needs no download: modules are made from models/sdxl_base, and the same weights are computed on the
device by every peer, from their names. Each peer is a process of its own, which runs when it is
asked to, so that the runs of all are interleaved. The loop over the UNet's steps and the VAE's
decoding are timed apart, each until the device is done. Prints medians, their ratio to the fastest
of PyTorch, the share of the card's peak, memory, and the differences from the first peer's results.

Without a network: `pip download -d wheels '.[gpu]'` where there is one, for the other machine's
Python; there `pip install --no-index --find-links wheels '.[gpu]'`.
"""

import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import numpy as np
import typer
from pydantic import BaseModel
from tqdm import tqdm

from benchmarks.peer_process import (
    LoopClock,
    PeerProcess,
    Repeat,
    Worker,
    WorkersFolder,
    answer_requests,
    compare_results,
    peer_flag,
    refuse_unknown,
    result_file,
)
from common.models.library_imports import quiet_libraries

SDXL = PROJECT_DIR / "models" / "sdxl_base"
GUIDANCE_SCALE = 5.0
TINY_UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 64,
    "norm_num_groups": 16,
}
TINY_VAE = {"block_out_channels": (32, 32, 32, 32), "norm_num_groups": 16}


class Models(BaseModel):
    """The models that every peer computes with."""

    tiny: bool
    dtype: str

    @property
    def size(self) -> int:
        """Pixels a side."""
        return 128 if self.tiny else 1024


# --- the same numbers in every framework ---------------------------------------------------------

MULTIPLIER, INCREMENT, BITS = 1_103_515_245, 12_345, 24


def seed_of(name: str) -> int:
    """A number that stands for a name."""
    return zlib.crc32(name.encode())


def spread_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Middle and half-width of the even distribution that a weight is drawn from.

    Norms begin as they do in training; the others keep the size of what passes through them.
    """
    if len(shape) == 1:
        return (1.0 if "norm" in name and name.endswith("weight") else 0.0), 0.02
    fan_in = int(np.prod(shape[1:]))
    return 0.0, (3.0 / fan_in) ** 0.5


def numbers_in_torch(name: str, shape: tuple[int, ...], device: Any) -> Any:
    """Numbers [*shape] float32 by a name: two rounds of a congruential generator on the index."""
    import torch

    middle, width = spread_of(name, shape)
    x = torch.arange(int(np.prod(shape)), dtype=torch.int64, device=device)
    for _ in range(2):
        x = (x + seed_of(name)) * MULTIPLIER + INCREMENT & 0xFFFFFFFF
        x = x ^ (x >> 15)
    uniform = (x >> (32 - BITS)).to(torch.float32) * 2.0**-BITS * 2 - 1
    return (middle + width * uniform).reshape(shape)


def numbers_in_jax(name: str, shape: tuple[int, ...]) -> Any:
    """The same by jax, bit for bit."""
    import jax.numpy as jnp

    middle, width = spread_of(name, shape)
    x = jnp.arange(int(np.prod(shape)), dtype=jnp.uint32)
    for _ in range(2):
        x = (x + jnp.uint32(seed_of(name))) * jnp.uint32(MULTIPLIER) + jnp.uint32(INCREMENT)
        x = x ^ (x >> 15)
    uniform = (x >> (32 - BITS)).astype(jnp.float32) * 2.0**-BITS * 2 - 1
    return (middle + width * uniform).reshape(shape)


def make_module(name: str, models: Models) -> Any:
    """diffusers' UNet ("unet") or VAE ("vae") without weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name]
    changes = {"unet": TINY_UNET, "vae": TINY_VAE}[name] if models.tiny else {}
    if name == "unet" and models.tiny:
        # The time ids' six embeddings and the pooled prompt.
        changes = changes | {"projection_class_embeddings_input_dim": 6 * 256 + 1280}
    with torch.device("meta"):
        module = kind.from_config(kind.load_config(SDXL / name), **changes)
    return module.to(getattr(torch, models.dtype)).eval().requires_grad_(False)


def weights_on(module: Any, prefix: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """A module's weights: each one's name, the name that its numbers come from, and its shape."""
    for name, weight in module.named_parameters():
        yield name, f"{prefix}.{name}", tuple(weight.shape)


def embeddings(batch: int, width: int, device: Any) -> dict[str, Any]:
    """Stage 1's tensors by their numbers."""
    shapes = {"prompt_embeds": (batch, 77, width), "pooled_prompt_embeds": (batch, 1280)}
    return {
        f"{sign}{name}": numbers_in_torch(f"{sign}{name}", shape, device)
        for name, shape in shapes.items()
        for sign in ("", "negative_")
    }


# --- the peers -----------------------------------------------------------------------------------


class Peer(ABC):
    """A way of denoising and decoding; its models are loaded when it is made."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.clock, self.decode_clock = LoopClock(), LoopClock()

    @abstractmethod
    def denoise(self, batch: int, steps: int) -> np.ndarray:
        """Latents [B, C, h, w] float32; the loop by the clock."""

    @abstractmethod
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures [B, H, W, 3] uint8 of latents; all by the clock."""

    @abstractmethod
    def peak_bytes(self) -> int | None:
        """The most that the device held; None where it is not known."""


class Diffusers(Peer):
    """diffusers' pipeline as it is: PyTorch's eager mode, scaled_dot_product_attention."""

    channels_last = False
    compile_mode: str | None = None

    def __init__(self, models: Models) -> None:
        super().__init__(models)
        import torch
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = {name: self.load(name) for name in ("unet", "vae")}
        without = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        self.pipeline = StableDiffusionXLPipeline(
            **loaded,
            scheduler=EulerDiscreteScheduler.from_pretrained(SDXL, subfolder="scheduler"),
            add_watermarker=False,
            **without,
        )
        self.clock, self.decode_clock = LoopClock(self.finish), LoopClock(self.finish)
        self.clock.watch(self.pipeline)
        if self.compile_mode is not None:
            # A program for each batch size, as ours: not one for any after the first.
            mode: dict[str, Any] = {"mode": self.compile_mode, "fullgraph": True, "dynamic": False}
            self.pipeline.unet = torch.compile(self.pipeline.unet, **mode)
            self.pipeline.vae.decode = torch.compile(self.pipeline.vae.decode, **mode)

    def load(self, name: str) -> Any:
        """A model with its numbers on the device."""
        import torch

        model = make_module(name, self.models).to_empty(device=self.device)
        for own, source, shape in weights_on(model, name):
            numbers = numbers_in_torch(source, shape, self.device)
            model.get_parameter(own).data.copy_(numbers)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def finish(self) -> None:
        """Wait for the device."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def denoise(self, batch: int, steps: int) -> np.ndarray:
        import torch

        width, dtype = self.pipeline.unet.config.cross_attention_dim, self.models.dtype
        given = embeddings(batch, width, self.device)
        # Of float32 whatever the models compute in: PyTorch's numbers differ from dtype to dtype.
        shape = (1, self.pipeline.unet.config.in_channels, *2 * [self.models.size // 8])
        noises = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for seed in range(batch)
        ]
        made = self.pipeline(
            **{name: tensor.to(getattr(torch, dtype)) for name, tensor in given.items()},
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            height=self.models.size,
            width=self.models.size,
            latents=torch.cat(noises).to(self.device, getattr(torch, dtype)),
            output_type="latent",
        ).images
        return np.asarray(made.float().cpu().numpy())

    def decode(self, latents: np.ndarray) -> np.ndarray:
        import torch

        vae = self.pipeline.vae
        with torch.no_grad(), self.decode_clock.running():
            given = torch.from_numpy(latents).to(self.device, vae.dtype)
            images = vae.decode(given / vae.config.scaling_factor, return_dict=False)[0]
            pixels = (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
            return np.asarray(pixels.permute(0, 2, 3, 1).cpu().numpy())

    def peak_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


class ChannelsLast(Diffusers):
    """The same with weights and activations in channels_last."""

    channels_last = True


class ReduceOverhead(Diffusers):
    """The same under `torch.compile(mode="reduce-overhead", fullgraph=True)`, UNet and VAE."""

    channels_last = True
    compile_mode = "reduce-overhead"


class MaxAutotune(Diffusers):
    """The same under `torch.compile(mode="max-autotune", fullgraph=True)`, UNet and VAE."""

    channels_last = True
    compile_mode = "max-autotune"


class Ours(Peer):
    """Stages 2 and 3 by jax."""

    def __init__(self, models: Models) -> None:
        super().__init__(models)
        from common.compute import sharding
        from common.compute.clock import StageReport
        from common.compute.devices import Devices, ModelOnDevices
        from common.compute.jax_start import set_up_jax
        from common.compute.options import RunOptions
        from common.sampling.jax_denoiser import JaxDenoiser
        from common.vae.decoder import Decoder
        from common.vae.jax_runner import JaxRunner

        set_up_jax()
        devices = Devices.present()
        mesh = sharding.make_mesh(sharding.SINGLE, devices.devices)
        options = RunOptions(mesh="single")
        unet, vae = (make_module(name, models) for name in ("unet", "vae"))
        where: dict[str, Any] = {"mesh": mesh, "devices": devices, "operations": options.operations}
        unet_there = ModelOnDevices(module=unet, parameters=self.load("unet", unet), **where)
        vae_there = ModelOnDevices(module=vae, parameters=self.load("vae", vae), **where)
        self.denoiser = JaxDenoiser(unet_there, options, StageReport(2), {})
        self.decoder = Decoder(JaxRunner(vae_there, StageReport(3), {}), None)

    def load(self, prefix: str, module: Any) -> dict[str, Any]:
        """A model's numbers on the device."""
        import jax

        from common.compute.fast_ops import arrange_weight

        parameters = {}
        for name, source, shape in weights_on(module, prefix):
            weight = numbers_in_jax(source, shape).astype(self.models.dtype)
            parameters[name] = arrange_weight(
                name, weight, operations="fast", platform=jax.default_backend()
            )
        return dict(jax.block_until_ready(parameters))

    def denoise(self, batch: int, steps: int) -> np.ndarray:
        from diffusers import EulerDiscreteScheduler

        from common.conditions.prompt_condition import PromptCondition
        from common.conditions.sizes import SizeCondition
        from common.sampling.guidance import Guidance
        from common.sampling.job import DenoisingJob
        from common.sampling.sampler import Sampler
        from common.sampling.scheduler_tables import make_tables
        from common.sampling.share import Share

        denoiser, size = self.denoiser, self.models.size
        config = denoiser.unet.config
        scheduler = EulerDiscreteScheduler.from_pretrained(SDXL, subfolder="scheduler")
        sampler = Sampler(
            scheduler, num_inference_steps=steps, timesteps=None, sigmas=None, eta=0.0
        )
        ids = [size, size, 0, 0, size, size]
        job = DenoisingJob(
            embeddings=embeddings(batch, config.cross_attention_dim, "cpu"),
            prompt_of=np.arange(batch),
            seeds=list(range(batch)),
            latent_shape=(config.in_channels, size // 8, size // 8),
            sampler=sampler,
            guidance=Guidance(scale=GUIDANCE_SCALE),
            conditions=(
                PromptCondition(),
                SizeCondition({"time_ids": ids, "negative_time_ids": ids}),
            ),
        )
        denoiser.start(Share(job, np.arange(batch), make_tables(sampler)))
        denoiser.compile()
        with self.clock.running():
            for _ in denoiser.run():  # yields when the devices are done
                pass
        return denoiser.latents()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        with self.decode_clock.running():
            return self.decoder.decode(latents)[0]

    def peak_bytes(self) -> int | None:
        return self.denoiser.facts()["peak_device_bytes"] or None


PEERS: dict[str, type[Peer]] = {
    "diffusers eager": Diffusers,
    "diffusers channels_last": ChannelsLast,
    "diffusers reduce-overhead": ReduceOverhead,
    "diffusers max-autotune": MaxAutotune,
    "ours, jax": Ours,
}


# --- one peer's process --------------------------------------------------------------------------


def work(name: str, folder: Path) -> None:
    """Load a peer, then answer each request with a case's seconds and the memory."""

    def make() -> Any:
        quiet_libraries()
        # jax would take most of the device's memory at once, and the peers share it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        peer = PEERS[name](Models.model_validate_json((folder / "models.json").read_text()))

        def answer(batch: int, steps: int, keep: bool = False) -> dict[str, Any]:
            latents = peer.denoise(batch, steps)
            # Every peer decodes the same, so that their pictures can be compared.
            shown = numbers_in_torch("latents", latents.shape, "cpu").numpy()
            pictures = peer.decode(shown)
            if keep:
                np.savez(result_file(folder, name), latents=latents, pictures=pictures)
            return {
                "loop": peer.clock.seconds,
                "decode": peer.decode_clock.seconds,
                "peak_bytes": peer.peak_bytes(),
            }

        return answer

    answer_requests(make)


def flops_of_a_step(models: Models, batch: int) -> float:
    """Of one guided model evaluation, by torch's count on its meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    unet = make_module("unet", models)
    dtype, rows, side = getattr(torch, models.dtype), 2 * batch, models.size // 8
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet(
            torch.empty(rows, unet.config.in_channels, side, side, dtype=dtype),
            torch.empty(()),
            encoder_hidden_states=torch.empty(rows, 77, unet.config.cross_attention_dim).to(dtype),
            added_cond_kwargs={
                "text_embeds": torch.empty(rows, 1280, dtype=dtype),
                "time_ids": torch.empty(rows, 6, dtype=dtype),
            },
        )
    return float(counter.get_total_flops())


def measure(workers: list[PeerProcess], batch: int, steps: int, repeat: int) -> dict[str, Any]:
    """Let all peers run one case, interleaved. Returns what each measured."""
    found: dict[str, Any] = {}
    for each in tqdm(workers, desc="compile and warm up"):
        began = time.perf_counter()
        for keep in (True, False):
            each.ask(batch=batch, steps=steps, keep=keep)
        found[each.name] = {"ready": time.perf_counter() - began, "runs": []}
    for _ in tqdm(range(repeat), desc=f"batch {batch}, {steps} steps"):
        for each in workers:
            found[each.name]["runs"].append(each.ask(batch=batch, steps=steps))
    for each in workers:
        latents, pictures = compare_results(each.result, workers[0].result)
        assert pictures is not None
        found[each.name] |= {"latents_differ": latents, "pictures_differ": float(pictures.mean())}
    return found


def lines_of(
    found: dict[str, Any], models: Models, batch: int, steps: int, peak: float | None
) -> list[str]:
    """A case's results as a table in Markdown."""
    flops = flops_of_a_step(models, batch)

    def median(name: str, part: str) -> float:
        return statistics.median(run[part] for run in found[name]["runs"])

    def fastest(part: str) -> float:
        peers = [name for name in found if name.startswith("diffusers")]
        return min((median(name, part) for name in peers), default=np.nan)

    lines = [
        f"Batch {batch}, {steps} steps, {models.size}², {models.dtype}, {flops / 1e12:.3g} TFLOP a "
        "step; ratios to the fastest of PyTorch:",
        "",
        "| | a step | ratio | of peak | VAE | ratio | device memory so far | first two runs "
        "| latents differ | pictures differ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        step, decoded = median(name, "loop") / steps, median(name, "decode")
        share = "" if peak is None else f"{flops / step / peak:.0%}"
        peak_bytes = own["runs"][-1]["peak_bytes"]
        memory = "" if peak_bytes is None else f"{peak_bytes / 1e9:.1f} GB"
        lines.append(
            f"| {name} | {1e3 * step:.2f} ms | {step * steps / fastest('loop'):.2f} | {share} "
            f"| {1e3 * decoded:.1f} ms | {decoded / fastest('decode'):.2f} | {memory} "
            f"| {own['ready']:.0f} s | {own['latents_differ']:.1e} "
            f"| {own['pictures_differ']:.2f}/255 |"
        )
    return [*lines, ""]


def card() -> tuple[str, float | None]:
    """The GPU's name, and its peak in bfloat16 where it is known; of this machine without one."""
    import torch

    from common.compute.chips import PEAK_BFLOAT16

    if not torch.cuda.is_available():
        return f"no GPU, {os.cpu_count()} CPU cores", None
    name = torch.cuda.get_device_name()
    return name, PEAK_BFLOAT16.get(name)


def main(
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Pictures at once. [1, 4, 8]", min=1)
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option("--num_inference_steps", help="Steps. [20, 50]", min=1)
    ] = None,
    peer: Annotated[list[str] | None, peer_flag(PEERS)] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of UNet and VAE.")] = "bfloat16",
    repeat: Repeat = 7,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small models, for a trial.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write what was measured.")
    ] = None,
    worker: Worker = None,
    folder: WorkersFolder = None,
) -> None:
    """Print a table for each batch and number of steps."""
    if worker is not None and folder is not None:
        work(worker, folder)
        return
    refuse_unknown(peer or (), PEERS)
    quiet_libraries()
    models = Models(tiny=tiny, dtype=dtype)
    device, peak = card()
    print(f"{device}; medians of {repeat} interleaved runs after two.\n", flush=True)
    results = []
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        (folder / "models.json").write_text(models.model_dump_json())
        workers = [
            opened.enter_context(PeerProcess(Path(__file__), name, folder))
            for name in peer or PEERS
        ]
        for each in workers:  # one after the other; nothing of it counts as anybody's first runs
            each.wait_until_ready()
        for pictures in batch or [1, 4, 8]:
            for count in steps or [20, 50]:
                found = measure(workers, pictures, count, repeat)
                print("\n".join(lines_of(found, models, pictures, count, peak)), flush=True)
                case = {"device": device, "batch": pictures, "steps": count}
                results.append({**case, **models.model_dump(), "peers": found})
                if json_file is not None:  # after each, so that a stop loses nothing
                    json_file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
