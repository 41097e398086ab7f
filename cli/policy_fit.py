"""``hhh-router policy fit``: the limits that keep a policy's budget, written into a locked policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hhh_router.bundle import Bundle
    from hhh_router.evaluation.budget import FittedPolicy
    from hhh_router.evaluation.budget_rows import FitRow
    from hhh_router.policy import Policy


def fit(
    file: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A policy with a budget.")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL of your own labelled rows; default: what the bundle keeps.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The locked policy; default: NAME.locked.yaml here.")] = None,
    plot: Annotated[list[Path] | None, typer.Option(help="Draw the curve: FILE.png or FILE.html; repeatable.")] = None,
    bundle: Annotated[str | None, typer.Option("--bundle", "-b", help="Default: the deployment's.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Write limits and lock into FILE itself, comments kept.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 where the lock says otherwise.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fit a policy's limits to its budget by conformal risk control, and lock it; fails where none keeps it."""
    import json

    from hhh_router.assemble import load_calibrators
    from hhh_router.bundle import Bundle
    from hhh_router.errors import EXIT_FAILURE, MissingExtra
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings

    try:
        from hhh_router.evaluation.budget import BudgetNotKept, fit_policy
        from hhh_router.evaluation.budget_rows import KEPT_KNOWN, OWN_KNOWN
    except ImportError as error:
        raise MissingExtra("train", needed_for="fitting a policy") from error
    policy = load_policy(file)
    _check_plots(plot or ())
    settings = Settings.load(bundle=bundle)
    used = Bundle.load(settings.bundle)
    calibrators = load_calibrators(used, settings)
    known = KEPT_KNOWN if data is None else OWN_KNOWN
    name, data_sha256, rows, replies = _rows(used, policy, settings, data)
    try:
        fitted = fit_policy(
            policy, rows, calibrators, bundle_sha256=used.sha256, data=name, data_sha256=data_sha256, known=known,
            replies=replies,
        )  # fmt: skip
    except BudgetNotKept as error:
        _show_frontiers(error.attainable, as_json)
        raise
    if check:
        same = policy.lock == fitted.policy.lock
        typer.echo(f"{file}: {'stands' if same else 'fitting it again gives another lock'}", err=not same)
        if not same:
            raise typer.Exit(EXIT_FAILURE)
        return
    target = out or Path(f"{policy.name}.locked.yaml")
    if in_place:
        target = Path(policy.source or file)
        target.write_text(_edited(target, fitted), encoding="utf-8")
    else:
        target.write_text(_locked_text(fitted.policy), encoding="utf-8")
    for picture in plot or ():
        _draw(fitted, picture)
    if as_json:
        typer.echo(json.dumps(_summary(fitted, target), indent=2))
        return
    _show(fitted)
    for path in (target, *(plot or ())):
        typer.echo(str(path))


def _rows(
    bundle: Bundle, policy: Policy, settings: Any, data: Path | None
) -> tuple[str, str, list[FitRow], list[FitRow]]:
    """Name and hash, prompts and replies: the bundle's own, or those of a file, read now as far as the budget asks."""
    from hhh_router.calibration.kept import read_kept
    from hhh_router.data.examples import data_hash
    from hhh_router.data.own import read_own
    from hhh_router.errors import BundleError
    from hhh_router.evaluation.budget_rows import FAULT, NEED, kept_replies, kept_rows, own_replies, own_rows

    if data is None:
        if bundle.manifest.heads is None:
            raise BundleError(f"{bundle.root}: has no heads", hint="train it first")
        kept = read_kept(bundle.root, heads_sha256=bundle.manifest.heads.sha256)
        return "bundle", kept.sha256, kept_rows(kept), kept_replies(kept)
    from hhh_router.evaluation.systems import BundleReadings

    from .train import stage_bars

    asked = set() if policy.budget is None else set(policy.budget.most)
    used = [
        e
        for e in read_own(data, skip_broken=False).examples
        if (asked - {"output"} and NEED in e.needs) or ("output" in asked and FAULT in e.outcomes)
    ]
    with stage_bars() as told:
        readings = BundleReadings(bundle, settings, told)
        prompts = own_rows(used, readings) if asked - {"output"} else []
        replies = own_replies(used, readings) if "output" in asked else []
    return data.name, data_hash(used), prompts, replies


