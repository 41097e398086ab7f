"""Fit a finished bundle's calibrators anew on somebody's own labelled traffic."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hhh_router.bundle import Bundle, CalibratorsSpec, HeadsSpec, file_sha256, write_manifest
from hhh_router.calibration import CalibrationFile, HeadCalibration
from hhh_router.calibration import metrics as m
from hhh_router.calibration.fit import fit_distance_limit, fit_head
from hhh_router.data.examples import Example, data_hash
from hhh_router.errors import BundleError, DataError
from hhh_router.model.encode import Encoder
from hhh_router.model.quantisation import QUANTISATION
from hhh_router.model.reader import HeadReader
from hhh_router.model.worker import open_reader
from hhh_router.settings import Settings
from hhh_router.training.calibrate import CALIBRATORS, Reading
from hhh_router.training.features import BATCH_TOKENS, encode_cut
from hhh_router.types import NEEDS, OUTCOMES, Mode, ReadRequest

DIFF = "calibration-diff.json"
"""A file in a bundle's folder that says what its calibrators changed; no part of another bundle."""
MAX_TOKENS = 512
"""Longer texts are cut."""
_SUPPORT_ROWS = 200  # fewer rows say too little about what lies inside the support


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One head in one mode, on the rows it was fitted to."""

    mode: Mode
    head: str
    n: int
    positives: int
    nll_before: float
    """Of the bundle's own calibrator on these rows."""
    nll_after: float
    """Of the new one, cross-validated."""
    ece_before: float
    ece_after: float
    kept: str = ""
    """Why the bundle's own calibrator was kept; empty where a new one was fitted."""


