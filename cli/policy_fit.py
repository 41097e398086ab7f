"""``hhh-router policy fit``: the limit that keeps a policy's budget, written into a locked policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hhh_router.bundle import Bundle
    from hhh_router.calibration import Calibrators
    from hhh_router.evaluation.budget import FitRow, FittedPolicy
    from hhh_router.policy import Policy


def fit(
    file: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A policy with a budget.")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL of your own labelled prompts; default: what the bundle keeps.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The locked policy; default: NAME.locked.yaml here.")] = None,
    plot: Annotated[list[Path] | None, typer.Option(help="Draw the curve: FILE.png or FILE.html; repeatable.")] = None,
    bundle: Annotated[str | None, typer.Option("--bundle", "-b", help="Default: the deployment's.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Write limit and lock into FILE itself, comments kept.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 where the lock says otherwise.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fit a policy's limit to its budget by conformal risk control, and lock it; fails where no limit keeps it."""
    import json

    from hhh_router.assemble import load_calibrators
    from hhh_router.bundle import Bundle
    from hhh_router.errors import EXIT_FAILURE, DataError, MissingExtra
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings

    try:
        from hhh_router.evaluation.budget import KEPT_KNOWN, OWN_KNOWN, attainable, fit_policy, rank
    except ImportError as error:
        raise MissingExtra("train", needed_for="fitting a policy") from error
    policy = load_policy(file)
    _check_plots(plot or ())
    settings = Settings.load(bundle=bundle)
    used = Bundle.load(settings.bundle)
    calibrators = load_calibrators(used, settings)
    known = KEPT_KNOWN if data is None else OWN_KNOWN
    name, data_sha256, rows = _rows(used, calibrators, settings, data)
    try:
        fitted = fit_policy(
            policy, rows, calibrators, bundle_sha256=used.sha256, data=name, data_sha256=data_sha256, known=known
        )  # fmt: skip
    except DataError:
        assert policy.budget is not None
        _show_frontier(attainable(rank(policy, rows, calibrators, known), policy.budget.level), as_json)
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


def _rows(bundle: Bundle, calibrators: Calibrators, settings: Any, data: Path | None) -> tuple[str, str, list[FitRow]]:
    """Name, hash and rows: the bundle's own, or those of a file, read now."""
    from hhh_router.calibration.kept import read_kept
    from hhh_router.data.examples import data_hash
    from hhh_router.data.own import read_own
    from hhh_router.errors import BundleError
    from hhh_router.evaluation.budget import NEED, kept_rows, own_rows

    if data is None:
        if bundle.manifest.heads is None:
            raise BundleError(f"{bundle.root}: has no heads", hint="train it first")
        kept = read_kept(bundle.root, heads_sha256=bundle.manifest.heads.sha256)
        return "bundle", kept.sha256, kept_rows(kept)
    from hhh_router.evaluation.systems import BundleReadings

    from .train import stage_bars

    examples = [e for e in read_own(data, skip_broken=False).examples if NEED in e.needs]
    with stage_bars() as told:
        rows = own_rows(examples, BundleReadings(bundle, settings, told))
    return data.name, data_hash(examples), rows


def _locked_text(policy: Policy) -> str:
    from .policy import policy_yaml

    note = "# Made by hhh-router policy fit. Change the policy it was made from, and fit it again.\n"
    return note + policy_yaml(policy)


def _edited(path: Path, fitted: FittedPolicy) -> str:
    """The file's own text with the limit and the lock in it."""
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

    from hhh_router.evaluation.budget_page import text_curve

    policy, budget, lock = fitted.policy, fitted.policy.budget, fitted.policy.lock
    assert budget is not None
    assert lock is not None
    held = "on average" if budget.level is None else f"at level {budget.level:g}"
    table = Table(title=f"{policy.name}@{policy.version}: needs.harmless >= {lock.limit:g}")
    for heading in ("error", "rows", "on these rows", f"promised {held}", "accepted"):
        table.add_column(heading)
    for name, n, found, bound, most in (
        ("benign refused", lock.n_benign, lock.benign_refused, lock.benign_refused_bound, budget.benign_refused),
        ("harm passed", lock.n_harmful, lock.harm_passed, lock.harm_passed_bound, budget.harm_passed),
    ):
        table.add_row(name, str(n), f"{found:.3f}", f"{bound:.3f}", f"{most:.3f}")
    Console().print(table)
    low, high = fitted.found.lowest, fitted.found.highest
    typer.echo(f"limits from {low:.3f} to {min(high, 1.0):.3f} keep the budget; the highest refuses least\n")
    typer.echo(text_curve(fitted.curve, budget, (lock.benign_refused, lock.harm_passed)) + "\n")


def _show_frontier(found: list[Any], as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps({"attainable": [asdict(a) for a in found]}, indent=2))
        return
    table = Table(title="what can be promised instead")
    for heading in ("needs.harmless >=", "benign_refused", "harm_passed"):
        table.add_column(heading)
    for a in found:
        table.add_row(f"{a.limit:.3f}", f"{a.benign_refused_bound:.3f}", f"{a.harm_passed_bound:.3f}")
    Console(stderr=True).print(table)


def _summary(fitted: FittedPolicy, target: Path) -> dict[str, Any]:
    from hhh_router.policy import as_document

    document = as_document(fitted.policy)
    return {
        "policy": fitted.policy.name,
        "hash": fitted.policy.hash,
        "file": str(target),
        "budget": document["budget"],
        "lock": document["lock"],
        "keeps_from": fitted.found.lowest,
        "keeps_to": fitted.found.highest,
        "curve": fitted.curve,
    }
