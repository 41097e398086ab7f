"""The client's side over standard input and output, such that the process can end while nobody writes to it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from mcp.server.stdio import stdio_server

_CHUNK = 1 << 16
_WAITING_LINES = 16


@asynccontextmanager
async def own_stdio() -> AsyncIterator[tuple[Any, Any]]:
    """Messages from the process's standard input and to its standard output.

    Whatever else writes to standard output meanwhile (a library that prints) goes to standard error. The SDK's own
    reader waits on a thread that cannot be left, so a server that ends would keep the process; lines come from a thread
    of ours that nobody has to wait for.
    """
    sys.stdout.flush()
    wire = os.dup(1)
    os.dup2(2, 1)
    lines = _Lines(0)
    try:
        async with stdio_server(stdin=lines, stdout=_Out(wire)) as (read, write):  # type: ignore[arg-type]  # as much of a file as it uses
            try:
                yield read, write
            finally:
                with anyio.CancelScope(shield=True):
                    await write.aclose()
                    lines.stop()
                    async for _ in read:  # what the SDK's reader still holds, so that it ends
                        pass
    finally:
        os.dup2(wire, 1)
        os.close(wire)


class _Lines:
    """The lines of a file descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Give no more of them."""
        self._stopped.set()

    async def __aiter__(self) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING_LINES)
        threading.Thread(target=self._read, args=(loop, lines), name="stdin", daemon=True).start()
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            while not self._stopped.is_set():
                following = asyncio.ensure_future(lines.get())
                await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done() or (line := following.result()) is None:
                    following.cancel()
                    return
                yield line.decode("utf-8", "replace")
        finally:
            stopped.cancel()

    def _read(self, loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[bytes | None]) -> None:
        def put(line: bytes | None) -> None:
            asyncio.run_coroutine_threadsafe(lines.put(line), loop).result()  # no further than it is read

        parts: list[bytes] = []
        with suppress(RuntimeError, asyncio.CancelledError):  # the loop is gone
            while chunk := self._chunk():
                *ended, rest = chunk.split(b"\n")
                for line in ended:
                    parts.append(line)
                    put(b"".join(parts))
                    parts.clear()
                parts.append(rest)
            put(None)

    def _chunk(self) -> bytes:
        try:
            return os.read(self._fd, _CHUNK)
        except OSError:
            return b""


class _Out:
    """A file descriptor that takes texts."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def write(self, text: str) -> None:
        await asyncio.to_thread(self._write, text.encode("utf-8", "surrogatepass"))

    async def flush(self) -> None:
        """Nothing waits here."""

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        with suppress(BrokenPipeError):  # the client has left, as the end of its input will tell
            while rest:
                rest = rest[os.write(self._fd, rest) :]
