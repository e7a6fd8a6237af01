"""What a run directory tells of a job, as far as its files are there."""

from pathlib import Path

from common.files.report import read_report
from common.serving.job_queue import JobQueue
from common.serving.lineage import lineage_of
from tests.serving.test_job_queue import STEPS


def test_all_that_a_finished_run_tells(finished_run: Path, tmp_path: Path) -> None:
    queue = JobQueue(tmp_path)
    told = lineage_of(queue.add(finished_run, STEPS))
    assert [report["stage"] for report in told["reports"]] == [1, 2, 3]
    for report in told["reports"]:
        whole = read_report(finished_run, report["stage"])
        assert whole is not None and report["wall_seconds"] == whole.wall_seconds
        assert report["backend"] == whole.backend
        assert report["seconds"]["run"] == whole.seconds.run
    assert [image["seed"] for image in told["images"]] == [42, 43]
    files = {each["file"]: each["bytes"] for each in told["artifacts"]}
    on_disk = {p.name: p.stat().st_size for p in finished_run.iterdir() if p.name[0] != "."}
    assert files == on_disk


def test_paths_are_told_by_their_names(run_copy: Path, tmp_path: Path) -> None:
    file = run_copy / "generation_config.json"
    text = file.read_text().replace('"models/demo"', '"/home/someone/sdxl"')
    file.write_text(text.replace('"prompt": "', '"prompt": "/home/ '))
    told = lineage_of(JobQueue(tmp_path).add(run_copy, STEPS))
    assert told["settings"]["model_id"] == "sdxl"
    assert told["settings"]["prompts"][0]["prompt"].startswith("/home/ ")


def test_of_a_job_that_waits_there_is_nothing(tmp_path: Path) -> None:
    told = lineage_of(JobQueue(tmp_path).add(tmp_path / "gone", STEPS))
    assert told == {"settings": {}, "images": [], "reports": [], "artifacts": []}
