"""``hhh-router audit``: what a sidecar let out, and whether the record of it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check and read the audit that a proxy keeps.", no_args_is_help=True)

_File = Annotated[
    Path | None, typer.Option("--audit", metavar="FILE", help="The audit; by default where the proxy keeps it.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def verify(
    audit: _File = None,
    head: Annotated[
        str | None, typer.Option("--head", metavar="HASH", help="A head kept from before, which has to be in it.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Follow the chain of hashes from the first row to the last; exit 1 where it is broken."""
    from dataclasses import asdict

    from hhh_router.errors import EXIT_FAILURE
    from hhh_router.trace.audit import verify as follow

    path = _path(audit)
    found = follow(path, contains=head)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    elif found.broken_at is None:
        typer.echo(f"{path}: {found.rows} rows, the chain is whole")
        typer.echo(f"  head         {found.head}")
        typer.echo(f"  unfinished   {found.unfinished}")
        typer.echo(f"  interrupted  {found.interrupted}")
    else:
        typer.echo(f"{path}: broken at row {found.broken_at}: {found.reason}", err=True)
    if found.broken_at is not None:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def tail(
    audit: _File = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many.")] = 20,
    as_json: _Json = False,
) -> None:
    """Show the last rows, one a line."""
    from hhh_router.trace.audit import read_rows

    for row in read_rows(_path(audit), last=rows):
        if as_json:
            typer.echo(json.dumps(row.as_json()))
            continue
        from datetime import UTC, datetime

        at = datetime.fromtimestamp(row.time, UTC).isoformat(timespec="milliseconds")
        typer.echo(f"{row.seq}  {at}  {row.kind:<11}  {row.request_id}  {_shown(json.loads(row.record))}".rstrip())


@app.command()
def export(audit: _File = None) -> None:
    """Print every row as one line of JSON, in order."""
    from hhh_router.trace.audit import read_rows

    for row in read_rows(_path(audit)):
        typer.echo(json.dumps(row.as_json()))


def _path(audit: Path | None) -> Path:
    from hhh_router.trace.audit import default_audit

    return default_audit() if audit is None else audit


def _shown(record: dict[str, object]) -> str:
    told = [f"{k}={record[k]}" for k in ("method", "path", "tool", "mode", "status", "error", "ended") if record.get(k)]
    block = record.get("hhh")
    decisions = block.get("decisions") if isinstance(block, dict) else None
    if isinstance(decisions, list) and decisions:
        told.append(f"action={decisions[-1].get('action')}")
    return " ".join(told)
