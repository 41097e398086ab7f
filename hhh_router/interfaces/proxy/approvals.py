"""Calls that wait for a person before an app may run them, and the webhooks of rules."""

from __future__ import annotations

import asyncio
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from hhh_router.errors import HHHRouterError
from hhh_router.interfaces.held import Asked, HeldCalls, default_queue
from hhh_router.interfaces.holding import Holding
from hhh_router.interfaces.webhook import Webhook
from hhh_router.pipeline.people import Concerned, Settled, told
from hhh_router.pipeline.situation import parsed_arguments
from hhh_router.trace.redact import Redactor
from hhh_router.types import Decision, ToolCall

_SHOWN = 256


class Approvals:
    """The queue of one sidecar and whoever is told; nothing is opened before it is needed.

    Args:
        path: The queue's file; None takes the one beside the audit.
        wait_s: How long a call waits; then it is denied.
        url: Is told of every call that is held; None where nobody is.
        secret: Signs what webhooks are told.
        redactor: Replaces secrets, which reach neither queue nor webhook.
    """

    def __init__(
        self,
        *,
        path: Path | None = None,
        wait_s: float,
        url: str | None = None,
        secret: SecretStr | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self._path = path
        self._wait_s = wait_s
        self._url = url
        self._secret = secret
        self._redactor = redactor or Redactor()

    def open(self) -> None:
        """Open the queue now, where a policy holds calls.

        Raises:
            SettingsError: It cannot be written, or is no queue.
        """
        _ = self._holding

    async def hold(self, call: ToolCall, decision: Decision, about: Concerned) -> Settled:
        """See `pipeline.people.Hold`. A call that cannot be held is not approved."""
        asked = Asked(
            door="sidecar",
            request_id=about.request_id,
            session=about.conversation,
            tool=call.name[:_SHOWN],
            arguments=_arguments(call),
            policy=about.policy,
            rule=decision.rule,
            reason=decision.reason,
        )
        try:
            await asyncio.to_thread(self.open)  # another process may hold the file for a moment
            found = await self._holding.hold(asked)
        except HHHRouterError as error:
            return Settled(is_approved=False, id=None, why=f"it could not be held: {error.message}")
        by = f" by {found.decided_by}" if found.decided_by else ""
        why = f"{found.status}{by}" if found.status in ("approved", "denied") else "nobody approved it in time"
        return Settled(is_approved=found.status == "approved", id=found.id, why=why, note=found.note)

    def tell(self, decision: Decision, about: Concerned) -> None:
        """See `pipeline.people.Tell`."""
        if decision.webhook is not None:
            self._webhook.tell(decision.webhook, told(decision, about))

    async def aclose(self) -> None:
        """Let what is told arrive."""
        if "_webhook" in self.__dict__:
            await self._webhook.aclose()

    @cached_property
    def _webhook(self) -> Webhook:
        return Webhook(self._secret, redactor=self._redactor)

    @cached_property
    def _holding(self) -> Holding:
        held = HeldCalls(self._path or default_queue(), redactor=self._redactor)
        return Holding(held, self._webhook, hold_s=self._wait_s, url=self._url)


def _arguments(call: ToolCall) -> Any:
    """As JSON, so that people see what is asked for; as they came where they are none."""
    found = parsed_arguments(call)
    return call.arguments if found is None else found
