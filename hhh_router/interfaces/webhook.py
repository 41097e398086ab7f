"""Telling a URL of a decision or a held call, signed, so that it can be sure who tells."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from pydantic import SecretStr

from hhh_router.trace.redact import Redactor

_log = logging.getLogger(__name__)

SIGNATURE = "x-hhh-signature"
"""``t=<seconds since 1970>,v1=<HMAC-SHA256 of "t.body", hex>``."""
TRIES = 3
TIMEOUT_S = 10.0
MOST_AT_ONCE = 100
_PAUSE_S = 0.5


def signature(secret: str, body: bytes, at: int) -> str:
    """The header's value.

    >>> signature("s", b"{}", 1)[:12]
    't=1,v1=b2536'
    """
    told = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={told}"


class Webhook:
    """Posts JSON beside the work: a URL that fails changes nothing, and nobody waits for it.

    Args:
        secret: Signs every body; without one they go unsigned.
        redactor: Replaces secrets before anything is told.
        clock: Seconds since 1970.
        transport: Of httpx, for tests.
        pause_s: Before the second try; doubled before each further one.
    """

    def __init__(
        self,
        secret: SecretStr | None,
        *,
        redactor: Redactor | None = None,
        clock: Callable[[], float] = time.time,
        transport: httpx.AsyncBaseTransport | None = None,
        pause_s: float = _PAUSE_S,
    ) -> None:
        self._secret = secret
        self._redactor = redactor or Redactor()
        self._clock = clock
        self._pause_s = pause_s
        self._client = httpx.AsyncClient(timeout=TIMEOUT_S, transport=transport)
        self._tasks: set[asyncio.Task[None]] = set()
        self.failures = 0
        """Messages that did not arrive."""

    def tell(self, url: str, message: Mapping[str, Any]) -> None:
        """Begin to post a message."""
        if len(self._tasks) >= MOST_AT_ONCE:
            self.failures += 1
            _log.warning("webhook: %d messages are under way, one was left out", len(self._tasks))
            return
        body = json.dumps(self._redactor.value(message)).encode()
        task = asyncio.get_running_loop().create_task(self._post(url, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self, timeout_s: float = 5.0) -> None:
        """Let what is under way arrive, for so long, and close."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._client.aclose()

    async def _post(self, url: str, body: bytes) -> None:
        headers = {"content-type": "application/json"}
        if self._secret is not None:
            headers[SIGNATURE] = signature(self._secret.get_secret_value(), body, int(self._clock()))
        said = ""
        for tried in range(TRIES):
            if tried:
                await asyncio.sleep(self._pause_s * 2 ** (tried - 1))
            try:
                response = await self._client.post(url, content=body, headers=headers)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                said = type(error).__name__
                continue
            if response.is_success:
                return
            said = f"status {response.status_code}"
            if response.status_code < 500 and response.status_code != 429:
                break
        self.failures += 1
        _log.warning("webhook: a message did not arrive at %s (%s)", httpx.URL(url).host, said)
