"""What docs/python.md and docs/notebook.ipynb show runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import PROJECT_DIR

DOCS = PROJECT_DIR / "docs"


@pytest.mark.slow
def test_the_programs_of_the_page_run(tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    assert len(programs) == 2
    for link in ("models", "configs"):
        (tmp_path / link).symlink_to(PROJECT_DIR / link)
    program = "\n".join([f"import sys; sys.path.insert(0, {str(PROJECT_DIR)!r})", *programs])
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    first, *_, last = (line for line in result.stdout.splitlines() if not line.startswith(" "))
    assert first.startswith("stage 1: encode")
    assert last.startswith("(128, 128)") and last.endswith("None")
    assert (tmp_path / "stage_outputs" / "run_0001" / "output_image.png").exists()


@pytest.mark.slow
def test_the_notebook_runs_and_shows_pictures(tmp_path: Path) -> None:
    """From a folder below a copy of the project, as a reader has it."""
    for path in PROJECT_DIR.iterdir():
        if not path.name.startswith(".") and path.name not in ("docs", "stage_outputs"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none is kept in the repository
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path / "docs")}},
    )
    client.execute()
    shown = [
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
        if kind.startswith("image/")
    ]
    assert len(shown) >= 5  # two pictures, a grid, the bars, the animation
    assert "output_image.png" in notebook.cells[-1]["outputs"][-1]["data"]["text/plain"]
