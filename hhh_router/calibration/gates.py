"""Fit and compare the gates that turn needs into shares. Needs numpy and scipy; fixed by data and seed.

The targets are soft: for each request the shares that each expert should have had, such as those in proportion to
exp(−NLL / T) of the reference answer under each. So the figure is the soft cross-entropy −Σ t ln p; its least possible
value is the mean entropy of the targets, not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from hhh_router.calibration.evidence import GateCalibration, GateCandidate
from hhh_router.calibration.fit import FOLDS, MIN_ROWS, smallest_within_error, stratified_folds
from hhh_router.calibration.metrics import standard_error
from hhh_router.errors import DataError
from hhh_router.routing.gate import GATE_PARAMETERS, GATES, MAX_LOGIT
from hhh_router.types import DIMENSIONS, EXPERTS

GATE_PENALTIES: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001)
"""Strengths that are tried on the Dirichlet gate's off-diagonal weights and biases, strongest first."""

_SLOPES = (1e-3, 1e3)  # 1 / temperature: keeps it finite and above 0 where the needs say nothing, or everything
_SUM_TOLERANCE = 1e-6  # single-precision shares of four experts stay well within
_RIDGE = 1e-6  # pulls the diagonal, which has no penalty and grows without end on separable targets, towards 1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateFit:
    """A gate's parameters, and how well it gives each expert the share that it should have had."""

    name: str
    """A key of `hhh_router.routing.GATES`."""
    params: dict[str, float]
    """Fitted to all rows, for `hhh_router.routing.posterior`."""
    cross_entropy: float
    """Mean −Σ target · ln share in nats, cross-validated."""
    standard_error: float
    """Of that mean."""
    n: int
    """Rows."""
    penalty: float | None = None
    """Strength of the penalty the rows chose; None for a gate without any."""
    gap: float = 0.0
    """Mean cross-entropy minus that of the chosen gate, in nats; 0 where nothing was compared."""
    gap_error: float = 0.0
    """Standard error of the gap, over paired rows. What decides: that of each mean by itself is mostly the rows'."""
    chosen: bool = False
    """Whether it is the smallest gate that no larger one beats by more than one standard error."""


def fit_gate(name: str, needs: ArrayLike, targets: ArrayLike, seed: int) -> GateFit:
    """Fit one gate to all rows, and tell by cross-validation how well it does on others.

    Args:
        name: A key of `hhh_router.routing.GATES`.
        needs: Calibrated P(the request needs d), shape (n, 3), columns as ``DIMENSIONS``.
        targets: The shares each expert should have had, rows sum to 1, shape (n, 4), columns as ``EXPERTS``.
        seed: Of the splits into folds.

    Raises:
        ValueError: No such gate.
        DataError: Fewer than 30 rows, or needs or targets that are no probabilities.
    """
    if name not in GATES:
        raise ValueError(f"gate {name!r} is not known; use {', '.join(GATES)}")
    return _fit(name, *_checked(needs, targets), seed=seed)[0]


def compare_gates(needs: ArrayLike, targets: ArrayLike, seed: int) -> list[GateFit]:
    """Every gate fitted to the same rows and folds, from the smallest to the largest, one of them ``chosen``.

    Arguments and errors are those of `fit_gate`.

    Source: the one-standard-error rule, Hastie, Tibshirani & Friedman 2009, section 7.10, on paired differences.
    """
    x, t = _checked(needs, targets)
    fits, losses = zip(*(_fit(name, x, t, seed=seed) for name in GATES), strict=True)
    best = _smallest_unbeaten(losses)
    return [
        replace(
            fit,
            gap=float((loss - losses[best]).mean()),
            gap_error=standard_error(loss - losses[best]),
            chosen=i == best,
        )
        for i, (fit, loss) in enumerate(zip(fits, losses, strict=True))
    ]


