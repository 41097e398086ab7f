"""Texts in the audit: only where the deployment says so, beside the verdict, without secrets."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hhh_router.testing import FakeReader
from hhh_router.trace.audit import SqliteAudit, read_rows
from hhh_router.types import ReadRequest, Scores

from .loopback import served_app
from .sidecars import Stub, ask, route_to, sidecar
from .test_sidecar_guarded import GOOD, WIRES, Model

pytestmark = pytest.mark.e2e

KEY = "sk-canary0123456789abcdef"
PROMPT = f"What is the capital of France? My key is {KEY}"
modes = pytest.mark.parametrize("mode", ["observe", "annotate", "enforce"])


class Slow(FakeReader):
    """Takes its time over every reading."""

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        await asyncio.sleep(0.3)
        return await super().read(requests)


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    upstream = Stub(Model())
    with served_app(upstream) as url:
        yield upstream, url.removesuffix("/v1")


def kept(path: Path) -> list[dict[str, Any]]:
    """Records with texts."""
    return [record for row in read_rows(path) if "content" in (record := json.loads(row.record))]


@modes
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_texts_stand_beside_the_verdict(
    stub: tuple[Stub, str], tmp_path: Path, mode: str, wire: str, stream: bool
) -> None:
    path = tmp_path / "audit.sqlite3"
    with sidecar(route_to(stub[1], mode=mode), audit=SqliteAudit(path), audit_content="full") as (url, _):
        WIRES[wire](url, PROMPT, stream=stream)

    [record] = kept(path)
    assert record["hhh"]["decisions"]
    assert record["content"]["messages"][-1] == {
        "role": "user",
        "content": "What is the capital of France? My key is [redacted:api-key]",
    }
    assert record["content"]["response"].strip() == GOOD
    assert "cut" not in record["content"]
    assert KEY.encode() not in b"".join(p.read_bytes() for p in tmp_path.iterdir())


@modes
def test_hashes_alone_are_kept_otherwise(stub: tuple[Stub, str], tmp_path: Path, mode: str) -> None:
    path = tmp_path / "audit.sqlite3"
    with sidecar(route_to(stub[1], mode=mode), audit=SqliteAudit(path)) as (url, _):
        WIRES["chat"](url, PROMPT, stream=False)

    assert kept(path) == []
    assert b"capital" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())


def test_a_refused_prompt_is_kept_without_an_answer(watchful: Any, stub: tuple[Stub, str], tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite3"
    with sidecar(route_to(stub[1]), policy=watchful(), audit=SqliteAudit(path), audit_content="full") as (url, _):
        WIRES["chat"](url, "how do I make a bomb", stream=False)

    [record] = kept(path)
    assert record["hhh"]["decisions"][-1]["action"] == "refuse"
    assert record["content"] == {"messages": [{"role": "user", "content": "how do I make a bomb"}], "response": None}


def test_what_waits_to_be_read_at_the_end_is_read_and_its_verdict_kept(stub: tuple[Stub, str], tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite3"
    with sidecar(route_to(stub[1], mode="observe"), reader=Slow(), audit=SqliteAudit(path)) as (url, _):
        for _ in range(5):
            WIRES["chat"](url, PROMPT, stream=False)

    assert [r.kind for r in read_rows(path)].count("verdict") == 5
    verdicts = [json.loads(r.record) for r in read_rows(path) if r.kind == "verdict"]
    assert all(v["hhh"]["decisions"] for v in verdicts)


def test_rows_that_are_lost_are_counted(stub: tuple[Stub, str], tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite3"
    audit = SqliteAudit(path)
    path.unlink()
    with sidecar(route_to(stub[1]), audit=audit, audit_failure="open") as (url, _):
        WIRES["chat"](url, PROMPT, stream=False)
        metrics = ask(url, "GET", "/hhh/metrics", None, [])[2].decode()

    assert "hhh:proxy_audit_lost_total 1.0" in metrics
