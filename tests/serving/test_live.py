"""How far a running job is."""

import asyncio
from pathlib import Path

from common.serving.job_queue import JobQueue
from common.serving.live import Live
from common.serving.service import Service


def test_a_job_that_runs_is_at_a_stage(tmp_path: Path) -> None:
    service, queue = Service(tmp_path / "jobs", {}), JobQueue(tmp_path / "jobs")

    async def look() -> tuple[Live | None, Live | None]:
        job = await service.submit({"prompt": ["a"]})
        before = await service.live(job)
        mine = queue.claim([1], "w")
        assert mine is not None
        return before, await service.live(mine)

    before, running = asyncio.run(look())
    service.close()
    assert before is None and running is not None and running.stage == 1
