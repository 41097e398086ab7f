"""An upstream that speaks another wire than the client: LiteLLM translates between them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from hhh_router.assemble import open_litellm
from hhh_router.errors import BackendTimeout, InvalidRequest, UpstreamError
from hhh_router.interfaces.proxy.headers import Headers, encoded, find
from hhh_router.interfaces.proxy.observe import parsed
from hhh_router.interfaces.proxy.translated import fields_of, framed, whole
from hhh_router.interfaces.proxy.upstreams import Outgoing, Timeouts
from hhh_router.interfaces.proxy.wires import find_wire
from hhh_router.interfaces.server.anthropic import anthropic_failure
from hhh_router.interfaces.server.http import NEVER_RETRY, Failure, WireError, dump, failure

if TYPE_CHECKING:
    from hhh_router.upstream.litellm import Kind, LiteLLM

PREFIX = "litellm:"
"""Begins the name of a translated upstream, where others have a URL."""
_EMBEDDINGS = re.compile(r"/embeddings/?$")
_MODELS = re.compile(r"/models/?$")
_CLOSING: set[asyncio.Task[None]] = set()
"""Streams that are hung up on: a task that nobody holds may be lost."""


class Translation:
    """An answer in the client's wire, as `upstreams.Answer` has it."""

    def __init__(
        self, status: int, headers: Headers, begun: bytes, rest: AsyncGenerator[bytes, None] | None, idle_s: float
    ) -> None:
        self.status = status
        self.headers = headers
        self._begun = begun
        self._rest = rest
        self._idle_s = idle_s

    @classmethod
    def whole(cls, status: int, data: bytes, headers: dict[str, str] | None = None) -> Translation:
        """One that is all here."""
        fields = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        return cls(status, encoded(fields), data, None, 0)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives.

        Raises:
            UpstreamError: The provider broke off.
            BackendTimeout: It was silent for too long.
        """
        yield self._begun
        if self._rest is None:
            return
        try:
            while True:
                try:
                    async with asyncio.timeout(self._idle_s):
                        piece = await anext(self._rest, None)
                except TimeoutError as error:
                    raise BackendTimeout("the upstream fell silent", hint="try again later") from error
                if piece is None:
                    return
                yield piece
        finally:
            await self._hang_up()

    def close(self) -> None:
        """Hang up on the provider, if its answer has not come to its end."""
        if self._rest is not None:
            closing = asyncio.ensure_future(self._hang_up())
            _CLOSING.add(closing)
            closing.add_done_callback(_CLOSING.discard)

    async def _hang_up(self) -> None:
        if self._rest is not None:
            with suppress(RuntimeError):  # it is being read at this moment, by a task that is cancelled
                await self._rest.aclose()


class Translator:
    """Sends requests through LiteLLM; see `upstreams.Translator`.

    Args:
        model: Asks the provider.
        shown: The model's name, for lists of models.
        drop_params: Leave out fields that nobody translates, in place of an error.
        max_bytes: Largest body that is read.
    """

    def __init__(self, model: LiteLLM, *, shown: str, drop_params: bool, max_bytes: int) -> None:
        self._model = model
        self._shown = shown
        self._drop_params = drop_params
        self._max_bytes = max_bytes

    async def send(self, request: Outgoing, timeouts: Timeouts) -> Translation:
        """The answer, an error of the provider's included.

        Raises:
            NotReached, UpstreamError: There was none.
            BackendTimeout: Not in time.
        """
        wire = find_wire(request.method, request.path)
        is_anthropic = wire.name == "messages" if wire else find(request.headers, b"anthropic-version") is not None
        told: Callable[[Exception], Failure] = anthropic_failure if is_anthropic else failure
        try:
            if request.method == "GET" and _MODELS.search(request.path):
                return Translation.whole(200, self._models(is_anthropic=is_anthropic))
            kind = self._kind(request, wire.name if wire else None)
            body = await self._body(request)
            asked = fields_of(
                kind, body, drop_params=self._drop_params, keeps_responses=self._model.keeps_responses
            )  # fmt: skip
            if wire is not None:
                wire.asked(asked)  # what no wire can have would fail within LiteLLM
            return await self._asked(kind, asked, timeouts, as_base64=body.get("encoding_format") == "base64")
        except (InvalidRequest, WireError) as error:
            return _failed(told, error)
        except UpstreamError as error:
            if error.status is None:
                raise
            said = WireError(error.status, f"{self._shown}: {error.hint or error.message}", code=error.code)
            return _failed(told, said, {"retry-after": error.retry_after} if error.retry_after else {})

    async def aclose(self) -> None:
        """Close the connections."""
        if _CLOSING:
            await asyncio.wait(_CLOSING, timeout=5)
        await self._model.aclose()

    async def _asked(self, kind: Kind, body: dict[str, object], timeouts: Timeouts, *, as_base64: bool) -> Translation:
        """Ask, and wait for the first event: until then an error can still be told as one."""
        longest_s = max(timeouts.first_byte_s, timeouts.idle_s)
        try:
            async with asyncio.timeout(timeouts.first_byte_s):
                found = await self._model.call(kind, body, timeout_s=longest_s)
                if not isinstance(found, AsyncGenerator):
                    return Translation.whole(200, whole(kind, found, as_base64=as_base64))
                frames = framed(kind, found)
                begun = await anext(frames, b"")
        except TimeoutError as error:
            raise BackendTimeout(f"upstream {self._shown} did not answer in time", hint="try again later") from error
        headers = encoded({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        return Translation(200, headers, begun, frames, timeouts.idle_s)

    def _kind(self, request: Outgoing, wire: str | None) -> Kind:
        if wire is not None:
            return wire  # type: ignore[return-value]  # wires are named as LiteLLM's calls are here
        if request.method == "POST" and _EMBEDDINGS.search(request.path):
            return "embeddings"
        raise WireError(
            501,
            f"{request.method} {request.path[:200]}: cannot be translated for {self._shown};"
            " give this path a route to an upstream with a URL",
            code="path_not_translated",
        )

    async def _body(self, request: Outgoing) -> dict[str, object]:
        raw = bytearray()
        if isinstance(request.body, AsyncIterable):
            async for piece in request.body:
                raw += piece
                if len(raw) > self._max_bytes:
                    raise WireError(413, f"the body is larger than {self._max_bytes:,} bytes", code="too_large")
        else:
            raw += request.body or b""
        encoding = find(request.headers, b"content-encoding")
        return dict(parsed(bytes(raw), encoding, max_bytes=self._max_bytes, strict=False))

    def _models(self, *, is_anthropic: bool) -> bytes:
        name = self._shown
        if is_anthropic:
            told = {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
            return dump({"data": [told], "has_more": False, "first_id": name, "last_id": name})
        listed = {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}
        return dump({"object": "list", "data": [listed]})


def open_translator(
    model: str,
    *,
    place: str,
    max_bytes: int,
    api_key: str | None = None,
    api_base: str | None = None,
    drop_params: bool = False,
) -> Translator:
    """A translator to a model; arguments as `open_litellm` and `Translator` have them.

    Raises:
        MissingExtra: LiteLLM is not installed.
        SettingsError: It knows no such provider.
    """
    opened = open_litellm(model, place=place, api_key=api_key, api_base=api_base, drop_params=drop_params)
    return Translator(opened, shown=model, drop_params=drop_params, max_bytes=max_bytes)


def _failed(
    told: Callable[[Exception], Failure], error: Exception, headers: dict[str, str] | None = None
) -> Translation:
    status, body, given = told(error)
    never = NEVER_RETRY if status == 501 else {}
    return Translation.whole(status, dump(body), {**given, **never, **(headers or {})})
