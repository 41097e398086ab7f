"""``hhh-router evaluate``: measure a bundle and write its card."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .train import Data, stage_bars


def evaluate(
    data: Data,
    bundle: Annotated[str, typer.Option("--bundle", help="Bundle name or folder.")] = "smollm2-135m",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite", help="guard, injection, honesty, reply, calibration, evasion or behaviour; repeatable."
        ),
    ] = None,
    baselines: Annotated[
        Path | None, typer.Option(help="Also train and measure baselines on this recipe's router rows.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Prompts per side of the behaviour suite.", min=1)] = 40,
    max_tokens: Annotated[int, typer.Option(help="Length of each reply of the behaviour suite.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Of bootstraps and draws.")] = 17,
    work: Annotated[Path, typer.Option("--work", help="Folder for token states that are read once and kept.")] = Path(
        "runs"
    ),
) -> None:
    """Measure a bundle on eval rows; writes figures.json, CARD.md and report.html into it. Suites add up."""
    from hhh_router.errors import MissingExtra
    from hhh_router.settings import Settings

    try:
        from hhh_router.evaluation.measure import PARTS, check_parts, measure, open_bench
        from hhh_router.evaluation.tasks import TASKS
    except ImportError as error:
        raise MissingExtra("train", needed_for="evaluating a bundle") from error
    check_parts(suite or PARTS)
    with stage_bars() as told:
        found = ()
        if baselines is not None:
            from hhh_router.evaluation.baselines import train_baselines

            heads = tuple(dict.fromkeys(t.head for t in TASKS if t.suite in (suite or PARTS)))
            found = train_baselines(baselines, data, heads, on_progress=told)
        bench = open_bench(
            bundle, data, settings=Settings.load(), seed=seed, work=work, baselines=found, rows=rows,
            max_tokens=max_tokens, on_progress=told,
        )  # fmt: skip
        command = "hhh-router evaluate " + shlex.join(_public(sys.argv[2:]))
        written = measure(bench, suite or PARTS, command)
    for path in written:
        typer.echo(str(path))


def _public(arguments: list[str]) -> list[str]:
    """The command's arguments as they can be repeated elsewhere: paths of this machine would say nothing there."""
    kept = []
    pairs = iter(arguments)
    for argument in pairs:
        if argument in ("--data", "--work"):
            next(pairs, None)
        elif not argument.startswith(("--data=", "--work=")):
            kept.append(Path(argument).name if argument.startswith("/") else argument)
    return kept
