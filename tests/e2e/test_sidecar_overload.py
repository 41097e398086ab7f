"""Ten times what the sidecar can take, on the real default model; ``make chaos`` does it for a minute."""

import pytest

from benchmarks.loopback import process
from benchmarks.overload import Overload, overload

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

GROWTH_BYTES = 50_000_000


def overloaded(*arguments: str, **settings: object) -> Overload:
    with process("upstream") as (upstream, _):
        command = ("sidecar", f"http://127.0.0.1:{upstream}/v1", "enforce", "--bundle", "smollm2-135m", *arguments)
        with process(*command, **settings, threads=1) as (port, pid):
            return overload(port, pid, times=10, seconds=3, measured_s=2)


def test_more_requests_than_may_be_under_way_are_told_to_come_back() -> None:
    found = overloaded("--max-requests", "16")

    assert found.counts.get("lost", 0) == 0, found.examples
    assert found.counts["judged"] > 0
    assert found.counts["refused"] > found.counts["judged"]
    assert found.memory_peak.sidecar - found.memory_before.sidecar < GROWTH_BYTES


def test_more_than_the_reader_can_queue_is_decided_by_the_policys_on_error() -> None:
    found = overloaded(max_batch_items=4)

    assert found.counts.get("lost", 0) == 0, found.examples
    assert found.counts["judged"] > 0
    assert found.counts["on_error"] > found.counts["judged"]
    assert found.memory_peak.sidecar - found.memory_before.sidecar < GROWTH_BYTES
