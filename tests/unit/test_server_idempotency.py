"""A request that is sent again under its key is not generated again."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from hhh_router.errors import GeneratorError
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.idempotency import LONGEST_S
from hhh_router.pipeline.kept import Kept
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

Policies = Callable[..., Path]
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "hhh-auto", "messages": HELLO},
    "/v1/responses": {"model": "hhh-auto", "input": "Hello"},
    "/v1/messages": {"model": "hhh-auto", "messages": HELLO, "max_tokens": 8},
}
KEY = {"idempotency-key": "6e1f3c52-one"}


def app(generator: FakeGenerator, policy: Path, **settings: Any) -> Any:
    return create_app(fake_pipeline(policy, reader=FakeReader(), generator=generator, **settings))


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator("one two three four", reader=FakeReader())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_the_same_request_gets_the_same_reply(
    watchful: Policies, generator: FakeGenerator, path: str, stream: bool
) -> None:
    with TestClient(app(generator, watchful())) as served:
        first = served.post(path, json=BODIES[path] | {"stream": stream}, headers=KEY)
        again = served.post(path, json=BODIES[path] | {"stream": stream}, headers=KEY)
        other = served.post(path, json=BODIES[path] | {"stream": stream}, headers={"idempotency-key": "two"})
        without = served.post(path, json=BODIES[path] | {"stream": stream})

    assert len(generator.requests) == 3
    assert again.content == first.content
    assert again.status_code == 200
    assert again.headers["x-hhh-request-id"] == first.headers["x-hhh-request-id"]
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["content-type"] == first.headers["content-type"]
    assert other.headers["x-hhh-request-id"] != first.headers["x-hhh-request-id"]
    assert not any("idempotent-replayed" in reply.headers for reply in (first, other, without))


def test_the_order_of_fields_makes_no_other_request(watchful: Policies, generator: FakeGenerator) -> None:
    body = BODIES["/v1/messages"]
    with TestClient(app(generator, watchful())) as served:
        for sent in (body, dict(reversed(body.items()))):
            assert served.post("/v1/messages", json=sent, headers=KEY).status_code == 200

    assert len(generator.requests) == 1


@pytest.mark.parametrize("path", BODIES)
def test_another_request_under_the_key_is_refused_in_the_wires_own_shape(
    watchful: Policies, generator: FakeGenerator, path: str
) -> None:
    with TestClient(app(generator, watchful())) as served:
        served.post(path, json=BODIES[path], headers=KEY)
        reply = served.post(path, json=BODIES[path] | {"temperature": 0.5}, headers=KEY)

    assert reply.status_code == 422
    assert "use a new key" in reply.json()["error"]["message"]
    assert (reply.json().get("type") == "error") == (path == "/v1/messages")
    assert len(generator.requests) == 1


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "two words", "k\xe4y".encode("latin-1")])
def test_what_is_no_key_is_refused(watchful: Policies, generator: FakeGenerator, key: str | bytes) -> None:
    with TestClient(app(generator, watchful())) as served:
        reply = served.post(
            "/v1/chat/completions", json=BODIES["/v1/chat/completions"], headers={"idempotency-key": key}
        )

    assert reply.status_code == 400
    assert "idempotency-key" in reply.json()["error"]["message"]
    assert generator.requests == []


def test_keys_belong_to_their_caller(watchful: Policies, generator: FakeGenerator, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    entries = [f"  - {{name: {n}, sha256: {hashlib.sha256(n.encode()).hexdigest()}}}" for n in ("ann", "ben")]
    file.write_text("\n".join(["keys:", *entries]))
    with TestClient(app(generator, watchful(), api_keys_file=file)) as served:
        ids = [
            served.post(
                "/v1/chat/completions",
                json=BODIES["/v1/chat/completions"],
                headers=KEY | {"authorization": f"Bearer {name}"},
            ).headers["x-hhh-request-id"]
            for name in ("ann", "ben", "ann")
        ]

    assert ids[0] == ids[2] != ids[1]


def test_after_an_error_the_next_try_is_a_new_one(watchful: Policies) -> None:
    for stream in (False, True):
        broken = FakeGenerator("a b c d e", reader=FakeReader(), fail_after=(4, GeneratorError("out of memory")))
        with TestClient(app(broken, watchful(on_error="open"))) as served:
            body = BODIES["/v1/chat/completions"] | {"stream": stream}
            replies = [served.post("/v1/chat/completions", json=body, headers=KEY) for _ in range(2)]

        assert len(broken.requests) == 2
        assert not any("idempotent-replayed" in reply.headers for reply in replies)


async def test_a_request_under_way_is_waited_for(watchful: Policies) -> None:
    slow = FakeGenerator("one two three four", reader=FakeReader(), delay_s=0.05)
    async with client(slow, watchful()) as served:
        replies = await asyncio.gather(*(_post(served) for _ in range(3)))

    assert len(slow.requests) == 1
    assert len({r.content for r in replies}) == 1
    assert sorted("idempotent-replayed" in r.headers for r in replies) == [False, True, True]


async def test_a_caller_that_will_not_wait_is_told_to_come_back(watchful: Policies) -> None:
    slow = FakeGenerator("one two three four", reader=FakeReader(), delay_s=0.2)
    async with client(slow, watchful()) as served:
        first = asyncio.ensure_future(_post(served))
        await asyncio.sleep(0.05)
        second = await _post(served, headers={"x-request-timeout-ms": "50"})
        await first

    assert second.status_code == 409
    assert second.json()["error"]["code"] == "idempotency_in_progress"
    assert first.result().status_code == 200


async def test_when_the_first_caller_leaves_the_next_takes_its_turn(watchful: Policies) -> None:
    slow = FakeGenerator("one two three four", reader=FakeReader(), delay_s=0.1)
    served = app(slow, watchful())
    first = asyncio.ensure_future(_raw(served, leaves_after_s=0.05))
    await asyncio.sleep(0.02)

    second = await _raw(served)

    assert await first == []
    assert second[0]["status"] == 200
    assert slow.cancelled == 1
    assert len(slow.requests) == 2


def test_replies_are_forgotten_by_number_size_and_age() -> None:
    now = [0.0]
    kept = Kept[str, str](most=3, most_size=10, longest_s=LONGEST_S, clock=lambda: now[0])
    for name in "abcd":
        kept.keep(name, name, size=1)
    kept.keep("large", "large", size=9)

    assert [kept.find(n) for n in "abcd"] == [None, None, None, "d"]
    kept.keep("larger than all", "x", size=11)
    assert kept.find("larger than all") is None
    kept.keep("old", "old", size=1)
    now[0] = LONGEST_S + 1
    assert kept.find("old") is None


def client(generator: FakeGenerator, policy: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app(generator, policy)), base_url="http://test")


async def _post(served: httpx.AsyncClient, headers: dict[str, str] | None = None) -> httpx.Response:
    path = "/v1/chat/completions"
    return await served.post(path, json=BODIES[path], headers=KEY | (headers or {}))


async def _raw(served: Any, *, leaves_after_s: float | None = None) -> list[dict[str, Any]]:
    """The ASGI messages of one request whose client may leave."""
    path = "/v1/chat/completions"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in KEY.items()],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
    }
    given = [{"type": "http.request", "body": json.dumps(BODIES[path]).encode(), "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await asyncio.sleep(3600 if leaves_after_s is None else leaves_after_s)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await served(scope, receive, send)
    return sent
