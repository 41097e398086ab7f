"""Server-sent events, from bytes as they arrive."""

from __future__ import annotations

from collections.abc import Iterator

from hhh_router.errors import UpstreamError


class EventParser:
    r"""Splits a stream of bytes into the data of its events, wherever the network cut it.

    >>> parser = EventParser()
    >>> list(parser.feed(b'data: {"a"')), list(parser.feed(b': 1}\n\n: ping\n\ndata: [DONE]\n\n'))
    ([], ['{"a": 1}', '[DONE]'])

    Args:
        max_bytes: Largest event that is accepted.
    """

    def __init__(self, *, max_bytes: int = 4_000_000) -> None:
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._data: list[str] = []
        self._size = 0
        self._skip_newline = False

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of every event that ends in this piece.

        Raises:
            UpstreamError: An event is larger than ``max_bytes``, or not UTF-8.
        """
        for line in self._lines(piece):
            self._size += len(line)
            if line.startswith(b"data:"):
                self._data.append(_decoded(line[5:].removeprefix(b" ")))
            elif not line:
                if self._data:
                    yield "\n".join(self._data)
                self._data = []
                self._size = 0
            if self._size > self._max_bytes:
                raise UpstreamError(f"the upstream sent an event of more than {self._max_bytes:,} bytes")

    def _lines(self, piece: bytes) -> Iterator[bytes]:
        """Lines ended by LF, CR or CR LF, as the standard allows."""
        if self._skip_newline and piece:
            piece = piece.removeprefix(b"\n")
            self._skip_newline = False
        self._line += piece
        if len(self._line) > self._max_bytes:
            raise UpstreamError(f"the upstream sent an event of more than {self._max_bytes:,} bytes")
        whole = bytes(self._line).replace(b"\r\n", b"\n")
        if whole.endswith(b"\r"):
            self._skip_newline = True
        *lines, rest = whole.replace(b"\r", b"\n").split(b"\n")
        self._line = bytearray(rest)
        yield from lines


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UpstreamError("the upstream sent an event that is not UTF-8") from error
