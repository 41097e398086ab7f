"""What is known of one request so far, and the metadata block it makes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from hhh_router.pipeline.basis import Notes
from hhh_router.pipeline.candidate import Beside
from hhh_router.pipeline.parts import Parts
from hhh_router.policy import Policy
from hhh_router.protocols import Finished, Steered
from hhh_router.routing import kl_nats
from hhh_router.trace import build_metadata
from hhh_router.trace.block import Basis, CandidateRecord, Metadata
from hhh_router.trace.feedback import Remembered, remembered
from hhh_router.types import ChatRequest, Decision, Evidence, GuardRequest, Plan, Scores, Situation, Weights

_log = logging.getLogger(__name__)


class Record:
    """Collects measurements, decisions and times of one request. ``finish`` sends it to the sinks, once."""

    def __init__(self, parts: Parts, request: ChatRequest | GuardRequest, policy: Policy, beside: Beside) -> None:
        self._parts = parts
        self._beside = beside
        self._request = request
        self._policy = policy
        self._request_id = request.request_id or parts.new_id()
        self._begun = parts.clock()
        self._evidence: Evidence | None = None
        self._confidence = 0.0
        self._layers_run = 0
        self._decisions: list[Decision] = []
        self._timing_ms: dict[str, float] = {}
        self._not_inspected = list(request.not_inspected)
        self._trajectory: list[tuple[int, Weights]] = []  # completion tokens before, weights from there on
        self._done = False
        self._notes = Notes(request, mixes=not parts.answers_elsewhere)
        self._read: dict[bool, Scores] = {}  # whether a reply was seen → the latest reading
        self._redacted: dict[str, dict[str, int]] = {}
        self.plan: Plan | None = None
        self.prompt_tokens = 0

    def asked(self, situation: Situation, *, stream: bool = False) -> None:
        """What surrounds the request, and whether text leaves before the reply has ended."""
        self._notes.asked(situation, stream=stream)

    def called(self, tool: str) -> None:
        """A tool is called, and the call was looked at."""
        self._notes.called(tool)

    def unseen_calls(self) -> None:
        """The reply calls tools, and nobody looked at the calls."""
        self._notes.unseen()
        self._beside.unseen_calls()

    def unread(self, reply_tokens: int) -> None:
        """A window was not read, or could not be judged."""
        self._notes.unread(reply_tokens)

    def planned(self, plan: Plan, *, layers_run: int, read_ms: float | None = None, prompt_tokens: int = 0) -> None:
        """The input checkpoint is settled."""
        self.plan = plan
        self._trajectory = [(0, plan.weights)]
        self._evidence = plan.evidence
        self._keep(plan.evidence)
        self._notes.read(plan.evidence.scores)
        self._confidence = plan.confidence
        self._layers_run = layers_run
        self.prompt_tokens = prompt_tokens
        if read_ms is not None:
            self.took("read", read_ms)

    def read_again(
        self,
        evidence: Evidence,
        confidence: float,
        *,
        reply_tokens: int | None = None,
        is_final: bool = True,
        logprobs: Sequence[float] = (),
    ) -> None:
        """A window, or a whole response, was read: it tells outcomes. Needs stay those the weights come from.

        Args:
            evidence: Of that reading.
            confidence: P(every verdict enforced so far is right).
            reply_tokens: Of the reply that it covers, where they are counted.
            is_final: It covers the whole reply.
            logprobs: Of these tokens.
        """
        self._keep(evidence)
        self._notes.read(evidence.scores, reply_tokens=reply_tokens, is_final=is_final, logprobs=logprobs)
        planned = self.plan.evidence if self.plan else evidence
        self._evidence = replace(
            evidence,
            needs=planned.needs,
            posterior=planned.posterior,
            calibrated=planned.calibrated and evidence.calibrated,
            in_distribution=planned.in_distribution and evidence.in_distribution,
        )
        self._confidence = confidence

    def decided(self, decision: Decision) -> None:
        """A checkpoint was asked. A verdict that repeats the one before replaces it: one line, not one a window."""
        before = self._decisions[-1] if self._decisions else None
        same = before is not None and (before.checkpoint, before.action, before.rule) == (
            decision.checkpoint,
            decision.action,
            decision.rule,
        )
        if before is not None and same:  # what only an earlier window would have led to is not forgotten
            told = {(d.rule, d.action) for d in decision.shadow}
            earlier = tuple(d for d in before.shadow if (d.rule, d.action) not in told)
            self._decisions[-1] = replace(decision, shadow=earlier + decision.shadow)
        else:
            self._decisions.append(decision)

    def steered(self, event: Steered) -> None:
        """The tokens that follow are drawn under other weights."""
        assert self.plan is not None
        shift = kl_nats(event.weights, self.plan.evidence.posterior)
        self.plan = replace(self.plan, weights=event.weights, policy_shift_nats=shift)
        self._trajectory.append((event.completion_tokens, event.weights))

    def begin_again(self) -> None:
        """The reply is thrown away and made once more."""
        self.plan = None
        self._read.clear()
        self._notes.again()
        self._trajectory.clear()

    def finished(self, event: Finished) -> None:
        """The generator is done."""
        self.prompt_tokens = event.prompt_tokens
        for stage, ms in event.timing_ms.items():
            self.took(stage, ms)
        self._not_inspected += [part for part in event.not_inspected if part not in self._not_inspected]

    def redacted(self, checkpoint: str, counts: Mapping[str, int]) -> None:
        """What was taken out at a checkpoint, and how often."""
        if counts:
            self._redacted[checkpoint] = dict(sorted(counts.items()))

    def took(self, stage: str, ms: float) -> None:
        """Add to the time a stage took."""
        self._timing_ms[stage] = self._timing_ms.get(stage, 0.0) + ms

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        begun = self._parts.clock()
        try:
            yield
        finally:
            self.took(stage, (self._parts.clock() - begun) * 1000)

    def first_text(self) -> None:
        """The first piece of the reply leaves."""
        self._timing_ms.setdefault("first_text", (self._parts.clock() - self._begun) * 1000)

    def metadata(
        self, reply_text: str | None = None, *, candidate: CandidateRecord | None = None, basis: Basis | None = None
    ) -> Metadata:
        """The block as it stands now, for the caller."""
        plan, evidence = self.plan, self._evidence
        if plan is None or evidence is None:
            raise ValueError("no metadata before the input checkpoint is settled")
        answered = isinstance(self._request, ChatRequest) and not self._parts.answers_elsewhere
        block = build_metadata(
            request_id=self._request_id,
            policy=self._policy,
            bundle=self._parts.bundle_ref,
            backbone_sha256=self._parts.backbone_sha256,
            calibrators=self._parts.calibrators,
            evidence=evidence,
            weights=plan.weights,
            mixture=plan.weights.mixture if answered and not plan.stops else None,
            trajectory=self._trajectory if len(self._trajectory) > 1 else (),
            policy_shift_nats=plan.policy_shift_nats,
            confidence=self._confidence,
            decisions=self._decisions,
            request=self._request,
            reply_text=reply_text,
            not_inspected=self._not_inspected,
            layers_run=self._layers_run,
            timing_ms=self._timing_ms,
            candidate=candidate,
            basis=basis,
            redacted=self._redacted,
        )
        if not evidence.needs:  # nothing was read: say so, and show no share that nobody measured
            block = block.model_copy(update={"posterior": {}})
        return block

    def finish(self, reply_text: str | None) -> Metadata:
        """The final block for the caller. Every sink gets what is recorded besides."""
        self._timing_ms["total"] = (self._parts.clock() - self._begun) * 1000
        block = self.metadata(reply_text, candidate=self._beside.record(), basis=self._notes.basis())
        self._done = True
        for sink in self._parts.sinks:
            sink.write(block, self._request, reply_text)
        if self._parts.memory is not None:
            self._parts.memory.remember(self._remembered(block), self._request, reply_text)
        return block.told(candidate=self._parts.settings.candidate_told)

    def _keep(self, evidence: Evidence) -> None:
        if evidence.scores.needs or evidence.scores.outcomes:  # nothing was read where there are neither
            self._read[evidence.mode != "prompt"] = evidence.scores

    def _remembered(self, block: Metadata) -> Remembered:
        calibrators = self._parts.calibrators
        return remembered(
            block,
            time=self._parts.now().timestamp(),
            prompt=self._read.get(False),
            reply=self._read.get(True),
            heads_sha256=calibrators.heads_sha256,
            dtype=calibrators.dtype,
        )

    def close(self) -> None:
        """The request is over; say so when it never came to its end (an error, or the caller left)."""
        if not self._done:
            self._done = True
            latency_ms = (self._parts.clock() - self._begun) * 1000
            _log.info(
                "request id=%s policy=%s interrupted latency_ms=%.1f", self._request_id, self._policy.name, latency_ms
            )
