"""Asking a second upstream when the first is silent for long, and taking whichever answers first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hhh_router.interfaces.proxy.upstreams import Answer, Upstream

_KEEPS_STATE = ("background", "conversation", "mcp_servers", "previous_response_id", "web_search_options")
"""Fields with which an upstream does or keeps more than one answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hedge:
    """Whom to ask as well, and when."""

    after_s: float
    """Without the head of an answer."""
    to: Upstream


def may_be_asked_twice(wire: str | None, body: Mapping[str, Any]) -> bool:
    """Whether two upstreams may work on a request at once: it costs twice, and must do no more than that.

    Tools that the app runs do no harm: of two proposed calls it sees one. Tools that the upstream runs itself may do
    something twice, and what is stored would be stored twice (Responses are, unless the app says ``store: false``).

    >>> may_be_asked_twice("chat", {"tools": [{"type": "function"}]}), may_be_asked_twice("chat", {"store": True})
    (True, False)
    >>> may_be_asked_twice("responses", {}), may_be_asked_twice("responses", {"store": False})
    (False, True)
    >>> may_be_asked_twice("messages", {"tools": [{"type": "web_search_20250305"}]}), may_be_asked_twice(None, {})
    (False, False)
    """
    store = body.get("store")
    if wire is None or (store is not False if wire == "responses" else store):
        return False
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(map(_is_the_apps, tools)):
        return False
    return not any(body.get(field) for field in _KEEPS_STATE)


def _is_the_apps(tool: object) -> bool:
    return isinstance(tool, Mapping) and tool.get("type", "function") in ("function", "custom")


async def race(
    first: Callable[[], Awaitable[Answer]],
    second: Callable[[], Awaitable[Answer]],
    *,
    after_s: float,
    turned_away: Callable[[Answer], bool],
) -> tuple[Answer, bool]:
    """The answer of the first, or that of the second where it comes sooner, and whether it is the second's.

    The other one is cancelled at once.

    Args:
        first: Asks.
        second: Asks somebody else.
        after_s: The second is asked when the first has said nothing for so long.
        turned_away: Whether an answer only says that the request was not taken up; then the other one is waited for.

    Raises:
        BackendError: Neither answered; the first one's.
    """
    asked = [asyncio.ensure_future(first())]
    winner: asyncio.Future[Answer] | None = None
    try:
        await asyncio.wait(asked, timeout=after_s)
        if not asked[0].done():
            asked.append(asyncio.ensure_future(second()))
        pending = set(asked)
        while pending and winner is None:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            good = [f for f in asked if f in done and f.exception() is None and not turned_away(f.result())]
            winner = good[0] if good else None
        if winner is None:  # neither took it up: a word of the upstream's own, where there is one
            winner = next((f for f in asked if f.exception() is None), asked[0])
        return winner.result(), winner is not asked[0]
    finally:
        await _drop([f for f in asked if f is not winner])


async def _drop(losers: Sequence[asyncio.Future[Answer]]) -> None:
    """Nobody works for nobody."""
    for loser in losers:
        loser.cancel()
    await asyncio.gather(*losers, return_exceptions=True)
    for loser in losers:
        if not loser.cancelled() and loser.exception() is None:
            loser.result().close()
