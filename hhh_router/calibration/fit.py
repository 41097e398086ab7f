"""Fit calibrators and the confidence model. Needs numpy and scipy; every result is fixed by data and seed.

One rule chooses everywhere: a smaller model stays unless a larger one wins cross-validated NLL by more than one
standard error of the paired difference (Hastie, Tibshirani & Friedman 2009, section 7.10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit

from hhh_router.calibration.calibrators import (
    DRIFT_BINS,
    METHODS,
    PARAMETERS,
    PROBABILITY_MARGIN,
    HeadCalibration,
    Method,
)
from hhh_router.calibration.confidence import FEATURES, STANDARD_LIMIT, ConfidenceModel, FeatureWeight
from hhh_router.calibration.drift import bin_of
from hhh_router.calibration.metrics import auroc, brier, ece, nll, nll_per_row, standard_error
from hhh_router.errors import DataError

MIN_ROWS = 30  # below, even one parameter is fitted to noise
PLATT_MIN_ROWS = 150  # METHOD: one parameter only below this
BETA_MIN_ROWS = 500  # METHOD: no third parameter below this
FOLDS = 5
SUPPORT = 0.99  # share of the calibration rows that counts as in distribution

PENALTIES: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Elastic-net strengths that are tried, strongest (smallest model) first."""
_L1_SHARE = 0.5  # half lasso, half ridge: correlated margins share a weight instead of taking turns between folds

_SLOPES = (1e-3, 1e3)  # logits per root mean square of the scores; the lower keeps T finite where they say nothing
_NEGLIGIBLE = 1e-6  # a weight this small in logits per deviation changes no confidence in its fourth digit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_Model = TypeVar("_Model")


def fit_head(logits: ArrayLike, labels: ArrayLike, *, seed: int, folds: int = FOLDS) -> HeadCalibration:
    """Fit one head in one mode with the smallest method that the rows justify.

    Args:
        logits: Raw head outputs, shape (n,).
        labels: 0 or 1, shape (n,).
        seed: Of the split into folds.
        folds: Parts of the cross-validation, >= 2.

    Returns:
        Parameters fitted to all rows; every figure is cross-validated, so it speaks for rows not fitted to.

    Raises:
        DataError: Fewer than 30 rows, one class (nearly) alone, constant scores, or values that are not finite.
    """
    x, y = _checked_head(logits, labels, folds)
    fold = stratified_folds(y, folds=folds, seed=seed)
    held_out = {m: _cross_validated(m, x, y, fold) for m in allowed_methods(len(x))}
    rows = {m: nll_per_row(p, y) for m, p in held_out.items()}
    method = smallest_within_error(rows)
    bare = _clipped(expit(x))
    fitted = HeadCalibration(
        method=method,
        params=_parameters(method, _solve(method, x, y)),
        n=len(x),
        positives=int(y.sum()),
        nll=nll(held_out[method], y),
        brier=brier(held_out[method], y),
        ece=ece(held_out[method], y),
        nll_identity=nll(bare, y),
        brier_identity=brier(bare, y),
        ece_identity=ece(bare, y),
        auroc=auroc(x, y),
        candidates={m: float(r.mean()) for m, r in rows.items()},
    )
    spread = np.bincount([bin_of(fitted.apply(float(logit))) for logit in x], minlength=DRIFT_BINS)
    return fitted.model_copy(update={"bins": tuple(int(n) for n in spread)})


