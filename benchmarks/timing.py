"""Fair timing on a machine that is never quite idle: sides take turns, and only ratios within a turn are compared."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from time import perf_counter
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Side = Callable[[], float]
"""Does one side's work once and returns what it came to, such as tokens/s. What is timed is the side's own choice."""


def interleaved(
    sides: Mapping[str, Side],
    repeats: int,
    *,
    warmups: int = 1,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Run all sides A B A B …, so that what else the machine does meets them alike.

    Args:
        sides: Name → side.
        repeats: Rounds that count.
        warmups: Rounds before, which are thrown away: first calls allocate, compile kernels and fill caches.
        on_step: Called after each side's turn, warm-ups too.

    Returns:
        Name → a value per round.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warmups, repeats):
        for name, side in sides.items():
            value = without_collector(side)
            if number >= 0:
                found[name].append(value)
            on_step()
    return found


def leaves_no_team(function: Callable[P, T]) -> Callable[P, T]:
    """The function on a thread that ends with each call.

    OpenMP keeps a team of threads for every thread that computes, and beside an idle team another one waits asleep
    between operations. With the thread its team goes, so that no side finds the other's, or that of loading.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function, *args, **kwargs).result()

    return run


@leaves_no_team
def without_collector(side: Side) -> float:
    """One turn of a side; Python's garbage is collected before it, never within it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return side()
    finally:
        if enabled:
            gc.enable()


def ratios(found: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """One side over another, round by round.

    >>> ratios({"a": [4.0, 6.0], "b": [2.0, 2.0]}, "a", "b")
    [2.0, 3.0]
    """
    return [a / b for a, b in zip(found[over], found[under], strict=True)]


def medians(found: Mapping[str, Sequence[float]], unit: str) -> dict[str, float]:
    """Median of each side, under its name and unit."""
    return {f"{name} ({unit})": statistics.median(values) for name, values in found.items()}


def seconds(act: Callable[[], object]) -> float:
    """How long a call takes."""
    started = perf_counter()
    act()
    return perf_counter() - started
