"""What comes out of the path: the events of one chat, and the verdicts of guard and route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hhh_router.errors import Blocked
from hhh_router.protocols import FinishReason, TokenLogprob
from hhh_router.trace.block import DecisionRecord, Metadata
from hhh_router.types import Action, Decision, ToolCall, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens one reply cost."""

    prompt_tokens: int
    completion_tokens: int
    """Tokens generated, those withheld by a decision included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatStarted:
    """First event: comes with the first cleared text, or with the end of a reply that has none."""

    metadata: Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDelta:
    """A piece of the reply that a decision has cleared."""

    text: str
    raw: Mapping[str, Any] | None = None
    """The upstream's own chunk, when another model answered."""
    is_refusal: bool = False
    """True for the policy's message in place of the reply or its rest."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens behind this piece, where the request asked for them."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Whole calls that this piece brings; their own tokens' log-probabilities are not told."""
    waits: bool = False
    """Nothing yet: a call is held until a person has approved it. Told at once and every few seconds, in streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFinished:
    """Last event: the whole of what reached the caller, and the final record."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    metadata: Metadata
    refusal: str | None = None
    """The policy's message, when a decision stopped the reply; it is the end of ``text`` too."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of every token that reached the caller; None where nobody asked, or where the message stands alone."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What the model wants to be called; the reason is ``tool_calls`` then."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of every token of the prompt, where the request asked for them and was not stopped before."""
    stop: str | None = None
    """The stop string that ended the reply, if one did."""


ChatEvent = ChatStarted | ChatDelta | ChatFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """What every result offers; the numbers are read from its metadata block."""

    metadata: Metadata
    """The ``hhh`` block: what was measured, decided and applied."""

    @property
    def action(self) -> Action:
        """The action that holds for the request. Under a policy in shadow mode it is what would have held."""
        return Action(self.metadata.action)

    @property
    def needs(self) -> Mapping[str, float]:
        """P(the request needs this behaviour), calibrated; empty when nothing could be read."""
        return self.metadata.needs

    @property
    def outcomes(self) -> Mapping[str, float]:
        """P(the reply is unsafe / untruthful / unhelpful), calibrated."""
        return self.metadata.outcomes

    @property
    def weights(self) -> Weights:
        """How much each expert and the base model speak; sums to 1."""
        return Weights.from_mapping(self.metadata.weights)

    @property
    def confidence(self) -> float:
        """Calibrated P(every verdict enforced on this request is right)."""
        return self.metadata.confidence

    def raise_for_decision(self) -> None:
        """Raise when a decision stopped the reply; do nothing otherwise.

        Raises:
            Blocked: The decision that stopped it.
        """
        stopping = self._stopping()
        if stopping is not None:
            raise Blocked(
                Decision(
                    checkpoint=stopping.checkpoint,
                    action=Action(stopping.action),
                    rule=stopping.rule,
                    reason=stopping.reason,
                    message=stopping.message,
                )
            )

    @property
    def enforced(self) -> bool:
        """False under a policy in shadow mode: its decisions are recorded and stop nothing."""
        return self.metadata.policy.mode == "enforce"

    def _stopping(self) -> DecisionRecord | None:
        """The decision that stops the reply, if one does."""
        if not self.enforced:
            return None
        return next((d for d in self.metadata.decisions if Action(d.action).stops), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatResult(_Result):
    """A whole reply."""

    text: str
    """What the policy let through; the policy's message where it stopped the reply."""
    finish_reason: FinishReason
    usage: Usage
    refusal: str | None = None
    """The policy's message, when a decision stopped the reply."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of every token of the reply that was let through; None where nobody asked, or where the message stands alone."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What the model wants to be called; ``finish_reason`` is ``tool_calls`` then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardResult(_Result):
    """The verdict on a prompt and/or a response."""

    @property
    def message(self) -> str | None:
        """What the policy tells the caller in place of the reply; None when it may pass."""
        stopping = self._stopping()
        return stopping.message if stopping else None

    def _stopping(self) -> DecisionRecord | None:
        """Nobody makes a reply anew here, so one that should be made anew may not pass either."""
        *_, last = self.metadata.decisions
        again = self.enforced and last.action == Action.REGENERATE
        return _Result._stopping(self) or (last if again else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteResult(_Result):
    """How a prompt would be answered: needs, posterior and the weights to apply."""

    @property
    def mixture(self) -> str:
        """The weights in sixteenths, as one name: ``hhh@base-helpful-harmless-honest``."""
        return self.weights.mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackResult:
    """What became of a label."""

    request_id: str
    by: str
    """The labeller."""
    labels: Mapping[str, bool]
    """What this labeller now says of the request."""
    status: Literal["stored", "unchanged", "replaced"]
    """``unchanged``: this labeller had said the same before; ``replaced``: something else."""
    durable: bool
    """False where the label is gone when the server ends, for no file was named."""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