def fit_confidence(
    rows: Sequence[Mapping[str, float]], right: Sequence[bool], *, seed: int, folds: int = FOLDS
) -> ConfidenceModel:
    """Fit P(every verdict right) to features, by nested cross-validation.

    Args:
        rows: One mapping of feature → value per request, as `confidence_features` makes them.
        right: Whether every enforced verdict of that request was right.
        seed: Of the splits into folds.
        folds: Parts of the outer and of the inner cross-validation.

    Returns:
        The model fitted to all rows. Its penalty was chosen on inner folds; its figures come from outer folds that
        took no part in that choice.

    Raises:
        DataError: Fewer than 30 rows, (nearly) all right or wrong, differing features, or values that are not finite.
    """
    names, x, y = _checked_features(rows, right, folds)
    fold = stratified_folds(y, folds=folds, seed=seed)
    held_out = np.empty(len(y))
    for k in range(folds):
        inside = fold != k
        model = _Logistic.choose(x[inside], y[inside], folds=folds, seed=seed)
        held_out[~inside] = model.predict(x[~inside])
    final = _Logistic.choose(x, y, folds=folds, seed=seed)
    return ConfidenceModel(
        bias=final.bias,
        terms={
            name: FeatureWeight(mean=float(m), scale=float(s), weight=float(w))
            for name, m, s, w in zip(names, final.mean, final.scale, final.weights, strict=True)
        },
        constant=tuple(name for name, c in zip(names, final.constant, strict=True) if c),
        penalty=final.penalty,
        n=len(y),
        right=int(y.sum()),
        nll=nll(held_out, y),
        brier=brier(held_out, y),
        ece=ece(held_out, y),
        auroc=auroc(held_out, y),
    )


def fit_distance_limit(distances: ArrayLike) -> float:
    """The distance that 99 in 100 calibration rows of a mode stay within.

    >>> fit_distance_limit([1.0] * 99 + [5.0])
    1.0

    Raises:
        DataError: Fewer than 30 rows, or a distance that is not finite and above 0.
    """
    found = np.asarray(distances, dtype=np.float64)
    if len(found) < MIN_ROWS:
        raise DataError(f"{len(found)} distances; a limit needs at least {MIN_ROWS}", hint="use more calibration rows")
    if not (np.isfinite(found) & (found > 0)).all():
        row = int(np.flatnonzero(~(np.isfinite(found) & (found > 0)))[0])
        raise DataError(f"row {row}: the distance is {found[row]}", hint="drop the row, or check the heads' statistics")
    return float(np.quantile(found, SUPPORT, method="inverted_cdf"))


def allowed_methods(rows: int) -> tuple[Method, ...]:
    """The methods that so many rows may be fitted with, smallest first.

    >>> allowed_methods(149), allowed_methods(499)
    (('temperature',), ('temperature', 'platt'))
    """
    smallest = {"temperature": MIN_ROWS, "platt": PLATT_MIN_ROWS, "beta": BETA_MIN_ROWS}
    return tuple(m for m in METHODS if rows >= smallest[m])


def stratified_folds(labels: ArrayLike, *, folds: int, seed: int) -> Ints:
    """A fold number per row, each class spread evenly over the folds.

    >>> sorted(stratified_folds([0, 0, 1, 1], folds=2, seed=7).tolist())
    [0, 0, 1, 1]
    """
    y = np.asarray(labels)
    fold = np.empty(len(y), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for value in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == value))
        fold[rows] = np.arange(len(rows)) % folds
    return fold


def smallest_within_error(nll_by_model: Mapping[_Model, Floats]) -> _Model:
    """The first model, or a later one that beats the one kept so far by more than one standard error.

    Args:
        nll_by_model: Held-out NLL of every row, the same rows for each model, from the smallest model to the largest.
    """
    kept, *larger = nll_by_model
    for model in larger:
        gain = nll_by_model[kept] - nll_by_model[model]
        if gain.mean() > standard_error(gain):
            kept = model
    return kept


def _design(method: Method, x: Floats) -> Floats:
    """Columns whose weighted sum is the calibrated logit, in the order of the method's parameters, shape (n, k)."""
    if method == "temperature":
        return x[:, None]
    if method == "platt":
        return np.column_stack([x, np.ones_like(x)])
    return np.column_stack([-np.logaddexp(0, -x), np.logaddexp(0, x), np.ones_like(x)])


