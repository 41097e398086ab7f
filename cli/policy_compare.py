"""``hhh-router policy compare``: what a candidate would have decided otherwise, asked of a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

_SIDES = ("stricter", "looser", "newly_stopped", "newly_passed", "unknown")


def compare(
    url: Annotated[str, typer.Option("--url", metavar="URL", help="Of the server; of a proxy with /hhh at its end.")],
    every: Annotated[
        float, typer.Option("--every", metavar="S", min=0, help="Show it again every so many seconds; 0 shows it once.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how often a served candidate is stricter or looser than the policy in force, with intervals.

    The key of HHH_ROUTER_API_KEY has to open `metrics`.
    """
    import asyncio
    import json
    import time

    from hhh_router.interfaces.remote import RemotePipeline
    from hhh_router.settings import Settings

    async def ask() -> Mapping[str, Any]:
        remote = RemotePipeline(url, policy=None, settings=Settings.load())
        try:
            return await remote.drift()
        finally:
            await remote.aclose()

    while True:
        told = asyncio.run(ask())
        if as_json:
            figures = [f for f in told["figures"] if f["name"].startswith("candidate_")]
            typer.echo(json.dumps({"comparisons": told.get("comparisons", []), "figures": figures}, indent=2))
        else:
            _show(told)
        if not every:
            return
        time.sleep(every)


def _show(told: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    pairs = told.get("comparisons", [])
    if not pairs:
        typer.echo("no candidate was asked there yet; serve one with --candidate NAME|FILE")
    figures = {(f["of"], f["name"]): f for f in told["figures"]}
    for pair in pairs:
        of = f"{pair['policy']} → {pair['candidate']}"
        table = Table(title=f"{of}, {pair['requests']} requests")
        for heading in ("the candidate is", "share", "interval"):
            table.add_column(heading)
        for side in _SIDES:
            if (f := figures.get((of, f"candidate_{side}"))) is None:
                continue
            interval = "" if f["low"] is None else f"{f['low']:.3f} … {f['high']:.3f} ({f['level']:g})"
            table.add_row(side.replace("_", " "), "" if f["value"] is None else f"{f['value']:.3f}", interval)
        Console().print(table)
        for d in pair["disagreements"]:
            typer.echo(f"  {d['checkpoint']}: {d['enforced']} → {d['candidate']}, {d['n']} requests")
