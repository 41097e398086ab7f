"""A policy's own examples, put to it with a bundle's readings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hhh_router.errors import ReaderError
from hhh_router.evaluation.systems import Readings
from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision, unread_plan
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.pipeline.situation import answered_situation, asked_situation, first_turn, with_calls
from hhh_router.policy import Facts, Policy, asks, decide, for_tenant
from hhh_router.policy.schema import Example
from hhh_router.types import Caller, Decision, Message, Plan, ReadRequest, Scores, ToolFacts, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """One example, and what was decided."""

    example: Example
    decision: Decision | None
    """None where the policy has no rules for its checkpoint."""

    @property
    def passed(self) -> bool:
        """Whether it was decided as expected."""
        return self.decision is not None and self.example.accepts(self.decision.action)


def run_examples(policy: Policy, readings: Readings) -> list[Tested]:
    """Every example of a policy, in order. All texts are read in one go; without any, nothing is loaded."""
    wanted: dict[ReadRequest, None] = {}
    for example in policy.examples:
        if example.prompt is not None:
            wanted[ReadRequest(messages=_messages(example))] = None
        if example.response is not None:
            wanted[ReadRequest(messages=_messages(example), response=example.response)] = None
    texts = list(wanted)
    scores = dict(zip(texts, readings.scores(texts), strict=True)) if texts else {}
    return [_Asked(policy, example, scores, readings).tested() for example in policy.examples]


def _messages(example: Example) -> tuple[Message, ...]:
    return () if example.prompt is None else (Message(role="user", content=example.prompt),)


class _Asked:
    """One example, put to a policy."""

    def __init__(
        self, policy: Policy, example: Example, scores: Mapping[ReadRequest, Scores | None], readings: Readings
    ) -> None:
        self._policy = for_tenant(policy, example.tenant or "")
        self._example = example
        self._scores = scores
        self._readings = readings
        who = Caller(tenant=example.tenant or "", sticky="example")
        self._situation = first_turn(asked_situation(_messages(example), who, None))

    def tested(self) -> Tested:
        """What is decided at the example's checkpoint."""
        example = self._example
        if not asks(self._policy, example.checkpoint):
            return Tested(example=example, decision=None)
        if example.tool is not None:
            return Tested(example=example, decision=self._tool_call())
        if example.response is None:
            return Tested(example=example, decision=self._plan(None).decision)
        return Tested(example=example, decision=self._output(example.response))

    def _plan(self, response: str | None) -> Plan:
        messages = _messages(self._example)
        read = ReadRequest(messages=messages, response=None if messages else response)
        try:
            return make_plan(
                self._read(read),
                policy=self._policy,
                calibrators=self._readings.calibrators,
                situation=self._situation,
            )
        except JUDGING_FAILURES as error:
            return unread_plan(self._policy, failed_decision(self._policy, self._example.checkpoint, error))

    def _output(self, response: str) -> Decision:
        read = ReadRequest(messages=_messages(self._example), response=response)
        try:
            _, _, decision = judge_output(
                self._read(read),
                plan=self._plan(response),
                policy=self._policy,
                calibrators=self._readings.calibrators,
                situation=answered_situation(self._situation, response),
            )
        except JUDGING_FAILURES as error:
            return failed_decision(self._policy, "output", error)
        return decision

    def _tool_call(self) -> Decision:
        example = self._example
        assert example.tool is not None
        evidence, weights = None, Weights(1.0, 0.0, 0.0, 0.0)
        if example.prompt is not None:  # what the conversation needs is known from its prompt
            plan = self._plan(None)
            evidence, weights = plan.evidence, plan.weights
        facts = Facts(
            needs=evidence.needs if evidence else {},
            outcomes=evidence.outcomes if evidence else {},
            weights=weights,
            confidence=None,
            in_distribution=evidence.in_distribution if evidence else None,
            mode=evidence.mode if evidence else None,
            situation=replace(
                with_calls(self._situation, 1),
                tool=ToolFacts(name=example.tool, arguments=example.arguments),
                text=json.dumps(example.arguments),
                role="assistant",
            ),
        )
        return decide(self._policy, "tool_call", facts)

    def _read(self, request: ReadRequest) -> Scores:
        scores = self._scores[request]
        if scores is None:
            raise ReaderError("the model's template does not take this conversation")
        check_scores(scores)
        return scores
