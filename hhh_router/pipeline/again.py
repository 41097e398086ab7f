"""Decisions made again from what the record of a request keeps: without the model, without text where none was kept.

The path is the live one (`plan`): raw readings become evidence, evidence weights and decisions. What the record does
not tell (a text, an argument, the rest of a reply that was stopped) leaves a decision open, and is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hhh_router.calibration import Calibrators
from hhh_router.errors import ReaderError
from hhh_router.pipeline.basis import Texts, scores_of, situation_of
from hhh_router.pipeline.conversations import tainted
from hhh_router.pipeline.onerror import JUDGING_FAILURES, failed_decision, unread_plan
from hhh_router.pipeline.plan import facts_of, judge_output, limits_of, make_plan, with_tokens
from hhh_router.pipeline.situation import answered_situation, called_situation, with_calls
from hhh_router.pipeline.tool_results import reads_results
from hhh_router.policy import Facts, Policy, asks, for_tenant
from hhh_router.policy.possible import Possible, forgotten, possible_decisions
from hhh_router.policy.schema import SEVERITY
from hhh_router.routing import kl_nats
from hhh_router.trace.block import Basis, Metadata, ReadingRecord
from hhh_router.types import (
    Action,
    Decision,
    Plan,
    Situation,
    ToolFacts,
    Weights,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """One request, decided again."""

    decisions: tuple[Decision, ...]
    """In the order in which they were made; one that repeats the one before is left out, as in a record."""
    weights: Weights | None
    """Of the reply's beginning; None where they are not known."""
    unknown: tuple[str, ...]
    """What is not known, one line each; then the whole outcome is not known unless something known stops it."""

    @property
    def decision(self) -> Decision | None:
        """The first that stops, or else the strictest; None where that is not known."""
        stopping = next((d for d in self.decisions if d.action.stops), None)
        if stopping is None and self.unknown:
            return None
        return stopping or max(self.decisions, key=lambda d: SEVERITY[d.action], default=None)


def decide_again(
    block: Metadata, policy: Policy, calibrators: Calibrators, *, texts: Texts | None = None, own: bool | None = None
) -> Again:
    """What a policy makes of a recorded request.

    Args:
        block: As it was recorded, with its basis.
        policy: Any; where it is that of the record, the record's own way is followed to its end.
        calibrators: Those of the record, by their id.
        texts: What was said, where it was kept.
        own: Whether it is the record's policy; told by its hash where not given.

    Raises:
        ValueError: The record has no basis, or the policy has overlays and the tenant is not known.
    """
    if block.basis is None:
        raise ValueError("the record keeps no readings")
    own = policy.hash == block.receipt.policy_sha256 if own is None else own
    tenant = block.basis.tenant
    return _Run(block, block.basis, for_tenant(policy, tenant), calibrators, texts, own=own).run()


