"""LiteLLM's provider: ``litellm.completion(model="hhh-router/balanced", …)`` in this process, or at ``api_base``.

`register` puts it into LiteLLM; in a proxy's configuration ``custom_provider_map`` names `provider`. Bodies are read
and replies told by the very code that serves ``/v1/chat/completions``: what that wire can, this one can.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import litellm
from litellm.llms.custom_llm import CustomLLM, CustomLLMError
from litellm.types.utils import ModelResponse, ModelResponseStream
from litellm.utils import convert_to_model_response_object

from hhh_router.errors import ContextTooLong, InvalidRequest
from hhh_router.interfaces.aio import AsyncHHHRouter
from hhh_router.interfaces.loop import LoopThread
from hhh_router.interfaces.remote import RemotePipeline
from hhh_router.interfaces.server.choices import strictest, together, total
from hhh_router.interfaces.server.http import failure
from hhh_router.interfaces.server.models import AUTO
from hhh_router.interfaces.server.openai import Call, ChunkWriter, parse_chat
from hhh_router.pipeline import ChatDelta, ChatFinished, ChatStarted, Pipeline
from hhh_router.trace.block import Metadata

PROVIDER = "hhh-router"
"""What stands before the slash in a model's name."""
MOST_SERVERS = 32
"""Servers (and keys) whose connections are kept open."""
_OURS = ("hhh-", "hhh@")  # begins a model name of the server's own; anything else is a policy's name
_OF_LITELLM = ("stream", "stream_options", "max_retries")  # what LiteLLM itself heeds; it makes the usage chunk
_OF_CHUNKS = frozenset({"id", "object", "created", "model", "choices", "usage"})


class HHHRouterLLM(CustomLLM):  # type: ignore[misc]  # where LiteLLM is not installed
    """Answers LiteLLM's calls. The model is loaded by the first one that names no ``api_base``.

    Args:
        options: Of the router in this process, as `AsyncHHHRouter` takes them: ``bundle``, ``policy``, ``pipeline`` and
            fields of `Settings`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._routers = _Routers(options)
        self._loop: LoopThread | None = None
        self._opening = threading.Lock()

    def completion(self, *args: Any, **asked: Any) -> ModelResponse:
        """A whole reply; arguments as LiteLLM gives them, by name."""
        return self._thread().run(self._whole(_Asked.of(asked), asked["model_response"]))

    async def acompletion(self, *args: Any, **asked: Any) -> ModelResponse:
        """The same, awaited; whoever cancels it cancels the model's work."""
        return await self._thread().wait(self._whole(_Asked.of(asked), asked["model_response"]))

    def streaming(self, *args: Any, **asked: Any) -> Iterator[Any]:
        """Chunks as they are cleared; closing the iterator cancels the model's work."""
        thread, chunks = self._thread(), _Chunks(self._chunks(_Asked.of(asked)))
        try:
            while (chunk := thread.run(chunks.next())) is not None:
                yield chunk
        finally:
            thread.leave(chunks.close())

    async def astreaming(self, *args: Any, **asked: Any) -> AsyncIterator[Any]:
        """The same, awaited."""
        thread, chunks = self._thread(), _Chunks(self._chunks(_Asked.of(asked)))
        try:
            while (chunk := await thread.wait(chunks.next())) is not None:
                yield chunk
        finally:
            thread.leave(chunks.close())  # not awaited: anyio cancels that too, where it has cancelled the reader

    def close(self) -> None:
        """Free the model and close all connections; the next call opens them again."""
        with self._opening:
            thread, self._loop = self._loop, None
        if thread is not None:
            thread.close(self._routers.aclose())

    def _thread(self) -> LoopThread:
        """One loop for all callers, whichever loop or thread is theirs: the engine and the connections belong to it."""
        with self._opening:
            if self._loop is None:
                self._loop = LoopThread()
            return self._loop

    async def _whole(self, asked: _Asked, empty: ModelResponse) -> ModelResponse:
        try:
            call, found = asked.call(), dict[int, ChatFinished]()
            async with self._routers.pipeline(asked.api_base, asked.api_key) as pipeline:
                chats = together(cast("Pipeline", pipeline), call.requests, stream=False)  # either can chat
                async with aclosing(chats) as events:
                    async for at, event in events:
                        if isinstance(event, ChatFinished):
                            found[at] = event
            done = [found[at] for at in sorted(found)]
            call = _named(call, done[0].metadata)
            return convert_to_model_response_object(
                response_object=call.whole_of(done) if call.count > 1 else call.whole(done[0]),
                model_response_object=empty,
                _response_headers=strictest(done).headers(),
            )
        except Exception as error:  # a door: whatever broke must become an error that LiteLLM's callers know
            _fail(error, asked.model)

    async def _chunks(self, asked: _Asked) -> AsyncGenerator[Any, None]:
        """LiteLLM's chunks. The last of ours stands before the one that LiteLLM ends every stream with."""
        try:
            call = asked.call()
            if call.count > 1:
                raise InvalidRequest(
                    f"n: {call.count} replies cannot be streamed, LiteLLM's streams have one",
                    hint="leave n or stream out",
                )
            writer: ChunkWriter | None = None
            async with (
                self._routers.pipeline(asked.api_base, asked.api_key) as pipeline,
                aclosing(pipeline.chat(call.request, stream=True)) as events,
            ):
                async for event in events:
                    match event:
                        case ChatStarted():
                            writer = ChunkWriter(_named(call, event.metadata), event.metadata)
                        case ChatDelta():
                            assert writer is not None  # ChatStarted is always first
                            for chunk in writer.delta(event):
                                yield _chunk(chunk)
                        case ChatFinished():
                            assert writer is not None
                            for chunk in writer.end(event):
                                yield _ending(chunk, event)
        except Exception as error:  # as above
            _fail(error, asked.model)


