"""The Python door, in process: `AsyncHHHRouter`, and `HHHRouter` as a blocking face over it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, overload

from hhh_router.errors import HHHRouterError, InvalidRequest
from hhh_router.interfaces.parse import MessageLike, parse_prompt, parse_stop, parse_weights
from hhh_router.pipeline import (
    ChatDelta,
    ChatEvent,
    ChatFinished,
    ChatResult,
    GuardResult,
    Pipeline,
    RouteResult,
)
from hhh_router.settings import Settings
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, GuardRequest, ReadRequest, Sampling, Weights

T = TypeVar("T")

Prompt = str | Sequence[MessageLike]
"""A user's text, or a conversation."""
PolicyLike = str | Path | None
"""A policy's name, or the path of a policy file; None takes the deployment's default."""
WeightsLike = Weights | Mapping[str, float] | str | None
"""Shares per expert, or a mixture name such as ``hhh@2-6-5-3``; None leaves them to the router."""

_POLICY_SUFFIXES = (".yaml", ".yml")


class SamplingArgs(TypedDict, total=False):
    """How the next token is drawn."""

    max_tokens: int
    """Most tokens to generate, >= 1; 256 by default."""
    temperature: float
    """0, the default, is greedy decoding."""
    top_p: float
    """Nucleus mass, in (0, 1]; 1 by default."""
    seed: int | None
    """Seed of this request's own generator; None draws one."""
    stop: str | Sequence[str] | None
    """One or several strings that end the reply; they are not part of it."""


