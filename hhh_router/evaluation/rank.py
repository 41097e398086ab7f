"""How high each limit of a policy would have to be to let a row pass, with everything else in the policy as it is.

The policy is asked about a row twice: as if what is fitted always held, and as if it were not there. Where that makes a
difference, the row stands at its own probability; where it makes none, at 1 or at 0, beyond every limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hhh_router.calibration import Calibrators
from hhh_router.errors import PolicyError
from hhh_router.evaluation.budget_rows import FAULT, NEED, OWN_KNOWN, FitRow
from hhh_router.pipeline.plan import make_plan
from hhh_router.policy import Facts, Policy, bounds, decide
from hhh_router.policy.doors import SITUATIONS
from hhh_router.policy.lock import EXPERT, fitted_rule, with_conditions
from hhh_router.policy.quantities import row_of
from hhh_router.policy.rules import Rule, When
from hhh_router.policy.schema import PASSING
from hhh_router.routing import weigh
from hhh_router.types import Evidence, Weights

_NOWHERE = Weights(1.0, 0.0, 0.0, 0.0)  # rules that ask for weights are not asked here
_ROUNDING = 1e-9  # of weights: one that a floor raises to 0.5 counts as 0.5

Rules = tuple[Rule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """How high a limit would have to be to let each row pass."""

    scores: NDArray[np.float64]
    """The fitted quantity; 1 where the row is stopped whatever the limit, 0 where no limit stops it."""
    harmful: NDArray[np.float64]
    """1 or 0."""
    groups: tuple[str, ...]
    """Of each row."""


def rank(policy: Policy, rows: Sequence[FitRow], calibrators: Calibrators, known: frozenset[str] = OWN_KNOWN) -> Ranked:
    """By the limit of ``needs.harmless`` at input.

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
    policy = _only(policy, input=_askable(policy.checkpoints["input"], known), known=known)
    always, never = _both(policy, "input")
    refuse_hanging(policy, "input", policy.checkpoints["input"], ("confidence",))

    def score(row: FitRow) -> float:
        plan = make_plan(row.scores, policy=never, calibrators=calibrators, situation=row.situation)
        if plan.decision.action.stops:
            return 1.0
        stopped = make_plan(row.scores, policy=always, calibrators=calibrators, situation=row.situation)
        return plan.evidence.needs[NEED] if stopped.decision.action.stops else 0.0

    return _ranked(rows, score)


def rank_replies(
    policy: Policy, rows: Sequence[FitRow], calibrators: Calibrators, known: frozenset[str] = OWN_KNOWN
) -> Ranked:
    """By the limit of ``outcomes.unsafe`` at output, of whole replies; the other arguments are those of `rank`.

    Raises:
        PolicyError: There is not one rule to fit, or a rule that matters asks for weights or confidence, which hang on
            more than these rows.
        ReaderError: Nothing can be concluded from a row.
    """
    rules = policy.checkpoints["output"]
    last = max((i for i, r in enumerate(rules) if r.then not in PASSING and not r.shadow), default=-1)
    settling = tuple(r for r in rules[: last + 1] if not r.shadow)  # behind it everything passes, whatever the action
    policy = _only(policy, output=_askable((*settling, rules[-1]) if last + 1 < len(rules) else settling, known))
    always, never = _both(policy, "output")
    refuse_hanging(policy, "output", settling, ("confidence", "weights."))

    def score(row: FitRow) -> float:
        evidence = calibrators.evidence(row.scores)
        facts = Facts(
            needs=evidence.needs, outcomes=evidence.outcomes, weights=_NOWHERE, confidence=None,
            in_distribution=evidence.in_distribution, mode=evidence.mode,
            situation=replace(row.situation, tokens=row.scores.tokens),
        )  # fmt: skip
        if decide(never, "output", facts).action not in PASSING:
            return 1.0
        return evidence.outcomes[FAULT] if decide(always, "output", facts).action not in PASSING else 0.0

    return _ranked(rows, score)