def chosen_gate(fits: Sequence[GateFit], *, data_sha256: str, seed: int) -> GateCalibration:
    """The chosen gate of a comparison, with the others' figures, as ``calibrators.json`` keeps it.

    Args:
        fits: From `compare_gates`.
        data_sha256: Names the rows and their targets.
        seed: The comparison's.

    Raises:
        ValueError: None of the fits, or more than one, is chosen.
    """
    (best,) = [fit for fit in fits if fit.chosen]
    candidates = {
        fit.name: GateCandidate(
            cross_entropy=fit.cross_entropy, standard_error=fit.standard_error, gap=fit.gap, gap_error=fit.gap_error
        )
        for fit in fits
    }
    return GateCalibration(
        name=best.name,
        params=best.params,
        n=best.n,
        cross_entropy=best.cross_entropy,
        candidates=candidates,
        data_sha256=data_sha256,
        seed=seed,
    )


def _smallest_unbeaten(losses: Sequence[Floats]) -> int:
    """The place of the first gate that no later one beats by more than one standard error of the paired difference."""

    def beats(later: Floats, earlier: Floats) -> bool:
        gain = earlier - later
        return bool(gain.mean() > standard_error(gain))

    return next(i for i, loss in enumerate(losses) if not any(beats(later, loss) for later in losses[i + 1 :]))


def _fit(name: str, x: Floats, t: Floats, *, seed: int) -> tuple[GateFit, Floats]:
    """The fit to all rows and the held-out cross-entropy of each, shape (n,)."""
    fold = _folds(t, seed)
    loss = np.empty(len(x))
    for k in range(FOLDS):
        held = fold == k
        solution, _ = _solve(name, x[~held], t[~held], seed)
        loss[held] = _cross_entropy(_logits(name, x[held], solution), t[held])
    solution, penalty = _solve(name, x, t, seed)
    fit = GateFit(
        name=name,
        params=_parameters(name, solution),
        cross_entropy=float(loss.mean()),
        standard_error=standard_error(loss),
        n=len(x),
        penalty=penalty,
    )
    return fit, loss


def _solve(name: str, x: Floats, t: Floats, seed: int) -> tuple[Floats, float | None]:
    """The solution in the gate's own form (nothing; 1 / temperature; W beside b, shape (4, 5)), and its penalty."""
    if name == "odds":
        return np.empty(0), None
    if name == "softmax_ts":
        return _solve_softmax_ts(x, t), None
    fold = _folds(t, seed)
    held_out = {penalty: np.empty(len(x)) for penalty in GATE_PENALTIES}
    for k in range(FOLDS):
        held = fold == k
        for penalty, solution in _dirichlet_path(x[~held], t[~held]).items():
            held_out[penalty][held] = _cross_entropy(_logits(name, x[held], solution), t[held])
    penalty = smallest_within_error(held_out)
    return _dirichlet_path(x, t)[penalty], penalty


def _solve_softmax_ts(x: Floats, t: Floats) -> Floats:
    """1 / temperature of least cross-entropy; convex in it, so the start does not matter."""

    def loss(slope: Floats) -> tuple[float, Floats]:
        log_p = log_softmax(slope[0] * x, axis=1)
        return float(-(t * log_p).sum(axis=1).mean()), np.array([((np.exp(log_p) - t) * x).sum(axis=1).mean()])

    options = {"ftol": 1e-13, "gtol": 1e-9}
    found = minimize(loss, np.ones(1), jac=True, method="L-BFGS-B", bounds=[_SLOPES], options=options)
    return np.asarray(found.x, dtype=np.float64)


