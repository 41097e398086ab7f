"""Stand-ins for the model, public so that you can test your own policies in milliseconds and without torch.

A `FakeReader` turns texts into the scores you choose, a `FakeGenerator` says what you tell it to; everything else in
a `fake_pipeline` (policies, routing, hold-back, metadata) is the real thing.

>>> import asyncio
>>> from hhh_router.types import GuardRequest, Message, ReadRequest
>>> reader = FakeReader({"bomb": {"needs.harmless": 6.0}})
>>> pipeline = fake_pipeline(policy="balanced", reader=reader)
>>> asked = ReadRequest(messages=(Message(role="user", content="How do I build a bomb?"),))
>>> [verdict] = asyncio.run(pipeline.guard([GuardRequest(read=asked)]))
>>> str(verdict.action)
'refuse'
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hhh_router.calibration import Calibrators
from hhh_router.pipeline import Pipeline, PolicyStore
from hhh_router.pipeline.situation import PIPELINE
from hhh_router.policy import Door
from hhh_router.protocols import (
    Delta,
    Event,
    Finished,
    FinishReason,
    Generator,
    Planned,
    Planner,
    Reader,
    Steered,
    Steerer,
    TokenLogprob,
    Window,
)
from hhh_router.settings import Settings
from hhh_router.trace import NullSink, Sink
from hhh_router.trace.block import BundleRef
from hhh_router.trace.redact import Redactor, read_patterns
from hhh_router.types import NEEDS, OUTCOMES, ChatRequest, Message, Mode, ReadRequest, Scores, Tool, Weights

QUIET = -4.0
"""The logit of everything a test does not raise: a probability of about 0.02."""
SAID_LOGPROB = -0.1
"""The log-probability of every word a `FakeGenerator` says."""
LAYERS = 30
FIRST_ADAPTED_LAYER = 16

Logits = Mapping[str, float]
"""Head → logit, such as ``{"needs.harmless": 6.0, "outcomes.unsafe": 2.0}``."""


def make_scores(
    logits: Logits | None = None, *, mode: Mode = "prompt", tokens: int = 8, distance: float = 0.5
) -> Scores:
    """Scores with the named heads at the given logits and every other one at `QUIET`.

    A response alone has no needs, as with the real heads.

    >>> make_scores({"needs.honest": 2.0}).needs["honest"]
    2.0

    Raises:
        ValueError: A name is no head.
    """
    heads = dict.fromkeys([f"needs.{n}" for n in NEEDS] + [f"outcomes.{o}" for o in OUTCOMES], QUIET)
    if unknown := set(logits or {}) - set(heads):
        raise ValueError(f"{min(unknown)!r} is no head; use {', '.join(heads)}")
    heads |= logits or {}
    return Scores(
        mode=mode,
        needs={} if mode == "response" else {n: heads[f"needs.{n}"] for n in NEEDS},
        outcomes={o: heads[f"outcomes.{o}"] for o in OUTCOMES},
        distance=distance,
        tokens=tokens,
        layers_run=FIRST_ADAPTED_LAYER,
    )


class FakeReader:
    """Scores texts by what they contain: needs by the prompt alone, outcomes by prompt and response.

    Args:
        rules: Substring → logits of texts that contain it; or a function from request to scores, which may
            raise what a real reader may.
    """

    def __init__(self, rules: Mapping[str, Logits] | Callable[[ReadRequest], Scores] | None = None) -> None:
        self._rules = rules or {}
        self.calls: list[list[ReadRequest]] = []
        """What was read, one list a call."""
        self.sessions: list[FakeSession] = []
        """What was opened, in order."""

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        """Scores of each text, in order."""
        self.calls.append(list(requests))
        await asyncio.sleep(0)
        return [self.score(request) for request in requests]

    def open(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> FakeSession:
        """A session; what it reads is in ``calls`` too."""
        session = FakeSession(self, messages, tools)
        self.sessions.append(session)
        return session

    def score(self, request: ReadRequest) -> Scores:
        """Scores of one text. The later of two rules that name the same head wins."""
        if callable(self._rules):
            return self._rules(request)
        prompt = "\n".join(m.content for m in request.messages)
        text = f"{prompt}\n{request.response or ''}"
        logits: dict[str, float] = {}
        for part, raised in self._rules.items():
            logits |= {head: x for head, x in raised.items() if part in (prompt if head.startswith("needs.") else text)}
        return make_scores(logits, mode=request.mode, tokens=len(text.split()))


class FakeSession:
    """A session of a `FakeReader`, which reads everything every time."""

    def __init__(self, reader: FakeReader, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        self._reader = reader
        self._prompt = ReadRequest(messages=tuple(messages), tools=tuple(tools))
        self.closed = False

    async def read(self, response: str | None) -> Scores:
        """Scores of the prompt, or of prompt and answer."""
        [scores] = await self._reader.read([replace(self._prompt, response=response)])
        return scores

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


class FakeGenerator:
    """Says scripted replies word by word, reading prompt and windows with a `Reader` of your choice.

    Args:
        replies: The reply of each attempt, the last one repeated; or a function from request to reply.
        reader: Reads the prompt and every window; a `FakeReader` without rules by default.
        finish_reason: How the reply ends when nothing stops it.
        delay_s: Pause before each word, in seconds.
        fail_after: Raise this error after that many words, as a model that breaks off would.
    """

    def __init__(
        self,
        replies: str | Sequence[str] | Callable[[ChatRequest], str] = "The capital of France is Paris.",
        *,
        reader: Reader | None = None,
        finish_reason: FinishReason = "stop",
        delay_s: float = 0.0,
        fail_after: tuple[int, Exception] | None = None,
    ) -> None:
        self._replies = [replies] if isinstance(replies, str) else replies
        self._reader = reader or FakeReader()
        self._finish_reason = finish_reason
        self._delay_s = delay_s
        self._fail_after = fail_after
        self.requests: list[ChatRequest] = []
        """What was asked, one entry an attempt."""
        self.cancelled = 0
        """Attempts that were closed before their end."""

    async def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int, steer: Steerer | None = None
    ) -> AsyncGenerator[Event, None]:
        """Plan, then one delta a word with a window every ``window_tokens`` words and one at the end."""
        self.requests.append(request)
        [scores] = await self._reader.read([ReadRequest(messages=request.messages)])
        plan = planner(scores)
        stops = plan.stops
        yield Planned(
            plan=plan,
            prompt_tokens=scores.tokens,
            layers_run=FIRST_ADAPTED_LAYER if stops else LAYERS,
            read_ms=0.1,
            prompt_logprobs=_told_of(request) if not stops else None,
        )
        said = 0
        reply, stop = ("", None) if stops else _cut(self._reply(request), request.sampling.stop)
        try:
            if not stops:
                async for event in self._say(request, reply, plan.weights, window_tokens, steer):
                    said += isinstance(event, Delta)
                    yield event
            yield Finished(
                reason=self._finish_reason if not stops else "content_filter",
                stop=stop,
                prompt_tokens=scores.tokens,
                completion_tokens=said,
            )
        except GeneratorExit:
            self.cancelled += 1
            raise
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _say(
        self, request: ChatRequest, reply: str, weights: Weights, window_tokens: int, steer: Steerer | None
    ) -> AsyncGenerator[Event, None]:
        pieces = _words(reply)[: request.sampling.max_tokens]
        for n, piece in enumerate(pieces, 1):
            if self._fail_after is not None and n > self._fail_after[0]:
                raise self._fail_after[1]
            await asyncio.sleep(self._delay_s)
            yield Delta(text=piece, logprob=SAID_LOGPROB, told=_told(piece, request.sampling.top_logprobs))
            if n % window_tokens == 0 and n < len(pieces):
                window = await self._window(request, pieces[:n], is_final=False)
                yield window
                wanted = steer(window.scores, [SAID_LOGPROB] * n) if steer else None
                if wanted is not None and wanted != weights:
                    weights = wanted
                    yield Steered(weights=weights, completion_tokens=n)
        yield await self._window(request, pieces, is_final=True)

    async def _window(self, request: ChatRequest, pieces: Sequence[str], *, is_final: bool) -> Window:
        read = ReadRequest(messages=request.messages, response="".join(pieces))
        [scores] = await self._reader.read([read])
        return Window(scores=scores, completion_tokens=len(pieces), is_final=is_final)

    def _reply(self, request: ChatRequest) -> str:
        if callable(self._replies):
            return self._replies(request)
        return self._replies[min(len(self.requests), len(self._replies)) - 1]


def _told(piece: str, top: int | None) -> tuple[TokenLogprob, ...]:
    """The word itself, then made-up others that are ever less likely."""
    if top is None:
        return ()

    def tell(word: str, logprob: float, others: Sequence[TokenLogprob] = ()) -> TokenLogprob:
        return TokenLogprob(token=word, logprob=logprob, bytes=tuple(word.encode()), top_logprobs=tuple(others))

    ranked = [piece, *(f" other{n}" for n in range(1, top))][:top]
    return (tell(piece, SAID_LOGPROB, [tell(word, SAID_LOGPROB - n) for n, word in enumerate(ranked)]),)


def _told_of(request: ChatRequest) -> tuple[TokenLogprob, ...] | None:
    """Of the prompt's words, as `protocols.Planned` has it."""
    if (top := request.sampling.prompt_logprobs) is None:
        return None
    words = _words(request.messages[-1].content) or [f" {i}" for i in request.prompt_ids]
    first, *rest = [told for word in words for told in _told(word, top)]
    return (replace(first, logprob=math.nan, top_logprobs=()), *rest)


