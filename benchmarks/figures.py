"""What a figure is, how it is written down, and the file that remembers which have been measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from benchmarks.lab import Lab

Record = dict[str, Any]
"""One figure as it stands in the results file."""


class NotMeasured(Exception):
    """A figure cannot be had here; the message says why. It is reported as such, never estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one figure came to."""

    values: Sequence[float]
    """The figure of each repetition, in order; the median is what is reported."""
    sides: Mapping[str, float] = field(default_factory=dict)
    """Median of each side that was compared, with its unit in the name."""
    note: str = ""
    """What a reader must know to read the number."""
    target: float | None = None
    """In place of the figure's own, where it depends on the bundle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing that is measured, and what it should come to."""

    name: str
    """As given to ``--only``."""
    title: str
    """For the table and the chart."""
    unit: str
    """``x`` for ratios, ``share`` for parts of 1, or the unit itself."""
    target: float | None
    """None where a number is only reported."""
    at: Literal["least", "most"] = "least"
    """Whether the target is a floor or a ceiling."""
    measure: Callable[[Lab], Measured]


def meets(value: float, target: float | None, at: str) -> bool | None:
    """Whether a value reaches its target; None without one.

    >>> meets(2.5, 2.0, "least"), meets(0.04, 0.03, "most"), meets(1.0, None, "least")
    (True, False, None)
    """
    if target is None:
        return None
    return value >= target if at == "least" else value <= target


def record(figure: Figure, found: Measured | NotMeasured, *, command: str, setting: str) -> Record:
    """A figure as it is written: median and quartiles, or null with the reason.

    Args:
        figure: What was measured.
        found: The repetitions, or why there are none.
        command: Measures this figure alone.
        setting: Versions, precision and sizes, see `Lab.setting`.
    """
    head: Record = {"name": figure.name, "title": figure.title}
    tail: Record = {"at": figure.at, "command": command, "setting": setting}
    if isinstance(found, NotMeasured):
        none = {"value": None, "unit": figure.unit, "target": figure.target, "meets": None, "n": 0}
        return head | none | tail | {"note": f"not measured: {found}"}
    low, value, high = quartiles(found.values)
    target = figure.target if found.target is None else found.target
    return (
        head
        | {
            "value": value,
            "unit": figure.unit,
            "target": target,
            "meets": meets(value, target, figure.at),
            "n": len(found.values),
        }
        | {"low": low, "high": high, "sides": dict(found.sides), "note": found.note}
        | tail
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, with linear interpolation between the values.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 3.0, 4.0)
    >>> quartiles([7.0])
    (7.0, 7.0, 7.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Results:
    """A results file: a JSON list of figures, in the order in which they are defined."""

    def __init__(self, path: Path, order: Sequence[str]) -> None:
        """Open a file; it need not be there yet.

        Raises:
            ValueError: The file is there and is no list of figures.
        """
        self.path = path
        self._order = list(order)
        self._records: dict[str, Record] = {}
        if path.is_file():
            try:
                self._records = {r["name"]: r for r in json.loads(path.read_text(encoding="utf-8"))}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}: not a list of figures ({error}); move it away") from error

    @property
    def records(self) -> list[Record]:
        """All figures there are."""
        known = [self._records[name] for name in self._order if name in self._records]
        return known + [r for name, r in self._records.items() if name not in self._order]

    def holds(self, name: str, *, command: str, setting: str) -> bool:
        """True when this very figure has been measured with this command, these versions and these sizes."""
        found = self._records.get(name)
        return (
            found is not None
            and found["value"] is not None
            and (found["command"], found["setting"]) == (command, setting)
        )

    def add(self, found: Record) -> None:
        """Take a figure in and write the file, whole or not at all."""
        self._records[found["name"]] = found
        write_json(self.path, self.records)


def write_json(path: Path, content: object) -> None:
    """Write a file by one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
