"""One chat: plan mid-pass, hold the reply back, judge each window, and let out only what was cleared."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from hhh_router.errors import BackendTimeout, DeadlineExceeded, GeneratorError, ReaderError
from hhh_router.pipeline.candidate import open_beside
from hhh_router.pipeline.conversations import tainted
from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision, unread_plan
from hhh_router.pipeline.parts import Parts
from hhh_router.pipeline.people import Concerned, People, beats, settled_decision
from hhh_router.pipeline.plan import judge_call, judge_output
from hhh_router.pipeline.planning import Planning
from hhh_router.pipeline.record import Record
from hhh_router.pipeline.release import Release
from hhh_router.pipeline.results import ChatDelta, ChatEvent, ChatFinished, ChatStarted, Usage
from hhh_router.pipeline.situation import answered_situation, asked_situation, with_calls
from hhh_router.pipeline.tool_results import with_readings
from hhh_router.pipeline.validate import check_chat
from hhh_router.policy import Policy, asks, for_tenant, steers
from hhh_router.protocols import Delta, Event, Finished, Planned, Redacted, Steered, TokenLogprob, Unread, Window
from hhh_router.tools import CallScanner, calls_as_text
from hhh_router.trace.spans import redacted
from hhh_router.types import Action, ChatRequest, Decision, Situation, ToolCall

_log = logging.getLogger(__name__)

STOPPED = "This request was stopped by the policy of this service."
"""What the caller reads when a decision stops the reply and carries no message."""


async def run_chat(parts: Parts, request: ChatRequest, *, stream: bool) -> AsyncGenerator[ChatEvent, None]:
    """Answer one request: `ChatStarted`, then `ChatDelta` events of cleared text, then `ChatFinished`.

    Args:
        parts: The deployment.
        request: What the caller asked.
        stream: Let text out window by window. False holds all of it to the end, so that ``regenerate`` can still
            act on the last window.

    Raises:
        RequestError: The request cannot be answered as it stands.
        DeadlineExceeded: The request's own ``timeout_s`` passed.
        BackendTimeout: ``settings.request_timeout_s`` passed, or an upstream was silent.
        Overloaded, Unavailable: Nothing was begun; the error says when to come back.
        BackendError: The generator failed and the policy's ``on_error`` is open, or an upstream failed. Nothing that
            was not cleared has been let out.
    """
    policy = for_tenant(parts.policies.get(request.policy), request.caller.tenant)
    check_chat(request, max_bytes=parts.settings.max_body_bytes, any_order=parts.answers_elsewhere)
    most = parts.settings.request_timeout_s
    own = request.timeout_s is not None and request.timeout_s < most
    request = replace(
        request, request_id=request.request_id or parts.new_id(), timeout_s=request.timeout_s if own else most
    )
    async with aclosing(_Run(parts, request, policy, stream=stream, own_deadline=own).events()) as events:
        async for event in events:
            yield event


class _Run:
    """The state of one chat."""

    def __init__(self, parts: Parts, request: ChatRequest, policy: Policy, *, stream: bool, own_deadline: bool) -> None:
        self._parts = parts
        self._request = request
        self._policy = policy
        self._stream = stream
        self._enforce = policy.mode == "enforce"
        assert request.timeout_s is not None
        self._timeout_s = request.timeout_s
        self._own_deadline = own_deadline  # of the caller, not of the deployment
        self._deadline = asyncio.get_running_loop().time() + self._timeout_s
        situation = asked_situation(request.turns or request.messages, request.caller, parts.now())
        self._followed = parts.conversations.follow(policy, situation, goes_on=request.goes_on)
        self._situation = self._followed.situation
        self._calls: list[ToolCall] = []  # of the reply so far
        self._beside = open_beside(parts, request, stream=stream)
        self._record = Record(parts, request, policy, self._beside)
        self._release = Release()
        self._scanner = self._new_scanner()
        self._logprobs: list[float] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self._planning = Planning(
            policy, parts.calibrators, self._situation, pinned=request.weights, request_id=request.request_id
        )
        self._verdict: Decision | None = None
        self._finished: Finished | None = None
        self._people = People(
            parts.hold,
            parts.tell,
            Concerned(
                request_id=request.request_id,
                policy=f"{policy.name}@{policy.version}",
                enforced=self._enforce,
                conversation=self._followed.name,
            ),
        )
        self._redact: dict[str, None] = {}  # what decisions take out of the reply
        self._redacting = parts.redacting()
        self._said: list[ChatDelta] = []  # cleared, as the model said it
        self._cleared: list[ChatDelta] = []  # the same as it leaves
        self._told_calls = False
        self._out = False  # something has reached the caller
        self._regenerated = False
        self._spent_tokens = 0  # by an attempt that was thrown away

    async def events(self) -> AsyncGenerator[ChatEvent, None]:
        try:
            self._situate(await with_readings(self._parts.reader, self._policy, self._situation))
            self._record.asked(self._situation, stream=self._stream)
            while True:
                async with aclosing(self._attempt()) as deltas:
                    async for delta in deltas:
                        if not delta.waits:
                            self._cleared.append(delta)
                        if self._stream:
                            if not self._out:
                                self._out = True
                                yield ChatStarted(metadata=self._record.metadata())
                            if not delta.waits:
                                self._record.first_text()
                            yield delta
                if self._verdict is None or self._verdict.action is not Action.REGENERATE:
                    break
                self._begin_again(self._verdict)
            async with aclosing(self._ending()) as events:
                async for event in events:
                    yield event
        finally:
            self._record.close()
            self._followed.spend(
                tokens=self._prompt_tokens + self._completion_tokens,
                refusals=self._verdict is not None and self._verdict.action is not Action.ESCALATE,
                calls=self._calls,
            )

    @property
    def _prompt_tokens(self) -> int:
        return self._finished.prompt_tokens if self._finished else self._record.prompt_tokens

    @property
    def _completion_tokens(self) -> int:
        """With those of an attempt that was thrown away."""
        return self._spent_tokens + self._release.tokens

    async def _attempt(self) -> AsyncGenerator[ChatDelta, None]:
        """Run the generator once; sets ``_verdict`` when a decision ends it, ``_finished`` when it came to its end."""
        self._verdict = self._finished = None
        generated = self._parts.generator.generate(
            self._request,
            self._planning.plan,
            window_tokens=self._policy.window_tokens,
            steer=self._planning.steer if self._enforce and steers(self._policy) else None,
        )
        try:
            async with aclosing(generated):
                while self._verdict is None and (event := await self._next(generated)) is not None:
                    for delta in self._take(event):
                        if (piece := self._tell(delta)) is not None:
                            async with aclosing(self._judged(piece)) as pieces:
                                async for told in pieces:
                                    yield told
                        if self._verdict is not None:
                            break
                    self._beside.catch_up()  # while the model makes what comes next
            if self._verdict is None and self._finished is None:
                raise GeneratorError("the reply broke off: the generator ended without saying so")
            if self._verdict is None:
                rest = "" if self._scanner is None else self._scanner.end()
                for piece in [*(self._leave(ChatDelta(text=rest)) if rest else ()), *self._redacting.end()]:
                    yield piece
        except (ReaderError, GeneratorError) as error:
            _log.warning("%s: %s", self._request.request_id, error.message)
            decision = self._fail(error)
            if not (self._enforce and decision.action.stops):
                raise  # the policy would go on, but there is no reply to go on with
            self._verdict = decision

    def _tell(self, delta: Delta) -> ChatDelta | None:
        """A cleared delta as the caller sees it; None for a token that shows its text only with the next one."""
        if self._scanner is None or delta.raw is not None:
            piece = ChatDelta(text=delta.text, raw=delta.raw, logprobs=delta.told, tool_calls=delta.calls)
        else:
            text, calls = self._scanner.push(delta.text)
            # a piece of a call is no text of the reply, so its tokens are not told
            piece = ChatDelta(text=text, logprobs=delta.told if text else (), tool_calls=calls)
        return piece if piece.text or piece.logprobs or piece.tool_calls or piece.raw is not None else None

    def _leave(self, piece: ChatDelta) -> list[ChatDelta]:
        """What may leave of a cleared piece and of those before it, without what decisions redact."""
        self._said.append(piece)
        if not self._redact:
            return [piece]
        return self._redacting.push(piece, tuple(self._redact))

    async def _judged(self, piece: ChatDelta) -> AsyncGenerator[ChatDelta, None]:
        """A cleared piece once its calls may reach the caller; asks the checkpoint tool_call about each."""
        plan = self._record.plan
        self._told_calls = self._told_calls or bool(piece.tool_calls)
        for call in piece.tool_calls:
            self._calls.append(call)
            if plan is None:
                continue
            self._record.called(call.name)
            situation = with_calls(self._situation, len(self._calls))
            if not asks(self._policy, "tool_call"):
                self._beside.called(call, situation, None)
                continue
            judged = decision = judge_call(call, plan=plan, policy=self._policy, situation=situation)
            self._people.inform(judged, call=call, number=len(self._calls))
            if self._people.holds(judged):
                loop, held = asyncio.get_running_loop(), self._people.ask(call, judged)
                begun = loop.time()
                async with aclosing(beats(held)) as waiting:
                    async for _ in waiting:
                        yield ChatDelta(text="", waits=True)
                self._deadline += loop.time() - begun  # what people take is no time of the request's
                decision = settled_decision(judged, held.result())
            self._decide(replace(decision, webhook=None))  # it was told
            self._beside.called(call, situation, judged)
            if self._verdict is not None:
                return
        for told in self._leave(piece):
            yield told

    def _new_scanner(self) -> CallScanner | None:
        """For the calls in a reply; None where nothing may be called."""
        if (tools := self._request.tools) is None:
            return None
        return CallScanner((t.name for t in tools.callable), prefix=f"call_{self._request.request_id}")

    async def _next(self, generated: AsyncGenerator[Event, None]) -> Event | None:
        try:
            async with asyncio.timeout_at(self._deadline) as deadline:
                return await anext(generated, None)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise self._too_late() from error
        except BackendTimeout as error:  # of the engine, which counts as we do, or of an upstream
            if asyncio.get_running_loop().time() < self._deadline:
                raise
            raise self._too_late() from error

    def _too_late(self) -> BackendTimeout:
        if self._own_deadline:
            return DeadlineExceeded(
                f"no end of the reply within {self._timeout_s:g} s, as this request asked",
                hint="ask for fewer tokens, or allow more time",
            )
        return BackendTimeout(
            f"no end of the reply after {self._timeout_s:g} s",
            hint="ask for fewer tokens, or raise HHH_ROUTER_REQUEST_TIMEOUT_S",
        )

    def _take(self, event: Event) -> list[Delta]:
        """Act on one event; returns what it cleared."""
        match event:
            case Planned():
                self._take_plan(event)
                return []
            case Unread():
                return self._take_unread(event)
            case Finished():
                return self._take_end(event)
        if self._record.plan is None:
            raise GeneratorError("the generator sent text before it had asked the planner")
        if isinstance(event, Window):
            return self._take_window(event)
        if isinstance(event, Steered):
            self._record.steered(event)
            return []
        if isinstance(event, Redacted):
            self._record.redacted("input", event.counts)
            return []
        self._release.hold(event)
        if event.logprob is not None:
            self._logprobs.append(event.logprob)
        return [] if self._enforce else self._release.take_all()

    def _take_plan(self, event: Planned) -> None:
        self._prompt_logprobs = event.prompt_logprobs
        self._record.planned(
            event.plan, layers_run=event.layers_run, read_ms=event.read_ms, prompt_tokens=event.prompt_tokens
        )
        if event.plan.tainted:
            self._taint()
        for other in event.plan.others:
            self._record.decided(other)
            self._people.inform(other)
        self._decide(event.plan.decision)
        self._beside.planned(event.plan, self._situation, (*event.plan.others, event.plan.decision))

    def _take_window(self, event: Window) -> list[Delta]:
        plan = self._record.plan
        assert plan is not None
        situation = answered_situation(self._situation, self._reply(event.completion_tokens))
        with self._record.timed("judge"):
            try:
                check_scores(event.scores)
                evidence, confidence, decision = judge_output(
                    event.scores,
                    plan=plan,
                    policy=self._policy,
                    calibrators=self._parts.calibrators,
                    logprobs=self._logprobs,
                    situation=situation,
                )
                self._record.read_again(
                    evidence,
                    confidence,
                    reply_tokens=event.completion_tokens,
                    is_final=event.is_final,
                    logprobs=self._logprobs,
                )
            except JUDGING_FAILURES as error:
                _log.warning("%s: output not judged: %s", self._request.request_id, error)
                self._record.unread(event.completion_tokens)
                decision = failed_decision(self._policy, "output", error)
        said, decision = decision, self._decide(decision)
        if not self._enforce:  # in shadow all text leaves at once, which it would not where the decision acts
            decision = said
        self._beside.answered(event.scores, situation, decision, logprobs=self._logprobs, is_final=event.is_final)
        if self._enforce:
            self._redact |= dict.fromkeys(decision.redact)
        return [] if self._verdict else self._release.clear(covered_tokens=event.completion_tokens)

    def _taint(self) -> None:
        self._followed.taint()
        self._situate(tainted(self._situation))

    def _situate(self, situation: Situation) -> None:
        self._situation = self._planning.situation = situation

    def _reply(self, covered_tokens: int) -> str:
        """The reply's text as far as a window has seen it. An upstream's chunks tell calls in their text already."""
        told = "".join(d.text + (calls_as_text(d.tool_calls) if d.raw is None else "") for d in self._said)
        return told + self._release.text(covered_tokens=covered_tokens)

    def _take_unread(self, event: Unread) -> list[Delta]:
        self._fail(event.error, prompt_tokens=event.prompt_tokens)
        return [] if self._verdict else self._release.clear(covered_tokens=event.completion_tokens)

    def _take_end(self, event: Finished) -> list[Delta]:
        self._finished = event
        self._record.finished(event)
        if self._enforce and self._release.uncleared:
            raise GeneratorError("the reply ended before its last part was read")
        return self._release.take_all()  # text-free chunks, such as an upstream's usage

    def _decide(self, decision: Decision) -> Decision:
        """Write a decision down and, if it acts, make it the verdict of this attempt. In shadow mode none acts.

        Returns:
            The decision as it holds: what cannot be made again any more is refused.
        """
        if decision.action is Action.REGENERATE and (self._regenerated or self._out):
            why = "text was already released" if self._out else "the second reply is no better"
            decision = replace(decision, action=Action.REFUSE, reason=f"{decision.reason}; not regenerated: {why}")
        self._record.decided(decision)
        self._people.inform(decision)
        if self._enforce and (decision.action.stops or decision.action is Action.REGENERATE):
            self._verdict = decision
        return decision

    def _fail(self, error: Exception, *, prompt_tokens: int = 0) -> Decision:
        checkpoint = "input" if self._record.plan is None else "output"
        decision = failed_decision(self._policy, checkpoint, error)
        if self._record.plan is not None:
            self._record.unread(self._release.tokens)
        else:
            plan = unread_plan(self._policy, decision)
            self._record.planned(plan, layers_run=0, read_ms=None, prompt_tokens=prompt_tokens)
            if self._situation.results and asks(self._policy, "tool_result"):
                self._taint()  # nobody knows what they say
        decision = self._decide(decision)
        self._beside.failed(checkpoint, error, decision)
        return decision

    def _begin_again(self, verdict: Decision) -> None:
        """Throw the reply away and raise the floors: nothing of it has left."""
        self._beside.ended(f"the rest of the reply, which was made again after {self._release.tokens} tokens")
        self._beside.catch_up()
        self._regenerated = True
        self._planning.begin_again(verdict.raises)
        self._spent_tokens += self._release.tokens
        self._release = Release()
        self._scanner = self._new_scanner()
        self._calls.clear()
        self._redact.clear()
        self._redacting = self._parts.redacting()
        self._said.clear()
        self._cleared.clear()
        self._logprobs.clear()
        self._record.begin_again()

    def _end_beside(self) -> None:
        """Say what a candidate could not see, for it was stopped before."""
        if self._verdict is not None and self._release.tokens:
            self._beside.ended(f"the rest of the reply, which was stopped after {self._release.tokens} tokens")
        elif self._verdict is not None:
            self._beside.ended("no reply was made")
        if self._finished is not None and self._finished.reason == "tool_calls" and not self._told_calls:
            self._record.unseen_calls()

    async def _ending(self) -> AsyncGenerator[ChatEvent, None]:
        self._end_beside()
        refusal = None
        asked = self._request.sampling.top_logprobs is not None
        if self._verdict is not None:
            refusal = self._verdict.message or STOPPED
            if not self._out:
                self._cleared.clear()  # nothing left yet, so the message stands alone
            parted = any(delta.text for delta in self._cleared)
            asked = asked and parted
            self._cleared.append(ChatDelta(text=f"\n\n{refusal}" if parted else refusal, is_refusal=True))
        pending = self._cleared if not self._out else self._cleared[-1:] if refusal else []
        text = "".join(delta.text for delta in self._cleared)
        if self._redact and any(delta.raw is not None for delta in self._cleared):  # its chunks were, its text was not
            text = redacted(text, tuple(self._redact))
        calls = tuple(call for delta in self._cleared for call in delta.tool_calls)
        finish_reason = "content_filter" if refusal is not None else self._finished.reason if self._finished else "stop"
        if calls and finish_reason == "stop":
            finish_reason = "tool_calls"
        usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._completion_tokens)
        self._record.first_text()
        self._record.redacted("output", self._redacting.counts)
        metadata = self._record.finish(text + calls_as_text(calls))
        if not self._out:
            yield ChatStarted(metadata=metadata)
        for delta in pending:
            yield delta
        yield ChatFinished(
            text=text,
            finish_reason=finish_reason,
            usage=usage,
            metadata=metadata,
            refusal=refusal,
            tool_calls=calls,
            prompt_logprobs=self._prompt_logprobs,
            stop=self._finished.stop if self._finished and finish_reason == "stop" else None,
            logprobs=tuple(told for delta in self._cleared for told in delta.logprobs) if asked else None,
        )
