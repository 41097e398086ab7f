"""An `Engine` in a process of its own, started again when it dies.

What a native crash, an out-of-memory kill or a stuck kernel takes with it is one process: every reply under way ends
with an error, and what comes next is answered by the next process. No torch is imported here.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from hhh_router.bundle import Bundle
from hhh_router.errors import GeneratorError, HHHRouterError, MissingExtra, Unavailable
from hhh_router.model.engine import EmbeddedModel, EndChat, EndRead, ReadStep, TellEvent, Ticket
from hhh_router.model.quarantine import Quarantine, chat_digest, read_digest
from hhh_router.protocols import Load, Planner, Steerer
from hhh_router.settings import Settings
from hhh_router.types import ChatRequest, ReadRequest

_log = logging.getLogger(__name__)
_SECRETS = frozenset(
    {
        f"HHH_ROUTER_{name.upper()}"
        for name, field in Settings.model_fields.items()
        if field.annotation == SecretStr | None
    }
    | {"PGPASSWORD"}
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0
_STEADY_S = 60.0  # a process that lived so long may be replaced at once
_SILENT_S = 60.0  # no sign of life for so long: it is stopped or starved
_START_S = 900.0  # for loading a model from a slow disk
_POLL_S = 0.02
_END_S = 10.0


@dataclass(slots=True, eq=False)
class _Work:
    """One piece of work that a child has, or that is held back."""

    number: int
    digest: str
    message: tuple[Any, ...]
    end: Any
    tell: TellEvent | None = None
    planner: Planner | None = None
    steer: Steerer | None = None


@dataclass(slots=True, eq=False)
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection
    born: float = field(default_factory=time.monotonic)
    beat: float = field(default_factory=time.monotonic)
    load: Load = field(default_factory=Load)
    sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, *message: object) -> None:
        """Errors are left to the thread that receives: it sees the end of the process."""
        with self.sending:
            try:
                self.connection.send(message)
            except OSError:
                _log.debug("the engine's process is gone; a message was not sent")


class Supervisor:
    """Starts the engine's process, hands it work, and replaces it when it dies. An `Engine`."""

    def __init__(self, root: Path, settings: Settings) -> None:
        """Start the first process and wait until the model is loaded.

        Raises:
            HHHRouterError: What went wrong there.
        """
        self._root = root
        self._settings = settings.model_copy(update={"api_key": None, "upstream_api_key": None})
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._work: dict[int, _Work] = {}
        self._quarantine = Quarantine()
        self._refusal: str | None = None  # what new work is told, once none is taken
        self._draining = self._closed = False
        self._deaths = 0
        self._load_s = 10.0
        self.description: dict[str, Any] = {}
        self._starting: _Child | None = None
        self._child: _Child | None = self._start()
        self._watch(self._child)

    @property
    def load(self) -> Load:
        """See `hhh_router.model.engine.Engine.load`."""
        child = self._child
        if self._draining or self._closed:
            return changed(child.load if child else Load(), state="draining")
        return child.load if child else Load(state="starting", wait_s=self._load_s)

    @property
    def pid(self) -> int | None:
        """Of the process; None while none runs."""
        child = self._child
        return child.process.pid if child else None

    def read(self, requests: Sequence[ReadRequest], end: EndRead) -> Ticket:
        """See `hhh_router.model.engine.Engine.read`."""
        number = next(self._numbers)
        return self._put(_Work(number, read_digest(requests), ("read", number, requests), end))

    def read_on(self, step: ReadStep, end: EndRead) -> Ticket:
        """See `hhh_router.model.engine.Engine.read_on`; a process that was started again knows no session."""
        number = next(self._numbers)
        return self._put(_Work(number, step.digest, ("read_on", number, step), end))

    def close_session(self, session: str) -> None:
        """See `hhh_router.model.engine.Engine.close_session`."""
        with self._lock:
            if self._child is not None:
                self._child.send("close_session", session)

    def chat(
        self,
        request: ChatRequest,
        planner: Planner,
        *,
        window_tokens: int,
        tell: TellEvent,
        end: EndChat,
        steer: Steerer | None = None,
    ) -> Ticket:
        """See `hhh_router.model.engine.Engine.chat`."""
        number = next(self._numbers)
        sent = changed(request, passthrough={})  # not the model's business
        message = ("chat", number, sent, window_tokens, steer is not None)
        return self._put(_Work(number, chat_digest(sent), message, end, tell, planner, steer))

    def drain(self, timeout_s: float) -> bool:
        """See `hhh_router.model.engine.Engine.drain`."""
        with self._lock:
            self._draining = True
            self._refusal = self._refusal or "the engine is shutting down"
        until = time.monotonic() + timeout_s
        while self._work:
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """See `hhh_router.model.engine.Engine.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._refusal = "the engine was closed"
            child, self._child = self._child, None
            lost = list(self._work.values())
            self._work.clear()
        for work in lost:
            work.end(Unavailable("the engine was closed", hint="open a new router"))
        if child is None and self._starting is not None:
            self._starting.process.kill()  # it is loading the model, and would only find out at the end
            self._starting.process.wait(_END_S)
        if child is not None:
            child.send("close")
            _wait(child)  # the thread that receives from it closes the connection: two would close it twice

    # -- work ---------------------------------------------------------------------------------------------------------

    def _put(self, work: _Work) -> Ticket:
        refusal: HHHRouterError | None = None
        with self._lock:
            if self._refusal is not None:
                refusal = Unavailable(self._refusal, hint="ask another one")
            elif self._child is None:
                refusal = self._restarting("the engine is starting again")
            else:
                self._work[work.number] = work
                try:
                    self._quarantine.admit(work.digest, lambda: self._hand_over(work))
                except HHHRouterError as error:
                    del self._work[work.number]
                    refusal = error
        if refusal is not None:
            work.end(refusal)
        return _Ticket(self, work)

    def _hand_over(self, work: _Work) -> None:
        if self._child is not None and work.number in self._work:
            self._child.send(*work.message)
        else:
            self._quarantine.ended(work.digest, cancelled=True)

    def cancel(self, work: _Work) -> None:
        """Nobody waits for this any more."""
        with self._lock:
            if self._work.pop(work.number, None) is None:
                return
            if self._child is not None:
                self._child.send("cancel", work.number)
            self._quarantine.ended(work.digest, cancelled=True)

    def _over(self, number: int) -> _Work | None:
        with self._lock:
            if (work := self._work.pop(number, None)) is not None:
                self._quarantine.ended(work.digest)
            return work

    # -- what the process says ----------------------------------------------------------------------------------------

    def _receive(self, child: _Child) -> None:
        while True:
            try:
                name, *given = child.connection.recv()
            except (EOFError, OSError):
                break
            child.beat = time.monotonic()
            match name:
                case "event":
                    self._tell(*given)
                case "plan?" | "steer?":
                    self._answer(child, name, *given)
                case "end" | "scores":
                    if (work := self._over(given[0])) is not None:
                        work.end(given[1])
                case "beat":
                    child.load = given[0]
                    if given[1] > self._settings.engine_stuck_s:
                        _log.error("the engine has been at one step for %.0f s; it is stopped", given[1])
                        child.process.kill()
        self._lost(child)

    def _tell(self, number: int, event: Any) -> None:
        if (work := self._work.get(number)) is None or work.tell is None:
            return
        try:
            work.tell(event)
        except Exception as error:  # the caller has left, or does not read
            self.cancel(work)
            work.end(error)

    def _answer(self, child: _Child, question: str, number: int, *given: Any) -> None:
        """Ask planner or steerer: the model waits. On this thread, so that a busy event loop does not hold it up."""
        work = self._work.get(number)
        try:
            asked: Any = None if work is None else work.planner if question == "plan?" else work.steer
            if asked is None:
                raise GeneratorError("the caller has left")
            child.send("answer", number, asked(*given))
        except Exception as error:  # a seam: the planner's fault ends its own request
            kept = error if isinstance(error, HHHRouterError) else GeneratorError(f"{type(error).__name__}: {error}")
            child.send("answer", number, kept)

    def _look(self, child: _Child) -> None:
        """End a process that gives no sign of life."""
        while self._child is child:
            if time.monotonic() - child.beat > _SILENT_S:
                _log.error("the engine gave no sign of life for %.0f s; it is stopped", _SILENT_S)
                child.process.kill()
                return
            time.sleep(1.0)

    # -- life and death -----------------------------------------------------------------------------------------------

    def _start(self) -> _Child:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k not in _SECRETS}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "hhh_router.model.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        child = self._starting = _Child(process, Connection(ours.detach()))
        if self._closed:  # in the meantime
            process.kill()
        child.send(self._root, self._settings)
        try:
            if not child.connection.poll(_START_S):
                process.kill()
            name, said = child.connection.recv()
        except (EOFError, OSError) as error:
            how = _how(_end(child))
            raise GeneratorError(f"the engine's process stopped while loading ({how})") from error
        if name == "failed":
            _end(child)
            raise said
        self.description = said
        self._load_s = time.monotonic() - child.born
        child.born = child.beat = time.monotonic()
        return child

    def _watch(self, child: _Child) -> None:
        for target in (self._receive, self._look):
            threading.Thread(target=target, args=(child,), name="hhh-router-engine", daemon=True).start()

    def _lost(self, child: _Child) -> None:
        """The process is gone: end what it had, and start another."""
        how = _how(_end(child))
        with self._lock:
            if self._closed or self._child is not child:
                return
            self._child = None
            lost = list(self._work.values())
            self._work.clear()
            self._quarantine.forget_held()
            self._quarantine.crashed({w.digest for w in lost})
            self._deaths = self._deaths + 1 if time.monotonic() - child.born < _STEADY_S else 1
        _log.error("the engine stopped (%s) with %d requests under way", how, len(lost))
        for work in lost:
            work.end(self._restarting(f"the engine stopped ({how})"))
        threading.Thread(target=self._start_again, name="hhh-router-restart", daemon=True).start()

    def _start_again(self) -> None:
        while not self._closed:
            time.sleep(min(_FIRST_PAUSE_S * 2 ** (self._deaths - 1), _LONGEST_PAUSE_S))
            if self._closed:
                return
            try:
                child = self._start()
            except HHHRouterError as error:
                self._deaths += 1
                _log.error("the engine did not start: %s", error.message)
                continue
            with self._lock:
                if not self._closed:
                    self._child = child
                    self._watch(child)
                    return
            _end(child)

    def _restarting(self, message: str) -> Unavailable:
        wait = self._load_s + min(_FIRST_PAUSE_S * 2**self._deaths, _LONGEST_PAUSE_S)
        return Unavailable(message, hint=f"try again in {wait:.0f} s", retry_after_s=wait)


class _Ticket:
    def __init__(self, supervisor: Supervisor, work: _Work) -> None:
        self._supervisor = supervisor
        self._work = work

    def cancel(self) -> None:
        self._supervisor.cancel(self._work)


def _wait(child: _Child) -> int:
    """Wait for the process to end, by force if need be; its exit status."""
    try:
        return child.process.wait(_END_S if child.process.poll() is None else 0)
    except subprocess.TimeoutExpired:
        child.process.kill()
        return child.process.wait()


def _end(child: _Child) -> int:
    """Wait for the process to end and close its connection: for the one thread that receives from it."""
    status = _wait(child)
    with child.sending:
        child.connection.close()
    return status


def _how(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def open_supervised(bundle: Bundle, settings: Settings) -> EmbeddedModel:
    """A bundle's model in a process of its own, ready to read and to answer.

    Raises:
        BundleError: Anything missing, corrupt or made for another backbone.
        GeneratorError: The process died while loading.
        MissingExtra: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("model", needed_for="the embedded model")
    supervisor = Supervisor(bundle.root, settings)
    return EmbeddedModel(engine=supervisor, description=supervisor.description)
