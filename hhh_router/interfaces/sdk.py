"""The Python door for code that blocks: a thin face over `hhh_router.interfaces.aio`, on an event loop of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from hhh_router.interfaces.aio import (
    AsyncChatStream,
    AsyncHHHRouter,
    ChatArgs,
    PolicyLike,
    Prompt,
    WeightsLike,
)
from hhh_router.interfaces.loop import LoopThread
from hhh_router.pipeline import ChatDelta, ChatResult, FeedbackResult, GuardResult, Pipeline, RouteResult
from hhh_router.trace.block import Metadata

__all__ = ["AsyncChatStream", "AsyncHHHRouter", "ChatArgs", "ChatStream", "HHHRouter"]


class ChatStream:
    """The reply as it is cleared: iterate over it for `ChatDelta` events; ``result`` is there once it has ended."""

    def __init__(self, stream: AsyncChatStream, loop: LoopThread) -> None:
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
        base_url: Of a running server, which then answers; see `AsyncHHHRouter`.
        candidate: A policy that is asked beside it and never acts; see `AsyncHHHRouter`.
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
        base_url: str | None = None,
        candidate: PolicyLike = None,
        **settings: object,
    ) -> None:
        self._router = AsyncHHHRouter(
            bundle, policy, pipeline=pipeline, base_url=base_url, candidate=candidate, **settings
        )
        self._router.load()
        self._loop = LoopThread()

    @overload
    def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = ...,
        weights: WeightsLike = ...,
        stream: Literal[False] = ...,
        **options: Unpack[ChatArgs],
    ) -> ChatResult: ...
    @overload
    def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = ...,
        weights: WeightsLike = ...,
        *,
        stream: Literal[True],
        **options: Unpack[ChatArgs],
    ) -> ChatStream: ...
    def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = None,
        weights: WeightsLike = None,
        stream: bool = False,
        **options: Unpack[ChatArgs],
    ) -> ChatResult | ChatStream:
        """Answer a conversation; arguments, results and errors as in `AsyncHHHRouter.chat`."""
        reply = self._loop.run(
            self._router.chat(messages, policy, weights, stream=stream, **options)  # type: ignore[call-overload]
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

    def feedback(
        self,
        request_id: str,
        labels: Mapping[str, bool],
        *,
        by: str = "",
        sampled: bool = False,
        probability: float | None = None,
    ) -> FeedbackResult:
        """Say what an earlier request was; arguments, results and errors as in `AsyncHHHRouter.feedback`."""
        return self._loop.run(
            self._router.feedback(request_id, labels, by=by, sampled=sampled, probability=probability)
        )

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        self._loop.close(self._router.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
