"""``hhh-router proxy``: a sidecar in front of somebody else's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def proxy(
    upstream: Annotated[
        str | None,
        typer.Option(
            "--upstream",
            metavar="URL",
            help="Base URL of the server that answers, such as https://host/v1; or litellm:PROVIDER/MODEL, translated.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="A proxy.yaml with named upstreams and routes, in its place."),
    ] = None,
    policy: Annotated[str | None, typer.Option("--policy", metavar="NAME|FILE", help="The policy to apply.")] = None,
    candidate: Annotated[
        str | None,
        typer.Option("--candidate", metavar="NAME|FILE", help="A policy to ask beside it and record; never acts."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="observe: record alone; annotate: tell the caller too; enforce: act (default).",
        ),
    ] = None,
    audit: Annotated[
        str | None,
        typer.Option(
            "--audit", metavar="FILE|URL|none", help="Where intents and outcomes are kept: SQLite or Postgres."
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes a free one.")] = 8000,
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="PATH|NAME", help="The bundle to read with.")
    ] = None,
) -> None:
    """Guard another server: the app in front changes its base URL, nothing else.

    Whatever no rule acts on passes byte for byte. Prompts and answers of OpenAI's chat completions, responses and
    completions and of Anthropic's messages are read. Our own endpoints stand under /hhh, such as /hhh/health/ready.
    Listens beyond this machine only when HHH_ROUTER_API_KEY is set.
    """
    from .listen import run_proxy

    run_proxy(
        host=host, port=port, policy=policy, candidate=candidate, bundle=bundle, upstream=upstream, config=config,
        mode=mode, audit=audit,
    )  # fmt: skip
