"""A candidate: a policy that is asked beside the one in force, on the same readings, and never acts.

It decides about what there was to read: the prompt, and the reply that the policy in force led to, at the windows at
which that was read. Where it would have gone another way than the reply did (a reply stopped, made again or steered by
one of the two alone) the rest of its way is not known, and said to be unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision, unread_plan
from hhh_router.pipeline.parts import Parts
from hhh_router.pipeline.plan import judge_call, judge_output, make_plan
from hhh_router.pipeline.tool_results import reads_results
from hhh_router.policy import Policy, asked_for, asks, for_tenant
from hhh_router.policy.schema import SEVERITY
from hhh_router.trace.block import CandidateRecord, Compared, Relation
from hhh_router.trace.build import candidate_record
from hhh_router.types import Action, ChatRequest, Decision, GuardRequest, Plan, Scores, Situation, ToolCall

_AT_ONCE = ("input", "session", "tool_result")
"""Checkpoints that are asked of one reading: the strictest of them holds."""


class Beside:
    """What is told of one request to whoever is asked beside it. This one is nobody, and does nothing."""

    def planned(self, plan: Plan, situation: Situation, decisions: Sequence[Decision]) -> None:
        """The prompt was read.

        Args:
            plan: That in force, with the reading.
            situation: What surrounds it.
            decisions: What the policy in force said; empty where a response alone was read, and nothing was decided.
        """

    def answered(
        self,
        scores: Scores,
        situation: Situation,
        decision: Decision,
        *,
        logprobs: Sequence[float] = (),
        is_final: bool = True,
    ) -> None:
        """A reply, or the part of it that there is so far, was read, and the policy in force said ``decision``."""

    def called(self, call: ToolCall, situation: Situation, decision: Decision | None) -> None:
        """The reply calls a tool; None where the policy in force asks nothing about that."""

    def failed(self, checkpoint: str, error: Exception, decision: Decision) -> None:
        """What was to be read was not: its own ``on_error`` decides."""

    def ended(self, why: str) -> None:
        """The reply goes no further, or not on from here, for the policy in force said so; ``why`` is for people."""

    def unseen_calls(self) -> None:
        """The reply calls tools, and nobody looked at the calls."""

    def catch_up(self) -> None:
        """Do what waits."""

    def record(self) -> CandidateRecord | None:
        """What it would have decided; None where nothing was read."""
        return None


class Candidate(Beside):
    """A candidate and one request. Work is put in line and done by `catch_up`, while nobody waits for it.

    Args:
        parts: The deployment.
        policy: The candidate, as it is for the request's tenant.
        request: What was asked.
        stream: Whether text leaves before the reply has ended.
    """

    def __init__(self, parts: Parts, policy: Policy, request: ChatRequest | GuardRequest, *, stream: bool) -> None:
        self._calibrators = parts.calibrators
        self._policy = policy
        self._pinned = request.weights if isinstance(request, ChatRequest) else None
        self._makes_reply = isinstance(request, ChatRequest)
        self._mixes = not parts.answers_elsewhere
        self._stream = stream
        self._plan: Plan | None = None
        self._situation = Situation()
        self._confidence = 0.0
        self._decisions: list[Decision] = []
        self._pairs: dict[str, Compared] = {}  # checkpoint → where both first differed, or else the latest
        self._relation: Relation = "same"
        self._unknown: list[str] = []
        self._follows = True  # what is read still is what it would have led to
        self._let_out = self._seen_whole = False
        self._line: list[Callable[[], None]] = []

    def planned(self, plan: Plan, situation: Situation, decisions: Sequence[Decision]) -> None:
        """See `Beside`."""
        self._line.append(partial(self._planned, plan, situation, decisions))

    def answered(
        self,
        scores: Scores,
        situation: Situation,
        decision: Decision,
        *,
        logprobs: Sequence[float] = (),
        is_final: bool = True,
    ) -> None:
        """See `Beside`."""
        self._line.append(partial(self._answered, scores, situation, decision, tuple(logprobs), is_final))

    def called(self, call: ToolCall, situation: Situation, decision: Decision | None) -> None:
        """See `Beside`."""
        self._line.append(partial(self._called, call, situation, decision))

    def failed(self, checkpoint: str, error: Exception, decision: Decision) -> None:
        """See `Beside`."""
        self._line.append(partial(self._failed, checkpoint, error, decision))

    def ended(self, why: str) -> None:
        """See `Beside`."""
        self._line.append(partial(self._ended, why))

    def unseen_calls(self) -> None:
        """See `Beside`."""
        self._line.append(self._unseen_calls)

    def catch_up(self) -> None:
        """See `Beside`."""
        line, self._line = self._line, []
        for work in line:
            work()

    def record(self) -> CandidateRecord | None:
        """See `Beside`."""
        self.catch_up()
        if self._plan is None:
            return None
        relation = self._relation
        if relation == "same" and self._unknown:
            relation = "unknown"
        return candidate_record(
            self._policy,
            decisions=self._decisions,
            weights=self._plan.weights,
            confidence=self._confidence,
            compared=list(self._pairs.values()),
            relation=relation,
            unknown=self._unknown,
        )

    def _planned(self, plan: Plan, situation: Situation, decisions: Sequence[Decision]) -> None:
        if self._plan is not None:
            return  # the reply is made again, by the policy in force alone
        scores = plan.evidence.scores
        if not scores.needs and not scores.outcomes:
            self._unknown.append("input: the prompt was not read")
            self._plan = unread_plan(self._policy, plan.decision)
            self._follows = False
            return
        try:
            own = make_plan(
                scores,
                policy=self._policy,
                calibrators=self._calibrators,
                pinned=self._pinned,
                situation=situation,
            )
        except JUDGING_FAILURES as error:
            own = unread_plan(self._policy, failed_decision(self._policy, "input", error))
        self._plan, self._confidence = own, own.confidence
        self._situation = situation
        if not decisions:
            return
        if self._is_lost("input", *_AT_ONCE):
            return
        self._decisions += [*own.others, own.decision]
        for checkpoint in _AT_ONCE:
            mine = [d.action for d in (*own.others, own.decision) if d.checkpoint == checkpoint]
            theirs = [d.action for d in decisions if d.checkpoint == checkpoint]
            if mine or theirs:
                self._put(checkpoint, _strictest(theirs), _strictest(mine))
        self._relate(_strictest([d.action for d in decisions]), own.decision.action)
        if self._makes_reply and own.decision.action.stops:
            self._follows = False

    def _answered(
        self, scores: Scores, situation: Situation, theirs: Decision, logprobs: tuple[float, ...], is_final: bool
    ) -> None:
        if not self._follows or self._plan is None or self._is_lost("output", "output"):
            return
        try:
            check_scores(scores)
            _, self._confidence, decision = judge_output(
                scores,
                plan=self._plan,
                policy=self._policy,
                calibrators=self._calibrators,
                logprobs=logprobs,
                situation=situation,
            )
        except JUDGING_FAILURES as error:
            decision = failed_decision(self._policy, "output", error)
        self._decided(decision, theirs, is_final=is_final)

    def _failed(self, checkpoint: str, error: Exception, theirs: Decision) -> None:
        decision = failed_decision(self._policy, checkpoint, error)
        if self._plan is None:
            self._plan = unread_plan(self._policy, decision)
        if self._follows:
            self._decided(decision, theirs, is_final=False)

    def _decided(self, decision: Decision, theirs: Decision, *, is_final: bool) -> None:
        action, enforced = self._in_time(decision.action), self._in_time(theirs.action)
        before = self._decisions[-1] if self._decisions else None
        if before is None or (before.checkpoint, before.action, before.rule) != (
            decision.checkpoint,
            decision.action,
            decision.rule,
        ):
            self._decisions.append(decision)
        self._put(decision.checkpoint, enforced, action)
        self._relate(enforced, action)
        if not self._makes_reply:
            return
        self._let_out = self._let_out or (self._stream and not action.stops)
        goes_elsewhere = action is Action.REGENERATE or (action is Action.STEER and self._mixes and not is_final)
        if goes_elsewhere:
            self._unknown.append(f"output: what would follow its {action}")
        self._follows = not (goes_elsewhere or action.stops)
        self._seen_whole = is_final

    def _in_time(self, action: Action) -> Action:
        """A reply of which text has left cannot be made again."""
        return Action.REFUSE if action is Action.REGENERATE and self._let_out else action

    def _called(self, call: ToolCall, situation: Situation, theirs: Decision | None) -> None:
        if not self._follows or self._plan is None or not asks(self._policy, "tool_call"):
            return
        if self._is_lost("tool_call", "tool_call"):
            return
        decision = judge_call(call, plan=self._plan, policy=self._policy, situation=situation)
        self._decisions.append(decision)
        enforced = Action.ALLOW if theirs is None else theirs.action
        self._put("tool_call", enforced, decision.action)
        self._relate(enforced, decision.action)
        self._follows = not decision.action.stops

    def _is_lost(self, at: str, *checkpoints: str) -> bool:
        """Whether its rules there ask for what nobody knows, for the policy in force does not ask for it."""
        asked = {c.quantity for floor in self._policy.floors for c in floor.when}
        asked |= {quantity for checkpoint in checkpoints for quantity in asked_for(self._policy, checkpoint)}
        told = self._situation.conversation
        lost = [
            f"{at}: {name} is not counted, for the policy in force does not ask for it"
            for name in sorted(asked)
            if name.startswith("conversation.") and getattr(told, name.removeprefix("conversation.")) is None
        ]
        unread = any(tool.scores is None and tool.unread is None for tool in self._situation.results)
        if "tool_result" in checkpoints and unread and reads_results(self._policy):
            lost.append(f"{at}: what a tool brought was not read, for the policy in force does not ask for it")
        self._unknown += lost
        self._follows = self._follows and not lost
        return bool(lost)

    def _ended(self, why: str) -> None:
        if self._follows and self._makes_reply and not self._seen_whole:
            self._unknown.append(f"output: {why}")
        self._follows = False

    def _unseen_calls(self) -> None:
        if self._plan is not None and asks(self._policy, "tool_call"):
            self._unknown.append("tool_call: the policy in force asks nothing there, so the calls were not looked at")

    def _put(self, checkpoint: str, enforced: Action, candidate: Action) -> None:
        told = self._pairs.get(checkpoint)
        if told is None or told.enforced == told.candidate:
            self._pairs[checkpoint] = Compared(checkpoint=checkpoint, enforced=str(enforced), candidate=str(candidate))

    def _relate(self, enforced: Action, candidate: Action) -> None:
        if self._relation == "same" and enforced is not candidate:
            self._relation = "stricter" if SEVERITY[candidate] > SEVERITY[enforced] else "looser"


def _strictest(actions: Sequence[Action]) -> Action:
    """The strictest; a policy that asks nothing at a checkpoint allows."""
    return max(actions, key=SEVERITY.__getitem__, default=Action.ALLOW)


def open_beside(parts: Parts, request: ChatRequest | GuardRequest, *, stream: bool = False) -> Beside:
    """The candidate for one request; nobody where there is none beside the request's policy."""
    if parts.candidate is None:
        return Beside()
    policies = parts.policies
    if policies.get(request.policy).hash != policies.get(parts.candidate_of).hash:
        return Beside()
    candidate = for_tenant(policies.candidate(parts.candidate), request.caller.tenant)
    return Candidate(parts, candidate, request, stream=stream)
