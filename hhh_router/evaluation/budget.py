"""A policy's budget → the limit that keeps it, or the frontier of what can be kept.

What is fitted is the limit of ``needs.harmless`` in the one rule at input that stops on it. The whole policy is asked
about every row, so what its other rules stop or let through counts too: a row that others stop is above every limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hhh_router.calibration import Calibrators
from hhh_router.calibration.conformal import FittedLimit, RiskBudget, fit_limit, frontier, risk_bound
from hhh_router.calibration.kept import Kept
from hhh_router.data.examples import Example
from hhh_router.errors import DataError, PolicyError
from hhh_router.evaluation.systems import Readings
from hhh_router.pipeline.plan import make_plan
from hhh_router.pipeline.situation import asked_situation
from hhh_router.policy import Policy
from hhh_router.policy.doors import SITUATIONS
from hhh_router.policy.lock import FITTED, fitted_rule, locked, with_limit
from hhh_router.policy.quantities import row_of
from hhh_router.policy.rules import Rule, When
from hhh_router.policy.schema import Lock
from hhh_router.types import Caller, ReadRequest, Scores, Situation

NEED = FITTED.removeprefix("needs.")
POINTS = 60
"""Of a trade-off curve."""
_LIMIT_DECIMALS = 6  # readings of one text in two precisions agree to about three


KEPT_KNOWN = frozenset({"length.tokens"})
"""What is known of the rows that a bundle keeps, beside their readings."""
OWN_KNOWN = KEPT_KNOWN | {"role", "text", "length.characters", "conversation.turns"}
"""What is known of prompts in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """One labelled prompt."""

    scores: Scores
    harmful: bool
    situation: Situation
    """What surrounds it; ``Situation()`` where nothing is known."""


def kept_rows(kept: Kept) -> list[FitRow]:
    """The rows that a bundle keeps, as far as their harm is known; nothing but their scores surrounds them."""
    return [
        FitRow(scores=row.scores, harmful=bool(row.needs[NEED]), situation=Situation())
        for row in kept.rows
        if NEED in row.needs
    ]


