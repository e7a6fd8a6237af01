"""What a run directory's files are found to be, beside the files themselves."""

import json
from pathlib import Path

from common.files.stage_table import EMBEDDINGS_FILE, LATENTS_FILE
from tests.conftest import PROJECT_DIR
from tests.printed import as_json, states

INSPECT = PROJECT_DIR / "tools" / "inspect_run.py"


def test_what_is_stale_says_why(run_copy: Path) -> None:
    path = run_copy / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"seed": 43}))
    found = states(as_json(INSPECT, run_copy))
    assert found[EMBEDDINGS_FILE] == ("fresh", "")
    assert found[LATENTS_FILE] == ("stale", "seeds [42, 43] → [43, 44]")
    assert found["output_image_0000.png"] == ("stale", f"{LATENTS_FILE} is stale")
