"""``annotate`` and ``enforce`` for one request: what it says and what is answered go through the pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from hhh_router.errors import BackendError, InvalidRequest
from hhh_router.interfaces.proxy.client_request import ClientRequest
from hhh_router.interfaces.proxy.exchange import Exchange
from hhh_router.interfaces.proxy.guarded import Guarded
from hhh_router.interfaces.proxy.headers import passing
from hhh_router.interfaces.proxy.passing import Passing
from hhh_router.interfaces.proxy.policies import compared, escalated, rules_of, shadowed
from hhh_router.interfaces.proxy.redacting import FrameRedacting
from hhh_router.interfaces.proxy.upstreams import Answer, Upstream
from hhh_router.interfaces.server.http import WireError
from hhh_router.pipeline.people import Concerned, Settled
from hhh_router.pipeline.situation import asked_situation
from hhh_router.policy import asks
from hhh_router.trace.block import Metadata
from hhh_router.types import Action, ChatRequest, Decision, Message, ToolCall


class Guarding:
    """The way of one request through the pipeline."""

    def __init__(self, client: ClientRequest, passing_: Passing) -> None:
        self._client = client
        self._passing = passing_
        self._app = client.app

    async def run(self) -> None:
        """Answer, with what was measured and decided kept in the outcome."""
        client = self._client
        assert client.wire is not None
        enforce = client.mode == "enforce"
        if client.body is None:
            limit = self._app.pipeline.settings.max_body_bytes
            if not enforce or self._app.pipeline.policies.get(client.route.policy).on_error == "open":
                await self._passing.observed()
                return
            raise WireError(
                413,
                f"the body is larger than {limit:,} bytes; send less, or raise HHH_ROUTER_MAX_BODY_BYTES",
                code="too_large",
            )
        try:
            client.asked = client.wire.asked(client.object())
        except InvalidRequest:
            if enforce:
                raise
            await self._passing.observed()
            return
        policy = client.own_policy()
        client.start_intent(policy)
        metadata: Metadata | None = None
        try:
            metadata = await self._guarded(policy, enforce=enforce)
        finally:
            if metadata is not None:
                client.entry.outcome["hhh"] = metadata.recorded.as_json()

    async def _guarded(
        self, policy: str | None, *, enforce: bool, escalating: Upstream | None = None
    ) -> Metadata | None:
        client, route = self._client, self._client.route
        assert client.wire is not None
        parts = compared(self._app.parts, route.policy, route.candidate)
        settings = parts.settings
        applied = parts.policies.get(policy)
        extra = {"x-hhh-upstream": "-"}

        async def ask() -> Answer:
            order = [escalating] if escalating is not None else route.order(self._app.draw)
            words = [exchange.instruction] if route.instruct else []
            words += [r.steering for r in rules_of(applied) if enforce and r.place == exchange.rule]
            told = "\n\n".join(w for w in words if w) or None
            if exchange.redact:
                exchange.taken_out = client.redact(exchange.redact)
            answer = await self._passing.ask_one_of(
                order,
                lambda u: self._passing.outgoing(u, self._passing.body_for(u, told)),
                may_hedge=escalating is None,
            )
            extra["x-hhh-upstream"] = client.asking.answered_by or "-"
            if client.asking.hedge is not None:
                extra["x-hhh-hedge"] = client.asking.hedge
            return answer

        exchange = Exchange(
            parts.reader,
            client.wire,
            client.asked,
            ask,
            enforce=enforce,
            plan_first=enforce or route.instruct,
            hold_calls=enforce and asks(applied, "tool_call"),
            guard_timeout_s=self._app.config.guard_timeout_s,
            max_bytes=settings.max_body_bytes,
        )
        client.entry.hear(client.asked.messages, lambda: exchange.reply.text)
        longest = max(u.timeouts.first_byte_s + u.timeouts.idle_s for u in self._app.config.upstreams())
        parts = replace(
            parts,
            generator=exchange,
            answers_elsewhere=True,
            hold=self._hold,
            redacting=partial(FrameRedacting, client.wire.name),
            settings=settings.model_copy(update={"request_timeout_s": max(longest, settings.request_timeout_s)}),
        )
        parts = escalated(parts) if escalating else parts if enforce else shadowed(parts)

        def escalate(done: Metadata) -> Coroutine[Any, Any, Metadata | None] | None:
            """To whom the rule says, or else the route; nobody is asked twice."""
            places = {d.rule for d in done.decisions if d.action == Action.ESCALATE}
            named = next((r.upstream for r in rules_of(applied) if r.place in places and r.upstream), None)
            known = {u.name: u for u in self._app.config.upstreams()}
            to = known.get(named) if named is not None else route.escalate_to
            if to is None or escalating is not None:
                return None
            client.entry.outcome["escalated_to"] = to.name
            return self._guarded(policy, enforce=enforce, escalating=to)

        request = ChatRequest(
            messages=client.asked.messages or (Message(role="user", content=""),),
            policy=policy,
            request_id=client.request_id,
            not_inspected=client.asked.not_inspected,
            caller=client.caller(applied),
            turns=client.asked.turns,
            goes_on=client.asked.goes_on,
            passthrough={"wire": client.wire.name, "body_sha256": hashlib.sha256(client.body or b"").hexdigest()},
        )
        guarded = Guarded(
            parts,
            exchange,
            client.wire.call(request, client.asked),
            client.out,
            block=self._app.config.block,
            enforce=enforce,
            escalate=escalate,
            extra=extra,
        )
        try:
            return await self._run(guarded, exchange)
        finally:
            if exchange.reply.answer_id is not None:
                told = asked_situation(request.turns, request.caller, None)
                parts.conversations.also_called(told.caller, exchange.reply.answer_id)
            if client.key is not None:
                self._app.keys.spend(client.key, exchange.spent_tokens)

    async def _hold(self, call: ToolCall, decision: Decision, about: Concerned) -> Settled:
        """Have people decide about a call; the outcome says what they did."""
        settled = await self._app.approvals.hold(call, decision, about)
        told = {"id": settled.id, "tool": call.name, "approved": settled.is_approved, "why": settled.why}
        self._client.entry.outcome.setdefault("held", []).append({**told, "note": settled.note})
        return settled

    async def _run(self, guarded: Guarded, exchange: Exchange) -> Metadata | None:
        client = self._client
        try:
            return await guarded.run()
        except BackendError:
            if exchange.kind == "error" and not client.out.begun:  # the upstream's own words, as they came
                assert exchange.answer is not None
                client.entry.outcome["not_inspected"] = [f"response: status {exchange.answer.status}"]
                headers = passing(exchange.answer.headers, without={b"content-length"})
                await client.out.whole(exchange.answer.status, headers, exchange.error_body)
                return None
            raise