class AsyncChatStream:
    """The reply as it is cleared: iterate over it for `ChatDelta` events; ``result`` is there once it has ended."""

    def __init__(self, events: AsyncGenerator[ChatEvent, None]) -> None:
        self._events = events
        self._metadata: Metadata | None = None
        self._result: ChatResult | None = None

    @property
    def metadata(self) -> Metadata | None:
        """The latest block; None before the first piece."""
        return self._metadata

    @property
    def result(self) -> ChatResult:
        """The whole reply.

        Raises:
            HHHRouterError: The stream has not ended yet.
        """
        if self._result is None:
            raise HHHRouterError("the stream has not ended yet", hint="iterate to its end before asking for the result")
        return self._result

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatDelta:
        async for event in self._events:
            match event:
                case ChatDelta():
                    return event
                case ChatFinished():
                    self._metadata = event.metadata
                    self._result = _as_result(event)
                case _:
                    self._metadata = event.metadata
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop early; the model's work on it ends with its next step."""
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class AsyncHHHRouter:
    """Chats, guards and routes with a bundle's mixture, in this process.

    The model is loaded by the first call (or ``async with``); that takes seconds and does not block the event loop.

    Args:
        bundle: Name of a bundle, or a path to one; None takes ``HHH_ROUTER_BUNDLE`` or the default.
        policy: Default policy, by name or path; None takes ``HHH_ROUTER_POLICY`` or ``balanced``.
        pipeline: A path put together by you, such as `hhh_router.testing.fake_pipeline`; nothing is loaded then.
        settings: Further fields of `Settings`, such as ``threads=2``.

    Raises:
        SettingsError: A setting is wrong.
    """

    def __init__(
        self,
        bundle: str | Path | None = None,
        policy: PolicyLike = None,
        *,
        pipeline: Pipeline | None = None,
        **settings: object,
    ) -> None:
        self._settings = Settings.load(
            bundle=None if bundle is None else str(bundle), policy=None if policy is None else str(policy), **settings
        )
        self._pipeline = pipeline
        self._loading = asyncio.Lock()
        self._closed = False

    def load(self) -> Pipeline:
        """Load policies, bundle and model now, blocking; returns the path every call takes.

        Raises:
            ConfigError: A policy, the bundle or a setting is wrong.
            MissingExtra: torch is not installed.
        """
        if self._closed:
            raise HHHRouterError("this router is closed", hint="open a new one")
        if self._pipeline is None:
            from hhh_router.assemble import build_pipeline

            self._pipeline = build_pipeline(self._settings)
        return self._pipeline

    async def _ready(self) -> Pipeline:
        if self._pipeline is not None and not self._closed:
            return self._pipeline
        async with self._loading:
            return await asyncio.to_thread(self.load)

    @overload
    async def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = ...,
        weights: WeightsLike = ...,
        stream: Literal[False] = ...,
        **sampling: Unpack[SamplingArgs],
    ) -> ChatResult: ...
    @overload
    async def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = ...,
        weights: WeightsLike = ...,
        *,
        stream: Literal[True],
        **sampling: Unpack[SamplingArgs],
    ) -> AsyncChatStream: ...
    async def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = None,
        weights: WeightsLike = None,
        stream: bool = False,
        **sampling: Unpack[SamplingArgs],
    ) -> ChatResult | AsyncChatStream:
        """Answer a conversation.

        Args:
            messages: The user's text, or the turns so far.
            policy: Policy of this request.
            weights: Pin the mixture instead of leaving it to the router; the policy's bounds still hold.
            stream: Return an iterator over the reply as it is cleared.
            sampling: See `SamplingArgs`.

        Raises:
            RequestError: The request has to be fixed.
            BackendError: The model failed, or took too long.
        """
        pipeline = await self._ready()
        turns, unread = parse_prompt(messages, where="messages")
        request = ChatRequest(
            messages=turns,
            policy=_policy_name(policy, pipeline),
            weights=parse_weights(weights),
            sampling=_sampling(sampling),
            not_inspected=unread,
        )
        reply = AsyncChatStream(pipeline.chat(request, stream=stream))
        if stream:
            return reply
        async with reply:
            async for _ in reply:
                pass
        return reply.result

    @overload
    async def guard(
        self, prompt: Prompt | None = ..., response: str | None = ..., policy: PolicyLike = ...
    ) -> GuardResult: ...
    @overload
    async def guard(
        self,
        prompt: Sequence[Prompt | None] | None = ...,
        response: Sequence[str | None] | None = ...,
        policy: PolicyLike = ...,
    ) -> list[GuardResult]: ...
    async def guard(self, prompt: Any = None, response: Any = None, policy: PolicyLike = None) -> Any:
        """Judge a prompt, a response, or both; lists are judged as one batch and give a list.

        Args:
            prompt: Text or a conversation; or a list of those.
            response: Text; or a list, as long as the prompts where both are given. An entry may be None.
            policy: Policy of this call.

        Raises:
            RequestError: A text cannot be judged as it stands.
            BackendTimeout: It took too long.
        """
        pipeline = await self._ready()
        pairs, is_list = _pairs(prompt, response)
        name = _policy_name(policy, pipeline)
        results = await pipeline.guard([_guard_request(p, r, name) for p, r in pairs])
        return results if is_list else results[0]

    @overload
    async def route(self, prompt: Prompt, policy: PolicyLike = ...) -> RouteResult: ...  # type: ignore[overload-overlap]
    @overload
    async def route(self, prompt: Sequence[Prompt], policy: PolicyLike = ...) -> list[RouteResult]: ...
    async def route(self, prompt: Any, policy: PolicyLike = None) -> Any:
        """Needs, posterior and weights of a prompt; a list of prompts is read as one batch and gives a list.

        Raises:
            RequestError: A prompt cannot be read as it stands.
            BackendTimeout: It took too long.
        """
        pipeline = await self._ready()
        pairs, is_list = _pairs(prompt, None)
        name = _policy_name(policy, pipeline)
        results = await pipeline.route([_guard_request(p, None, name) for p, _ in pairs])
        return results if is_list else results[0]

    async def aclose(self) -> None:
        """Free the model; calling it again does nothing."""
        self._closed = True
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            await pipeline.aclose()

    async def __aenter__(self) -> Self:
        await self._ready()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class ChatStream:
    """The reply as it is cleared: iterate over it for `ChatDelta` events; ``result`` is there once it has ended."""

    def __init__(self, stream: AsyncChatStream, loop: _LoopThread) -> None:
        self._stream = stream
        self._loop = loop

    @property
    def metadata(self) -> Metadata | None:
        """The latest block; None before the first piece."""
        return self._stream.metadata

    @property
    def result(self) -> ChatResult:
        """The whole reply.

        Raises:
            HHHRouterError: The stream has not ended yet.
        """
        return self._stream.result

    def __iter__(self) -> Iterator[ChatDelta]:
        return self

    def __next__(self) -> ChatDelta:
        delta = self._loop.run(self._next())
        if delta is None:
            raise StopIteration
        return delta

    async def _next(self) -> ChatDelta | None:
        return await anext(self._stream, None)

    def close(self) -> None:
        """Stop early; the model's work on it ends with its next step."""
        self._loop.run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class HHHRouter:
    """`AsyncHHHRouter` for code that blocks. The model is loaded at once; any thread may call.

    Args:
        bundle: Name of a bundle, or a path to one; None takes ``HHH_ROUTER_BUNDLE`` or the default.
        policy: Default policy, by name or path; None takes ``HHH_ROUTER_POLICY`` or ``balanced``.
        pipeline: A path put together by you, such as `hhh_router.testing.fake_pipeline`; nothing is loaded then.
        settings: Further fields of `Settings`, such as ``threads=2``.

    Raises:
        ConfigError: A policy, the bundle or a setting is wrong.
        MissingExtra: torch is not installed.
    """

    def __init__(
        self,
        bundle: str | Path | None = None,
        policy: PolicyLike = None,
        *,
        pipeline: Pipeline | None = None,
        **settings: object,
    ) -> None:
        self._router = AsyncHHHRouter(bundle, policy, pipeline=pipeline, **settings)
        self._router.load()
        self._loop = _LoopThread()

    @overload
    def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = ...,
        weights: WeightsLike = ...,
        stream: Literal[False] = ...,
        **sampling: Unpack[SamplingArgs],
    ) -> ChatResult: ...
    @overload
    def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = ...,
        weights: WeightsLike = ...,
        *,
        stream: Literal[True],
        **sampling: Unpack[SamplingArgs],
    ) -> ChatStream: ...
    def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = None,
        weights: WeightsLike = None,
        stream: bool = False,
        **sampling: Unpack[SamplingArgs],
    ) -> ChatResult | ChatStream:
        """Answer a conversation; arguments, results and errors as in `AsyncHHHRouter.chat`."""
        reply = self._loop.run(
            self._router.chat(messages, policy, weights, stream=stream, **sampling)  # type: ignore[call-overload]
        )
        return ChatStream(reply, self._loop) if isinstance(reply, AsyncChatStream) else reply

    @overload
    def guard(
        self, prompt: Prompt | None = ..., response: str | None = ..., policy: PolicyLike = ...
    ) -> GuardResult: ...
    @overload
    def guard(
        self,
        prompt: Sequence[Prompt | None] | None = ...,
        response: Sequence[str | None] | None = ...,
        policy: PolicyLike = ...,
    ) -> list[GuardResult]: ...
    def guard(self, prompt: Any = None, response: Any = None, policy: PolicyLike = None) -> Any:
        """Judge a prompt, a response, or both; arguments, results and errors as in `AsyncHHHRouter.guard`."""
        return self._loop.run(self._router.guard(prompt, response, policy))

    @overload
    def route(self, prompt: Prompt, policy: PolicyLike = ...) -> RouteResult: ...  # type: ignore[overload-overlap]
    @overload
    def route(self, prompt: Sequence[Prompt], policy: PolicyLike = ...) -> list[RouteResult]: ...
    def route(self, prompt: Any, policy: PolicyLike = None) -> Any:
        """Needs, posterior and weights of a prompt; arguments, results and errors as in `AsyncHHHRouter.route`."""
        return self._loop.run(self._router.route(prompt, policy))

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        self._loop.close(self._router.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _LoopThread:
    """An event loop on a thread of its own, so that blocking callers share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="hhh-router-sdk", daemon=True)
        self._thread.start()
        self._started.wait()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await self._stop.wait()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for what it returns; an interrupt cancels it."""
        loop = self._loop
        if loop is None:
            work.close()
            raise HHHRouterError("this router is closed", hint="open a new one")
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run one last coroutine, then end the thread; what still runs is cancelled. Does nothing the second time."""
        with self._lock:
            if self._loop is None:
                last.close()
                return
            try:
                self.run(last)
            finally:
                loop, self._loop = self._loop, None
                loop.call_soon_threadsafe(self._stop.set)
                self._thread.join()


def _as_result(event: ChatFinished) -> ChatResult:
    return ChatResult(
        metadata=event.metadata,
        text=event.text,
        finish_reason=event.finish_reason,
        usage=event.usage,
        refusal=event.refusal,
    )


def _sampling(given: SamplingArgs) -> Sampling:
    fields: dict[str, Any] = {**given, "stop": parse_stop(given.get("stop"))}
    return Sampling(**fields)


def _policy_name(policy: PolicyLike, pipeline: Pipeline) -> str | None:
    """The name a policy goes by; whoever runs this process may also name a file, unlike callers from outside."""
    if isinstance(policy, Path) or (policy and (policy.endswith(_POLICY_SUFFIXES) or os.sep in policy)):
        return pipeline.policies.add_file(policy)
    return policy


def _guard_request(prompt: Prompt | None, response: str | None, policy: str | None) -> GuardRequest:
    turns, unread = ((), ()) if prompt is None else parse_prompt(prompt)
    if response is not None and not isinstance(response, str):
        raise InvalidRequest(f"response: found {type(response).__name__}", hint="send text")
    return GuardRequest(read=ReadRequest(messages=turns, response=response), policy=policy, not_inspected=unread)


def _pairs(prompt: Any, response: Any) -> tuple[list[tuple[Prompt | None, str | None]], bool]:
    """Prompts and responses side by side, and whether the caller gave lists."""
    many_prompts, many_responses = _is_batch(prompt), isinstance(response, list | tuple)
    if not many_prompts and not many_responses:
        return [(prompt, response)], False
    if many_prompts and many_responses and len(prompt) != len(response):
        raise InvalidRequest(
            f"{len(prompt)} prompts and {len(response)} responses", hint="give lists of the same length"
        )
    if (many_prompts and response is not None and not many_responses) or (
        many_responses and prompt is not None and not many_prompts
    ):
        raise InvalidRequest("one is a list, the other is not", hint="give both as lists, or both as one")
    n = len(prompt) if many_prompts else len(response)
    return list(
        zip(prompt if many_prompts else [None] * n, response if many_responses else [None] * n, strict=True)
    ), True


def _is_batch(prompt: object) -> bool:
    """True for a list of prompts, False for one prompt: text, or the turns of one conversation."""
    if not isinstance(prompt, list | tuple):
        return False
    return not any(isinstance(row, Mapping) or hasattr(row, "role") for row in prompt)
