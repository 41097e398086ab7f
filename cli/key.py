"""``hhh-router key``: API keys for a server."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make API keys for a server.")


@app.callback()
def _group() -> None:
    """Make API keys for a server."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who will hold it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a key: it is shown this once, and its hash is an entry for the file HHH_ROUTER_API_KEYS_FILE names."""
    import hashlib
    import json
    import secrets

    key = f"hhh-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    if as_json:
        typer.echo(json.dumps({"key": key, "entry": {"name": name, "sha256": digest}}, indent=2))
        return
    typer.echo(key)
    typer.echo("keep it now: it is not stored anywhere. Under 'keys:' in the file of keys:", err=True)
    typer.echo(f"  - name: {json.dumps(name)}\n    sha256: {digest}", err=True)