def _solve(method: Method, x: Floats, y: Floats) -> Floats:
    """Weights of the design's columns that minimise NLL against Platt's smoothed targets, slopes held >= 0.

    The targets (N₊+1)/(N₊+2) and 1/(N₋+2) in place of 1 and 0 (Platt 1999) keep slopes finite on
    separable data. Both losses are convex, so the start does not matter.
    """
    positives = y.sum()
    negatives = len(y) - positives
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    columns = _design(method, x)
    peak = np.abs(columns).max(axis=0)
    scale = peak * np.sqrt(np.mean((columns / peak) ** 2, axis=0))  # in this form no square overflows
    columns = columns / scale

    def loss(w: Floats) -> tuple[float, Floats]:
        z = columns @ w
        return float(np.mean(np.logaddexp(0, z) - target * z)), columns.T @ (expit(z) - target) / len(z)

    low, high = _SLOPES
    free, slope = (None, None), (low, high)
    bounds: dict[Method, list[tuple[float | None, float | None]]] = {
        "temperature": [slope],
        "platt": [slope, free],
        "beta": [(0.0, high), (0.0, high), free],
    }
    start = np.array([1.0 if b[0] is not None else 0.0 for b in bounds[method]])
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds[method], options={"ftol": 1e-13, "gtol": 1e-9}
    )
    return np.asarray(found.x / scale, dtype=np.float64)


def _parameters(method: Method, solution: Floats) -> dict[str, float]:
    if method == "temperature":
        return {"temperature": float(1 / solution[0])}
    return {name: float(value) for name, value in zip(PARAMETERS[method], solution, strict=True)}


def _cross_validated(method: Method, x: Floats, y: Floats, fold: Ints) -> Floats:
    """The probability of each row by a calibrator that never saw its fold."""
    p = np.empty_like(x)
    for k in np.unique(fold):
        held = fold == k
        p[held] = expit(_design(method, x[held]) @ _solve(method, x[~held], y[~held]))
    return _clipped(p)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Logistic:
    """Elastic-net logistic regression on standardised, clipped features."""

    mean: Floats
    scale: Floats
    constant: Bools
    weights: Floats
    bias: float
    penalty: float

    @classmethod
    def choose(cls, x: Floats, y: Floats, *, folds: int, seed: int) -> Self:
        """Fit to all rows with the strongest penalty that no weaker one beats by more than one standard error."""
        fold = stratified_folds(y, folds=folds, seed=seed)
        held_out = {penalty: np.empty(len(y)) for penalty in PENALTIES}
        for k in range(folds):
            inside = fold != k
            for model in cls.path(x[inside], y[inside]):
                held_out[model.penalty][~inside] = nll_per_row(model.predict(x[~inside]), y[~inside])
        penalty = smallest_within_error(held_out)
        return next(model for model in cls.path(x, y) if model.penalty == penalty)

    @classmethod
    def path(cls, x: Floats, y: Floats) -> list[Self]:
        """One model per penalty, strongest first, each started from the one before."""
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        constant = deviation <= 1e-12 * np.maximum(1, np.abs(mean))
        scale = np.where(constant, 1.0, deviation)
        z = _standardised(x, mean, scale) * ~constant
        weights, bias = np.zeros(x.shape[1]), float(np.log(y.mean() / (1 - y.mean())))
        models = []
        for penalty in PENALTIES:
            weights, bias = _elastic_net(z, y, penalty=penalty, weights=weights, bias=bias)
            models.append(cls(mean=mean, scale=scale, constant=constant, weights=weights, bias=bias, penalty=penalty))
        return models

    def predict(self, x: Floats) -> Floats:
        return _clipped(expit(_standardised(x, self.mean, self.scale) @ self.weights + self.bias))


