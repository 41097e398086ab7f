"""Guard and route: the same path without weights being applied or text being made, batched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from hhh_router.errors import BackendTimeout, InvalidRequest, ReaderError
from hhh_router.pipeline.candidate import Beside, open_beside
from hhh_router.pipeline.conversations import Followed, tainted
from hhh_router.pipeline.onerror import (
    JUDGING_FAILURES,
    check_scores,
    failed_decision,
    unread_plan,
)
from hhh_router.pipeline.parts import Parts
from hhh_router.pipeline.people import Concerned, People
from hhh_router.pipeline.plan import judge_call, judge_output, make_plan
from hhh_router.pipeline.record import Record
from hhh_router.pipeline.results import GuardResult, RouteResult
from hhh_router.pipeline.situation import answered_situation, asked_situation, with_calls
from hhh_router.pipeline.tool_results import with_readings
from hhh_router.pipeline.validate import check_guard
from hhh_router.policy import Policy, asks, for_tenant
from hhh_router.trace.block import Metadata
from hhh_router.types import Action, Decision, GuardRequest, Plan, ReadRequest, Scores, Situation

_log = logging.getLogger(__name__)


async def run_guard(parts: Parts, requests: Sequence[GuardRequest]) -> list[GuardResult]:
    """Judge each text: the input checkpoint where there is a prompt, the output checkpoint where there is a response.

    All readings go to the reader in one call, which batches them.

    Raises:
        RequestError: One of the texts cannot be judged as it stands; the message says which.
        BackendTimeout: ``settings.request_timeout_s`` for each text passed.
    """
    return [GuardResult(metadata=metadata) for metadata in await _judge_all(parts, requests)]


async def run_route(parts: Parts, requests: Sequence[GuardRequest]) -> list[RouteResult]:
    """Needs, posterior and weights of each prompt, with the input checkpoint's decision.

    Raises:
        RequestError: One of the prompts cannot be read as it stands; the message says which.
        BackendTimeout: ``settings.request_timeout_s`` for each prompt passed.
    """
    for i, request in enumerate(requests):
        if not request.read.messages:
            raise InvalidRequest(f"{_where(i, requests)}no prompt", hint="routing reads prompts")
    return [RouteResult(metadata=metadata) for metadata in await _judge_all(parts, requests)]


async def _judge_all(parts: Parts, requests: Sequence[GuardRequest]) -> list[Metadata]:
    limit = parts.settings.max_batch_items
    if len(requests) > limit:
        raise InvalidRequest(
            f"{len(requests):,} items, one call may hold {limit:,}",
            hint="split the list, or raise HHH_ROUTER_MAX_BATCH_ITEMS",
        )
    policies = [for_tenant(parts.policies.get(r.policy), r.caller.tenant) for r in requests]
    for i, request in enumerate(requests):
        check_guard(request, max_bytes=parts.settings.max_body_bytes, where=_where(i, requests))
    if not requests:
        return []
    besides = [open_beside(parts, request) for request in requests]
    records = [Record(parts, *its) for its in zip(requests, policies, besides, strict=True)]
    followed = [await _follow(parts, request, policy) for request, policy in zip(requests, policies, strict=True)]
    readings = await _read_all(parts, requests)
    judged = []
    for i, (request, policy, record) in enumerate(zip(requests, policies, records, strict=True)):
        record.took("read", readings[i].took_ms)
        _judge(parts, request, policy, record, followed[i], readings[i], besides[i])
        judged.append(record.finish(request.read.response))
    return judged


def _where(i: int, requests: Sequence[GuardRequest]) -> str:
    return f"items[{i}]." if len(requests) > 1 else ""


class _Reading:
    """What was read of one request: its prompt alone, and its response (with the prompt, when there is one)."""

    __slots__ = ("prompt", "response", "took_ms")

    def __init__(
        self, prompt: Scores | ReaderError | None, response: Scores | ReaderError | None, took_ms: float
    ) -> None:
        self.prompt = prompt
        self.response = response
        self.took_ms = took_ms


async def _read_all(parts: Parts, requests: Sequence[GuardRequest]) -> list[_Reading]:
    """Read both views of every request in one call of the reader; a failure is kept in place of each reading."""
    wanted: list[ReadRequest] = []
    for request in requests:
        if request.read.messages:
            wanted.append(ReadRequest(messages=request.read.messages))
        if request.read.response is not None:
            wanted.append(request.read)
    begun = parts.clock()
    scores: Sequence[Scores | ReaderError]
    try:
        scores = await _read(parts, wanted, timeout_s=parts.settings.request_timeout_s * len(requests))
    except ReaderError as error:
        _log.warning("%d texts not read: %s", len(wanted), error.message)
        scores = [error] * len(wanted)
    took_ms = (parts.clock() - begun) * 1000
    found = iter(scores)
    return [
        _Reading(
            next(found) if request.read.messages else None,
            next(found) if request.read.response is not None else None,
            took_ms,
        )
        for request in requests
    ]


async def _read(parts: Parts, wanted: Sequence[ReadRequest], *, timeout_s: float) -> list[Scores]:
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            scores = await parts.reader.read(wanted)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise BackendTimeout(
            f"{len(wanted)} readings took longer than {timeout_s:g} s",
            hint="send fewer texts at once, or raise HHH_ROUTER_REQUEST_TIMEOUT_S",
        ) from error
    if len(scores) != len(wanted):
        raise ReaderError(f"the reader gave {len(scores)} readings for {len(wanted)} texts")
    return scores


async def _follow(parts: Parts, request: GuardRequest, policy: Policy) -> Followed:
    """Where the conversation stands, with what tools brought back read."""
    asked = asked_situation(request.turns or request.read.messages, request.caller, parts.now())
    followed = parts.conversations.follow(policy, asked, goes_on=request.goes_on)
    followed.situation = await with_readings(parts.reader, policy, followed.situation)
    return followed


def _judge(
    parts: Parts,
    request: GuardRequest,
    policy: Policy,
    record: Record,
    followed: Followed,
    reading: _Reading,
    beside: Beside,
) -> None:
    """Ask the checkpoints and write down what they said."""
    first = reading.prompt if reading.prompt is not None else reading.response
    assert first is not None  # check_guard: there is a prompt or a response
    asked = followed.situation
    plan = _plan(parts, policy, first, asked, checkpoint="input" if request.read.messages else "output")
    record.asked(asked)
    record.planned(plan, layers_run=0 if isinstance(first, ReaderError) else first.layers_run)
    if plan.tainted or (isinstance(first, ReaderError) and asked.results and asks(policy, "tool_result")):
        followed.taint()
        asked = tainted(asked)
    decisions = [*plan.others, plan.decision] if request.read.messages else []
    beside.planned(plan, asked, tuple(decisions))
    if reading.response is not None:
        answered = answered_situation(asked, request.read.response)
        decision = _judge_response(parts, policy, record, reading.response, plan, answered)
        decisions.append(decision)
        if isinstance(reading.response, ReaderError):
            beside.failed("output", reading.response, decision)
        else:
            beside.answered(reading.response, answered, decision)
    for n, call in enumerate(request.calls, 1):
        situation = with_calls(asked, n)
        judged = judge_call(call, plan=plan, policy=policy, situation=situation) if asks(policy, "tool_call") else None
        record.called(call.name)
        beside.called(call, situation, judged)
        decisions += [] if judged is None else [judged]
    about = Concerned(
        request_id=request.request_id,
        policy=f"{policy.name}@{policy.version}",
        enforced=policy.mode == "enforce",
        conversation=followed.name,
    )
    people = People(None, parts.tell, about)
    for n, decision in enumerate(decisions):
        record.decided(decision)
        people.inform(decision, number=n)
    read = reading.prompt if reading.response is None else reading.response
    followed.spend(
        tokens=read.tokens if isinstance(read, Scores) else 0,
        refusals=any(d.action.stops and d.action is not Action.ESCALATE for d in decisions),
        calls=request.calls,
    )


def _plan(parts: Parts, policy: Policy, scores: Scores | ReaderError, situation: Situation, *, checkpoint: str) -> Plan:
    try:
        if isinstance(scores, ReaderError):
            raise scores
        check_scores(scores)
        return make_plan(scores, policy=policy, calibrators=parts.calibrators, situation=situation)
    except JUDGING_FAILURES as error:
        return unread_plan(policy, failed_decision(policy, checkpoint, error))


def _judge_response(
    parts: Parts, policy: Policy, record: Record, scores: Scores | ReaderError, plan: Plan, situation: Situation
) -> Decision:
    try:
        if isinstance(scores, ReaderError):
            raise scores
        check_scores(scores)
        evidence, confidence, decision = judge_output(
            scores, plan=plan, policy=policy, calibrators=parts.calibrators, situation=situation
        )
    except JUDGING_FAILURES as error:
        record.unread(0)
        return failed_decision(policy, "output", error)
    record.read_again(evidence, confidence)
    return decision
