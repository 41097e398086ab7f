"""``hhh-router feedback``: draw requests to be labelled, and send what was said of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

_FIELDS = ("request_id", "labels", "by", "sampled", "probability")
_DRAWN = ("action", "texts")  # told by draw, for whoever labels
_HELP = "Draw served requests to be labelled, and label them."
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


@app.callback()
def _group() -> None:
    """Draw served requests to be labelled, and label them."""


@app.command()
def draw(
    store: Annotated[Path, typer.Argument(metavar="FILE", help="The file that HHH_ROUTER_FEEDBACK named.")],
    rate: Annotated[float, typer.Option(help="Probability of a request to be drawn.")] = 0.01,
    rate_stopped: Annotated[
        float | None, typer.Option(help="The same of requests that were stopped; as --rate when not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same requests, and new ones as they come.")] = 17,
) -> None:
    """Draw remembered requests at random, one JSON line each, without those that were drawn and labelled already.

    A line is what `feedback add` takes once "labels" is filled in; its probability makes rates of all requests out of
    the labels.
    """
    from hhh_router.trace.feedback_store import draw_requests

    for row in draw_requests(store, rate=rate, rate_stopped=rate if rate_stopped is None else rate_stopped, seed=seed):
        typer.echo(json.dumps(row, ensure_ascii=False))


@app.command()
def add(
    source: Annotated[Path, typer.Argument(metavar="LABELS.jsonl", help="One label a line; - reads from stdin.")],
    base_url: Annotated[str | None, typer.Option(metavar="URL", help="Of the server that answered.")] = None,
    store: Annotated[Path | None, typer.Option(metavar="FILE", help="Or the file, on the server's machine.")] = None,
    by: Annotated[str, typer.Option(help="The labeller, where a line names none.")] = "",
) -> None:
    """Send labels, one JSON object a line: "request_id", "labels", and maybe "by", "sampled", "probability".

    Sending a file again changes nothing. Exit 2 at the first line that is refused; those before it are kept.
    """
    import asyncio

    from hhh_router.errors import SettingsError

    if (base_url is None) == (store is None):
        raise SettingsError("give --base-url or --store", hint="a server's address, or its file of feedback")
    counts = asyncio.run(_add(source, base_url, store, by))
    typer.echo(", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "no labels")


async def _add(source: Path, base_url: str | None, store: Path | None, by: str) -> dict[str, int]:
    from hhh_router.errors import DataError, RequestError
    from hhh_router.interfaces.remote import RemotePipeline
    from hhh_router.settings import Settings
    from hhh_router.trace.feedback import make_label
    from hhh_router.trace.feedback_store import FeedbackStore, read_labelled

    counts: dict[str, int] = {}
    if store is not None:
        read_labelled(store)  # a mistyped name makes no new file
        kept = FeedbackStore(store)
        keep, close = kept.label, kept.aclose
    else:
        remote = RemotePipeline(str(base_url), policy=None, settings=Settings.load())
        close = remote.aclose

        async def keep(label: Any) -> Any:
            return (await remote.feedback(label)).status

    try:
        for where, row in _lines(source):
            if unknown := sorted(set(row) - {*_FIELDS, *_DRAWN}):
                raise DataError(f"{where}: {unknown[0]!r}: unknown field", hint=f"use {', '.join(_FIELDS)}")
            if row.get("labels") == {}:
                counts["not labelled"] = counts.get("not labelled", 0) + 1
                continue
            try:
                fields = {name: row.get(name) for name in _FIELDS}
                status = await keep(make_label(**{**fields, "by": fields["by"] or by}))
            except RequestError as error:
                raise DataError(f"{where}: {error.message}", hint=error.hint) from error
            counts[status] = counts.get(status, 0) + 1
    finally:
        await close()
    return counts


def _lines(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from hhh_router.errors import DataError

    lines = sys.stdin if str(source) == "-" else source.open(encoding="utf-8")
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{source}:{number}: no JSON ({error})", hint="one object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{source}:{number}: no object", hint='{"request_id": …, "labels": {…}}')
            yield f"{source}:{number}", row
