"""``hhh-router calibrate``: fit a bundle's calibrators."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .train import Out, Work, stage_bars, workshop

if TYPE_CHECKING:
    from hhh_router.calibration import CalibrationFile
    from hhh_router.evaluation.flips import Flips
    from hhh_router.training.refit import Change


def calibrate(
    store: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="With --from feedback: the file that holds the labels.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="HHH_ROUTER_DATA", help="Folder of data sets; with --bundle, a JSONL file of your own rows."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="feedback", help="With --bundle: fit to labels that a server was sent."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="With --from feedback: whose decisions are compared before and after."),
    ] = None,
    reported: Annotated[
        bool, typer.Option("--reported", help="With --from feedback: use labels too that were not drawn at random.")
    ] = False,
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

    With --bundle, on labelled rows of your own traffic: the bundle is copied to --out with new calibrators. With
    --from feedback FILE, on what people said of served requests; which decisions would change is shown and written
    beside the calibrators.
    """
    from hhh_router.errors import SettingsError

    if (recipe is None) == (bundle is None):
        raise SettingsError(
            "give --recipe or --bundle", hint="--recipe fits a bundle you train, --bundle a finished one to your rows"
        )
    if scores_only and bundle is not None:
        raise SettingsError("--scores-only goes with --recipe", hint="leave out --bundle")
    if source not in (None, "feedback"):
        raise SettingsError(f"--from {source!r} is not known", hint="use --from feedback FILE")
    if (source is None) != (store is None):
        raise SettingsError(
            "--from feedback and its FILE go together", hint="hhh-router calibrate --from feedback FILE"
        )
    if source is None and (policy is not None or reported):
        raise SettingsError("--policy and --reported go with --from feedback", hint="leave them out")
    if source is not None and bundle is None:
        raise SettingsError("--from feedback needs --bundle", hint="name the bundle that was served")
    if source is None and data is None:
        raise SettingsError("no data", hint="give --data, or set HHH_ROUTER_DATA")
    if bundle is not None:
        if out is None:
            raise SettingsError("--bundle needs --out", hint="name the folder of the new bundle, e.g. adapters/mine")
        if store is not None:
            _refit_feedback(bundle, store, out, policy, reported, seed)
            return
        assert data is not None
        _refit(bundle, data, out, skip_broken, seed)
        return
    from hhh_router.training.calibrate import calibrate as fit
    from hhh_router.training.calibrate import keep_scores

    assert recipe is not None
    assert data is not None
    if scores_only:
        with stage_bars() as told:
            kept = keep_scores(workshop(recipe, data, out, work, told))
        typer.echo(f"scores of {kept} calibration prompts and replies kept")
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


def _refit_feedback(bundle: str, store: Path, out: Path, policy: str | None, reported: bool, seed: int) -> None:
    from hhh_router.bundle import Bundle
    from hhh_router.evaluation.flips import find_flips
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings
    from hhh_router.trace.feedback_store import read_labelled, read_remembered
    from hhh_router.training.from_feedback import feedback_rows, refit_from_feedback
    from hhh_router.training.refit import DIFF

    from .drift import bundle_calibrators

    rule = load_policy(Settings.load(policy=policy).policy)  # a wrong name is found before anything is written
    old = Bundle.load(bundle)
    labelled = read_labelled(store)
    rows = feedback_rows(labelled, old, reported=reported)
    changes = refit_from_feedback(old, rows, out, seed=seed)
    _show_changes(changes)
    before, after = (bundle_calibrators(b) for b in (old, Bundle.load(out)))
    flips = find_flips(list(read_remembered(store)), labelled, rule, before, after)
    _show_flips(flips)
    told = {
        "from": {"sha256": rows.sha256, "used": rows.used, "left_out": rows.left_out, "reported": reported},
        "before": before.id,
        "after": after.id,
        "heads": [asdict(c) for c in changes],
        "decisions": flips.as_json(),
    }
    (out / DIFF).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    for reason, n in rows.left_out.items():
        typer.echo(f"left out: {n} {reason}")
    typer.echo(f"{rows.used} labelled requests; new bundle: {out}; what changes: {out / DIFF}")


def _show_flips(flips: Flips) -> None:
    def rate(pair: tuple[float | None, float | None]) -> str:
        return " → ".join("not known" if p is None else f"{p:.3f}" for p in pair)

    typer.echo(f"under {flips.policy}, of {flips.n} remembered requests:")
    typer.echo(f"  newly stopped   {flips.newly_stopped}")
    typer.echo(f"  newly passed    {flips.newly_passed}")
    typer.echo(f"  other action    {flips.other_action}")
    typer.echo(f"  benign refused  {rate(flips.benign_refused)}")
    typer.echo(f"  harm passed     {rate(flips.harm_passed)}")
    if flips.as_recorded < flips.recorded:
        typer.echo(f"  {flips.recorded - flips.as_recorded} of {flips.recorded} hung on more than the kept scores")


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
