"""Labelled prompts written for this project, in pairs that share words and differ in what is at stake.

Each file is JSON Lines: ``prompt``, ``label`` (1: the file's positive class), ``type`` and ``pair``. They are
synthetic: written with large language models to a brief that forbids copying from published benchmarks, then freed of
near-duplicates of every eval prompt at hand. A pair is wholly in ``train`` or wholly in ``calibrate``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from hhh_router.data.examples import Example, ask
from hhh_router.errors import DataError

LICENCE = "Apache-2.0 (synthetic, written for this project)"
CALIBRATE_SHARE = 0.2
"""Share of pairs kept from training, for calibration."""

_BENIGN = {"helpful": 1.0, "harmless": 0.0, "injection": 0.0}
_LABELS: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]] = {
    # set: needs of label 0 and of label 1; what is not named is unknown
    "written/harm": (_BENIGN, {"helpful": 0.0, "harmless": 1.0}),
    "written/commissions": (_BENIGN, {"helpful": 0.0, "harmless": 1.0}),
    "written/wrapped": (_BENIGN, {"helpful": 0.0, "harmless": 1.0}),
    "written/moderation": ({"harmless": 0.0, "injection": 0.0}, {"harmless": 1.0, "injection": 0.0}),
    "written/injection": (_BENIGN, {"injection": 1.0}),
    "written/honest": (_BENIGN | {"honest": 0.0}, _BENIGN | {"honest": 1.0}),
    "written/tasks": (_BENIGN | {"honest": 0.0}, _BENIGN | {"honest": 1.0}),
}
WRITTEN: tuple[str, ...] = tuple(_LABELS)
"""Names by which recipes call for these prompts."""


def written(name: str, split: str) -> list[Example]:
    """The prompts of one set in one split, ``train`` or ``calibrate``.

    Raises:
        DataError: No such set.
    """
    if name not in _LABELS:
        raise DataError(f"unknown set {name!r}", hint=f"known: {', '.join(WRITTEN)}")
    return [e for e in _all(name) if e.split == split]


@cache
def _all(name: str) -> tuple[Example, ...]:
    return tuple(_example(name, row) for row in _rows(name.removeprefix("written/")))


def _rows(stem: str) -> Iterator[dict[str, Any]]:
    folder = files(__package__)
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.startswith(stem) and file.name.endswith(".jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)


def _example(name: str, row: Mapping[str, Any]) -> Example:
    digest = hashlib.sha256(row["pair"].encode()).digest()
    split = "calibrate" if digest[0] < 256 * CALIBRATE_SHARE else "train"
    needs = _LABELS[name][int(row["label"])]
    return Example(source=name, split=split, messages=ask(row["prompt"]), needs=needs, group=row["type"])
