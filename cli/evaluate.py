"""``hhh-router evaluate``: measure a bundle and write its card, or any systems on rows of your own."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .train import stage_bars

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OWN_ROWS = (".jsonl", ".json", ".jsonl.gz")
"""How the name of a file of your own rows ends."""
_PATHS = ("--data", "--work", "--out")
"""Options whose paths say nothing on another machine."""
_PATH_OF_SYSTEM = re.compile(r"((?:--system=)?(?:bundle|policy):|--\w+=|^(?:--formulation=)?\w+=)/(?:[^/]*/)*")


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            envvar="HHH_ROUTER_DATA",
            help="Folder of data sets, or a .jsonl file of your own labelled rows.",
        ),
    ],
    bundle: Annotated[str, typer.Option("--bundle", help="Bundle name or folder.")] = "smollm2-135m",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="guard, injection, honesty, reply, hhh, helpful, general, behaviour, calibration, evasion, "
            "gates or transfer; repeatable. All but the last two when not given.",
        ),
    ] = None,
    baselines: Annotated[
        Path | None, typer.Option(help="Also train and measure baselines on this recipe's router rows.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="The bundle's recipe, for suites gates and transfer."),
    ] = None,
    formulation: Annotated[
        list[str] | None,
        typer.Option(
            "--formulation",
            help="Suite gates: NAME=HEADS_FILE, heads trained with recipes/trinityx.yaml or h3fusion.yaml; repeatable.",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", help="Suite transfer: leave out this source alone; repeatable. Every one in turn."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Suite transfer: passes of every training.", min=1)] = 4,
    rows: Annotated[int, typer.Option(help="Prompts per set of the behaviour suite and of IFEval.", min=1)] = 40,
    items: Annotated[int, typer.Option(help="Items of each suite that scores given texts.", min=1)] = 200,
    max_tokens: Annotated[int, typer.Option(help="Length of each reply of the behaviour suite.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Of bootstraps and draws.")] = 17,
    work: Annotated[Path, typer.Option("--work", help="Folder for token states that are read once and kept.")] = Path(
        "runs"
    ),
    system: Annotated[
        list[str] | None,
        typer.Option(
            "--system",
            help="Own rows: what to measure; bundle:NAME, policy:NAME, url:http://host:port or "
            "baseline:tfidf|minilm|jailguard; repeatable. The bundle when not given.",
        ),
    ] = None,
    limit: Annotated[float, typer.Option(help="Own rows: a probability at or above it is a positive.")] = 0.5,
    out: Annotated[Path, typer.Option("--out", help="Own rows: folder for the results.")] = Path("evaluation"),
    skip_broken: Annotated[bool, typer.Option(help="Own rows: leave out broken ones; they are shown.")] = False,
    wire: Annotated[str, typer.Option(help="Own rows: what a URL speaks, native or moderations.")] = "native",
    api_key_env: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key-env",
            help="Own rows: the variable that holds a URL's key; HOST:PORT=NAME where several hosts are asked.",
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="Own rows: longest wait for one answer.", min=0.1)] = 120.0,
    concurrency: Annotated[int, typer.Option(help="Own rows: calls to a URL at a time.", min=1, max=64)] = 4,
) -> None:
    """Measure a bundle on eval rows; writes figures.json, CARD.md and report.html into it. Suites add up.

    With --data FILE.jsonl, measure any systems side by side on labelled rows of your own; writes figures.json,
    report.md and report.html into --out.
    """
    from hhh_router.errors import MissingExtra
    from hhh_router.settings import Settings

    own = _is_own_rows(data)
    _check_options(own, suite=suite, recipe=recipe, formulation=formulation, system=system, api_key_env=api_key_env)
    if own:
        _evaluate_own(
            data, system or ["bundle"], seed=seed, limit=limit, out=out, skip_broken=skip_broken, bundle=bundle,
            recipe=baselines, wire=wire, api_key_env=api_key_env or (), timeout_s=timeout_s, concurrency=concurrency,
        )  # fmt: skip
        return
    try:
        from hhh_router.evaluation.measure import DEFAULT_PARTS, check_parts, measure, open_bench
        from hhh_router.evaluation.tasks import TASKS
    except ImportError as error:
        raise MissingExtra("train", needed_for="evaluating a bundle") from error
    parts = suite or DEFAULT_PARTS
    formulations = _formulations(formulation or ())
    check_parts(parts, recipe, formulations)
    with stage_bars() as told:
        found = ()
        if baselines is not None:
            from hhh_router.evaluation.baselines import train_baselines

            heads = tuple(dict.fromkeys(t.head for t in TASKS if t.suite in parts))
            found = train_baselines(baselines, data, heads, on_progress=told)
        bench = open_bench(
            bundle, data, settings=Settings.load(), seed=seed, work=work, baselines=found, rows=rows, items=items,
            max_tokens=max_tokens, without=without or (), epochs=epochs, recipe=recipe, formulations=formulations,
            on_progress=told,
        )  # fmt: skip
        command = "hhh-router evaluate " + shlex.join(_public(sys.argv[2:]))
        written = measure(bench, parts, command)
    for path in written:
        typer.echo(str(path))


def _is_own_rows(data: Path) -> bool:
    """Whether ``--data`` names a file of rows, and no folder of data sets.

    Raises:
        SettingsError: A file of another kind.
    """
    from hhh_router.errors import SettingsError

    if data.is_dir():
        return False
    if data.name.lower().endswith(OWN_ROWS):
        return True
    if data.is_file():
        raise SettingsError(
            f"--data {data}: is a file, but not one of {', '.join(OWN_ROWS)}",
            hint="give labelled rows as JSON Lines, or the folder of the public data sets",
        )
    return False


def _formulations(given: Sequence[str]) -> dict[str, Path]:
    """Heads files by the name of the formulation they were trained with.

    >>> _formulations(["trinityx=runs/trinityx/heads.safetensors"])["trinityx"].as_posix()
    'runs/trinityx/heads.safetensors'

    Raises:
        SettingsError: No ``NAME=FILE``, or a name given twice.
    """
    from hhh_router.errors import SettingsError

    found: dict[str, Path] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path or name in found:
            why = "is given twice" if name in found else "is no NAME=HEADS_FILE"
            raise SettingsError(
                f"--formulation {text}: {why}", hint="such as --formulation trinityx=runs/trinityx/heads.safetensors"
            )
        found[name] = Path(path)
    return found


def _check_options(own: bool, **given: object) -> None:
    """Refuse options of the other kind of evaluation: ignored, they would promise what is not measured."""
    from hhh_router.errors import SettingsError

    others = ("suite", "recipe", "formulation") if own else ("system", "api_key_env")
    if wrong := [f"--{name.replace('_', '-')}" for name in others if given[name]]:
        hint = (
            f"leave out {wrong[0]}, or give the folder of data sets with --data"
            if own
            else "give a .jsonl file of labelled rows with --data"
        )
        raise SettingsError(f"{', '.join(wrong)} cannot go with this --data", hint=hint)


def _evaluate_own(
    data: Path,
    specs: Sequence[str],
    *,
    seed: int,
    limit: float,
    out: Path,
    skip_broken: bool,
    **opening: Any,
) -> None:
    import os

    from hhh_router.data.own import read_own
    from hhh_router.errors import EXIT_FAILURE, HHHRouterError, MissingExtra
    from hhh_router.settings import Settings

    try:
        from hhh_router.evaluation.opening import Opening, open_systems
        from hhh_router.evaluation.own import (
            check_limit,
            check_out,
            evaluate_own,
            has_figures,
            own_tasks,
            write_json,
            write_report,
        )
    except ImportError as error:
        raise MissingExtra("train", needed_for="evaluating on your own rows") from error
    check_limit(limit)
    rows = read_own(data, skip_broken=skip_broken)
    for line in rows.broken:
        typer.echo(line, err=True)
    folder = os.environ.get("HHH_ROUTER_DATA")  # --data is the rows: baselines learn from the public sets
    with stage_bars() as told:
        systems = open_systems(
            specs,
            Opening(
                settings=Settings.load(), heads=[task.head for task in own_tasks(rows.examples)],
                data=Path(folder) if folder else None, on_progress=told, **opening,
            ),
        )  # fmt: skip
        check_out(out)
        failed: list[tuple[str, HHHRouterError]] = []
        command = "hhh-router evaluate " + shlex.join(_public(sys.argv[2:]))
        result = evaluate_own(
            systems, rows.examples, command=command, seed=seed, limit=limit, broken=len(rows.broken), on_progress=told,
            on_measured=lambda so_far: write_json(so_far, out) if has_figures(so_far) else None,
            on_failed=lambda name, error: failed.append((name, error)),
        )  # fmt: skip
    if failed and not has_figures(result):
        raise failed[0][1]
    written = [write_json(result, out), *write_report(result, out)]
    _show(result)
    typer.echo(f"{len(rows.examples)} rows, {len(rows.broken)} broken ones left out")
    for path in written:
        typer.echo(str(path))
    for name, error in failed:
        typer.echo(f"hhh-router: {name} was not measured: {error}", err=True)
    if failed:
        raise typer.Exit(EXIT_FAILURE)


def _show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    keys = {"AUROC": "auroc", "benign refused": "benign_refused", "harm passed": "harm_passed", "ECE": "ece"}
    table = Table(title="on your own rows, with 95 % bootstrap intervals")
    for heading in ("label", "system", "decided by", "n (true)", *keys):
        table.add_column(heading, overflow="fold")
    for row in result["figures"]:
        told = [row["label"], row["system"], row.get("decided_by", "not measured"), f"{row['n']} ({row['positives']})"]
        table.add_row(*told, *(_spanned(row, key) for key in keys.values()))
    Console().print(table)


def _spanned(row: Mapping[str, Any], key: str) -> str:
    value, interval = row.get(key), row.get(f"{key}_interval")
    if value is None:
        return "–"
    return f"{value:.3f} ({interval[0]:.3f}–{interval[1]:.3f})" if interval else f"{value:.3f}"


def _public(arguments: list[str]) -> list[str]:
    """The command's arguments as they can be repeated elsewhere: paths of this machine would say nothing there.

    >>> _public(["--data", "/data/sets", "--suite", "guard"])
    ['--suite', 'guard']
    >>> _public(["--data=/data/rows.jsonl", "--system", "bundle:/data/mine", "--out", "/tmp/x"])
    ['--data', 'rows.jsonl', '--system', 'bundle:mine']
    >>> _public(["--formulation", "trinityx=/data/heads.safetensors"])
    ['--formulation', 'trinityx=heads.safetensors']
    """
    kept: list[str] = []
    pairs = iter(arguments)
    for argument in pairs:
        option, separator, value = argument.partition("=")
        if option in _PATHS:
            value = value if separator else next(pairs, "")
            kept += [option, Path(value).name] if option == "--data" and value.endswith(OWN_ROWS) else []
        elif argument.startswith("/"):
            kept.append(Path(argument).name)
        else:
            kept.append(_PATH_OF_SYSTEM.sub(r"\1", argument))
    return kept
