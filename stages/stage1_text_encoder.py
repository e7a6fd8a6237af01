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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

from common.files import artifacts
from common.files.made_rows import MadeRows
from common.files.stage_table import EMBEDDINGS_FILE, ENCODE
from common.messages import warn
from common.models.model_settings import LoraFile
from common.runs.parts import bytes_of_own, loras_of_prompts
from common.runs.recipes import embeddings_recipe, embeddings_rows
from common.runs.stage_run import StageRun, run_script


def main(run: StageRun) -> None:
    """Encode the prompts on the CPU and settle every setting of the run."""
    path = run.run_dir / EMBEDDINGS_FILE

    # 1. Settings: defaults < config file < flags
    config, checkpoint = run.settle_settings()
    from common.conditions.encoding import check_prompt_options

    loras = loras_of_prompts(config)
    check_prompt_options(config, checkpoint, loras, run.options)
    recipe = embeddings_recipe(config, checkpoint)
    artifacts.refuse_long_prompts(recipe, len(config.image_seeds()), bytes_of_own(config))

    # 2. Fresh already?
    run.lock.acquire()
    if run.is_fresh(artifacts.why_stale(path, recipe) or run.options.why_measure(), path):
        run.settings_written(config)
        return
    run.begin(f"encode {len(config.prompts)} prompt(s) with {config.model_id}")
    rows = run.find_rows(path, embeddings_rows(config, recipe), config)

    # 3. Load the text encoders, with what is added to them
    run.import_libraries("peft", "scipy")
    from common.compute.backends import TORCH_FACTS
    from common.conditions.encoding import measure_encoding
    from common.conditions.prompts import encode_into, length_of, rows_as_long, unread
    from common.models.text_pipeline import (
        embeddings_names,
        import_text_classes,
        open_text_pipeline,
    )

    import_text_classes(checkpoint)
    run.report.phase("other")

    def open_pipeline(added: tuple[LoraFile, ...]) -> Any:
        dtype = config.text_encoder_dtype
        with run.report.part("checkpoint_read"):
            return open_text_pipeline(run.kept, checkpoint, dtype, added, config.embeddings)

    pipeline = open_pipeline(loras[rows.missing[0] if rows.missing else 0])

    # 4. Encode, prompt by prompt; a stopped run goes on from what it kept
    for line in unread(pipeline, config):
        warn(line)
    length = length_of(pipeline, config)
    rows = rows_as_long(rows, length)
    run.keep_progress(recipe, TORCH_FACTS, rows, tokens=length)
    made = MadeRows(path, rows, run.progress)
    keeps = len(made.missing) > 1 and run.progress is not None
    with run.finishing_first(keeps=keeps) as stop, run.report.part("run"):
        encode_into(made, open_pipeline, config, length, stop, loras)
    profile = measure_encoding(pipeline, config, run.options, run.report, run.profile_folder)

    # 5. Written: the settings stand beside
    with run.report.part("writing"):
        provenance = {**config.model_settings(), "device": "cpu"}
        shapes = made.write(embeddings_names(pipeline), recipe, provenance)
        run.settings_written(config)
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
