"""A sidecar whose audit is in Postgres, and what its callers see when the database is gone."""

import asyncio
import json
import time

import pytest

from hhh_router.trace.audit import open_audit, read_rows, verify
from tests.e2e.loopback import served_app
from tests.e2e.sidecars import Said, Stub, ask, route_to, sidecar

from .server import Server

pytestmark = pytest.mark.postgres

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
REPLY = {
    "id": "x",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
}


@pytest.mark.parametrize(("failure", "status"), [("closed", 503), ("open", 200)])
def test_while_the_database_is_gone_the_deployment_decides_and_then_it_goes_on(
    server: Server, url: str, failure: str, status: int
) -> None:
    stub = Stub(Said(pieces=[json.dumps(REPLY).encode()]))
    with (
        served_app(stub) as upstream,
        sidecar(route_to(upstream.removesuffix("/v1")), audit=open_audit(url), audit_failure=failure) as (at, _),
    ):
        assert ask(at, body=BODY)[0] == 200
        server.stop()
        try:
            during = [ask(at, body=BODY) for _ in range(3)]
        finally:
            server.start()
        until = time.monotonic() + 20
        while ask(at, body=BODY)[0] != 200 or verify(url).rows < 4:
            assert time.monotonic() < until
            time.sleep(0.1)

    assert [got[0] for got in during] == [status] * 3
    assert all((b"Hello" in got[2]) == (status == 200) for got in during)
    found = verify(url)
    assert (found.broken_at, found.unfinished) == (None, 0)
    outcomes = [json.loads(r.record) for r in read_rows(url) if r.kind == "outcome"]
    assert [o["status"] for o in outcomes] == [200] * len(outcomes)


def test_rows_of_many_requests_at_once_chain(url: str) -> None:
    stub = Stub(Said(pieces=[json.dumps(REPLY).encode()]))

    async def many(at: str) -> list[int]:
        told = await asyncio.gather(*(asyncio.to_thread(ask, at, body=BODY) for _ in range(40)))
        return [status for status, _, _ in told]

    with (
        served_app(stub) as upstream,
        sidecar(route_to(upstream.removesuffix("/v1")), audit=open_audit(url)) as (at, _),
    ):
        statuses = asyncio.run(many(at))

    found = verify(url)
    assert statuses == [200] * 40
    assert (found.rows, found.broken_at, found.unfinished) == (80, None, 0)
