"""The nouns that flow through one request: what was asked, measured, decided and applied.

Everything here is plain data on a handful of floats: no tensor, no socket, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, Self

Dimension = Literal["helpful", "harmless", "honest"]
"""One of the three behaviours a request can need."""

DIMENSIONS: tuple[Dimension, ...] = ("helpful", "harmless", "honest")
"""The order of the dimensions everywhere. Index by name, never by position."""

NEEDS: tuple[str, ...] = (*DIMENSIONS, "injection")
"""What the need heads score: the three dimensions, and whether the request tries to subvert its instructions."""

EXPERTS: tuple[str, ...] = ("base", *DIMENSIONS)
"""``base`` is the model without any adapter; the others are the LoRA of a dimension."""

OUTCOMES: tuple[str, ...] = ("unsafe", "untruthful", "unhelpful")
"""What can be wrong with a reply: unsafe; untruthful or unsupported; unhelpful or over-refusing."""

NEED_LABELS: Mapping[str, str] = MappingProxyType(
    {"harmful": "harmless", "injection": "injection", "honest": "honest", "helpful": "helpful"}
)
"""How people label a prompt → the need it is a label of: a harmful prompt is one that needs harmless behaviour."""

Mode = Literal["prompt", "response", "both"]
"""What a reading saw: the prompt alone, a response alone, or both."""

MIXTURE_STEPS = 16  # a mixture's name counts sixteenths: 153 points on three experts, mean L1 error .05
SIMPLEX_TOLERANCE = 1e-6


class Action(StrEnum):
    """What a policy rule may lead to."""

    ALLOW = "allow"
    FLAG = "flag"
    STEER = "steer"
    REGENERATE = "regenerate"
    REFUSE = "refuse"
    ESCALATE = "escalate"
    HOLD = "hold"
    BLOCK = "block"

    @property
    def stops(self) -> bool:
        """True when the reply (or the rest of it) must not reach the caller."""
        return self in _STOPPING


_STOPPING = frozenset({Action.REFUSE, Action.ESCALATE, Action.HOLD, Action.BLOCK})


@dataclass(frozen=True, slots=True)
class _Simplex:
    """Four non-negative shares in ``EXPERTS`` order that sum to 1."""

    base: float
    helpful: float
    harmless: float
    honest: float

    def __post_init__(self) -> None:
        values = (self.base, self.helpful, self.harmless, self.honest)
        if not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(f"{type(self).__name__}: shares must be finite and >= 0, got {values}")
        if abs(sum(values) - 1.0) > SIMPLEX_TOLERANCE:
            raise ValueError(f"{type(self).__name__}: shares must sum to 1, got {sum(values):.6f}")

    @classmethod
    def from_mapping(cls, shares: Mapping[str, float]) -> Self:
        """Build from ``{expert: share}``; an expert that is not named gets 0.

        Raises:
            ValueError: A name is no expert, or the shares are no distribution.
        """
        unknown = sorted(set(shares) - set(EXPERTS))
        if unknown:
            raise ValueError(f"unknown expert {unknown[0]!r}; use {', '.join(EXPERTS)}")
        return cls(**{e: float(shares.get(e, 0.0)) for e in EXPERTS})

    def __getitem__(self, expert: str) -> float:
        if expert not in EXPERTS:
            raise KeyError(expert)
        return float(getattr(self, expert))

    def __iter__(self) -> Iterator[str]:
        return iter(EXPERTS)

    def as_dict(self) -> dict[str, float]:
        """``{expert: share}`` in ``EXPERTS`` order."""
        return {e: self[e] for e in EXPERTS}

    def entropy_nats(self) -> float:
        """Shannon entropy, in nats: 0 for one expert alone, ln 4 for equal shares."""
        return -sum(v * math.log(v) for v in self.as_dict().values() if v > 0)


@dataclass(frozen=True, slots=True)
class Posterior(_Simplex):
    """What the router believes each expert should contribute, before any policy."""


@dataclass(frozen=True, slots=True)
class Weights(_Simplex):
    """What is applied: how much each expert and the base model speak."""

    @property
    def mixture(self) -> str:
        """The weights rounded to sixteenths by largest remainder, as one name.

        >>> Weights(0.1, 0.4, 0.3, 0.2).mixture
        'hhh@2-6-5-3'
        """
        exact = [self[e] * MIXTURE_STEPS for e in EXPERTS]
        counts = [math.floor(x + 1e-9) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: MIXTURE_STEPS - sum(counts)]:
            counts[i] += 1
        return "hhh@" + "-".join(map(str, counts))

    @classmethod
    def from_mixture(cls, name: str) -> Self:
        """The weights a mixture name stands for.

        >>> Weights.from_mixture("hhh@0-8-4-4").harmless
        0.25

        Raises:
            ValueError: Not four counts of sixteenths that sum to 16.
        """
        counts = name.removeprefix("hhh@").split("-")
        if not name.startswith("hhh@") or len(counts) != len(EXPERTS) or not all(c.isdecimal() for c in counts):
            raise ValueError(f"{name!r} is no mixture name; write hhh@base-helpful-harmless-honest, e.g. hhh@2-6-5-3")
        shares = [int(c) for c in counts]
        if sum(shares) != MIXTURE_STEPS:
            raise ValueError(f"{name!r}: the four counts must sum to {MIXTURE_STEPS}, got {sum(shares)}")
        return cls(*(s / MIXTURE_STEPS for s in shares))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function of the caller's that the model may ask for."""

    name: str
    """Letters, digits, ``_``, ``-`` and ``.``."""
    description: str = ""
    parameters: str = '{"type":"object","properties":{}}'
    """JSON schema of its arguments, as text."""
    strict: bool = False
    """Refuse a schema of which a part cannot be followed; otherwise that part is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """What the model wants a tool to be called with."""

    id: str
    """By which the tool's result names its call."""
    name: str
    arguments: str
    """JSON object, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolset:
    """The tools of one request, and whether they may or must be called."""

    tools: tuple[Tool, ...]
    required: bool = False
    """The reply must be a call."""
    only: tuple[str, ...] = ()
    """Names of those that may be called; none stands for all."""
    parallel: bool = True
    """Several may be called in one reply."""

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        return tuple(t for t in self.tools if not self.only or t.name in self.only)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str
    """The text of the turn. Parts that are no text are listed in ``ChatRequest.not_inspected``."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant's turn called."""
    tool_call_id: str | None = None
    """Of the call that a tool's turn answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    max_tokens: int = 256
    """Most tokens to generate, >= 1; 0 where the prompt alone is scored."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus mass, in (0, 1]."""
    top_k: int = 0
    """Only so many of the likeliest tokens are drawn from; 0 is no limit."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id → what is added to its logit, in [-100, 100]."""
    seed: int | None = None
    """Seed of this request's own generator; None draws one."""
    top_logprobs: int | None = None
    """Likeliest tokens that are told with each drawn one, 0 to 20; None tells no log-probability to the caller."""
    prompt_logprobs: int | None = None
    """Likeliest tokens that are told with each token of the prompt, 0 to 20; None tells nothing of the prompt."""
    json_schema: str | None = None
    """JSON schema, as text, that the reply must follow."""
    stop: tuple[str, ...] = ()
    """Strings that end the reply; they are not part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks and by which way, as far as the door knows. None: this door does not tell; empty: there is none."""

    model: str | None = None
    """The model the client named."""
    route: str | None = None
    """The endpoint's path, such as ``/v1/chat/completions``."""
    tenant: str | None = None
    """Whose traffic it is."""
    key_scopes: tuple[str, ...] | None = None
    """What the client's key opens."""
    headers: Mapping[str, str] | None = None
    """Lower-case names → values; only of headers that the policy reads."""
    sticky: str | None = None
    """What stays the same for one user or conversation: decides who is in a rollout."""
    account: str | None = None
    """Whose conversations are kept apart from others', where ``tenant`` does not say it: never a secret itself."""
    conversation: str | None = None
    """The conversation's own id, where the client tells one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFacts:
    """One call of a tool, or what came back from it."""

    name: str | None
    """None where the call that a result answers was not sent and is not known."""
    call_id: str | None = None
    """Of the call that a result answers."""
    arguments: Any = None
    """The call's arguments as parsed JSON; None where they are no JSON."""
    result: str | None = None
    """What came back; None for a call that has not been run."""
    scores: Scores | None = None
    """The reading of what came back, by itself; None where no rule asks for one."""
    unread: str | None = None
    """Why there is no such reading although a rule asks for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What one conversation has used up so far, the turn at hand included. None: nobody counts it."""

    turns: int | None = None
    """Messages of the user."""
    tool_calls: int | None = None
    tokens: int | None = None
    """Prompt and reply tokens of all turns, each prompt as long as it was sent."""
    refusals: int | None = None
    """Replies that a policy stopped, without those that were handed to somebody else."""
    minutes: float | None = None
    """Since its first turn."""
    tainted: bool | None = None
    """Whether a tool brought back what the checkpoint ``tool_result`` did not simply allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What surrounds a reading: facts about the request that no model has to measure. None: not known."""

    text: str | None = None
    """What is judged: at ``input`` what came since the last reply, at ``output`` the reply so far, at ``tool_call``
    the arguments as JSON, at ``tool_result`` the result."""
    role: str | None = None
    """Who wrote it."""
    detect: Callable[[str], str | None] | None = field(default=None, compare=False, repr=False)
    """Tells the language of a text; asked where a rule wants to know it."""
    tokens: int | None = None
    """Tokens that the reading saw."""
    at: datetime | None = None
    """When, with a time zone."""
    caller: Caller = field(default_factory=Caller)
    tool: ToolFacts | None = None
    results: tuple[ToolFacts, ...] = ()
    """What came back from tools since the last reply, which the model is about to see."""
    earlier: tuple[ToolFacts, ...] = ()
    """What came back before it. It is judged again where nobody knows any more whether it was tainted."""
    conversation: Conversation = field(default_factory=Conversation)

    @property
    def language(self) -> str | None:
        """Code of the text's language, such as ``de``; None where nobody can tell."""
        return None if self.detect is None or self.text is None else self.detect(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation that wants a reply."""

    messages: tuple[Message, ...]
    """The conversation so far; the last turn is the user's (or a tool's)."""
    policy: str | None = None
    """Name of the policy to apply; None takes the deployment's default."""
    weights: Weights | None = None
    """Weights the caller pins instead of the router's; still held within the policy's bounds."""
    sampling: Sampling = field(default_factory=Sampling)
    tools: Toolset | None = None
    """What the model may call; None where it can call nothing."""
    continues: bool = False
    """The one message's text is to be gone on with as it stands, without the model's chat template."""
    prompt_ids: tuple[int, ...] = ()
    """That text as the backbone's own tokens, in place of it."""
    request_id: str = ""
    """Names the request in every trace; the pipeline fills it when empty."""
    timeout_s: float | None = None
    """Seconds the caller waits for the whole reply; the deployment's own limit holds where it is shorter."""
    not_inspected: tuple[str, ...] = ()
    """What the client sent that nobody read, such as ``messages[0].content[1]: image_url``."""
    passthrough: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the client's body that only an upstream understands, kept as they came."""
    caller: Caller = field(default_factory=Caller)
    """Who asks, for the policy's conditions."""
    turns: tuple[Message, ...] = ()
    """The conversation turn by turn, with calls and results apart, where ``messages`` is joined for a reader."""
    goes_on: bool = False
    """Earlier turns are with an upstream that remembers them, and were not sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRequest:
    """A text to be scored: the prompt, a response, or both."""

    messages: tuple[Message, ...] = ()
    """The prompt's conversation; empty when only a response is read."""
    response: str | None = None
    """The reply to score; None when only the prompt is read."""
    tools: tuple[Tool, ...] = ()
    """What the prompt tells the model that it may call."""

    @property
    def mode(self) -> Mode:
        """Which views there are."""
        if self.response is None:
            return "prompt"
        return "both" if self.messages else "response"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRequest:
    """A prompt and/or response to be judged, with no reply wanted."""

    read: ReadRequest
    policy: str | None = None
    request_id: str = ""
    not_inspected: tuple[str, ...] = ()
    caller: Caller = field(default_factory=Caller)
    """Who asks, for the policy's conditions."""
    turns: tuple[Message, ...] = ()
    """As `ChatRequest.turns`."""
    goes_on: bool = False
    """As `ChatRequest.goes_on`."""
    calls: tuple[ToolCall, ...] = ()
    """Calls of tools in the response, each to be judged at ``tool_call``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Raw head outputs of one reading. Never probabilities, never compared with a threshold."""

    mode: Mode
    needs: Mapping[str, float]
    """Logit per need head."""
    outcomes: Mapping[str, float]
    """Logit per outcome head."""
    distance: float
    """Mahalanobis distance from the router's training data, per root dimension: about 1 for a typical row."""
    tokens: int
    """Tokens read, prompt and response together."""
    layers_run: int = 0
    """Decoder layers this reading cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Calibrated probabilities of one reading: what was measured, before any policy."""

    mode: Mode
    needs: Mapping[str, float]
    """P(the request needs this behaviour), each in [0, 1]; several can be high."""
    posterior: Posterior
    outcomes: Mapping[str, float]
    """P(the reply is unsafe / untruthful / unhelpful), each in [0, 1]."""
    in_distribution: bool
    """False where the reading lies outside the support of the calibration data."""
    calibrated: bool
    """False when no calibrator fitted for this mode, bundle and precision was at hand."""
    scores: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the rules of one checkpoint concluded. A refusal is a value, not an exception."""

    checkpoint: str
    """``input``, ``output``, ``tool_call``, ``tool_result`` or ``session``."""
    action: Action
    rule: str
    """Where the rule stands, such as ``checkpoints.input[0]``, or ``on_error``."""
    reason: str
    """The conditions that held, with the numbers found; for people."""
    message: str | None = None
    """What the caller is told when the action stops the reply."""
    raises: Mapping[str, float] = field(default_factory=dict)
    """Lower bounds per expert under which a ``regenerate`` runs again, or a ``steer`` goes on."""
    upstream: str | None = None
    """Name of the upstream that an ``escalate`` hands the request to; None is a person's queue."""
    webhook: str | None = None
    """URL that is told of this decision."""
    redact: tuple[str, ...] = ()
    """Kinds of text to take out before it goes on, such as ``email``."""
    steering: str | None = None
    """Text given to the model as a further instruction."""
    shadow: tuple[Decision, ...] = ()
    """What the rules in shadow mode would have decided; none of it acts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything settled at the input checkpoint: evidence → decision → weights."""

    evidence: Evidence
    decision: Decision
    weights: Weights
    policy_shift_nats: float
    """KL(weights ‖ posterior): how far the policy moved the router."""
    confidence: float
    """Calibrated P(every verdict enforced so far is right)."""
    enforced: bool = True
    """False in shadow mode: the decision is recorded and changes nothing."""
    others: tuple[Decision, ...] = ()
    """What ``session`` and ``tool_result`` said besides, none of it stricter than ``decision``."""
    tainted: bool = False
    """Whether ``tool_result`` did not simply allow what a tool brought back."""

    @property
    def stops(self) -> bool:
        """True when the pass must end here and no reply may be generated."""
        return self.enforced and self.decision.action.stops
