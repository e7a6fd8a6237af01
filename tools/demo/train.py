"""Train the demo checkpoint `models/demo/`: a small text-to-image model of the SDXL architecture.

    python tools/demo/train.py                      # writes models/demo
    python tools/demo/train.py --output_dir /tmp/m --vae_steps 20 --unet_steps 20

Two parts, one after the other: the VAE on crops of drawn pictures, then the UNet together with both
text encoders on the encoded pictures and their captions. All random choices follow from the seed
and the step's number, so a run that was interrupted goes on from its last saved state
(`training/`, every two minutes) and ends as if it had not been. The result depends on the machine
only through the rounding of its arithmetic.
"""

import functools
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT_DIR))

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tools.demo.drawn_shapes import (
    PICTURE_SIZE,
    Scene,
    draw_scene,
    random_scene,
    vocabulary_words,
    write_caption,
)

VAE_CONFIG: dict[str, Any] = dict(
    block_out_channels=(16, 32, 48, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=PICTURE_SIZE,
    force_upcast=False,
)
UNET_CONFIG: dict[str, Any] = dict(
    sample_size=PICTURE_SIZE // 8,
    block_out_channels=(48, 96, 160),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(1, 2, 4),  # by diffusers' old misnomer the number of heads
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=16,
    projection_class_embeddings_input_dim=96 + 6 * 16,
    cross_attention_dim=64 + 96,
    norm_num_groups=16,
)
# SDXL's own scheduler settings, but for the prediction type: with v-prediction the noisiest steps,
# which decide colours and places, weigh as much as the others.
SCHEDULER_CONFIG: dict[str, Any] = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    num_train_timesteps=1000,
    prediction_type="v_prediction",
    steps_offset=1,
    timestep_spacing="leading",
)
# Settings of other schedulers (DDIM, PNDM), which SDXL's scheduler_config.json names as well.
FOREIGN_SCHEDULER_CONFIG = dict(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True)
TEXT_TOKENS = 77
SHORT_TOKENS = 32  # no caption has more; see train_unet
SAVE_SECONDS = 120
CAPTIONS = 4  # of each picture
# How much more often the UNet's second round sees what its first round learned worst. Few captions
# begin with "blurry", where a prompt has the word; small and thin figures fill few latents.
BLURRY_FIRST, SMALL, THIN = 14.0, 1.5, 1.5
THIN_SHAPES = ("star", "ring")


# --- data ---------------------------------------------------------------------------------------


def step_rng(seed: int, purpose: str, step: int) -> random.Random:
    """The source of every random choice of one step (`random.Random` hashes strings itself)."""
    return random.Random(f"{seed} {purpose} {step}")


