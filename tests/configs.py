"""Settings of a small run, for tests that need some."""

from pathlib import Path
from typing import Any

from common.runs.generation import GenerationConfig

PROMPTS = ("a large red star on a blue background", "a small green ring", "black cross on white")


def make_config(model: Path, **settings: Any) -> GenerationConfig:
    """Settings with a few prompts; `negative_prompt` and `batch` are shorthands."""
    negative = settings.pop("negative_prompt", "blurry, low quality")
    batch = settings.pop("batch", 1)
    defaults = {
        "model_id": str(model),
        "prompts": [{"prompt": p, "negative_prompt": negative} for p in PROMPTS[:batch]],
        "height": 128,
        "width": 128,
        "num_inference_steps": 6,
    }
    return GenerationConfig.model_validate(defaults | settings)
