"""Faults that take minutes: ``python -m benchmarks.chaos [--only NAME ...] [--quick]``.

Kills of the sidecar's process at random moments, and ten times as many requests as it can take. The faults that take
seconds are tests (``tests/e2e/test_sidecar_faults.py``); docs/reliability.md has a row for each.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.figures import Figure, Measured
from benchmarks.kills import Killed, kill_often
from benchmarks.loopback import process
from benchmarks.overload import Overload, overload
from benchmarks.present import present
from benchmarks.proxy import Bench, measure
from benchmarks.run import leave, parse
from hhh_router.errors import HHHRouterError

KILLS, SEED = 50, 7
TIMES = 10.0
SECONDS = 60.0
DOOR = 32
"""Requests under way in the run where the door refuses; the reader's queue holds more."""
QUEUE = 8
"""Texts that wait in the run where the reader refuses; the door lets more in."""


@dataclass
class Chaos(Bench):
    """What several figures tell of is done once."""

    @cached_property
    def killed(self) -> Killed:
        """After the last kill."""
        with tempfile.TemporaryDirectory() as folder:
            return kill_often(Path(folder), kills=self.sized(KILLS, 2), seed=SEED, on_kill=self.on_step)

    @cached_property
    def at_the_door(self) -> Overload:
        """More requests than may be under way."""
        return self._overloaded("--max-requests", str(DOOR))

    @cached_property
    def at_the_reader(self) -> Overload:
        """More texts than may wait to be read."""
        return self._overloaded(max_batch_items=QUEUE // 2)  # the reader lets twice as many wait

    def _overloaded(self, *arguments: str, **settings: object) -> Overload:
        command = ("sidecar", self.url, "enforce", "--bundle", self.bundle, *arguments)
        with process(*command, **settings) as (port, pid):
            return overload(port, pid, times=TIMES, seconds=self.sized(int(SECONDS), 3), measured_s=self.sized(10, 2))


def _kills(bench: Chaos) -> Measured:
    found = bench.killed
    chain = (
        "the chain verifies" if found.chain.broken_at is None else f"the chain breaks at row {found.chain.broken_at}"
    )
    note = (
        f"{found.kills} kills, {found.heads} answers whose head reached a client, {found.chain.rows} rows, "
        f"{found.chain.interrupted} marked interrupted, {found.chain.unfinished} left open; {chain}"
    )
    wrong = found.without_intent + found.chain.unfinished + (found.chain.broken_at is not None)
    return Measured(values=[wrong], note=note)


def _lost(run: Callable[[Chaos], Overload]) -> Callable[[Chaos], Measured]:
    def measured(bench: Chaos) -> Measured:
        found = run(bench)
        told = ", ".join(f"{n} × {what}" for what, n in sorted(found.examples.items()))
        sides = {"capacity (requests/s)": found.capacity_per_s, "offered (requests/s)": found.offered_per_s}
        sides["all answered (s after the last)"] = found.settled_s
        return Measured(values=[found.counts.get("lost", 0)], sides=sides, note=told)

    return measured


def _memory(run: Callable[[Chaos], Overload]) -> Callable[[Chaos], Measured]:
    def measured(bench: Chaos) -> Measured:
        found = run(bench)
        before, peak = found.memory_before, found.memory_peak
        sides = {"before (MB)": before.sidecar / 1e6, "peak (MB)": peak.sidecar / 1e6}
        sides |= {"model's process before (MB)": before.model / 1e6, "its peak (MB)": peak.model / 1e6}
        return Measured(values=[(peak.sidecar - before.sidecar) / 1e6], sides=sides)

    return measured


def _recovery(run: Callable[[Chaos], Overload]) -> Callable[[Chaos], Measured]:
    def measured(bench: Chaos) -> Measured:
        found = run(bench)
        sides = {"before (ms)": found.alone_before_ms, "after (ms)": found.alone_after_ms}
        return Measured(values=[found.alone_after_ms / found.alone_before_ms], sides=sides)

    return measured


def _figures() -> tuple[Figure, ...]:
    def figure(name: str, title: str, unit: str, target: float, measured: Callable[[Chaos], Measured]) -> Figure:
        return Figure(name=name, title=title, unit=unit, target=target, at="most", measure=measured)  # type: ignore[arg-type]

    made = [figure("chaos-kills", "answers without an intent, rows left open, breaks of the chain", "", 0, _kills)]
    runs: dict[str, tuple[str, Callable[[Chaos], Overload]]] = {
        "door": (f"{TIMES:g}× overload, {DOOR} requests at once", lambda bench: bench.at_the_door),
        "reader": (f"{TIMES:g}× overload, {QUEUE} texts waiting", lambda bench: bench.at_the_reader),
    }
    for name, (title, run) in runs.items():
        made += [
            figure(f"overload-{name}-lost", f"{title}: neither answered nor told to come back", "", 0, _lost(run)),
            figure(f"overload-{name}-memory", f"{title}: growth of the sidecar", "MB", 50, _memory(run)),
            figure(f"overload-{name}-after", f"{title}: time of a request after over before", "x", 1.5, _recovery(run)),
        ]
    return tuple(made)


FIGURES = _figures()


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; 0, 1 where a figure failed or missed, 2 where something asked for makes no sense."""
    options = parse("benchmarks.chaos", "Faults that take minutes.", FIGURES, argv)
    try:
        records, failed = measure(options, FIGURES, Chaos)
    except (HHHRouterError, ValueError) as error:
        return leave(error)
    present(records, options.out, chart=False)
    return 1 if failed or any(r["meets"] is False for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
