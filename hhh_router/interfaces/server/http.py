"""What every endpoint shares: reading a body, errors in OpenAI's shape, keys, and noticing that the client left."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Send

from hhh_router.errors import (
    DeadlineExceeded,
    HHHRouterError,
    InvalidRequest,
    Overloaded,
    SettingsError,
    Unavailable,
    UpstreamError,
    http_status,
)
from hhh_router.pipeline.validate import is_deeper
from hhh_router.settings import Settings

if TYPE_CHECKING:
    from hhh_router.interfaces.server.keys import Door, KeyRing

_log = logging.getLogger(__name__)

T = TypeVar("T")
Failure = tuple[int, Mapping[str, Any], Mapping[str, str]]
"""Status, body and headers of a reply to what failed."""

LONGEST_MS = 86_400_000

MAX_DEPTH = 100
"""Levels of JSON in a body: whoever walks it may then do so by recursion."""
MAX_HEADER_BYTES = 32_768
BODY_S = 30.0
"""A body has to be here after so long, however slowly it comes."""

NEVER_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat every 5xx; this tells them that it cannot help."""


class WireError(Exception):
    """An answer in OpenAI's error shape, for what only a server can find wrong.

    Args:
        status: HTTP status.
        message: What was found, where, and what to do.
        code: Stable name of the error.
        param: Field of the body that is wrong.
        closes: The connection ends with the reply, for the rest of the request is not wanted.
    """

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, closes: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.closes = closes

    @property
    def body(self) -> dict[str, Any]:
        """The JSON the client gets."""
        return error_body(self.message, status=self.status, code=self.code, param=self.param)


