"""What a policy is: its data, its canonical form and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hhh_router.policy.rules import CHECKPOINTS, Floor, Rule, When
from hhh_router.types import EXPERTS, Action

REQUIRED_CHECKPOINTS: tuple[str, ...] = ("input", "output")
"""The others are asked only where a policy has them."""

_BEFORE = (Action.ALLOW, Action.FLAG, Action.REFUSE, Action.ESCALATE, Action.BLOCK)

ACTIONS: Mapping[str, tuple[Action, ...]] = {
    "input": _BEFORE,
    "output": (
        Action.ALLOW,
        Action.FLAG,
        Action.STEER,
        Action.REGENERATE,
        Action.REFUSE,
        Action.ESCALATE,
        Action.BLOCK,
    ),
    "tool_call": (Action.ALLOW, Action.FLAG, Action.HOLD, Action.ESCALATE, Action.BLOCK),
    "tool_result": (Action.ALLOW, Action.FLAG, Action.ESCALATE, Action.BLOCK),
    "session": _BEFORE,
}
"""Checkpoint → what its rules may lead to."""

SEVERITY: Mapping[Action, int] = {
    action: i
    for i, action in enumerate(
        (
            Action.ALLOW,
            Action.FLAG,
            Action.STEER,
            Action.REGENERATE,
            Action.HOLD,
            Action.ESCALATE,
            Action.REFUSE,
            Action.BLOCK,
        )
    )
}
"""How strict each action is: of two decisions the one with the higher number holds."""

RAISING = frozenset({Action.STEER, Action.REGENERATE})
"""Actions that lift lower bounds of the weights."""

SPEAKING = frozenset({Action.REGENERATE, Action.REFUSE, Action.ESCALATE, Action.HOLD, Action.BLOCK})
"""Actions after which the caller can be told something instead of the reply (or of a tool's run)."""

PASSING = frozenset({Action.ALLOW, Action.FLAG, Action.STEER})
"""Actions after which what was judged goes on."""

PROTECTING: tuple[str, ...] = ("harmless", "honest")
"""Experts whose least weight a tightening overlay may raise; the others are those whose most weight it may lower."""

REDACTIONS: tuple[str, ...] = ("secrets", "emails", "phones", "cards", "ibans", "ips")
"""Kinds of text that a rule can have taken out."""

PLACEHOLDERS: tuple[str, ...] = ("policy", "version", "checkpoint", "rule", "action", "tool")
"""What a message can name in braces."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"  # goes into a header as name@version
NUMBER_PATTERN = r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"

BASE_PRIOR = 1.0
DEFAULT_RAISE = 0.5  # half of the mixture: enough to change the reply, and two raised experts still fit
WINDOW_TOKENS = 24
MAX_WINDOW_TOKENS = 4096
MAX_PRIOR = 1e6
MAX_MESSAGE = 2000
MAX_DESCRIPTION = 500
MAX_STEERING = 2000
MAX_EXAMPLES = 1000
MAX_EXAMPLE = 20_000
MAX_COUNT = 1e12
ROLLOUT_STEPS = 10_000  # hundredths of a percent


ERRORS: Mapping[str, tuple[str, str]] = {
    "input": ("benign_refused", "harm_passed"),
    "output": ("safe_withheld", "unsafe_passed"),
    "weights": ("benign_above", "harmful_below"),
}
"""Part of a budget → the error that its limit makes rarer when it rises, and the one that it makes more frequent."""

MAX_STRENGTHS = 20
"""Most strengths that a fit may choose from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The errors that a deployment accepts."""

    most: Mapping[str, Mapping[str, float]]
    """Part (a key of ``ERRORS``) → error → the most of it that is accepted, a share in (0, 1)."""
    level: float | None = None
    """None: the bounds hold on average over draws of the rows they were fitted on. Else a probability: that each of
    them holds, or, with ``together``, that all of them do."""
    together: bool = False
    """True for the form that names its parts."""
    per_group: bool = False
    """Whether every bound has to hold in each group of the rows, and not only in all of them together."""
    weight: float | None = None
    """Of the harmless expert, in (0, 1): what the part ``weights`` is about."""
    strengths: tuple[float, ...] = ()
    """Strengths that a fit may choose from, the preferred ones first; none leaves the policy's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """One error on the rows that a limit was fitted on."""

    n: int
    """Rows that could show it."""
    share: float
    """Of them that did."""
    bound: float
    """What is guaranteed for later rows that are drawn alike."""
    group: str | None = None
    """With ``per_group``: the group with the highest bound, which the other figures are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedPart:
    """One limit, and what it keeps."""

    limit: float
    """At ``input`` of ``needs.harmless``, at ``output`` of ``outcomes.unsafe``, both in the rule that stops; with
    ``weights`` of ``needs.harmless`` in the floor that raises the harmless expert."""
    errors: Mapping[str, Counted]
    """By name, the two of ``ERRORS``."""
    strength: float | None = None
    """The policy's strength, where it was chosen too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """What a policy's limits were fitted on, and what they keep. Written by ``policy fit``."""

    bundle_sha256: str
    calibration_id: str
    data: str
    """``bundle`` for the rows that the bundle keeps, else the name of the file."""
    data_sha256: str
    policy_sha256: str
    """Of the policy without this lock."""
    parts: Mapping[str, FittedPart]
    """By part of the budget."""
    level: float | None = None
    """Of every single bound; None where they hold on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A request, and what the policy should say to it. Run by ``policy test``."""

    expect: tuple[str, ...]
    """Actions, any of which will do; ``pass`` and ``stop`` stand for all that let it through, or do not."""
    prompt: str | None = None
    response: str | None = None
    """Where there is one, the checkpoint output is asked; else input."""
    tool: str | None = None
    """A tool's name; then the checkpoint tool_call is asked."""
    arguments: Any = None
    tenant: str | None = None
    line: int | None = field(default=None, compare=False)

    @property
    def checkpoint(self) -> str:
        """Where it is asked."""
        return "tool_call" if self.tool is not None else "input" if self.response is None else "output"

    def accepts(self, action: Action) -> bool:
        """Whether an action is what was expected."""
        return str(action) in self.expect or ("pass" if action in PASSING else "stop") in self.expect


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the numbers may lead to in one deployment. Made by `load_policy`, which checks every part of it."""

    name: str
    version: int
    """The policy's own version, >= 1; it reaches every trace together with the name."""
    hash: str
    """sha256 (64 hex digits) of the canonical form with ``extends`` applied: comments and layout do not change it."""
    description: str | None
    prior: Mapping[str, float]
    """Relative prior per expert, >= 0."""
    strength: float
    """0 leaves the router alone, 1 corrects fully for the prior."""
    lower: Mapping[str, float]
    """Least weight per expert, before floors."""
    upper: Mapping[str, float]
    """Most weight per expert."""
    floors: tuple[Floor, ...]
    checkpoints: Mapping[str, tuple[Rule, ...]]
    """Checkpoint → its rules; the last one is the default."""
    on_error: Literal["closed", "open"]
    """What holds when a part fails: refuse, or allow."""
    mode: Literal["enforce", "shadow"]
    """``shadow`` records what would have happened, and lets everything through."""
    window_tokens: int
    """Tokens of a reply between two readings of it."""
    source: str | None
    """The file it was loaded from."""
    files: tuple[str, ...] = field(default=(), compare=False)
    """The file, and that which it extends."""
    budget: Budget | None = None
    """The errors that are accepted; a policy with one is used only with the lock that keeps it."""
    lock: Lock | None = None
    examples: tuple[Example, ...] = ()
    """Not part of the hash: they decide nothing."""
    overlays: tuple[Overlay, ...] = ()
    """What is different for some tenants; `for_tenant` applies the first that fits."""
    stricter: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    """Checkpoint → rules of a tenant's overlay, asked beside the policy's own: the stricter decision holds."""
    overlay: str | None = None
    """Where the overlay stands that was applied; None where none was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What is different for some tenants. It can only tighten, unless it says that it may loosen."""

    place: str
    """Where it stands, such as ``overlays[0]``."""
    tenants: tuple[str, ...]
    """Names with ``*`` and ``?``."""
    may_loosen: bool
    """True where its rules come first and its bounds replace the policy's."""
    lower: Mapping[str, float]
    """Only the experts it names."""
    upper: Mapping[str, float]
    floors: tuple[Floor, ...]
    checkpoints: Mapping[str, tuple[Rule, ...]]
    """Checkpoint → its rules; none of them has to be a default rule."""
    on_error: Literal["closed", "open"] | None
    mode: Literal["enforce", "shadow"] | None


def as_document(policy: Policy) -> dict[str, Any]:
    """The policy as its own YAML would say it in full: defaults written out, ``extends`` applied."""
    document: dict[str, Any] = {"version": policy.version, "name": policy.name}
    if policy.description is not None:
        document["description"] = policy.description
    document |= {
        "weights": {e: policy.prior[e] for e in EXPERTS},
        "strength": policy.strength,
        "bounds": {e: {"min": policy.lower[e], "max": policy.upper[e]} for e in EXPERTS},
        "floors": [{"when": _when(f.when), "raise": _in_order(f.raises)} for f in policy.floors],
        "checkpoints": {c: [_rule(r) for r in policy.checkpoints[c]] for c in CHECKPOINTS if c in policy.checkpoints},
        "on_error": policy.on_error,
        "mode": policy.mode,
        "stream": {"window_tokens": policy.window_tokens},
    }
    if policy.overlays:
        document["overlays"] = [_overlay(o) for o in policy.overlays]
    if policy.budget is not None:
        document["budget"] = _budget(policy.budget)
    if policy.lock is not None:
        document["lock"] = _lock(policy.lock)
    if policy.examples:
        document["examples"] = [_example(e) for e in policy.examples]
    return document


def _budget(budget: Budget) -> dict[str, Any]:
    document: dict[str, Any]
    if budget.together:
        document = {part: dict(budget.most[part]) for part in ERRORS if part in budget.most}
        if budget.weight is not None:
            document["weights"]["weight"] = budget.weight
        if budget.strengths:
            document["weights"]["strengths"] = list(budget.strengths)
    else:
        document = dict(budget.most["input"])
    if budget.level is not None:
        document["level"] = budget.level
    if budget.per_group:
        document["per_group"] = True
    return document


def _lock(lock: Lock) -> dict[str, Any]:
    names = ("bundle_sha256", "calibration_id", "data", "data_sha256", "policy_sha256", "level")
    return _present(lock, names) | {part: _fitted(lock.parts[part]) for part in ERRORS if part in lock.parts}


def _fitted(part: FittedPart) -> dict[str, Any]:
    errors = {name: _present(error, ("n", "share", "bound", "group")) for name, error in part.errors.items()}
    return _present(part, ("limit", "strength")) | errors


def _present(record: Lock | FittedPart | Counted, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(record, name)) is not None}


