"""One command line for all benchmarks: pick figures, measure those that are missing, write them down."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.figures import Figure, Measured, NotMeasured, Record, Results, record, write_json
from benchmarks.lab import QUICK, Lab, Sizes
from benchmarks.machine import bandwidth_bytes_s, facts, load_average
from hhh_router.bundle import Bundle
from hhh_router.errors import HHHRouterError
from hhh_router.settings import DEFAULT_BUNDLE

RESULTS = Path(__file__).resolve().parent / "results"
REPEATS = 7
USAGE_ERROR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for on the command line."""

    program: str
    only: tuple[str, ...]
    repeats: int
    quick: bool
    fresh: bool
    bundle: str
    device: str
    threads: int | None
    out: Path

    def command(self, name: str) -> str:
        """The command that measures one figure alone, as it would be typed."""
        parts = [f"python -m {self.program} --only {name}"]
        if self.quick:
            parts.append("--quick")
        elif self.repeats != REPEATS:
            parts.append(f"--repeats {self.repeats}")
        parts += [f"--bundle {Path(self.bundle).name}"] * (self.bundle != DEFAULT_BUNDLE)
        parts += [f"--device {self.device}"] * (self.device != "cpu")
        parts += [f"--threads {self.threads}"] * (self.threads is not None)
        return " ".join(parts)


def parse(program: str, about: str, figures: Sequence[Figure], argv: Sequence[str] | None) -> Options:
    """Read the command line; leaves with 2 and a message where it makes no sense."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="figures to measure (default: all)")
    parser.add_argument("--list", action="store_true", help="show the names of all figures and leave")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"rounds that count (default: {REPEATS})")
    parser.add_argument(
        "--quick", action="store_true", help="one tiny round: shows that all runs, its timings are void"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what the results file already holds")
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE, help="name or folder of a bundle")
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda")
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument("--out", type=Path, help="results file")
    given = parser.parse_args(argv)
    if given.list:
        print("\n".join(f"{f.name:28} {f.title}" for f in figures))
        parser.exit()
    names = [f.name for f in figures]
    for name in given.only:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            parser.error(f"--only: there is no figure {name!r}{hint} Known: {', '.join(names)}")
    if given.repeats < 1:
        parser.error(f"--repeats: {given.repeats} is no number of rounds; give 1 or more")
    stem = program.rpartition(".")[2]
    return Options(
        program=program,
        only=tuple(given.only) or tuple(names),
        repeats=1 if given.quick else given.repeats,
        quick=given.quick,
        fresh=given.fresh,
        bundle=given.bundle,
        device=given.device,
        threads=given.threads,
        out=given.out or RESULTS / (f"quick-{stem}.json" if given.quick else f"{stem}.json"),
    )


def run(options: Options, figures: Sequence[Figure]) -> tuple[list[Record], int]:
    """Measure what is asked for and missing; returns all figures of the file, and how many failed.

    A figure that fails is told and left out; the others go on.
    """
    console = Console(stderr=True)
    lab = Lab.open(
        Bundle.load(options.bundle),
        device=options.device,
        threads=options.threads,
        sizes=QUICK if options.quick else Sizes(),
        repeats=options.repeats,
    )
    setting = lab.setting
    results = Results(options.out, [f.name for f in figures])
    missing = [
        f
        for f in figures
        if f.name in options.only
        and (options.fresh or not results.holds(f.name, command=options.command(f.name), setting=setting))
    ]
    skipped = len(options.only) - len(missing)
    if skipped:
        console.print(f"{skipped} of {len(options.only)} figures are in {options.out.name} already")
    failed = 0
    notebook = Notebook(options.out, lab)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("figures", total=len(missing))
        for figure in missing:
            failed += not _measure(lab, figure, options, results, progress)
            notebook.note(figure.name)
            progress.advance(whole)
    return results.records, failed


def _measure(lab: Lab, figure: Figure, options: Options, results: Results, progress: Progress) -> bool:
    """Measure one figure and write it down; False where it failed."""
    task: TaskID = progress.add_task(figure.name, total=None)
    lab.on_step = lambda: progress.advance(task)
    found: Measured | NotMeasured
    try:
        found = figure.measure(lab)
    except NotMeasured as reason:
        found = reason
    except Exception:  # a door: one figure's failure must not cost the others
        progress.console.print_exception()
        lab.abandon()
        return False
    finally:
        lab.on_step = lambda: None
        progress.remove_task(task)
    entry = record(figure, found, command=options.command(figure.name), setting=lab.setting)
    results.add(entry)
    progress.console.print(line(entry))
    return True


class Notebook:
    """The sibling file with the machine's facts, and its load while figures were measured."""

    def __init__(self, results: Path, lab: Lab) -> None:
        """Look at the machine; nothing is written before the first figure."""
        self._path = results.with_name(f"{results.stem}-machine.json")
        self._start = load_average()
        self._names: list[str] = []
        self._facts = facts(lab.settings.device) | {
            "threads": lab.settings.threads,
            "device": lab.settings.device,
            "dtype": lab.dtype,
            "bandwidth_gb_s": round(bandwidth_bytes_s(lab.sizes.probe_bytes) / 1e9, 2),
        }

    def note(self, name: str) -> None:
        """A figure has been measured."""
        self._names.append(name)
        load = {"load_at_start": self._start, "load_at_end": load_average()}
        write_json(self._path, self._facts | load | {"figures": self._names})


def line(entry: Record) -> str:
    """One figure for the screen.

    >>> line({"name": "a", "value": 2.0, "low": 1.5, "high": 2.5, "unit": "x", "target": 1.8, "at": "least",
    ...       "meets": True, "n": 5, "note": ""})
    'a: 2 x [1.5, 2.5], n 5; at least 1.8: met'
    """
    if entry["value"] is None:
        return f"{entry['name']}: {entry['note']}"
    spread = f"[{entry['low']:.3g}, {entry['high']:.3g}], n {entry['n']}"
    text = f"{entry['name']}: {entry['value']:.3g} {entry['unit']} {spread}"
    if entry["target"] is not None:
        text += f"; at {entry['at']} {entry['target']:.3g}: {'met' if entry['meets'] else 'missed'}"
    return text


def leave(error: HHHRouterError | ValueError) -> int:
    """Say what is wrong with what was asked for; the exit code."""
    print(error, file=sys.stderr)
    return USAGE_ERROR
