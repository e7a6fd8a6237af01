"""A run directory whose latents are made up and whose pictures a test gives."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.compute.clock import StageReport
from common.declared import EMBEDDINGS, LATENTS, PICTURES
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.recipe import Recipe
from common.files.stage_table import LATENTS_FILE
from common.runs.overrides import Overrides
from common.runs.picture_writer import PictureWriter
from common.runs.pictures import (
    Found,
    PictureFacts,
    Pictures,
    why_pictures_stale,
)
from tests.configs import make_config
from tests.conftest import DEMO

OF_EMBEDDINGS = {
    "prompts": ["a red star", "a ring"],
    "prompts_2": [None, "a blue ring"],
    "negative_prompts": ["blurry", None],
    "negative_prompts_2": [None, None],
}
OF_LATENTS = {
    "num_images_per_prompt": 2,
    "seeds": [1, 2, 3, 4],
    "num_inference_steps": 25,
    "scheduler": "EulerAncestralDiscreteScheduler",
    "scheduler_options": {},
    "height": 16,
    "width": 24,
}
OF_PICTURES = {"vae_dtype": "float32", "tile": False}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), np.uint8)


class Run:
    """A run directory with latents, whose pictures are what the test says."""

    def __init__(
        self, folder: Path, embeddings: dict[str, Any], latents: dict[str, Any], **config: Any
    ) -> None:
        self.folder = folder
        upstream = {EMBEDDINGS: OF_EMBEDDINGS | embeddings, LATENTS: OF_LATENTS | latents}
        made = Recipe(stage=2, settings=upstream, inputs={}, weights={}, versions={})
        seeds = upstream[LATENTS]["seeds"]
        tensor = torch.tensor(seeds, dtype=torch.float32)[:, None, None, None].repeat(1, 4, 2, 3)
        path, said = folder / LATENTS_FILE, {"model_id": "models/demo"}
        artifacts.save_tensors(path, {"latents": tensor}, made, said, [str(s) for s in seeds])
        self.latents: Artifact = artifacts.inspect(path)
        self.config = make_config(DEMO, **config)
        own = OF_PICTURES | {"image_format": self.config.image_format}
        self.recipe = made.model_copy(
            update={
                "stage": 3,
                "settings": {**upstream, PICTURES: own},
                "inputs": {LATENTS_FILE: self.latents.data_sha256},
            }
        )
        self.pictures = Pictures.of(self.config, self.recipe, self.latents, None)

    def writer(self, overrides: Overrides | None = None) -> PictureWriter:
        header = self.latents.header
        facts = PictureFacts(config=self.config, header=header, overrides=overrides or {})
        return PictureWriter(self.folder, self.pictures, facts, StageReport(3))

    def why_stale(self) -> str | None:
        return why_pictures_stale(Found(self.folder, self.pictures.names), self.pictures, None)

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if p.name != LATENTS_FILE)


def write_all(run: Run, overrides: Overrides | None = None, pixels: np.ndarray = PIXELS) -> Path:
    writer = run.writer(overrides)
    writer.put(range(len(run.pictures.rows)), pixels)
    return writer.finish()


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)
