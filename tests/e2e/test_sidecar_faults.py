"""What goes wrong, and what the caller then gets: docs/reliability.md has a row for each."""

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from benchmarks.kills import kill_often
from hhh_router.interfaces.proxy.upstreams import Breaker, Timeouts, Upstream
from hhh_router.testing import FakeReader
from hhh_router.trace.audit import SqliteAudit, read_rows, verify
from hhh_router.types import ReadRequest, Scores

from .loopback import served_app
from .sidecars import Said, Stub, ask, closed_port, raise_file_limit, route_to, sidecar, sse, tcp
from .test_sidecar_guarded import EVENTS, GOOD, Model, by_chat, user

pytestmark = pytest.mark.e2e

BODY = {"model": "m", "messages": [user("Hi")]}
SHORT = Timeouts(connect_s=1, first_byte_s=0.4, idle_s=0.4)
modes = pytest.mark.parametrize("mode", ["observe", "annotate", "enforce"])
streams = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    upstream = Stub(Model())
    with served_app(upstream) as url:
        yield upstream, url.removesuffix("/v1")


def openai_at(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(30)


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
    await writer.drain()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()


def cut_after(head: bytes, body: bytes, *, silence: bool) -> Any:
    """An upstream that begins an answer, and then breaks off or falls silent."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + head + b"\r\n\r\n")
        writer.write(b"%x\r\n" % len(body) + body + b"\r\n")
        await writer.drain()
        if silence:
            await asyncio.sleep(30)

    return talk


WORDS = [{"id": "x", "choices": [{"index": 0, "delta": {"content": f"word {i} "}}]} for i in range(12)]


NO_ANSWER = [
    ("refused", 502, "upstream_error"),
    ("hang", 504, "timeout"),
    ("garbage", 502, "upstream_error"),
    ("reset", 502, "upstream_error"),
]


@modes
@pytest.mark.parametrize(("fault", "status", "code"), NO_ANSWER)
@pytest.mark.parametrize("has_other", [False, True])
def test_an_upstream_that_gives_no_answer(
    stub: tuple[Stub, str], mode: str, fault: str, status: int, code: str, has_other: bool
) -> None:
    talk = {"hang": hang, "garbage": garbage, "reset": reset}.get(fault, hang)
    fallback = (stub[1],) if has_other else ()
    with tcp(talk) as bad:
        url_of_bad = closed_port() if fault == "refused" else bad
        with sidecar(route_to(url_of_bad, fallback=fallback, timeouts=SHORT, mode=mode)) as (url, _):
            got, headers, said = ask(url, body=BODY)

    if has_other:
        assert (got, json.loads(said)["choices"][0]["message"]["content"]) == (200, GOOD)
        if mode != "observe":
            assert dict(headers)["x-hhh-upstream"] == "b"
    else:
        assert (got, json.loads(said)["error"]["code"]) == (status, code)


@modes
@pytest.mark.parametrize("silence", [True, False], ids=["silent", "cut"])
def test_a_stream_that_stops_midway_ends_with_an_error_of_its_wire(mode: str, silence: bool) -> None:
    talk = cut_after(b"Content-Type: text/event-stream", b"".join(sse(*WORDS)), silence=silence)
    with tcp(talk) as bad, sidecar(route_to(bad, timeouts=SHORT, mode=mode)) as (url, _), openai_at(url) as client:
        made = client.chat.completions.create(model="m", messages=[user("Hi")], stream=True)
        seen = [next(made)]
        with pytest.raises(openai.APIError):
            seen.extend(made)

    assert seen[0].choices[0].delta.content == "word 0 "


@modes
def test_anthropics_stream_that_stops_midway_ends_with_its_error_event(mode: str) -> None:
    start = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": {}}
    events = [{"type": "message_start", "message": start}]
    events += [{"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}]
    delta = {"type": "text_delta", "text": "some words that pass "}
    events += [{"type": "content_block_delta", "index": 0, "delta": delta}] * 9
    talk = cut_after(b"Content-Type: text/event-stream", b"".join(sse(*events, names=True)), silence=False)
    with tcp(talk) as bad, sidecar(route_to(bad, mode=mode)) as (url, _):
        client = anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)
        made = client.messages.create(model="m", max_tokens=9, messages=[user("Hi")], stream=True)
        with pytest.raises(anthropic.APIError):
            list(made)
        client.close()


@pytest.mark.parametrize("silence", [True, False], ids=["silent", "cut"])
def test_a_body_that_stops_midway_is_cut_where_nobody_reads_it(silence: bool) -> None:
    """There is no way to say it in the body: the client sees that it is not whole."""
    talk = cut_after(b"Content-Type: application/json", b'{"half": ', silence=silence)
    with (
        tcp(talk) as bad,
        sidecar(route_to(bad, timeouts=SHORT, mode="observe")) as (url, _),
        pytest.raises(http.client.IncompleteRead),
    ):
        ask(url, body=BODY)


@pytest.mark.parametrize("mode", ["annotate", "enforce"])
def test_a_body_that_stops_midway_is_an_error_where_it_is_read(mode: str) -> None:
    talk = cut_after(b"Content-Type: application/json", b'{"half": ', silence=False)
    with tcp(talk) as bad, sidecar(route_to(bad, timeouts=SHORT, mode=mode)) as (url, _):
        assert ask(url, body=BODY)[0] == 502


@modes
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503, 529])
def test_an_upstreams_error_passes_as_it_came(stub: tuple[Stub, str], mode: str, status: int) -> None:
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"7"), (b"x-should-retry", b"false")]
    stub[0].answer = Said(status=status, headers=headers, pieces=[b'{"error": {"message": "theirs"}}'])
    with sidecar(route_to(stub[1], mode=mode)) as (url, _):
        got, told, said = ask(url, body=BODY)

    assert (got, said) == (status, b'{"error": {"message": "theirs"}}')
    assert (dict(told)["retry-after"], dict(told)["x-should-retry"]) == ("7", "false")


@pytest.mark.parametrize(("status", "goes_on"), [(429, True), (503, True), (529, True), (500, False), (400, False)])
def test_who_turns_a_request_away_is_passed_over(stub: tuple[Stub, str], status: int, goes_on: bool) -> None:
    busy = Stub(Said(status=status, pieces=[b"{}"]))
    with served_app(busy) as bad, sidecar(route_to(bad, fallback=(stub[1],))) as (url, _):
        got = ask(url, body=BODY)[0]

    assert (got, len(busy.asked), len(stub[0].asked)) == ((200 if goes_on else status), 1, int(goes_on))


@modes
@streams
def test_an_answer_that_makes_no_sense(stub: tuple[Stub, str], mode: str, stream: bool) -> None:
    kind = b"text/event-stream" if stream else b"application/json"
    stub[0].answer = Said(headers=[(b"content-type", kind)], pieces=[b"data: nonsense\n\n" if stream else b"nonsense"])
    with sidecar(route_to(stub[1], mode=mode)) as (url, _):
        got, _, said = ask(url, body={**BODY, "stream": stream})

    if mode == "observe":
        assert (got, b"nonsense" in said) == (200, True)
    else:
        assert (got, b"nonsense" in said) == (502, False)


def test_a_slow_drip_passes_as_it_drips(stub: tuple[Stub, str]) -> None:
    stub[0].answer = Said(headers=EVENTS, pieces=[bytes([b]) for b in b"".join(sse(WORDS[0], "[DONE]"))], pause_s=0.005)
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        _, _, said = ask(url, body={**BODY, "stream": True})

    assert said == b"".join(sse(WORDS[0], "[DONE]"))


def test_the_circuit_opens_after_failures_and_closes_after_a_success(stub: tuple[Stub, str]) -> None:
    now = [0.0]
    breaker = Breaker(after=3, pause_s=10, clock=lambda: now[0])
    upstream = Upstream(name="a", url=stub[1], breaker=breaker)
    stub[0].answer = Said(status=500, pieces=[b"{}"])
    from dataclasses import replace

    with sidecar(replace(route_to(stub[1], mode="observe"), to=((upstream, 1.0),))) as (url, _):
        failed = [ask(url, body=BODY)[0] for _ in range(3)]
        status, headers, said = ask(url, body=BODY)
        asked_while_open = len(stub[0].asked)
        now[0] = 10.0
        stub[0].answer = Said(pieces=[b"{}"])
        after = [ask(url, body=BODY)[0] for _ in range(2)]

    assert failed == [500, 500, 500]
    assert (status, json.loads(said)["error"]["code"], dict(headers)["retry-after"]) == (503, "unavailable", "10")
    assert asked_while_open == 3
    assert after == [200, 200]


def test_what_is_asked_again_is_only_what_was_not_taken_up(stub: tuple[Stub, str]) -> None:
    from dataclasses import replace

    answers = iter([Said(status=503, pieces=[b"{}"]), Said(pieces=[b'{"ok": 1}'])])
    stub[0].answer = lambda asked: next(answers)
    route = route_to(stub[1], mode="observe")
    route = replace(route, to=((replace(route.to[0][0], retries=2), 1.0),))
    with sidecar(route) as (url, _):
        assert ask(url, body=BODY)[0] == 200
        assert len(stub[0].asked) == 2
        stub[0].answer = Said(status=500, pieces=[b"{}"])
        assert ask(url, body=BODY)[0] == 500
        assert len(stub[0].asked) == 3


@pytest.mark.parametrize("name", ["two lengths", "length and chunks", "chunks twice", "space before colon", "folded"])
def test_shapes_that_smuggle_requests_reach_the_upstream_as_one_or_not_at_all(
    stub: tuple[Stub, str], name: str
) -> None:
    smuggled = b"GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    shapes = {
        "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(smuggled) + smuggled,
        "length and chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
        "chunks twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + smuggled,
        "space before colon": b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + smuggled,
        "folded": b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + smuggled,
    }
    with sidecar(route_to(stub[1], mode="enforce")) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=3) as raw:
            raw.sendall(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + shapes[name])
            try:
                while raw.recv(65536):
                    pass
            except OSError:
                pass

    assert b"/v1/smuggled" not in [a.target for a in stub[0].asked]
    for asked in stub[0].asked:
        assert len(asked.header("content-length")) + len(asked.header("transfer-encoding")) <= 1


def test_a_certificate_nobody_trusts_is_502(tmp_path: Path) -> None:
    trustme = pytest.importorskip("ssl")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "k.pem", "-out", "c.pem", "-days", "1",
         "-subj", "/CN=localhost"], cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl is not here")
    context = trustme.SSLContext(trustme.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            try:
                while True:
                    with contextlib.suppress(trustme.SSLError):
                        context.wrap_socket(listening.accept()[0], server_side=True).close()
            except OSError:
                pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        port = listening.getsockname()[1]
        with sidecar(route_to(f"https://127.0.0.1:{port}")) as (url, _):
            status, _, said = ask(url, body=BODY)
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)

    assert status == 502
    assert b"certificate is not trusted" in said


def test_a_hundred_megabytes_pass_unread_paths_and_are_refused_where_they_cannot_be_read(
    stub: tuple[Stub, str],
) -> None:
    size = 100_000_000
    stub[0].answer = Said(pieces=[b"{}"])
    with sidecar(route_to(stub[1], mode="enforce")) as (url, _):
        headers = [("Content-Type", "application/octet-stream")]
        ask(url, "POST", "/v1/files", bytes(size), headers, timeout_s=200)
        assert len(stub[0].asked[0].body) == size
        try:
            status = ask(url, body=b'{"messages": "' + b"x" * size, timeout_s=200)[0]
        except OSError:  # the connection was cut while it still sent
            status = 413
    assert status == 413
    assert len(stub[0].asked) == 1


def test_a_thousand_idle_connections_keep_nobody_waiting(stub: tuple[Stub, str]) -> None:
    raise_file_limit(4096)  # both ends of them are in this process
    with sidecar(route_to(stub[1], mode="observe")) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(1000)]
        status = ask(url, body=BODY)[0]
        for connection in idle:
            connection.close()

    assert status == 200


@pytest.mark.parametrize(("path", "kind"), [("/v1/chat/completions", "code"), ("/v1/messages", "type")])
def test_one_request_more_than_may_be_under_way_is_told_to_come_back(
    stub: tuple[Stub, str], path: str, kind: str
) -> None:
    hold = threading.Event()
    stub[0].answer = Said(headers=EVENTS, pieces=sse(*WORDS, "[DONE]"), hold=hold)
    headers = [("Content-Type", "application/json"), *([("anthropic-version", "1")] if "messages" in path else [])]
    with sidecar(route_to(stub[1], mode="observe"), max_requests=1) as (url, _), openai_at(url) as client:
        made = client.chat.completions.create(model="m", messages=[user("Hi")], stream=True)
        next(made)
        status, told, said = ask(url, path=path, body=BODY, headers=headers)
        hold.set()
        list(made)
        stub[0].answer = Said(pieces=[b"{}"])
        after = ask(url, body=BODY)[0]

    assert (status, dict(told)["retry-after"], after) == (429, "1", 200)
    assert json.loads(said)["error"][kind] in ("overloaded", "rate_limit_error")


# -- the audit --------------------------------------------------------------------------------------------------------


@modes
def test_the_intent_is_stored_before_the_first_byte_and_the_outcome_after(
    stub: tuple[Stub, str], tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "audit.sqlite3"
    hold = threading.Event()
    stub[0].answer = Said(headers=EVENTS, pieces=sse(*WORDS, "[DONE]"), hold=hold)
    with sidecar(route_to(stub[1], mode=mode), audit=SqliteAudit(path)) as (url, _), openai_at(url) as client:
        made = client.chat.completions.create(model="m", messages=[user("Hi")], stream=True)
        next(made)
        midway = [r.kind for r in read_rows(path)]
        hold.set()
        list(made)

    kinds = [r.kind for r in read_rows(path)]
    assert midway == ["intent"]
    assert sorted(kinds) == ["intent", "outcome", *(["verdict"] if mode == "observe" else [])]
    intent, outcome = (
        json.loads(next(r.record for r in read_rows(path) if r.kind == k)) for k in ("intent", "outcome")
    )
    assert (intent["mode"], intent["path"], intent["wire"]) == (mode, "/v1/chat/completions", "chat")
    assert (outcome["status"], outcome["upstreams"]) == (200, ["a: 200"])
    assert outcome["whole"] or mode == "observe"  # a client may hang up after the last event
    told = next(json.loads(r.record)["hhh"] for r in read_rows(path) if "hhh" in r.record)
    assert [d["checkpoint"] for d in told["decisions"]] == ["input", "output"]


class Late:
    """An audit whose rows are stored when a test says so."""

    def __init__(self) -> None:
        self.may_store = threading.Event()

    async def write(self, kind: str, request_id: str, record: Any) -> None:
        await asyncio.to_thread(self.may_store.wait, 20)

    async def aclose(self) -> None:
        self.may_store.set()


@modes
def test_the_upstream_works_while_the_intent_is_being_stored(stub: tuple[Stub, str], mode: str) -> None:
    audit = Late()
    with sidecar(route_to(stub[1], mode=mode), audit=audit) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            data = json.dumps(BODY).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            raw.sendall(head % len(data) + data)
            end = time.monotonic() + 20
            while not stub[0].sent and time.monotonic() < end:
                time.sleep(0.01)
            asked = len(stub[0].asked)
            raw.settimeout(0.3)
            with pytest.raises(TimeoutError):
                raw.recv(1)
            audit.may_store.set()
            raw.settimeout(20)
            first = raw.recv(12)

    assert (asked, first) == (1, b"HTTP/1.1 200")


@pytest.mark.parametrize(("failure", "status"), [("closed", 503), ("open", 200)])
def test_an_audit_that_cannot_be_written(stub: tuple[Stub, str], tmp_path: Path, failure: str, status: int) -> None:
    path = tmp_path / "audit.sqlite3"
    audit = SqliteAudit(path)
    path.unlink()
    with sidecar(route_to(stub[1]), audit=audit, audit_failure=failure) as (url, _):
        before = ask(url, "GET", "/hhh/health/ready", None, [])[0]
        got, _, said = ask(url, body=BODY)
        ready = ask(url, "GET", "/hhh/health/ready", None, [])

    assert (got, GOOD.encode() in said) == (status, status == 200)
    assert audit.failures > 0
    assert (before, ready[0]) == (200, status)
    assert json.loads(ready[2])["status"] == ("audit" if status == 503 else "ok")


@modes
def test_canaries_reach_no_sink(
    stub: tuple[Stub, str], tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    path = tmp_path / "audit.sqlite3"
    key, word = "sk-canary0123456789abcdefgh", "swordfishcanary"
    headers = [("Authorization", f"Bearer {key}"), ("x-api-key", key), ("Cookie", f"s={key}"), ("X-Custom", key)]
    headers.append(("Content-Type", "application/json"))
    body = {"messages": [user(f"my password: {word}, api_key={key}")], "user": key, "metadata": {"token": word}}
    with sidecar(route_to(stub[1], mode=mode), audit=SqliteAudit(path)) as (url, _):
        for target in (f"/v1/chat/completions?key={key}", f"/v1/files/{key}?token={key}"):
            _, told, said = ask(url, path=target, body=body, headers=headers)
            block = json.loads(said).get("hhh") if said.startswith(b"{") else None
            assert key not in str(told) + json.dumps(block)
        metrics = ask(url, "GET", "/hhh/metrics", None, [])[2].decode()
        stub[0].answer = Said(status=500, pieces=[b"{}"])
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model="m", messages=[user("Hi")])
        client.close()

    kept = b"".join(p.read_bytes() for p in tmp_path.iterdir()).decode("latin-1")
    assert stub[0].asked[0].header("authorization") == [f"Bearer {key}"]
    for place in (kept, metrics, caplog.text, str(raised.value)):
        assert key not in place
        assert word not in place


# -- the end ----------------------------------------------------------------------------------------------------------


@modes
def test_a_shutdown_lets_answers_end_and_takes_nothing_new_in(stub: tuple[Stub, str], mode: str) -> None:
    hold = threading.Event()
    stub[0].answer = Said(headers=EVENTS, pieces=sse(*WORDS, "[DONE]"), hold=hold)
    with sidecar(route_to(stub[1], mode=mode), drain_s=20) as (url, app):
        client = openai_at(url)
        made = client.chat.completions.create(model="m", messages=[user("Hi")], stream=True)
        next(made)
        app.draining = True
        assert ask(url, body=BODY)[0] == 503
        ready = ask(url, "GET", "/hhh/health/ready", None, [])
        assert (ready[0], json.loads(ready[2])["status"]) == (503, "draining")
        threading.Timer(0.5, hold.set).start()
        words = "".join(c.choices[0].delta.content or "" for c in made)
        client.close()

    assert words.endswith("word 11 ")


class Reluctant(FakeReader):
    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        await asyncio.sleep(0.2)
        return await super().read(requests)


def test_a_shutdown_waits_for_the_verdicts_on_what_has_passed(stub: tuple[Stub, str], tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite3"
    with sidecar(route_to(stub[1], mode="observe"), reader=Reluctant(), audit=SqliteAudit(path)) as (url, _):
        for _ in range(4):
            assert ask(url, body=BODY)[0] == 200

    verdicts = [json.loads(r.record) for r in read_rows(path) if r.kind == "verdict"]
    assert [list(v) for v in verdicts] == [["hhh"]] * 4


@modes
def test_what_does_not_end_in_time_ends_with_an_error_of_its_wire(
    stub: tuple[Stub, str], tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "audit.sqlite3"
    stub[0].answer = Said(headers=EVENTS, pieces=sse(*WORDS, "[DONE]"), hold=threading.Event())
    seen: list[Any] = []
    with sidecar(route_to(stub[1], mode=mode), drain_s=0.3, audit=SqliteAudit(path)) as (url, _):
        client = openai_at(url)
        made = client.chat.completions.create(model="m", messages=[user("Hi")], stream=True)
        seen.append(next(made))
    with pytest.raises(openai.APIError, match="shutting down"):
        list(made)
    client.close()

    outcome = next(json.loads(r.record) for r in read_rows(path) if r.kind == "outcome")
    assert outcome["ended"] == "the process shut down"
    assert stub[0].left == 1


SERVE = """
import sys, threading
sys.path.insert(0, {root!r})
import uvicorn
from tests.e2e.sidecars import *
from hhh_router.interfaces.server.run import listen
from hhh_router.settings import Settings
from hhh_router.trace.audit import SqliteAudit
from hhh_router.interfaces.proxy.run import make_server
pipeline = fake_pipeline("balanced", reader=FakeReader(RULES))
config = ProxyConfig(routes=[route_to({upstream!r})], drain_s=5)
app = Sidecar(pipeline, config, Upstreams(RawClient()), SqliteAudit({path!r}))
listening = listen("127.0.0.1", 0, Settings.load())
make_server(app, on_ready=lambda: print(listening.getsockname()[1], flush=True)).run(sockets=[listening])
"""


def started(upstream: str, path: Path) -> tuple[subprocess.Popen[str], str]:
    root = str(Path(__file__).resolve().parents[2])
    code = SERVE.format(root=root, upstream=upstream, path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


def ended(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    process.stdout.close()
    return process.wait(20)


def test_sigterm_ends_the_process_once_answers_have_ended(stub: tuple[Stub, str], tmp_path: Path) -> None:
    process, url = started(stub[1], tmp_path / "audit.sqlite3")
    heard = by_chat(url, "Hi", stream=True)
    process.send_signal(signal.SIGTERM)

    assert ended(process) in (0, -signal.SIGTERM)
    assert heard.text.strip() == GOOD
    assert verify(tmp_path / "audit.sqlite3").unfinished == 0


def test_no_byte_leaves_without_an_intent_whenever_the_process_is_killed(tmp_path: Path) -> None:
    """`make chaos` kills it 50 times."""
    found = kill_often(tmp_path, kills=4, seed=7)

    assert found.heads > 0
    assert found.without_intent == 0
    assert (found.chain.broken_at, found.chain.unfinished) == (None, 0)


def test_an_upload_may_take_longer_than_the_wait_for_an_answer(stub: tuple[Stub, str]) -> None:
    stub[0].answer = Said(pieces=[b"{}"])
    with sidecar(route_to(stub[1], timeouts=SHORT)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nConnection: close\r\n\r\n")
            for _ in range(10):
                time.sleep(0.15)
                raw.sendall(b"x")
            head = raw.recv(4096)

    assert head.startswith(b"HTTP/1.1 200")
    assert stub[0].asked[0].body == b"x" * 10
