"""Holding a call at a door: into the queue, told of, waited for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from hhh_router.interfaces.held import Asked, HeldCall, HeldCalls
from hhh_router.interfaces.webhook import Webhook

_log = logging.getLogger(__name__)

BEAT_S = 5.0
"""While a call is held, whoever asked for it hears so often that it still is."""


class Holding:
    """What a door needs to hold calls.

    Args:
        held: The queue.
        webhook: Tells of calls and decisions.
        hold_s: How long a call waits.
        url: Is told of every call that is held; None where nobody is.
    """

    def __init__(self, held: HeldCalls, webhook: Webhook, *, hold_s: float, url: str | None = None) -> None:
        self._held = held
        self.webhook = webhook
        self._hold_s = hold_s
        self._url = url

    async def hold(self, asked: Asked, *, beat: Callable[[HeldCall, int], Awaitable[None]] | None = None) -> HeldCall:
        """The call once it waits no longer. Only ``approved`` lets it run.

        Args:
            asked: The call.
            beat: Awaited at once and every `BEAT_S` seconds while it waits, with a number that grows from 1.

        Raises:
            InvalidRequest: It is too large to be held.
            Unavailable: The queue cannot be used.
        """
        call = await self._held.put(asked, wait_s=self._hold_s)
        _log.warning("call of %s is held: hhh-router queue approve %s", asked.tool, call.id)
        if self._url is not None:
            self.webhook.tell(self._url, {"event": "held", "call": call.as_json()})
        beats = None if beat is None else asyncio.ensure_future(_beat(beat, call))
        try:
            return await self._held.wait(call)
        finally:
            if beats is not None:
                beats.cancel()
                await asyncio.gather(beats, return_exceptions=True)


async def _beat(beat: Callable[[HeldCall, int], Awaitable[None]], call: HeldCall) -> None:
    n = 1
    while True:
        await beat(call, n)
        await asyncio.sleep(BEAT_S)
        n += 1
