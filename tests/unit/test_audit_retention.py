"""Rows that were kept long enough go, in order and told of; what is left still verifies."""

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hhh_router.cli.main import app
from hhh_router.trace.audit import Retention, SqliteAudit, read_rows, verify
from hhh_router.trace.audit.writer import MOST_PRUNED

DAY = 86_400.0
NOW = 1_700_000_000.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.sqlite3"


async def fill(path: Path, *ages_days: float, record: str = "x") -> None:
    """An intent and an outcome of each age, oldest first."""
    for i, age in enumerate(ages_days):
        audit = SqliteAudit(path, clock=lambda age=age: NOW - age * DAY)  # type: ignore[misc]
        await audit.write("intent", f"r{i}", {"record": record})
        await audit.write("outcome", f"r{i}", {"status": 200})
        await audit.aclose()


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not claim():
            await asyncio.sleep(0.01)


async def test_old_rows_go_at_the_start_and_the_rest_verifies(path: Path) -> None:
    await fill(path, 40, 31, 2, 1)

    audit = SqliteAudit(path, clock=lambda: NOW, retention=Retention(days=30))
    await until(lambda: verify(path).removed == 4)
    await audit.write("intent", "new", {})
    await audit.aclose()

    found = verify(path)
    assert (found.broken_at, found.first, found.removed, found.rows) == (None, 5, 4, 6)
    assert found.since == NOW - 2 * DAY
    kinds = [(r.seq, r.kind) for r in read_rows(path)][-2:]
    assert kinds == [(9, "pruned"), (10, "intent")]


async def test_nothing_young_goes_although_older_rows_follow_it(path: Path) -> None:
    """A clock that was wrong for a while puts old times behind young ones."""
    await fill(path, 40, 1, 40)

    audit = SqliteAudit(path, clock=lambda: NOW, retention=Retention(days=30))
    await until(lambda: verify(path).removed == 2)
    await audit.aclose()

    assert [r.request_id for r in read_rows(path)] == ["r1", "r1", "r2", "r2", ""]


async def test_a_clock_that_jumps_ahead_while_it_runs_removes_nothing(path: Path) -> None:
    await fill(path, 2, 1)
    times = [NOW]
    audit = SqliteAudit(path, clock=lambda: times[0], retention=Retention(days=30))
    times[0] += 400 * DAY

    assert audit.prune_some(Retention(days=30)) == 0
    assert audit.prune_some(Retention(days=1.5)) == 2
    await audit.aclose()


async def test_the_oldest_go_when_all_take_too_much(path: Path) -> None:
    await fill(path, *range(8, 0, -1), record="x" * 500_000)

    audit = SqliteAudit(path, clock=lambda: NOW, retention=Retention(megabytes=2))
    await until(lambda: verify(path).removed > 0)
    await audit.aclose()

    found = verify(path)
    left = sum(len(r.record) for r in read_rows(path))
    assert found.broken_at is None
    assert 1_400_000 < left <= 2_000_000


async def test_many_rows_go_in_steps(path: Path) -> None:
    audit = SqliteAudit(path, clock=lambda: NOW - 40 * DAY)
    await asyncio.gather(*(audit.write("verdict", f"r{i}", {}) for i in range(2 * MOST_PRUNED + 10)))
    await audit.aclose()

    audit = SqliteAudit(path, clock=lambda: NOW, retention=Retention(days=30))
    await until(lambda: verify(path).removed == 2 * MOST_PRUNED + 10)
    await audit.aclose()

    assert [r.kind for r in read_rows(path)] == ["pruned"] * 3
    assert verify(path).broken_at is None


