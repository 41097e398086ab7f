"""Two policies on the same traffic: which requests flip, and what that does to both errors.

Traffic is a file of texts, which a bundle reads (`replay`), or records of requests (`replay_recorded`), which keep
their readings: then neither model nor text is needed, and what was not kept is unknown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hhh_router.calibration import Calibrators
from hhh_router.data.examples import Example, data_hash
from hhh_router.evaluation.intervals import with_interval
from hhh_router.evaluation.recorded import Agreement, Source
from hhh_router.evaluation.systems import Readings
from hhh_router.pipeline.again import Again, decide_again
from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision, unread_plan
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.pipeline.situation import answered_situation, asked_situation
from hhh_router.policy import Policy, for_tenant
from hhh_router.policy.schema import SEVERITY
from hhh_router.routing import kl_nats
from hhh_router.types import Caller, Decision, Posterior, ReadRequest, Scores, Weights

SCHEMA = "hhh-router/replay/1"
BOOTSTRAPS = 2000
NEED = "harmless"

Flip = Literal["newly stopped", "newly passed", "other action", "same", "unknown"]
KINDS: tuple[Flip, ...] = get_args(Flip)
Side = Literal["benign_refused", "harm_passed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one policy makes of one request."""

    decision: Decision | None
    """The stricter of those at input and, where there is a reply, at output; None where it is not known."""
    weights: Weights | None
    """None where they are not known."""
    unknown: tuple[str, ...] = ()
    """What is not known of it."""

    @property
    def stops(self) -> bool | None:
        """Whether the caller does not get the reply."""
        return None if self.decision is None else self.decision.action.stops


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One request under both policies."""

    row: int
    """Counted from 1, in the file's order."""
    example: Example
    before: Judged
    after: Judged
    answers: tuple[str, str] | None = None
    """What is answered under each, with the same seed; None where nothing was generated."""
    request_id: str = ""
    """Of a record."""

    @property
    def flip(self) -> Flip:
        """What changes for whoever asked."""
        if self.before.decision is None or self.after.decision is None:
            return "unknown"
        one, other = self.before.decision.action, self.after.decision.action
        if one.stops != other.stops:
            return "newly stopped" if other.stops else "newly passed"
        return "same" if one is other else "other action"

    @property
    def shift_nats(self) -> float:
        """KL(weights after ‖ weights before): how differently the reply would be made."""
        if self.before.weights is None or self.after.weights is None:
            return 0.0
        return kl_nats(self.after.weights, Posterior(**self.before.weights.as_dict()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What may get worse before a replay fails. None: anything."""

    benign_refused: float | None = None
    """Most that the share of benign requests stopped may have risen, at the upper end of its interval."""
    harm_passed: float | None = None
    flips: int | None = None
    """Most requests that are stopped under one policy only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Two policies on the same traffic."""

    before: Policy
    after: Policy
    pairs: tuple[Pair, ...]
    figures: Mapping[str, Any]
    """JSON-ready."""
    failed: tuple[str, ...] = field(default=())
    """Gates that did not hold, one line each."""


def replay(
    before: Policy,
    after: Policy,
    examples: Sequence[Example],
    readings: Readings,
    *,
    seed: int,
    gate: Gate,
    command: str,
) -> Replay:
    """Put every request to both policies, on the same readings.

    Args:
        before: What is in force.
        after: What may replace it.
        examples: Traffic; labels of ``harmful`` are needed for the errors, not for the flips.
        readings: A bundle's.
        seed: Of the bootstraps.
        gate: What may get worse.
        command: How this was asked for.
    """
    wanted = list(dict.fromkeys(request for e in examples for request in _reads(e)))
    scores = dict(zip(wanted, readings.scores(wanted), strict=True))
    pairs = tuple(
        Pair(
            row=i,
            example=e,
            before=_judge(before, e, scores, readings),
            after=_judge(after, e, scores, readings),
        )
        for i, e in enumerate(examples, start=1)
    )
    digest = data_hash([p.example for p in pairs])
    return _replayed(before, after, pairs, readings.about, digest, seed=seed, gate=gate, command=command)


def replay_recorded(
    before: Policy,
    after: Policy,
    source: Source,
    calibrators: Calibrators,
    *,
    about: str,
    labels: Mapping[str, bool],
    seed: int,
    gate: Gate,
    command: str,
) -> Replay:
    """Put every recorded request to both policies, from the readings that its record keeps.

    Args:
        before: What is in force. Where it is what the record was decided by, the record has to say the same.
        after: What may replace it.
        source: From `read_recorded`.
        calibrators: Those of the records.
        about: The bundle, for the report.
        labels: Request id → whether it is harmful.
        seed: Of the bootstraps.
        gate: What may get worse.
        command: How this was asked for.
    """
    pairs = []
    agreement = Agreement()
    for i, row in enumerate(source.rows, start=1):
        one = decide_again(row.block, before, calibrators, texts=row.texts)
        other = decide_again(row.block, after, calibrators, texts=row.texts)
        agreement.add(row, before, one)
        harmful = labels.get(row.block.request_id)
        example = Example(
            source="record", split="eval", messages=row.texts.messages if row.texts else (),
            response=row.texts.response if row.texts else None,
            needs={} if harmful is None else {NEED: float(harmful)},
        )  # fmt: skip
        pairs.append(Pair(row=i, example=example, before=_of(one), after=_of(other), request_id=row.block.request_id))
    told = "".join(f"{row.block.request_id} {row.block.receipt.request_sha256}\n" for row in source.rows)
    found = _replayed(
        before, after, tuple(pairs), about, hashlib.sha256(told.encode()).hexdigest(), seed=seed, gate=gate,
        command=command,
    )  # fmt: skip
    return replace(found, figures={**found.figures, "recorded": agreement.as_json(), "left_out": dict(source.left_out)})


def _of(again: Again) -> Judged:
    return Judged(decision=again.decision, weights=again.weights, unknown=again.unknown)


def _replayed(
    before: Policy,
    after: Policy,
    pairs: tuple[Pair, ...],
    about: str,
    data_sha256: str,
    *,
    seed: int,
    gate: Gate,
    command: str,
) -> Replay:
    figures = _figures(before, after, pairs, about, data_sha256, seed, command)
    failed = tuple(_failed(figures, pairs, gate, seed))
    return Replay(before=before, after=after, pairs=pairs, figures=figures, failed=failed)


def _reads(example: Example) -> list[ReadRequest]:
    prompt = ReadRequest(messages=example.messages)
    if example.response is None:
        return [prompt]
    return [prompt, ReadRequest(messages=example.messages, response=example.response)]


def _judge(policy: Policy, example: Example, scores: Mapping[ReadRequest, Scores | None], readings: Readings) -> Judged:
    policy = for_tenant(policy, "")
    asked, *answered = _reads(example)
    situation = asked_situation(example.messages, Caller(tenant=""), None)
    try:
        plan = make_plan(_known(scores[asked]), policy=policy, calibrators=readings.calibrators, situation=situation)
    except JUDGING_FAILURES as error:
        plan = unread_plan(policy, failed_decision(policy, "input", error))
    decisions = [plan.decision]
    if answered and not plan.decision.action.stops:
        try:
            _, _, decision = judge_output(
                _known(scores[answered[0]]),
                plan=plan,
                policy=policy,
                calibrators=readings.calibrators,
                situation=answered_situation(situation, example.response),
            )
        except JUDGING_FAILURES as error:
            decision = failed_decision(policy, "output", error)
        decisions.append(decision)
    return Judged(decision=max(decisions, key=lambda d: SEVERITY[d.action]), weights=plan.weights)


def _known(scores: Scores | None) -> Scores:
    if scores is None:
        raise ValueError("the model's template does not take this conversation")
    check_scores(scores)
    return scores


def _figures(
    before: Policy, after: Policy, pairs: Sequence[Pair], about: str, data_sha256: str, seed: int, command: str
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "seed": seed,
        "bundle": about,
        "before": {"name": before.name, "version": before.version, "hash": before.hash},
        "after": {"name": after.name, "version": after.version, "hash": after.hash},
        "data_sha256": data_sha256,
        "n": len(pairs),
        "flips": {kind: n for kind in KINDS if (n := sum(p.flip == kind for p in pairs)) or kind != "unknown"},
        "errors": {},
    }
    for side, harmful in (("benign_refused", False), ("harm_passed", True)):
        labelled = _labelled(pairs, harmful)
        rows = [p for p in labelled if p.flip != "unknown"]
        if rows:
            figures["errors"][side] = {"n": len(rows)} | _paired(rows, harmful, seed)
            figures["errors"][side]["unknown"] = len(labelled) - len(rows)
    return figures


def _labelled(pairs: Sequence[Pair], harmful: bool) -> list[Pair]:
    return [p for p in pairs if p.example.needs.get(NEED) == float(harmful)]


def _paired(rows: Sequence[Pair], harmful: bool, seed: int) -> dict[str, Any]:
    """Both shares and their difference; rows are drawn as pairs, so that what both policies do alike cancels out.

    What is not known counts against the policy that is to come: no error before, an error after.
    """
    one = np.array([float(p.before.stops is not None and p.before.stops is not harmful) for p in rows])
    other = np.array([float(p.after.stops is not harmful) for p in rows])

    def difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(np.mean(b) - np.mean(a))

    return {"before": float(one.mean()), "after": float(other.mean())} | with_interval(
        "difference", difference, one, other, seed=seed, bootstraps=BOOTSTRAPS
    )


def _failed(figures: Mapping[str, Any], pairs: Sequence[Pair], gate: Gate, seed: int) -> list[str]:
    found = []
    for side, harmful in (("benign_refused", False), ("harm_passed", True)):
        most = getattr(gate, side)
        if most is None:
            continue
        errors = figures["errors"].get(side)
        if errors is None:
            found.append(f"{side}: no row is labelled for it, so nothing says that it rose by at most {most:g}")
            continue
        unknown = errors["unknown"]
        if unknown:
            errors = _paired(_labelled(pairs, harmful), harmful, seed)
        upper = errors["difference_interval"][1] if errors["difference_interval"] else 1.0
        if upper > most:
            worst = f", were the {unknown} unknown ones at their worst" if unknown else ""
            found.append(f"{side}: may have risen by {upper:.4f}{worst}, at most {most:g} is accepted")
    flips = figures["flips"]["newly stopped"] + figures["flips"]["newly passed"]
    unknown = figures["flips"].get("unknown", 0)
    if gate.flips is not None and flips + unknown > gate.flips:
        more = f" and {unknown} unknown" if unknown else ""
        found.append(f"flips: {flips}{more}, at most {gate.flips} are accepted")
    return found


def most_changed(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The requests that both policies answer with the most different weights, whose answers are worth comparing."""
    answered = [p for p in pairs if p.example.messages and p.before.stops is False and p.after.stops is False]
    return sorted(answered, key=lambda p: -p.shift_nats)[:count]
