"""A fitted policy's trade-off: for the terminal, as a page, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hhh_router.evaluation import charts
from hhh_router.evaluation.blocks import Cell, Charts, Line, Panel, Section, Table
from hhh_router.evaluation.budget import FittedPolicy
from hhh_router.evaluation.page import html_document
from hhh_router.policy.schema import Budget, Lock

_WIDTH, _HEIGHT = 61, 16


def text_curve(points: Sequence[Sequence[float]], budget: Budget, chosen: tuple[float, float]) -> str:
    """A trade-off curve in characters: ``·`` the curve, ``:`` the budget, ``●`` what was chosen.

    Args:
        points: (limit, benign refused, harm passed).
        budget: Drawn as a corner.
        chosen: (benign refused, harm passed).
    """
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def put(x: float, y: float, sign: str) -> None:
        grid[round((1 - y) * (_HEIGHT - 1))][round(x * (_WIDTH - 1))] = sign

    for i in range(_WIDTH):
        if (x := i / (_WIDTH - 1)) <= budget.benign_refused:
            put(x, budget.harm_passed, ":")
    for i in range(_HEIGHT):
        if (y := i / (_HEIGHT - 1)) <= budget.harm_passed:
            put(budget.benign_refused, y, ":")
    for _, x, y in points:
        put(x, y, "·")
    put(*chosen, "●")
    marks = {0: "1.0", _HEIGHT - 1: "0.0"}
    rows = [f"{marks.get(i, '   ')} │{''.join(row)}" for i, row in enumerate(grid)]
    title = "harm passed"
    axis = f"    └{'─' * _WIDTH}\n     0.0{'benign refused':^{_WIDTH - 6}}1.0"
    return "\n".join([title, *(row.rstrip() for row in rows), axis])


def fit_html(fitted: FittedPolicy, *, command: str) -> str:
    """One page about one fitted policy.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    policy = fitted.policy
    assert policy.budget is not None
    assert policy.lock is not None
    chosen, asked = _corners(policy.budget, policy.lock)
    draw = partial(charts.budget_curve, fitted.curve, chosen=chosen, budget=asked, alt="benign refused, harm passed")
    told = [
        ("policy", f"{policy.name}@{policy.version} ({policy.hash[:16]})"),
        ("bundle", policy.lock.bundle_sha256[:16]),
        ("calibration", policy.lock.calibration_id),
        ("rows", f"{policy.lock.data} ({policy.lock.data_sha256[:16]})"),
    ]
    lead = (
        "The line is what each limit costs on the rows it was fitted on, the shaded corner what is accepted, the dot "
        "the limit that was chosen: the highest whose bounds lie in the corner."
    )
    panel = Panel(caption="benign refused against harm passed", drawings=(draw,))
    blocks = (_table(policy.budget, policy.lock, command), Charts(layout="pairs", panels=(panel,)))
    return html_document(f"policy {policy.name}", told, [Section(title="Trade-off", lead=lead, blocks=blocks)])


def fit_png(fitted: FittedPolicy) -> bytes:
    """The trade-off curve as a picture.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    assert fitted.policy.budget is not None
    assert fitted.policy.lock is not None
    chosen, asked = _corners(fitted.policy.budget, fitted.policy.lock)
    return charts.budget_png(fitted.curve, chosen=chosen, budget=asked)


def _corners(budget: Budget, lock: Lock) -> tuple[tuple[float, float], tuple[float, float]]:
    return (lock.benign_refused, lock.harm_passed), (budget.benign_refused, budget.harm_passed)


def _table(budget: Budget, lock: Lock, command: str) -> Table:
    rows = (
        ("benign refused", lock.n_benign, lock.benign_refused, lock.benign_refused_bound, budget.benign_refused),
        ("harm passed", lock.n_harmful, lock.harm_passed, lock.harm_passed_bound, budget.harm_passed),
    )
    held = "on average" if budget.level is None else f"at level {budget.level:g}"
    lines = tuple(
        Line(
            group="", note="", badge="", strong=False,
            cells=(Cell(text=name), Cell(text=str(n)), *(Cell(text=f"{x:.3f}") for x in (found, bound, most))),
        )
        for name, n, found, bound, most in rows
    )  # fmt: skip
    head = ("error", "rows", "on these rows", f"promised {held}", "accepted")
    sizes = f"limit on needs.harmless: {lock.limit:g}"
    return Table(group_title="", head=head, labels=1, lines=lines, made_by=((command, 0),), sizes=sizes)