# -- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One call, as LiteLLM hands it to a provider."""

    model: str
    """What stands behind the slash."""
    messages: Sequence[Any]
    fields: Mapping[str, Any]
    """OpenAI's fields, and those LiteLLM does not know."""
    api_base: str | None
    api_key: str | None
    timeout_s: float | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> _Asked:
        fields = {k: v for k, v in (given.get("optional_params") or {}).items() if k not in _OF_LITELLM}
        timeout = given.get("timeout")
        return cls(
            model=given["model"],
            messages=given["messages"],
            fields={**fields, **(fields.pop("extra_body", None) or {})},
            api_base=given.get("api_base") or None,
            api_key=given.get("api_key") or None,
            timeout_s=getattr(timeout, "read", timeout),  # seconds, or httpx's four limits
        )

    def call(self) -> Call:
        """The chat it asks for.

        Raises:
            InvalidRequest: A field is wrong, or asks for what is not supported.
            WireError: 404, no such model.
        """
        call = parse_chat({**self.fields, "messages": self.messages, "model": model_name(self.model)})
        return replace(call, model=self.model, request=replace(call.request, timeout_s=self.timeout_s))


def model_name(name: str) -> str:
    """The server's name for what stands behind the slash: a model of its own, or a policy's name.

    >>> model_name("balanced"), model_name("hhh@2-6-5-3:strict")
    ('hhh-auto:balanced', 'hhh@2-6-5-3:strict')
    """
    return name if name.startswith(_OURS) else f"{AUTO}:{name}"


# -- what is answered -------------------------------------------------------------------------------------------------


def _named(call: Call, block: Metadata) -> Call:
    """The call under the name that its own traces have."""
    return replace(call, request=replace(call.request, request_id=block.request_id))


def _chunk(chunk: Mapping[str, Any]) -> ModelResponseStream:
    """LiteLLM's proxy sends fields that OpenAI's chunks do not have only of a chunk whose delta has some too."""
    if ours := _ours(chunk):
        [choice, *more] = chunk["choices"]
        delta = {**choice["delta"], "provider_specific_fields": ours}
        chunk = {**chunk, "choices": [{**choice, "delta": delta}, *more]}
    return ModelResponseStream(**chunk)


