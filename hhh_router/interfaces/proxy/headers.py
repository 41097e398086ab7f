"""Which headers pass, and where a request goes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from urllib.parse import urlsplit

Headers = Sequence[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110, section 7.6.1: they speak of one connection alone."""


def passing(headers: Headers, *, without: Collection[bytes] = ()) -> list[tuple[bytes, bytes]]:
    """Headers that go on to the next connection, in order, duplicates kept; names in lower case, as ASGI has them.

    >>> passing([(b"Connection", b"close, X-Mine"), (b"X-Mine", b"1"), (b"A", b"1"), (b"a", b"2")])
    [(b'a', b'1'), (b'a', b'2')]
    """
    named = {
        token.strip().lower() for name, value in headers if name.lower() == b"connection" for token in value.split(b",")
    }
    dropped = _HOP_BY_HOP | named | set(without)
    return [(lower, value) for name, value in headers if (lower := name.lower()) not in dropped]


def find(headers: Headers, name: bytes) -> bytes | None:
    """The last value of a header; None where it is not there."""
    return next((value for n, value in reversed(headers) if n.lower() == name), None)


def replaced(headers: Iterable[tuple[bytes, bytes]], new: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers with others in the place of those of the same name."""
    new = list(new)
    names = {name for name, _ in new}
    return [(n, v) for n, v in headers if n not in names] + new


def encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Our own headers as ASGI has them."""
    return [(k.lower().encode("latin-1"), v.encode("latin-1", "replace")) for k, v in headers.items()]


def target(base_url: str, path: str, query: str = "") -> str:
    """Where a request for ``path`` goes, whether or not the base URL names the version that the path begins with.

    >>> target("https://api.example/v1", "/v1/chat/completions")
    'https://api.example/v1/chat/completions'
    >>> target("https://api.example", "/v1/models", "limit=2")
    'https://api.example/v1/models?limit=2'
    >>> target("https://host/openai/v1/", "/v1/responses"), target("https://host/azure", "/v1/responses")
    ('https://host/openai/v1/responses', 'https://host/azure/v1/responses')
    """
    parts = urlsplit(base_url)
    base = parts.path.rstrip("/")
    segments = base.split("/")[1:] if base else []
    for i in range(len(segments)):  # the longest end of the base that the path begins with is said once
        shared = "/" + "/".join(segments[i:])
        if path == shared or path.startswith(f"{shared}/"):
            base = base[: len(base) - len(shared)]
            break
    query = "&".join(q for q in (parts.query, query) if q)
    return f"{parts.scheme}://{parts.netloc}{base}{path}{f'?{query}' if query else ''}"
