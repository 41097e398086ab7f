"""Binary calibrators: one raw head output (a logit) → one probability.

All three are members of one family, ``p = σ(b·ln(1+eˣ) − a·ln(1+e⁻ˣ) + c)`` for a logit x: temperature has
a = b and c = 0, Platt a = b, beta all three free. With a, b ≥ 0 each keeps the order of the scores.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Method = Literal["temperature", "platt", "beta"]

METHODS: tuple[Method, ...] = ("temperature", "platt", "beta")
"""From the fewest parameters (1) to the most (3)."""

PROBABILITY_MARGIN = 1e-6  # probabilities stay this far from 0 and 1: a finite sample never proves certainty

DRIFT_BINS = 10  # of equal width, over the probabilities of the calibration rows

PARAMETERS: dict[Method, tuple[str, ...]] = {
    "temperature": ("temperature",),
    "platt": ("slope", "intercept"),
    "beta": ("a", "b", "c"),
}
"""The names of each method's parameters."""


def probability(logit: float) -> float:
    """The logistic function, held strictly inside (0, 1); accepts ±inf.

    >>> probability(0.0)
    0.5
    >>> probability(1e308), probability(-1e308)
    (0.999999, 1e-06)
    """
    if logit >= 0:
        p = 1 / (1 + math.exp(-logit))
    else:
        e = math.exp(logit)  # the form that cannot overflow for a negative logit
        p = e / (1 + e)
    return min(max(p, PROBABILITY_MARGIN), 1 - PROBABILITY_MARGIN)


def logit_of(p: float) -> float:
    """The log-odds of a probability, which is first held inside (0, 1) as `probability` does.

    >>> round(logit_of(0.9), 4), logit_of(0.5)
    (2.1972, 0.0)
    """
    p = min(max(p, PROBABILITY_MARGIN), 1 - PROBABILITY_MARGIN)
    return math.log(p / (1 - p))


def softplus(x: float) -> float:
    """ln(1 + eˣ) without overflow.

    >>> softplus(1000.0), round(softplus(0.0), 6)
    (1000.0, 0.693147)
    """
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


class HeadCalibration(BaseModel):
    """How one head's logit becomes a probability in one mode, and how well that held on data it was not fitted to."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method
    params: dict[str, float]
    """``temperature`` (> 0); ``slope`` (>= 0) and ``intercept``; or ``a``, ``b`` (>= 0) and ``c``."""
    n: int = Field(ge=1)
    """Labelled calibration rows behind this head in this mode."""
    positives: int = Field(ge=0)
    """How many of them are labelled 1."""
    nll: float = Field(ge=0)
    """Mean negative log-likelihood in nats, cross-validated."""
    brier: float = Field(ge=0, le=1)
    """Mean squared error of the probability, cross-validated."""
    ece: float = Field(ge=0, le=1)
    """Expected calibration error over 15 equal-mass bins, cross-validated."""
    nll_identity: float = Field(ge=0)
    """The same three without any calibrator: plain σ(logit)."""
    brier_identity: float = Field(ge=0, le=1)
    ece_identity: float = Field(ge=0, le=1)
    auroc: float = Field(ge=0, le=1)
    """How well the logit orders the labels; no calibrator changes it."""
    candidates: dict[Method, float] = Field(default_factory=dict)
    """Cross-validated NLL of every method that was allowed for this many rows."""
    bins: tuple[int, ...] | None = Field(default=None, min_length=DRIFT_BINS, max_length=DRIFT_BINS)
    """Calibration rows by their calibrated probability, in ten bins of equal width; None in files from before."""

    @model_validator(mode="after")
    def _check_params(self) -> Self:
        expected = PARAMETERS[self.method]
        if set(self.params) != set(expected):
            raise ValueError(
                f"params of {self.method} are {', '.join(expected)}; found {', '.join(self.params) or 'none'}"
            )
        if self.params.get("temperature", 1.0) <= 0:
            raise ValueError(f"temperature must be > 0, found {self.params['temperature']}")
        falling = [name for name in ("slope", "a", "b") if self.params.get(name, 0.0) < 0]
        if falling:
            raise ValueError(f"{falling[0]} must be >= 0 (a calibrator keeps order), found {self.params[falling[0]]}")
        if self.positives > self.n:
            raise ValueError(f"positives ({self.positives}) exceed n ({self.n})")
        return self

    @model_serializer(mode="wrap")
    def _without_missing_bins(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A file from before keeps its content, and with it its id."""
        told: dict[str, Any] = dump(self)
        if self.bins is None:
            del told["bins"]
        return told

    @property
    def base_rate(self) -> float:
        """Share of positives among the calibration rows."""
        return self.positives / self.n

    def apply(self, logit: float) -> float:
        """P(label = 1) for a raw logit, strictly inside (0, 1) for any finite logit, never falling as the logit rises.

        Sources: temperature, Guo et al. 2017, section 4.2; Platt 1999; beta, Kull et al. 2017 (their
        ``a·ln s − b·ln(1−s) + c`` with s = σ(logit), written with ``softplus`` so that it stays finite).
        """
        p = self.params
        if self.method == "temperature":
            return probability(logit / p["temperature"])
        if self.method == "platt":
            return probability(p["slope"] * logit + p["intercept"])
        return probability(p["b"] * softplus(logit) - p["a"] * softplus(-logit) + p["c"])
