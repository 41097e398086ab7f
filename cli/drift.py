"""``hhh-router drift``: which figures of served traffic have left their bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hhh_router.bundle import Bundle
    from hhh_router.calibration import Calibrators
    from hhh_router.calibration.monitor import Figure


def drift(
    store: Annotated[Path, typer.Argument(metavar="FILE", help="The file that HHH_ROUTER_FEEDBACK named.")],
    bundle: Annotated[str | None, typer.Option(metavar="PATH|NAME", help="The bundle that was served.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME|FILE", help="Whose budget is the bound; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how far traffic and labels have moved from calibration set and budget, and how sure that is.

    Exit 1 where a figure has left its bound.
    """
    from hhh_router.bundle import Bundle
    from hhh_router.errors import EXIT_FAILURE
    from hhh_router.pipeline.watch import label_figures, stored_figures
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings
    from hhh_router.trace.feedback_store import read_labelled, read_remembered

    settings = Settings.load(bundle=bundle)
    policies = [load_policy(name) for name in policy or [settings.policy]]
    calibrators = bundle_calibrators(Bundle.load(settings.bundle))
    rows = read_labelled(store)
    figures = stored_figures(read_remembered(store), calibrators) + label_figures(rows, calibrators, policies)
    outside = sum(f.state == "outside" for f in figures)
    if as_json:
        told = [f.as_json() for f in figures]
        typer.echo(json.dumps({"labelled": len(rows), "outside": outside, "figures": told}, indent=2))
    else:
        _show([f for f in figures if f.n or f.also])
        typer.echo(f"{len(rows)} labelled requests; {outside} figures outside their bounds")
    if outside:
        raise typer.Exit(EXIT_FAILURE)


def bundle_calibrators(bundle: Bundle) -> Calibrators:
    """The calibrators of a bundle, to be applied to stored scores.

    Raises:
        BundleError: It has none.
    """
    from hhh_router.calibration import CalibrationFile, Calibrators
    from hhh_router.errors import BundleError

    if bundle.manifest.calibrators is None:
        raise BundleError(f"{bundle.root}: has no calibrators", hint="calibrate it first")
    return Calibrators(CalibrationFile.read(bundle.root / bundle.manifest.calibrators.path))


def _show(figures: list[Figure]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hhh_router.pipeline.watch import bound_text

    table = Table(title="live figures beside their bounds")
    for heading in ("figure", "of", "n", "value", "interval", "bound", "level", "state"):
        table.add_column(heading)
    for f in figures:
        value = "" if f.value is None else f"{f.value:.3f}"
        between = "" if f.low is None or f.high is None else f"{f.low:.3f} … {f.high:.3f}"
        state = f.state + (f", {f.also} reported" if f.also else "")
        table.add_row(f.name, f.of, str(f.n), value, between, bound_text(f), f"{f.level:g}", state)
    Console().print(table)
