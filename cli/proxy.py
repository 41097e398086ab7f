"""``hhh-router proxy``: a guard in front of an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer


def proxy(
    upstream: Annotated[
        str,
        typer.Option("--upstream", metavar="URL", help="Base URL of the server that answers, such as http://host/v1."),
    ],
    policy: Annotated[str | None, typer.Option("--policy", metavar="NAME|FILE", help="The policy to enforce.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes a free one.")] = 8000,
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="PATH|NAME", help="The bundle to read with.")
    ] = None,
) -> None:
    """Guard another server: its chats are read, judged and passed on.

    The app in front changes its base URL, nothing else. Listens beyond this machine only when HHH_ROUTER_API_KEY is
    set; clients then send that key, and the upstream gets HHH_ROUTER_UPSTREAM_API_KEY.
    """
    from .listen import run_server

    run_server(host=host, port=port, policy=policy, bundle=bundle, upstream=upstream)
