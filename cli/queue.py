"""``hhh-router queue``: calls that a policy holds until a person has decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hhh_router.interfaces.held import HeldCalls, Status

app = typer.Typer(help="See, approve and deny calls that are held.", no_args_is_help=True)

_File = Annotated[
    Path | None, typer.Option("--queue", metavar="FILE", help="The queue; by default where proxies keep it.")
]
_Id = Annotated[str, typer.Argument(metavar="ID", help="Of the call; as much of it as tells it apart.")]
_Note = Annotated[str | None, typer.Option("--note", metavar="TEXT", help="Why; whoever asked is told.")]
_By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who decides; by default this user.")]


@app.command("list")
def list_calls(
    queue: _File = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that wait no longer, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a call a line.")] = False,
) -> None:
    """Show the calls that wait, oldest first."""
    from datetime import UTC, datetime

    for call in _opened(queue).calls(everything=everything):
        if as_json:
            typer.echo(json.dumps(call.as_json()))
            continue
        until = datetime.fromtimestamp(call.expires, UTC).isoformat(timespec="seconds")
        typer.echo(f"{call.id}  {call.status:<9}  until {until}  {call.tool}  {call.policy}  {call.rule}")
        typer.echo(f"  because    {call.reason}")
        if call.arguments is not None:
            typer.echo(f"  arguments  {json.dumps(call.arguments)}")
        if call.decided_by or call.note:
            typer.echo(f"  decided    {call.decided_by or 'unknown'}{f': {call.note}' if call.note else ''}")


@app.command()
def approve(call_id: _Id, queue: _File = None, note: _Note = None, by: _By = None) -> None:
    """Let a call through."""
    _settle(queue, call_id, "approved", by, note)


@app.command()
def deny(call_id: _Id, queue: _File = None, note: _Note = None, by: _By = None) -> None:
    """Refuse a call."""
    _settle(queue, call_id, "denied", by, note)


def _settle(queue: Path | None, call_id: str, status: Status, by: str | None, note: str | None) -> None:
    from getpass import getuser

    from hhh_router.errors import EXIT_FAILURE

    held = _opened(queue)
    call = held.find(call_id)
    if not held.settle(call.id, status, by=by or getuser(), note=note):
        typer.echo(f"hhh-router: call {call.id} of {call.tool} does not wait: {held.find(call.id).status}", err=True)
        raise typer.Exit(EXIT_FAILURE)
    typer.echo(f"{call.id}  {call.tool}  {status}")


def _opened(queue: Path | None) -> HeldCalls:
    from hhh_router.interfaces.held import HeldCalls, default_queue

    return HeldCalls(queue or default_queue())
