"""``hhh-router calibrate``: fit a bundle's calibrators."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .train import Out, Work, stage_bars, workshop

if TYPE_CHECKING:
    from hhh_router.calibration import CalibrationFile
    from hhh_router.training.refit import Change


def calibrate(
    data: Annotated[
        Path,
        typer.Option(
            envvar="HHH_ROUTER_DATA", help="Folder of data sets; with --bundle, a JSONL file of your own rows."
        ),
    ],
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="Recipe of the bundle that is made.")] = None,
    bundle: Annotated[str | None, typer.Option(help="A finished bundle, to be fitted to your own rows.")] = None,
    out: Out = None,
    work: Work = None,
    skip_broken: Annotated[bool, typer.Option(help="Leave out broken rows of your own file; they are shown.")] = False,
    seed: Annotated[int, typer.Option(help="Of the folds, with --bundle.")] = 17,
    scores_only: Annotated[
        bool,
        typer.Option(
            "--scores-only", help="With --recipe: fit nothing, write the scores that policies' limits are fitted on."
        ),
    ] = False,
) -> None:
    """Fit the calibrators of a bundle on rows nothing was trained on, and show how well they hold.

    With --bundle, on labelled rows of your own traffic: the bundle is copied to --out with new calibrators.
    """
    from hhh_router.errors import SettingsError

    if (recipe is None) == (bundle is None):
        raise SettingsError(
            "give --recipe or --bundle", hint="--recipe fits a bundle you train, --bundle a finished one to your rows"
        )
    if scores_only and bundle is not None:
        raise SettingsError("--scores-only goes with --recipe", hint="leave out --bundle")
    if bundle is not None:
        if out is None:
            raise SettingsError("--bundle needs --out", hint="name the folder of the new bundle, e.g. adapters/mine")
        _refit(bundle, data, out, skip_broken, seed)
        return
    from hhh_router.training.calibrate import calibrate as fit
    from hhh_router.training.calibrate import keep_scores

    assert recipe is not None
    if scores_only:
        with stage_bars() as told:
            kept = keep_scores(workshop(recipe, data, out, work, told))
        typer.echo(f"scores of {kept} calibration prompts kept")
        return
    with stage_bars() as told:
        file = fit(workshop(recipe, data, out, work, told))
    _show(file)
    target = out or Path("adapters") / recipe.stem
    typer.echo(f"next: hhh-router evaluate --bundle {target}")


def _refit(bundle: str, data: Path, out: Path, skip_broken: bool, seed: int) -> None:
    from hhh_router.bundle import Bundle
    from hhh_router.data.own import read_own
    from hhh_router.settings import Settings
    from hhh_router.training.refit import refit

    rows = read_own(data, skip_broken=skip_broken)
    for line in rows.broken:
        typer.echo(line, err=True)
    with stage_bars() as told:
        changes = refit(Bundle.load(bundle), rows.examples, out, settings=Settings.load(), seed=seed, on_progress=told)
    _show_changes(changes)
    typer.echo(f"{len(rows.examples)} rows, {len(rows.broken)} broken ones left out; new bundle: {out}")


def _show(file: CalibrationFile) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{file.id}, cross-validated; without a calibrator in brackets")
    for heading in ("mode", "head", "method", "n (positive)", "AUROC", "NLL", "ECE"):
        table.add_column(heading)
    for mode, part in file.modes.items():
        for name, h in {**part.needs, **part.outcomes}.items():
            nll, ece = f"{h.nll:.3f} ({h.nll_identity:.3f})", f"{h.ece:.3f} ({h.ece_identity:.3f})"
            table.add_row(mode, name, h.method, f"{h.n} ({h.positives})", f"{h.auroc:.3f}", nll, ece)
    Console().print(table)
    for dtype, check in file.also_dtypes.items():
        typer.echo(f"holds in {dtype} too: probabilities move by {check.mean_shift:.4f} on average ({check.n} rows)")


def _show_changes(changes: list[Change]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="before → after (after: cross-validated)")
    for heading in ("mode", "head", "n (positive)", "NLL", "ECE", "note"):
        table.add_column(heading)
    for c in changes:
        nll, ece = f"{c.nll_before:.3f} → {c.nll_after:.3f}", f"{c.ece_before:.3f} → {c.ece_after:.3f}"
        table.add_row(c.mode, c.head, f"{c.n} ({c.positives})", nll, ece, f"kept: {c.kept}" if c.kept else "")
    Console().print(table)
