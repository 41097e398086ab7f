"""Too much, too slow, too deep, unreadable, gone: each a client's mistake, told in its wire's own shape."""

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.interfaces.server import connection, http
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.guardrail import PATH
from hhh_router.interfaces.server.run import DrainingServer, make_server
from hhh_router.pipeline.validate import MAX_MESSAGES
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.types import ReadRequest, Scores
from tests.e2e import loopback
from tests.e2e.loopback import served

Policies = Callable[..., Path]
HELLO = [{"role": "user", "content": "Hello"}]
CHATS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "hhh-auto", "messages": HELLO},
    "/v1/responses": {"model": "hhh-auto", "input": HELLO},
    "/v1/messages": {"model": "hhh-auto", "messages": HELLO, "max_tokens": 64},
}
JUDGES: dict[str, dict[str, Any]] = {
    "/v1/messages/count_tokens": {"model": "hhh-auto", "messages": HELLO},
    "/v1/moderations": {"input": "Hello"},
    "/v1/decisions": {"input": "Hello", "questions": [{"type": "predicate", "name": "harmful"}]},
    "/v1/systemone": {"state": "Hello", "questions": {"harmful": {"type": "noul"}}},
    PATH: {"input_type": "request", "texts": ["Hello"]},
    "/v1/guard": {"prompt": "Hello"},
    "/v1/route": {"prompt": "Hello"},
}
ALL = CHATS | JUDGES


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(fake_pipeline())) as made:
        yield made


def told(path: str, body: dict[str, Any]) -> str:
    """The message of an error, whose shape has to be the wire's."""
    error: dict[str, Any] = body["error"]
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(body) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


# -- what a body holds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL)
def test_a_body_nested_too_deeply_is_refused(client: TestClient, path: str) -> None:
    nested: Any = "x"
    for _ in range(http.MAX_DEPTH):
        nested = [nested]

    reply = client.post(path, json=ALL[path] | {"metadata": nested, "state": nested})

    assert reply.status_code == 400
    assert "nested more than 100 levels" in told(path, reply.json())


def test_brackets_in_text_are_no_nesting(client: TestClient) -> None:
    reply = client.post("/v1/guard", json={"prompt": "[{" * 500})

    assert reply.status_code == 200


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"model": "hhh-\xff"}', "not UTF-8"),
        (b'{"model": }', "line 1 column 11"),
        (b'{"model": "a" "b"}', "line 1"),
        (b'["model"]', "no object"),
        (b'{"model": -Infinity}', "-Infinity is no JSON number"),
        (b'{"model": ' + b"9" * 5000 + b"}", "no JSON"),
        (b"", "no JSON"),
    ],
)
def test_what_is_no_json_is_told_where(client: TestClient, path: str, content: bytes, found: str) -> None:
    reply = client.post(path, content=content)

    assert reply.status_code == 400
    assert found in told(path, reply.json())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
def test_too_many_messages_are_counted(client: TestClient, path: str) -> None:
    field = "input" if path == "/v1/responses" else "messages"

    reply = client.post(path, json=ALL[path] | {field: HELLO * (MAX_MESSAGES + 1)})

    assert reply.status_code == 400
    assert "found 4,097 messages (send at most 4,096)" in told(path, reply.json())


@pytest.mark.parametrize("path", CHATS)
def test_ten_thousand_tools_are_refused_at_once(client: TestClient, path: str) -> None:
    tool: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    if path == "/v1/chat/completions":
        tool = {"type": "function", "function": {"name": "f"}}
    elif path == "/v1/messages":
        tool = {"name": "f", "input_schema": {"type": "object"}}

    begun = time.monotonic()
    reply = client.post(path, json=CHATS[path] | {"tools": [tool] * 10_000})

    assert reply.status_code == 400
    assert told(path, reply.json()) == "tools: found 10000 (send at most 128)"
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/v1/chat/completions", {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}),
        ("/v1/responses", {"type": "input_image", "image_url": "https://example.org/a.png"}),
        ("/v1/messages", {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}),
    ],
)
def test_an_image_is_listed_as_not_read_and_alone_is_refused(client: TestClient, path: str, part: Any) -> None:
    field = "input" if path == "/v1/responses" else "messages"
    text = {"type": "input_text" if path == "/v1/responses" else "text", "text": "What is this?"}

    beside = client.post(path, json=CHATS[path] | {field: [{"role": "user", "content": [text, part]}]})
    alone = client.post(path, json=CHATS[path] | {field: [{"role": "user", "content": [part]}]})

    assert beside.json()["hhh"]["not_inspected"] == [f"{field}[0].content[1]: {part['type']}"]
    assert alone.status_code == 400
    assert "empty" in told(path, alone.json())


def test_whole_numbers_no_float_can_hold_are_out_of_range(client: TestClient) -> None:
    for field in ("temperature", "top_p", "top_logprobs", "seed"):
        reply = client.post("/v1/chat/completions", json=CHATS["/v1/chat/completions"] | {field: 10**400})
        assert reply.status_code == 400
    weights = {"hhh": {"weights": {"base": 10**400}}}
    assert client.post("/v1/chat/completions", json=CHATS["/v1/chat/completions"] | weights).status_code == 400


