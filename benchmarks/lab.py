"""The engine under test, driven by hand: prompts are put into its batch, and its turns are taken on this thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.machine import code_hash, versions
from benchmarks.prompts import of_length
from benchmarks.timing import Side, interleaved
from hhh_router.bundle import Bundle
from hhh_router.model.base import compute_dtype
from hhh_router.model.batcher import Batcher
from hhh_router.model.encode import Encoder
from hhh_router.model.engine import EngineGenerator
from hhh_router.model.fetch import fetch_backbone
from hhh_router.model.reads import Reads
from hhh_router.model.rows import ChatJob
from hhh_router.model.sessions import Sessions
from hhh_router.model.worker import Worker, load_embedded
from hhh_router.protocols import Delta, Event, Planner
from hhh_router.settings import Settings
from hhh_router.types import (
    Action,
    ChatRequest,
    Decision,
    Evidence,
    Message,
    Plan,
    Posterior,
    ReadRequest,
    Sampling,
    Scores,
    Weights,
)

BARE = Weights(1, 0, 0, 0)
MIXTURES = tuple(Weights.from_mixture(name) for name in ("hhh@4-6-3-3", "hhh@2-2-10-2", "hhh@0-5-4-7"))
"""Three different mixtures, every expert in each; rows of a batch take them by turns."""
WINDOW_TOKENS = 24  # as the default policy reads a reply
_EVEN = Posterior(0.25, 0.25, 0.25, 0.25)
_GPU_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much work one turn of a side is."""

    prompt_tokens: int = 96
    """Of the prompts of decode figures, template included."""
    decode_tokens: int = 48
    """Decoded per row and turn."""
    xlora_tokens: int = 6
    """The same beside X-LoRA, whose every token is two passes over the whole text."""
    long_prompt_tokens: int = 256
    """Of prefill, routing and refusal."""
    chats: int = 16
    chat_tokens: int = 48
    """Reply of each of the concurrent chats."""
    guard_prompts: int = 1000
    guard_chars: int = 1200
    """Longest of the mixed prompts."""
    cached_prompts: tuple[int, int] = (8, 96)
    """Prompts, and tokens of each, of the prefill beside transformers' continuous batching."""
    gpu_tokens: int = 128
    """Reply of each row in the throughput figures."""
    probe_bytes: int = 1 << 29
    """Block that the bandwidth is measured on."""


QUICK = Sizes(
    prompt_tokens=60,
    decode_tokens=3,
    xlora_tokens=2,
    long_prompt_tokens=90,
    chats=3,
    chat_tokens=3,
    guard_prompts=12,
    guard_chars=120,
    cached_prompts=(2, 60),
    gpu_tokens=3,
    probe_bytes=1 << 22,
)
"""Only shows that everything runs; its timings mean nothing."""