def _example(example: Example) -> dict[str, Any]:
    keys = ("tenant", "prompt", "response")
    document: dict[str, Any] = {k: v for k in keys if (v := getattr(example, k)) is not None}
    if example.tool is not None:
        document["tool"] = {"name": example.tool}
        if example.arguments is not None:
            document["tool"]["arguments"] = example.arguments
    return document | {"expect": example.expect[0] if len(example.expect) == 1 else list(example.expect)}


def _overlay(overlay: Overlay) -> dict[str, Any]:
    document: dict[str, Any] = {"tenants": list(overlay.tenants)}
    if overlay.may_loosen:
        document["may_loosen"] = True
    if named := [e for e in EXPERTS if e in overlay.lower or e in overlay.upper]:
        pairs = {"min": overlay.lower, "max": overlay.upper}
        document["bounds"] = {e: {k: side[e] for k, side in pairs.items() if e in side} for e in named}
    if overlay.floors:
        document["floors"] = [{"when": _when(f.when), "raise": _in_order(f.raises)} for f in overlay.floors]
    if overlay.checkpoints:
        rules = overlay.checkpoints
        document["checkpoints"] = {c: [_rule(r) for r in rules[c]] for c in CHECKPOINTS if c in rules}
    for key in ("on_error", "mode"):
        if (value := getattr(overlay, key)) is not None:
            document[key] = value
    return document


def _when(when: When) -> dict[str, Any]:
    return {c.quantity: c.as_yaml() for c in sorted(when, key=lambda c: c.quantity)}


def _in_order(raises: Mapping[str, float]) -> dict[str, float]:
    return {e: raises[e] for e in EXPERTS if e in raises}


def _rule(rule: Rule) -> dict[str, Any]:
    document: dict[str, Any] = {"when": _when(rule.when)} if rule.when else {}
    document["then"] = str(rule.then)
    if rule.message is not None:
        document["message"] = rule.message
    if rule.raises:
        document["raise"] = _in_order(rule.raises)
    for key in ("upstream", "webhook", "steering", "rollout"):
        if (value := getattr(rule, key)) is not None:
            document[key] = value
    if rule.redact:
        document["redact"] = list(rule.redact)
    if rule.shadow:
        document["mode"] = "shadow"
    return document


def policy_hash(document: Mapping[str, Any], *, with_lock: bool = True) -> str:
    """sha256 of the canonical JSON of a resolved policy without its examples, 64 hex digits."""
    left_out = {"examples"} if with_lock else {"examples", "lock"}
    kept = {key: value for key, value in document.items() if key not in left_out}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
