"""Measure the embedded engine: ``python -m benchmarks.engine [--only NAME ...] [--repeats N] [--quick] [--out FILE]``.

Writes a list of figures, the machine's facts beside it, a chart and a table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import decoding, reading, throughput
from benchmarks.figures import Figure
from benchmarks.present import present
from benchmarks.run import leave, parse, run
from hhh_router.errors import HHHRouterError


def figures(device: str = "cpu") -> tuple[Figure, ...]:
    """All figures of the engine on a device; throughput of large batches is a GPU's matter."""
    more = throughput.FIGURES if device.startswith("cuda") else ()
    return (*decoding.FIGURES, *reading.FIGURES, *more)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; 0, 1 where a figure failed, 2 where something asked for makes no sense."""
    given = sys.argv[1:] if argv is None else argv
    known = figures("cuda" if any("cuda" in part for part in given) else "cpu")
    options = parse("benchmarks.engine", "How fast the embedded engine is.", known, given)
    try:
        records, failed = run(options, known)
    except (HHHRouterError, ValueError) as error:
        return leave(error)
    present(records, options.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