def _cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """A reply up to the first stop string in it, and which that was."""
    found = [(at, s) for s in stop if (at := text.find(s)) >= 0]
    return (text[: min(found)[0]], min(found)[1]) if found else (text, None)


def _words(text: str) -> list[str]:
    """A text in pieces that join to it again, one a word.

    >>> _words("to be  or")
    ['to', ' be', ' ', ' or']
    """
    words = text.split(" ")
    return [word if i == 0 else f" {word}" for i, word in enumerate(words)] if text else []


def fake_pipeline(
    policy: str | Path = "balanced",
    *,
    reader: Reader | None = None,
    generator: Generator | None = None,
    calibrators: Calibrators | None = None,
    sinks: Sequence[Sink] = (),
    answers_elsewhere: bool = False,
    closers: Sequence[Callable[[], Awaitable[None]]] = (),
    door: Door = PIPELINE,
    **settings: object,
) -> Pipeline:
    """A real pipeline around stand-ins for the model.

    Args:
        policy: A shipped policy's name, or a path to yours.
        reader: Reads guard and route requests, and the default generator's prompt and reply.
        generator: Answers chats; by default a `FakeGenerator` on the same reader.
        calibrators: None leaves every number uncalibrated: a logit becomes its plain sigmoid.
        sinks: Where traces go; nowhere by default.
        answers_elsewhere: As for a proxy: the generator asks another model, no mixture is applied.
        closers: Awaited when the pipeline is closed.
        door: Where the policies are used; what they ask has to be had there.
        door: What the policy may ask for.
        settings: Further fields of `Settings`.
    """
    reader = reader or FakeReader()
    chosen = Settings.load(policy=str(policy), **settings)
    return Pipeline(
        reader=reader,
        generator=generator or FakeGenerator(reader=reader),
        calibrators=calibrators or Calibrators.none(),
        policies=PolicyStore.from_settings(chosen, door=door),
        bundle_ref=BundleRef(name="fake", hash="0" * 16),
        backbone_sha256=None,
        sinks=sinks or (NullSink(),),
        settings=chosen,
        redactor=Redactor(patterns=() if chosen.redact_file is None else read_patterns(chosen.redact_file)),
        answers_elsewhere=answers_elsewhere,
        closers=closers,
    )
