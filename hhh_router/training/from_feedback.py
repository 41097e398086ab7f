"""Calibrate on what people said of served requests: their raw scores are stored, so nothing is read again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hhh_router.bundle import Bundle
from hhh_router.data.examples import Example
from hhh_router.errors import BundleError, DataError
from hhh_router.trace.feedback import Labelled
from hhh_router.training.calibrate import Reading
from hhh_router.training.refit import Change, refit_readings
from hhh_router.types import NEED_LABELS, OUTCOMES, Mode, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRows:
    """Labelled requests as calibration rows."""

    readings: dict[Mode, list[Reading]]
    dtype: str
    """Precision of the backbone under their scores."""
    sha256: str
    """Names the rows and labels."""
    used: int
    """Requests."""
    left_out: dict[str, int]
    """Why → how many requests."""


def feedback_rows(rows: Sequence[Labelled], bundle: Bundle, *, reported: bool = False) -> FeedbackRows:
    """The rows that this bundle's heads scored, with the labels that most labellers agree on.

    Args:
        rows: Labelled requests.
        bundle: Whose calibrators are to be fitted.
        reported: Use labels too that were not drawn at random. Who complains knows the answer and not the score, so
            errors are among them far more often than in traffic at the same score, and probabilities move towards them.

    Raises:
        BundleError: The bundle has no heads.
        DataError: No row is left.
    """
    if bundle.manifest.heads is None:
        raise BundleError(f"{bundle.root}: has no heads", hint="train it first")
    left_out: Counter[str] = Counter()
    own = []
    for row in rows:
        if row.request.heads_sha256 != bundle.manifest.heads.sha256:
            left_out["scored by other heads"] += 1
        elif row.weight is None and not reported:
            left_out["not drawn at random"] += 1
        else:
            own.append(row)
    dtypes = Counter(row.request.dtype or "" for row in own)
    dtype = max(dtypes, key=lambda d: (dtypes[d], d), default="")
    readings: dict[Mode, list[Reading]] = {"prompt": [], "response": [], "both": []}
    used = []
    for row in own:
        if row.request.dtype != dtype:
            left_out[f"read in {row.request.dtype}, most in {dtype}"] += 1
            continue
        needs = {need: float(v) for name, need in NEED_LABELS.items() if (v := row.verdict(name)) is not None}
        outcomes = {name: float(v) for name in OUTCOMES if (v := row.verdict(name)) is not None}
        if not needs and not outcomes:
            left_out["only a verdict on the decision, or no majority"] += 1
            continue
        used.append((row.request.request_id, needs, outcomes))
        for scores, known in ((row.request.prompt, {}), (row.request.reply, outcomes)):
            if scores is not None:
                readings[scores.mode].append(_reading(scores, needs, known))
    if not used:
        why = "; ".join(f"{n} {reason}" for reason, n in left_out.items()) or "nothing is labelled"
        raise DataError(f"no labelled request can be used: {why}", hint="draw requests: hhh-router feedback draw FILE")
    digest = hashlib.sha256(json.dumps(sorted(used), sort_keys=True).encode()).hexdigest()
    return FeedbackRows(readings=readings, dtype=dtype, sha256=digest, used=len(used), left_out=dict(left_out))


def refit_from_feedback(bundle: Bundle, rows: FeedbackRows, target: Path, *, seed: int) -> list[Change]:
    """As `refit`, on rows that are scored already; needs no model."""
    return refit_readings(bundle, rows.readings, target, dtype=rows.dtype, data_sha256=rows.sha256, seed=seed)


def _reading(scores: Scores, needs: dict[str, float], outcomes: dict[str, float]) -> Reading:
    example = Example(source="feedback", split="calibrate", messages=(), needs=needs, outcomes=outcomes)
    return Reading(example, scores)
