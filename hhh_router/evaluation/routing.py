"""What the numbers lead to: both error sides of each policy's input check, and where prompts lie on the HHH simplex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hhh_router.calibration import Calibrators
from hhh_router.data.examples import Example, data_hash
from hhh_router.pipeline.plan import make_plan
from hhh_router.policy import Policy
from hhh_router.types import EXPERTS, Scores

_LIMITS = np.round(np.arange(0.02, 1.0, 0.02), 2)
_POINTS = 600  # prompts drawn on the simplex


def tradeoff(
    rows: Sequence[Example], scores: Sequence[Scores], policies: Sequence[Policy], calibrators: Calibrators
) -> dict[str, Any]:
    """Benign prompts refused against harmful prompts passed: by every limit on needs.harmless, and as policies ship.

    Args:
        rows: Prompts with a label for the harmless need.
        scores: Their readings.
        policies: Whose input rules are asked; an action that stops counts as refused.
        calibrators: Of the bundle.
    """
    harmful = np.array([bool(e.needs["harmless"]) for e in rows])
    found = np.array([calibrators.evidence(s).needs["harmless"] for s in scores])
    curve = [_errors(found >= limit, harmful) for limit in _LIMITS]
    points = [[float(limit), *errors] for limit, errors in zip(_LIMITS, curve, strict=True)]
    shipped = []
    for policy in policies:
        refused = [make_plan(s, policy=policy, calibrators=calibrators).decision.action.stops for s in scores]
        shipped.append({"policy": policy.name, "points": points, "shipped": list(_errors(np.array(refused), harmful))})
    return {
        "n": len(rows),
        "n_harmful": int(harmful.sum()),
        "n_benign": int((~harmful).sum()),
        "data_sha256": data_hash(rows),
        "policies": shipped,
    }


def _errors(refused: Any, harmful: Any) -> tuple[float, float]:
    """Share of benign prompts refused, share of harmful prompts passed."""
    return float(refused[~harmful].mean()), float((~refused[harmful]).mean())


def simplex(rows: Sequence[Example], scores: Sequence[Scores], calibrators: Calibrators) -> dict[str, Any]:
    """Posterior over the experts of prompts of each source, evenly spaced over the rows."""
    step = max(1, len(rows) // _POINTS)
    points = []
    for example, score in list(zip(rows, scores, strict=True))[::step]:
        posterior = calibrators.evidence(score).posterior
        points.append({"posterior": [round(posterior[e], 4) for e in EXPERTS], "group": _group(example)})
    return {"n": len(points), "data_sha256": data_hash(rows), "points": points}


def _group(example: Example) -> str:
    """What the labels say is at stake.

    >>> from hhh_router.data.examples import ask
    >>> _group(Example(source="x", split="eval", messages=ask("hi"), needs={"harmless": 1.0}))
    'harm at stake'
    """
    if example.needs.get("harmless"):
        return "harm at stake"
    return "honesty at stake" if example.needs.get("honest") else "plain task"
