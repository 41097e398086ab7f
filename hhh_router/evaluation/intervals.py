"""A figure with its bootstrap interval, as rows of ``figures.json`` hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hhh_router.calibration import metrics as m
from hhh_router.errors import DataError


def with_interval(
    key: str, metric: Callable[..., float], *columns: ArrayLike, seed: int, bootstraps: int
) -> dict[str, Any]:
    """A figure and its interval under ``key`` and ``key_interval``; None where it has no value on these rows."""
    arrays = [np.asarray(c) for c in columns]
    try:
        value = float(metric(*arrays))
    except DataError:
        return {key: None, f"{key}_interval": None}
    try:
        interval = m.bootstrap_interval(metric, *arrays, n=bootstraps, seed=seed)
    except DataError:  # too few resamples hold both classes
        return {key: value, f"{key}_interval": None}
    return {key: value, f"{key}_interval": list(interval)}
