"""Arrow routing, to compare our gates with: shares from the experts' weights alone. Needs numpy.

An expert's prototype is the direction of a module's input to which its ΔW = BA responds most. Where the input lies
along it, in either sense, the expert speaks. Nothing is trained but a temperature; no direction stands for ``base``.

Arrow routes every token in every layer. Ours reads once per request, so there is one set of prototypes, of the first
adapted layer, and one input per request.

Source: Ostapenko et al. 2024, *Towards Modular LLMs by Building and Reusing a Library of LoRAs*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hhh_router.errors import DataError
from hhh_router.types import DIMENSIONS, EXPERTS

_SLOPES = (1e-3, 1e3)  # 1 / temperature, per mean spread of a row's scores: finite where these say nothing, or all
_BISECTIONS = 60  # of six decades: leaves less than a double's last digit

Floats = NDArray[np.float64]


def prototypes(experts: Sequence[tuple[ArrayLike, ArrayLike]]) -> Floats:
    """The input direction that each expert amplifies most, as unit vectors of no particular sign, shape (E, in).

    Args:
        experts: Factors of one module per expert, A of shape (r, in) and B of shape (out, r). A common scale of BA
            does not matter.

    Raises:
        DataError: Factors that do not fit together, are not finite, or whose product is zero.
    """
    found: list[Floats] = []
    for i, (first, second) in enumerate(experts):
        a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a) or (found and a.shape[1] != len(found[0])):
            raise DataError(
                f"expert {i}: A has shape {a.shape} and B {b.shape}",
                hint="give A (r, in) and B (out, r) of one module, with the same inputs for every expert",
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise DataError(f"expert {i}: its factors are not finite", hint="check the bundle's experts")
        # BA = QRA with orthonormal Q, so RA (r, in) has its right singular vectors and BA is never written out
        _, gains, directions = np.linalg.svd(np.linalg.qr(b, mode="r") @ a, full_matrices=False)
        if not gains[0] > 0:
            raise DataError(f"expert {i}: BA is zero", hint="an expert that was never trained has no direction")
        found.append(directions[0])
    return np.array(found)


def arrow_shares(states: ArrayLike, prototypes: ArrayLike, temperature: float) -> Floats:
    """Softmax of |h · v_e| / temperature over the three experts, and 0 for base, shape (n, 4) as ``EXPERTS``.

    >>> arrow_shares([[0.0, -2.0]], [[1, 0], [0, 1], [1, 0]], temperature=0.1).round(3).tolist()
    [[0.0, 0.0, 1.0, 0.0]]

    Args:
        states: What the module reads, one row per request, shape (n, D). That of an attention's or MLP's first
            projection is the residual stream after the layer's norm, not before.
        prototypes: Of the three experts in the order of ``DIMENSIONS``, shape (3, D), from `prototypes`.
        temperature: Above 0; see `fit_temperature`.

    Raises:
        ValueError: A temperature that is not above 0.
        DataError: Shapes that do not fit, or states that are not finite.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be > 0, found {temperature}")
    p = _softmax(_scores(states, prototypes) / temperature)
    return np.column_stack([np.zeros(len(p)), p])


def fit_temperature(states: ArrayLike, prototypes: ArrayLike, targets: ArrayLike) -> float:
    """The temperature of least −Σ target · ln share over the three experts.

    Arrow never answers with base, so a target's share of base is left aside, and a row counts by what it gives to
    experts. The loss is convex in 1 / temperature; its slope is followed to zero, or to a bound.

    Args:
        states: As in `arrow_shares`, of held-out rows: those that trained an expert lie where it amplifies.
        prototypes: As in `arrow_shares`.
        targets: The shares each expert should have had, rows sum to 1, shape (n, 4), columns as ``EXPERTS``.

    Raises:
        DataError: No row, shapes that do not fit, targets below 0, or targets that give nothing to any expert.
    """
    scores, wanted = _scores(states, prototypes), np.asarray(targets, dtype=np.float64)
    if wanted.shape != (len(scores), len(EXPERTS)):
        raise DataError(
            f"targets have shape {wanted.shape} for {len(scores)} rows", hint=f"columns are {', '.join(EXPERTS)}"
        )
    given = wanted[:, 1:]
    if not ((wanted >= 0).all() and np.isfinite(wanted).all() and given.sum() > 0):
        raise DataError("targets are below 0, not finite, or all base", hint="each row is >= 0 and sums to 1")
    spread = float(np.ptp(scores, axis=1).mean())
    if spread == 0:
        return 1.0  # every expert scores alike, so the shares are thirds at any temperature
    rows = given.sum(axis=1)

    def descends(slope: float) -> bool:
        expected = (_softmax(scores * slope) * scores).sum(axis=1)
        return bool(rows @ expected < (given * scores).sum())

    low, high = (math.log(s / spread) for s in _SLOPES)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if descends(math.exp(middle)) else (low, middle)
    return math.exp(-(low + high) / 2)


def _scores(states: ArrayLike, prototypes: ArrayLike) -> Floats:
    """|h · v_e|, shape (n, 3)."""
    h, v = np.asarray(states, dtype=np.float64), np.asarray(prototypes, dtype=np.float64)
    if h.ndim != 2 or not len(h) or v.shape != (len(DIMENSIONS), h.shape[1]):
        raise DataError(
            f"states have shape {h.shape}, prototypes {v.shape}",
            hint=f"one row per request, and one prototype each for {', '.join(DIMENSIONS)}, of the same width",
        )
    if not (np.isfinite(h).all() and np.isfinite(v).all()):
        raise DataError("states or prototypes are not finite", hint="check the bundle's experts and the states")
    return np.abs(h @ v.T)


def _softmax(logits: Floats) -> Floats:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