class _Run:
    """The state of one request that is decided again."""

    def __init__(
        self, block: Metadata, basis: Basis, policy: Policy, calibrators: Calibrators, texts: Texts | None, *, own: bool
    ) -> None:
        self._block, self._basis, self._policy, self._calibrators, self._own = block, basis, policy, calibrators, own
        self._texts = texts
        self._enforced = block.policy.mode == "enforce"
        self._acting = self._enforced or not own  # another policy is asked what it would do
        self._situation = situation_of(basis, texts)
        self._decisions: list[Decision] = []
        self._unknown: list[str] = []
        self._weights: Weights | None = None
        self._again = False
        self._let_out = basis.stream and not self._acting

    def run(self) -> Again:
        """Attempt by attempt."""
        raises: dict[str, float] = {}
        for i, readings in enumerate(self._basis.attempts):
            verdict = self._attempt(readings, raises, is_last=i + 1 == len(self._basis.attempts))
            if verdict is None or verdict.action is not Action.REGENERATE or not self._own:
                break
            raises, self._again = dict(verdict.raises), True
        return Again(decisions=tuple(self._decisions), weights=self._weights, unknown=tuple(self._unknown))

    def _attempt(
        self, readings: Sequence[ReadingRecord], raises: dict[str, float], *, is_last: bool
    ) -> Decision | None:
        """One way from prompt to end of reply; the decision that ends it, None where nothing does or all is open."""
        if not readings:
            self._unknown.append("input: no reading was kept")
            return None
        first, *others = readings
        plan = self._plan(first, raises)
        if plan is None:
            return None
        self._weights = self._weights or plan.weights
        if first.mode == "prompt" and not self._at_input(first, plan):
            return self._stopped()
        for reading in others:
            verdict = self._at_output(reading, plan)
            if self._lost or (verdict is not None and self._acts(verdict)):
                return verdict
        if not self._at_calls(plan):
            return self._stopped()
        self._end(readings, is_last=is_last)
        return None

    @property
    def _lost(self) -> bool:
        """Whether the way is not known from here on; that of the record's own policy is the record's."""
        return bool(self._unknown) and not self._own

    def _plan(self, reading: ReadingRecord, raises: dict[str, float]) -> Plan | None:
        scores = scores_of(reading)
        if scores is None:
            recorded = next((d for d in self._block.decisions), None)
            why = ValueError(recorded.reason if recorded else "the prompt was not read")
            return unread_plan(self._policy, failed_decision(self._policy, "input", why))
        situation = replace(self._situation, tokens=scores.tokens)
        try:
            evidence = self._calibrators.evidence(scores)
            for floor in self._policy.floors:
                facts = replace(facts_of(evidence, Weights(1.0, 0.0, 0.0, 0.0), 0.0, situation), confidence=None)
                if lost := forgotten(floor.when, facts):
                    self._unknown.append(f"{floor.place}: {', '.join(lost)} not kept")
                    return None
            pinned = self._basis.pinned
            return make_plan(
                scores,
                policy=self._policy,
                calibrators=self._calibrators,
                pinned=None if pinned is None else Weights.from_mapping(pinned),
                floors=raises,
                situation=self._situation,
            )
        except JUDGING_FAILURES as error:
            return unread_plan(self._policy, failed_decision(self._policy, "input", error))

    def _at_input(self, reading: ReadingRecord, plan: Plan) -> bool:
        """Ask input, session and tool_result; whether it goes on."""
        if not plan.evidence.needs:  # it was not read, or nothing could be concluded from it
            self._decided(plan.decision)
            return not self._acts(plan.decision)
        results = self._results(plan)
        situation = with_tokens(self._situation, reading.tokens)
        facts = facts_of(plan.evidence, plan.weights, plan.confidence, situation)
        asked = [self._possible("input", facts)]
        if asks(self._policy, "session"):
            asked.append(self._possible("session", facts))
        asked += results
        found = [d for d in asked if d is not None]
        if not found:
            return self._own
        first, *others = sorted(found, key=lambda d: -SEVERITY[d.action])
        for decision in (*others, first):
            self._decided(decision)
        return not self._lost and not self._acts(first)

    def _results(self, plan: Plan) -> list[Decision | None]:
        """What tool_result says of each new result, as `plan` asks it; what is not simply allowed taints the rest."""
        found: list[Decision | None] = []
        if not asks(self._policy, "tool_result"):
            return found
        earlier = len(self._situation.earlier)
        for i, tool in enumerate((*self._situation.earlier, *self._situation.results)):
            decision = self._result(plan, tool)
            if decision is None or decision.action is not Action.ALLOW or decision.rule == "on_error":
                self._situation = tainted(self._situation)
            if i >= earlier:
                found.append(decision)
        return found

    def _result(self, plan: Plan, tool: ToolFacts) -> Decision | None:
        about = replace(self._situation, tool=tool, text=tool.result, role="tool")
        try:
            if tool.unread is not None:
                raise ReaderError(f"what a tool brought back was not read: {tool.unread}")
            if tool.scores is not None:
                evidence = self._calibrators.evidence(tool.scores)
                confidence = self._calibrators.confidence(
                    evidence,
                    weights=plan.weights,
                    policy_shift_nats=plan.policy_shift_nats,
                    limits=limits_of(self._policy, "tool_result", evidence),
                ).value
                return self._possible("tool_result", facts_of(evidence, plan.weights, confidence, about))
            if reads_results(self._policy):
                self._unknown.append("tool_result: what a tool brought back was not read")
                return None
            about = with_tokens(about, plan.evidence.scores.tokens)
            return self._possible("tool_result", facts_of(plan.evidence, plan.weights, plan.confidence, about))
        except JUDGING_FAILURES as error:
            return failed_decision(self._policy, "tool_result", error)

    def _at_output(self, reading: ReadingRecord, plan: Plan) -> Decision | None:
        scores = scores_of(reading)
        response = self._texts.response if self._texts and reading.is_final else None
        situation = answered_situation(self._situation, response)
        if scores is None:
            decision: Decision | None = failed_decision(self._policy, "output", ValueError("the reply was not read"))
        else:
            at = self._applied(plan, reading)
            mean, least = reading.logprobs or (0.0, 0.0)
            logprobs = () if reading.logprobs is None else (least, 2 * mean - least)  # the same mean, the same least
            try:
                told = with_tokens(situation, scores.tokens)
                evidence, confidence, _ = judge_output(
                    scores,
                    plan=at,
                    policy=self._policy,
                    calibrators=self._calibrators,
                    logprobs=logprobs,
                    situation=situation,
                )
                decision = self._possible("output", facts_of(evidence, at.weights, confidence, told))
            except JUDGING_FAILURES as error:
                decision = failed_decision(self._policy, "output", error)
        if decision is None:
            return None
        if decision.action is Action.REGENERATE and (self._again or self._let_out):
            decision = replace(decision, action=Action.REFUSE)
        self._decided(decision)
        self._let_out = self._let_out or (self._basis.stream and not decision.action.stops)
        if decision.action is Action.REGENERATE and not self._own and self._basis.chat:
            self._unknown.append("output: what would follow its regenerate")
        if decision.action is Action.STEER and self._steers(reading):
            self._unknown.append("output: what would follow its steer")
        return decision

    def _steers(self, reading: ReadingRecord) -> bool:
        return self._basis.chat and self._basis.mixes and not reading.is_final and not self._own

    def _applied(self, plan: Plan, reading: ReadingRecord) -> Plan:
        """The plan as steers have changed it before this window, where it is the record's own."""
        covered = reading.reply_tokens
        if not self._own or covered is None:
            return plan
        steered = [t for t in self._block.trajectory if 0 < t.from_token < covered]
        if not steered:
            return plan
        weights = Weights.from_mapping(steered[-1].weights)
        return replace(plan, weights=weights, policy_shift_nats=kl_nats(weights, plan.evidence.posterior))

    def _at_calls(self, plan: Plan) -> bool:
        if not asks(self._policy, "tool_call"):
            return True
        if self._basis.unseen_calls:
            self._unknown.append("tool_call: nobody looked at the calls")
        for n, call in enumerate(self._calls(), 1):
            about = with_calls(with_tokens(call, plan.evidence.scores.tokens), n)
            facts = facts_of(plan.evidence, plan.weights, plan.confidence, about)
            decision = self._possible("tool_call", facts)
            if decision is None:
                if self._lost:
                    return False
                continue
            if decision.action is Action.HOLD and (said := self._person(decision)) is not decision:
                if said is None:
                    return False
                decision = said
            self._decided(decision)
            if self._acts(decision):
                return False
        return True

    def _person(self, held: Decision) -> Decision | None:
        """What became of a held call: as recorded under the record's own policy, and not known under another one."""
        if not self._own:
            self._unknown.append("tool_call: what a person would have said of the call it holds")
            return None
        approved = any(
            (d.checkpoint, d.action, d.rule) == ("tool_call", Action.FLAG, held.rule) for d in self._block.decisions
        )
        return replace(held, action=Action.FLAG) if approved else held

    def _calls(self) -> list[Situation]:
        """What surrounds each call; its arguments only where all calls were found in the text that was kept."""
        found = self._texts.calls if self._texts else ()
        names = self._basis.calls
        if [call.name for call in found] == names or not names:
            return [called_situation(self._situation, call) for call in found]
        return [replace(self._situation, text=None, role="assistant", tool=ToolFacts(name=name)) for name in names]

    def _end(self, readings: Sequence[ReadingRecord], *, is_last: bool) -> None:
        """Say what was not read although this policy would have gone on."""
        if not self._basis.chat:
            return
        if self._basis.left_out:
            self._unknown.append(f"output: {self._basis.left_out} windows, which were not kept")
        if any(r.is_final for r in readings):
            return  # the whole reply was read; where it was made again all the same, this policy would have kept it
        stopped = self._enforced and any(Action(d.action).stops for d in self._block.decisions)
        if not is_last or stopped:
            tokens = max((r.reply_tokens or 0 for r in readings), default=0)
            what = f"the rest of the reply, after {tokens} tokens" if tokens else "no reply was made"
            self._unknown.append(f"output: {what}")

    def _possible(self, checkpoint: str, facts: Facts) -> Decision | None:
        found: Possible = possible_decisions(self._policy, checkpoint, facts)
        settled = found.settled
        if settled is None:
            ways = sorted({str(d.action) for d in found.decisions})
            self._unknown.append(f"{checkpoint}: {' or '.join(ways)}, {', '.join(found.missing)} not kept")
        return settled

    def _decided(self, decision: Decision) -> None:
        last = self._decisions[-1] if self._decisions else None
        same = last is not None and (last.checkpoint, last.action, last.rule) == (
            decision.checkpoint,
            decision.action,
            decision.rule,
        )
        if not same:
            self._decisions.append(decision)

    def _acts(self, decision: Decision) -> bool:
        ends = decision.action.stops or decision.action is Action.REGENERATE
        return ends and self._acting and self._basis.chat

    def _stopped(self) -> Decision | None:
        return self._decisions[-1] if self._decisions else None