@dataclass(slots=True, kw_only=True)
class Lab:
    """A loaded bundle, the sizes of the work, and how often it is repeated. Used by one thread."""

    bundle: Bundle
    settings: Settings
    sizes: Sizes
    repeats: int
    dtype: str
    batcher: Batcher
    reads: Reads
    sessions: Sessions
    on_step: Callable[[], None] = lambda: None
    """Told after each turn of each side."""
    _errors: list[Exception] = field(default_factory=list)

    @classmethod
    def open(cls, bundle: Bundle, *, device: str, threads: int | None, sizes: Sizes, repeats: int) -> Lab:
        """Load a bundle as a server would.

        Raises:
            BundleError: Anything missing, corrupt or made for another backbone.
        """
        # nothing is kept of prompts: sides that ask the same again would find it
        given: dict[str, object] = {"device": device, "threads": threads, "prefix_tokens": 0}
        if device.startswith("cuda"):
            given |= {"max_rows": _GPU_ROWS, "kv_tokens": _GPU_ROWS * 1024}
        settings = Settings.load(**given)
        model = load_embedded(bundle, settings)
        worker = model.engine
        assert isinstance(worker, Worker)
        worker.close()  # its thread is done; what it served is used by this one now
        return cls(
            bundle=bundle,
            settings=settings,
            sizes=sizes,
            repeats=repeats,
            dtype=compute_dtype(bundle.manifest.backbone, device, settings.dtype),
            batcher=worker._batcher,
            reads=worker._reads,
            sessions=worker._sessions,
        )

    @property
    def encoder(self) -> Encoder:
        """Turns messages into tokens."""
        return self.batcher.encoder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.batcher.reader.stack.device

    @property
    def folder(self) -> Path:
        """Of the backbone, as transformers loads it."""
        return fetch_backbone(self.bundle.manifest.backbone, self.settings.cache_dir, root=self.bundle.root)

    @property
    def setting(self) -> str:
        """What must be the same for two figures to be the same figure, on one line."""
        manifest = self.bundle.manifest
        parts = [
            f"{manifest.name} {manifest.version} {self.bundle.sha256[:12]}",
            f"{self.dtype} on {self.device.type}, {self.settings.threads} threads",
            ", ".join(f"{name} {found}" for name, found in versions().items()),
            f"code {code_hash()}",
        ]
        return "; ".join([*parts, "quick"] if self.sizes == QUICK else parts)

    def compare(self, sides: Mapping[str, Side], *, most: int | None = None) -> dict[str, list[float]]:
        """Interleave the sides, ``most`` times at most: slow ones say so."""
        return interleaved(sides, min(self.repeats, most or self.repeats), on_step=self.on_step)

    def sync(self) -> None:
        """Wait for the device, so that the clock reads what has been done and not what has been asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prompts(self, count: int, tokens: int) -> list[tuple[Message, ...]]:
        """Different conversations of like length."""
        return [of_length(self.encoder, tokens, number) for number in range(count)]

    def ids(self, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Their tokens."""
        return [list(self.encoder.encode(ReadRequest(messages=tuple(p))).ids) for p in prompts]

    # -- what the engine does -----------------------------------------------------------------------------------------

    def put(
        self,
        prompt: Sequence[Message],
        planner: Planner,
        *,
        tokens: int,
        tell: Callable[[Event], None] = lambda event: None,
    ) -> ChatJob:
        """Queue one chat whose reply is ``tokens`` long, whatever it says."""
        job = ChatJob(
            request=self.request(prompt, tokens), planner=planner, window_tokens=WINDOW_TOKENS, tell=tell, end=self._end
        )
        self.batcher.put(job)
        return job

    def request(self, prompt: Sequence[Message], tokens: int) -> ChatRequest:
        """A greedy chat that no end mark ends."""
        bias = dict.fromkeys(self.batcher._ends, -100.0)
        return ChatRequest(messages=tuple(prompt), sampling=Sampling(max_tokens=tokens, logit_bias=bias))

    def turn(self) -> None:
        """One turn of the batch.

        Raises:
            Exception: Whatever ended a chat early.
        """
        self.batcher.turn()
        if self._errors:
            raise self._errors.pop()

    def drop(self, jobs: Sequence[ChatJob]) -> None:
        """End chats, so that the next side finds an empty batch."""
        for job in jobs:
            job.cancelled = True
        self.turn()
        assert not self.batcher.busy

    def abandon(self) -> None:
        """Drop everything, whatever state a failure has left it in."""
        self.batcher.close(RuntimeError("a figure failed"))
        self._errors.clear()

    def decode_rate(self, weights: Sequence[Weights], tokens: int) -> float:
        """Tokens/s of a batch with a row per weighting, once all prompts have been read."""
        prompts = self.prompts(len(weights), self.sizes.prompt_tokens)
        budget = tokens + len(weights) + 1  # the first rows decode while the last are read
        jobs = [self.put(p, plan_for(w), tokens=budget) for p, w in zip(prompts, weights, strict=True)]
        while self.batcher.load.rows < len(jobs):
            self.turn()
        self.sync()
        started = perf_counter()
        for _ in range(tokens):
            self.turn()
        self.sync()
        elapsed = perf_counter() - started
        self.drop(jobs)
        return tokens * len(jobs) / elapsed

    def first_token_s(self, prompt: Sequence[Message], planner: Planner) -> float:
        """Seconds from a prompt's arrival to its first token, or to the refusal where the plan stops."""
        heard: list[float] = []

        def tell(event: Event) -> None:
            if isinstance(event, Delta):
                heard.append(perf_counter())

        started = perf_counter()
        job = self.put(prompt, planner, tokens=2, tell=tell)
        self.turn()
        self.sync()
        stopped = heard[0] if heard else perf_counter()
        self.drop([job])
        return stopped - started

    def warm_first_token_s(self, prompt: Sequence[Message], planner: Planner) -> float:
        """The same on a thread that has answered before, as one in service has: its OpenMP team is there."""
        self.first_token_s(prompt, planner)
        return self.first_token_s(prompt, planner)

    def chats_rate(self, prompts: Sequence[Sequence[Message]], weights: Sequence[Weights], tokens: int) -> float:
        """Tokens/s over all chats, asked at once through the worker's thread, from the first put to the last event."""
        worker = Worker(self.reads, self.sessions, self.batcher)
        generator = EngineGenerator(worker)

        async def chat(prompt: Sequence[Message], own: Weights) -> int:
            events = generator.generate(self.request(prompt, tokens), plan_for(own), window_tokens=WINDOW_TOKENS)
            return sum([e.tokens async for e in events if isinstance(e, Delta)])

        async def all_chats() -> tuple[int, float]:
            started = perf_counter()
            counts = await asyncio.gather(*(chat(p, w) for p, w in zip(prompts, weights, strict=True)))
            elapsed = perf_counter() - started
            worker.close()
            return sum(counts), elapsed

        said, elapsed = asyncio.run(all_chats())
        assert said == tokens * len(prompts), f"{said} tokens were said, {tokens} were asked of each chat"
        return said / elapsed

    def _end(self, error: Exception | None) -> None:
        if error is not None:
            self._errors.append(error)


def plan_for(weights: Weights, action: Action = Action.ALLOW) -> Planner:
    """A planner that has made up its mind, so that only the model is timed."""
    decision = Decision(checkpoint="input", action=action, rule="benchmark", reason="benchmark")

    def plan(scores: Scores) -> Plan:
        evidence = Evidence(
            mode="prompt", needs={}, posterior=_EVEN, outcomes={}, in_distribution=True, calibrated=False, scores=scores
        )
        return Plan(evidence=evidence, decision=decision, weights=weights, policy_shift_nats=0.0, confidence=0.5)

    return plan


def by_turns(items: Sequence[Any], count: int) -> list[Any]:
    """So many items, the given ones over and over.

    >>> by_turns("ab", 5)
    ['a', 'b', 'a', 'b', 'a']
    """
    return [items[i % len(items)] for i in range(count)]
