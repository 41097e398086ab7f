"""Server-sent events with the bytes they came in, so that they can leave as they came."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hhh_router.errors import UpstreamError
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import dump


@dataclass(frozen=True, slots=True)
class Frame:
    """One event, or whatever stands between two."""

    raw: bytes
    """As it came, with the empty line that ends it."""
    name: str | None
    """Of the event, where it has one."""
    data: str | None
    """Of the event; None for comments."""

    def body(self) -> Mapping[str, Any] | None:
        """The data as an object; None where there is none, or it is the mark ``[DONE]``.

        Raises:
            UpstreamError: It is no JSON object, so nobody can tell what it says.
        """
        if self.data is None or not self.data.strip() or self.data.strip() == "[DONE]":
            return None
        try:
            body = json.loads(self.data)
        except (ValueError, RecursionError) as error:
            raise UpstreamError("the upstream sent a chunk that is no JSON") from error
        if not isinstance(body, dict):
            raise UpstreamError("the upstream sent a chunk that is no object")
        return body


class Frames:
    r"""Splits a stream of bytes into events, wherever the network cut it.

    >>> frames = Frames(max_bytes=100)
    >>> list(frames.feed(b"data: {}\r\n")), [(f.raw, f.data) for f in frames.feed(b"\r\n: ping\n\n")]
    ([], [(b'data: {}\r\n\r\n', '{}'), (b': ping\n\n', None)])

    Args:
        max_bytes: Largest event that is accepted.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = bytearray()
        self._line_from = 0  # where the line that has not ended yet begins
        self._scanned = 0  # up to where no end of a line was found

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """The events that end in this piece.

        Raises:
            UpstreamError: An event is larger than ``max_bytes``, or not UTF-8.
        """
        self._held += piece
        while (end := self._next_end()) is not None:
            raw = bytes(self._held[:end])
            del self._held[:end]
            self._line_from = self._scanned = 0
            yield _frame(raw)
        if len(self._held) > self._max_bytes:
            raise UpstreamError(f"the upstream sent an event of more than {self._max_bytes:,} bytes")

    def rest(self) -> bytes:
        """What came after the last event's end."""
        return bytes(self._held)

    def _next_end(self) -> int | None:
        """Where the first event ends: after an empty line, ended by LF, CR LF or CR."""
        held, i = self._held, self._scanned
        while i < len(held):
            if held[i] not in b"\r\n":
                ends = [at for at in (held.find(b"\n", i), held.find(b"\r", i)) if at >= 0]
                if not ends:
                    break
                i = min(ends)
            if held[i] == 13 and i + 1 == len(held):
                self._scanned = i  # a line feed may belong to it
                return None
            after = i + 2 if held[i : i + 2] == b"\r\n" else i + 1
            if i == self._line_from:
                return after
            self._line_from = i = after
        self._scanned = len(held)
        return None


def with_body(raw: bytes, body: Mapping[str, Any]) -> bytes:
    r"""A whole answer, or an event with its name, with another body.

    >>> with_body(b"event: x\ndata: 1\n\n", {}), with_body(b"{ }", {"a": 1})
    (b'event: x\ndata: {}\n\n', b'{"a":1}')
    """
    if raw.lstrip()[:1] == b"{":
        return dump(body)
    name = next((line for line in raw.splitlines() if line.startswith(b"event:")), None)
    return event(None if name is None else name[6:].strip().decode(), dump(body))


def _frame(raw: bytes) -> Frame:
    name: str | None = None
    data: list[str] = []
    try:
        lines = raw.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise UpstreamError("the upstream sent an event that is not UTF-8") from error
    for line in lines:
        field, colon, value = line.lstrip("\ufeff").partition(":")
        value = value.removeprefix(" ")
        if field == "data" and (colon or line == "data"):
            data.append(value)
        elif field == "event" and colon:
            name = value
    return Frame(raw, name, "\n".join(data) if data else None)


def decoded(raw: bytes, encoding: bytes | None, *, max_bytes: int) -> bytes | None:
    """A body without its ``Content-Encoding``; None where that is not gzip or deflate, is broken, or grows too large.

    >>> import gzip
    >>> decoded(gzip.compress(b"hello"), b"gzip", max_bytes=10), decoded(b"x", b"br", max_bytes=10)
    (b'hello', None)
    """
    kind = (encoding or b"identity").strip().lower()
    if kind in (b"identity", b""):
        return raw if len(raw) <= max_bytes else None
    if kind not in (b"gzip", b"x-gzip", b"deflate"):
        return None
    engine = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its first bytes
    try:
        text = engine.decompress(raw, max_bytes + 1)
    except zlib.error:
        return None
    return text if engine.eof and not engine.unused_data and len(text) <= max_bytes else None
