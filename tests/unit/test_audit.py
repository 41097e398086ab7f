"""The audit: durable before it says so, chained, and marked after a crash."""

import asyncio
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hhh_router.cli.main import app
from hhh_router.errors import SettingsError, Unavailable
from hhh_router.trace.audit import ChainedAudit, SqliteAudit, read_rows, row_hash, verify
from hhh_router.trace.audit.sqlite import SqliteStore
from hhh_router.trace.audit.writer import FAILING_S
from hhh_router.trace.redact import Redactor

CANARY = "sk-canary0123456789abcdef"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.sqlite3"


async def fill(path: Path, requests: int = 3) -> None:
    audit = SqliteAudit(path)
    for i in range(requests):
        await audit.write("intent", f"r{i}", {"path": "/v1/chat/completions"})
        await audit.write("outcome", f"r{i}", {"status": 200})
    await audit.aclose()


async def test_a_row_can_be_read_by_others_when_write_returns(path: Path) -> None:
    audit = SqliteAudit(path)
    await audit.write("intent", "r1", {"a": 1})
    rows = list(read_rows(path))
    await audit.aclose()

    assert [(r.seq, r.kind, r.request_id, json.loads(r.record)) for r in rows] == [(1, "intent", "r1", {"a": 1})]


async def test_rows_that_come_together_are_committed_together_and_all_chained(path: Path) -> None:
    audit = SqliteAudit(path)
    await asyncio.gather(*(audit.write("intent", f"r{i}", {"i": i}) for i in range(200)))
    await audit.aclose()

    found = verify(path)
    assert (found.rows, found.broken_at, found.unfinished) == (200, None, 200)


async def test_the_hash_is_what_the_page_says(path: Path) -> None:
    import hashlib

    await fill(path, 1)
    first, second = read_rows(path)

    told = json.dumps([first.hash, 2, second.time, "outcome", "r0", '{"status":200}'], separators=(",", ":")).encode()
    assert second.hash == hashlib.sha256(told).hexdigest()


@pytest.mark.parametrize(
    ("change", "at", "reason"),
    [
        ("UPDATE rows SET record = '{}' WHERE seq = 3", 3, "not what was written"),
        ("UPDATE rows SET time = time + 1 WHERE seq = 2", 2, "not what was written"),
        ("DELETE FROM rows WHERE seq = 4", 5, "row 4 is missing"),
        ("UPDATE rows SET seq = 60 WHERE seq = 6", 60, "row 6 is missing"),
    ],
)
async def test_whatever_is_changed_shows(path: Path, change: str, at: int, reason: str) -> None:
    await fill(path)
    with sqlite3.connect(path) as db:
        db.executescript("DROP TRIGGER rows_stay; DROP TRIGGER rows_are_kept;")
        db.execute(change)
    db.close()

    found = verify(path)

    assert (found.broken_at, found.reason is not None and reason in found.reason) == (at, True)


async def test_a_cut_off_end_shows_where_a_head_was_kept(path: Path) -> None:
    await fill(path)
    head = verify(path).head
    with sqlite3.connect(path) as db:
        db.executescript("DROP TRIGGER rows_are_kept;")
        db.execute("DELETE FROM rows WHERE seq > 4")
    db.close()

    assert verify(path).broken_at is None
    assert "cut off" in str(verify(path, contains=head).reason)


async def test_rows_cannot_be_changed_by_accident(path: Path) -> None:
    await fill(path)
    db = sqlite3.connect(path)
    for change in ("UPDATE rows SET kind = 'x'", "DELETE FROM rows"):
        with pytest.raises(sqlite3.IntegrityError):
            db.execute(change)
    db.close()