def test_half_a_surrogate_pair_can_be_told_back(client: TestClient) -> None:
    body = b'{"input": "Hi", "questions": [{"type": "predicate", "name": "\\ud800", "instructions": "Is it?"}]}'

    reply = client.post("/v1/decisions", content=body)

    assert reply.status_code == 200
    assert json.loads(reply.text)["answers"][0]["name"] == "\ud800"


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(set(ALL) - {"/v1/decisions", "/v1/systemone", "/v1/messages/count_tokens"}))
def test_a_key_without_the_policy_is_told_which_it_has(path: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    digest = hashlib.sha256(b"k").hexdigest()
    file.write_text(f"keys:\n  - {{name: ann, sha256: {digest}, policies: [balanced]}}\n")
    policy = {"policy": "honest-first"}
    if path in CHATS:
        policy = {"hhh": policy}  # type: ignore[dict-item]
    elif path == PATH:
        policy = {"additional_provider_specific_params": policy}  # type: ignore[dict-item]
    with TestClient(create_app(fake_pipeline(api_keys_file=file)), headers={"authorization": "Bearer k"}) as served:
        refused = served.post(path, json=ALL[path] | policy)
        allowed = served.post(path, json=ALL[path])

    assert refused.status_code == 403
    assert "does not open policy 'honest-first' (use one of balanced)" in told(path, refused.json())
    assert allowed.status_code == 200


@pytest.mark.parametrize("path", ALL)
def test_a_missing_key_and_a_closed_door_are_told_in_the_wires_shape(path: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    digest = hashlib.sha256(b"k").hexdigest()
    file.write_text(f"keys:\n  - {{name: ann, sha256: {digest}, doors: [metrics]}}\n")
    with TestClient(create_app(fake_pipeline(api_keys_file=file))) as served:
        nobody = served.post(path, json=ALL[path])
        closed = served.post(path, json=ALL[path], headers={"x-api-key": "k"})

    assert (nobody.status_code, closed.status_code) == (401, 403)
    assert "no key" in told(path, nobody.json())
    assert "does not open this endpoint" in told(path, closed.json())


@pytest.mark.parametrize("path", ALL)
def test_another_method_is_told_in_the_wires_shape(client: TestClient, path: str) -> None:
    reply = client.get(path)

    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    assert "is not served here" in told(path, reply.json())


# -- how it comes -----------------------------------------------------------------------------------------------------


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a reply after which the server closes the connection."""
    raw = b""
    while piece := sock.recv(65_536):
        raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return int(status.split(" ")[1]), dict(line.lower().split(": ", 1) for line in lines), body


def head(path: str, length: int, *more: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/guard"])
def test_a_body_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.3)
    with served(fake_pipeline()) as url, closing(connect(url)) as sock:
        sock.sendall(head(path, 1000))
        for _ in range(4):
            sock.sendall(b" ")
            time.sleep(0.05)
        status, headers, body = answer(sock)

    assert status == 408
    assert headers["connection"] == "close"
    assert "was not here after 0.3 s" in told(path, json.loads(body))


@pytest.mark.parametrize("sent", [b"", b"POST /v1/guard HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_never_come_are_cut_off(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.2)
    with served(fake_pipeline()) as url, closing(connect(url)) as sock:
        sock.sendall(sent)
        status, headers, body = answer(sock)

    assert status == 408
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_connection_is_kept_while_its_replies_take_longer_than_headers_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.2)
    slow = FakeGenerator("one two three four five", reader=FakeReader(), delay_s=0.1)
    content = json.dumps(CHATS["/v1/chat/completions"]).encode()
    with served(fake_pipeline(generator=slow)) as url, closing(connect(url)) as sock:
        for _ in range(2):
            sock.sendall(head("/v1/chat/completions", len(content)) + content)
            assert b" 200 " in _until(sock, b"}}}")
        sock.sendall(b"POST")
        assert b"408" in sock.recv(65_536)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/guard"])
def test_large_headers_are_refused(path: str) -> None:
    with served(fake_pipeline()) as url, closing(connect(url)) as sock:
        sock.sendall(head(path, 2, f"x-filler: {'x' * 40_000}") + b"{}")
        status, headers, body = answer(sock)

    assert status == 431
    assert headers["connection"] == "close"
    assert "bytes of headers; send at most 32,768" in told(path, json.loads(body))


@pytest.mark.parametrize("sent", [b"\x16\x03\x01 hello\r\n\r\n", head("/v1/guard", 2)[:-2] + b"x" * 80_000])
def test_what_is_no_http_gets_an_error_it_can_read(sent: bytes) -> None:
    with served(fake_pipeline()) as url, closing(connect(url)) as sock:
        sock.sendall(sent)
        status, _, body = answer(sock)

    assert status == 400
    assert "send HTTP/1.1 with at most 32,768 bytes of headers" in json.loads(body)["error"]["message"]


@contextmanager
def echoing() -> Iterator[str]:
    """The URL of an application that says which headers and how much of a body it got."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        said = json.dumps({"headers": sorted(n.decode() for n, _ in scope["headers"]), "size": size}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": said})

    async def drain() -> None:
        return

    ready = threading.Event()
    with loopback.running(DrainingServer(app, drain, ready.set, grace_s=1, lifespan="off"), ready) as url:
        yield url


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_what_follows_a_body_is_no_header() -> None:
    with echoing() as url, closing(connect(url)) as sock:
        sock.sendall(CHUNKED + b"3\r\nabc\r\n0\r\nAuthorization: Bearer late\r\n\r\n")
        status, _, body = answer(sock)

    assert (status, b'"size": 3' in body) == (200, True)
    assert b"authorization" not in body


