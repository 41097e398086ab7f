"""The two seams: a Reader turns text into scores, a Generator turns a request and a planner into events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from hhh_router.errors import ReaderError
from hhh_router.types import ChatRequest, Message, Plan, ReadRequest, Scores, Tool, ToolCall, Weights

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

Planner = Callable[[Scores], Plan]
"""Called once, mid-pass, with the router's reading of the prompt. Pure and fast: it runs on the model's thread."""


Steerer = Callable[[Scores, Sequence[float]], Weights | None]
"""Called at every window but the last, with its reading and the log-probabilities of the reply so far, in nats: other
weights for the tokens that follow, or None to go on. As pure and fast as a planner, and on the same thread."""


class Reader(Protocol):
    """Scores texts without generating anything."""

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        """Score each text, in order, batching them as it sees fit.

        Raises:
            ContextTooLong: A text does not fit the model's window.
            ReaderError: The reading failed; nothing may be concluded from it.
        """
        ...


class ReadingSession(Protocol):
    """One conversation that is read again and again while its answer grows."""

    async def read(self, response: str | None) -> Scores:
        """Score the prompt alone (None), or with the answer so far; one call after another.

        What comes out is what `Reader.read` gives of the same texts, but for rounding; what was read before need not be
        read again.

        Raises:
            ContextTooLong, ReaderError: As `Reader.read`.
        """
        ...

    def close(self) -> None:
        """Drop what is kept. Any number of times, and it does not wait."""
        ...


@runtime_checkable
class SessionReader(Reader, Protocol):
    """A reader that need not read the beginning of a text again when more of it comes."""

    def open(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> ReadingSession:
        """Begin to read a conversation; nothing is read yet. It has to be closed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """First event: the plan the planner made, mid-pass."""

    plan: Plan
    prompt_tokens: int
    layers_run: int
    """Decoder layers run for the prompt so far: l_r when the plan stops, all otherwise (0 for an upstream)."""
    read_ms: float
    """Time from admission to the plan, in milliseconds."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of every token of the prompt, where the request asks for them and the plan does not stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and how likely the model held it, as a caller is told."""

    token: str
    """Its text. Bytes that are no whole character stand as escapes, such as ``\\xe2``."""
    logprob: float
    """In nats, before temperature, bias and schema; NaN for a prompt's first, before which nothing stands."""
    bytes: tuple[int, ...] | None
    """Its UTF-8; None for a mark that shows no text."""
    top_logprobs: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens in its place, as many as were asked for, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of the reply that nobody has cleared yet."""

    text: str
    tokens: int = 1
    logprob: float | None = None
    """Log-probability of the drawn token, in nats; None from an upstream that tells none."""
    token: int | None = None
    """The drawn token's id; None from an upstream."""
    told: tuple[TokenLogprob, ...] = ()
    """Where the request asks for log-probabilities: every token whose text has come out with this delta."""
    raw: Mapping[str, Any] | None = None
    """The upstream's own chunk, to be passed on unchanged."""
    calls: tuple[ToolCall, ...] = ()
    """Calls of tools that the upstream's chunk holds, or completes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The heads' reading (mode ``both``) of prompt and reply so far.

    Follows every ``window_tokens`` and ends the reply.
    """

    scores: Scores
    completion_tokens: int
    is_final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """The tokens that follow are drawn under other weights."""

    weights: Weights
    completion_tokens: int
    """Tokens of the reply drawn before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Last event: the generator is done."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    stop: str | None = None
    """The stop string that ended the reply, if one did and the generator tells which."""
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    """Stage name → milliseconds, such as ``prefill`` and ``decode``."""
    not_inspected: tuple[str, ...] = ()
    """Parts of the reply that passed unread, such as ``choices[0].message.tool_calls``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """In place of ``Planned`` or of a ``Window``: the reading failed. A generator that could answer unread sends it.

    Who consumes the events closes the generator or lets it go on unread, as the policy's ``on_error`` says.
    """

    error: ReaderError
    completion_tokens: int = 0
    """Tokens of the reply that this reading would have covered."""
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Redacted:
    """The request went on without what the plan's decisions redact."""

    counts: Mapping[str, int]
    """What was taken out → how often."""


Event = Planned | Delta | Window | Steered | Unread | Redacted | Finished


class Generator(Protocol):
    """Answers a request, asking the planner mid-pass."""

    def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int, steer: Steerer | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield ``Planned``, then (unless the plan stops) ``Delta`` and ``Window`` events, then ``Finished``.

        A ``Window`` with ``is_final`` always follows the last ``Delta``; one after which the weights changed is
        followed by ``Steered``. Closing the iterator cancels the work. An upstream has no weights to steer.

        Raises:
            ContextTooLong: The prompt does not fit the model's window.
            GeneratorError, UpstreamError: The reply failed; deltas already yielded may be incomplete.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy an engine is."""

    state: Literal["ready", "starting", "draining"] = "ready"
    rows: int = 0
    """Replies being decoded."""
    waiting: int = 0
    """Chats waiting for a row."""
    waiting_tokens: int = 0
    """Of their prompts."""
    waiting_texts: int = 0
    """Texts waiting to be read."""
    slot_tokens: int = 0
    """Tokens that keys and values have room for."""
    wait_s: float = 0.0
    """About how long a chat that comes now waits for a row."""