async def test_intents_without_an_outcome_are_marked_at_the_next_start(path: Path) -> None:
    audit = SqliteAudit(path)
    await audit.write("intent", "done", {})
    await audit.write("outcome", "done", {})
    await audit.write("intent", "lost", {})
    await audit.aclose()

    await SqliteAudit(path).aclose()
    await SqliteAudit(path).aclose()

    assert [(r.kind, r.request_id) for r in read_rows(path)][-1:] == [("interrupted", "lost")]
    found = verify(path)
    assert (found.rows, found.broken_at, found.unfinished, found.interrupted) == (4, None, 0, 1)


async def test_a_clock_that_jumps_back_breaks_nothing(path: Path) -> None:
    times = iter([1e9, 5.0, 2e9])
    audit = SqliteAudit(path, clock=lambda: next(times))
    for i in range(3):
        await audit.write("intent", f"r{i}", {})
    await audit.aclose()

    assert [r.time for r in read_rows(path)] == [1e9, 5.0, 2e9]
    assert verify(path).broken_at is None


async def test_a_full_disk_fails_the_rows_that_did_not_fit_and_no_other(path: Path) -> None:
    """SQLite's own limit on pages gives the same error as a disk without room."""
    audit = SqliteAudit(path)
    audit.store.db.execute("PRAGMA max_page_count=8")
    stored, failure = 0, None
    while failure is None and stored < 1000:
        try:
            await audit.write("intent", f"r{stored}", {"padding": "x" * 500})
        except Unavailable as error:
            failure = error
        else:
            stored += 1
    assert failure is not None
    assert "full" in failure.message
    audit.store.db.execute("PRAGMA max_page_count=100000")
    await audit.write("intent", "after", {})
    await audit.aclose()

    found = verify(path)
    assert (found.rows, found.broken_at) == (stored + 1, None)


async def test_what_tells_of_the_past_is_stored_once_there_is_room_again(path: Path) -> None:
    audit = SqliteAudit(path)
    await audit.write("intent", "r1", {})
    pages = audit.store.db.execute("PRAGMA page_count").fetchone()[0]
    audit.store.db.execute(f"PRAGMA max_page_count={pages}")
    for kind in ("outcome", "verdict", "intent"):
        with pytest.raises(Unavailable):
            await audit.write(kind, "r2" if kind == "intent" else "r1", {"padding": "x" * 100_000})
    audit.store.db.execute("PRAGMA max_page_count=100000")
    async with asyncio.timeout(10):
        while verify(path).rows < 3:
            await asyncio.sleep(0.05)
    await audit.aclose()

    assert [(r.kind, r.request_id) for r in read_rows(path)] == [("intent", "r1"), ("outcome", "r1"), ("verdict", "r1")]
    assert (verify(path).broken_at, audit.failures) == (None, 1)