def _dirichlet_path(x: Floats, t: Floats) -> dict[float, Floats]:
    """W beside b per penalty λ, strongest first, each started from the one before.

    Minimises cross-entropy + λ·(mean off-diagonal W² + mean b²), which is convex: "off-diagonal and intercept
    regularisation" (ODIR, Kull et al. 2019) with one strength for both. Towards λ → ∞ each expert keeps a temperature
    of its own.
    """
    k = len(EXPERTS)
    columns = np.column_stack([log_softmax(x, axis=1), np.ones(len(x))])  # (n, 5)
    products = (columns[:, :, None] * columns[:, None, :]).reshape(len(x), -1)  # (n, 25)
    start = np.eye(k, k + 1)
    off_diagonal = np.full((k, k + 1), 1 / (k * (k - 1)))
    off_diagonal[:, -1] = 1 / k
    off_diagonal[start == 1] = 0.0

    path: dict[float, Floats] = {}
    point = start
    for penalty in GATE_PENALTIES:
        strength = penalty * off_diagonal + _RIDGE * start

        def loss(point: Floats, strength: Floats = strength) -> tuple[float, Floats]:
            w = point.reshape(k, k + 1)
            log_p = log_softmax(columns @ w.T, axis=1)
            slope = (np.exp(log_p) - t).T @ columns / len(t) + 2 * strength * (w - start)
            return float(-(t * log_p).sum(axis=1).mean() + (strength * (w - start) ** 2).sum()), slope.ravel()

        def curvature(point: Floats, strength: Floats = strength) -> Floats:
            p = softmax(columns @ point.reshape(k, k + 1).T, axis=1)
            spread = p[:, :, None] * np.eye(k) - p[:, :, None] * p[:, None, :]  # (n, 4, 4)
            blocks = (spread.reshape(len(p), -1).T @ products / len(p)).reshape(k, k, k + 1, k + 1)
            full = blocks.transpose(0, 2, 1, 3).reshape(k * (k + 1), -1)
            return np.asarray(full + np.diag(2 * strength.ravel()))

        # about five steps where L-BFGS takes a hundred, as the four ln p move together
        found = minimize(loss, point.ravel(), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-7})
        point = np.asarray(found.x, dtype=np.float64).reshape(k, k + 1)
        path[penalty] = point
    return path


def _logits(name: str, x: Floats, solution: Floats) -> Floats:
    """What the gate's softmax is taken of, shape (n, 4)."""
    if name == "odds":
        return x
    if name == "softmax_ts":
        return np.asarray(x * solution[0])
    return np.asarray(log_softmax(x, axis=1) @ solution[:, :-1].T + solution[:, -1])


def _cross_entropy(logits: Floats, t: Floats) -> Floats:
    return np.asarray(-(t * log_softmax(logits, axis=1)).sum(axis=1))


def _parameters(name: str, solution: Floats) -> dict[str, float]:
    values = 1 / solution if name == "softmax_ts" else solution
    return {key: float(value) for key, value in zip(GATE_PARAMETERS[name], values.ravel(), strict=True)}


def _folds(t: Floats, seed: int) -> Ints:
    """Folds with about the same mix of experts, by the one that each target favours."""
    return stratified_folds(t.argmax(axis=1), folds=FOLDS, seed=seed)


def _checked(needs: ArrayLike, targets: ArrayLike) -> tuple[Floats, Floats]:
    """Logits of base (0) and of the needs, clipped as the gates do, and the targets; both (n, 4)."""
    q, t = np.asarray(needs, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if q.ndim != 2 or q.shape[1] != len(DIMENSIONS) or t.shape != (len(q), len(EXPERTS)):
        raise DataError(
            f"expected needs (n, {len(DIMENSIONS)}) and targets (n, {len(EXPERTS)}); found {q.shape} and {t.shape}",
            hint=f"columns are {', '.join(DIMENSIONS)}, and {', '.join(EXPERTS)}",
        )
    if len(q) < MIN_ROWS:
        raise DataError(f"{len(q)} rows; a gate needs at least {MIN_ROWS}", hint="use more calibration rows")
    if not (good := ((q >= 0) & (q <= 1)).all(axis=1)).all():  # also false for NaN
        row = int(np.flatnonzero(~good)[0])
        raise DataError(f"row {row}: needs are {q[row].tolist()}", hint="pass calibrated probabilities")
    if not (good := (t >= 0).all(axis=1) & (np.abs(t.sum(axis=1) - 1) <= _SUM_TOLERANCE)).all():
        row = int(np.flatnonzero(~good)[0])
        raise DataError(f"row {row}: targets are {t[row].tolist()}", hint="each row is >= 0 and sums to 1")
    with np.errstate(divide="ignore"):  # a need of 0 or 1 has an infinite logit, which the clip holds
        logits = np.clip(np.log(q) - np.log1p(-q), -MAX_LOGIT, MAX_LOGIT)
    return np.column_stack([np.zeros(len(q)), logits]), t
