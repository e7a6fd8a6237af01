"""Ours beside what people use now: same weights, prompts, seeds, scheduler, steps and size.

    python benchmarks/side_by_side.py --load demo --batch 1
    python benchmarks/side_by_side.py --load mid --dtype bfloat16

Each peer is a process of its own, which loads and warms up and then runs when it is asked to, so
that the runs of all are interleaved while the others wait. The denoising loop alone, all from the
embeddings to the latents (with tables, noise and transfers), and decoding, from the latents to
8-bit pictures, are timed apart. Prints medians, their ratio to diffusers in PyTorch's eager mode,
the difference from its results, and memory. `--checkout DIR` adds ours of another checkout of the
project, by its own benchmark, code and `.venv`.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
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
from common.compute.clock import peak_memory
from common.compute.profile_tables import lines_of
from common.models.library_imports import quiet_libraries

REFERENCE = "diffusers eager"
PARTS = {"loop": "denoising loop", "latents": "with preparation", "pictures": "decoding"}
GUIDANCE_SCALE = 7.5
PROMPT = "a large red star on a blue background"
NEGATIVE_PROMPT = "blurry, low quality, distorted, deformed"


class Workload(BaseModel):
    """What every peer computes."""

    folder: Path  # holds embeddings.safetensors, and each peer's results
    checkpoint: Path
    batch: int
    steps: int
    size: int  # pixels a side
    dtype: str  # of the UNet; the VAE decodes in float32, as its config asks
    decodes: bool  # whether decoding is measured as well

    @property
    def seeds(self) -> list[int]:
        """One for each picture."""
        return list(range(self.batch))

    def embeddings(self) -> dict[str, Any]:
        """Stage 1's tensors, [1, L, D] and [1, E], in the UNet's dtype."""
        import torch
        from safetensors.torch import load_file

        tensors = load_file(self.folder / "embeddings.safetensors")
        return {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in tensors.items()}


class Peer(ABC):
    """A way of denoising and decoding; its models are loaded when it is made."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.clock = LoopClock()

    @abstractmethod
    def denoise(self) -> Any:
        """The latents, [B, C, h, w]; the loop by the clock."""

    @abstractmethod
    def decode(self, latents: Any) -> np.ndarray:
        """The pictures of latents, [B, H, W, 3] uint8."""

    def flops(self) -> float | None:
        """Of all steps; None where they are not counted."""
        return None

    def to_numpy(self, latents: Any) -> np.ndarray:
        """Latents as float32 on the host."""
        return np.asarray(latents.float().numpy())


class Diffusers(Peer):
    """diffusers' own pipeline in PyTorch."""

    compiled = False

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        import torch

        self.pipeline = load_pipeline(workload)
        self.clock.watch(self.pipeline)
        if self.compiled:
            self.pipeline.unet = torch.compile(self.pipeline.unet)
            self.pipeline.vae.decode = torch.compile(self.pipeline.vae.decode)

    def denoise(self) -> Any:
        import torch

        work = self.workload
        embeddings = {
            name: tensor.expand(work.batch, *tensor.shape[1:])
            for name, tensor in work.embeddings().items()
        }
        return self.pipeline(
            **embeddings,
            num_inference_steps=work.steps,
            guidance_scale=GUIDANCE_SCALE,
            height=work.size,
            width=work.size,
            generator=[torch.Generator().manual_seed(seed) for seed in work.seeds],
            output_type="latent",
        ).images

    def decode(self, latents: Any) -> np.ndarray:
        import torch

        vae = self.pipeline.vae
        with torch.no_grad():
            images = vae.decode(latents.float() / vae.config.scaling_factor, return_dict=False)[0]
        return to_pixels(self.pipeline, images)


class CompiledDiffusers(Diffusers):
    """The same with `torch.compile` on the UNet and on the VAE's decoding."""

    compiled = True


