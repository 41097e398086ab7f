"""Answer one request: read at l_r, ask the planner, set the gates, go on with the mixture, read again while decoding.

This is the plain engine, one token at a time, and the oracle for faster ones. `run` is an ordinary generator that
yields after every token, so that the worker can take turns between requests.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hhh_router.model.deltas import Deltas, Spelling, told_of_prompt
from hhh_router.model.encode import Encoder
from hhh_router.model.grammar import Grammars
from hhh_router.model.heads import Views
from hhh_router.model.int8 import Phase
from hhh_router.model.mixture import Gates
from hhh_router.model.reader import HeadReader, RunningReply
from hhh_router.model.sampler import Sampler, check_biases
from hhh_router.model.stack import DecoderStack, Pass
from hhh_router.protocols import Delta, Event, Finished, FinishReason, Planned, Planner, Steered, Steerer, Window
from hhh_router.types import ChatRequest, Weights


@dataclass(frozen=True, slots=True)
class _Steps:
    """What one reply's decode steps share."""

    request: ChatRequest
    weights: Weights
    cache: Cache
    reply: RunningReply
    budget: int
    window_tokens: int
    steer: Steerer | None


class MixtureGenerator:
    """Generates with the mixture that the planner chooses mid-pass. Used by one thread, the model's own."""

    def __init__(
        self, stack: DecoderStack, encoder: Encoder, reader: HeadReader, gates: Gates, phase: Phase | None = None
    ) -> None:
        self._stack = stack
        self._encoder = encoder
        self._reader = reader
        self._gates = gates
        self._phase = phase or Phase()
        self._ends = frozenset({encoder.end_id, *stack.end_ids})
        self._grammars = Grammars(encoder, stack.config.vocab_size, self._ends)
        self._spelling = Spelling(encoder.tokenizer)

    def run(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int, steer: Steerer | None = None
    ) -> Iterator[Event]:
        """Yield the events of one request, as `hhh_router.protocols.Generator` describes them."""
        started = time.perf_counter()
        text = self._encoder.prompt(request)
        budget = self._encoder.reply_tokens(len(text.ids), request.sampling.max_tokens)
        check_biases(request.sampling.logit_bias, self._stack.config.vocab_size)
        cache = self._stack.new_cache()
        with torch.inference_mode():
            state = self._stack.begin(torch.tensor([text.ids], device=self._stack.device), cache=cache)
            prompt = self._reader.prompt(list(self._reader.states(state)), text)
            views = Views(prompt=prompt, response=prompt, modes=["prompt"])  # mode prompt looks at no response
            read_layers = state.next_layer
            scores = self._reader.heads.scores(views, tokens=[len(text.ids)], layers_run=read_layers)[0]
            plan = planner(scores)
            planned_at = time.perf_counter()
            logits = prompt_logprobs = None
            if not plan.stops:
                hidden = self._upper(state, plan.weights)
                logits = self._stack.logits(hidden[-1])
                prompt_logprobs = told_of_prompt(self._stack, hidden, text.ids, self._spelling, request.sampling)
        prefilled_at = time.perf_counter()
        yield Planned(
            plan=plan,
            prompt_tokens=len(text.ids),
            layers_run=state.next_layer,
            read_ms=1000 * (planned_at - started),
            prompt_logprobs=prompt_logprobs,
        )
        timing = {"read": 1000 * (planned_at - started), "prefill": 1000 * (prefilled_at - started)}
        if logits is None or not budget:
            reason: FinishReason = "content_filter" if logits is None else "length"
            yield Finished(reason=reason, prompt_tokens=len(text.ids), completion_tokens=0, timing_ms=timing)
            return
        reply = RunningReply(self._reader, prompt, len(text.ids))
        steps = _Steps(request, plan.weights, cache, reply, budget, window_tokens, steer)
        reason, stop = yield from self._decode(steps, logits)
        timing["decode"] = 1000 * (time.perf_counter() - prefilled_at)
        yield Finished(
            reason=reason, prompt_tokens=len(text.ids), completion_tokens=reply.tokens, timing_ms=timing, stop=stop
        )

    def _decode(
        self, steps: _Steps, logits: Tensor
    ) -> Generator[Delta | Window | Steered, None, tuple[FinishReason, str | None]]:
        sampling = steps.request.sampling
        following = self._grammars.follow(sampling.json_schema, steps.request.tools)
        sampler = Sampler(sampling, self._stack.device, following)
        stream = Deltas(self._encoder.tokenizer, self._spelling, sampling)
        weights, logprobs = steps.weights, []
        reason: FinishReason = "length"
        for drawn in range(1, steps.budget + 1):
            found = sampler.draw(logits)
            token = found.token
            if token in self._ends:
                reason = "stop"
                break
            logprobs.append(found.logprob)
            yield stream.push(found)
            state = self._read_token(token, steps)
            if stream.stopped:
                reason = "stop"
                break
            if drawn % steps.window_tokens == 0:
                scores = steps.reply.scores()
                yield Window(scores=scores, completion_tokens=drawn, is_final=False)
                wanted = steps.steer(scores, logprobs) if steps.steer and drawn < steps.budget else None
                if wanted is not None and wanted != weights:
                    weights = wanted
                    yield Steered(weights=weights, completion_tokens=drawn)
            if drawn < steps.budget:  # the last token's upper layers would decide nothing
                with self._phase.decoding():
                    logits = self._upper_layers(state, weights)
        if rest := stream.end():
            yield rest
        completion_tokens = steps.reply.tokens
        if not completion_tokens:  # an empty reply is read as an end marker, as the encoder does with a given one
            self._read_token(self._encoder.end_id, steps)
        yield Window(scores=steps.reply.scores(), completion_tokens=completion_tokens, is_final=True)
        return reason, stream.stop

    @torch.inference_mode()
    def _read_token(self, token: int, steps: _Steps) -> Pass:
        """Run the bare lower layers on one more token of the reply and pool its states."""
        state = self._stack.begin(torch.tensor([[token]], device=self._stack.device), cache=steps.cache)
        with self._phase.decoding():
            steps.reply.add(list(self._reader.states(state)))
        return state

    @torch.inference_mode()
    def _upper_layers(self, state: Pass, weights: Weights) -> Tensor:
        """Run the remaining layers with the mixture; next-token logits, (V,)."""
        return self._stack.logits(self._upper(state, weights)[-1])

    def _upper(self, state: Pass, weights: Weights) -> Tensor:
        """Run the remaining layers with the mixture; last states of each token, (T, D)."""
        self._gates.set([weights])  # other requests ran since the last step
        return self._stack.run(state, self._stack.depth)[0]
