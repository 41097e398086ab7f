"""The engine's own process: ``python -m hhh_router.model.process FD``, started by `hhh_router.model.supervisor`.

Messages are tuples whose first part is their name, pickled over a socket pair that only parent and child hold. In:
``chat``, ``read``, ``plan``, ``cancel``, ``close``. Out: ``ready`` or ``failed`` once, then ``event``, ``end``,
``scores``, ``plan?`` and ``beat``.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hhh_router.errors import GeneratorError, HHHRouterError, ReaderError
from hhh_router.model.engine import Ticket
from hhh_router.protocols import Event
from hhh_router.types import ChatRequest, Plan, ReadRequest, Scores

BEAT_S = 1.0
"""Between two signs of life."""
_PLAN_S = 30.0  # a planner takes microseconds; past this the parent is in trouble


class _Served:
    """The child's side: hands work to the engine and what comes of it to the parent."""

    def __init__(self, connection: Connection, worker: Any) -> None:
        self._connection = connection
        self._worker = worker
        self._outbox: queue.SimpleQueue[tuple[object, ...]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._plans: dict[int, queue.SimpleQueue[Plan | Exception]] = {}

    def run(self) -> None:
        """Until the parent closes, or is gone."""
        for target in (self._deliver, self._beat):
            threading.Thread(target=target, daemon=True).start()
        while True:
            try:
                name, *given = self._connection.recv()
            except (EOFError, OSError):  # the parent is gone, so nobody waits for anything
                return
            if name == "close":
                self._worker.close()
                return
            getattr(self, f"_{name}")(*given)

    def _chat(self, number: int, request: ChatRequest, window_tokens: int) -> None:
        plans: queue.SimpleQueue[Plan | Exception] = queue.SimpleQueue()
        self._plans[number] = plans

        def planner(scores: Scores) -> Plan:
            self._send("plan?", number, scores)
            try:
                plan = plans.get(timeout=_PLAN_S)
            except queue.Empty as error:
                raise GeneratorError(f"no plan came within {_PLAN_S:g} s") from error
            if isinstance(plan, Exception):
                raise plan
            return plan

        def tell(event: Event) -> None:
            self._send("event", number, event)

        def end(error: Exception | None) -> None:
            self._over(number)
            self._send("end", number, _sendable(error, GeneratorError) if error else None)

        self._tickets[number] = self._worker.chat(
            request, planner, window_tokens=window_tokens, tell=tell, end=end
        )  # fmt: skip

    def _read(self, number: int, requests: Sequence[ReadRequest]) -> None:
        def end(found: list[Scores] | Exception) -> None:
            self._over(number)
            self._send("scores", number, _sendable(found, ReaderError) if isinstance(found, Exception) else found)

        self._tickets[number] = self._worker.read(requests, end)

    def _plan(self, number: int, plan: Plan | Exception) -> None:
        if waiting := self._plans.get(number):
            waiting.put(plan)

    def _cancel(self, number: int) -> None:
        if ticket := self._tickets.get(number):
            ticket.cancel()
            self._over(number)

    def _over(self, number: int) -> None:
        self._tickets.pop(number, None)
        self._plans.pop(number, None)

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(BEAT_S):
            self._send("beat", self._worker.load, self._worker.turn_s)

    def _send(self, *message: object) -> None:
        self._outbox.put(message)

    def _deliver(self) -> None:
        """On a thread of its own: a parent that is slow to receive must hold up neither a step nor what it sends us."""
        while True:
            try:
                self._connection.send(self._outbox.get())
            except OSError:
                os._exit(0)  # the parent is gone


def _sendable(error: Exception, kind: Callable[..., HHHRouterError]) -> HHHRouterError:
    """Errors of ours as they are, without what caused them; any other one by its name and words."""
    if not isinstance(error, HHHRouterError):
        return kind(f"{type(error).__name__}: {error}")
    error.__cause__ = error.__context__ = None
    return error


def serve(fd: int) -> None:
    """Load what the first message names, and serve the parent until it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us, after it has drained
    connection = Connection(fd)
    root, settings = connection.recv()
    try:
        from hhh_router.bundle import Bundle
        from hhh_router.model.worker import load_embedded

        model = load_embedded(Bundle.load(str(Path(root))), settings)
    except Exception as error:
        connection.send(("failed", _sendable(error, GeneratorError)))
        return
    connection.send(("ready", model.description))
    _Served(connection, model.engine).run()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # the model's thread may be in the middle of a turn that nobody wants any more