@pytest.mark.parametrize("begun", [b"3;", b"3\r\nabc\r\n0\r\nx: "], ids=["extension of a chunk", "trailer"])
def test_what_stands_around_a_body_has_a_bound(begun: bytes) -> None:
    with echoing() as url, closing(connect(url)) as sock:
        sock.sendall(CHUNKED + begun)
        with suppress(OSError):  # it is cut off while it still sends
            for _ in range(2000):
                sock.sendall(b"x" * 10_000)
            pytest.fail("20 MB of it were taken")


def test_an_answer_ends_although_garbage_follows_its_request() -> None:
    with echoing() as url, closing(connect(url)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\x00\x01 garbage\r\n\r\n")
        status, _, body = answer(sock)

    assert status == 200
    assert body.endswith(b"0\r\n\r\n")


def test_blank_lines_do_not_keep_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.2)
    with echoing() as url, closing(connect(url)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert _until(sock, b"0\r\n\r\n")
        sock.sendall(b"\r\n")
        assert b"408" in sock.recv(65_536)


def test_a_body_that_says_it_is_too_large_is_not_waited_for() -> None:
    with served(fake_pipeline(max_body_bytes=2048)) as url, closing(connect(url)) as sock:
        sock.sendall(head("/v1/guard", 10**9))
        status, headers, body = answer(sock)

    assert (status, headers["connection"]) == (413, "close")
    assert "2,048 bytes" in told("/v1/guard", json.loads(body))


def test_a_reply_does_not_wait_for_an_acknowledgement() -> None:
    ready = threading.Event()
    server = make_server(fake_pipeline(), on_ready=ready.set)
    with loopback.running(server, ready) as url, closing(connect(url)) as sock:
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in sock.recv(65_536)
        [one] = server.server_state.connections
        theirs = one.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- clients that leave -----------------------------------------------------------------------------------------------


class SlowReader:
    """A reader that takes its time, and knows when it was stopped."""

    def __init__(self) -> None:
        self.begun, self.cancelled = 0, 0

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        self.begun += 1
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await FakeReader().read(requests)


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("path", JUDGES)
def test_a_client_that_leaves_stops_a_reading(path: str) -> None:
    reader = SlowReader()
    content = json.dumps(JUDGES[path]).encode()
    with served(fake_pipeline(reader=reader)) as url:
        with closing(connect(url)) as sock:
            sock.sendall(head(path, len(content)) + content)
            assert eventually(lambda: reader.begun == 1)
        assert eventually(lambda: reader.cancelled == 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", CHATS)
def test_a_client_that_leaves_before_the_first_token_stops_the_model(path: str, stream: bool) -> None:
    reader = SlowReader()
    content = json.dumps(CHATS[path] | {"stream": stream}).encode()
    with served(fake_pipeline(generator=FakeGenerator("one", reader=reader))) as url:
        with closing(connect(url)) as sock:
            sock.sendall(head(path, len(content)) + content)
            assert eventually(lambda: reader.begun == 1)
        assert eventually(lambda: reader.cancelled == 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", CHATS)
def test_a_client_that_leaves_midway_stops_the_model(watchful: Policies, path: str, stream: bool) -> None:
    slow = FakeGenerator("word " * 2000, reader=FakeReader(), delay_s=0.01)
    fields = {"stream": stream, "max_output_tokens" if path == "/v1/responses" else "max_tokens": 1500}
    content = json.dumps(CHATS[path] | fields).encode()
    with served(fake_pipeline(watchful(), generator=slow)) as url:
        with closing(connect(url)) as sock:
            sock.sendall(head(path, len(content), "Idempotency-Key: left") + content)
            if stream:
                assert b"word" in _until(sock, b"word")
            assert eventually(lambda: len(slow.requests) == 1)
        assert eventually(lambda: slow.cancelled == 1)
    assert len(slow.requests) == 1


def test_a_client_that_leaves_within_its_body_leaves_nothing_behind() -> None:
    generator = FakeGenerator("one", reader=FakeReader())
    with served(fake_pipeline(generator=generator)) as url:
        with closing(connect(url)) as sock:
            sock.sendall(head("/v1/chat/completions", 1000) + b'{"model"')
        with closing(connect(url)) as sock:
            sock.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            status, _, body = answer(sock)
    assert (status, json.loads(body)["status"]) == (200, "ok")
    assert generator.requests == []


def _until(sock: socket.socket, mark: bytes) -> bytes:
    raw = b""
    while mark not in raw and (piece := sock.recv(65_536)):
        raw += piece
    return raw