def draw_pictures(seed: int, count: int) -> tuple[np.ndarray, list[Scene], list[list[str]]]:
    """Draw `count` pictures, with four captions each. Returns [count, 128, 128, 3] uint8 first."""
    pictures = np.empty((count, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    scenes, captions = [], []
    for index in tqdm(range(count), desc="drawing pictures", mininterval=5):
        rng = step_rng(seed, "picture", index)
        scene = random_scene(rng)
        pictures[index] = draw_scene(scene, rng)
        scenes.append(scene)
        captions.append([write_caption(scene, rng) for _ in range(CAPTIONS)])
    return pictures, scenes, captions


def to_model_range(pictures: np.ndarray) -> torch.Tensor:
    """[N, H, W, 3] uint8 to [N, 3, H, W] float32 in -1…1."""
    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    return tensor.float().div(127.5).sub(1)


def cosine_rate(peak: float, step: int, steps: int, warm_up: int) -> float:
    """Learning rate: a linear warm-up, then half a cosine down to a hundredth of the peak."""
    falling = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return peak * min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * falling)


def two_round_rate(step: int, *, first: int, steps: int) -> float:
    """Learning rate of the UNet: a cosine for each of its two rounds."""
    if step < first:
        return cosine_rate(1e-3, step, first, warm_up=200)
    return cosine_rate(6e-4, step - first, steps - first, warm_up=100)


def caption_weights(scenes: list[Scene], captions: list[list[str]]) -> torch.Tensor:
    """How often the second round sees each caption, relative to others. [4N] float32."""
    weights = []
    for scene, several in zip(scenes, captions, strict=True):
        weight = 1.0
        if any(figure.size == "small" for figure in scene.figures):
            weight *= SMALL
        if any(figure.shape in THIN_SHAPES for figure in scene.figures):
            weight *= THIN
        weights += [
            weight * (BLURRY_FIRST if re.match("blurry,? an? ", caption) else 1.0)
            for caption in several
        ]
    return torch.tensor(weights)


# --- training state -----------------------------------------------------------------------------


class Trainer:
    """Parameters, AdamW and a moving average, saved whole in one safetensors file."""

    def __init__(
        self,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        state_file: Path,
        *,
        steps: int,
        rate: Callable[[int], float],
        weight_decay: float,
        average_decay: float,
    ) -> None:
        self.names = [name for name, _ in named_parameters]
        self.parameters: list[torch.Tensor] = [parameter for _, parameter in named_parameters]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, rate(0), betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.state_file = state_file
        self.steps, self.rate = steps, rate
        self.average_decay = average_decay
        self.step = 0
        if state_file.exists():
            self._load()

    def each_step(self, description: str) -> Iterator[int]:
        """Yield the steps that remain, with a progress bar, and save the state now and then."""
        saved = time.monotonic()
        with tqdm(
            total=self.steps, initial=self.step, desc=description, mininterval=10
        ) as progress:
            while self.step < self.steps:
                yield self.step
                self.step += 1
                progress.update()
                if self.step == self.steps or time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()

    def update(self, loss: torch.Tensor) -> None:
        """One AdamW step on `loss`, gradients clipped to norm 1, and the moving average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(self.average_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def use_average(self) -> None:
        """Put the moving average in place of the parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)

    def _save(self) -> None:
        tensors = {}
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            tensors[f"parameter.{name}"] = parameter.detach().contiguous()
            tensors[f"average.{name}"] = average.contiguous()
            state = self.optimizer.state[parameter]
            for moment in state.keys() & {"exp_avg", "exp_avg_sq"}:
                tensors[f"{moment}.{name}"] = state[moment].contiguous()
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state_file.with_suffix(".tmp")
        save_file(tensors, temporary, {"step": str(self.step), "steps": str(self.steps)})
        temporary.replace(self.state_file)

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.state_file, "pt") as file:
            metadata = file.metadata()
        if metadata["steps"] != str(self.steps):
            raise SystemExit(
                f"{self.state_file} is of a training with {metadata['steps']} steps, not "
                f"{self.steps}: remove it to start over, or ask for the same number"
            )
        self.step = int(metadata["step"])
        tensors = load_file(self.state_file)
        with torch.no_grad():
            for name, parameter, average in zip(
                self.names, self.parameters, self.average, strict=True
            ):
                parameter.copy_(tensors[f"parameter.{name}"])
                average.copy_(tensors[f"average.{name}"])
                # The last layer of a text encoder read at its penultimate state has no gradient.
                if f"exp_avg.{name}" in tensors:
                    # The fused optimizer needs its moments in the parameter's memory format.
                    state: dict[str, torch.Tensor] = {"step": torch.tensor(float(self.step))}
                    for moment in ("exp_avg", "exp_avg_sq"):
                        loaded = tensors[f"{moment}.{name}"]
                        state[moment] = torch.empty_like(parameter).copy_(loaded)
                    self.optimizer.state[parameter] = state


# --- the VAE ------------------------------------------------------------------------------------


