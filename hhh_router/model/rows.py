"""What the batcher keeps of each chat: waiting, under way, and how long such things take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from torch import Tensor

from hhh_router.model.deltas import Deltas
from hhh_router.model.encode import Encoded
from hhh_router.model.engine import EndChat, TellEvent
from hhh_router.model.grammar import Following
from hhh_router.model.reader import RunningReply
from hhh_router.model.sampler import Sampler
from hhh_router.protocols import FinishReason, Planner, Steerer
from hhh_router.types import ChatRequest, Weights


@dataclass(slots=True, kw_only=True, eq=False)
class ChatJob:
    """One request on its way through the batch."""

    request: ChatRequest
    planner: Planner
    window_tokens: int
    tell: TellEvent
    """Takes each event; called on the model's thread."""
    end: EndChat
    """Called once, when there are no more events; with what went wrong, if anything did."""
    steer: Steerer | None = None
    """Asked at every window but the last, on the model's thread, before the upper layers run."""
    deadline: float = field(init=False)
    """When nobody waits for it any more, by `time.monotonic`; counted from when it arrived."""
    cancelled: bool = False
    """Set by any thread: nobody waits for this any more."""
    text: Encoded | None = None
    """The prompt, once it is encoded."""
    budget: int = 0
    """Tokens of the reply at most."""
    following: Following | None = None
    """Of the schema that the reply must follow, if there is one."""

    def __post_init__(self) -> None:
        given = self.request.timeout_s
        self.deadline = math.inf if given is None else time.monotonic() + given

    def cancel(self) -> None:
        """As `hhh_router.model.engine.Ticket` has it."""
        self.cancelled = True

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, once it is encoded."""
        assert self.text is not None
        return len(self.text.ids)

    @property
    def need(self) -> int:
        """Tokens of prompt and longest reply."""
        return self.prompt_tokens + self.budget


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One reply under way."""

    job: ChatJob
    weights: Weights
    sampler: Sampler
    stream: Deltas
    reply: RunningReply
    timing: dict[str, float]
    prefilled_at: float
    logits: Tensor
    """(V,), of the next token."""
    drawn: int = 0
    token: int = 0
    """The one being read."""
    reason: FinishReason | None = None
    """Set when no further token is to come."""
    empty: bool = False
    """The reply ended before its first token; an end marker is read in its place."""
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens drawn, in nats."""
    tokens: list[int] = field(default_factory=list)
    """Of the reply."""
    entering: list[Tensor]
    """States that enter the layers above the boundary: (T, D) of the prompt's end, then (1, D) of each reply token."""
    steered: bool = False
    """Its weights have changed, so its states above the boundary are nobody else's."""
    error: Exception | None = None
    """What this row's part of a step ended in."""


@dataclass(slots=True)
class Pace:
    """How long things have taken of late; running means."""

    token_s: float = 0.0
    """Seconds per prompt token."""
    row_s: float = 0.0
    """Seconds a row stays."""

    def prompt(self, tokens: int, seconds: float) -> None:
        """A prompt of so many tokens was read."""
        self.token_s = self._mean(self.token_s, seconds / tokens)

    def row(self, seconds: float) -> None:
        """A row left after so long."""
        self.row_s = self._mean(self.row_s, seconds)

    @staticmethod
    def _mean(before: float, new: float) -> float:
        return new if not before else before + _NEWEST * (new - before)


_NEWEST = 0.2