def _locked_text(policy: Policy) -> str:
    from .policy import policy_yaml

    note = "# Made by hhh-router policy fit. Change the policy it was made from, and fit it again.\n"
    return note + policy_yaml(policy)


def _edited(path: Path, fitted: FittedPolicy) -> str:
    """The file's own text with the limits and the lock in it."""
    from hhh_router.policy.lock import written_into

    return written_into(path.read_text(encoding="utf-8"), fitted.policy, folder=path.parent)


def _check_plots(plots: list[Path] | tuple[()]) -> None:
    from hhh_router.errors import SettingsError

    for path in plots:
        if path.suffix not in (".png", ".html"):
            raise SettingsError(f"--plot {path}: neither .png nor .html", hint="name the file by what it shall be")


def _draw(fitted: FittedPolicy, path: Path) -> None:
    from hhh_router.evaluation.budget_page import fit_html, fit_png

    if path.suffix == ".png":
        path.write_bytes(fit_png(fitted))
    else:
        path.write_text(fit_html(fitted, command=f"hhh-router policy fit {fitted.policy.name}"), encoding="utf-8")


def _show(fitted: FittedPolicy) -> None:
    from rich.console import Console
    from rich.table import Table

    from hhh_router.evaluation.budget_page import (
        HEAD,
        corners,
        error_names,
        error_rows,
        group_rows,
        limit_text,
        promise_text,
        text_curve,
    )

    policy = fitted.policy
    for part, fit in fitted.parts.items():
        table = Table(title=f"{policy.name}@{policy.version} · {part}: {limit_text(policy, part)}")
        for heading in HEAD:
            table.add_column(heading)
        for row in error_rows(policy, part):
            table.add_row(*row)
        Console().print(table)
        low, high = fit.found.lowest, fit.found.highest
        typer.echo(f"promised {promise_text(policy)}")
        typer.echo(f"limits from {low:.3f} to {min(high, 1.0):.3f} keep the budget; the highest was taken\n")
        names = error_names(part)
        chosen, accepted = corners(fitted, part)
        typer.echo(text_curve(fit.curve, accepted, chosen, names) + "\n")
        groups = Table(title=f"{part}, by group of rows (counted, not promised)")
        for heading in ("group", "rows", names[0], "rows", names[1]):
            groups.add_column(heading)
        for row in group_rows(fitted, part):
            groups.add_row(*row)
        Console().print(groups)


def _show_frontiers(found: Mapping[str, list[Any]], as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from hhh_router.policy.lock import FITTED
    from hhh_router.policy.schema import ERRORS

    if as_json:
        typer.echo(json.dumps({"attainable": {k: [asdict(a) for a in v] for k, v in found.items()}}, indent=2))
        return
    for part, points in found.items():
        table = Table(title=f"what can be promised instead · {part}")
        for heading in (f"{FITTED[part]} >=", *ERRORS[part]):
            table.add_column(heading)
        for a in points:
            table.add_row(f"{a.limit:.3f}", f"{a.falling:.3f}", f"{a.rising:.3f}")
        Console(stderr=True).print(table)


def _summary(fitted: FittedPolicy, target: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from hhh_router.policy import as_document

    document = as_document(fitted.policy)
    return {
        "policy": fitted.policy.name,
        "hash": fitted.policy.hash,
        "file": str(target),
        "budget": document["budget"],
        "lock": document["lock"],
        "parts": {
            part: {
                "keeps_from": fit.found.lowest,
                "keeps_to": fit.found.highest,
                "curve": fit.curve,
                "groups": [asdict(g) for g in fit.groups],
            }
            for part, fit in fitted.parts.items()
        },
    }
