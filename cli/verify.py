"""``hhh-router verify``: signature and chain of receipts, and a decision made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def verify(
    receipts: Annotated[Path, typer.Argument(metavar="RECEIPTS", help="File of receipts, one a line.")],
    key: Annotated[Path, typer.Option("--key", "-k", help="PEM file of the public key.")],
    request_id: Annotated[str | None, typer.Option("--id", help="Of the receipt to make again.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Make the decision about this prompt again.")] = None,
    request: Annotated[
        Path | None, typer.Option(help="Likewise; JSON file of the request, as traces with full content have it.")
    ] = None,
    policy: Annotated[str | None, typer.Option("--policy", "-p", metavar="NAME|FILE", help="Default: by name.")] = None,
    bundle: Annotated[str | None, typer.Option("--bundle", "-b", help="Default: the deployment's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that receipts are unchanged and whole; with a text, make its decision again. Exit 1 where it is not so."""
    import json

    from hhh_router.errors import EXIT_FAILURE, SettingsError
    from hhh_router.trace.receipts import check_receipts

    if prompt is not None and request is not None:
        raise SettingsError("--prompt and --request", hint="give one of them")
    lines = list(check_receipts(receipts, key))
    wrong = [f"line {c.line}: {w}" for c in lines for w in c.wrong]
    again: dict[str, Any] | None = None
    if prompt is not None or request is not None:
        from hhh_router.evaluation.rerun import canonical_prompt

        canonical = canonical_prompt(prompt) if prompt is not None else _request(request)
        blocks = [c.content["hhh"] for c in lines if not c.wrong]
        again = _again(blocks, canonical, request_id, policy, bundle)
        wrong += [f"{again['request_id']}: {d}" for d in again["differences"]]
    if as_json:
        typer.echo(json.dumps({"receipts": len(lines), "wrong": wrong, "again": again}, indent=2))
    else:
        for line in wrong:
            typer.echo(f"{receipts}: {line}", err=True)
        typer.echo(f"{len(lines)} receipts, {'signatures and chain hold' if not wrong else 'NOT as they were'}")
        if again is not None and not again["differences"]:
            typer.echo(f"{again['request_id']}: made again, {again['action']} by {again['rule']}")
    if wrong:
        raise typer.Exit(EXIT_FAILURE)


def _request(path: Path | None) -> dict[str, Any]:
    import json

    from hhh_router.errors import DataError

    assert path is not None
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
    request_id: str | None,
    policy: str | None,
    bundle: str | None,
) -> dict[str, Any]:
    from hhh_router.bundle import Bundle
    from hhh_router.errors import DataError, MissingExtra
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings

    try:
        from hhh_router.evaluation.rerun import differences, request_hash
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
    found = differences(
        block, canonical, load_policy(policy or block["policy"]["name"]), BundleReadings(used, settings),
        bundle_sha256=used.sha256,
    )  # fmt: skip
    first = block["decisions"][0] if block["decisions"] else {"action": None, "rule": None}
    about = {"request_id": block["request_id"], "action": first["action"], "rule": first["rule"]}
    return about | {"differences": found}