def _elastic_net(z: Floats, y: Floats, *, penalty: float, weights: Floats, bias: float) -> tuple[Floats, float]:
    """Minimise mean NLL + penalty·(½‖w‖₁ + ¼‖w‖²), the bias free.

    w is split into u − v with u, v >= 0, which makes the lasso part linear, so that L-BFGS-B finds exact zeros at its
    bounds. Source of the penalty: Zou & Hastie 2005.
    """
    d = z.shape[1]
    l1, l2 = penalty * _L1_SHARE, penalty * (1 - _L1_SHARE)

    def loss(point: Floats) -> tuple[float, Floats]:
        w = point[:d] - point[d:-1]
        s = z @ w + point[-1]
        error = (expit(s) - y) / len(y)
        slope = z.T @ error + l2 * w
        value = np.mean(np.logaddexp(0, s) - y * s) + l1 * point[:-1].sum() + l2 / 2 * (w @ w)
        return float(value), np.concatenate([slope + l1, l1 - slope, [error.sum()]])

    start = np.concatenate([np.maximum(weights, 0), np.maximum(-weights, 0), [bias]])
    bounds = [(0, None)] * (2 * d) + [(None, None)]
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-13, "gtol": 1e-8, "maxiter": 2000}
    )
    w = np.asarray(found.x[:d] - found.x[d:-1], dtype=np.float64)
    return np.where(np.abs(w) < _NEGLIGIBLE, 0.0, w), float(found.x[-1])


def _standardised(x: Floats, mean: Floats, scale: Floats) -> Floats:
    return np.clip((x - mean) / scale, -STANDARD_LIMIT, STANDARD_LIMIT)


def _clipped(p: Floats) -> Floats:
    return np.clip(p, PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)


def _checked_head(logits: ArrayLike, labels: ArrayLike, folds: int) -> tuple[Floats, Floats]:
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise DataError(
            f"expected one logit and one label a row; found shapes {x.shape} and {y.shape}", hint="pass paired columns"
        )
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x))[0])
        raise DataError(
            f"row {row}: the logit is {x[row]}", hint="drop the row, or find out why the head is not finite"
        )
    _check_labels(y, folds, what="labels")
    if np.ptp(x) <= 1e-9 * np.abs(x).max():
        raise DataError(
            f"all {len(x)} logits are {x[0]:g}: there is nothing to calibrate",
            hint="train the head before calibrating it",
        )
    return x, y


def _checked_features(
    rows: Sequence[Mapping[str, float]], right: Sequence[bool], folds: int
) -> tuple[list[str], Floats, Floats]:
    if len(rows) != len(right):
        raise DataError(f"{len(rows)} feature rows but {len(right)} outcomes", hint="pass one outcome a row")
    y = np.asarray(right, dtype=np.float64)
    _check_labels(y, 2 * folds, what="outcomes (right = 1)")  # twice: inner folds lie within outer ones
    for i, row in enumerate(rows):
        if set(row) != set(rows[0]):
            differing = sorted(set(row) ^ set(rows[0]))
            raise DataError(
                f"row {i}: features differ from row 0 in {', '.join(differing)}", hint="one set of features"
            )
    if unknown := sorted(set(rows[0]) - set(FEATURES)):
        raise DataError(f"{unknown[0]!r} is no feature", hint=f"known are {', '.join(FEATURES)}")
    names = [f for f in FEATURES if f in rows[0]]
    x = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    if not np.isfinite(x).all():
        i, j = (int(v) for v in np.argwhere(~np.isfinite(x))[0])
        raise DataError(f"row {i}: {names[j]} is {x[i, j]}", hint="drop the row, or use the feature's missing value")
    return names, x, y


def _check_labels(y: Floats, rarest: int, *, what: str) -> None:
    if not np.isin(y, (0.0, 1.0)).all():
        row = int(np.flatnonzero(~np.isin(y, (0.0, 1.0)))[0])
        raise DataError(f"row {row}: found {y[row]:g} among the {what}", hint="use 0 or 1")
    if len(y) < MIN_ROWS:
        raise DataError(f"{len(y)} rows; calibration needs at least {MIN_ROWS}", hint="label more calibration rows")
    positives = int(y.sum())
    if min(positives, len(y) - positives) < rarest:
        raise DataError(
            f"{positives} of {len(y)} {what} are 1; each class needs at least {rarest} rows",
            hint="add rows of the rarer class",
        )