class TorchaxPerStep(Peer):
    """diffusers' UNet under `torchax.compile`; the scheduler steps eagerly on the device."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        from common.compute.torchax_runtime import torchax  # importable only after its stand-ins

        self.pipeline = load_pipeline(workload)
        self.env = torchax.default_env()
        static = {"static_argnames": ("return_dict",)}
        with self.env:
            self.unet = torchax.compile(
                self.pipeline.unet.to("jax"), torchax.CompileOptions(jax_jit_kwargs=static)
            )
            self.vae = torchax.compile(
                self.pipeline.vae.to("jax"),
                torchax.CompileOptions(methods_to_compile=["decode"], jax_jit_kwargs=static),
            )

    def denoise(self) -> Any:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        work = self.workload
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        embeddings = work.embeddings()
        channels = self.pipeline.unet.config.in_channels
        generators = [torch.Generator().manual_seed(seed) for seed in work.seeds]
        factor = self.pipeline.vae_scale_factor
        shape = (1, channels, work.size // factor, work.size // factor)
        noise = [randn_tensor(shape, g, dtype=getattr(torch, work.dtype)) for g in generators]

        def both(name: str) -> Any:
            halves = [embeddings[f"negative_{name}"], embeddings[name]]
            return torch.cat([half.expand(work.batch, *half.shape[1:]) for half in halves])

        scheduler.set_timesteps(work.steps)
        latents = torch.cat(noise) * scheduler.init_noise_sigma
        size = (work.size, work.size)
        time_ids = torch.tensor([[*size, 0, 0, *size]]).to(latents.dtype)
        with self.env, torch.no_grad():
            prompt_embeds = both("prompt_embeds").to("jax")
            added = {
                "text_embeds": both("pooled_prompt_embeds").to("jax"),
                "time_ids": time_ids.expand(2 * work.batch, 6).contiguous().to("jax"),
            }
            latents = latents.to("jax")
            for name, value in vars(scheduler).items():
                if isinstance(value, torch.Tensor):
                    setattr(scheduler, name, value.to("jax"))
            with self.clock.running():
                for timestep in scheduler.timesteps:
                    doubled = torch.cat([latents] * 2)
                    scaled = scheduler.scale_model_input(doubled, timestep)
                    output = self.unet(
                        scaled.to(getattr(torch, work.dtype)),
                        timestep,
                        encoder_hidden_states=prompt_embeds,
                        added_cond_kwargs=added,
                        return_dict=False,
                    )[0]
                    negative, positive = output.chunk(2)
                    guided = negative + GUIDANCE_SCALE * (positive - negative)
                    latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
                made = latents.cpu()
            return made

    def decode(self, latents: Any) -> np.ndarray:
        import torch

        with self.env, torch.no_grad():
            scaled = (latents.float() / self.pipeline.vae.config.scaling_factor).to("jax")
            images = self.vae.decode(scaled, return_dict=False)[0].cpu()
        return to_pixels(self.pipeline, images)


class Ours(Peer):
    """Stages 2 and 3."""

    backend = "jax"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        from common.compute.backends import start_backend
        from common.compute.clock import StageReport
        from common.compute.kept import Kept
        from common.compute.options import RunOptions
        from common.models.find import open_checkpoint
        from common.runs.generation import GenerationConfig
        from common.sampling.loading import UNetToLoad, open_denoiser
        from common.vae.loading import VaeToLoad, open_decoder

        self.options = RunOptions(batch_size=workload.batch, backend=self.backend)
        start_backend(self.options, torch_on_cpus=False)
        self.config = GenerationConfig.model_validate(
            {
                "model_id": str(workload.checkpoint),
                "prompts": [{"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT}],
                "num_images_per_prompt": workload.batch,
                "num_inference_steps": workload.steps,
                "guidance_scale": GUIDANCE_SCALE,
                "seed": 0,
                "height": workload.size,
                "width": workload.size,
            }
        )
        self.checkpoint = open_checkpoint(self.config, ("unet", "scheduler", "vae"))
        unet = UNetToLoad(checkpoint=self.checkpoint, loras=(), dtype=workload.dtype)
        vae, kept = VaeToLoad(checkpoint=self.checkpoint, dtype="float32", tile=False), Kept()
        job, report = self.job(), StageReport(2)
        self.denoiser = open_denoiser(kept, self.backend, unet, [job], self.options, report)
        self.run_untimed = self.denoiser.run
        self.denoiser.run = self.run  # type: ignore[method-assign]
        shape = (workload.batch, *job.latent_shape)
        self.decoder = open_decoder(kept, self.backend, vae, [shape], self.options, StageReport(3))

    def job(self) -> Any:
        """What stage 2 is asked for, its scheduler made anew."""
        from common.runs.jobs import denoising_job, make_sampler

        sampler = make_sampler(self.config, self.checkpoint)
        return denoising_job(self.config, self.checkpoint, self.workload.embeddings(), sampler)

    def run(self, **options: Any) -> Iterator[int]:
        """All steps, with the clock running."""
        with self.clock.running():
            yield from self.run_untimed(**options)

    def denoise(self) -> Any:
        return self.denoise_images().latents

    def denoise_images(self, profile_folder: Path | None = None) -> Any:
        """All that stage 2 computes; with a profile of some steps, whose trace a folder gets."""
        from common.files.made_rows import MadeRows
        from common.sampling.denoising import denoise_images

        job = self.job()
        made = MadeRows.numbered(len(job.seeds))
        return denoise_images(
            lambda _: self.denoiser, [job], self.options, made, profile_folder=profile_folder
        )

    def flops(self) -> float | None:
        return self.denoiser.flops(self.denoiser.plan.fullest()) * self.workload.steps or None

    def decode(self, latents: Any) -> np.ndarray:
        from common.vae.decoding import decode_all

        return decode_all(self.decoder, latents.numpy(), self.options, bar=False)


class OursInTorch(Ours):
    """The same with `--backend torch`, which `auto` picks on CPUs for 16 bits and for the VAE."""

    backend = "torch"


PEERS: dict[str, type[Peer]] = {
    REFERENCE: Diffusers,
    "diffusers torch.compile": CompiledDiffusers,
    "torchax per step": TorchaxPerStep,
    "ours, jax": Ours,
    "ours, torch": OursInTorch,
}


def load_pipeline(workload: Workload) -> Any:
    """diffusers' pipeline without its text encoders, the VAE in float32."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    without = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        workload.checkpoint,
        torch_dtype=getattr(torch, workload.dtype),
        use_safetensors=True,
        local_files_only=True,
        add_watermarker=False,
        **without,
    )
    pipeline.vae.to(torch.float32)
    return pipeline


