"""``hhh-router serve``: the bundle's mixture behind OpenAI's wire."""

from __future__ import annotations

from typing import Annotated

import typer


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes a free one.")] = 8000,
    policy: Annotated[str | None, typer.Option("--policy", metavar="NAME|FILE", help="The default policy.")] = None,
    candidate: Annotated[
        str | None,
        typer.Option("--candidate", metavar="NAME|FILE", help="A policy to ask beside it and record; never acts."),
    ] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="PATH|NAME", help="The bundle to answer with.")
    ] = None,
) -> None:
    """Serve chats and verdicts over HTTP, in OpenAI's wire.

    Listens beyond this machine only when HHH_ROUTER_API_KEY is set.
    """
    from .listen import run_server

    run_server(host=host, port=port, policy=policy, candidate=candidate, bundle=bundle)
