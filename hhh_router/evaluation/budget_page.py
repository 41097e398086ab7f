"""A fitted policy's trade-offs: for the terminal, as a page, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hhh_router.evaluation import charts
from hhh_router.evaluation.blocks import Cell, Charts, Line, Panel, Section, Table
from hhh_router.evaluation.budget import FittedPolicy
from hhh_router.evaluation.page import html_document
from hhh_router.policy import Policy
from hhh_router.policy.lock import FITTED
from hhh_router.policy.schema import ERRORS

_WIDTH, _HEIGHT = 61, 16
HEAD = ("error", "rows", "on these rows", "promised", "accepted")
"""Of `error_rows`."""


def error_names(part: str) -> tuple[str, str]:
    """The two errors of a part of a budget, for people.

    >>> error_names("output")
    ('safe withheld', 'unsafe passed')
    """
    falling, rising = (name.replace("_", " ") for name in ERRORS[part])
    return falling, rising


def limit_text(policy: Policy, part: str) -> str:
    """What was fitted, such as ``needs.harmless >= 0.7``."""
    assert policy.lock is not None
    found = policy.lock.parts[part]
    text = f"{FITTED[part]} >= {found.limit:g}"
    return text if found.strength is None else f"{text}, strength {found.strength:g}"


def promise_text(policy: Policy) -> str:
    """How the bounds hold, such as ``at level 0.95``."""
    assert policy.budget is not None
    assert policy.lock is not None
    level = policy.budget.level
    if level is None:
        return "on average"
    whole = (
        f"all at level {level:g}, each at {policy.lock.level:.4g}" if policy.budget.together else f"at level {level:g}"
    )
    return f"{whole}, in every group" if policy.budget.per_group else whole


def error_rows(policy: Policy, part: str) -> list[tuple[str, ...]]:
    """Both errors of a part: what was counted, what is promised and what is accepted; columns as `HEAD`."""
    assert policy.budget is not None
    assert policy.lock is not None
    rows = []
    for name, told in zip(ERRORS[part], error_names(part), strict=True):
        error = policy.lock.parts[part].errors[name]
        n = str(error.n) if error.group is None else f"{error.n} of {error.group}"
        most = policy.budget.most[part][name]
        rows.append((told, n, f"{error.share:.3f}", f"{error.bound:.3f}", f"{most:.3f}"))
    return rows


def text_curve(
    points: Sequence[Sequence[float]],
    accepted: Sequence[float],
    chosen: Sequence[float],
    names: Sequence[str] = ("benign refused", "harm passed"),
) -> str:
    """A trade-off curve in characters: ``·`` the curve, ``:`` the budget, ``●`` what was chosen.

    Args:
        points: (limit, the error that falls with it, the one that rises).
        accepted: (falling, rising); drawn as a corner.
        chosen: (falling, rising).
        names: Of the two errors.
    """
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def put(x: float, y: float, sign: str) -> None:
        grid[round((1 - y) * (_HEIGHT - 1))][round(x * (_WIDTH - 1))] = sign

    most_x, most_y = accepted
    for i in range(_WIDTH):
        if (x := i / (_WIDTH - 1)) <= most_x:
            put(x, most_y, ":")
    for i in range(_HEIGHT):
        if (y := i / (_HEIGHT - 1)) <= most_y:
            put(most_x, y, ":")
    for _, x, y in points:
        put(x, y, "·")
    put(chosen[0], chosen[1], "●")
    marks = {0: "1.0", _HEIGHT - 1: "0.0"}
    rows = [f"{marks.get(i, '   ')} │{''.join(row)}" for i, row in enumerate(grid)]
    axis = f"    └{'─' * _WIDTH}\n     0.0{names[0]:^{_WIDTH - 6}}1.0"
    return "\n".join([names[1], *(row.rstrip() for row in rows), axis])


def corners(fitted: FittedPolicy, part: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """(falling, rising) at the chosen limit on all rows of a part together, and as accepted."""
    assert fitted.policy.budget is not None
    groups = fitted.parts[part].groups
    falling, rising = (
        sum(g.n[side] * (g.share[side] or 0.0) for g in groups) / max(1, sum(g.n[side] for g in groups))
        for side in (0, 1)
    )
    first, second = ERRORS[part]
    most = fitted.policy.budget.most[part]
    return (falling, rising), (most[first], most[second])


def fit_html(fitted: FittedPolicy, *, command: str) -> str:
    """One page about one fitted policy.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    policy = fitted.policy
    assert policy.lock is not None
    told = [
        ("policy", f"{policy.name}@{policy.version} ({policy.hash[:16]})"),
        ("bundle", policy.lock.bundle_sha256[:16]),
        ("calibration", policy.lock.calibration_id),
        ("rows", f"{policy.lock.data} ({policy.lock.data_sha256[:16]})"),
    ]
    return html_document(f"policy {policy.name}", told, [_section(fitted, part, command) for part in fitted.parts])


def fit_png(fitted: FittedPolicy) -> bytes:
    """The trade-off curves as one picture.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    curves = []
    for part, fit in fitted.parts.items():
        chosen, accepted = corners(fitted, part)
        curves.append({"points": fit.curve, "chosen": chosen, "budget": accepted, "names": error_names(part)})
    return charts.budget_png(curves)


def _section(fitted: FittedPolicy, part: str, command: str) -> Section:
    policy = fitted.policy
    names = error_names(part)
    chosen, accepted = corners(fitted, part)
    draw = partial(
        charts.budget_curve, fitted.parts[part].curve, chosen=chosen, budget=accepted, names=names, alt=", ".join(names)
    )
    lead = (
        "The line is what each limit costs on the rows it was fitted on, the shaded corner what is accepted, the dot "
        "the limit that was chosen: the highest whose bounds lie in the corner."
    )
    sizes = f"limit: {limit_text(policy, part)}; promised {promise_text(policy)}"
    errors = Table(
        group_title="", head=HEAD, labels=1, lines=tuple(map(_line, error_rows(policy, part))),
        made_by=((command, 0),), sizes=sizes,
    )  # fmt: skip
    groups = Table(
        group_title="", head=("group", *_group_head(part)), labels=1,
        lines=tuple(map(_line, group_rows(fitted, part))), made_by=((command, 0),), sizes="on the rows; no promises",
    )  # fmt: skip
    panel = Panel(caption=" against ".join(names), drawings=(draw,))
    blocks = (errors, Charts(layout="pairs", panels=(panel,)), groups)
    return Section(title=f"Trade-off · {part}", lead=lead, blocks=blocks)


def _line(cells: Sequence[str]) -> Line:
    return Line(group="", note="", badge="", strong=False, cells=tuple(Cell(text=text) for text in cells))


def _group_head(part: str) -> tuple[str, ...]:
    falling, rising = error_names(part)
    return "rows", falling, "rows", rising


def group_rows(fitted: FittedPolicy, part: str) -> list[tuple[str, ...]]:
    """Both errors in each group: its name, then rows and share of either error."""
    found = []
    for g in fitted.parts[part].groups:
        pairs = ((str(n), "–" if share is None else f"{share:.3f}") for n, share in zip(g.n, g.share, strict=True))
        found.append((g.group or "no group", *(text for pair in pairs for text in pair)))
    return found