def train_vae(
    pictures: np.ndarray, state_dir: Path, steps: int, seed: int, device: torch.device
) -> AutoencoderKL:
    """Train on crops, the last sixth of the steps on whole pictures at the same cost."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE_CONFIG).to(device, memory_format=torch.channels_last)
    trainer = Trainer(
        list(vae.named_parameters()),
        state_dir / "vae.safetensors",
        steps=steps,
        rate=lambda step: cosine_rate(2e-3, step, steps, warm_up=50),
        weight_decay=0.0,
        average_decay=0.995,
    )
    for step in trainer.each_step("VAE"):
        whole = step >= steps * 5 // 6
        rng = step_rng(seed, "vae", step)
        images = crops(pictures, rng, 8, PICTURE_SIZE) if whole else crops(pictures, rng, 32, 64)
        images = images.to(device, memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        loss = F.l1_loss(decoded, images) + 0.5 * F.mse_loss(decoded, images)
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        trainer.update(loss + 1e-4 * divergence)
        if step % 100 == 0:
            decibels = -10 * math.log10(F.mse_loss(decoded, images).item() / 4)
            tqdm.write(f"VAE step {step}: {decibels:.1f} dB, divergence {divergence.item():.2f}")
    trainer.use_average()
    return vae.eval().requires_grad_(False)


def crops(pictures: np.ndarray, rng: random.Random, count: int, side: int) -> torch.Tensor:
    """Cut `count` random squares. Returns [count, 3, side, side] float32."""
    cuts = []
    for _ in range(count):
        picture = pictures[rng.randrange(len(pictures))]
        y, x = (rng.randint(0, PICTURE_SIZE - side) for _ in range(2))
        cuts.append(picture[y : y + side, x : x + side])
    return to_model_range(np.stack(cuts))


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> torch.Tensor:
    """Encode to the posteriors' means. Returns [N, 4, 16, 16] float32, not yet scaled."""
    latents = []
    for start in tqdm(range(0, len(pictures), 64), desc="encoding pictures", mininterval=5):
        images = to_model_range(pictures[start : start + 64]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            mean = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist.mean
        latents.append(mean.float())
    return torch.cat(latents)


# --- text ---------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges build whole words of the captions' vocabulary.

    Any other text falls back to bytes, as in CLIP's own vocabulary.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    vocabulary = characters + [f"{character}</w>" for character in characters]
    merges: list[tuple[str, str]] = []
    for word in vocabulary_words():
        # Merges apply in their order, so a word begins with what the earlier words' merges make
        # of it, and its own, which come last, never touch those words.
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for left, right in merges:
            for index in range(len(pieces) - 2, -1, -1):
                if pieces[index : index + 2] == [left, right]:
                    pieces[index : index + 2] = [left + right]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TEXT_TOKENS
    )


