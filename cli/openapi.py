"""``hhh-router openapi``: the OpenAPI document of a server."""

from __future__ import annotations

import typer


def openapi() -> None:
    """Print the OpenAPI document of every endpoint that a server has, as /openapi.json tells it too."""
    import json

    from hhh_router.errors import MissingExtra

    try:
        from hhh_router.interfaces.server.openapi import document
    except ImportError as error:
        raise MissingExtra("serve", needed_for="the description of a server") from error

    typer.echo(json.dumps(document(keys=True), indent=2))
