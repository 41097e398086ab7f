"""How good the confidence is that a request is served with: does it tell right verdicts from wrong ones?

A verdict here is the input check's own: needs.harmless against the limit at which a policy refuses. Confidence is
taken from `make_plan`, as a request gets it, and set beside two that cost nothing: max(p, 1 − p) of the same
calibrated need, and the largest share of the posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hhh_router.calibration import Calibrators
from hhh_router.calibration import metrics as m
from hhh_router.calibration.metrics import Floats
from hhh_router.data.examples import Example, data_hash
from hhh_router.errors import DataError
from hhh_router.evaluation.intervals import with_interval
from hhh_router.pipeline.plan import make_plan
from hhh_router.policy import Policy, thresholds
from hhh_router.types import EXPERTS, Scores

KAPPA, MAX_SOFTMAX, LARGEST_SHARE = "confidence (kappa)", "max softmax", "largest posterior share"
"""Names of what stands for a confidence, in the order of the figures."""
TARGET_ECE = 0.04
"""Largest ECE of kappa that is aimed at; its AURC is to be below that of max softmax."""
_HEAD = "harmless"
_CURVE_POINTS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Prompts with a verdict each; every array has one entry a prompt."""

    limit: float
    """A prompt is refused where needs.harmless reaches this."""
    right: Floats
    """1 where the verdict agrees with the label, else 0."""
    confidences: Mapping[str, Floats]
    """Name → confidence in the verdict, in (0, 1)."""
    contributions: Mapping[str, Floats]
    """Feature → logits it added to kappa; empty where the calibrators have no confidence model."""


def refusal_limit(policy: Policy) -> float:
    """The lowest probability of needs.harmless at which the input rules stop a request by that number alone.

    Raises:
        DataError: No such rule.
    """
    limits = [
        float(rule.when[0].value)
        for rule in policy.checkpoints["input"]
        if rule.then.stops and len(rule.when) == 1 and rule.when[0].quantity == f"needs.{_HEAD}"
        and rule.when[0].op == ">="
    ]  # fmt: skip
    if not limits:
        raise DataError(
            f"policy {policy.name!r} refuses at no limit on needs.{_HEAD}",
            hint="its confidence has no verdict to judge",
        )
    return min(limits)


def judge(rows: Sequence[Example], scores: Sequence[Scores], policy: Policy, calibrators: Calibrators) -> Judged:
    """The verdict on each prompt, whether it was right, and every confidence in it.

    Args:
        rows: Prompts with a label for the harmless need.
        scores: Their readings in mode ``prompt``.
        policy: Whose refusal limit makes the verdict, and whose every limit is among kappa's features.
        calibrators: Of the bundle.
    """
    limit = refusal_limit(policy)
    right: list[float] = []
    found: dict[str, list[float]] = {KAPPA: [], MAX_SOFTMAX: [], LARGEST_SHARE: []}
    added: dict[str, list[float]] = {}
    for example, score in zip(rows, scores, strict=True):
        plan = make_plan(score, policy=policy, calibrators=calibrators)
        p = plan.evidence.needs[_HEAD]
        right.append(float((p >= limit) == bool(example.needs[_HEAD])))
        found[KAPPA].append(plan.confidence)
        found[MAX_SOFTMAX].append(max(p, 1 - p))
        found[LARGEST_SHARE].append(max(plan.evidence.posterior[e] for e in EXPERTS))
        known = {f"needs.{name}": value for name, value in plan.evidence.needs.items()}
        known |= {f"outcomes.{name}": value for name, value in plan.evidence.outcomes.items()}
        terms = calibrators.confidence(
            plan.evidence,
            weights=plan.weights,
            policy_shift_nats=plan.policy_shift_nats,
            limits=[(known[t.quantity], t.value) for t in thresholds(policy, "input") if t.quantity in known],
        ).contributions
        for name, logits in terms.items():
            added.setdefault(name, []).append(logits)
    return Judged(
        limit=limit,
        right=np.array(right),
        confidences={name: np.array(values) for name, values in found.items()},
        contributions={name: np.array(values) for name, values in added.items()},
    )


def confidence_figures(
    task: str, rows: Sequence[Example], judged: Judged, *, policy: str, seed: int, bootstraps: int
) -> list[dict[str, Any]]:
    """One row of figures per confidence, kappa first, each figure with its 95 % bootstrap interval.

    Args:
        task: What the rows are called.
        rows: The prompts of ``judged``, for their hash.
        judged: From `judge`.
        policy: Name of the policy.
        seed: Of the bootstraps.
        bootstraps: Resamples an interval.

    Returns:
        Plain values for JSON. Keys of each row: ``task``, ``confidence``, ``policy``, ``limit``, ``n``, ``seed``,
        ``data_sha256``, ``curve`` (points of risk against coverage), and with an ``…_interval`` each ``accuracy`` (of
        the verdicts), ``ece`` (15 equal-mass bins), ``brier``, ``auroc`` (of right against wrong) and ``aurc``. A
        figure without a value (AUROC where every verdict is right, say) is None. Kappa's row also has
        ``aurc_difference``, AURC of kappa minus AURC of max softmax on the same resamples, ``meets_ece`` and
        ``meets_aurc``, and ``contributions``: feature → mean of |logits|, largest first.
    """
    y = judged.right
    figures: list[dict[str, Any]] = []
    for name, values in judged.confidences.items():
        row: dict[str, Any] = {
            "task": task,
            "confidence": name,
            "policy": policy,
            "limit": judged.limit,
            "n": len(rows),
            "seed": seed,
            "data_sha256": data_hash(rows),
            "curve": [[round(x, 4), round(r, 4)] for x, r in m.risk_coverage_points(values, y, _CURVE_POINTS)],
        }
        metrics: Mapping[str, Callable[..., float]] = {
            "accuracy": lambda _, right: float(np.mean(right)),
            "ece": m.ece,
            "brier": m.brier,
            "auroc": m.auroc,
            "aurc": m.aurc,
        }
        for key, metric in metrics.items():
            row |= with_interval(key, metric, values, y, seed=seed, bootstraps=bootstraps)
        if name == KAPPA:
            row |= _against_max_softmax(judged, seed, bootstraps)
            row["meets_ece"] = row["ece"] <= TARGET_ECE
            row["meets_aurc"] = row["aurc_difference"] < 0
            row["contributions"] = mean_contributions(judged.contributions)
        figures.append(row)
    return figures


def mean_contributions(contributions: Mapping[str, Floats]) -> dict[str, float]:
    """Feature → mean over prompts of the logits it added or took away, the largest first.

    The bias and features that never added anything are left out.

    >>> import numpy as np
    >>> mean_contributions({"bias": np.array([3.0]), "small": np.array([0.5, -0.5]), "large": np.array([-2.0, 1.0]),
    ...                     "absent": np.array([0.0])})
    {'large': 1.5, 'small': 0.5}
    """
    sizes = {name: float(np.mean(np.abs(x))) for name, x in contributions.items() if name != "bias"}
    return dict(sorted(((name, size) for name, size in sizes.items() if size), key=lambda item: -item[1]))


def _against_max_softmax(judged: Judged, seed: int, bootstraps: int) -> dict[str, Any]:
    def difference(kappa: Floats, other: Floats, right: Floats) -> float:
        return m.aurc(kappa, right) - m.aurc(other, right)

    columns = (judged.confidences[KAPPA], judged.confidences[MAX_SOFTMAX], judged.right)
    return with_interval("aurc_difference", difference, *columns, seed=seed, bootstraps=bootstraps)