def make_text_encoders(
    vocabulary_size: int,
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two CLIP text encoders of three layers; the UNet reads the penultimate hidden states."""
    shared = dict(
        vocab_size=vocabulary_size,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=vocabulary_size - 1,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        hidden_act="gelu",
    )
    first = CLIPTextModel(CLIPTextConfig(hidden_size=64, projection_dim=64, **shared))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=96, projection_dim=96, **shared)
    )
    return first, second


# --- the UNet and the text encoders -------------------------------------------------------------


def train_unet(
    latents: torch.Tensor,
    scenes: list[Scene],
    captions: list[list[str]],
    tokenizer: CLIPTokenizer,
    state_dir: Path,
    steps: int,
    seed: int,
    device: torch.device,
    batch_size: int = 64,
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection]:
    """Train by v-prediction (Salimans & Ho 2022, eq. 10) with one caption in eight left out.

    Two rounds, each with a rate that falls to nearly nothing: three fifths of the steps on evenly
    chosen captions, then the others on captions chosen by `caption_weights`.

    Left out means zero embeddings for most (what `force_zeros_for_empty_prompt` gives the pipeline
    for no negative prompt) and the empty text for the others.
    """
    first_round = steps * 3 // 5
    torch.manual_seed(seed + 1)
    text_encoder, text_encoder_2 = make_text_encoders(len(tokenizer))
    unet = UNet2DConditionModel(**UNET_CONFIG)
    # Plain attention: on CPUs the fused kernel's backward pass takes a third of a step.
    unet.set_attn_processor(AttnProcessor())
    modules = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    trainer = Trainer(
        [
            (f"{name}.{key}", parameter)
            for name, module in modules.items()
            for key, parameter in module.to(device).train().named_parameters()
        ],
        state_dir / "unet.safetensors",
        steps=steps,
        rate=functools.partial(two_round_rate, first=first_round, steps=steps),
        weight_decay=0.01,
        average_decay=0.999,
    )
    flat_captions = [caption for several in captions for caption in several]
    tokens = tokenizer(
        [*flat_captions, ""], padding="max_length", max_length=TEXT_TOKENS, truncation=True
    )
    token_ids = torch.tensor(tokens.input_ids)  # [4N + 1, 77]
    longest = int(torch.tensor(tokens.attention_mask).sum(1).max())
    if longest > SHORT_TOKENS:
        raise ValueError(f"the longest caption has {longest} tokens, over {SHORT_TOKENS}")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0).float()
    size = float(PICTURE_SIZE)
    time_ids = torch.tensor([[size, size, 0, 0, size, size]]).repeat(batch_size, 1).to(device)

    weights = caption_weights(scenes, captions)
    recent: list[float] = []
    for step in trainer.each_step("UNet"):
        g = torch.Generator().manual_seed(step_rng(seed, "unet", step).getrandbits(63))
        if step < first_round:
            chosen = torch.randint(0, len(latents), (batch_size,), generator=g)
            wording = CAPTIONS * chosen + torch.randint(0, CAPTIONS, (batch_size,), generator=g)
        else:
            wording = torch.multinomial(weights, batch_size, replacement=True, generator=g)
            chosen = wording // CAPTIONS
        timesteps = torch.randint(0, 1000, (batch_size,), generator=g)
        fate = torch.rand(batch_size, generator=g)
        wording[(fate >= 0.10) & (fate < 0.125)] = len(token_ids) - 1  # the empty text
        kept = (fate >= 0.10).float().to(device)

        clean = latents[chosen]  # [B, 4, 16, 16]
        noise = torch.randn(clean.shape, generator=g)
        alphas = alphas_cumprod[timesteps][:, None, None, None]
        noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
        target = alphas.sqrt() * noise - (1 - alphas).sqrt() * clean

        # Captions are short: the first steps leave out the padding, which costs a third of the
        # time; the others see all 77 tokens, as the pipeline does.
        length = TEXT_TOKENS if step >= first_round * 2 // 3 else SHORT_TOKENS
        ids = token_ids[wording, :length].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            first = text_encoder(ids, output_hidden_states=True)
            second = text_encoder_2(ids, output_hidden_states=True)
            context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
            predicted = unet(
                noisy.to(device),
                timesteps.to(device),
                encoder_hidden_states=context * kept[:, None, None],
                added_cond_kwargs={
                    "text_embeds": second.text_embeds * kept[:, None],
                    "time_ids": time_ids,
                },
                return_dict=False,
            )[0]
        loss = F.mse_loss(predicted.float(), target.to(device))
        trainer.update(loss)
        recent.append(loss.item())
        if len(recent) == 100:
            tqdm.write(f"UNet step {step + 1}: loss {sum(recent) / 100:.4f}")
            recent = []
    trainer.use_average()
    unet.set_default_attn_processor()
    for module in modules.values():
        module.eval().requires_grad_(False)
    return unet, text_encoder, text_encoder_2


# --- the command --------------------------------------------------------------------------------


def main(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder of the checkpoint.")
    ] = PROJECT_DIR / "models" / "demo",
    state_dir: Annotated[
        Path, typer.Option("--state_dir", help="Folder of the training's own state.")
    ] = PROJECT_DIR / "training",
    pictures: Annotated[
        int, typer.Option("--pictures", help="How many pictures to draw.", min=64)
    ] = 24_000,
    vae_steps: Annotated[
        int, typer.Option("--vae_steps", help="Training steps of the VAE.", min=1)
    ] = 2_600,
    unet_steps: Annotated[
        int, typer.Option("--unet_steps", help="Training steps of the UNet.", min=1)
    ] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random choice.")] = 0,
    device: Annotated[
        str, typer.Option("--device", help="cpu or cuda; by default cuda where there is one.")
    ] = "",
) -> None:
    """Train the demo checkpoint; an interrupted training goes on where it was."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    # 1. The data
    drawn, scenes, captions = draw_pictures(seed, pictures)

    # 2. The VAE
    vae = train_vae(drawn, state_dir, vae_steps, seed, where)
    latents = encode_pictures(vae, drawn, where)
    scaling_factor = round(1 / latents.std().item(), 5)
    vae.register_to_config(scaling_factor=scaling_factor)
    latents = latents.cpu() * scaling_factor
    tqdm.write(f"VAE done: scaling factor {scaling_factor}")

    # 3. The UNet and the text encoders
    tokenizer = make_tokenizer(state_dir / "tokenizer")
    unet, text_encoder, text_encoder_2 = train_unet(
        latents, scenes, captions, tokenizer, state_dir, unet_steps, seed, where
    )

    # 4. The checkpoint, in diffusers' layout
    pipeline = StableDiffusionXLPipeline(
        vae=vae.to("cpu", memory_format=torch.contiguous_format),
        text_encoder=text_encoder.cpu(),
        text_encoder_2=text_encoder_2.cpu(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.cpu(),
        scheduler=EulerDiscreteScheduler(**SCHEDULER_CONFIG),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    # Half the size on disk. The text encoders are small, and transformers computes in the dtype it
    # finds, so they stay float32.
    unet.to(torch.float16)
    vae.to(torch.float16)
    pipeline.save_pretrained(output_dir)
    config_file = output_dir / "scheduler" / "scheduler_config.json"
    config = json.loads(config_file.read_text()) | FOREIGN_SCHEDULER_CONFIG
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    typer.echo(f"wrote {output_dir}")


if __name__ == "__main__":
    typer.run(main)
