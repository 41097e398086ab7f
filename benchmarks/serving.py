"""A server in a process of its own, and clients that cost little: what the figures of `benchmarks.server` stand on."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

_URL = re.compile(r"http://([\d.]+):(\d+)")
_START_S = 120.0
_COMMAND = "from hhh_router.cli.main import run; run()"
_LISTENING = "hhh-router listens on "

Address = tuple[str, int]


@contextmanager
def started(arguments: Sequence[str], **settings: object) -> Iterator[Address]:
    """Where a server listens that was started with this Python; it is stopped at the end.

    Args:
        arguments: After ``python``; the program prints the line that `hhh-router serve` prints.
        settings: Of the server, such as ``max_rows=200``.

    Raises:
        RuntimeError: It ended, or said nothing.
    """
    environment = os.environ | {f"HHH_ROUTER_{name.upper()}": str(value) for name, value in settings.items()}
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if (found := _URL.search(line)) is None:
                complaints.seek(0)
                raise RuntimeError(f"the server did not start; it said {line!r} and {complaints.read()[-1000:]!r}")
            yield found[1], int(found[2])
        finally:
            process.terminate()
            process.wait(timeout=30)
            if process.stdout is not None:
                process.stdout.close()


def serve(bundle: str) -> list[str]:
    """The arguments of `hhh-router serve` on a free port."""
    return ["-c", _COMMAND, "serve", "--port", "0", "--bundle", bundle]


def announce(address: Address) -> None:
    """Print what `started` waits for."""
    print(f"{_LISTENING}http://{address[0]}:{address[1]}/v1", flush=True)


class Client:
    """One connection that stays open."""

    def __init__(self, address: Address) -> None:
        self._connection = http.client.HTTPConnection(*address, timeout=_START_S)

    def post(self, path: str, body: bytes) -> bytes:
        """The body of a reply.

        Raises:
            RuntimeError: It is no 200.
        """
        return self._ask("POST", path, body)

    def get(self, path: str) -> bytes:
        """The same, for what is only asked for."""
        return self._ask("GET", path, None)

    def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        self._connection.request(method, path, body)
        reply = self._connection.getresponse()
        told = reply.read()
        if reply.status != 200:
            raise RuntimeError(f"{path}: {reply.status} {told[:300]!r}")
        return told

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


@dataclass(slots=True)
class Heard:
    """What one client heard of its stream, in seconds."""

    first_s: float = 0.0
    """From the request to the first words."""
    gaps_s: list[float] = field(default_factory=list)
    """Between one piece of text and the next."""
    is_whole: bool = False
    """The stream came to its end."""


async def stream_all(address: Address, body: Mapping[str, Any], streams: int) -> list[Heard]:
    """Open so many streams at once, and hear all of them to the end."""
    return list(await asyncio.gather(*(_stream(address, body) for _ in range(streams))))


async def _stream(address: Address, body: Mapping[str, Any]) -> Heard:
    content = json.dumps(body).encode()
    heard = Heard()
    reader, writer = await asyncio.open_connection(*address)
    begun = last = perf_counter()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
        + f"content-length: {len(content)}\r\n\r\n".encode()
        + content
    )
    async for line in reader:
        if line.startswith(b"data: {") and b'"delta":{"content"' in line:
            now = perf_counter()
            if heard.first_s:
                heard.gaps_s.append(now - last)
            else:
                heard.first_s = now - begun
            last = now
        heard.is_whole |= line.startswith(b"data: [DONE]")
    writer.close()
    return heard


def main(argv: Sequence[str]) -> int:
    """Serve stand-ins for the model: a word every so often to every stream, nothing held back."""
    from hhh_router.interfaces.server.run import listen, make_server
    from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

    pause_s, words, policy = float(argv[0]), int(argv[1]), Path(argv[2])
    generator = FakeGenerator("word " * (words - 1) + "end", reader=FakeReader(), delay_s=pause_s)
    pipeline = fake_pipeline(policy, generator=generator)
    with listen("127.0.0.1", 0, pipeline.settings) as listening:
        address = listening.getsockname()[:2]
        make_server(pipeline, on_ready=lambda: announce(address)).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