def to_pixels(pipeline: Any, images: Any) -> np.ndarray:
    """What a VAE gave, [B, 3, H, W], as pictures [B, H, W, 3] uint8, by diffusers."""
    pictures = pipeline.image_processor.postprocess(images, output_type="np")
    return (pictures * 255).round().astype(np.uint8)


# --- the workloads -------------------------------------------------------------------------------


def make_demo(folder: Path, batch: int, steps: int | None) -> Workload:
    """The embedded checkpoint and a prompt of its own."""
    import torch
    from safetensors.torch import save_file

    from common.conditions.prompts import encode_prompts
    from common.declared import EMBEDDINGS
    from common.models.component_table import loaded_for
    from common.models.find import open_checkpoint
    from common.models.text_pipeline import load_text_pipeline
    from common.runs.generation import RunSettings, resolve

    settings = RunSettings(prompt=(PROMPT,), negative_prompt=NEGATIVE_PROMPT)
    checkpoint = open_checkpoint(settings, loaded_for(EMBEDDINGS))
    config = resolve(settings, native_size=checkpoint.native_size, size_factor=8)
    tensors = encode_prompts(load_text_pipeline(checkpoint, torch.float32), config)
    save_file(tensors, folder / "embeddings.safetensors")
    return Workload(
        folder=folder,
        checkpoint=checkpoint.folder.resolve(),
        batch=batch,
        steps=steps or 20,
        size=checkpoint.native_size,
        dtype="float32",
        decodes=True,
    )


def make_mid(folder: Path, batch: int, steps: int | None) -> Workload:
    """A UNet of SDXL's shape with about 250 million random weights, and SDXL's VAE likewise."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from safetensors.torch import save_file

    sdxl, checkpoint = PROJECT_DIR / "models" / "sdxl_base", folder / "checkpoint"
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(sdxl / "unet"),
        sample_size=64,
        block_out_channels=(128, 256, 384),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=768,
    )
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(sdxl / "vae"))
    unet.save_pretrained(checkpoint / "unet")
    vae.save_pretrained(checkpoint / "vae")
    EulerDiscreteScheduler.from_config(
        EulerDiscreteScheduler.load_config(sdxl / "scheduler")
    ).save_pretrained(checkpoint / "scheduler")
    index = json.loads((sdxl / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    print(f"UNet of {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M weights", flush=True)
    widths = {"prompt_embeds": (1, 77, 768), "pooled_prompt_embeds": (1, 1280)}
    tensors = {
        f"{sign}{name}": torch.randn(shape)
        for name, shape in widths.items()
        for sign in ("", "negative_")
    }
    save_file(tensors, folder / "embeddings.safetensors")
    return Workload(
        folder=folder,
        checkpoint=checkpoint,
        batch=batch,
        steps=steps or 4,
        size=512,
        dtype="float32",
        decodes=False,
    )


LOADS = {"demo": make_demo, "mid": make_mid}


# --- one peer's process --------------------------------------------------------------------------


def work(name: str, folder: Path) -> None:
    """Load a peer, then answer each request with a run's seconds and the memory."""

    def make() -> Any:
        quiet_libraries()
        peer = PEERS[name](Workload.model_validate_json((folder / "workload.json").read_text()))

        def answer(keep: bool = False) -> dict[str, Any]:
            began = time.perf_counter()
            latents = peer.denoise()
            seconds = {"loop": peer.clock.seconds, "latents": time.perf_counter() - began}
            made: dict[str, Any] = {"latents": peer.to_numpy(latents)}
            if peer.workload.decodes:
                began = time.perf_counter()
                made["pictures"] = peer.decode(latents)
                seconds["pictures"] = time.perf_counter() - began
            if keep:
                np.savez(result_file(folder, name), **made)
            return {**seconds, "memory": peak_memory(), "flops": peer.flops()}

        return answer

    answer_requests(make)