async def test_what_was_removed_is_not_in_the_file_any_more(path: Path) -> None:
    await fill(path, 40, 1, record="swordfish")
    assert CliRunner().invoke(app, ["audit", "prune", "--audit", str(path), "--keep-days", "10000"]).exit_code == 0
    assert b"swordfish" in path.read_bytes()

    said = CliRunner().invoke(app, ["audit", "prune", "--audit", str(path), "--keep-days", "0"])

    assert said.exit_code == 0, said.output
    assert b"swordfish" not in b"".join(p.read_bytes() for p in path.parent.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM rows WHERE seq <= 2",
        "INSERT INTO anchors VALUES (2, 'made up')",
        "UPDATE anchors SET seq = 6",
        "DELETE FROM anchors",
    ],
)
async def test_nothing_else_removes_rows_or_moves_the_anchor(path: Path, change: str) -> None:
    await fill(path, 3, 2, 1)
    if "anchors" in change and "INSERT" not in change:
        CliRunner().invoke(app, ["audit", "prune", "--audit", str(path), "--keep-days", "0"])
    db = sqlite3.connect(path)

    with pytest.raises(sqlite3.IntegrityError):
        db.execute(change)
    db.close()


async def test_rows_that_went_without_a_row_that_says_so_show(path: Path) -> None:
    """Somebody who can write the file makes an anchor, and removes what it covers."""
    await fill(path, 3, 2, 1)
    db = sqlite3.connect(path)
    db.execute("INSERT INTO anchors SELECT seq, hash FROM rows WHERE seq = 2")
    db.execute("DELETE FROM rows WHERE seq <= 2")
    db.commit()
    db.close()

    found = verify(path)

    assert found.broken_at == 3
    assert "no later row says" in str(found.reason)


async def test_a_head_from_before_is_found_at_the_anchor_or_missed_with_a_reason(path: Path) -> None:
    await fill(path, 3, 2, 1)
    heads = [r.hash for r in read_rows(path)]
    CliRunner().invoke(app, ["audit", "prune", "--audit", str(path), "--keep-mb", "1000"])
    assert verify(path, contains=heads[0]).broken_at is None
    last = json.dumps({"hash": heads[3], "through": 4})
    audit = SqliteAudit(path, clock=lambda: NOW)
    assert audit.prune_some(Retention(days=1.5)) == 4
    await audit.aclose()

    assert json.loads(next(r.record for r in read_rows(path) if r.kind == "pruned")) == json.loads(last)
    assert verify(path, contains=heads[3]).broken_at is None
    assert verify(path, contains=heads[5]).broken_at is None
    assert "removed with what was kept long enough" in str(verify(path, contains=heads[0]).reason)


async def test_the_command_says_from_when_on_the_audit_is_whole(path: Path) -> None:
    await fill(path, 3, 1)
    audit = SqliteAudit(path, clock=lambda: NOW)
    audit.prune_some(Retention(days=2))
    await audit.aclose()

    said = CliRunner().invoke(app, ["audit", "verify", "--audit", str(path)]).stdout

    assert "3 rows, the chain is whole" in said
    assert "since        2023-11-13T22:13:20.000+00:00" in said
    assert "removed      2, which were kept long enough" in said


async def test_an_audit_that_is_written_is_not_pruned_from_outside(path: Path) -> None:
    audit = SqliteAudit(path)
    said = await asyncio.to_thread(
        CliRunner().invoke, app, ["audit", "prune", "--audit", str(path), "--keep-days", "1"]
    )
    await audit.aclose()

    assert said.exit_code != 0
    assert "another process writes this audit" in said.output


async def test_an_audit_of_an_earlier_version_goes_on(path: Path) -> None:
    """Without a table of anchors, and with a trigger that let no row go."""
    await fill(path, 40, 1)
    db = sqlite3.connect(path)
    db.executescript(
        "DROP TRIGGER rows_are_kept; DROP TABLE anchors;"
        "CREATE TRIGGER rows_are_kept BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'rows are kept'); END;"
    )
    db.close()
    assert verify(path).broken_at is None

    audit = SqliteAudit(path, clock=lambda: NOW, retention=Retention(days=30))
    await until(lambda: verify(path).removed == 2)
    await audit.aclose()

    assert verify(path).broken_at is None
