"""The queue of held calls: decided once, by whoever is first, and forgotten in content."""

import asyncio
import json
import re
import sqlite3
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hhh_router.cli.main import app
from hhh_router.errors import InvalidRequest, SettingsError, Unavailable
from hhh_router.interfaces.held import MAX_ARGUMENT_BYTES, Asked, HeldCalls
from hhh_router.trace.redact import Redactor

SECRET = "sk-canary0123456789abcdef"


def asked(tool: str = "delete_file", arguments: object = None) -> Asked:
    return Asked(
        door="test",
        request_id="hhh-1",
        session="s",
        tool=tool,
        arguments={"path": "/etc"} if arguments is None else arguments,
        policy="p@1",
        rule="checkpoints.tool_call[0]",
        reason="tool.name delete_file in [delete_*]",
    )


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "held.sqlite3"


async def test_a_call_waits_until_another_process_decides(path: Path) -> None:
    mine, others = HeldCalls(path, poll_s=0.01), HeldCalls(path)
    call = await mine.put(asked(), wait_s=30)
    waiting = asyncio.create_task(mine.wait(call))
    await asyncio.sleep(0.05)
    assert not waiting.done()

    others.settle(call.id, "approved", by="Ada", note="fine")

    found = await waiting
    assert (found.status, found.decided_by, found.note, found.arguments) == ("approved", "Ada", "fine", None)


async def test_only_the_first_decision_counts(path: Path) -> None:
    held = HeldCalls(path)
    call = await held.put(asked(), wait_s=30)

    assert held.settle(call.id, "denied")
    assert not held.settle(call.id, "approved")
    assert held.find(call.id).status == "denied"


async def test_a_call_expires_and_cannot_be_approved_any_more(path: Path) -> None:
    clock = Clock()
    held = HeldCalls(path, clock=clock, poll_s=0.01)
    call = await held.put(asked(), wait_s=5)
    clock.now += 5

    assert not held.settle(call.id, "approved")
    assert (await held.wait(call)).status == "expired"
    assert held.calls() == []
    assert [c.status for c in held.calls(everything=True)] == ["expired"]


async def test_a_call_whose_door_died_is_shown_as_expired(path: Path) -> None:
    clock = Clock()
    await HeldCalls(path, clock=clock).put(asked(), wait_s=5)
    clock.now += 60

    [found] = HeldCalls(path, clock=clock).calls(everything=True)

    assert (found.status, found.arguments) == ("expired", None)


async def test_whoever_goes_away_abandons_the_call(path: Path) -> None:
    held = HeldCalls(path, poll_s=0.01)
    call = await held.put(asked(), wait_s=30)
    waiting = asyncio.create_task(held.wait(call))
    await asyncio.sleep(0.05)

    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    assert held.find(call.id).status == "abandoned"
    assert not held.settle(call.id, "approved")


async def test_many_wait_and_are_approved_at_once(path: Path) -> None:
    held = HeldCalls(path, poll_s=0.01)
    calls = await asyncio.gather(*(held.put(asked(f"t{i}"), wait_s=30) for i in range(30)))
    waiting = [asyncio.create_task(held.wait(call)) for call in calls]

    verdicts = await asyncio.gather(*(asyncio.to_thread(held.settle, call.id, "approved") for call in calls))

    assert all(verdicts)
    assert {(await w).status for w in waiting} == {"approved"}


async def test_secrets_and_settled_arguments_are_not_stored(path: Path) -> None:
    held = HeldCalls(path)
    call = await held.put(asked(arguments={"path": f"/x?{SECRET}", "password": "hunter22", "n": 1}), wait_s=30)

    assert call.arguments == {"path": "/x?[redacted:api-key]", "password": "[redacted:key]", "n": 1}
    assert SECRET.encode() not in b"".join(file.read_bytes() for file in path.parent.iterdir())
    held.settle(call.id, "denied")
    assert held.find(call.id).arguments is None
    assert path.stat().st_mode & 0o777 == 0o600


async def test_half_a_character_can_be_held(path: Path) -> None:
    held = HeldCalls(path)

    call = await held.put(asked(arguments={"text": "\ud800"}), wait_s=30)

    assert held.find(call.id).arguments == {"text": "\ud800"}


async def test_what_nobody_could_look_through_is_not_held(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be shown"):
        await HeldCalls(path).put(asked(arguments={"text": "x" * MAX_ARGUMENT_BYTES}), wait_s=30)


async def test_a_queue_that_is_gone_is_an_error_and_no_approval(path: Path) -> None:
    held = HeldCalls(path, poll_s=0.01)
    call = await held.put(asked(), wait_s=30)
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM calls")
    db.close()

    with pytest.raises(Unavailable, match="not in the queue"):
        await held.wait(call)


def test_what_is_no_queue_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("no database, and longer than a header of SQLite would be" * 10)

    with pytest.raises(SettingsError, match="no queue of held calls"):
        HeldCalls(file)


async def test_the_command_lists_and_decides(path: Path) -> None:
    held = HeldCalls(path)
    first, second = [await held.put(asked(tool), wait_s=300) for tool in ("a", "b")]
    run = CliRunner()
    options = ["--queue", str(path)]

    listed = run.invoke(app, ["queue", "list", *options]).stdout
    denied = run.invoke(app, ["queue", "deny", first.id, *options, "--note", "no"])
    approved = run.invoke(app, ["queue", "approve", second.id[:8], *options, "--by", "Ada"])
    missing = run.invoke(app, ["queue", "approve", "zzz", *options])
    rows = run.invoke(app, ["queue", "list", "--all", "--json", *options]).stdout.splitlines()

    assert listed.index(first.id) < listed.index(second.id)
    assert 'arguments  {"path": "/etc"}' in listed
    assert (denied.exit_code, approved.exit_code, missing.exit_code) == (0, 0, 2)
    told = [json.loads(row) for row in rows]
    assert [(t["tool"], t["status"], t["note"]) for t in told] == [("a", "denied", "no"), ("b", "approved", None)]
    assert told[1]["decided_by"] == "Ada"


async def test_the_deployments_own_patterns_reach_neither_file_nor_caller(path: Path) -> None:
    held = HeldCalls(path, redactor=Redactor(patterns=[re.compile(r"CASE-\d+")]))

    call = await held.put(asked(tool="send_CASE-12", arguments={"CASE-4711": [f"CASE-1 {SECRET}"]}), wait_s=30)

    assert call.arguments == {"[redacted:own]": ["[redacted:own] [redacted:api-key]"]}
    assert call.tool == "send_[redacted:own]"
    assert b"CASE" not in b"".join(p.read_bytes() for p in path.parent.iterdir())


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_new_queue_that_another_process_is_making_is_waited_for(tmp_path: Path, lock: str) -> None:
    path = tmp_path / "held.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE t (x)")
    other.execute(lock)
    threading.Timer(0.3, lambda: other.execute("COMMIT")).start()

    assert HeldCalls(path).calls() == []
    other.close()
