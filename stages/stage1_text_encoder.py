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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

from common.files import artifacts
from common.files.artifacts import Row
from common.files.stage_table import EMBEDDINGS_FILE, ENCODE
from common.messages import warn
from common.runs.parts import bytes_of_own
from common.runs.recipes import embeddings_recipe, embeddings_rows
from common.runs.stage_run import StageRun, run_script


def main(run: StageRun) -> None:
    """Encode the prompts on the CPU and settle every setting of the run."""
    path = run.run_dir / EMBEDDINGS_FILE

    # 1. Settings: defaults < config file < flags
    config, checkpoint = run.settle_settings()
    from common.conditions.encoding import check_prompt_options

    check_prompt_options(config, checkpoint)
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
    from common.conditions.prompts import encode_into, unread
    from common.files.tensor_writer import NO_HASH, written_in_parts
    from common.models.text_pipeline import import_text_classes, open_text_pipeline

    import_text_classes(checkpoint)
    run.report.phase("other")
    with run.report.part("checkpoint_read"):
        pipeline = open_text_pipeline(
            run.kept, checkpoint, config.text_encoder_dtype, config.loras, config.embeddings
        )

    # 4. Encode, prompt by prompt; a stopped run goes on from what it kept
    for line in unread(pipeline, config):
        warn(line)
    run.keep_progress(recipe, TORCH_FACTS)
    keeps = len(config.prompts) > 1 and run.progress is not None
    provenance = {**config.model_settings(), "device": "cpu"}
    unwritten = [Row(fingerprint, NO_HASH) for fingerprint in rows.fingerprints]
    with written_in_parts(path, recipe, provenance, unwritten) as written:
        with run.finishing_first(keeps=keeps) as stop, run.report.part("run"):
            taken = encode_into(written, pipeline, config, rows, run.progress, stop)
        profile = measure_encoding(pipeline, config, run.options, run.report, run.profile_folder)

    # 5. Written: the settings stand beside
    with run.report.part("writing"):
        run.settings_written(config)
    run.finish(
        path,
        shapes=written.shapes,
        rows_taken=taken,
        dtype=config.text_encoder_dtype,
        dtype_asked=config.text_encoder_dtype,
        **TORCH_FACTS,
        versions=recipe.versions,
        profile=profile,
    )


if __name__ == "__main__":
    run_script(ENCODE, main)
