"""``hhh-router mcp-proxy``: a policy in front of an MCP server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def mcp_proxy(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND ARGS", help="The MCP server to start and guard, after --.")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="A server that speaks streamable HTTP, in its place.")
    ] = None,
    policy: Annotated[str | None, typer.Option("--policy", metavar="NAME|FILE", help="The policy to apply.")] = None,
    guard_url: Annotated[
        str | None,
        typer.Option("--guard-url", metavar="URL", help="A hhh-router server that reads, in place of a model here."),
    ] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="PATH|NAME", help="The bundle to read with.")
    ] = None,
    audit: Annotated[
        str | None,
        typer.Option(
            "--audit", metavar="FILE|URL|none", help="Where calls and results are recorded: SQLite or Postgres."
        ),
    ] = None,
    queue: Annotated[
        Path | None, typer.Option("--queue", metavar="FILE", help="Where held calls wait (SQLite).")
    ] = None,
    hold_s: Annotated[
        float | None, typer.Option("--hold-s", metavar="SECONDS", help="How long they wait; then they are denied.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on, with --port.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", help="Serve streamable HTTP here, in place of stdin and stdout.")
    ] = None,
) -> None:
    """Guard an MCP server: the client starts this command in place of the server's own.

    Calls of tools are asked about at the checkpoint tool_call before the server sees them, what comes back at
    tool_result before the client does; everything else passes. Needs the extra mcp.
    """
    import logging
    from functools import partial

    from hhh_router.errors import EXIT_FAILURE, MissingExtra
    from hhh_router.settings import Settings
    from hhh_router.trace.logs import log_to_stderr

    try:
        import anyio

        from hhh_router.interfaces.mcp.open import plan_mcp, run_http, run_stdio
    except ImportError as error:
        raise MissingExtra("mcp", needed_for="an MCP proxy") from error

    plan = plan_mcp(
        command=command or (),
        url=url,
        policy=policy,
        bundle=bundle,
        guard_url=guard_url,
        audit=audit,
        queue=queue,
        hold_s=hold_s,
    )
    log_to_stderr(plan.redactor)  # standard output is the client's
    logging.getLogger("hhh_router.interfaces.mcp").setLevel(logging.INFO)
    if plan.reads_here:
        from .session import ready_backbone

        ready_backbone(bundle)
    if port is None:
        if anyio.run(run_stdio, plan):
            typer.echo("hhh-router: the MCP server has ended", err=True)
            raise typer.Exit(EXIT_FAILURE)
        return
    try:
        from hhh_router.interfaces.server.run import listen
    except ImportError as error:
        raise MissingExtra("serve", needed_for="MCP over HTTP") from error

    def announce(at: str) -> None:
        typer.echo(f"hhh-router listens on {at}")
        typer.echo(f"  policy    {plan.policy.name}@{plan.policy.version} ({plan.policy.mode})")
        typer.echo(f"  server    {plan.server}")

    with listen(host, port, Settings.load()) as listening:
        anyio.run(partial(run_http, plan, listening, on_ready=announce))