def own_rows(examples: Sequence[Example], readings: Readings) -> list[FitRow]:
    """A user's labelled prompts, read by the bundle; what its template does not take is left out."""
    scores = readings.scores([ReadRequest(messages=e.messages) for e in examples])
    return [
        FitRow(
            scores=found,
            harmful=bool(example.needs[NEED]),
            situation=asked_situation(example.messages, Caller(), None),
        )
        for example, found in zip(examples, scores, strict=True)
        if found is not None
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """How high a limit would have to be to let each row pass."""

    scores: NDArray[np.float64]
    """``needs.harmless``; 1 where other rules stop the row anyway, 0 where no limit stops it."""
    harmful: NDArray[np.float64]
    """1 or 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedPolicy:
    """A policy with the limit that keeps its budget."""

    policy: Policy
    """With its lock."""
    found: FittedLimit
    curve: list[tuple[float, float, float]]
    """(limit, benign refused, harm passed) on the rows."""


def rank(policy: Policy, rows: Sequence[FitRow], calibrators: Calibrators, known: frozenset[str] = OWN_KNOWN) -> Ranked:
    """Ask a policy about every row as if its limit were 0, and as if there were none.

    Args:
        policy: With one rule that stops on ``needs.harmless``.
        rows: Labelled prompts.
        calibrators: The bundle's.
        known: What is known of the rows beside their readings. Rules at input and floors that ask for anything else
            are left out, as if they never held: else ``on_error`` would stop every row.

    Raises:
        PolicyError: There is not one rule to fit, or its rules at input ask for what hangs on the limit.
        ReaderError: Nothing can be concluded from a row.
    """
    policy = _answerable(policy, known)
    i, j = fitted_rule(policy)
    if any(c.quantity == "confidence" for rule in policy.checkpoints["input"] for c in rule.when):
        raise PolicyError(
            f"{policy.source or policy.name}: a rule at input asks for confidence, which hangs on the limit",
            hint="ask for confidence at output, or take the budget away",
        )
    open_rule = policy.checkpoints["input"][i]
    always = _with_when(policy, i, tuple(c for k, c in enumerate(open_rule.when) if k != j))
    never = replace(policy, checkpoints={**policy.checkpoints, "input": _without(policy, i)})
    found = []
    for row in rows:
        plan = make_plan(row.scores, policy=never, calibrators=calibrators, situation=row.situation)
        if plan.decision.action.stops:
            found.append(1.0)
            continue
        stopped = make_plan(row.scores, policy=always, calibrators=calibrators, situation=row.situation)
        found.append(plan.evidence.needs[NEED] if stopped.decision.action.stops else 0.0)
    return Ranked(scores=np.array(found), harmful=np.array([float(r.harmful) for r in rows]))


def fit_policy(
    policy: Policy,
    rows: Sequence[FitRow],
    calibrators: Calibrators,
    *,
    bundle_sha256: str,
    data: str,
    data_sha256: str,
    known: frozenset[str] = OWN_KNOWN,
) -> FittedPolicy:
    """The policy with the highest limit that keeps its budget, locked.

    Args:
        policy: With a budget and one rule that stops on ``needs.harmless``.
        rows: Prompts that the heads were not trained on, labelled.
        calibrators: The bundle's.
        bundle_sha256: Of the bundle.
        data: ``bundle``, or the name of the file.
        data_sha256: Of the rows.
        known: See `rank`.

    Raises:
        PolicyError: It has no budget, or no rule to fit.
        DataError: No limit keeps the budget; the message has what can be kept.
    """
    budget = _budget(policy)
    ranked = rank(policy, rows, calibrators, known)
    try:
        found = fit_limit(ranked.scores, ranked.harmful, budget)
    except DataError as error:
        raise DataError(f"{policy.source or policy.name}: {error.message}", hint=error.hint) from error
    limit = _rounded(found, ranked)
    lock = Lock(
        limit=limit,
        bundle_sha256=bundle_sha256,
        calibration_id=calibrators.id,
        data=data,
        data_sha256=data_sha256,
        policy_sha256="",
        n_benign=found.n_benign,
        n_harmful=found.n_harmful,
        benign_refused=round(found.benign_refused, 6),
        harm_passed=round(found.harm_passed, 6),
        benign_refused_bound=round(found.benign_refused_bound, 6),
        harm_passed_bound=round(found.harm_passed_bound, 6),
    )
    curve = frontier(ranked.scores, ranked.harmful, POINTS)
    return FittedPolicy(policy=locked(with_limit(policy, limit), lock), found=found, curve=curve)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainable:
    """What one limit can promise."""

    limit: float
    benign_refused_bound: float
    harm_passed_bound: float


def attainable(ranked: Ranked, level: float | None, points: int = 12) -> list[Attainable]:
    """Bounds that can be promised, from the limit that refuses most to the one that refuses least."""
    n_harmful = int(ranked.harmful.sum())
    n_benign = len(ranked.harmful) - n_harmful
    return [
        Attainable(
            limit=limit,
            benign_refused_bound=risk_bound(round(refused * n_benign), n_benign, level),
            harm_passed_bound=risk_bound(round(passed * n_harmful), n_harmful, level),
        )
        for limit, refused, passed in frontier(ranked.scores, ranked.harmful, points)
    ]


def _budget(policy: Policy) -> RiskBudget:
    if policy.budget is None:
        raise PolicyError(
            f"{policy.source or policy.name}: has no budget to fit it to",
            hint="add one, such as budget: {benign_refused: 0.02, harm_passed: 0.5, level: 0.95}",
        )
    given = policy.budget
    return RiskBudget(benign_refused=given.benign_refused, harm_passed=given.harm_passed, level=given.level)


def _rounded(found: FittedLimit, ranked: Ranked) -> float:
    """The limit with few digits, where that moves no row to its other side. It is never above 1, where all pass."""
    for decimals in (3, 4, _LIMIT_DECIMALS):
        shorter = round(found.limit, decimals)
        if ((ranked.scores >= shorter) == (ranked.scores >= found.limit)).all():
            return shorter
    return found.limit


def _answerable(policy: Policy, known: frozenset[str]) -> Policy:
    def can_be_asked(when: When) -> bool:
        return all(row_of(c.quantity) in known or row_of(c.quantity) not in SITUATIONS for c in when)

    return replace(
        policy,
        floors=tuple(f for f in policy.floors if can_be_asked(f.when)),
        checkpoints={  # a budget is about input alone
            "output": policy.checkpoints["output"],
            "input": tuple(r for r in policy.checkpoints["input"] if can_be_asked(r.when) and r.rollout is None),
        },
    )


def _with_when(policy: Policy, i: int, when: When) -> Policy:
    rules = list(policy.checkpoints["input"])
    rules[i] = replace(rules[i], when=when)
    return replace(policy, checkpoints={**policy.checkpoints, "input": tuple(rules)})


def _without(policy: Policy, i: int) -> tuple[Rule, ...]:
    rules = policy.checkpoints["input"]
    return rules[:i] + rules[i + 1 :]
