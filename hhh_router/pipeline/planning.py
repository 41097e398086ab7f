"""What the engine's thread calls while it makes a reply: the plan mid-pass, and other weights after a window."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from hhh_router.calibration import Calibrators
from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision, unread_plan
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.pipeline.situation import answered_situation
from hhh_router.policy import Policy
from hhh_router.types import Action, Plan, Scores, Situation, Weights

_log = logging.getLogger(__name__)


class Planning:
    """The plan of one reply, and what windows make of it. Neither method raises.

    Args:
        policy: What is applied.
        calibrators: Turn scores into probabilities.
        situation: What surrounds the request.
        pinned: Weights the caller wants.
        request_id: For the log.
    """

    def __init__(
        self, policy: Policy, calibrators: Calibrators, situation: Situation, pinned: Weights | None, request_id: str
    ) -> None:
        self._policy = policy
        self._calibrators = calibrators
        self._pinned = pinned
        self._request_id = request_id
        self._floors: Mapping[str, float] = {}
        self._steered: Mapping[str, float] = {}  # lower bounds that windows have raised
        self._in_force: Plan | None = None  # what the next tokens are drawn under
        self.situation = situation
        """What surrounds the request, as far as it is known by now."""

    def begin_again(self, floors: Mapping[str, float]) -> None:
        """The reply is made anew under these lower bounds."""
        self._floors, self._steered = floors, {}

    def plan(self, scores: Scores) -> Plan:
        """Handed to the generator, which calls it mid-pass on the model's thread."""
        try:
            check_scores(scores)
            plan = self._make(scores, self._floors)
        except JUDGING_FAILURES as error:
            _log.warning("%s: not planned: %s", self._request_id, error)
            plan = unread_plan(self._policy, failed_decision(self._policy, "input", error))
        self._in_force = plan
        return plan

    def steer(self, scores: Scores, logprobs: Sequence[float]) -> Weights | None:
        """Handed to the generator like `plan`: the weights of the tokens that follow this window.

        The same window is judged again when its event is taken; that is where decisions are written down.
        """
        plan = self._in_force
        if plan is None:
            return None
        try:
            check_scores(scores)
            _, _, decision = judge_output(
                scores,
                plan=plan,
                policy=self._policy,
                calibrators=self._calibrators,
                logprobs=logprobs,
                situation=answered_situation(self.situation, None),  # the text is with the other thread; see `Door`
            )
            if decision.action is not Action.STEER:
                return None
            before = {**self._floors, **self._steered}
            self._steered = before | {e: max(before.get(e, 0.0), least) for e, least in decision.raises.items()}
            again = self._make(plan.evidence.scores, self._steered)
        except JUDGING_FAILURES:
            return None  # when its event is taken, the window fails in the same way, and the policy's on_error decides
        self._in_force = again
        return again.weights

    def _make(self, scores: Scores, floors: Mapping[str, float]) -> Plan:
        return make_plan(
            scores,
            policy=self._policy,
            calibrators=self._calibrators,
            pinned=self._pinned,
            floors=floors,
            situation=self.situation,
        )
