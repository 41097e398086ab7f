"""Holding a call at a door: told of, heard of, and never let run by a failure."""

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from hhh_router.errors import Unavailable
from hhh_router.interfaces.held import Asked, HeldCall, HeldCalls
from hhh_router.interfaces.holding import Holding
from hhh_router.interfaces.webhook import Webhook

ASKED = Asked(
    door="test", request_id="hhh-1", session="s", tool="t", arguments={"a": 1}, policy="p@1", rule="r", reason="why"
)  # fmt: skip


@pytest.fixture
def held(tmp_path: Path) -> HeldCalls:
    return HeldCalls(tmp_path / "held.sqlite3", poll_s=0.01)


async def test_whoever_asked_and_the_webhook_hear_of_a_held_call(held: HeldCalls) -> None:
    told: list[dict] = []

    def answer(request: httpx.Request) -> httpx.Response:
        told.append(json.loads(request.content))
        return httpx.Response(204)

    heard: list[int] = []

    async def beat(call: HeldCall, n: int) -> None:
        heard.append(n)
        held.settle(call.id, "approved")

    webhook = Webhook(None, transport=httpx.MockTransport(answer))
    found = await Holding(held, webhook, hold_s=30, url="https://h.example").hold(ASKED, beat=beat)
    await webhook.aclose()

    assert found.status == "approved"
    assert heard == [1]
    assert (told[0]["event"], told[0]["call"]["id"], told[0]["call"]["arguments"]) == ("held", found.id, {"a": 1})


async def test_a_queue_that_fails_is_an_error_of_its_own(held: HeldCalls) -> None:
    async def beat(call: HeldCall, n: int) -> None:
        with closing(sqlite3.connect(held.path)) as db, db:
            db.execute("DELETE FROM calls")

    with pytest.raises(Unavailable, match="not in the queue"):
        await Holding(held, Webhook(None), hold_s=30).hold(ASKED, beat=beat)


async def test_a_beat_that_fails_lets_nothing_run_and_hides_nothing(held: HeldCalls) -> None:
    async def beat(call: HeldCall, n: int) -> None:
        raise OSError("the client has gone")

    found = await Holding(held, Webhook(None), hold_s=0.1).hold(ASKED, beat=beat)

    assert found.status == "expired"


async def test_a_cancelled_hold_leaves_no_beat_behind(held: HeldCalls) -> None:
    async def beat(call: HeldCall, n: int) -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(Holding(held, Webhook(None), hold_s=30).hold(ASKED, beat=beat))
    while not held.calls():
        await asyncio.sleep(0.01)

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert [c.status for c in held.calls(everything=True)] == ["abandoned"]
    assert len(asyncio.all_tasks()) == 1
