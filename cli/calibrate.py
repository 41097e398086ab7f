"""``hhh-router calibrate``: fit a bundle's calibrators."""

from __future__ import annotations

from pathlib import Path

import typer

from .train import Data, Out, Recipe, Work, stage_bars, workshop


def calibrate(recipe: Recipe, data: Data, out: Out = None, work: Work = None) -> None:
    """Fit the calibrators of a bundle on rows nothing was trained on, and show how well they hold."""
    from rich.console import Console
    from rich.table import Table

    from hhh_router.training.calibrate import calibrate as fit

    with stage_bars() as told:
        file = fit(workshop(recipe, data, out, work, told))
    table = Table(title=f"{file.id}, cross-validated; without a calibrator in brackets")
    for heading in ("mode", "head", "method", "n (positive)", "AUROC", "NLL", "ECE"):
        table.add_column(heading)
    for mode, part in file.modes.items():
        for name, h in {**part.needs, **part.outcomes}.items():
            nll, ece = f"{h.nll:.3f} ({h.nll_identity:.3f})", f"{h.ece:.3f} ({h.ece_identity:.3f})"
            table.add_row(mode, name, h.method, f"{h.n} ({h.positives})", f"{h.auroc:.3f}", nll, ece)
    Console().print(table)
    target = out or Path("adapters") / recipe.stem
    typer.echo(f"next: hhh-router evaluate --bundle {target}")
