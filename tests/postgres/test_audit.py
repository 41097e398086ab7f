"""The audit in a real Postgres: as durable as the one in a file, and it goes on when the database was gone."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from hhh_router.cli.main import app
from hhh_router.errors import SettingsError, Unavailable
from hhh_router.trace.audit import ChainedAudit, Retention, read_rows, verify
from hhh_router.trace.audit.postgres import PostgresAudit, PostgresStore

from .server import PASSWORD, Relay, Server

pytestmark = pytest.mark.postgres

DAY = 86_400.0
NOW = 1_700_000_000.0


async def fill(url: str, requests: int = 3, **options: Any) -> None:
    audit = PostgresAudit(url, **options)
    for i in range(requests):
        await audit.write("intent", f"r{i}", {"path": "/v1/chat/completions"})
        await audit.write("outcome", f"r{i}", {"status": 200})
    await audit.aclose()


@contextmanager
def as_owner(url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with psycopg.connect(url, autocommit=True) as db:
        yield db


async def written_at_last(audit: ChainedAudit, request_id: str, *, within_s: float = 20) -> None:
    """Write again until it is stored."""
    until = time.monotonic() + within_s
    while True:
        try:
            return await audit.write("intent", request_id, {})
        except Unavailable:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.1)


async def test_a_row_can_be_read_by_others_when_write_returns(url: str) -> None:
    audit = PostgresAudit(url)
    await audit.write("intent", "r1", {"a": 1, "text": "ä\x00\ud800"})
    rows = list(read_rows(url))
    await audit.aclose()

    assert [(r.seq, r.kind, r.request_id) for r in rows] == [(1, "intent", "r1")]
    assert json.loads(rows[0].record) == {"a": 1, "text": "ä\x00\ud800"}
    assert verify(url).broken_at is None


async def test_rows_that_come_together_are_committed_together_and_all_chained(url: str) -> None:
    audit = PostgresAudit(url)
    await asyncio.gather(*(audit.write("intent", f"r{i}", {"i": i}) for i in range(300)))
    await audit.aclose()

    with as_owner(url) as db:
        transactions = db.execute("SELECT count(DISTINCT xmin::text) FROM hhh_audit").fetchone()
    found = verify(url)
    assert (found.rows, found.broken_at, found.unfinished) == (300, None, 300)
    assert transactions is not None
    assert transactions[0] <= 20


async def test_a_commit_waits_for_the_disk_whatever_the_role_says(url: str) -> None:
    with as_owner(url) as db:
        db.execute("ALTER ROLE hhh SET synchronous_commit = off")
        try:
            store = PostgresStore(url)
            assert store._db is not None
            said = store._db.execute("SHOW synchronous_commit").fetchone()
            store.close()
        finally:
            db.execute("ALTER ROLE hhh RESET synchronous_commit")

    assert said == ("on",)


@pytest.mark.parametrize(
    ("change", "at", "reason"),
    [
        ("UPDATE hhh_audit SET record = '{}' WHERE seq = 3", 3, "not what was written"),
        ("UPDATE hhh_audit SET time = time + 1 WHERE seq = 2", 2, "not what was written"),
        ("DELETE FROM hhh_audit WHERE seq = 4", 5, "row 4 is missing"),
        ("UPDATE hhh_audit SET seq = 60 WHERE seq = 6", 60, "row 6 is missing"),
    ],
)
async def test_whatever_is_changed_shows(url: str, change: str, at: int, reason: str) -> None:
    await fill(url)
    with as_owner(url) as db:
        with pytest.raises(psycopg.errors.RaiseException, match="rows of the audit stay"):
            db.execute(change)
        db.execute("ALTER TABLE hhh_audit DISABLE TRIGGER USER")
        db.execute(change)

    found = verify(url)

    assert (found.broken_at, found.reason is not None and reason in found.reason) == (at, True)


@pytest.mark.parametrize("change", ["TRUNCATE hhh_audit", "DELETE FROM hhh_audit", "TRUNCATE hhh_audit_anchors"])
async def test_rows_cannot_be_removed_by_accident(url: str, change: str) -> None:
    await fill(url)
    with as_owner(url) as db, pytest.raises(psycopg.errors.RaiseException):
        db.execute(change)


async def test_intents_without_an_outcome_are_marked_at_the_next_start(url: str) -> None:
    audit = PostgresAudit(url)
    await audit.write("intent", "done", {})
    await audit.write("outcome", "done", {})
    await audit.write("intent", "lost", {})
    await audit.aclose()

    await PostgresAudit(url).aclose()
    await PostgresAudit(url).aclose()

    assert [(r.kind, r.request_id) for r in read_rows(url)][-1:] == [("interrupted", "lost")]
    found = verify(url)
    assert (found.rows, found.broken_at, found.unfinished, found.interrupted) == (4, None, 0, 1)


async def test_one_process_writes_one_audit(url: str) -> None:
    audit = PostgresAudit(url)
    code = "import os; from hhh_router.trace.audit import open_writer; open_writer(os.environ['URL'])"
    other = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "URL": url}
    )
    await audit.aclose()
    await PostgresAudit(url).aclose()

    assert "another process writes this audit" in other.stderr
    assert PASSWORD not in other.stderr


async def test_audits_in_schemas_of_one_database_are_apart(url: str) -> None:
    with as_owner(url) as db:
        db.execute("CREATE SCHEMA one; CREATE SCHEMA two")
    audits = [PostgresAudit(f"{url}?options=-csearch_path%3D{name}") for name in ("one", "two")]
    for i, audit in enumerate(audits):
        for _ in range(i + 1):
            await audit.write("intent", "r", {})
        await audit.aclose()

    assert [verify(f"{url}?options=-csearch_path%3D{name}").rows for name in ("one", "two")] == [1, 2]


async def test_a_connection_that_is_lost_between_rows_costs_none(url: str) -> None:
    audit = PostgresAudit(url)
    await audit.write("intent", "r1", {})
    with as_owner(url) as db:
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'hhh-router audit' AND datname = current_database()"
        )
    await audit.write("outcome", "r1", {})
    await audit.aclose()

    found = verify(url)
    assert (found.rows, found.broken_at, found.unfinished, audit.failures) == (2, None, 0, 0)


async def test_a_commit_whose_answer_is_lost_is_neither_lost_nor_doubled(server: Server, url: str) -> None:
    relay = Relay(server.port)
    database = url.rpartition("/")[2]
    audit = PostgresAudit(server.url(database, port=relay.port))
    await audit.write("intent", "r1", {})
    relay.loses.set()
    await audit.write("outcome", "r1", {"status": 200})
    assert not relay.loses.is_set(), "the answer was lost"
    await audit.write("intent", "r2", {})
    await audit.aclose()
    relay.close()

    found = verify(url)
    assert [(r.kind, r.request_id) for r in read_rows(url)] == [("intent", "r1"), ("outcome", "r1"), ("intent", "r2")]
    assert (found.broken_at, audit.failures) == (None, 0)


async def test_while_the_database_is_gone_rows_fail_and_then_the_chain_goes_on(
    server: Server, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    audit = PostgresAudit(url)
    await audit.write("intent", "before", {})
    server.stop()
    try:
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(Unavailable, match="audit cannot be kept"):
                await audit.write("intent", "during", {})
            assert time.monotonic() - began < 2
    finally:
        server.start()
    await written_at_last(audit, "after")
    await audit.aclose()

    found = verify(url)
    assert [r.request_id for r in read_rows(url)] == ["before", "after"]
    assert (found.broken_at, audit.failures >= 3) == (None, True)
    assert "connected again" in caplog.text
    assert PASSWORD not in caplog.text


async def test_a_server_that_hangs_is_given_up_and_taken_up_again(url: str) -> None:
    audit = ChainedAudit(PostgresStore(url, hangs_s=0.5))
    await audit.write("intent", "before", {})
    with as_owner(url) as db:
        found = db.execute(
            "SELECT pid FROM pg_stat_activity "
            "WHERE application_name = 'hhh-router audit' AND datname = current_database()"
        ).fetchone()
    assert found is not None
    os.kill(found[0], signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await audit.write("intent", "during", {})
        waited = time.monotonic() - began
    finally:
        os.kill(found[0], signal.SIGCONT)
    await written_at_last(audit, "after")
    await audit.aclose()

    assert 0.4 < waited < 5
    assert verify(url).broken_at is None
    assert [r.request_id for r in read_rows(url)][-1] == "after"


async def test_rows_kept_long_enough_go_and_the_rest_verifies(url: str) -> None:
    for age in (40, 31, 2, 1):
        await fill(url, 1, clock=lambda age=age: NOW - age * DAY)

    audit = PostgresAudit(url, clock=lambda: NOW, retention=Retention(days=30))
    async with asyncio.timeout(10):
        while verify(url).removed < 4:
            await asyncio.sleep(0.02)
    await audit.write("intent", "new", {})
    await audit.aclose()

    found = verify(url)
    assert (found.broken_at, found.first, found.removed, found.since) == (None, 5, 4, NOW - 2 * DAY)
    with as_owner(url) as db:
        for change in (
            "DELETE FROM hhh_audit",
            "DELETE FROM hhh_audit_anchors",
            "UPDATE hhh_audit_anchors SET seq = 9",
            "INSERT INTO hhh_audit_anchors VALUES (6, 'made up')",
        ):
            with pytest.raises(psycopg.errors.RaiseException):
                db.execute(change)


async def test_a_role_that_may_make_nothing_can_write_what_is_there(server: Server, url: str) -> None:
    await PostgresAudit(url).aclose()
    with as_owner(url) as db:
        db.execute("CREATE ROLE writer LOGIN PASSWORD 'w'; GRANT SELECT, INSERT ON hhh_audit TO writer")
        db.execute("GRANT SELECT ON hhh_audit_anchors TO writer; REVOKE CREATE ON SCHEMA public FROM public")
    theirs = url.replace(f"hhh:{PASSWORD}@", "writer:w@")

    await fill(theirs)
    refused = PostgresAudit(theirs)
    with pytest.raises(Exception, match="permission denied"):
        refused.prune_some(Retention(days=1e-9))
    await refused.aclose()

    assert verify(theirs).rows == 6


def test_what_cannot_be_opened_is_told_without_its_password(server: Server, url: str) -> None:
    for wrong in (server.url(password="hunter2hunter2"), url.replace(str(server.port), "1"), f"{url}?oops={PASSWORD}"):
        with pytest.raises(SettingsError) as raised:
            PostgresAudit(wrong)
        assert PASSWORD not in str(raised.value)
        assert "hunter2" not in str(raised.value)
    with pytest.raises(SettingsError, match="no audit can be read"):
        verify(server.url("template1"))


async def test_the_commands_take_the_url_from_the_environment_and_never_show_its_password(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await fill(url)
    monkeypatch.setenv("HHH_ROUTER_AUDIT_URL", url)
    run = CliRunner()

    said = {
        name: await asyncio.to_thread(run.invoke, app, ["audit", name, *more])
        for name, more in {"verify": (), "tail": ("-n", "2"), "export": (), "prune": ("--keep-mb", "1000")}.items()
    }

    assert {name: s.exit_code for name, s in said.items()} == dict.fromkeys(said, 0)
    assert "6 rows, the chain is whole" in said["verify"].stdout
    assert [line.split()[2] for line in said["tail"].stdout.splitlines()] == ["intent", "outcome"]
    assert [json.loads(line)["seq"] for line in said["export"].stdout.splitlines()] == [1, 2, 3, 4, 5, 6]
    assert "0 rows removed" in said["prune"].stdout
    assert PASSWORD not in "".join(s.output for s in said.values()) + caplog.text
    refused = await asyncio.to_thread(run.invoke, app, ["audit", "verify", "--audit", url])
    assert refused.exit_code == 2
    assert "HHH_ROUTER_AUDIT_URL" in refused.output
    assert PASSWORD not in refused.output


def test_a_killed_writer_loses_nothing_it_had_promised(url: str) -> None:
    code = """
        import asyncio, os
        from hhh_router.trace.audit import open_writer

        async def work():
            audit = open_writer(os.environ["URL"])
            async def one(i):
                await audit.write("intent", f"{i}", {})
                print(i, flush=True)
            i = 0
            while True:
                await asyncio.gather(*(one(i + j) for j in range(5)))
                i += 5
        asyncio.run(work())
    """
    promised: set[str] = set()
    for i in range(3):
        work = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "URL": url},
        )  # fmt: skip
        with work:
            assert work.stdout is not None
            told = [work.stdout.readline() for _ in range(3 + 7 * i)]
            os.kill(work.pid, signal.SIGKILL)
            told += work.stdout.readlines()
        promised |= {t.strip() for t in told if t.endswith("\n")}
        assert promised <= {r.request_id for r in read_rows(url) if r.kind == "intent"}
        assert verify(url).broken_at is None
