"""The Python door for code that awaits, in process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack, overload

from hhh_router.errors import HHHRouterError, InvalidRequest, SettingsError
from hhh_router.interfaces.parse import MessageLike, parse_prompt, parse_weights
from hhh_router.interfaces.remote import RemotePipeline
from hhh_router.interfaces.sampling import parse_sampling
from hhh_router.interfaces.tools import parse_tools
from hhh_router.pipeline import (
    ChatDelta,
    ChatEvent,
    ChatFinished,
    ChatResult,
    FeedbackResult,
    GuardResult,
    Pipeline,
    RouteResult,
)
from hhh_router.settings import Settings
from hhh_router.trace.block import Metadata
from hhh_router.trace.feedback import make_label
from hhh_router.types import ChatRequest, GuardRequest, ReadRequest, Weights

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
    top_k: int
    """Only so many of the likeliest tokens are drawn from; 0, the default, is no limit."""
    seed: int | None
    """Seed of this request's own generator; None draws one."""
    stop: str | Sequence[str] | None
    """One or several strings that end the reply; they are not part of it."""
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    """Token id → what is added to its logit, in [-100, 100]; at most 300."""
    logprobs: bool | None
    """Tell each token's log-probability, in ``logprobs`` of the result and of each piece."""
    top_logprobs: int | None
    """Likeliest tokens told with each, 0 to 20; alone it asks for log-probabilities too."""
    response_format: Mapping[str, Any] | type[Any] | None
    """OpenAI's object (``{"type": "json_object"}`` or with a JSON schema), or a pydantic model the reply must fit."""


class ChatArgs(SamplingArgs, total=False):
    """How the next token is drawn, and what the model may call."""

    tools: Sequence[Mapping[str, Any]] | None
    """Functions in OpenAI's form: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""
    tool_choice: str | Mapping[str, Any] | None
    """``"auto"``, ``"none"``, ``"required"``, or one tool in OpenAI's form; auto by default."""
    parallel_tool_calls: bool | None
    """Whether one reply may call several; it may by default."""


_TOOL_FIELDS = frozenset(ChatArgs.__annotations__) - frozenset(SamplingArgs.__annotations__)


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
    """Chats, guards and routes with a bundle's mixture, in this process or, with ``base_url``, by asking a server.

    The model is loaded by the first call (or ``async with``); that takes seconds and does not block the event loop.

    Args:
        bundle: Name of a bundle, or a path to one; None takes ``HHH_ROUTER_BUNDLE`` or the default.
        policy: Default policy, by name or path; None takes ``HHH_ROUTER_POLICY`` or ``balanced``.
        pipeline: A path put together by you, such as `hhh_router.testing.fake_pipeline`; nothing is loaded then.
        base_url: Of a server that `hhh-router serve` started, such as ``http://127.0.0.1:8000``; no model is loaded
            here, and torch is not needed. ``policy`` then names one of the server's, None leaves it to the server.
        candidate: A policy, by name or path, that is asked beside ``policy`` on the same readings and never acts; what
            it would have decided is in ``metadata.candidate`` of each result.
        settings: Further fields of `Settings`, such as ``threads=2``, or ``api_key`` for a server.

    Raises:
        SettingsError: A setting is wrong.
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
        self._settings = Settings.load(
            bundle=None if bundle is None else str(bundle),
            policy=None if policy is None else str(policy),
            candidate=None if candidate is None else str(candidate),
            **({"candidate_told": True} if candidate is not None else {}) | settings,
        )
        self._pipeline: Pipeline | RemotePipeline | None = pipeline
        if base_url is not None:
            if bundle is not None or pipeline is not None:
                raise SettingsError("base_url: a server has its own bundle", hint="give either base_url or a bundle")
            if candidate is not None:
                raise SettingsError("base_url: a server has its own candidate", hint="serve it: serve --candidate NAME")
            self._pipeline = RemotePipeline(
                base_url, policy=None if policy is None else str(policy), settings=self._settings
            )
        self._loading = asyncio.Lock()
        self._closed = False

    def load(self) -> Pipeline | RemotePipeline:
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

    async def ready(self) -> Pipeline | RemotePipeline:
        """As `load`, on a thread beside the event loop; at once where it is loaded already."""
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
        **options: Unpack[ChatArgs],
    ) -> ChatResult: ...
    @overload
    async def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = ...,
        weights: WeightsLike = ...,
        *,
        stream: Literal[True],
        **options: Unpack[ChatArgs],
    ) -> AsyncChatStream: ...
    async def chat(
        self,
        messages: Prompt,
        policy: PolicyLike = None,
        weights: WeightsLike = None,
        stream: bool = False,
        **options: Unpack[ChatArgs],
    ) -> ChatResult | AsyncChatStream:
        """Answer a conversation.

        Args:
            messages: The user's text, or the turns so far.
            policy: Policy of this request.
            weights: Pin the mixture instead of leaving it to the router; the policy's bounds still hold.
            stream: Return an iterator over the reply as it is cleared.
            options: See `ChatArgs`.

        Raises:
            RequestError: The request has to be fixed.
            BackendError: The model failed, or took too long.
        """
        pipeline = await self.ready()
        turns, unread = parse_prompt(messages, where="messages")
        request = ChatRequest(
            messages=turns,
            policy=_policy_name(policy, pipeline),
            weights=parse_weights(weights),
            sampling=parse_sampling(**{k: v for k, v in options.items() if k not in _TOOL_FIELDS}),
            tools=parse_tools(options.get("tools"), options.get("tool_choice"), options.get("parallel_tool_calls")),
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
        pipeline = await self.ready()
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
        pipeline = await self.ready()
        pairs, is_list = _pairs(prompt, None)
        name = _policy_name(policy, pipeline)
        results = await pipeline.route([_guard_request(p, None, name) for p, _ in pairs])
        return results if is_list else results[0]

    async def feedback(
        self,
        request_id: str,
        labels: Mapping[str, bool],
        *,
        by: str = "",
        sampled: bool = False,
        probability: float | None = None,
    ) -> FeedbackResult:
        """Say what an earlier request was, or whether it was judged wrongly.

        Args:
            request_id: ``metadata.request_id`` of its result. In process, requests are remembered where
                ``HHH_ROUTER_FEEDBACK`` (or ``feedback=``) names a file.
            labels: Of the prompt ``harmful``, ``injection``, ``honest``, ``helpful``; of the reply ``unsafe``,
                ``untruthful``, ``unhelpful``; of the decision ``refused_wrongly`` or ``passed_wrongly``.
            by: Who says so; a labeller's second word on a request takes the place of the first.
            sampled: The request was drawn at random to be labelled.
            probability: How likely it was to be drawn; to be told where ``sampled`` is true.

        Raises:
            RequestError: That cannot be said of this request, or it is not remembered.
            BackendError: It could not be stored.
        """
        pipeline = await self.ready()
        return await pipeline.feedback(make_label(request_id, labels, by, sampled, probability))

    async def aclose(self) -> None:
        """Free the model; calling it again does nothing."""
        self._closed = True
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            await pipeline.aclose()

    async def __aenter__(self) -> Self:
        await self.ready()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def _as_result(event: ChatFinished) -> ChatResult:
    return ChatResult(
        metadata=event.metadata,
        text=event.text,
        finish_reason=event.finish_reason,
        usage=event.usage,
        refusal=event.refusal,
        logprobs=event.logprobs,
        tool_calls=event.tool_calls,
    )


def _policy_name(policy: PolicyLike, pipeline: Pipeline | RemotePipeline) -> str | None:
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
