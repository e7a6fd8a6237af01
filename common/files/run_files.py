"""The names of a run directory's files, and the commands that make them."""

from pathlib import Path

from common.files.stage_table import STAGES, TRAJECTORY_FILE

DEFAULT_OUTPUT_DIR = Path("stage_outputs")
GENERATION_CONFIG_FILE = "generation_config.json"
# What a file needs beside its stage's plain command.
FLAGS_OF_FILE = {TRAJECTORY_FILE: " --save_trajectory N"}
MAKERS = {
    name: f"{stage.command}{FLAGS_OF_FILE.get(name, '')}"
    for stage in STAGES
    for name in stage.writes
}


def how_to_remake(path: Path) -> str:
    """The end of an error's sentence: the command that makes the file again."""
    maker = MAKERS.get(path.name)
    return f"make it again: {maker} --output_dir {path.parent}" if maker else "make it again"