def _ours(chunk: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in chunk.items() if k not in _OF_CHUNKS}


def _ending(chunk: Mapping[str, Any], done: ChatFinished) -> Any:
    """LiteLLM drops a chunk of OpenAI's that ends a stream, and makes one of its own: the block rides before it."""
    choices = chunk["choices"]
    if not choices or choices[0]["finish_reason"] is None:
        return _chunk(chunk)
    return {
        "text": "",
        "is_finished": True,
        "finish_reason": choices[0]["finish_reason"],
        "index": 0,
        "usage": total([done]),
        "provider_specific_fields": _ours(chunk),
    }


class _Chunks:
    """Chunks for a reader on another loop, who may leave while the next one is being made."""

    def __init__(self, chunks: AsyncGenerator[Any, None]) -> None:
        self._chunks = chunks
        self._turn = asyncio.Lock()

    async def next(self) -> Any:
        """The next one; None after the last."""
        async with self._turn:
            return await anext(self._chunks, None)

    async def close(self) -> None:
        """Stop, once the one that is being made has been given up."""
        async with self._turn:
            await self._chunks.aclose()


def _fail(error: Exception, model: str) -> NoReturn:
    """Raise it as what LiteLLM makes its own classes of, by status; `Retry-After` comes along."""
    status, body, headers = failure(error)
    said = body["error"]["message"]
    if isinstance(error, ContextTooLong):
        raise litellm.ContextWindowExceededError(message=said, model=model, llm_provider=PROVIDER) from error
    told = CustomLLMError(status_code=status, message=said)
    told.headers = dict(headers)
    raise told from error


# -- who answers ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Open:
    router: AsyncHHHRouter
    users: int = 0


class _Routers:
    """The router of this process, and those of servers, each opened when it is first needed. For one event loop."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._open: OrderedDict[tuple[str | None, str | None], _Open] = OrderedDict()

    @asynccontextmanager
    async def pipeline(
        self, api_base: str | None, api_key: str | None
    ) -> AsyncGenerator[Pipeline | RemotePipeline, None]:
        """The path to who answers; it stays open while it is used."""
        key = (api_base, None if api_base is None else api_key)
        if key not in self._open:
            self._open[key] = _Open(self._make(*key))
        self._open.move_to_end(key)
        found = self._open[key]
        found.users += 1
        try:
            yield await found.router.ready()
        finally:
            found.users -= 1
            await self._trim()

    def _make(self, api_base: str | None, api_key: str | None) -> AsyncHHHRouter:
        if api_base is None:
            return AsyncHHHRouter(**self._options)
        ours = {k: v for k, v in self._options.items() if k not in ("bundle", "pipeline", "policy")}
        return AsyncHHHRouter(base_url=api_base, **{**ours, **({} if api_key is None else {"api_key": api_key})})

    async def _trim(self) -> None:
        idle = [key for key, kept in self._open.items() if key[0] is not None and not kept.users]
        for key in idle[: max(0, len(self._open) - MOST_SERVERS)]:
            await self._open.pop(key).router.aclose()

    async def aclose(self) -> None:
        """Close all of them."""
        kept, self._open = list(self._open.values()), OrderedDict()
        await asyncio.gather(*(k.router.aclose() for k in kept))


# -- where LiteLLM finds it --------------------------------------------------------------------------------------------

provider = HHHRouterLLM()
"""For a LiteLLM proxy: ``custom_handler: hhh_router.interfaces.litellm.provider``."""


def register(handler: HHHRouterLLM = provider, *, name: str = PROVIDER) -> HHHRouterLLM:
    """Make ``name/…`` a model of LiteLLM's, in place of what answered there before.

    Args:
        handler: Answers; `provider`, with the deployment's settings, where none is given.
        name: What stands before the slash.
    """
    others = [entry for entry in litellm.custom_provider_map if entry["provider"] != name]
    litellm.custom_provider_map = [*others, {"provider": name, "custom_handler": handler}]
    return handler
