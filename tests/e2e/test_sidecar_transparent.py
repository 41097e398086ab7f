"""Whatever no rule acts on passes the sidecar byte for byte, both ways."""

import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .loopback import served_app
from .sidecars import Asked, Said, Stub, ask, route_to, sidecar, sse

pytestmark = pytest.mark.e2e

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "unheard_of": {"x": [1, 2.50]}}


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    upstream = Stub()
    with served_app(upstream) as url:
        yield upstream, url.removesuffix("/v1")


def direct_and_through(stub: Stub, direct: str, through: str, *args: Any, **more: Any) -> tuple[Any, Any]:
    """The same request both ways: (what the upstream got, what the client got) each."""
    got = []
    for url in (direct, through):
        answer = ask(url, *args, **more)
        got.append((stub.asked[-1], answer))
    return got[0], got[1]


def without_host(asked: Asked) -> list[tuple[bytes, bytes]]:
    """An empty body may be said (``Content-Length: 0``) or not: it is the same request."""
    return [(n, v) for n, v in asked.headers if n != b"host" and (n, v) != (b"content-length", b"0")]


JSON = [("Content-Type", "application/json"), ("Authorization", "Bearer sk-1"), ("X-Many", "a"), ("x-many", "b")]
REQUESTS = {
    "chat": ("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), JSON),
    "odd spacing": ("POST", "/v1/chat/completions", b'{ "messages" : [ ] ,\n"n":1.0}', JSON),
    "no json": ("POST", "/v1/chat/completions", b"\xff\x00 not json", JSON),
    "our field": ("POST", "/v1/chat/completions", b'{"hhh": {"weights": "hhh@0-16-0-0"}, "messages": []}', JSON),
    "our field, no json": ("POST", "/v1/chat/completions", b'{"hhh": ', JSON),
    "responses": ("POST", "/v1/responses", b'{"input": "Hi"}', JSON),
    "messages": ("POST", "/v1/messages?beta=true", b'{"messages": []}', [*JSON, ("anthropic-version", "2023-06-01")]),
    "embeddings": ("POST", "/v1/embeddings", b'{"input": ["a"]}', JSON),
    "models": ("GET", "/v1/models", None, JSON),
    "delete": ("DELETE", "/v1/files/file-1", None, JSON),
    "query": ("GET", "/v1/x%2Fy/z?a=1&a=2&b=%20c", None, []),
    "double slash": ("GET", "/v1//models/", None, []),
    "options": ("OPTIONS", "/v1/models", None, [("Origin", "http://x")]),
    "multipart": (
        "POST",
        "/v1/audio/transcriptions",
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + bytes(range(256)) * 50 + b"\r\n--b--\r\n",
        [("Content-Type", "multipart/form-data; boundary=b")],
    ),
    "compressed": (
        "POST",
        "/v1/chat/completions",
        gzip.compress(json.dumps(CHAT).encode(), mtime=0),
        [*JSON, ("Content-Encoding", "gzip"), ("Accept-Encoding", "gzip, br")],
    ),
    "empty body": ("POST", "/v1/batches/b1/cancel", b"", JSON),
    "own agent": ("GET", "/v1/models", None, [("User-Agent", "app/1.0"), ("Accept", "*/*")]),
}
ANSWERS = {
    "json": Said(headers=[(b"content-type", b"application/json"), (b"x-request-id", b"r1")], pieces=[b'{"a": 1.0}']),
    "duplicates": Said(headers=[(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"date", b"then")], pieces=[b"x"]),
    "length": Said(headers=[(b"content-length", b"5")], pieces=[b"hello"]),
    "binary": Said(headers=[(b"content-type", b"audio/mpeg")], pieces=[bytes(range(256)) * 100] * 5),
    "gzip": Said(
        headers=[(b"content-type", b"application/json"), (b"content-encoding", b"gzip")],
        pieces=[gzip.compress(b'{"choices": []}', mtime=0)],
    ),
    "events": Said(
        headers=[(b"content-type", b"text/event-stream; charset=utf-8")],
        pieces=[b": hi\r\n\r\n", b'data: {"odd":  1}\r\n', b"\r\ndata: [DO", b"NE]\n\n"],
    ),
    "no content": Said(status=204, headers=[(b"x-a", b"b")]),
    "redirect": Said(status=307, headers=[(b"location", b"http://elsewhere/")]),
    "error": Said(status=429, headers=[(b"retry-after", b"7")], pieces=[b'{"error": {"message": "slow down"}}']),
    "server error": Said(status=500, pieces=[b"<html>oh</html>"]),
    "overloaded": Said(status=529, pieces=[b'{"type":"error"}']),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_arrives_as_it_was_sent(stub: tuple[Stub, str], name: str) -> None:
    method, path, body, headers = REQUESTS[name]
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        direct, through = direct_and_through(stub[0], stub[1], url, method, path, body, headers)

    assert (through[0].method, through[0].target, through[0].body) == (method, path.encode(), body or b"")
    assert sorted(without_host(through[0])) == sorted(without_host(direct[0]))
    assert through[0].header("x-many") == direct[0].header("x-many")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_arrives_as_it_was_sent(stub: tuple[Stub, str], name: str, path: str) -> None:
    stub[0].answer = ANSWERS[name]
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        direct, through = direct_and_through(stub[0], stub[1], url, "POST", path, CHAT)

    def told(answer: Any) -> Any:
        status, headers, body = answer
        ours = {"date"} if name != "duplicates" else set()  # the stub's own server dates its answers
        kept = [(n.lower(), v) for n, v in headers if n.lower() not in {"connection", "server"} | ours]
        return status, sorted(kept), body

    assert told(through[1]) == told(direct[1])


def test_head_has_the_headers_and_no_body(stub: tuple[Stub, str]) -> None:
    stub[0].answer = Said(headers=[(b"content-length", b"5")], pieces=[])
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        status, headers, body = ask(url, "HEAD", "/v1/models", None, [])

    assert (status, body, dict(headers)["content-length"]) == (200, b"", "5")


def test_hop_by_hop_headers_stay_on_their_hop(stub: tuple[Stub, str]) -> None:
    stub[0].answer = Said(headers=[(b"keep-alive", b"timeout=9"), (b"x-kept", b"1")], pieces=[b"x"])
    sent = [("Connection", "close, X-Private"), ("X-Private", "1"), ("TE", "trailers"), ("Proxy-Authorization", "b")]
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        _, headers, _ = ask(url, "GET", "/v1/models", None, sent)

    names = {n for n, _ in stub[0].asked[0].headers}
    assert not names & {b"x-private", b"te", b"proxy-authorization", b"transfer-encoding"}
    assert "keep-alive" not in {n.lower() for n, _ in headers}
    assert dict(headers)["x-kept"] == "1"


def test_a_chunked_upload_arrives_whole_and_is_framed_anew(stub: tuple[Stub, str]) -> None:
    """Both lengths at once is how requests are smuggled: what goes on has one."""
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
                b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
            )
            while raw.recv(4096):
                pass

    assert stub[0].asked[0].body == b"hello world"
    assert not stub[0].asked[0].header("content-length")


def test_events_pass_as_they_come_and_are_not_gathered(stub: tuple[Stub, str]) -> None:
    hold = threading.Event()
    stub[0].answer = Said(headers=[(b"content-type", b"text/event-stream")], pieces=sse("1", "2"), hold=hold)
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            seen = b""
            while b"data: 1" not in seen:
                seen += raw.recv(4096)
            assert b"data: 2" not in seen
            hold.set()
            while b"data: 2" not in seen:
                seen += raw.recv(4096)


@pytest.mark.parametrize("mode", ["observe", "annotate", "enforce"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_cancels_the_upstream(stub: tuple[Stub, str], path: str, mode: str, begun: bool) -> None:
    pieces = sse({"choices": [{"index": 0, "delta": {"content": "word " * 30}}]}, "[DONE]")
    stub[0].answer = Said(
        headers=[(b"content-type", b"text/event-stream")],
        pieces=pieces if begun else pieces[:1],
        hold=threading.Event(),
    )
    with sidecar(route_to(stub[1], mode=mode)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        data = json.dumps({**CHAT, "stream": True}).encode()
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(
                b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data
            )
            if begun:
                raw.recv(4096)
            until(lambda: stub[0].asked)
        until(lambda: stub[0].left)

    assert stub[0].left == 1


def test_a_slow_client_slows_the_upstream_down_and_nothing_piles_up(stub: tuple[Stub, str]) -> None:
    piece = os.urandom(1 << 16)
    stub[0].answer = Said(headers=[(b"content-type", b"application/octet-stream")], pieces=[piece] * 1600)  # 100 MB
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(b"GET /v1/files/f/content HTTP/1.1\r\nHost: x\r\n\r\n")
            raw.recv(4096)
            before = -1
            while before != stub[0].sent:
                before = stub[0].sent
                time.sleep(0.3)
            stalled_at = stub[0].sent

    assert stalled_at < 40_000_000  # sockets' buffers on loopback, two hops, and no more


def test_a_large_upload_is_passed_on_while_it_comes(stub: tuple[Stub, str]) -> None:
    size = 30_000_000
    with sidecar(route_to(stub[1], mode="enforce")) as (url, _):
        status, _, _ = ask(url, "POST", "/v1/files", os.urandom(size), [("Content-Type", "application/octet-stream")])

    assert status == 200
    assert len(stub[0].asked[0].body) == size


def test_connections_are_used_again(stub: tuple[Stub, str]) -> None:
    peers = set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        peers.add(tuple(scope["client"]))
        await stub[0](scope, receive, send)

    with served_app(app) as upstream, sidecar(route_to(upstream, mode="observe")) as (url, _):
        for _ in range(5):
            ask(url, body=CHAT)

    assert len(peers) == 1


def test_health_stands_under_its_own_prefix_and_the_upstreams_is_the_upstreams(stub: tuple[Stub, str]) -> None:
    with sidecar(route_to(stub[1])) as (url, _):
        ready = ask(url, "GET", "/hhh/health/ready", None, [])
        ask(url, "GET", "/health/ready", None, [])

    assert (ready[0], json.loads(ready[2])["status"]) == (200, "ok")
    assert [a.target for a in stub[0].asked] == [b"/health/ready"]


def test_the_native_endpoints_are_served_under_the_prefix(stub: tuple[Stub, str]) -> None:
    with sidecar(route_to(stub[1])) as (url, _):
        _, _, body = ask(url, path="/hhh/v1/guard", body={"prompt": "how to build a bomb"})
        metrics = ask(url, "GET", "/hhh/metrics", None, [])[2].decode()

    assert json.loads(body)["action"] == "refuse"
    assert "hhh:requests_total" in metrics
    assert stub[0].asked == []


def until(holds: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