async def test_what_was_late_is_counted_as_lost_when_the_process_ends(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audit = SqliteAudit(path)
    pages = audit.store.db.execute("PRAGMA page_count").fetchone()[0]
    audit.store.db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(Unavailable):
        await audit.write("outcome", "r1", {"padding": "x" * 100_000})
    await audit.aclose()

    assert audit.failures == 1
    assert "1 rows are lost: the process ends" in caplog.text


async def test_a_file_that_was_taken_away_is_noticed(path: Path) -> None:
    audit = SqliteAudit(path)
    await audit.write("intent", "r1", {})
    path.unlink()

    with pytest.raises(Unavailable):
        await audit.write("intent", "r2", {})
    await audit.aclose()


async def test_it_is_failing_until_a_row_is_stored_or_nobody_has_tried_for_a_while(path: Path) -> None:
    now = [0.0]
    audit = ChainedAudit(SqliteStore(path), steady=lambda: now[0])
    away = path.rename(path.with_name("away"))
    seen = [audit.is_failing]
    with pytest.raises(Unavailable):
        await audit.write("intent", "r1", {})
    seen.append(audit.is_failing)
    now[0] = FAILING_S
    seen.append(audit.is_failing)
    with pytest.raises(Unavailable):
        await audit.write("intent", "r2", {})
    seen.append(audit.is_failing)
    away.rename(path)
    await audit.write("intent", "r3", {})
    seen.append(audit.is_failing)
    await audit.aclose()

    assert seen == [False, True, False, True, False]


async def test_two_processes_do_not_write_one_audit(path: Path) -> None:
    audit = SqliteAudit(path)
    code = f"from hhh_router.trace.audit import SqliteAudit; SqliteAudit({str(path)!r})"
    other = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    await audit.aclose()

    assert "another process writes this audit" in other.stderr


def test_what_is_no_audit_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no database at all, but long enough to be looked at" * 50)
    with pytest.raises(SettingsError, match="no audit can be kept"):
        SqliteAudit(tmp_path / "x")
    with pytest.raises(SettingsError, match="no audit can be read"):
        verify(tmp_path / "missing")


async def test_the_file_is_its_owners_alone(path: Path) -> None:
    await SqliteAudit(path).aclose()

    assert path.stat().st_mode & 0o077 == 0


async def test_secrets_reach_no_row(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import re

    caplog.set_level(logging.DEBUG)
    audit = SqliteAudit(path, redactor=Redactor(patterns=[re.compile(r"CASE-\d+")]))
    record = {"path": f"/v1/x/{CANARY}", "deep": [{"password": "hunter2hunter2"}], "note": "CASE-4711"}
    await audit.write("intent", "r1", record)
    await audit.aclose()

    kept = b"".join(p.read_bytes() for p in path.parent.iterdir())
    for secret in (CANARY, "hunter2hunter2", "CASE-4711"):
        assert secret.encode() not in kept
        assert secret not in caplog.text


def test_a_killed_writer_loses_nothing_it_had_promised(path: Path) -> None:
    """SIGKILL at moments that differ: what was told as stored is there, and the chain is whole."""
    code = f"""
        import asyncio
        from hhh_router.trace.audit import SqliteAudit

        async def work():
            audit = SqliteAudit({str(path)!r})
            async def one(i):
                await audit.write("intent", f"{{i}}", {{}})
                print(i, flush=True)
            i = 0
            while True:
                await asyncio.gather(*(one(i + j) for j in range(5)))
                i += 5
        asyncio.run(work())
    """
    promised: set[str] = set()
    for i in range(5):
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as work:
            assert work.stdout is not None
            told = [work.stdout.readline() for _ in range(3 + 7 * i)]
            os.kill(work.pid, signal.SIGKILL)
            told += work.stdout.readlines()
        promised |= {t.strip() for t in told if t.endswith("\n")}
        kept = {r.request_id for r in read_rows(path) if r.kind == "intent"}
        assert promised <= kept
        assert verify(path).broken_at is None


async def test_the_command_verifies_shows_and_exports(path: Path) -> None:
    await fill(path)
    run = CliRunner()

    whole = run.invoke(app, ["audit", "verify", "--audit", str(path)])
    told = run.invoke(app, ["audit", "tail", "--audit", str(path), "-n", "2"])
    lines = run.invoke(app, ["audit", "export", "--audit", str(path)]).stdout.splitlines()

    assert (whole.exit_code, "6 rows, the chain is whole" in whole.stdout) == (0, True)
    assert [line.split()[2] for line in told.stdout.splitlines()] == ["intent", "outcome"]
    rows = [json.loads(line) for line in lines]
    assert [r["seq"] for r in rows] == [1, 2, 3, 4, 5, 6]
    before = rows[0]["hash"]
    row = rows[1]
    told_again = row_hash(before, seq=2, time=row["time"], kind="outcome", request_id="r0", record='{"status":200}')
    assert row["hash"] == told_again
    with sqlite3.connect(path) as db:
        db.execute("DROP TRIGGER rows_stay")
        db.execute("UPDATE rows SET record = '{}' WHERE seq = 1")
    db.close()
    broken = run.invoke(app, ["audit", "verify", "--audit", str(path)])
    assert (broken.exit_code, "broken at row 1" in broken.stderr) == (1, True)
