"""The charts of the reports, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hhh_router.evaluation.svg import HAIR, INK, MUTED, chart_file, chart_svg, faint, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL_CHARS = 52  # what fits over a row of `dots`
SIMPLEX_POINTS = 1500  # more would make the page heavy and the triangle no clearer
_Z95 = 1.959963984540054
_REFUSAL = ("benign refused", "harm passed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One value of `dots`, with its interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    series: int = 0
    """Which `style` it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DotRow:
    """One named row of `dots`."""

    label: str
    dots: tuple[Dot, ...]


def swatch(series: int, *, line: bool) -> str:
    """A key for the legend: the series' line, or its marker."""

    def draw(axes: Axes) -> None:
        look = style(series)
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        if line:
            axes.plot([0.02, 0.98], [0.5, 0.5], color=look.colour, linestyle=look.dash, linewidth=look.width)
        else:
            axes.plot([0.5], [0.5], color=look.colour, marker=look.marker, markersize=6, linestyle="none")

    return chart_svg(draw, size=(0.39 if line else 0.17, 0.14), box=(0, 0, 1, 1), alt=None)


def roc(curves: Sequence[tuple[int, Sequence[Sequence[float]]]], *, alt: str) -> str:
    """Recall against false positive rate, one line per system.

    Args:
        curves: Series number and its [false positive rate, recall] points, rising.
        alt: What the chart shows, for who cannot see it.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        _lines(axes, curves)
        _unit_square(axes, "false positive rate", "recall")

    return _panel(draw, alt)


def precision_recall(
    curves: Sequence[tuple[int, Sequence[Sequence[float]]]], *, prevalence: float | None, alt: str
) -> str:
    """Precision against recall, one line per system; dotted: the share of positives, what guessing gets.

    Args:
        curves: Series number and its [recall, precision] points.
        prevalence: Share of positives, in [0, 1].
        alt: What the chart shows, for who cannot see it.
    """

    def draw(axes: Axes) -> None:
        if prevalence is not None:
            axes.axhline(prevalence, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        _lines(axes, curves)
        _unit_square(axes, "recall", "precision")

    return _panel(draw, alt)


def risk_coverage(curves: Sequence[tuple[int, Sequence[Sequence[float]]]], *, alt: str) -> str:
    """Error rate against the share of prompts kept, the least confident left out first; one line per confidence.

    Args:
        curves: Series number and its [coverage, risk] points, coverage rising.
        alt: What the chart shows, for who cannot see it.
    """

    def draw(axes: Axes) -> None:
        _lines(axes, curves)
        top = max((float(risk) for _, points in curves for _, risk in points), default=0.0)
        axes.set(
            xlim=(-0.02, 1.02), ylim=(0, 1.08 * top or 1), xlabel="coverage (share kept)", ylabel="risk (share wrong)"
        )
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", ".25", ".5", ".75", "1"))

    return _panel(draw, alt)


def reliability(bins: Sequence[Sequence[float]], *, alt: str) -> str:
    """Observed frequency against stated probability, with the 95 % interval that each bin's size leaves.

    Args:
        bins: [mean probability, frequency, rows] each.
        alt: What the chart shows, for who cannot see it.
    """

    def draw(axes: Axes) -> None:
        look = style(0)
        ordered = sorted((float(p), float(f), float(n)) for p, f, n in bins)
        x = [p for p, _, _ in ordered]
        y = [f for _, f, _ in ordered]
        spans = [wilson(f, n) for _, f, n in ordered]
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.vlines(x, [low for low, _ in spans], [high for _, high in spans], color=look.colour, alpha=0.45)
        axes.plot(x, y, color=look.colour, marker="o", markersize=3.6, linewidth=1.0)
        _unit_square(axes, "stated probability", "observed share")

    return _panel(draw, alt)


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of n rows; (0, 1) without rows.

    >>> [round(x, 3) for x in wilson(0.5, 10)]
    [0.237, 0.763]

    Source: Wilson 1927.
    """
    if n <= 0:
        return 0.0, 1.0
    z2 = _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(max(share * (1 - share), 0.0) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def dots(rows: Sequence[DotRow], *, x_label: str, alt: str, reference: float | None = None, unit: bool = False) -> str:
    """Values with their intervals, one named row under the other; the name stands above its dots, so a phone shows it.

    Args:
        rows: From top to bottom.
        x_label: What is measured, with its unit.
        alt: What the chart shows, for who cannot see it.
        reference: A value to compare with, drawn as a dotted line.
        unit: The axis goes from 0 to 1.
    """
    several = len({dot.series for row in rows for dot in row.dots}) > 1

    def draw(axes: Axes) -> None:
        if reference is not None:
            axes.axvline(reference, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        for y, row in enumerate(rows):
            axes.axhline(y + 0.2, color=HAIR, linewidth=0.7, zorder=0)
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.text(0, y - 0.12, _short(row.label), transform=axes.get_yaxis_transform(), va="bottom", bbox=paper)
            for place, dot in enumerate(row.dots):
                # beside each other where there are several: intervals that lie on each other cannot be compared
                at = y + 0.2 + (0.22 * (place - (len(row.dots) - 1) / 2) if several else 0)
                look = style(dot.series)
                if dot.low is not None and dot.high is not None:
                    axes.hlines(at, float(dot.low), float(dot.high), color=look.colour, linewidth=1.6, alpha=0.55)
                axes.plot([float(dot.value)], [at], color=look.colour, marker=look.marker, markersize=4.6)
        axes.set(ylim=(len(rows) - 0.4, -0.62), yticks=[], xlabel=_short(x_label))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        if unit:
            axes.set(xlim=(-0.015, 1.015))

    height = 0.52 + 0.4 * len(rows)
    return chart_svg(draw, size=(4.1, height), box=(0.03, 0.44 / height, 0.94, 1 - 0.47 / height), alt=alt)


def simplex(points: Sequence[tuple[int, Sequence[float]]], *, alt: str) -> str:
    """Where each request lies between helpful, harmless and honest; small and faint where the base's share is large.

    At most `SIMPLEX_POINTS` points are drawn, evenly spaced in the order given; a group's mean is drawn large.

    Args:
        points: Series number (of the group) and the posterior [base, helpful, harmless, honest], summing to 1.
        alt: What the chart shows, for who cannot see it.
    """
    step = -(-len(points) // SIMPLEX_POINTS)

    def draw(axes: Axes) -> None:
        corners = [_place((0, *(float(i == k) for i in range(3)))) for k in range(3)]
        for part in (0.25, 0.5, 0.75):
            for k in range(3):
                a, b, c = corners[k], corners[(k + 1) % 3], corners[(k + 2) % 3]
                ends = [[a[i] + part * (other[i] - a[i]) for i in (0, 1)] for other in (b, c)]
                axes.plot(*zip(*ends, strict=True), color=HAIR, linewidth=0.7)
        axes.plot(*zip(*corners, corners[0], strict=True), color="#9aa0a8", linewidth=0.9)
        for series in sorted({s for s, _ in points}):
            shown = [p for s, p in points[::step] if s == series]
            look = style(series)
            axes.scatter(
                [_place(p)[0] for p in shown],
                [_place(p)[1] for p in shown],
                s=[24 - 18 * float(p[0]) for p in shown],
                color=[faint(look.colour, 0.75 - 0.6 * float(p[0])) for p in shown],
                marker=look.marker,
                linewidths=0,
            )
        for series in sorted({s for s, _ in points}):
            members = [p for s, p in points if s == series]
            x, y = _place([sum(float(p[i]) for p in members) / len(members) for i in range(4)])
            look = style(series)
            axes.plot([x], [y], color=look.colour, marker=look.marker, markersize=9, markeredgecolor=INK)
        for (x, y), name, where in zip(
            corners, ("helpful", "harmless", "honest"), ("top", "top", "bottom"), strict=True
        ):
            nudge = 0.03 if where == "bottom" else -0.03
            axes.text(x, y + nudge, name, ha="center", va=where, fontsize=9.5)
        axes.set(xlim=(-0.12, 1.12), ylim=(-0.11, 0.97), aspect="equal")
        axes.set_axis_off()

    return chart_svg(draw, size=(4.1, 3.6), box=(0, 0, 1, 1), alt=alt)


def tradeoff(
    policies: Sequence[tuple[int, Sequence[Sequence[float]], Sequence[float] | None]],
    *,
    alt: str,
) -> str:
    """What each threshold costs on both sides, with the shipped one marked.

    Args:
        policies: Series number, [limit, benign refused, harm passed] points, and the shipped
            [benign refused, harm passed]; shares in [0, 1].
        alt: What the chart shows, for who cannot see it.
    """

    def draw(axes: Axes) -> None:
        paths = [tuple(sorted((float(x), -float(y)) for _, x, y in points)) for _, points, _ in policies]
        for place, ((series, _, shipped), path) in enumerate(zip(policies, paths, strict=True)):
            look = style(series)
            # a line that several policies share is nobody's colour, or it would seem the last one's own
            colour, dash = (look.colour, look.dash) if paths.count(path) == 1 else (MUTED, "solid")
            axes.plot([a for a, _ in path], [-b for _, b in path], color=colour, linestyle=dash, linewidth=1.3)
            if shipped is not None:
                spot = [[float(value)] for value in shipped]
                size = max(6, 11 - 1.5 * place)  # the next one lies on it and must not hide it
                axes.plot(*spot, color=look.colour, marker=look.marker, markersize=size, markeredgecolor=INK, zorder=5)
        _unit_square(axes, "benign refused (share)", "harm passed (share)")

    return chart_svg(draw, size=(4.1, 4.1), box=(0.125, 0.11, 0.85, 0.86), alt=alt)


def budget_curve(
    points: Sequence[Sequence[float]],
    *,
    chosen: Sequence[float],
    budget: Sequence[float],
    names: Sequence[str] = _REFUSAL,
    alt: str,
) -> str:
    """What each limit costs on both sides of the rows a policy was fitted on, with the budget and the chosen limit.

    Args:
        points: [limit, the error that falls with it, the one that rises].
        chosen: [falling, rising] at the chosen limit.
        budget: The same, as accepted.
        names: Of the two errors.
        alt: What the chart shows, for who cannot see it.
    """
    return chart_svg(
        _budget_axes(points, chosen, budget, names), size=(4.1, 4.1), box=(0.125, 0.11, 0.85, 0.86), alt=alt
    )


def budget_png(curves: Sequence[Mapping[str, Sequence[Any]]]) -> bytes:
    """Several of `budget_curve`, side by side as one PNG file; each as that takes it."""
    draws = [_budget_axes(c["points"], c["chosen"], c["budget"], c["names"]) for c in curves]
    return chart_file(*draws, size=(5.5, 5.5), box=(0.125, 0.11, 0.85, 0.86))("png", {"Software": None})


def _budget_axes(
    points: Sequence[Sequence[float]], chosen: Sequence[float], budget: Sequence[float], names: Sequence[str]
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        look = style(0)
        refused, passed = map(float, budget)
        axes.fill_between([0, refused], 0, passed, color=faint(style(2).colour, 0.16), linewidth=0)
        axes.plot([0, refused, refused], [passed, passed, 0], color=style(2).colour, linestyle=(0, (4, 1.5)))
        axes.plot([p[1] for p in points], [p[2] for p in points], color=look.colour, linewidth=look.width)
        axes.plot([float(chosen[0])], [float(chosen[1])], color=style(1).colour, marker="o", markersize=8, zorder=5)
        _unit_square(axes, *(f"{name} (share)" for name in names))

    return draw


def _lines(axes: Axes, curves: Sequence[tuple[int, Sequence[Sequence[float]]]]) -> None:
    # the first system last, on top of its baselines
    for series, points in sorted(curves, key=lambda curve: -curve[0]):
        look = style(series)
        x, y = [float(a) for a, _ in points], [float(b) for _, b in points]
        axes.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=look.width)


def _unit_square(axes: Axes, x_label: str, y_label: str) -> None:
    ticks = (0, 0.25, 0.5, 0.75, 1)
    names = ("0", ".25", ".5", ".75", "1")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=x_label, ylabel=y_label)
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)


def _place(posterior: Sequence[float]) -> tuple[float, float]:
    """Where a posterior lies in the triangle helpful (0, 0), harmless (1, 0), honest (½, ½√3); its middle if all base.

    >>> _place((0.5, 0.0, 0.5, 0.0)), _place((0, 1, 0, 0))
    ((1.0, 0.0), (0.0, 0.0))
    """
    _, helpful, harmless, honest = map(float, posterior)
    total = helpful + harmless + honest
    a, b = (harmless / total, honest / total) if total > 0 else (1 / 3, 1 / 3)
    return a + b / 2, b * math.sqrt(3) / 2


def _short(label: str) -> str:
    label = plain(label)
    return label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…"


def _panel(draw: Callable[[Axes], None], alt: str) -> str:
    return chart_svg(draw, size=(2.6, 2.6), box=(0.17, 0.16, 0.81, 0.81), alt=alt)
