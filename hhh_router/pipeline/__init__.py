"""The one internal path that serves every door: plan, hold back, judge, release, record."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from hhh_router.calibration import Calibrators
from hhh_router.errors import InvalidRequest
from hhh_router.pipeline.chat import run_chat
from hhh_router.pipeline.guard import run_guard, run_route
from hhh_router.pipeline.parts import Parts
from hhh_router.pipeline.results import (
    ChatDelta,
    ChatEvent,
    ChatFinished,
    ChatResult,
    ChatStarted,
    FeedbackResult,
    GuardResult,
    RouteResult,
    Usage,
)
from hhh_router.pipeline.store import PolicyStore
from hhh_router.protocols import Generator, Load, Reader, TokenLogprob
from hhh_router.settings import Settings
from hhh_router.trace import Sink
from hhh_router.trace.block import BundleRef
from hhh_router.trace.feedback import Label
from hhh_router.trace.feedback_store import FeedbackStore
from hhh_router.trace.redact import Redactor
from hhh_router.trace.sinks import Redacting
from hhh_router.types import ChatRequest, GuardRequest

__all__ = [
    "ChatDelta",
    "ChatEvent",
    "ChatFinished",
    "ChatResult",
    "ChatStarted",
    "FeedbackResult",
    "GuardResult",
    "Pipeline",
    "PolicyStore",
    "RouteResult",
    "TokenLogprob",
    "Usage",
]


Place = TypeVar("Place", bound=Sink | FeedbackStore)


class Pipeline:
    """Answers chats and judges texts; every door holds one.

    Args:
        reader: Scores texts.
        generator: Answers requests, asking a planner mid-pass.
        calibrators: Turn scores into evidence.
        policies: What callers may pick.
        bundle_ref: Name and whole sha256 of the bundle behind reader and generator.
        backbone_sha256: Of the backbone's weights; None where only a revision is pinned.
        sinks: Where the record of each finished request goes.
        settings: Limits and deadlines.
        memory: Remembers finished requests for `feedback`; closed with the pipeline.
        redactor: Replaces secrets in whatever the sinks and the memory keep.
        answers_elsewhere: True when the generator asks an upstream model, so that no mixture is applied.
        closers: Awaited once by `aclose`, in order.
        drain: Takes seconds; nothing new is taken in, and what has not ended by then ends with an error.
        load: How busy the engine is.
    """

    def __init__(
        self,
        *,
        reader: Reader,
        generator: Generator,
        calibrators: Calibrators,
        policies: PolicyStore,
        bundle_ref: BundleRef,
        backbone_sha256: str | None,
        sinks: Sequence[Sink],
        settings: Settings,
        memory: FeedbackStore | None = None,
        redactor: Redactor | None = None,
        answers_elsewhere: bool = False,
        closers: Sequence[Callable[[], Awaitable[None]]] = (),
        drain: Callable[[float], Awaitable[None]] | None = None,
        load: Callable[[], Load] = Load,
    ) -> None:
        self._closers = list(closers)
        self._drain = drain
        self._load = load
        self._redactor = redactor or Redactor()
        self._parts = Parts(
            reader=reader,
            generator=generator,
            calibrators=calibrators,
            policies=policies,
            bundle_ref=bundle_ref,
            backbone_sha256=backbone_sha256,
            sinks=tuple(self._redacting(sink) for sink in sinks),
            settings=settings,
            memory=None if memory is None else self._redacting(memory),
            redactor=self._redactor,
            candidate=settings.candidate,
            answers_elsewhere=answers_elsewhere,
        )

    @property
    def parts(self) -> Parts:
        """The collaborators it was made of."""
        return self._parts

    @property
    def policies(self) -> PolicyStore:
        """What callers may pick."""
        return self._parts.policies

    @property
    def settings(self) -> Settings:
        """Limits and deadlines."""
        return self._parts.settings

    def chat(self, request: ChatRequest, *, stream: bool = True) -> AsyncGenerator[ChatEvent, None]:
        """Answer one request: `ChatStarted`, `ChatDelta` events of cleared text only, then `ChatFinished`.

        Closing the iterator cancels the work. See `run_chat` for what it raises.

        Args:
            request: What the caller asked.
            stream: Let text out window by window. False holds all of it to the end, so that ``regenerate`` can still
                act on the last window.
        """
        return run_chat(self._parts, request, stream=stream)

    async def guard(self, requests: Sequence[GuardRequest]) -> list[GuardResult]:
        """Judge prompts and/or responses, all in one batch. See `run_guard` for what it raises."""
        return await run_guard(self._parts, requests)

    async def route(self, requests: Sequence[GuardRequest]) -> list[RouteResult]:
        """Needs, posterior and weights of each prompt, all in one batch. See `run_route` for what it raises."""
        return await run_route(self._parts, requests)

    def add_sink(self, sink: Sink) -> None:
        """Send the record of each request that finishes from now on to another place too."""
        self._parts = replace(self._parts, sinks=(*self._parts.sinks, self._redacting(sink)))

    def remember_in(self, memory: FeedbackStore) -> None:
        """Remember requests that finish from now on; it is closed with the pipeline."""
        self._parts = replace(self._parts, memory=self._redacting(memory))

    def _redacting(self, place: Place) -> Place:
        if isinstance(place, Redacting):
            place.redactor = self._redactor
        return place

    async def feedback(self, label: Label, *, key: str = "") -> FeedbackResult:
        """Keep what somebody says of a finished request.

        Args:
            label: See `hhh_router.trace.feedback.make_label`.
            key: Name of the API key that it came with.

        Raises:
            UnknownRequest: The request is not remembered (any more).
            InvalidRequest: That cannot be said of it, or nothing is remembered here.
            Unavailable: It could not be stored.
        """
        memory = self._parts.memory
        if memory is None:
            raise InvalidRequest("no request is remembered here", hint="name a file with HHH_ROUTER_FEEDBACK")
        status = await memory.label(label, key=key)
        return FeedbackResult(
            request_id=label.request_id, by=label.by, labels=dict(label.labels), status=status, durable=memory.durable
        )

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        return self._load()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new in and wait for what is under way, so long; what has not ended then ends with an error."""
        if self._drain is not None:
            await self._drain(timeout_s)

    async def aclose(self) -> None:
        """Close what reader and generator hold open; does nothing the second time."""
        while self._closers:
            await self._closers.pop(0)()
        if self._parts.memory is not None:
            await self._parts.memory.aclose()