def refit(
    bundle: Bundle,
    examples: Sequence[Example],
    target: Path,
    *,
    settings: Settings,
    seed: int,
    on_progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> list[Change]:
    """Copy a bundle to ``target`` with calibrators fitted to ``examples``; what changed, per mode and head.

    Heads without enough labels of both classes keep the bundle's own calibrator, and the change says why. The
    confidence models stay.

    Args:
        bundle: A calibrated bundle.
        examples: Labelled rows, see `data.own`.
        target: New folder.
        settings: Threads, device, precision.
        seed: Of the folds.
        on_progress: Told stage, done, total, note.

    Raises:
        BundleError: The bundle has no heads or calibrators, or ``target`` exists.
        DataError: No head has enough labels.
    """
    _check(bundle, target)  # before minutes of reading
    reader, encoder = open_reader(bundle, settings)
    readings = _read(examples, reader, encoder, on_progress)
    return refit_readings(bundle, readings, target, dtype=reader.dtype, data_sha256=data_hash(examples), seed=seed)


def refit_readings(
    bundle: Bundle,
    readings: Mapping[Mode, Sequence[Reading]],
    target: Path,
    *,
    dtype: str,
    data_sha256: str,
    seed: int,
) -> list[Change]:
    """`refit` on rows that the bundle's heads have scored already.

    Args:
        bundle: A calibrated bundle.
        readings: Rows of each mode; labels of what was not read in it are left out of them.
        target: New folder.
        dtype: Precision of the backbone under these scores.
        data_sha256: Names the rows.
        seed: Of the folds.

    Raises:
        BundleError: The bundle has no heads or calibrators, or ``target`` exists.
        DataError: No head has enough labels.
    """
    heads, calibrators = _check(bundle, target)
    old = CalibrationFile.read(bundle.root / calibrators.path)
    changes: list[Change] = []
    modes = dict(old.modes)
    for mode, rows in readings.items():
        if not rows:
            continue
        part = modes[mode]
        needs = {} if mode == "response" else _fit_all(rows, "needs", part.needs, mode, seed, changes)
        outcomes = _fit_all(rows, "outcomes", part.outcomes, mode, seed, changes)
        update: dict[str, object] = {"needs": needs, "outcomes": outcomes}
        if len(rows) >= _SUPPORT_ROWS:
            update |= {"distance_limit": fit_distance_limit([r.scores.distance for r in rows]), "n": len(rows)}
        modes[mode] = part.model_copy(update=update)
    if all(c.kept for c in changes):
        raise DataError(
            f"no head has enough labels ({'; '.join(sorted({f'{c.head}: {c.kept}' for c in changes}))})",
            hint="label more rows of both classes, at least 30 with 5 of the rarer one",
        )
    file = CalibrationFile.create(
        heads_sha256=heads.sha256, dtype=dtype, data_sha256=data_sha256, seed=seed,
        train_prior=old.posterior_prior(), modes=modes, gate=old.gate,
    )  # fmt: skip
    _write(bundle, target, file)
    return changes


def _check(bundle: Bundle, target: Path) -> tuple[HeadsSpec, CalibratorsSpec]:
    manifest = bundle.manifest
    if manifest.heads is None or manifest.calibrators is None:
        raise BundleError(f"{bundle.root}: has no heads or no calibrators", hint="train and calibrate it first")
    if target.exists():
        raise BundleError(f"{target}: already there", hint="give another --out, or remove the folder")
    return manifest.heads, manifest.calibrators


def _read(
    examples: Sequence[Example],
    reader: HeadReader,
    encoder: Encoder,
    on_progress: Callable[[str, int, int, str], None],
) -> dict[Mode, list[Reading]]:
    """Every prompt alone, and prompt and response together where there is one."""
    rows: list[tuple[Mode, Example]] = [("prompt", e) for e in examples if e.messages]
    rows += [("both" if e.messages else "response", e) for e in examples if e.response is not None]
    requests = [ReadRequest(messages=e.messages, response=None if m == "prompt" else e.response) for m, e in rows]
    texts = [encode_cut(encoder, q, MAX_TOKENS) for q in requests]
    found: dict[Mode, list[Reading]] = {"prompt": [], "response": [], "both": []}
    done = 0
    for batch in reader.batches(texts, BATCH_TOKENS):
        for i, scores in zip(batch, reader.score([texts[i] for i in batch]), strict=True):
            mode, example = rows[i]
            # a label of a reply says nothing about the prompt alone
            known = replace(example, outcomes={}) if mode == "prompt" else example
            found[mode].append(Reading(known, scores))
        done += len(batch)
        on_progress("reading", done, len(rows), f"{len(rows)} texts")
    return found


def _fit_all(
    rows: Sequence[Reading],
    kind: str,
    old: Mapping[str, HeadCalibration],
    mode: Mode,
    seed: int,
    changes: list[Change],
) -> dict[str, HeadCalibration]:
    """New calibrators of one kind of head, the old ones where rows do not suffice; appends to ``changes``."""
    fitted = dict(old)
    for head in (*NEEDS, *OUTCOMES):
        if head not in old:
            continue
        labelled = [
            (getattr(r.scores, kind)[head], int(getattr(r.example, kind)[head]))
            for r in rows
            if head in getattr(r.example, kind)
        ]
        if not labelled:
            continue
        x, y = [a for a, _ in labelled], [b for _, b in labelled]
        before = [old[head].apply(logit) for logit in x]
        row = {
            "mode": mode, "head": head, "n": len(y), "positives": sum(y),
            "nll_before": m.nll(before, y), "ece_before": m.ece(before, y),
        }  # fmt: skip
        try:
            fitted[head] = fit_head(x, y, seed=seed)
        except DataError as error:
            changes.append(Change(**row, nll_after=row["nll_before"], ece_after=row["ece_before"], kept=error.message))  # type: ignore[arg-type]
            continue
        changes.append(Change(**row, nll_after=fitted[head].nll, ece_after=fitted[head].ece))  # type: ignore[arg-type]
    return fitted


def _write(bundle: Bundle, target: Path, file: CalibrationFile) -> None:
    """The bundle with other calibrators, without the figures of the old ones; complete, or not there."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    measured = shutil.ignore_patterns("figures.json", "CARD.md", "report.*", DIFF, QUANTISATION)
    shutil.copytree(bundle.root, partial, ignore=measured)
    file.write(partial / CALIBRATORS)
    spec = CalibratorsSpec(path=CALIBRATORS, sha256=file_sha256(partial / CALIBRATORS))
    write_manifest(partial, bundle.manifest.model_copy(update={"calibrators": spec, "name": target.name}))
    partial.rename(target)