def compare(own: Path, reference: Path) -> dict[str, str]:
    """The relative difference of a peer's latents, and the greatest of its pictures' values."""
    latents, pictures = compare_results(own, reference)
    found = {"latents differ": f"{latents:.1e}"}
    if pictures is not None:
        found["pictures differ"] = f"{pictures.max()}/255"
    return found


def main(
    load: Annotated[str, typer.Option("--load", help=f"{', '.join(LOADS)}.")] = "demo",
    batch: Annotated[int, typer.Option("--batch", help="Pictures at once.", min=1)] = 1,
    steps: Annotated[
        int | None, typer.Option("--num_inference_steps", help="Steps. [20; mid: 4]", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the UNet.")] = "float32",
    repeat: Repeat = 7,
    peer: Annotated[list[str] | None, peer_flag(PEERS)] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="A profile of ours, jax, in place of the table.")
    ] = False,
    checkout: Annotated[
        list[Path] | None,
        typer.Option("--checkout", help="Another one, with its .venv: its ours as well."),
    ] = None,
    worker: Worker = None,
    folder: WorkersFolder = None,
) -> None:
    """Print the table of one load."""
    if worker is not None and folder is not None:
        work(worker, folder)
        return
    names = [REFERENCE, *(name for name in peer or PEERS if name != REFERENCE)]
    refuse_unknown(names, PEERS)
    refuse_unknown([load], LOADS)
    if profile and (peer or checkout):
        raise typer.BadParameter("--profile is of ours, jax: leave --peer and --checkout out")
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workload = LOADS[load](folder, batch, steps).model_copy(update={"dtype": dtype})
        (folder / "workload.json").write_text(workload.model_dump_json())
        if profile:
            peer_to_profile = Ours(workload)
            peer_to_profile.denoise()  # compiles
            *lines, _ = lines_of(peer_to_profile.denoise_images(folder).profile)
            print("\n".join(lines))  # not how to open the trace, which does not stay
            return
        with ExitStack() as open_workers:
            peers = [PeerProcess(Path(__file__), name, folder) for name in names]
            ours = [name for name in names if issubclass(PEERS[name], Ours)]
            for number, other in enumerate(checkout or (), 1):
                its = copy_workload(workload, folder / str(number))
                peers += [PeerProcess(Path(__file__), name, its, other) for name in ours]
            workers = [open_workers.enter_context(each) for each in peers]
            print(table(workers, workload, load, repeat))


def copy_workload(workload: Workload, folder: Path) -> Path:
    """A folder of its own for peers whose results would have the names of others'."""
    folder.mkdir()
    shutil.copy(workload.folder / "embeddings.safetensors", folder)
    its = workload.model_copy(update={"folder": folder})
    (folder / "workload.json").write_text(its.model_dump_json())
    return folder


def flops_per_second() -> float:
    """What this machine computes at best, or near it: products of large float32 matrices."""
    import torch

    matrix = torch.randn(2048, 2048)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)


def table(workers: list[PeerProcess], workload: Workload, load: str, repeat: int) -> str:
    """Run all, and say what was measured, as Markdown."""
    for each in workers:
        each.wait_until_ready()
    for each in tqdm(workers, desc="compile and warm up"):
        each.ask(keep=True)
        each.ask()
    runs: dict[str, list[dict[str, float]]] = {each.name: [] for each in workers}
    results = {each.name: each.result for each in workers}
    for _ in tqdm(range(repeat), desc="rounds"):
        for each in workers:
            runs[each.name].append(each.ask())

    def median(name: str, part: str) -> float:
        return statistics.median(run[part] for run in runs[name])

    print(
        f"{load}, batch {workload.batch}, {workload.steps} steps, {workload.size}², "
        f"{workload.dtype}, {os.cpu_count()} cores, medians of {repeat} interleaved runs:\n"
    )
    rows = []
    for name in runs:
        cells = {"": name}
        for part, title in PARTS.items():
            if part not in runs[name][0]:
                continue
            seconds = [run[part] for run in runs[name]]
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            cells[title] = f"{median(name, part):.3f} s ({spread})"
            cells[f"{title}, ratio"] = f"{median(name, part) / median(REFERENCE, part):.2f}"
        cells["memory"] = f"{max(run['memory'] for run in runs[name]) / 1e9:.2f} GB"
        rows.append(cells | compare(results[name], results[REFERENCE]))
    rates = [
        f"{name} computes {runs[name][0]['flops'] / median(name, 'loop') / 1e9:.0f}"
        for name in runs
        if runs[name][0]["flops"]
    ]
    product = f"a product of 2048² matrices in PyTorch {flops_per_second() / 1e9:.0f}"
    print(f"GFLOP/s in the loop: {', '.join([*rates, product])}.\n")
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(cells.values()) for cells in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    typer.run(main)
