"""diffusers' pipeline behind FastAPI as one writes it with care: one thread that computes, a PNG.

    python benchmarks/plain_server.py --port 8001

The peer of `benchmarks/throughput.py`: one process that loads once and answers one request after
the other, as the server of a pipeline usually does.
"""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
import uvicorn
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from fastapi import FastAPI, Response
from pydantic import BaseModel

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
SCHEDULERS = {"euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


class Asked(BaseModel):
    """A request."""

    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str


def main(port: Annotated[int, typer.Option(help="Where it listens.")] = 8001) -> None:
    """Serve the demo checkpoint."""
    pipeline = DiffusionPipeline.from_pretrained(DEMO)
    pipeline.set_progress_bar_config(disable=True)
    config, app = pipeline.scheduler.config, FastAPI()
    # A pipeline holds its scheduler's state; and each thread of PyTorch's would have threads of
    # its own, which wait for each other.
    computing = ThreadPoolExecutor(1)

    def png_of(asked: Asked) -> bytes:
        pipeline.scheduler = SCHEDULERS[asked.scheduler].from_config(config)
        picture = pipeline(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            generator=torch.Generator().manual_seed(asked.seed),
        ).images[0]
        data = io.BytesIO()
        picture.save(data, "PNG")
        return data.getvalue()

    @app.post("/generate")
    async def generate(asked: Asked) -> Response:
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(computing, png_of, asked)
        return Response(data, media_type="image/png")

    uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
