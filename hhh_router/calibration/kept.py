"""What a bundle keeps of its calibration rows: their raw scores and labels, never a word of them.

Limits of policies are fitted on these rows, those at input on prompts and those at output on prompts with a reply. A
limit on one calibrated head is a limit on its logit, for a calibrator only bends the scale and keeps the order; so
these rows, which the heads were not trained on, are as good as unseen for it although the calibrator was fitted to
them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hhh_router.errors import BundleError
from hhh_router.types import Mode, Scores

KEPT = "calibration-scores.jsonl.gz"
"""Its file in a bundle's folder."""

_FORMAT = 2
_READ = (1, 2)  # 1 had prompts alone
_DECIMALS = 5  # of a logit: far finer than two precisions of one backbone agree


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRow:
    """One prompt, or one reply with or without its prompt, as the heads saw it."""

    source: str
    """Its data set."""
    needs: Mapping[str, float]
    """Labels, 0 or 1, of the needs that are known; of prompts alone."""
    scores: Scores
    outcomes: Mapping[str, float] = field(default_factory=dict)
    """Labels of the reply's faults that are known; of replies alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The rows of one bundle."""

    heads_sha256: str
    """Of the heads that scored them."""
    sha256: str
    """Of these scores and labels."""
    rows: tuple[KeptRow, ...]


def write_kept(path: Path, rows: Sequence[KeptRow], *, heads_sha256: str) -> None:
    """Write the rows; the same bytes for the same rows."""
    lines = [_line(row) for row in rows]
    head = {"format": _FORMAT, "heads_sha256": heads_sha256, "n": len(rows), "sha256": _hash(lines)}
    text = "".join(f"{line}\n" for line in (json.dumps(head), *lines))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_kept(folder: Path, *, heads_sha256: str) -> Kept:
    """The rows that a bundle keeps.

    Args:
        folder: The bundle's.
        heads_sha256: Of its heads.

    Raises:
        BundleError: It keeps none, they are damaged, or other heads scored them.
    """
    path = folder / KEPT
    hint = "make it anew with hhh-router calibrate --recipe FILE --scores-only, or give labelled rows with --data"
    try:
        head, *lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        found = json.loads(head)
        rows = tuple(_row(json.loads(line)) for line in lines)
        known = found["format"] in _READ and (found["n"], found["sha256"]) == (len(rows), _hash(lines))
        heads = str(found["heads_sha256"])
    except FileNotFoundError as error:
        raise BundleError(f"{path}: the bundle keeps no calibration scores", hint=hint) from error
    except (OSError, EOFError, ValueError, LookupError, TypeError, zlib.error) as error:
        raise BundleError(f"{path}: cannot be read ({type(error).__name__})", hint=hint) from error
    if not known:
        raise BundleError(f"{path}: is damaged, or of another format", hint=hint)
    if heads != heads_sha256:
        raise BundleError(f"{path}: was scored by other heads ({heads[:16]}…)", hint=hint)
    return Kept(heads_sha256=heads, sha256=found["sha256"], rows=rows)


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _line(row: KeptRow) -> str:
    scores = row.scores
    # a prompt's line is what it was before there were replies: the same rows keep their hash
    reply = {} if scores.mode == "prompt" else {"mode": scores.mode}
    return json.dumps(
        {
            "source": row.source,
            **reply,
            "labels": dict(sorted((row.outcomes if reply else row.needs).items())),
            "needs": {k: round(v, _DECIMALS) for k, v in sorted(scores.needs.items())},
            "outcomes": {k: round(v, _DECIMALS) for k, v in sorted(scores.outcomes.items())},
            "distance": round(scores.distance, _DECIMALS),
            "tokens": scores.tokens,
        },
        separators=(",", ":"),
    )


def _row(line: Mapping[str, Any]) -> KeptRow:
    mode: Mode = line.get("mode", "prompt")
    if mode not in ("prompt", "response", "both"):
        raise ValueError(f"{mode!r} is no mode")
    labels = {str(k): float(v) for k, v in line["labels"].items()}
    return KeptRow(
        source=str(line["source"]),
        needs=labels if mode == "prompt" else {},
        outcomes={} if mode == "prompt" else labels,
        scores=Scores(
            mode=mode,
            needs={str(k): float(v) for k, v in line["needs"].items()},
            outcomes={str(k): float(v) for k, v in line["outcomes"].items()},
            distance=float(line["distance"]),
            tokens=int(line["tokens"]),
        ),
    )
