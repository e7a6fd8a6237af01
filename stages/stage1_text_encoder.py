"""Stage 1: encode the prompts with the checkpoint's own CLIP text encoders, on the CPU.

    python stages/stage1_text_encoder.py --prompt "a large red star on a blue background"

Reads   the settings (defaults, `--config`, flags) and the checkpoint's tokenizers, text encoders.
Writes  generation_config.json          every setting of the run, resolved
        stage1_embeddings.safetensors   prompt_embeds and negative_prompt_embeds [P, L, D];
                                        with two encoders also the pooled ones [P, E]
        stage1_report.json
Takes   some seconds for the demo checkpoint, under a minute for SDXL; no jax, no accelerator.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

from common.files import artifacts
from common.files.made_rows import MadeRows
from common.files.recipe import Recipe
from common.files.stage_table import EMBEDDINGS_FILE, ENCODE
from common.messages import warn
from common.models.checkpoint import Checkpoint
from common.models.component_table import text_encoders
from common.models.lora import loras_for
from common.models.model_settings import LoraFile
from common.runs.generation import GenerationConfig
from common.runs.parts import loras_of_prompts, refuse_long_prompts
from common.runs.recipes import embeddings_recipe, embeddings_rows
from common.runs.stage_run import StageRun, run_script


def main(run: StageRun) -> None:
    """Encode the prompts on the CPU and settle every setting of the run."""
    path = run.run_dir / EMBEDDINGS_FILE

    # 1. Settings: defaults < config file < flags
    config, checkpoint = run.settle_settings()
    from common.conditions.encoding import check_own_loras, check_prompt_options

    loras = [loras_for(each, text_encoders()) for each in loras_of_prompts(config)]
    check_prompt_options(config, checkpoint)
    check_own_loras(config, loras, run.options)
    recipe = embeddings_recipe(config, checkpoint)
    refuse_long_prompts(recipe, config)

    # 2. Fresh already?
    run.lock.acquire()
    if run.is_fresh(artifacts.why_stale(path, recipe) or run.options.why_measure(), path):
        run.settings_written(config)
        return
    run.begin(f"encode {len(config.prompts)} prompt(s) with {config.model_id}")
    encode(run, config, checkpoint, recipe, loras)


def encode(
    run: StageRun,
    config: GenerationConfig,
    checkpoint: Checkpoint,
    recipe: Recipe,
    loras: Sequence[tuple[LoraFile, ...]],
) -> None:
    """The part of the story that takes time; `loras` are each prompt's."""
    path = run.run_dir / EMBEDDINGS_FILE
    rows = run.find_rows(path, embeddings_rows(config, recipe), config)

    # 3. Load the text encoders, with what is added to them, and read the prompts
    run.import_libraries("peft", "scipy")
    from common.compute.backends import TORCH_FACTS
    from common.conditions.encoding import measure_encoding
    from common.conditions.prompts import encode_into, read_texts, rows_as_long, unread
    from common.models import text_pipeline

    text_pipeline.import_text_classes(checkpoint)
    run.report.phase("other")

    def open_pipeline(added: tuple[LoraFile, ...]) -> Any:
        kept, dtype, tokens = run.kept, config.text_encoder_dtype, config.embeddings
        with run.report.part("checkpoint_read"):
            return text_pipeline.open_text_pipeline(kept, checkpoint, dtype, added, tokens)

    pipeline = open_pipeline(loras[rows.missing[0] if rows.missing else 0])
    texts, names = read_texts(pipeline, config), text_pipeline.embeddings_names(pipeline)
    for line in unread(pipeline, config):
        warn(line)
    del pipeline  # the next one may need its memory

    # 4. Encode, prompt by prompt; a stopped run goes on from what it kept
    rows = rows_as_long(rows, texts.length)
    run.keep_progress(recipe, TORCH_FACTS, rows, tokens=texts.length)
    made = MadeRows(path, rows, run.progress)
    keeps = len(made.missing) > 1 and run.progress is not None
    with run.finishing_first(keeps=keeps) as stop:
        with run.report.part("run"):
            encode_into(made, open_pipeline, config, texts, stop, loras)

        # 5. Write; the settings stand beside
        with run.report.part("writing"):
            provenance = {**config.model_settings(), "device": "cpu"}
            shapes = made.write(names, recipe, provenance)
            run.settings_written(config)
    if stop is not None:
        stop.raise_if_asked(f"when {path} was written")
    again = partial(open_pipeline, loras[0])
    profile = measure_encoding(again, config, run.options, run.report, run.profile_folder)
    run.finish(
        path,
        shapes=shapes,
        rows_taken=len(rows.places),
        dtype=config.text_encoder_dtype,
        dtype_asked=config.text_encoder_dtype,
        **TORCH_FACTS,
        versions=recipe.versions,
        profile=profile,
    )


if __name__ == "__main__":
    run_script(ENCODE, main)
