"""The only thread that touches the model, and the asynchronous faces of reader and generator in front of it.

Requests are Python generators that yield after every token (or every batch read); the thread gives each one step in
turn, so that a guard call does not wait for a whole chat. Gates are set anew for every pass.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError, ContextTooLong, GeneratorError, HHHRouterError, InvalidRequest, ReaderError
from hhh_router.model.base import compute_dtype, load_backbone
from hhh_router.model.encode import Encoder
from hhh_router.model.experts import load_experts
from hhh_router.model.fetch import fetch_backbone
from hhh_router.model.generator import MixtureGenerator
from hhh_router.model.heads import Heads
from hhh_router.model.mixture import install_mixture
from hhh_router.model.reader import HeadReader
from hhh_router.protocols import Event, Planner
from hhh_router.settings import Settings
from hhh_router.types import ChatRequest, ReadRequest, Scores

_log = logging.getLogger(__name__)
T = TypeVar("T")
_DONE = object()


@dataclass(slots=True, eq=False)
class _Job(Generic[T]):
    steps: Iterator[T]
    events: asyncio.Queue[Any]
    loop: asyncio.AbstractEventLoop
    failure: type[HHHRouterError]
    cancelled: bool = False

    def tell(self, event: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the caller's loop is closed: nobody waits for this any more
            self.cancelled = True


class Worker:
    """Runs jobs on one thread, a step each in turn."""

    def __init__(self, name: str = "hhh-router-model") -> None:
        self._inbox: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def stream(self, steps: Iterator[T], failure: type[HHHRouterError]) -> AsyncGenerator[T, None]:
        """Run an iterator on the model's thread and yield what it yields.

        Closing the stream ends the iterator at its next step. Unexpected errors arrive as ``failure``.
        """
        job: _Job[T] = _Job(steps, asyncio.Queue(), asyncio.get_running_loop(), failure)
        if not self._thread.is_alive():
            raise failure("the model has been closed", hint="open a new router")
        self._inbox.put(job)
        try:
            while (event := await job.events.get()) is not _DONE:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            job.cancelled = True

    async def aclose(self) -> None:
        """End the thread after the step it is in; jobs still open fail."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, 30)

    def _serve(self) -> None:
        jobs: deque[_Job[Any]] = deque()
        while True:
            try:
                while True:
                    arrived = self._inbox.get(block=not jobs)
                    if arrived is None:
                        for job in jobs:
                            job.tell(job.failure("the model was closed"))
                        return
                    jobs.append(arrived)
            except queue.Empty:
                pass
            job = jobs.popleft()
            if self._step(job):
                jobs.append(job)

    @staticmethod
    def _step(job: _Job[Any]) -> bool:
        """Advance one job; True while there is more to do."""
        try:
            if job.cancelled:
                getattr(job.steps, "close", lambda: None)()
                return False
            job.tell(next(job.steps))
            return True
        except StopIteration:
            job.tell(_DONE)
        except HHHRouterError as error:
            job.tell(error)
        except Exception as error:  # a seam: whatever broke in the model must reach its caller, not kill the thread
            _log.exception("the model failed")
            wrapped = job.failure(f"the model failed: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            job.tell(wrapped)
        return False


class EmbeddedReader:
    """`Reader` on the embedded model."""

    def __init__(self, worker: Worker, reader: HeadReader, encoder: Encoder, batch_tokens: int) -> None:
        self._worker = worker
        self._reader = reader
        self._encoder = encoder
        self._batch_tokens = batch_tokens

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        """Score each text, in order; texts of similar length share a padded pass."""
        results: list[Scores | None] = [None] * len(requests)
        stream = self._worker.stream(self._steps(requests), ReaderError)
        async for indices, scores in stream:
            for index, score in zip(indices, scores, strict=True):
                results[index] = score
        return [r for r in results if r is not None]

    def _steps(self, requests: Sequence[ReadRequest]) -> Iterator[tuple[list[int], list[Scores]]]:
        texts = []
        for index, request in enumerate(requests):
            try:
                texts.append(self._encoder.encode(request))
            except (ContextTooLong, InvalidRequest) as error:
                if len(requests) == 1:
                    raise
                raise type(error)(f"text {index} of {len(requests)}: {error.message}", hint=error.hint) from error
        for batch in self._reader.batches(texts, self._batch_tokens):
            yield batch, self._reader.score([texts[i] for i in batch])


class EmbeddedGenerator:
    """`Generator` on the embedded model."""

    def __init__(self, worker: Worker, generator: MixtureGenerator) -> None:
        self._worker = worker
        self._generator = generator

    async def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int
    ) -> AsyncGenerator[Event, None]:
        """See `hhh_router.protocols.Generator.generate`."""
        steps = self._generator.run(request, planner, window_tokens=window_tokens)
        stream = self._worker.stream(steps, GeneratorError)
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()


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
    generator = MixtureGenerator(stack, encoder, reader, gates)
    worker = Worker()
    return EmbeddedModel(
        reader=EmbeddedReader(worker, reader, encoder, settings.guard_batch_tokens),
        generator=EmbeddedGenerator(worker, generator),
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
