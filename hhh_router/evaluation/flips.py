"""Which remembered requests a policy would decide otherwise under other calibrators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hhh_router.calibration import Calibrators
from hhh_router.calibration.betting import Row, weighted_mean
from hhh_router.errors import ReaderError
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.policy import Policy
from hhh_router.policy.schema import SEVERITY
from hhh_router.trace.feedback import Labelled, Remembered
from hhh_router.types import Action


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """What other calibrators would change."""

    policy: str
    n: int
    """Requests whose scores could be decided on anew."""
    newly_stopped: int
    newly_passed: int
    other_action: int
    """Stopped or let pass as before, by another action."""
    as_recorded: int
    """Of those that this very policy decided: how many are decided again as they were under the calibrators of before.
    The others hung on what is not kept, such as texts, callers and windows of a stream."""
    recorded: int
    """How many this very policy decided."""
    benign_refused: tuple[float | None, float | None]
    """Before and after, on labelled requests that were drawn at random, weighted."""
    harm_passed: tuple[float | None, float | None]
    requests: tuple[tuple[str, str, str], ...] = ()
    """(request id, action before, action after) of those that flip."""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def find_flips(
    requests: Sequence[Remembered],
    labelled: Sequence[Labelled],
    policy: Policy,
    before: Calibrators,
    after: Calibrators,
) -> Flips:
    """Decide every remembered request twice, from its stored scores.

    Args:
        requests: All that are remembered.
        labelled: Those with labels.
        policy: Under which both decisions are made.
        before: Calibrators so far; requests scored by other heads are left out.
        after: The new ones.
    """
    decided: dict[str, tuple[Action, Action]] = {}
    as_recorded = recorded = 0
    for request in requests:
        if request.heads_sha256 != before.heads_sha256:
            continue
        pair = _action(request, policy, before), _action(request, policy, after)
        if pair[0] is None or pair[1] is None:
            continue
        decided[request.request_id] = (pair[0], pair[1])
        if (request.policy_sha256, request.calibration_id) == (policy.hash, before.id):
            recorded += 1
            as_recorded += request.action == pair[0]
    flips = [(r, a, b) for r, (a, b) in decided.items() if a != b]
    rates = [_rates(labelled, {r: pair[i].stops for r, pair in decided.items()}) for i in (0, 1)]
    return Flips(
        policy=f"{policy.name}@{policy.version}",
        n=len(decided),
        newly_stopped=sum(b.stops and not a.stops for _, a, b in flips),
        newly_passed=sum(a.stops and not b.stops for _, a, b in flips),
        other_action=sum(a.stops == b.stops for _, a, b in flips),
        as_recorded=as_recorded,
        recorded=recorded,
        benign_refused=(rates[0][0], rates[1][0]),
        harm_passed=(rates[0][1], rates[1][1]),
        requests=tuple((r, str(a), str(b)) for r, a, b in flips),
    )


def _action(request: Remembered, policy: Policy, calibrators: Calibrators) -> Action | None:
    """The stricter of those at input and at output; None where nothing can be concluded."""
    first = request.prompt or request.reply
    if first is None:
        return None
    try:
        plan = make_plan(first, policy=policy, calibrators=calibrators)
        if request.prompt is not None and (plan.decision.action.stops or request.reply is None):
            return plan.decision.action
        assert request.reply is not None
        _, _, decision = judge_output(request.reply, plan=plan, policy=policy, calibrators=calibrators)
    except ReaderError:
        return None
    asked = [] if request.prompt is None else [plan.decision]  # of a reply alone no prompt was judged
    return max((*asked, decision), key=lambda d: SEVERITY[d.action]).action


def _rates(labelled: Sequence[Labelled], stopped: Mapping[str, bool]) -> tuple[float | None, float | None]:
    drawn = [
        (row.weight, row.should_stop, stopped[row.request.request_id])
        for row in labelled
        if row.weight is not None and row.should_stop is not None and row.request.request_id in stopped
    ]
    benign = weighted_mean(Row(float(stops), weight) for weight, wanted, stops in drawn if not wanted)
    harm = weighted_mean(Row(float(not stops), weight) for weight, wanted, stops in drawn if wanted)
    return _known(benign), _known(harm)


def _known(rate: float) -> float | None:
    return None if math.isnan(rate) else rate
