"""What Prometheus reads of a server, by its own parser."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.conftest import Server

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(server: Server) -> Samples:
    text = httpx.get(f"{server.url}/metrics").raise_for_status().text
    return {
        (sample.name.removeprefix("staged_diffusion_"), tuple(sorted(sample.labels.items()))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.slow
def test_what_has_ended_is_counted_once(server: Server) -> None:
    def of(samples: Samples, name: str, **labels: str) -> float:
        return samples.get((name, tuple(sorted(labels.items()))), 0.0)

    before = read(server)
    url = f"{server.url}/v1/images/generations"
    httpx.post(url, json={"prompt": "a star", "n": 2}, timeout=300).raise_for_status()
    bad = httpx.post(url, json={"prompt": "a star", "scheduler": "none"}, timeout=300)
    assert bad.status_code == 400
    read(server)
    after = read(server)

    def more(name: str, **labels: str) -> float:
        return of(after, name, **labels) - of(before, name, **labels)

    assert more("jobs_ended_total", state="done") == 1
    assert more("jobs_ended_total", state="failed") == 1
    assert more("images_total") == 2 and more("job_seconds_count") == 2
    assert [more("stage_seconds_count", stage=stage) for stage in "123"] == [1, 1, 1]
    assert of(after, "jobs", state="waiting") == of(after, "jobs", state="running") == 0
    assert of(after, "peak_memory_bytes", stage="2", where="host") > 1e8
