"""``hhh-router verify``: signature and chain of receipts, and decisions made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def verify(
    receipts: Annotated[Path, typer.Argument(metavar="RECEIPTS", help="File of receipts, one a line.")],
    key: Annotated[Path, typer.Option("--key", "-k", help="PEM file of the public key.")],
    request_id: Annotated[str | None, typer.Option("--id", help="Of the receipt to make again.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Make the decisions about this prompt again.")] = None,
    request: Annotated[
        Path | None,
        typer.Option(help="Likewise; JSON file of the request, or of the whole line, of a trace with full content."),
    ] = None,
    response: Annotated[str | None, typer.Option(help="The whole reply, or the text that was guarded.")] = None,
    policy: Annotated[str | None, typer.Option("--policy", "-p", metavar="NAME|FILE", help="Default: by name.")] = None,
    bundle: Annotated[str | None, typer.Option("--bundle", "-b", help="Default: the deployment's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that receipts are whole and unchanged; with texts, make their decisions again. Exit 1 where not."""
    import json

    from hhh_router.errors import EXIT_FAILURE, SettingsError
    from hhh_router.trace.receipts import check_receipts

    if prompt is not None and request is not None:
        raise SettingsError("--prompt and --request", hint="give one of them")
    lines = list(check_receipts(receipts, key))
    wrong = [f"line {c.line}: {w}" for c in lines for w in c.wrong]
    again: dict[str, Any] | None = None
    if prompt is not None or request is not None or response is not None:
        canonical, reply = _texts(prompt, request, response)
        blocks = [c.content["hhh"] for c in lines if not c.wrong]
        again = _again(blocks, canonical, reply, request_id, policy, bundle)
        wrong += [f"{again['request_id']}: {d}" for d in again["differences"]]
    if as_json:
        typer.echo(json.dumps({"receipts": len(lines), "wrong": wrong, "again": again}, indent=2))
    else:
        for line in wrong:
            typer.echo(f"{receipts}: {line}", err=True)
        typer.echo(f"{len(lines)} receipts, {'signatures and chain hold' if not wrong else 'NOT as they were'}")
        if again is not None and not again["differences"]:
            typer.echo(f"{again['request_id']}: made again, {', '.join(again['decisions'])}")
        for line in again["not_remade"] if again is not None else ():
            typer.echo(f"  not made again: {line}")
    if wrong:
        raise typer.Exit(EXIT_FAILURE)


def _texts(prompt: str | None, request: Path | None, response: str | None) -> tuple[dict[str, Any], str | None]:
    """The canonical request, and the reply where there is one beside it."""
    if request is None:
        turns = [] if prompt is None else [{"role": "user", "content": prompt}]
        return {"messages": turns, "response": response}, None
    found = _request(request)
    if isinstance(found.get("request"), dict):  # a trace's line
        reply = found.get("reply")
        return found["request"], response if response is not None else reply if isinstance(reply, str) else None
    return found, response


def _request(path: Path) -> dict[str, Any]:
    import json

    from hhh_router.errors import DataError

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no JSON file ({error})", hint="give the request of a trace") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: is no JSON object", hint="give the request of a trace")
    return found


def _again(
    blocks: list[dict[str, Any]],
    canonical: dict[str, Any],
    response: str | None,
    request_id: str | None,
    policy: str | None,
    bundle: str | None,
) -> dict[str, Any]:
    from hhh_router.bundle import Bundle
    from hhh_router.errors import DataError, MissingExtra
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings

    try:
        from hhh_router.evaluation.rerun import remake, request_hash
        from hhh_router.evaluation.systems import BundleReadings
    except ImportError as error:
        raise MissingExtra("train", needed_for="making a decision again") from error
    wanted = request_hash(canonical)
    block = next(
        (
            b for b in blocks
            if (b["request_id"] == request_id if request_id is not None else b["receipt"]["request_sha256"] == wanted)
        ),
        None,
    )  # fmt: skip
    if block is None:
        raise DataError("no receipt is about this request", hint="give the request as it was sent, or another --id")
    settings = Settings.load(bundle=bundle)
    used = Bundle.load(settings.bundle)
    found = remake(
        block, canonical, load_policy(policy or block["policy"]["name"]), BundleReadings(used, settings),
        bundle_sha256=used.sha256, response=response,
    )  # fmt: skip
    return {
        "request_id": block["request_id"],
        "decisions": list(found.decisions),
        "differences": list(found.differences),
        "not_remade": list(found.not_remade),
    }
