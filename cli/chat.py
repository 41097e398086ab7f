"""``hhh-router chat``: ask once, or talk."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hhh_router.interfaces.sdk import HHHRouter


def chat(
    ctx: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask. Without it: standard input when piped, a conversation on a terminal."),
    ] = None,
    policy: Annotated[str | None, typer.Option("--policy", metavar="NAME|FILE", help="The policy to apply.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="MIXTURE",
            help="Pin the mixture within the policy's bounds: hhh@2-6-5-3, or base=0.1,helpful=0.9.",
        ),
    ] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="PATH|NAME", help="The bundle to answer with.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy decoding.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the sampling.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text and hhh, nothing else.")
    ] = False,
) -> None:
    """Answer a prompt with the calibrated mixture, and show weights, needs, confidence and decision.

    The reply goes to standard output, everything about it to standard error. Exit 0 when the reply was let through, 3
    when a decision stopped it.
    """
    from .render import parse_weights
    from .session import opened

    pinned = None if weights is None else parse_weights(weights)
    asked = prompt if prompt is not None else _piped()
    if asked is None and as_json:
        raise typer.BadParameter("--json needs a prompt, as an argument or piped in")
    opening = [] if system is None else [{"role": "system", "content": system}]
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with opened(ctx, policy=policy, bundle=bundle) as router:
        if asked is None:
            from .repl import Repl

            Repl(router, opening=opening, weights=pinned, sampling=sampling).run()
            return
        status = _ask(router, [*opening, {"role": "user", "content": asked}], pinned, sampling, as_json=as_json)
    raise typer.Exit(status)


def _ask(router: HHHRouter, messages: list[Any], weights: Any, sampling: dict[str, Any], *, as_json: bool) -> int:
    """Answer once; returns the exit status."""
    import json

    from .render import error_console, show_reply
    from .session import exit_status

    if as_json:
        result = router.chat(messages, weights=weights, **sampling)
        typer.echo(json.dumps({"text": result.text, "hhh": result.metadata.as_json()}))
        return exit_status(result)
    with router.chat(messages, weights=weights, stream=True, **sampling) as reply:
        return exit_status(show_reply(reply, error_console()))


def _piped() -> str | None:
    """The prompt on standard input; None when a person sits there.

    Raises:
        InvalidRequest: Not text, or more than any request may hold.
    """
    from hhh_router.errors import InvalidRequest
    from hhh_router.settings import Settings

    if sys.stdin.isatty():
        return None
    limit = Settings.load().max_body_bytes
    raw = sys.stdin.buffer.read(limit + 1)
    if len(raw) > limit:
        raise InvalidRequest(
            f"standard input holds more than {limit} bytes", hint="send less, or raise HHH_ROUTER_MAX_BODY_BYTES"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"standard input is not text (byte {error.start + 1} is not UTF-8)", hint="send UTF-8 text"
        ) from error
