"""Servers on loopback for the sidecar's benchmark, each in a process of its own, and a client that costs little.

``python -m benchmarks.loopback upstream`` answers chats at once; ``sidecar URL MODE`` stands before it, with
``--bundle``, ``--audit`` and ``--max-requests``. Each prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from hhh_router.interfaces.proxy.routes import MAX_REQUESTS, Mode
from hhh_router.settings import Settings

PATH = "/v1/chat/completions"
WORDS_PER_CHUNK = "one two three four five "  # 24 characters: a window of 24 tokens is four chunks
_HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "stub"}
_WHOLE = json.dumps(
    {
        **_HEAD,
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "The capital is Paris."}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15},
    }
).encode()


def _chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
    body = {**_HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of the upstream. What a body asks for is in its ``user``: ``chunks:pause_ms``."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            length = int(next(lengths, b":0").split(b":")[1])  # a proxy looks around with GET too
            body = json.loads(await reader.readexactly(length) or b"{}")
            if not body.get("stream"):
                fields = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                writer.write(fields % len(_WHOLE) + _WHOLE)
                await writer.drain()
                continue
            chunks, pause_ms = map(int, body["user"].split(":"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            pieces = [_chunk({"role": "assistant", "content": ""}), *[_chunk({"content": WORDS_PER_CHUNK})] * chunks]
            for piece in [*pieces, _chunk({}, "stop"), b"data: [DONE]\n\n"]:
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
                if pause_ms:
                    await asyncio.sleep(pause_ms / 1000)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _upstream() -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _sidecar(upstream: str, mode: Mode, bundle: str | None, audit: str | None, max_requests: int) -> None:
    """With a bundle its model reads; without one nothing of it is loaded."""
    from dataclasses import replace

    from hhh_router.assemble import build_pipeline, open_raw_client
    from hhh_router.interfaces.proxy.app import Sidecar
    from hhh_router.interfaces.proxy.config import simple_config
    from hhh_router.interfaces.proxy.run import run
    from hhh_router.interfaces.proxy.upstreams import Upstreams
    from hhh_router.interfaces.server.run import listen
    from hhh_router.testing.fakes import fake_pipeline
    from hhh_router.trace.audit import NoAudit, SqliteAudit

    settings = Settings.load(bundle=bundle)
    pipeline = fake_pipeline("balanced") if bundle is None else build_pipeline(settings, sinks=(), serving=True)
    config = replace(simple_config(upstream, settings, mode=mode), max_requests=max_requests)
    kept = NoAudit() if audit is None else SqliteAudit(audit)
    sidecar = Sidecar(pipeline, config, Upstreams(open_raw_client(2 * max_requests)), kept)
    listening = listen("127.0.0.1", 0, settings)
    run(sidecar, listening, on_ready=lambda url: print(url.rpartition(":")[2], flush=True))


@contextmanager
def process(*args: str, **settings: object) -> Iterator[tuple[int, int]]:
    """Port and process id of one of these servers, with settings such as ``max_waiting=32``."""
    command = [sys.executable, "-m", "benchmarks.loopback", *args]
    environment = os.environ | {f"HHH_ROUTER_{name.upper()}": str(value) for name, value in settings.items()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            if not line.strip():
                raise RuntimeError(f"{' '.join(args)} did not start")
            yield int(line), server.pid
        finally:
            server.terminate()
            server.wait(30)


def wait_for(port: int, seconds: float) -> None:
    """Return when somebody listens.

    Raises:
        TimeoutError: Nobody does after so long.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody listens on {port} after {seconds:g} s") from error
            time.sleep(0.2)
        else:
            return


@dataclass(frozen=True, slots=True)
class Heard:
    """One answer's times, in seconds from the request."""

    first_s: float
    """Until the first word."""
    whole_s: float


class Connection:
    """One connection that is kept open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, body: dict[str, Any]) -> Heard:
        """Ask, and read the answer to its end.

        Raises:
            RuntimeError: It is no 200, or a policy cut the stream off.
        """
        data = json.dumps(body).encode()
        fields = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        started = time.perf_counter()
        self._writer.write(fields.encode() + b"\r\nAuthorization: Bearer sk-bench\r\n\r\n" + data)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(head.decode("latin-1").splitlines()[0])
        if b"transfer-encoding: chunked" not in head:
            length = next(int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.startswith(b"content-length"))
            await self._reader.readexactly(length)
            whole = time.perf_counter() - started
            return Heard(whole, whole)
        first: float | None = None
        piece = b""
        while size := int(await self._reader.readline(), 16):
            piece = await self._reader.readexactly(size + 2)
            if first is None and b'"content": "one' in piece:
                first = time.perf_counter() - started
        await self._reader.readline()
        if first is None or b"data: [DONE]" not in piece or b'"content_filter"' in piece:
            raise RuntimeError(f"the stream was cut off: {piece[:200].decode('utf-8', 'replace')}")
        return Heard(first, time.perf_counter() - started)


@asynccontextmanager
async def connections(port: int, number: int) -> AsyncIterator[list[Connection]]:
    """So many connections, closed at the end."""
    made = [await asyncio.open_connection("127.0.0.1", port) for _ in range(number)]
    try:
        yield [Connection(*pair) for pair in made]
    finally:
        for _, writer in made:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in made), return_exceptions=True)


def main(args: Sequence[str]) -> None:
    """Be one of the servers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loopback", description=__doc__)
    servers = parser.add_subparsers(dest="server", required=True)
    servers.add_parser("upstream")
    sidecar = servers.add_parser("sidecar")
    sidecar.add_argument("url")
    sidecar.add_argument("mode", choices=get_args(Mode))
    sidecar.add_argument("--bundle")
    sidecar.add_argument("--audit")
    sidecar.add_argument("--max-requests", type=int, default=MAX_REQUESTS)
    given = parser.parse_args(args)
    if given.server == "upstream":
        asyncio.run(_upstream())
    else:
        _sidecar(given.url, given.mode, given.bundle, given.audit, given.max_requests)


if __name__ == "__main__":
    main(sys.argv[1:])
