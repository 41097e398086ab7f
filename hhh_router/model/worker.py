"""The only thread that touches the model, and the asynchronous faces of reader and generator in front of it.

The thread takes turns: one batch of texts that are only to be read, then one decode step of all replies under way, so
that a guard call waits for a step, not for a chat.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch

from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError, GeneratorError, HHHRouterError, Overloaded, ReaderError
from hhh_router.model.base import compute_dtype, load_backbone
from hhh_router.model.batcher import Batcher, ChatJob, Load
from hhh_router.model.encode import Encoder
from hhh_router.model.experts import load_experts
from hhh_router.model.fetch import fetch_backbone
from hhh_router.model.heads import Heads
from hhh_router.model.mixture import install_mixture
from hhh_router.model.reader import HeadReader
from hhh_router.model.reads import ReadJob, Reads
from hhh_router.protocols import Event, Planner
from hhh_router.settings import Settings
from hhh_router.types import ChatRequest, ReadRequest, Scores

_UNREAD_EVENTS = 4096  # a caller that far behind is not reading; its reply would pile up in memory


class Worker:
    """Runs reads and replies on one thread, a turn each."""

    def __init__(
        self, reads: Reads, batcher: Batcher, *, max_waiting: int = 256, name: str = "hhh-router-model"
    ) -> None:
        """Start the thread.

        Args:
            reads: Texts to be scored.
            batcher: Replies under way.
            max_waiting: Chats that may wait for a row; one more is turned away.
            name: Of the thread.
        """
        self._reads = reads
        self._batcher = batcher
        self._max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[ReadJob | ChatJob | None] = queue.SimpleQueue()
        self._open = threading.Lock()
        self._accepts = True
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        """How busy the replies' part is; read from any thread, so a moment old."""
        return self._batcher.load

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        """Score texts, in order.

        Raises:
            ContextTooLong, InvalidRequest: A text cannot be read as it stands.
            ReaderError: The reading failed, or the model was closed.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[Scores]] = loop.create_future()

        def settle(found: list[Scores] | Exception) -> None:
            if done.done():
                return
            if isinstance(found, Exception):
                done.set_exception(found)
            else:
                done.set_result(found)

        job = ReadJob(requests=requests, end=lambda found: _call(loop, settle, found))
        self._put(job, ReaderError)
        try:
            return await done
        finally:
            job.cancelled = True

    async def chat(self, request: ChatRequest, planner: Planner, *, window_tokens: int) -> AsyncGenerator[Event, None]:
        """The events of one reply; closing the stream frees its row before the next step.

        Raises:
            ContextTooLong, InvalidRequest: The prompt cannot be answered as it stands.
            Overloaded: Too many chats wait already.
            GeneratorError: The reply failed, or nobody read it.
        """
        if (waiting := self._batcher.load.waiting) >= self._max_waiting:
            raise Overloaded(f"{waiting} chats are waiting", hint="try again in a moment")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def tell(event: Event) -> None:
            if events.qsize() > _UNREAD_EVENTS:
                raise GeneratorError(f"{_UNREAD_EVENTS} events of the reply have not been read", hint="read faster")
            if not _call(loop, events.put_nowait, event):
                job.cancelled = True

        job = ChatJob(
            request=request, planner=planner, window_tokens=window_tokens, tell=tell,
            end=lambda error: _call(loop, events.put_nowait, error or _END),
        )  # fmt: skip
        self._put(job, GeneratorError)
        try:
            while (event := await events.get()) is not _END:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            job.cancelled = True

    async def aclose(self) -> None:
        """End the thread after the turn it is in; jobs still open fail."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, 30)

    def _put(self, job: ReadJob | ChatJob, failure: type[HHHRouterError]) -> None:
        with self._open:
            if not self._accepts:
                raise failure("the model has been closed", hint="open a new router")
            self._inbox.put(job)

    def _serve(self) -> None:
        while True:
            try:
                while True:
                    job = self._inbox.get(block=not (self._reads.busy or self._batcher.busy))
                    if job is None:
                        self._close()
                        return
                    part: Any = self._reads if isinstance(job, ReadJob) else self._batcher
                    part.put(job)
            except queue.Empty:
                pass
            self._reads.turn()
            self._batcher.turn()

    def _close(self) -> None:
        """End what is under way and what has arrived since."""
        with self._open:
            self._accepts = False
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                part: Any = self._reads if isinstance(job, ReadJob) else self._batcher
                part.put(job)
        self._reads.close(ReaderError("the model was closed"))
        self._batcher.close(GeneratorError("the model was closed"))


_END = object()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *given: Any) -> bool:
    """Call something on a loop's thread; False where the loop is closed, so that nobody waits there any more."""
    try:
        loop.call_soon_threadsafe(function, *given)
    except RuntimeError:
        return False
    return True


class EmbeddedReader:
    """`Reader` on the embedded model."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        """Score each text, in order; texts of like length, whoever sent them, share a padded pass."""
        return await self._worker.read(requests)


class EmbeddedGenerator:
    """`Generator` on the embedded model."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int
    ) -> AsyncGenerator[Event, None]:
        """See `hhh_router.protocols.Generator.generate`."""
        async with aclosing(self._worker.chat(request, planner, window_tokens=window_tokens)) as events:
            async for event in events:
                yield event


@dataclass(slots=True)
class EmbeddedModel:
    """A bundle on its backbone, ready to read and to answer."""

    reader: EmbeddedReader
    generator: EmbeddedGenerator
    worker: Worker
    encoder: Encoder
    description: dict[str, Any]

    def context_tokens(self) -> int:
        """The model's window."""
        return self.encoder.context_tokens

    def describe(self) -> dict[str, Any]:
        """Sizes and precision, for logs and ``doctor``."""
        return dict(self.description)

    async def aclose(self) -> None:
        """Stop the model's thread."""
        await self.worker.aclose()


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
        BundleError: Anything missing, corrupt or made for another backbone.
    """
    reader, encoder = open_reader(bundle, settings)
    stack = reader.stack
    gates = install_mixture(stack.model, load_experts(bundle))
    batcher = Batcher(
        reader=reader, encoder=encoder, gates=gates, max_rows=settings.max_rows, max_tokens=settings.kv_tokens
    )
    worker = Worker(Reads(reader, encoder, settings.guard_batch_tokens), batcher, max_waiting=settings.max_waiting)
    return EmbeddedModel(
        reader=EmbeddedReader(worker),
        generator=EmbeddedGenerator(worker),
        worker=worker,
        encoder=encoder,
        description={
            "layers": stack.depth,
            "first_adapted_layer": reader.first_adapted_layer,
            "read_layers": list(reader.read_layers),
            "dtype": reader.dtype,
            "context_tokens": encoder.context_tokens,
            "device": str(stack.device),
            "threads": settings.threads,
        },
    )
