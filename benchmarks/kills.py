"""A sidecar that is killed again and again: whatever a client got the head of, the audit knows of."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loopback import PATH, process
from hhh_router.trace.audit import SqliteAudit, Verified, read_rows, verify

CALLERS = 4
WAIT_S = 20.0
EARLIEST_S, LATEST_S = 0.1, 0.8
"""Of the kill, after the sidecar listens."""
_BODY = json.dumps(
    {"model": "stub", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "user": "4:5"}
).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """What was found after the last kill."""

    kills: int
    heads: int
    """Answers whose head reached a client."""
    without_intent: int
    """Of those, answers that the audit does not know of: there may be none."""
    chain: Verified
    """Once the intents without an outcome were marked."""


def kill_often(folder: Path, *, kills: int, seed: int, on_kill: Callable[[], None] = lambda: None) -> Killed:
    """Start a sidecar in ``enforce``, ask it on several connections, kill it at a random moment; and so on.

    Args:
        folder: The audit is made there.
        kills: How often.
        seed: Draws the moments.
        on_kill: Called after each.
    """
    audit, draw = folder / "audit.sqlite3", random.Random(seed)
    heads: set[str] = set()
    with process("upstream") as (port, _):
        url = f"http://127.0.0.1:{port}/v1"
        for _ in range(kills):
            with process("sidecar", url, "enforce", "--audit", str(audit)) as (door, pid):
                stop = threading.Event()
                callers = [threading.Thread(target=_keep_asking, args=(door, heads, stop)) for _ in range(CALLERS)]
                for caller in callers:
                    caller.start()
                time.sleep(draw.uniform(EARLIEST_S, LATEST_S))
                os.kill(pid, signal.SIGKILL)
                stop.set()
                for caller in callers:
                    caller.join(WAIT_S)
            on_kill()
    asyncio.run(SqliteAudit(audit).aclose())  # a start marks what a crash interrupted
    known = {row.request_id for row in read_rows(audit) if row.kind == "intent"}
    return Killed(kills=kills, heads=len(heads), without_intent=len(heads - known), chain=verify(audit))


def _keep_asking(port: int, heads: set[str], stop: threading.Event) -> None:
    while not stop.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        try:
            connection.request("POST", PATH, _BODY, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            heads.add(str(answer.getheader("x-hhh-request-id")))
            answer.read()
        except (OSError, http.client.HTTPException):
            return
        finally:
            connection.close()