def rank_weights(
    policy: Policy,
    rows: Sequence[FitRow],
    calibrators: Calibrators,
    weight: float,
    known: frozenset[str] = OWN_KNOWN,
) -> Ranked:
    """By the limit of the floor that raises the harmless expert: does its weight come to ``weight``.

    Raises:
        PolicyError: There is not one floor to fit, or it raises to less than ``weight``.
        ReaderError: Nothing can be concluded from a row.
    """
    policy = replace(policy, floors=tuple(f for f in policy.floors if _can_be_asked(f.when, known)))
    always, never = _both(policy, "weights")
    floor = policy.floors[fitted_rule(policy, "weights")[0]]
    if floor.raises[EXPERT] < weight:
        raise PolicyError(
            f"{policy.source or policy.name}: {floor.place} raises {EXPERT} to {floor.raises[EXPERT]:g}, below the "
            f"{weight:g} of budget.weights.weight",
            hint="raise it to that weight at least, or budget for a lower one",
        )

    def reached(asked: Policy, evidence: Evidence, row: FitRow) -> bool:
        within = bounds(asked, evidence, None, replace(row.situation, tokens=row.scores.tokens))
        found = weigh(
            evidence.posterior, prior=asked.prior, train_prior=calibrators.train_prior, strength=asked.strength,
            lower=within.lower, upper=within.upper,
        )  # fmt: skip
        return found[EXPERT] >= weight - _ROUNDING

    def score(row: FitRow) -> float:
        evidence = calibrators.evidence(row.scores)
        if reached(never, evidence, row):
            return 1.0
        return evidence.needs[NEED] if reached(always, evidence, row) else 0.0

    return _ranked(rows, score)


def _ranked(rows: Sequence[FitRow], score: Callable[[FitRow], float]) -> Ranked:
    return Ranked(
        scores=np.array([score(row) for row in rows]),
        harmful=np.array([float(row.harmful) for row in rows]),
        groups=tuple(row.group for row in rows),
    )


def _both(policy: Policy, part: str) -> tuple[Policy, Policy]:
    """The policy with its fitted condition always true, and without the rule or floor that has it."""
    i, j = fitted_rule(policy, part)
    when = policy.floors[i].when if part == "weights" else policy.checkpoints[part][i].when
    always = with_conditions(policy, part, i, tuple(c for k, c in enumerate(when) if k != j))
    return always, with_conditions(policy, part, i, None)


def _only(policy: Policy, *, known: frozenset[str] | None = None, **rules: Rules) -> Policy:
    """With these rules; what session, tool calls and tool results would say is no part of a budget."""
    both = {c: rules.get(c, policy.checkpoints[c]) for c in ("input", "output")}
    floors = policy.floors if known is None else tuple(f for f in policy.floors if _can_be_asked(f.when, known))
    return replace(policy, floors=floors, checkpoints=both)


def _askable(rules: Rules, known: frozenset[str]) -> Rules:
    return tuple(r for r in rules if _can_be_asked(r.when, known) and r.rollout is None)


def _can_be_asked(when: When, known: frozenset[str]) -> bool:
    return all(row_of(c.quantity) in known or row_of(c.quantity) not in SITUATIONS for c in when)


def refuse_hanging(policy: Policy, part: str, rules: Rules, quantities: tuple[str, ...]) -> None:
    """Refuse rules that ask for what changes with what is fitted.

    Raises:
        PolicyError: Names the first.
    """
    for rule in rules:
        for condition in rule.when:
            if condition.quantity.startswith(quantities):
                found = condition.quantity
                raise PolicyError(
                    f"{policy.source or policy.name}: a rule at {part} asks for {found}, which hangs on what is fitted",
                    hint=_MOVE[part].format(found),
                )


_MOVE = {
    "input": "ask for {} at output, or take the budget away",
    "output": "move the rule behind all that withhold a reply, or take the budget for output away",
}
