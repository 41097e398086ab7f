"""HTTP to an upstream as it is: bytes and headers as they came, nothing decoded, nothing followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Sequence

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from hhh_router.errors import BackendTimeout, NotReached, UpstreamError

Headers = Sequence[tuple[bytes, bytes]]

KEEPALIVE_S = 4.0
"""An idle connection is given up before servers do so (uvicorn and Node after 5 s), or a request could meet its end."""
MOST_HEADER_BYTES = 65_536
_NO_HEADERS_OF_ITS_OWN = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")


class RawResponse:
    """An upstream's answer, read piece by piece. Close it, or read it to its end."""

    def __init__(self, response: aiohttp.ClientResponse, shown: str) -> None:
        self._response = response
        self._shown = shown
        self.status = response.status
        self.headers: Headers = response.raw_headers

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives; nothing is read ahead of whoever asks, beyond one small buffer.

        Raises:
            UpstreamError: It broke off before its end.
            BackendTimeout: It was silent for too long.
        """
        try:
            async for piece in self._response.content.iter_any():
                yield piece
        except TimeoutError as error:
            raise BackendTimeout(f"upstream {self._shown} fell silent", hint="try again later") from error
        except aiohttp.ClientError as error:
            raise UpstreamError(
                f"upstream {self._shown} broke off ({type(error).__name__})", hint="try again"
            ) from error

    def close(self) -> None:
        """Cut the connection if the answer has not come to its end; the upstream notices at once."""
        self._response.close()


class RawClient:
    """Connections to upstreams, kept open and used again.

    Args:
        max_connections: Most at a time, to all upstreams together; more requests wait for one.
    """

    def __init__(self, *, max_connections: int = 1024) -> None:
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None

    async def send(
        self,
        method: str,
        url: str,
        headers: Headers,
        body: bytes | AsyncIterable[bytes] | None,
        *,
        connect_s: float,
        first_byte_s: float,
        idle_s: float,
    ) -> RawResponse:
        """Send a request and wait for the head of its answer.

        Args:
            method: As the client sent it.
            url: Encoded already; it is sent as it stands.
            headers: Exactly those that are sent, but for ``Host`` and the framing of the body.
            body: As the client sent it.
            connect_s: Longest wait for a connection, in seconds.
            first_byte_s: Longest wait for the head of the answer, from the last piece of the body on.
            idle_s: Longest silence in its body.

        Raises:
            NotReached: There was no connection, and nothing was sent.
            UpstreamError: The connection broke, or the answer is not HTTP.
            BackendTimeout: No answer in time.
        """
        target = URL(url, encoded=True)
        shown = target.authority.rpartition("@")[2]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=idle_s)
        clock = asyncio.get_running_loop().time
        waiting: asyncio.Timeout | None = None

        async def sent(pieces: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
            async for piece in pieces:
                yield piece
                if waiting is not None:  # a long upload is no silence of the upstream's
                    waiting.reschedule(clock() + first_byte_s)

        try:
            async with asyncio.timeout(first_byte_s) as waiting:
                response = await self._open().request(
                    method,
                    target,
                    headers=CIMultiDict([(k.decode("latin-1"), _text(v)) for k, v in headers]),
                    data=sent(body) if isinstance(body, AsyncIterable) else body,
                    skip_auto_headers=_NO_HEADERS_OF_ITS_OWN,
                    allow_redirects=False,
                    timeout=timeout,
                )
                waiting = None
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as error:
            raise NotReached(
                f"upstream {shown} cannot be reached ({_why(error)})",
                hint="check that it runs and that --upstream names it",
            ) from error
        except TimeoutError as error:
            raise BackendTimeout(f"upstream {shown} did not answer in time", hint="try again later") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise UpstreamError(f"upstream {shown} broke off ({_why(error)})", hint="try again") from error
        return RawResponse(response, shown)

    async def aclose(self) -> None:
        """Close the connections; calling it again does nothing."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections, keepalive_timeout=KEEPALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),  # one caller's cookies are not another's
                auto_decompress=False,
                max_line_size=MOST_HEADER_BYTES,
                max_field_size=MOST_HEADER_BYTES,
            )
        return self._session


def _text(value: bytes) -> str:
    """A header's value so that its UTF-8 is what came; what is no UTF-8 becomes it, which HTTP allows a gateway."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _why(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return "its certificate is not trusted, or TLS failed"
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or type(error.os_error).__name__
    return type(error).__name__
