"""Several replies to one call, side by side: ``n`` of chat completions, and the prompts of completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.server.chat import STREAM_HEADERS, ChatResponse, kept_alive
from hhh_router.interfaces.server.dialect import Dialect, StreamWriter
from hhh_router.interfaces.server.http import Sender
from hhh_router.pipeline import ChatDelta, ChatEvent, ChatFinished, ChatStarted, Pipeline
from hhh_router.pipeline.validate import check_sampling
from hhh_router.trace.block import Metadata
from hhh_router.types import Action, ChatRequest

MOST_CHOICES = 16
"""``n`` at most."""


class ManyDialect(Dialect, Protocol):
    """One call with several replies, as its client wants them told."""

    @property
    def requests(self) -> Sequence[ChatRequest]:
        """What is asked, in the order of the choices."""
        ...

    def whole_of(self, done: Sequence[ChatFinished]) -> Mapping[str, Any]:
        """The body of replies that are not streamed."""
        ...

    def begin_choice(self, at: int, first: Metadata) -> StreamWriter:
        """A writer for one of the replies."""
        ...

    def end_of(self, done: Sequence[ChatFinished]) -> Sequence[bytes]:
        """Frames that end the stream, once every reply has ended."""
        ...


class ChoicesResponse(ChatResponse):
    """Several replies, made together while they are sent. If one fails, all of them do."""

    def __init__(
        self, pipeline: Pipeline, call: ManyDialect, *, spend: Callable[[int], None] = lambda tokens: None
    ) -> None:
        """Answer ``call``; ``spend`` is told how many tokens each reply took."""
        super().__init__(pipeline, call, spend=spend)
        self._many = call

    @property
    def requests(self) -> Sequence[ChatRequest]:
        """What is asked, in the order of the choices."""
        return self._many.requests

    async def _whole(self, sender: Sender) -> None:
        found: dict[int, ChatFinished] = {}
        async with aclosing(together(self._pipeline, self._many.requests, stream=False)) as events:
            async for at, event in events:
                if isinstance(event, ChatFinished):
                    self._spent(event)
                    found[at] = event
        done = [found[at] for at in sorted(found)]
        await sender.json(self._many.whole_of(done), strictest(done).headers())

    async def _stream(self, sender: Sender) -> None:
        writers: dict[int, StreamWriter] = {}
        found: dict[int, ChatFinished] = {}
        events = together(self._pipeline, self._many.requests, stream=True)
        async with aclosing(events):
            async for at, event in kept_alive(events, lambda: self._ping(sender)):
                if isinstance(event, ChatStarted):
                    writers[at] = self._many.begin_choice(at, event.metadata)
                    if not sender.begun:
                        await sender.begin(200, STREAM_HEADERS | event.metadata.headers())
                    continue
                if isinstance(event, ChatFinished):
                    self._spent(event)
                    found[at] = event
                writer = writers[at]
                for frame in writer.delta(event) if isinstance(event, ChatDelta) else writer.end(event):
                    await sender.part(frame)
        for frame in self._many.end_of([found[at] for at in sorted(found)]):
            await sender.part(frame)
        await sender.part(b"", more=False)


async def together(
    pipeline: Pipeline, requests: Sequence[ChatRequest], *, stream: bool
) -> AsyncGenerator[tuple[int, ChatEvent], None]:
    """Events of several chats as they come, each with its place. The first error ends them all."""
    chats = [pipeline.chat(request, stream=stream) for request in requests]
    coming = {asyncio.ensure_future(anext(chat, None)): at for at, chat in enumerate(chats)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                at, event = coming.pop(task), task.result()
                if event is not None:
                    yield at, event
                    coming[asyncio.ensure_future(anext(chats[at], None))] = at
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)  # so that the chats can be closed
        for chat in chats:
            await chat.aclose()


def variants(request: ChatRequest, count: int) -> tuple[ChatRequest, ...]:
    """The same request so many times, each with a name of its own and, where there is a seed, the next one.

    Raises:
        InvalidRequest: A sampling setting is wrong.
    """
    sampling, name = request.sampling, request.request_id
    check_sampling(sampling)
    seeds = [None if sampling.seed is None else sampling.seed + i for i in range(count)]
    return tuple(
        replace(request, request_id=f"{name}.{i}" if i else name, sampling=replace(sampling, seed=seed))
        for i, seed in enumerate(seeds)
    )


def parse_count(given: object) -> int:
    """``n``, 1 where it is not given.

    Raises:
        InvalidRequest: No number, or too large.
    """
    if given is None:
        return 1
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MOST_CHOICES:
        raise InvalidRequest(f"n: found {given!r}"[:80], hint=f"use a whole number from 1 to {MOST_CHOICES}")
    return given


def strictest(done: Sequence[ChatFinished]) -> Metadata:
    """The block of the reply on which the policy came down hardest, the first of several."""
    order = list(Action)
    return max((d.metadata for d in done), key=lambda m: order.index(Action(m.action)))


def total(done: Sequence[ChatFinished], prompts: int = 1) -> dict[str, int]:
    """Tokens of several replies; those of a prompt count once, whatever number of replies it has."""
    each = len(done) // prompts
    prompt = sum(d.usage.prompt_tokens for d in done[::each])
    completion = sum(d.usage.completion_tokens for d in done)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
