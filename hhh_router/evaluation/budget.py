"""A policy's budget → the limits that keep it, or the frontiers of what can be kept.

Three limits can be fitted: of ``needs.harmless`` in the one rule at input that stops on it, of ``outcomes.unsafe`` in
the one rule at output that withholds a reply, and of ``needs.harmless`` in the one floor that raises the harmless
expert. The whole policy is asked about every row, so what its other rules stop or let through counts too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hhh_router.calibration import Calibrators, conformal
from hhh_router.calibration.conformal import (
    FittedLimit,
    RiskBudget,
    Words,
    bounds_fitted,
    fit_limit,
    frontier,
    risk_bound,
)
from hhh_router.errors import DataError, PolicyError
from hhh_router.evaluation.budget_rows import OWN_KNOWN, FitRow
from hhh_router.evaluation.rank import Ranked, rank, rank_replies, rank_weights, refuse_hanging
from hhh_router.policy import Policy
from hhh_router.policy.lock import locked, with_limit
from hhh_router.policy.schema import ERRORS, Budget, Counted, FittedPart, Lock

POINTS = 60
"""Of a trade-off curve."""
_LIMIT_DECIMALS = 6  # readings of one text in two precisions agree to about three
_LEVEL_DECIMALS = 6
_ROWS: Mapping[str, tuple[str, str]] = {
    "input": ("benign", "harmful"),
    "output": ("safe", "unsafe"),
    "weights": ("benign", "harmful"),
}
"""What the rows of a part are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupErrors:
    """Both errors in one group of rows, under the fitted limit."""

    group: str
    n: tuple[int, int]
    """Rows that should pass, and rows that should not."""
    share: tuple[float | None, float | None]
    """Of them that do not, and that do; None without rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFit:
    """One limit that keeps its part of a budget."""

    found: FittedLimit
    curve: list[tuple[float, float, float]]
    """(limit, the error that falls, the one that rises) on the rows."""
    groups: list[GroupErrors]
    """By name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedPolicy:
    """A policy with the limits that keep its budget."""

    policy: Policy
    """With its lock."""
    parts: Mapping[str, PartFit]
    """By part of the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainable:
    """What one limit can promise."""

    limit: float
    falling: float
    """Bound of the error that a higher limit makes rarer."""
    rising: float
    """Of the other one."""


class BudgetNotKept(DataError):
    """No limit keeps a part of a budget."""

    def __init__(self, message: str, *, hint: str, attainable: Mapping[str, list[Attainable]]) -> None:
        super().__init__(message, hint=hint)
        self.attainable = attainable
        """What can be promised instead, by part that is not kept."""


def fit_policy(
    policy: Policy,
    rows: Sequence[FitRow],
    calibrators: Calibrators,
    *,
    bundle_sha256: str,
    data: str,
    data_sha256: str,
    known: frozenset[str] = OWN_KNOWN,
    replies: Sequence[FitRow] = (),
) -> FittedPolicy:
    """The policy with the highest limits that keep its budget, locked.

    Args:
        policy: With a budget, and one rule or floor to fit for each part of it.
        rows: Prompts that the heads were not trained on, labelled.
        calibrators: The bundle's.
        bundle_sha256: Of the bundle.
        data: ``bundle``, or the name of the file.
        data_sha256: Of the rows.
        known: See `rank`.
        replies: Prompts with replies, labelled, for a budget of output.

    Raises:
        PolicyError: It has no budget, or no rule to fit.
        BudgetNotKept: No limit keeps a part of the budget; the message has what can be kept.
        DataError: There are no rows for a part.
    """
    if (budget := policy.budget) is None:
        raise PolicyError(
            f"{policy.source or policy.name}: has no budget to fit it to",
            hint="add one, such as budget: {benign_refused: 0.02, harm_passed: 0.5, level: 0.95}",
        )
    level = each_level(budget, rows, replies)
    fitted: dict[str, tuple[PartFit, FittedPart]] = {}
    failed: dict[str, BudgetNotKept] = {}
    if "weights" in budget.most:
        refuse_hanging(policy, "input", policy.checkpoints["input"], ("weights.",))
    for part in budget.most:
        if part not in budget.most:
            continue
        used = replies if part == "output" else rows
        _check_rows(policy, part, used)
        try:
            policy, fit, found = _fit_part(policy, part, budget, used, calibrators, known, level)
        except BudgetNotKept as error:
            failed[part] = error
        else:
            fitted[part] = fit, found
    if failed:
        raise BudgetNotKept(
            "\n".join(error.message for error in failed.values()),
            hint=next(iter(failed.values())).hint or "",
            attainable={part: found for error in failed.values() for part, found in error.attainable.items()},
        )
    lock = Lock(
        bundle_sha256=bundle_sha256,
        calibration_id=calibrators.id,
        data=data,
        data_sha256=data_sha256,
        policy_sha256="",
        level=None if level is None else round(level, _LEVEL_DECIMALS),
        parts={part: fitted[part][1] for part in ERRORS if part in fitted},
    )
    return FittedPolicy(policy=locked(policy, lock), parts={part: fitted[part][0] for part in ERRORS if part in fitted})


def each_level(budget: Budget, rows: Sequence[FitRow], replies: Sequence[FitRow]) -> float | None:
    """The level of every single bound.

    Where the budget's level is for all of them, what it leaves is split evenly (Bonferroni): over both errors of each
    part, in each group where they are told apart, and at each strength that could be chosen.
    """
    if budget.level is None or not budget.together:
        return budget.level
    count = 0
    for part in budget.most:
        used = replies if part == "output" else rows
        groups = [r.group for r in used] if budget.per_group else None
        of_part = bounds_fitted([float(r.harmful) for r in used], groups)
        count += of_part * (max(1, len(budget.strengths)) if part == "weights" else 1)
    return 1 - (1 - budget.level) / max(count, 1)


def attainable(ranked: Ranked, level: float | None, points: int = 12, *, per_group: bool = False) -> list[Attainable]:
    """Bounds that can be promised, from the limit that refuses most to the one that refuses least."""
    found = conformal.attainable(
        ranked.scores, ranked.harmful, level, points, groups=ranked.groups if per_group else None, settled=True
    )
    return [Attainable(limit=limit, falling=refused, rising=passed) for limit, refused, passed in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstGroup:
    """What can be said of one error in every group of rows at once."""

    bound: float
    """Of the group where it is highest."""
    group: str


def worst_groups(
    policy: Policy,
    rows: Sequence[FitRow],
    calibrators: Calibrators,
    *,
    known: frozenset[str] = OWN_KNOWN,
    replies: Sequence[FitRow] = (),
) -> dict[str, dict[str, WorstGroup]]:
    """What the limits of a fitted policy would promise in every group, had they been set without a look at the rows.

    Where the budget asked for it (``per_group``), its own bounds are promises; of other limits, which were chosen on
    these rows for all of them together, this is a figure to compare with.

    Args:
        policy: With a budget and a lock.
        rows: As for `fit_policy`, like the next.
        calibrators: The bundle's.
        known: See `rank`.
        replies: For a budget of output.

    Returns:
        Part → error → the highest bound. With a ``level`` all of a part's bounds, of both errors in every group, hold
        together at it.
    """
    assert policy.budget is not None
    assert policy.lock is not None
    budget, found = policy.budget, {}
    for part, fitted in policy.lock.parts.items():
        used = replies if part == "output" else rows
        ranked = _rank(policy, part, used, calibrators, known, budget.weight)
        count = bounds_fitted(ranked.harmful, ranked.groups)
        level = None if budget.level is None else 1 - (1 - budget.level) / count
        groups = _by_group(ranked, fitted.limit)
        found[part] = {
            name: max(
                (
                    WorstGroup(bound=risk_bound(round(share * g.n[side]), g.n[side], level), group=g.group)
                    for g in groups
                    if (share := g.share[side]) is not None
                ),
                key=lambda worst: worst.bound,
            )
            for side, name in enumerate(ERRORS[part])
        }
    return found


def _check_rows(policy: Policy, part: str, rows: Sequence[FitRow]) -> None:
    if {row.harmful for row in rows} == {False, True}:
        return
    benign, harmful = _ROWS[part]
    n = sum(row.harmful for row in rows)
    what = "replies" if part == "output" else "prompts"
    raise DataError(
        f"{policy.source or policy.name}: budget.{part}: {n} {harmful} and {len(rows) - n} {benign} {what}; "
        "a limit needs both",
        hint="label rows of both in --data, see docs/evaluate-your-own.md"
        + ("; a bundle from before keeps no replies" if part == "output" and not rows else ""),
    )


def _fit_part(
    policy: Policy,
    part: str,
    budget: Budget,
    rows: Sequence[FitRow],
    calibrators: Calibrators,
    known: frozenset[str],
    level: float | None,
) -> tuple[Policy, PartFit, FittedPart]:
    """The policy with one limit fitted, how it came out, and what the lock says of it."""
    strengths = budget.strengths if part == "weights" else ()
    errors: list[BudgetNotKept] = []
    for strength in strengths or (policy.strength,):
        given = replace(policy, strength=strength)
        ranked = _rank(given, part, rows, calibrators, known, budget.weight)
        try:
            found = _fit_limit(given, part, budget, ranked, level)
        except BudgetNotKept as error:
            errors.append(error)
            continue
        limit = _rounded(found, ranked)
        fit = PartFit(
            found=found,
            curve=frontier(ranked.scores, ranked.harmful, POINTS, settled=True),
            groups=_by_group(ranked, limit),
        )
        locked_part = _locked_part(part, limit, found, strength if strengths else None)
        return with_limit(given, limit, part), fit, locked_part
    if len(errors) > 1:
        tried = ", ".join(f"{s:g}" for s in strengths)
        raise BudgetNotKept(
            f"{errors[0].message}; so it is at each strength of {tried} (the figures are those of the first)",
            hint=errors[0].hint or "",
            attainable=errors[0].attainable,
        )
    raise errors[0]


def _rank(
    policy: Policy,
    part: str,
    rows: Sequence[FitRow],
    calibrators: Calibrators,
    known: frozenset[str],
    weight: float | None,
) -> Ranked:
    if part == "input":
        return rank(policy, rows, calibrators, known)
    if part == "output":
        return rank_replies(policy, rows, calibrators, known)
    assert weight is not None
    return rank_weights(policy, rows, calibrators, weight, known)


def _fit_limit(policy: Policy, part: str, budget: Budget, ranked: Ranked, level: float | None) -> FittedLimit:
    falling, rising = ERRORS[part]
    most = budget.most[part]
    benign, harmful = _ROWS[part]
    try:
        return fit_limit(
            ranked.scores,
            ranked.harmful,
            RiskBudget(benign_refused=most[falling], harm_passed=most[rising], level=level),
            groups=ranked.groups if budget.per_group else None,
            words=Words(benign_refused=falling, harm_passed=rising, benign=benign, harmful=harmful),
            settled=True,
        )
    except DataError as error:
        raise BudgetNotKept(
            f"{policy.source or policy.name}: {error.message}",
            hint=error.hint or "",
            attainable={part: attainable(ranked, level, per_group=budget.per_group)},
        ) from error


def _locked_part(part: str, limit: float, found: FittedLimit, strength: float | None) -> FittedPart:
    falling, rising = ERRORS[part]
    return FittedPart(
        limit=limit,
        strength=strength,
        errors={
            falling: Counted(
                n=found.n_benign,
                share=round(found.benign_refused, 6),
                bound=round(found.benign_refused_bound, 6),
                group=found.benign_group,
            ),
            rising: Counted(
                n=found.n_harmful,
                share=round(found.harm_passed, 6),
                bound=round(found.harm_passed_bound, 6),
                group=found.harmful_group,
            ),
        },
    )


def _by_group(ranked: Ranked, limit: float) -> list[GroupErrors]:
    counts: dict[str, tuple[list[bool], list[bool]]] = {}
    for score, harmful, group in zip(ranked.scores, ranked.harmful, ranked.groups, strict=True):
        stopped = bool(score >= limit)
        counts.setdefault(group, ([], []))[int(harmful)].append(not stopped if harmful else stopped)
    return [
        GroupErrors(
            group=group,
            n=(len(benign), len(harmful)),
            share=(
                sum(benign) / len(benign) if benign else None,
                sum(harmful) / len(harmful) if harmful else None,
            ),
        )
        for group, (benign, harmful) in sorted(counts.items())
    ]


def _rounded(found: FittedLimit, ranked: Ranked) -> float:
    """The limit with few digits, where that moves no row to its other side. It is never above 1, where all pass."""
    stopped = ranked.scores >= found.limit
    for decimals in (3, 4, _LIMIT_DECIMALS):
        nearest = round(found.limit, decimals)
        for shorter in (
            nearest,
            round(nearest - 10**-decimals, decimals),
        ):  # the limit is a row's score: never above it
            if shorter > 0 and ((ranked.scores >= shorter) == stopped).all():
                return shorter
    return found.limit
