"""The engine's own process: ``python -m hhh_router.model.process FD``, started by `hhh_router.model.supervisor`.

Messages are tuples whose first part is their name, pickled over a socket pair that only parent and child hold. In:
``chat``, ``read``, ``read_on``, ``close_session``, ``answer``, ``cancel``, ``close``. Out: ``ready`` or ``failed``
once, then ``event``, ``end``, ``scores``, ``plan?``, ``steer?`` and ``beat``.
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
from hhh_router.model.engine import EndRead, ReadStep, Ticket
from hhh_router.protocols import Event
from hhh_router.types import ChatRequest, Plan, ReadRequest, Scores, Weights

BEAT_S = 1.0
"""Between two signs of life."""
_ANSWER_S = 30.0  # a planner takes microseconds; past this the parent is in trouble


class _Served:
    """The child's side: hands work to the engine and what comes of it to the parent."""

    def __init__(self, connection: Connection, worker: Any) -> None:
        self._connection = connection
        self._worker = worker
        self._outbox: queue.SimpleQueue[tuple[object, ...]] = queue.SimpleQueue()
        self._open = threading.Lock()
        self._tickets: dict[int, Ticket | None] = {}
        """Of what is under way; None while it is handed over."""
        self._answers: dict[int, queue.SimpleQueue[Any]] = {}

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

    def _chat(self, number: int, request: ChatRequest, window_tokens: int, steers: bool) -> None:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers[number] = answers
        self._tickets[number] = None

        def ask(question: str, *given: object) -> Any:
            self._send(question, number, *given)
            try:
                answer = answers.get(timeout=_ANSWER_S)
            except queue.Empty as error:
                raise GeneratorError(f"no answer to {question} came within {_ANSWER_S:g} s") from error
            if isinstance(answer, Exception):
                raise answer
            return answer

        def planner(scores: Scores) -> Plan:
            plan: Plan = ask("plan?", scores)
            return plan

        def steer(scores: Scores, logprobs: Sequence[float]) -> Weights | None:
            weights: Weights | None = ask("steer?", scores, tuple(logprobs))
            return weights

        def tell(event: Event) -> None:
            self._send("event", number, event)

        def end(error: Exception | None) -> None:
            self._over(number)
            self._send("end", number, _sendable(error, GeneratorError) if error else None)

        self._taken(
            number,
            self._worker.chat(
                request, planner, window_tokens=window_tokens, tell=tell, end=end, steer=steer if steers else None
            ),
        )

    def _read(self, number: int, requests: Sequence[ReadRequest]) -> None:
        self._scored(number, lambda end: self._worker.read(requests, end))

    def _read_on(self, number: int, step: ReadStep) -> None:
        self._scored(number, lambda end: self._worker.read_on(step, end))

    def _close_session(self, session: str) -> None:
        self._worker.close_session(session)

    def _scored(self, number: int, start: Callable[[EndRead], Ticket]) -> None:
        def end(found: list[Scores] | Exception) -> None:
            self._over(number)
            self._send("scores", number, _sendable(found, ReaderError) if isinstance(found, Exception) else found)

        self._tickets[number] = None
        self._taken(number, start(end))

    def _taken(self, number: int, ticket: Ticket) -> None:
        """Remember work, unless it came to its end while it was handed over."""
        with self._open:
            if number in self._tickets:
                self._tickets[number] = ticket

    def _answer(self, number: int, answer: Any) -> None:
        if (waiting := self._answers.get(number)) is not None:
            waiting.put(answer)

    def _cancel(self, number: int) -> None:
        if ticket := self._tickets.get(number):
            ticket.cancel()
            self._over(number)

    def _over(self, number: int) -> None:
        with self._open:
            self._tickets.pop(number, None)
        self._answers.pop(number, None)

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
        _send_first(connection, "failed", _sendable(error, GeneratorError))
        return
    if _send_first(connection, "ready", model.description):
        _Served(connection, model.engine).run()


def _send_first(connection: Connection, *message: object) -> bool:
    """False where the parent went while the model was loaded."""
    try:
        connection.send(message)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    serve(int(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # the model's thread may be in the middle of a turn that nobody wants any more
