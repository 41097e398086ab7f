"""What the audit keeps of one request: the intent before its first byte leaves, the outcome after its last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from hhh_router.errors import BackendError
from hhh_router.trace.audit import Audit
from hhh_router.types import Message

_log = logging.getLogger(__name__)

Keep = Callable[[Sequence[Message], str | None], Mapping[str, Any]]
"""Makes of a conversation and its answer what a record keeps of them."""


class Entry:
    """One request in the audit.

    Args:
        audit: Where it is kept.
        request_id: Names it.
        on_failure: What holds when it cannot be kept: nothing leaves, or it goes on without.
        keep: Keeps texts too; None keeps hashes alone.
    """

    def __init__(
        self, audit: Audit, request_id: str, on_failure: Literal["closed", "open"], keep: Keep | None = None
    ) -> None:
        self._audit = audit
        self._request_id = request_id
        self._on_failure = on_failure
        self._keep = keep
        self._heard: tuple[Sequence[Message], Callable[[], str]] | None = None
        self._intent: asyncio.Future[None] | None = None
        self.outcome: dict[str, Any] = {}
        """What is known of how it went, beside what every outcome tells."""

    def begin(self, intent: Mapping[str, Any]) -> None:
        """Begin to store the intent, while the upstream is asked; `stored` waits for it."""
        self._intent = asyncio.ensure_future(self._audit.write("intent", self._request_id, intent))

    def hear(self, messages: Sequence[Message], answer: Callable[[], str]) -> None:
        """Remember what is said, for deployments that keep it; ``answer`` is asked at the end. The last one counts."""
        self._heard = messages, answer

    async def stored(self) -> None:
        """Return when a byte may leave.

        Raises:
            Unavailable: The intent could not be stored, and the deployment does not go on without.
        """
        if self._intent is None:
            return  # a mistake that was found before anything was asked
        try:
            await self._intent
        except BackendError as error:
            self._intent = None
            if self._on_failure == "closed":
                raise
            _log.warning("%s: goes on without an intent: %s", self._request_id, error.message)

    async def end(self, told: Mapping[str, Any]) -> None:
        """Store the outcome of what had an intent. Nothing is raised: the answer has left."""
        if self._intent is None:
            return
        try:
            await self._intent
            await self._audit.write("outcome", self._request_id, {**told, **self._content(), **self.outcome})
        except BackendError as error:
            _log.error("%s: outcome not stored: %s", self._request_id, error.message)

    def _content(self) -> dict[str, Any]:
        if self._keep is None or self._heard is None:
            return {}
        messages, answer = self._heard
        return {"content": self._keep(messages, answer() or None)}
