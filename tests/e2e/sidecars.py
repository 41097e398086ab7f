"""A sidecar and upstreams on loopback for the tests of this folder."""

import asyncio
import contextlib
import http.client
import json
import resource
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hhh_router.interfaces.proxy.app import Sidecar
from hhh_router.interfaces.proxy.routes import ProxyConfig, Route
from hhh_router.interfaces.proxy.run import make_server
from hhh_router.interfaces.proxy.upstreams import Timeouts, Upstream, Upstreams
from hhh_router.pipeline import Pipeline
from hhh_router.protocols import Reader
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.trace.audit import Audit, NoAudit
from hhh_router.upstream.raw import RawClient

from .loopback import running

RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}


@dataclass
class Asked:
    """A request as an upstream got it."""

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> list[str]:
        return [v.decode() for n, v in self.headers if n == name.encode()]


@dataclass
class Said:
    """What an upstream is to answer."""

    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=lambda: [(b"content-type", b"application/json")])
    pieces: list[bytes] = field(default_factory=list)
    pause_s: float = 0.0
    """Before each piece but the first."""
    hold: threading.Event | None = None
    """Waited for before the last piece."""


class Stub:
    """An upstream that records what it is asked and answers what it is told to."""

    def __init__(self, answer: Said | Callable[[Asked], Said] | None = None) -> None:
        self.answer = answer or Said(pieces=[b"{}"])
        self.asked: list[Asked] = []
        self.left = 0
        """Answers that the other side did not wait for."""
        self.sent = 0
        """Bytes of bodies that went out."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()  # bytes would be copied anew for each piece
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        asked = Asked(scope["method"], scope["raw_path"] + query, list(scope["headers"]), bytes(body))
        self.asked.append(asked)
        said = self.answer(asked) if callable(self.answer) else self.answer
        gone = asyncio.ensure_future(receive())
        work = asyncio.ensure_future(self._say(said, send))
        await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self.left += 1
            work.cancel()
        gone.cancel()
        await asyncio.gather(gone, work, return_exceptions=True)

    async def _say(self, said: Said, send: Any) -> None:
        await send({"type": "http.response.start", "status": said.status, "headers": said.headers})
        for i, piece in enumerate(said.pieces):
            if said.hold is not None and i == len(said.pieces) - 1:
                while not said.hold.is_set():
                    await asyncio.sleep(0.01)
            if i and said.pause_s:
                await asyncio.sleep(said.pause_s)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            self.sent += len(piece)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def route_to(*urls: str, fallback: tuple[str, ...] = (), timeouts: Timeouts | None = None, **more: Any) -> Route:
    """A route that takes everything; upstreams are called a, b, …"""
    names = iter("abcdefgh")

    def upstream(url: str) -> Upstream:
        return Upstream(name=next(names), url=url, timeouts=timeouts or Timeouts(first_byte_s=20, idle_s=20))

    to = tuple((upstream(url), 1.0) for url in urls)
    return Route(name="all", to=to, fallback=tuple(upstream(url) for url in fallback), **more)


@contextmanager
def sidecar(
    routes: Route | list[Route],
    *,
    policy: str | Path = "balanced",
    reader: Reader | None = None,
    pipeline: Pipeline | None = None,
    audit: Audit | None = None,
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> Iterator[tuple[str, Sidecar]]:
    """The base URL (without ``/v1``) of a sidecar, and the sidecar."""
    pipeline = pipeline or fake_pipeline(policy, reader=reader or FakeReader(RULES), **(settings or {}))
    app = Sidecar(
        pipeline,
        ProxyConfig(routes=[routes] if isinstance(routes, Route) else routes, **config),
        Upstreams(RawClient(), sleep=lambda seconds: None),
        audit or NoAudit(),
        draw=lambda: 0.0,
    )
    ready = threading.Event()
    with running(make_server(app, on_ready=ready.set), ready) as url:
        yield url.removesuffix("/v1"), app


def ask(
    url: str,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    body: bytes | dict[str, Any] | None = None,
    headers: list[tuple[str, str]] | None = None,
    *,
    timeout_s: float = 20,
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Ask with nothing added but Host and the body's length."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        sent = headers if headers is not None else [("Content-Type", "application/json")]
        for name, value in sent:
            connection.putheader(name, value)
        if data is not None and "content-length" not in {n.lower() for n, _ in sent}:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        response = connection.getresponse()
        return response.status, response.getheaders(), response.read()
    finally:
        connection.close()


@contextmanager
def tcp(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Iterator[str]:
    """The URL of an upstream that does with its connections whatever a test wants."""
    started = threading.Event()
    told: dict[str, Any] = {}

    async def serve() -> None:
        talks: set[asyncio.Task[None]] = set()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            talks.add(asyncio.current_task())  # type: ignore[arg-type]
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await talk(reader, writer)
            writer.close()

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        told.update(port=server.sockets[0].getsockname()[1], stop=asyncio.Event(), loop=asyncio.get_running_loop())
        started.set()
        await told["stop"].wait()
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{told['port']}"
    finally:
        told["loop"].call_soon_threadsafe(told["stop"].set)
        thread.join(10)


def raise_file_limit(least: int) -> None:
    """So many files may be open in this process; skips the test where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < least:
        pytest.skip(f"{hard} files may be open, {least} are needed")
    if soft != resource.RLIM_INFINITY and soft < least:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))


def closed_port() -> str:
    """A URL where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def sse(*events: dict[str, Any] | str, names: bool = False) -> list[bytes]:
    """Frames of a stream."""
    frames = []
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        name = f"event: {event['type']}\n" if names and isinstance(event, dict) else ""
        frames.append(f"{name}data: {data}\n\n".encode())
    return frames
