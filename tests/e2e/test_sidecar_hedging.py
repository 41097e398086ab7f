"""A second upstream is asked where the first is silent for long; whoever answers first has it."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hhh_router.interfaces.proxy.hedging import Hedge
from hhh_router.interfaces.proxy.routes import Route
from hhh_router.interfaces.proxy.upstreams import Timeouts, Upstream
from hhh_router.trace.audit import SqliteAudit, read_rows

from .loopback import served_app
from .sidecars import Said, Stub, ask, closed_port, route_to, sidecar, tcp
from .test_sidecar_guarded import GOOD, Model, user

pytestmark = pytest.mark.e2e

BODY = {"model": "m", "messages": [user("Hi")]}
WORD = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "late"}}]}).encode()
modes = pytest.mark.parametrize("mode", ["observe", "annotate", "enforce"])


@dataclass
class Slow:
    """An upstream that answers after a while, or never, and knows who left."""

    after_s: float | None
    asked: int = 0
    left: list[float] = field(default_factory=list)
    """When somebody hung up before the answer."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        try:
            async with asyncio.timeout(self.after_s):
                while await reader.read(65_536):
                    pass
            self.left.append(time.monotonic())
        except TimeoutError:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(WORD)
            writer.write(head + WORD)
            await writer.drain()


def hedged(first: str, second: str, *, after_s: float = 0.1, **more: Any) -> Route:
    other = Upstream(name="other", url=second, timeouts=Timeouts(first_byte_s=20, idle_s=20))
    return replace(route_to(first, **more), hedge=Hedge(after_s=after_s, to=other))


@contextmanager
def fast() -> Iterator[tuple[Stub, str]]:
    upstream = Stub(Model())
    with served_app(upstream) as url:
        yield upstream, url.removesuffix("/v1")


@modes
def test_who_is_silent_for_long_loses_to_the_other_and_is_left_at_once(mode: str, tmp_path: Path) -> None:
    slow = Slow(None)
    path = tmp_path / "audit.sqlite3"
    with (
        fast() as (other, url_of_other),
        tcp(slow) as silent,
        sidecar(hedged(silent, url_of_other, mode=mode), audit=SqliteAudit(path)) as (url, _),
    ):
        status, headers, said = ask(url, body=BODY)
        answered = time.monotonic()
        metrics = ask(url, "GET", "/hhh/metrics", None, [])[2].decode()
        while not slow.left and time.monotonic() < answered + 5:
            time.sleep(0.01)

    assert (status, json.loads(said)["choices"][0]["message"]["content"]) == (200, GOOD)
    assert (slow.asked, len(other.asked), len(slow.left)) == (1, 1, 1)
    assert slow.left[0] < answered + 1
    if mode != "observe":
        assert (dict(headers)["x-hhh-upstream"], dict(headers)["x-hhh-hedge"]) == ("other", "won")
    outcome = next(json.loads(r.record) for r in read_rows(path) if r.kind == "outcome")
    assert (outcome["hedge"], outcome["upstreams"]) == ("won", ["other: asked beside a", "other: 200"])
    assert 'hhh:proxy_hedges_total{outcome="won",upstream="other"} 1.0' in metrics


def test_who_answers_in_time_is_alone() -> None:
    with fast() as (_, first), fast() as (other, second), sidecar(hedged(first, second, after_s=10)) as (url, _):
        status, headers, _ = ask(url, body=BODY)

    assert (status, len(other.asked), "x-hhh-hedge" in dict(headers)) == (200, 0, False)


def test_the_first_may_still_win() -> None:
    first, second = Slow(0.5), Slow(None)
    with tcp(first) as a, tcp(second) as b, sidecar(hedged(a, b, mode="annotate")) as (url, _):
        status, headers, said = ask(url, body=BODY)
        end = time.monotonic() + 5
        while not second.left and time.monotonic() < end:
            time.sleep(0.01)

    assert (status, b"late" in said, dict(headers)["x-hhh-hedge"]) == (200, True, "lost")
    assert (second.asked, len(second.left)) == (1, 1)


def test_an_answer_that_turns_the_request_away_wins_nothing() -> None:
    busy = Stub(Said(status=503, pieces=[b"{}"]))
    with (
        tcp(Slow(0.5)) as a,
        served_app(busy) as b,
        sidecar(hedged(a, b.removesuffix("/v1"), mode="observe")) as (url, _),
    ):
        status, _, said = ask(url, body=BODY)

    assert (status, said, len(busy.asked)) == (200, WORD, 1)


def test_where_neither_answers_the_fallback_does() -> None:
    with fast() as (_, third), tcp(Slow(None)) as silent:
        route = hedged(silent, closed_port(), fallback=(third,), timeouts=Timeouts(first_byte_s=0.4), mode="enforce")
        with sidecar(route) as (url, _):
            status, headers, _ = ask(url, body=BODY)

    assert (status, dict(headers)["x-hhh-upstream"], dict(headers)["x-hhh-hedge"]) == (200, "b", "lost")


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"store": True}),
        ("/v1/chat/completions", {"tools": [{"type": {"odd": 1}}]}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"max_tokens": 9, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ("/v1/embeddings", {"input": "Hi"}),
    ],
)
def test_what_must_not_be_done_twice_is_asked_once(path: str, more: dict[str, Any]) -> None:
    first = Stub(lambda asked: time.sleep(0.3) or Said(pieces=[WORD]))  # type: ignore[func-returns-value]
    with (
        served_app(first) as a,
        fast() as (other, b),
        sidecar(hedged(a.removesuffix("/v1"), b, mode="observe", after_s=0.05)) as (url, _),
    ):
        status = ask(url, path=path, body={**BODY, **more})[0]

    assert (status, len(first.asked), len(other.asked)) == (200, 1, 0)
