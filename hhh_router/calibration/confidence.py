"""Confidence: P(every verdict enforced on this request is right), from a small logistic model over named features.

It is not the largest probability: a request can have extreme scores and still lie next to a policy's limit, or far
from everything the calibrators have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hhh_router.calibration.calibrators import PROBABILITY_MARGIN, logit_of, probability
from hhh_router.types import Evidence, Weights

FEATURES: tuple[str, ...] = (
    "min_margin",  # smallest |logit p − logit limit| over the checkpoint's limits
    "nearest_margin",  # the same with its sign: > 0 where p lies above the nearest limit
    "least_claim",  # logit of the least p, or 1 − p below its limit: how sure the least sure verdict is by itself
    "no_limits",  # 1 where the checkpoint compares no number; margins and claim are then 0
    "max_outcome_logit",
    "unsafe_logit",
    "untruthful_logit",
    "unhelpful_logit",
    "harmless_logit",
    "has_needs",  # 0 where the mode reports no needs; harmless_logit is then 0
    "weights_entropy_nats",
    "policy_shift_nats",
    "log_tokens",  # ln(1 + tokens read)
    "distance",  # ``scores.distance``, at most 10
    "in_distribution",
    "mode_response",
    "mode_both",
    "mean_logprob",  # of the reply's tokens, in nats, each at least −20
    "min_logprob",
    "has_logprobs",  # 0 where no log-probability is known; both are then 0
)
"""Names of the features, in the order they are reported."""

STANDARD_LIMIT = 6.0  # a standardised feature counts at most this many deviations: no outlier decides alone
_DISTANCE_LIMIT = 10.0
_LOGPROB_FLOOR = -20.0  # some servers write −9999 for a token that was ruled out


class FeatureWeight(BaseModel):
    """One term of the model: ``weight · clip((feature − mean) / scale)``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float
    scale: float = Field(gt=0)
    weight: float
    """In logits per standard deviation; 0 where the penalty removed the feature or it never varied."""


class ConfidenceModel(BaseModel):
    """Elastic-net logistic model of one mode, with its figures on rows it was not fitted to."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bias: float
    terms: dict[str, FeatureWeight]
    constant: tuple[str, ...] = ()
    """Features that never varied in the data: weight 0, nothing is known about them."""
    penalty: float = Field(ge=0)
    """Strength of the elastic net that the one-standard-error rule chose."""
    n: int = Field(ge=1)
    right: int = Field(ge=0)
    """How many of the n rows had every verdict right."""
    nll: float = Field(ge=0)
    """In nats, from nested cross-validation, as are ``brier``, ``ece`` and ``auroc``."""
    brier: float = Field(ge=0, le=1)
    ece: float = Field(ge=0, le=1)
    auroc: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        unknown = sorted(set(self.terms) - set(FEATURES))
        if unknown:
            raise ValueError(f"terms: {unknown[0]!r} is no feature of this version; known are {', '.join(FEATURES)}")
        return self

    def apply(self, features: Mapping[str, float]) -> Confidence:
        """The confidence and, per feature, how many logits it added or took away (``bias`` included)."""
        contributions = {"bias": self.bias}
        for name, term in self.terms.items():
            contributions[name] = term.weight * standardised(features[name], mean=term.mean, scale=term.scale)
        return Confidence(value=probability(sum(contributions.values())), contributions=contributions, calibrated=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """P(every verdict enforced so far is right), and where it comes from."""

    value: float
    """Strictly inside (0, 1)."""
    contributions: Mapping[str, float] = field(default_factory=dict)
    """Feature → logits; they sum to the logit of ``value``. Empty where no model was fitted."""
    calibrated: bool
    """False where the mode has no confidence model, or the calibrators do not fit the heads."""


def standardised(value: float, *, mean: float, scale: float) -> float:
    """A feature in deviations from its mean in the calibration data, held within ±6.

    >>> standardised(3.0, mean=1.0, scale=0.5), standardised(-100.0, mean=1.0, scale=0.5)
    (4.0, -6.0)
    """
    return min(max((value - mean) / scale, -STANDARD_LIMIT), STANDARD_LIMIT)


def confidence_features(
    evidence: Evidence,
    *,
    weights: Weights,
    policy_shift_nats: float,
    limits: Sequence[tuple[float, float]],
    logprobs: Sequence[float] = (),
) -> dict[str, float]:
    """The features of `FEATURES`, all finite, for one request at one checkpoint.

    Args:
        evidence: Of the latest reading.
        weights: What is applied.
        policy_shift_nats: KL(weights ‖ posterior), >= 0.
        limits: (probability found, limit it is compared with) for each numeric condition of the checkpoint.
        logprobs: Of the reply's tokens so far, in nats; those that are no number are left out.
    """
    claims = [logit_of(p if p >= limit else 1 - p) for p, limit in limits]
    nearest = min((logit_of(p) - logit_of(limit) for p, limit in limits), key=abs, default=0.0)
    outcomes = {name: logit_of(p) for name, p in evidence.outcomes.items()}
    known = [max(lp, _LOGPROB_FLOOR) for lp in logprobs if not math.isnan(lp)]
    return {
        "min_margin": abs(nearest),
        "nearest_margin": nearest,
        "least_claim": min(claims, default=0.0),
        "no_limits": float(not limits),
        "max_outcome_logit": max(outcomes.values(), default=0.0),
        "unsafe_logit": outcomes.get("unsafe", 0.0),
        "untruthful_logit": outcomes.get("untruthful", 0.0),
        "unhelpful_logit": outcomes.get("unhelpful", 0.0),
        "harmless_logit": logit_of(evidence.needs["harmless"]) if "harmless" in evidence.needs else 0.0,
        "has_needs": float("harmless" in evidence.needs),
        "weights_entropy_nats": weights.entropy_nats(),
        "policy_shift_nats": policy_shift_nats,
        "log_tokens": math.log1p(evidence.scores.tokens),
        "distance": min(evidence.scores.distance, _DISTANCE_LIMIT),
        "in_distribution": float(evidence.in_distribution),
        "mode_response": float(evidence.mode == "response"),
        "mode_both": float(evidence.mode == "both"),
        "mean_logprob": sum(known) / len(known) if known else 0.0,
        "min_logprob": min(known, default=0.0),
        "has_logprobs": float(bool(known)),
    }


def unfitted_confidence(evidence: Evidence, limits: Sequence[tuple[float, float]]) -> Confidence:
    """What can be said without a fitted model; never called calibrated.

    Each numeric condition is read as a claim, "it is so" where the probability reaches the limit and "it is not"
    below, which is right with probability p or 1 − p. All claims together are right with at most the smallest of
    these (Fréchet's upper bound). Without any condition: the least decided of the outcomes, max(p, 1 − p).
    """
    claims = [p if p >= limit else 1 - p for p, limit in limits]
    if not claims:
        claims = [max(p, 1 - p) for p in evidence.outcomes.values()]
    value = min(claims, default=0.5)
    return Confidence(value=min(max(value, PROBABILITY_MARGIN), 1 - PROBABILITY_MARGIN), calibrated=False)
