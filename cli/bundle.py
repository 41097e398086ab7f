"""``hhh-router bundle``: list, check and describe bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .train import stage_bars

if TYPE_CHECKING:
    from hhh_router.model.quantisation import Record

app = typer.Typer(no_args_is_help=True, add_completion=False, help="List, check and describe bundles.")


@app.command("list")
def list_(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the bundles found here: under ./adapters and beside the package."""
    import json

    from hhh_router.bundle import Bundle, list_bundles, search_path
    from hhh_router.errors import BundleError

    rows = []
    for root in list_bundles():
        try:
            manifest = Bundle.load(root).manifest
        except BundleError as error:
            rows.append({"name": root.name, "path": str(root), "problem": error.message.splitlines()[0]})
            continue
        rows.append(
            {
                "name": manifest.name,
                "version": manifest.version,
                "path": str(root),
                "backbone": manifest.backbone.source,
                "licence": manifest.licence,
                "commercial_use": manifest.commercial_use,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"no bundle in {', '.join(map(str, search_path()))}", err=True)
    for row in rows:
        detail = row.get("problem") or f"{row['licence']}{'' if row['commercial_use'] else ', research only'}"
        typer.echo(f"{row['name']}  {row.get('version', '?')}  {row['path']}  ({detail})")


@app.command()
def verify(
    bundle: str = typer.Argument(..., metavar="PATH|NAME", help="A bundle's folder, or its name under adapters/."),
    release: bool = typer.Option(False, "--release", help="Also ask for measured figures within the evasion budget."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check hashes, weights, shapes and calibrators; every mistake is listed."""
    import json

    from hhh_router.bundle import Bundle
    from hhh_router.errors import EXIT_USAGE, MissingExtra
    from hhh_router.model.inspect import bundle_mistakes

    loaded = Bundle.load(bundle)
    mistakes = bundle_mistakes(loaded)
    if release:
        try:
            from hhh_router.evaluation.release import release_mistakes
        except ImportError as error:
            raise MissingExtra("train", needed_for="checking a bundle's figures") from error
        mistakes += release_mistakes(loaded)
    if as_json:
        found = {"name": loaded.manifest.name, "path": str(loaded.root), "sha256": loaded.sha256, "mistakes": mistakes}
        typer.echo(json.dumps(found, indent=2))
    elif mistakes:
        typer.echo("\n".join(mistakes), err=True)
        typer.echo(f"{loaded.root}: {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}", err=True)
    else:
        typer.echo(f"{loaded.manifest.name} {loaded.manifest.version}: all is as it should be ({loaded.sha256[:16]})")
    if mistakes:
        raise typer.Exit(EXIT_USAGE)


@app.command()
def card(
    bundle: str = typer.Argument(..., metavar="PATH|NAME", help="A bundle's folder, or its name under adapters/."),
    as_json: bool = typer.Option(False, "--json", help="Print the manifest and the card as JSON."),
) -> None:
    """Show a bundle's card: what it was trained on, and its measured figures."""
    import json

    from hhh_router.bundle import Bundle
    from hhh_router.errors import BundleError

    loaded = Bundle.load(bundle)
    path = loaded.root / "CARD.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{path}: cannot be read ({error})", hint="the card is written by training; restore it"
        ) from error
    if as_json:
        manifest = loaded.manifest.model_dump(mode="json")
        typer.echo(json.dumps({"manifest": manifest, "sha256": loaded.sha256, "card": text}, indent=2))
        return
    typer.echo(text)


@app.command()
def quantise(
    data: Annotated[Path, typer.Option("--data", envvar="HHH_ROUTER_DATA", help="Folder of data sets.")],
    bundle: Annotated[str, typer.Option("--bundle", help="Bundle name or folder.")] = "smollm2-135m",
    scheme: Annotated[str, typer.Option("--scheme", help="int8.")] = "int8",
    replies: Annotated[int, typer.Option(min=1, help="Harmless prompts that are answered.")] = 40,
    items: Annotated[int, typer.Option(min=1, help="Labelled replies that are read.")] = 200,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of each reply.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the draws of rows.")] = 17,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Measure what quantised weights change, and write quantisation.json into the bundle.

    HHH_ROUTER_QUANTISE serves the bundle with them only where the bounds held, in the precision measured here
    (HHH_ROUTER_DTYPE). Rows are those of split calibrate. Exit code 1: a bound is broken.
    """
    from hhh_router.bundle import Bundle
    from hhh_router.errors import EXIT_FAILURE, MissingExtra, SettingsError
    from hhh_router.model.quantisation import SCHEMES, keep_record
    from hhh_router.settings import Settings

    if scheme not in SCHEMES:
        raise SettingsError(f"--scheme {scheme}: not known", hint=f"one of {', '.join(SCHEMES)}")
    if not data.is_dir():
        raise SettingsError(f"--data {data}: no such folder", hint="give the folder that holds the data sets")
    try:
        from hhh_router.evaluation.quantise import Sizes, measure_quantisation
    except ImportError as error:
        raise MissingExtra("train", needed_for="measuring a bundle") from error
    loaded = Bundle.load(bundle)
    loaded.verify()
    sizes = Sizes(replies=replies, items=items, max_tokens=max_tokens)
    with stage_bars() as told:
        record = measure_quantisation(loaded, data, settings=Settings.load(), sizes=sizes, seed=seed, on_progress=told)
    path = keep_record(loaded, record)
    if as_json:
        typer.echo(record.model_dump_json(indent=2))
    else:
        _show(record)
        typer.echo(str(path))
    for line in record.broken():
        typer.echo(line, err=True)
    if not record.passes:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def skip(
    data: Annotated[Path, typer.Option("--data", envvar="HHH_ROUTER_DATA", help="Folder of data sets.")],
    bundle: Annotated[str, typer.Option("--bundle", help="Bundle name or folder.")] = "smollm2-135m",
    budget: Annotated[float, typer.Option(min=1e-6, help="Mean KL divergence of the next token, in nats.")] = 0.002,
    blocks: Annotated[int, typer.Option(min=1, max=4, help="Blocks of layers, each with a threshold.")] = 3,
    replies: Annotated[int, typer.Option(min=1, help="Harmless prompts that are answered.")] = 40,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of each reply.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the draws of rows.")] = 17,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Fit below which weight an expert need not be run, and write skipping.json into the bundle.

    HHH_ROUTER_SKIP_EXPERTS=true serves the bundle with it. Rows are those of split calibrate.
    """
    from hhh_router.bundle import Bundle
    from hhh_router.errors import MissingExtra, SettingsError
    from hhh_router.model.skipping import keep_skipping
    from hhh_router.settings import Settings

    if not data.is_dir():
        raise SettingsError(f"--data {data}: no such folder", hint="give the folder that holds the data sets")
    try:
        from hhh_router.evaluation.skipping import fit_skipping
    except ImportError as error:
        raise MissingExtra("train", needed_for="measuring a bundle") from error
    loaded = Bundle.load(bundle)
    loaded.verify()
    with stage_bars() as told:
        record = fit_skipping(
            loaded, data, settings=Settings.load(), budget_nats=budget, blocks=blocks, replies=replies,
            max_tokens=max_tokens, seed=seed, on_progress=told,
        )  # fmt: skip
    path = keep_skipping(loaded, record)
    if as_json:
        typer.echo(record.model_dump_json(indent=2))
        return
    typer.echo(
        f"thresholds {', '.join(f'{t:g}' for t in record.thresholds)}: {record.skipped:.0%} of experts are not run, "
        f"{record.idle:.0%} of rows and blocks run none; the next token moves by {record.mean_nats:.4f} nats "
        f"(budget {record.budget_nats:g}, {record.n} tokens of {record.replies} replies)"
    )
    typer.echo(str(path))


def _show(record: Record) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{record.scheme} against {record.dtype}, seed {record.seed}")
    for heading in ("what", "n", "before", "after"):
        table.add_column(heading)
    d, r = record.divergence, record.refusals
    table.add_row("KL of the next token, nats", f"{d.n} tokens of {d.replies} replies", "", f"{d.mean_nats:.4f}")
    for x in record.readings:
        n = f"{x.n} ({x.positives} positive)"
        table.add_row(f"ECE of {x.outcome}, mode {x.mode}", n, f"{x.ece_before:.4f}", f"{x.ece_after:.4f}")
    table.add_row("harmless prompts refused", str(r.n), f"{r.before:.3f}", f"{r.after:.3f}")
    Console().print(table)