def error_body(message: str, *, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape.

    >>> error_body("too long", status=400, code="context_length_exceeded")["error"]["type"]
    'invalid_request_error'
    """
    types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = types.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure(error: Exception) -> Failure:
    """Status, body and headers for any error; what was not raised on purpose is logged and told in one plain line."""
    match error:
        case WireError():
            return error.status, error.body, {"connection": "close"} if error.closes else {}
        case UpstreamError() if error.body is not None and http_status(error) == error.status:
            headers = {"retry-after": error.retry_after} if error.retry_after else {}
            return error.status, dict(error.body), headers  # the upstream's own words on the caller's mistake
        case HHHRouterError():
            status = http_status(error)
            message = f"{error.message} ({error.hint})" if error.hint else error.message
            if status >= 500:
                _log.warning("%s: %s", error.code, error.message)
            # to be fixed first, quarantined, or too late by now
            headers = dict(NEVER_RETRY) if status in (500, 501) or isinstance(error, DeadlineExceeded) else {}
            if isinstance(error, Overloaded | Unavailable) and error.retry_after_s is not None:
                headers |= retry_after(error.retry_after_s)
            return status, error_body(message, status=status, code=error.code), headers
    _log.error("unexpected error", exc_info=error)
    message = "something went wrong here; the server's log says what"
    return 500, error_body(message, status=500, code="internal_error"), {}


def retry_after(seconds: float) -> dict[str, str]:
    """When to come back, in whole seconds as the standard has it, and in milliseconds as OpenAI's clients like it.

    >>> retry_after(0.25)
    {'retry-after': '1', 'retry-after-ms': '250'}
    """
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(1000 * seconds)))}


class JsonReply(JSONResponse):
    """A JSON reply that may repeat what a client wrote, half a surrogate pair included."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return dump(content)


def failed(error: Exception, told: Callable[[Exception], Failure] = failure) -> Response:
    """The reply to a request that failed, as the wire's ``told`` has it."""
    status, body, headers = told(error)
    return JsonReply(dict(body), status, dict(headers))


async def read_json(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        WireError: It is too large (413), or comes too slowly (408).
        InvalidRequest: It is no JSON object, or nested too deeply.
    """
    raw = await _read(request, max_bytes)
    try:
        body = json.loads(raw, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no JSON: {_where(error)}", hint="send a JSON object in UTF-8") from error
    if not isinstance(body, dict):
        raise InvalidRequest("the body is JSON, but no object", hint="send a JSON object")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and is_deeper(body, MAX_DEPTH):
        raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep", hint="flatten it")
    return body


async def _read(request: Request, max_bytes: int) -> bytearray:
    raw = bytearray()
    declared = request.headers.get("content-length", "0")
    too_large = declared.isdecimal() and int(declared) > max_bytes
    try:
        async with asyncio.timeout(BODY_S):
            pieces = request.stream()
            while not too_large and (piece := await anext(pieces, None)) is not None:
                raw += piece
                too_large = len(raw) > max_bytes
    except TimeoutError:
        raise WireError(
            408, f"the body was not here after {BODY_S:g} s; send it faster", code="body_timeout", closes=True
        ) from None
    if too_large:
        raise WireError(
            413,
            f"the body is larger than {max_bytes:,} bytes; send less, or raise HHH_ROUTER_MAX_BODY_BYTES",
            code="too_large",
            closes=True,
        )
    return raw


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _where(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno} column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def timeout_s(request: Request) -> float | None:
    """Seconds that the caller waits, from ``x-request-timeout-ms``; None where the header is not there.

    Raises:
        InvalidRequest: It is no number of milliseconds.
    """
    given = request.headers.get("x-request-timeout-ms")
    if given is None:
        return None
    if not given.isascii() or not given.isdecimal() or not 0 < int(given) <= LONGEST_MS:
        raise InvalidRequest(
            f"x-request-timeout-ms: found {given[:40]!r}", hint=f"use milliseconds, 1 to {LONGEST_MS:,}"
        )
    return int(given) / 1000


def check_exposure(host: str, settings: Settings) -> None:
    """Refuse to listen beyond this machine without a key.

    Raises:
        SettingsError: ``host`` is not loopback and no key is set.
    """
    if settings.api_key is None and settings.api_keys_file is None and not is_loopback(host):
        raise SettingsError(
            f"--host {host} is reachable from outside this machine, and no key is set",
            hint="set HHH_ROUTER_API_KEY or HHH_ROUTER_API_KEYS_FILE, or listen on 127.0.0.1",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name can lead anywhere


async def until_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; it is cancelled when the client goes away. The request's body has to be read already.

    Raises:
        ClientDisconnect: The client left first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        for job in (task, watch):
            job.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Sender:
    """Sends a reply piece by piece, and knows whether it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send status and headers."""
        self.begun = True
        raw = [(k.lower().encode("latin-1"), v.encode("latin-1", "replace")) for k, v in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def part(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def json(self, body: Mapping[str, Any], headers: Mapping[str, str], *, status: int = 200) -> None:
        """Send a whole JSON reply."""
        data = dump(body)
        await self.begin(status, {"content-type": "application/json", "content-length": str(len(data)), **headers})
        await self.part(data, more=False)


def dump(body: Mapping[str, Any]) -> bytes:
    """Compact JSON in UTF-8. Half a surrogate pair, which a model can emit, is written as its escape."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(body, separators=(",", ":")).encode("ascii")


def _check_headers(request: Request) -> None:
    size = sum(len(name) + len(value) for name, value in request.headers.raw)
    if size > MAX_HEADER_BYTES:
        raise WireError(
            431,
            f"{size:,} bytes of headers; send at most {MAX_HEADER_BYTES:,}",
            code="headers_too_large",
            closes=True,
        )


def endpoint(
    work: Callable[[Request], Awaitable[Response]],
    *,
    keys: KeyRing,
    door: Door | None = None,
    needs_key: bool = True,
    told: Callable[[Exception], Failure] = failure,
) -> Callable[[Request], Awaitable[Response]]:
    """Wrap an endpoint: the key is checked first, and every error becomes a reply in the shape ``told`` gives it.

    ``request.state.key`` is then the caller's, None where nobody needs one.
    """

    async def guarded(request: Request) -> Response:
        try:
            _check_headers(request)
            request.state.key = keys.caller(request) if needs_key else None
            if request.state.key is not None:
                keys.admit(request.state.key, door)
            return await work(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        except Exception as error:  # a door: whatever broke must not reach the caller as a traceback
            return failed(error, told)

    return guarded
