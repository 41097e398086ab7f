"""``hhh-router audit``: what a sidecar let out, and whether the record of it is whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(help="Check and read the audit that a proxy keeps.", no_args_is_help=True)

_Place = Annotated[
    str | None,
    typer.Option("--audit", metavar="FILE|URL", help="The audit; by default where the proxy keeps it."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def verify(
    audit: _Place = None,
    head: Annotated[
        str | None, typer.Option("--head", metavar="HASH", help="A head kept from before, which has to be in it.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Follow the chain of hashes from the first row to the last; exit 1 where it is broken."""
    from dataclasses import asdict

    from hhh_router.errors import EXIT_FAILURE
    from hhh_router.trace.audit import shown_place
    from hhh_router.trace.audit import verify as follow

    place = _place(audit)
    found = follow(place, contains=head)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    elif found.broken_at is None:
        typer.echo(f"{shown_place(place)}: {found.rows} rows, the chain is whole")
        if found.since is not None:
            typer.echo(f"  since        {_time(found.since)}")
        if found.removed:
            typer.echo(f"  removed      {found.removed}, which were kept long enough")
        typer.echo(f"  head         {found.head}")
        typer.echo(f"  unfinished   {found.unfinished}")
        typer.echo(f"  interrupted  {found.interrupted}")
    else:
        typer.echo(f"{shown_place(place)}: broken at row {found.broken_at}: {found.reason}", err=True)
    if found.broken_at is not None:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def tail(
    audit: _Place = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many.")] = 20,
    as_json: _Json = False,
) -> None:
    """Show the last rows, one a line."""
    from hhh_router.trace.audit import read_rows

    for row in read_rows(_place(audit), last=rows):
        if as_json:
            typer.echo(json.dumps(row.as_json()))
            continue
        shown = _shown(json.loads(row.record))
        typer.echo(f"{row.seq}  {_time(row.time)}  {row.kind:<11}  {row.request_id}  {shown}".rstrip())


@app.command()
def export(audit: _Place = None) -> None:
    """Print every row as one line of JSON, in order."""
    from hhh_router.trace.audit import read_rows

    for row in read_rows(_place(audit)):
        typer.echo(json.dumps(row.as_json()))


@app.command()
def prune(
    audit: _Place = None,
    keep_days: Annotated[
        float | None, typer.Option("--keep-days", metavar="DAYS", min=0, help="Remove what is older.")
    ] = None,
    keep_mb: Annotated[
        float | None, typer.Option("--keep-mb", metavar="MB", min=1, help="Remove the oldest until this is left.")
    ] = None,
) -> None:
    """Remove the oldest rows while no proxy writes the audit; the chain stays whole from there on.

    A proxy does it by itself with audit.keep_days or audit.keep_mb in its proxy.yaml.
    """
    from hhh_router.errors import SettingsError
    from hhh_router.trace.audit import Retention, prune_audit, shown_place

    kept = Retention(days=keep_days, megabytes=keep_mb)
    if not kept.is_bounded:
        raise SettingsError("nothing says what to remove", hint="give --keep-days or --keep-mb")
    place = _place(audit)
    removed = prune_audit(place, kept)
    typer.echo(f"{shown_place(place)}: {removed} rows removed")


def _place(audit: str | None) -> str:
    """What is named; else what the settings name, or the file that a proxy takes by default."""
    from hhh_router.settings import Settings
    from hhh_router.trace.audit import check_place, default_audit

    if audit is not None:
        check_place(audit)
        return audit
    url = Settings.load().audit_url
    return str(default_audit()) if url is None else url.get_secret_value()


def _time(at: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def _shown(record: dict[str, object]) -> str:
    names = ("method", "path", "tool", "mode", "status", "error", "ended", "through")
    told = [f"{k}={record[k]}" for k in names if record.get(k)]
    block = record.get("hhh")
    decisions = block.get("decisions") if isinstance(block, dict) else None
    if isinstance(decisions, list) and decisions:
        told.append(f"action={decisions[-1].get('action')}")
    return " ".join(told)
