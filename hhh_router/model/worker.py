"""The only thread that touches the model: an `Engine` in this process.

The thread takes turns: one batch of texts that are only to be read, or of answers that are read while they grow, then
one decode step of all replies under way, so that a guard call waits for a step, not for a chat.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError, GeneratorError, Overloaded, ReaderError, Unavailable
from hhh_router.model.base import compute_dtype, load_backbone
from hhh_router.model.batcher import Batcher
from hhh_router.model.encode import Encoder
from hhh_router.model.engine import EmbeddedModel, EndChat, EndRead, ReadStep, TellEvent, Ticket
from hhh_router.model.experts import load_experts
from hhh_router.model.fetch import fetch_backbone
from hhh_router.model.heads import Heads
from hhh_router.model.int8 import check_int8
from hhh_router.model.memory import free_bytes
from hhh_router.model.mixture import Skip
from hhh_router.model.quantisation import require_record
from hhh_router.model.reader import HeadReader
from hhh_router.model.reads import ReadJob, Reads
from hhh_router.model.rows import ChatJob
from hhh_router.model.serving import install_serving
from hhh_router.model.sessions import CloseSession, Sessions, StepJob
from hhh_router.model.skipping import require_skipping
from hhh_router.protocols import Load, Planner, Steerer
from hhh_router.settings import Settings
from hhh_router.types import ChatRequest, ReadRequest

_log = logging.getLogger(__name__)
_POLL_S = 0.02  # between looks whether a draining engine is idle
_ARRIVING = 4096  # pieces of work that may come in while a turn runs
_Job = ReadJob | StepJob | ChatJob
_END_S = 30  # for a turn to end when the thread is to stop


class Worker:
    """Runs reads and replies on one thread, a turn each. See `hhh_router.model.engine.Engine`."""

    def __init__(self, reads: Reads, sessions: Sessions, batcher: Batcher, *, name: str = "hhh-router-model") -> None:
        """Start the thread.

        Args:
            reads: Texts to be scored.
            sessions: Answers of others that are read while they grow.
            batcher: Replies under way.
            name: Of the thread.
        """
        self._reads = reads
        self._sessions = sessions
        self._batcher = batcher
        self._by_turns: tuple[Reads | Sessions, Reads | Sessions] = (sessions, reads)
        self._inbox: queue.SimpleQueue[_Job | CloseSession | None] = queue.SimpleQueue()
        self._open = threading.Lock()
        self._refusal: str | None = None  # what new work is told, once none is taken
        self._put_in = self._taken_out = 0  # of the inbox
        self._turning = False
        self._began = 0.0
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        """How busy it is; read from any thread, so a moment old."""
        state = "draining" if self._refusal else "ready"
        waiting = self._reads.waiting + self._sessions.waiting
        return replace(self._batcher.load, waiting_texts=waiting, state=state)

    def read(self, requests: Sequence[ReadRequest], end: EndRead) -> Ticket:
        """See `hhh_router.model.engine.Engine.read`."""
        job = ReadJob(requests=requests, end=end)
        self._put(job)
        return job

    def read_on(self, step: ReadStep, end: EndRead) -> Ticket:
        """See `hhh_router.model.engine.Engine.read_on`."""
        job = StepJob(step=step, end=end)
        self._put(job)
        return job

    def close_session(self, session: str) -> None:
        """See `hhh_router.model.engine.Engine.close_session`."""
        with self._open:
            self._put_in += 1
            self._inbox.put(CloseSession(session))  # never turned away: it makes room

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
        job = ChatJob(request=request, planner=planner, window_tokens=window_tokens, tell=tell, end=end, steer=steer)
        self._put(job)
        return job

    def drain(self, timeout_s: float) -> bool:
        """See `hhh_router.model.engine.Engine.drain`."""
        with self._open:
            self._refusal = self._refusal or "the engine is shutting down"
        end = time.monotonic() + timeout_s
        while self._turning or self._taken_out < self._put_in:
            if time.monotonic() > end or not self._thread.is_alive():
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """End the thread after the turn it is in; work still open fails."""
        self._inbox.put(None)
        self._thread.join(_END_S)

    @property
    def turn_s(self) -> float:
        """Seconds since the turn under way began; 0 where none is."""
        began = self._began
        return time.monotonic() - began if began else 0.0

    def _put(self, job: _Job) -> None:
        with self._open:
            if self._refusal is None and self._inbox.qsize() < _ARRIVING:
                self._put_in += 1
                self._inbox.put(job)
                return
        if self._refusal is None:
            job.end(Overloaded("more arrives than can be looked at", hint="try again", retry_after_s=1.0))
        else:
            job.end(Unavailable(self._refusal, hint="ask another one"))

    def _serve(self) -> None:
        while True:
            try:
                while True:
                    self._turning = self._reads.busy or self._sessions.busy or self._batcher.busy
                    job = self._inbox.get(block=not self._turning)
                    self._turning = True
                    if job is None:
                        self._end()
                        return
                    self._taken_out += 1
                    self._take(job)
            except queue.Empty:
                pass
            self._began = time.monotonic()
            try:
                self._read()
                self._batcher.turn()
            except Exception as error:  # a fault of ours, not of one request: end what is open and go on from nothing
                _log.exception("the engine failed; everything under way is lost")
                lost = f"the engine failed: {type(error).__name__}: {error}"
                self._reads.close(ReaderError(lost))
                self._sessions.close(ReaderError(lost))
                self._batcher.close(GeneratorError(lost))
            self._began = 0.0

    def _read(self) -> None:
        """One batch of texts or of growing answers, by turns, so that a step of the replies waits for no more."""
        first, second = self._by_turns
        if first.busy:
            self._by_turns = (second, first)
            first.turn()
        else:
            second.turn()

    def _take(self, job: _Job | CloseSession) -> None:
        match job:
            case ReadJob():
                self._reads.put(job)
            case StepJob():
                self._sessions.put(job)
            case CloseSession():
                self._sessions.close_session(job.session)
            case ChatJob():
                self._batcher.put(job)

    def _end(self) -> None:
        """End what is under way and what has arrived since."""
        with self._open:
            self._refusal = "the engine was closed"
        closed = Unavailable(self._refusal, hint="open a new router")
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                self._taken_out += 1
                self._take(job)
        self._reads.close(closed)
        self._sessions.close(closed)
        self._batcher.close(closed)
        self._turning = False


def open_reader(bundle: Bundle, settings: Settings) -> tuple[HeadReader, Encoder]:
    """Fetch and load a bundle's backbone with its heads, on the calling thread and without experts.

    Raises:
        BundleError: Anything missing, corrupt or made for another backbone.
    """
    manifest = bundle.manifest
    if manifest.heads is None:
        raise BundleError(f"{bundle.root}: has no heads, so nothing can be routed", hint="hhh-router train router")
    torch.set_num_threads(settings.threads)
    folder = fetch_backbone(manifest.backbone, settings.cache_dir, root=bundle.root)
    dtype = compute_dtype(manifest.backbone, settings.device, settings.dtype)
    backbone = load_backbone(folder, manifest.backbone, device=settings.device, dtype=dtype)
    stack = backbone.stack
    heads = Heads.load(
        bundle.root / manifest.heads.path, layers=len(manifest.heads.read_layers), dim=manifest.backbone.hidden_size
    ).to(stack.device)
    return HeadReader(stack, heads, manifest.heads.read_layers, manifest.first_adapted_layer), backbone.encoder


def load_embedded(bundle: Bundle, settings: Settings) -> EmbeddedModel:
    """Open a bundle's reader, put its experts on the backbone too, and start the model's thread.

    Raises:
        BundleError: Anything missing, corrupt or made for another backbone, or quantised weights or skipped experts
            without a record.
        SettingsError: Quantised weights cannot be used on this device, in this precision or with this torch.
    """
    # OpenMP keeps a team of threads for each thread that computes. Beside an idle team that loading has left, the
    # engine's own counts as too many for the cores, and sleeps between operations: on two cores reading 64 tokens took
    # twice as long. With the thread its team goes.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hhh-router-loading") as loading:
        return loading.submit(_load, bundle, settings).result()


def _load(bundle: Bundle, settings: Settings) -> EmbeddedModel:
    if settings.quantise != "none":  # before seconds of loading
        dtype = compute_dtype(bundle.manifest.backbone, settings.device, settings.dtype)
        check_int8(settings.device, dtype)
        require_record(bundle, settings.quantise, dtype)
    skip = None
    if settings.skip_experts:
        thresholds = require_skipping(bundle).thresholds
        skip = Skip(thresholds, bundle.manifest.first_adapted_layer, bundle.manifest.backbone.layers)
    reader, encoder = open_reader(bundle, settings)
    stack = reader.stack
    gates, phase = install_serving(stack.model, load_experts(bundle), settings.quantise, skip)
    batcher = Batcher(
        reader=reader,
        encoder=encoder,
        gates=gates,
        phase=phase,
        max_rows=settings.max_rows,
        max_tokens=settings.kv_tokens,
        prefix_tokens=settings.prefix_tokens,
        max_waiting=settings.max_waiting,
        max_waiting_tokens=settings.max_waiting_tokens,
        free_bytes=partial(free_bytes, stack.device),
    )
    waiting = 2 * settings.max_batch_items
    reads = Reads(reader, encoder, settings.guard_batch_tokens, max_waiting=waiting)
    sessions = Sessions(
        reader,
        encoder,
        reads.remembered,
        batch_tokens=settings.guard_batch_tokens,
        max_tokens=settings.session_tokens,
        max_waiting=waiting,
    )
    return EmbeddedModel(
        engine=Worker(reads, sessions, batcher),
        description={
            "layers": stack.depth,
            "first_adapted_layer": reader.first_adapted_layer,
            "read_layers": list(reader.read_layers),
            "dtype": reader.dtype,
            "context_tokens": encoder.context_tokens,
            "device": str(stack.device),
            "threads": settings.threads,
            "quantise": settings.quantise,
            "quantised_bytes": phase.added_bytes,
            "skip_below": list(skip.thresholds) if skip else None,
        },
    )
