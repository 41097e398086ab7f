"""One request of a client: from its first byte to the outcome that is kept of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from hhh_router.errors import BackendError, HHHRouterError, InvalidRequest, Unavailable, UpstreamError
from hhh_router.interfaces.parse import our_fields
from hhh_router.interfaces.proxy.entry import Entry
from hhh_router.interfaces.proxy.exchange import Exchange
from hhh_router.interfaces.proxy.guarded import Guarded
from hhh_router.interfaces.proxy.headers import encoded, find, passing, replaced
from hhh_router.interfaces.proxy.incoming import Incoming, Out
from hhh_router.interfaces.proxy.instruct import instructed
from hhh_router.interfaces.proxy.observe import Seen, Tee, parsed
from hhh_router.interfaces.proxy.policies import compared, escalated, rules_of, shadowed
from hhh_router.interfaces.proxy.routes import Route, find_route
from hhh_router.interfaces.proxy.upstreams import BREAKS, KEYS, RETRIED, Answer, Asking, Outgoing, Upstream
from hhh_router.interfaces.proxy.wires import Asked, Wire, find_wire
from hhh_router.interfaces.server.anthropic import anthropic_failure
from hhh_router.interfaces.server.http import Failure, WireError, dump, failure
from hhh_router.interfaces.server.keys import Key, as_caller, check_policy
from hhh_router.policy import Policy, asks, headers_read
from hhh_router.trace.block import Metadata
from hhh_router.types import Action, Caller, ChatRequest, Message

if TYPE_CHECKING:
    from hhh_router.interfaces.proxy.app import Sidecar

_OWN_PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
"""Where the deployment's own mixture answers on a wire."""
_OWN_MODEL = "hhh-auto"
_NEVER_SENT = frozenset({b"host", b"expect"})
_CLOSE = (b"connection", b"close")


class Handling:
    """One request, from its first byte to its outcome."""

    def __init__(self, app: Sidecar, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._scope = scope
        self._request_id = app.pipeline.parts.new_id()
        self._in = Incoming(scope, receive)
        self._entry = Entry(app.audit, self._request_id, app.config.audit_failure)
        self._out = Out(send, self._entry.stored)
        self._wire: Wire | None = None
        self._call_failure: Callable[[Exception], Failure] = (
            failure if find(self._in.headers, b"anthropic-version") is None else anthropic_failure
        )
        self._asked = Asked(messages=())
        self._asking = Asking()
        self._route: Route | None = None
        self._key: Key | None = None
        self._body: bytes | None = None
        self._parsed: Mapping[str, Any] | None = None

    @property
    def _mode(self) -> str:
        assert self._route is not None
        return self._route.mode

    async def run(self) -> None:
        """Answer. The work ends when the client leaves, or when the process has to."""
        work = asyncio.ensure_future(self._work())
        left = asyncio.ensure_future(self._client_leaves())
        self._app.track(asyncio.current_task())  # type: ignore[arg-type]  # ASGI runs in a task
        try:
            await asyncio.wait({work, left, self._app.cut}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                if left.done():
                    self._entry.outcome["ended"] = "the client left"
                else:
                    self._entry.outcome["ended"] = "the process shut down"
                    await self._fail(Unavailable("the proxy is shutting down", hint="try again", retry_after_s=5.0))
            else:
                work.result()
        except (OSError, ClientDisconnect):
            self._entry.outcome["ended"] = "the client left"
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
            await self._finish()

    async def _client_leaves(self) -> None:
        while (await self._in.after_body())["type"] != "http.disconnect":
            pass

    async def _work(self) -> None:
        try:
            await self._answer()
        except (OSError, ClientDisconnect):
            raise  # nobody is there to be told
        except Exception as error:  # a door: whatever broke must reach the caller as an error of its wire
            await self._fail(error)

    async def _answer(self) -> None:
        app = self._app
        if not self._in.path.startswith("/"):
            raise InvalidRequest("the request's target is no path", hint="use this address as a base URL, not a proxy")
        if app.draining:
            raise Unavailable("the proxy is shutting down", hint="try again", retry_after_s=5.0)
        if app.keys.required:
            self._key = app.keys.caller(Request(self._scope))
            if self._key is not None:
                app.keys.admit(self._key, "chat")
        self._wire = find_wire(self._in.method, self._scope["path"])
        if self._wire is not None:
            self._body = await self._in.body(app.pipeline.settings.max_body_bytes)
        self._route = find_route(app.config.routes, self._scope["path"], self._model)
        if self._route is None:
            raise WireError(404, f"no route of this proxy takes {self._scope['path'][:200]}", code="no_route")
        try:
            if self._wire is None:
                await self._pass_unread()
            elif self._mode == "observe":
                await self._pass_observed()
            else:
                await self._guard()
        except BackendError as error:
            if not (self._route.answer_here and self._wire and self._wire.name in _OWN_PATHS) or self._out.begun:
                raise
            self._entry.outcome["upstream_failed"] = error.message
            await self._answer_here(_OWN_PATHS[self._wire.name])

    async def _answer_here(self, path: str) -> None:
        """Let the deployment's own mixture answer; its door guards it as it does every chat."""
        self._asking.answered_by = _OWN_MODEL
        self._asking.tried.append(f"{_OWN_MODEL}: asked")
        data = dump({**self._object(), "model": _OWN_MODEL})
        without = {b"content-length", b"content-encoding"}
        headers = [*passing(self._in.headers, without=without), (b"content-length", str(len(data)).encode())]
        pending: list[Any] = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Any:
            return pending.pop() if pending else await asyncio.Event().wait()  # a client that leaves is seen outside

        scope = {**self._scope, "path": path, "raw_path": path.encode(), "headers": headers}
        await self._app.own(scope, receive, self._out.asgi)

    def _model(self) -> str | None:
        try:
            return str(self._object().get("model")) if self._body else None
        except InvalidRequest:
            return None

    def _object(self) -> Mapping[str, Any]:
        if self._parsed is None:
            strict = self._route is None or self._mode == "enforce"
            encoding = find(self._in.headers, b"content-encoding")
            limit = self._app.pipeline.settings.max_body_bytes
            self._parsed = parsed(self._body or b"", encoding, max_bytes=limit, strict=strict)
        return self._parsed

    # -- passing on ---------------------------------------------------------------------------------------------------

    async def _pass_unread(self) -> None:
        """A path that nobody can read."""
        path = self._scope["path"][:200]
        if self._mode == "enforce" and self._app.config.unread_paths == "refuse" and self._in.method != "GET":
            raise WireError(
                403, f"{path}: nobody here can read such requests, so they do not pass", code="path_not_allowed"
            )
        self._entry.outcome["not_inspected"] = [f"path {path}"]
        self._start_intent(self._route.policy if self._route else None)
        body = self._in.pieces() if self._in.has_body else None
        await self._relay(await self._ask(lambda upstream: self._outgoing(upstream, body)), Tee(0))

    async def _pass_observed(self) -> None:
        """Read beside it, later. A body that is too large is not read at all."""
        if self._body is None:
            self._entry.outcome["not_inspected"] = ["request: larger than what is read"]
            body = self._in.pieces()
            self._start_intent(self._route.policy if self._route else None)
            await self._relay(await self._ask(lambda upstream: self._outgoing(upstream, body)), Tee(0))
            return
        assert self._route is not None
        self._start_intent(self._route.policy)
        tee = Tee(self._app.pipeline.settings.max_body_bytes)
        answer = await self._ask(lambda upstream: self._outgoing(upstream, self._body_for(upstream)))
        broke = True
        try:
            await self._relay(answer, tee)
            broke = False
        finally:
            assert self._wire is not None
            taken = self._app.observer.take(
                Seen(
                    request_id=self._request_id,
                    wire=self._wire,
                    policy=self._route.policy,
                    candidate=self._route.candidate,
                    caller=self._caller(self._app.pipeline.policies.get(self._route.policy)),
                    body=self._body,
                    body_encoding=find(self._in.headers, b"content-encoding"),
                    status=answer.status,
                    headers=answer.headers,
                    answer=tee.copy,
                    is_cut=broke or tee.is_cut,
                )
            )
            if not taken:
                self._entry.outcome["not_inspected"] = ["all of it: too much waits to be read"]

    async def _relay(self, answer: Answer, tee: Tee) -> None:
        """The upstream's answer, byte for byte as it comes."""
        try:
            await self._out.begin(answer.status, passing(answer.headers))
            async for piece in answer.pieces():
                tee.add(piece)
                await self._out.part(piece)
            await self._out.part(b"", more=False)
        finally:
            answer.close()

    async def _ask(self, make: Callable[[Upstream], Outgoing]) -> Answer:
        assert self._route is not None
        return await self._ask_one_of(self._route.order(self._app.draw), make)

    async def _ask_one_of(self, order: list[Upstream], make: Callable[[Upstream], Outgoing]) -> Answer:
        assert self._route is not None
        answer = await self._app.upstreams.ask(order, make, self._asking)
        if self._route.answer_here and answer.status in BREAKS | RETRIED:
            answer.close()
            raise UpstreamError(f"the last upstream answered {answer.status}", status=answer.status)
        return answer

    def _outgoing(self, upstream: Upstream, body: Any) -> Outgoing:
        guarded = self._wire is not None and self._mode != "observe"
        without = set(_NEVER_SENT)
        if self._in.is_chunked or isinstance(body, bytes):
            without.add(b"content-length")
        if self._app.keys.required:
            without |= KEYS  # they are this door's
        headers = passing(self._in.headers, without=without)
        if guarded:  # so that the answer can be read
            headers = replaced(headers, [(b"accept-encoding", b"identity")])
        return Outgoing(
            method=self._in.method,
            path=self._in.path,
            query=self._in.query,
            headers=headers,
            body=body,
            changes_nothing=self._in.method in ("GET", "HEAD", "OPTIONS") or self._wire is not None,
        )

    def _body_for(self, upstream: Upstream, instruction: str | None = None) -> bytes:
        """The client's own bytes, unless something has to be taken out of them or put in."""
        assert self._body is not None
        assert self._wire is not None
        has_ours = self._mode != "observe" and b'"hhh"' in self._body
        if not has_ours and upstream.model is None and instruction is None:
            return self._body
        body = {k: v for k, v in self._object().items() if k != "hhh"}
        if upstream.model is not None:
            body["model"] = upstream.model
        if instruction is not None:
            body = instructed(self._wire.name, body, instruction)
        return dump(body) if body != self._object() else self._body

    def _own_policy(self) -> str | None:
        """Which policy the caller picks in ``hhh``, or else the route's.

        Raises:
            InvalidRequest: What is said in ``hhh`` is not understood.
            PolicyNotAllowed: It may not be picked.
        """
        assert self._route is not None
        assert self._body is not None
        policy = self._route.policy
        if b'"hhh"' in self._body and find(self._in.headers, b"content-encoding") is None:
            ours = our_fields(self._object())
            if ours.get("weights") is not None:
                raise InvalidRequest("hhh.weights: no mixture answers here", hint="leave the weights out")
            if (given := ours.get("policy")) is not None:
                if not isinstance(given, str):
                    raise InvalidRequest("hhh.policy: no string", hint="send a policy's name")
                policy = given
        found = self._app.pipeline.policies.get(policy)
        if self._key is not None:
            check_policy(self._key, found.name)
        return policy

    # -- reading ------------------------------------------------------------------------------------------------------

    async def _guard(self) -> None:
        assert self._route is not None
        assert self._wire is not None
        enforce = self._mode == "enforce"
        if self._body is None:
            limit = self._app.pipeline.settings.max_body_bytes
            if not enforce or self._app.pipeline.policies.get(self._route.policy).on_error == "open":
                await self._pass_observed()
                return
            raise WireError(
                413,
                f"the body is larger than {limit:,} bytes; send less, or raise HHH_ROUTER_MAX_BODY_BYTES",
                code="too_large",
            )
        try:
            self._asked = self._wire.asked(self._object())
        except InvalidRequest:
            if enforce:
                raise
            await self._pass_observed()
            return
        policy = self._own_policy()
        self._start_intent(policy)
        metadata: Metadata | None = None
        try:
            metadata = await self._guarded(policy, self._route, enforce=enforce)
        finally:
            if metadata is not None:
                self._entry.outcome["hhh"] = metadata.recorded.as_json()

    async def _guarded(
        self, policy: str | None, route: Route, *, enforce: bool, escalating: Upstream | None = None
    ) -> Metadata | None:
        assert self._wire is not None
        parts = compared(self._app.pipeline.parts, route.policy, route.candidate)
        settings = parts.settings
        applied = parts.policies.get(policy)
        extra = {"x-hhh-upstream": "-"}

        async def ask() -> Answer:
            order = [escalating] if escalating is not None else route.order(self._app.draw)
            words = [exchange.instruction] if route.instruct else []
            words += [r.steering for r in rules_of(applied) if enforce and r.place == exchange.rule]
            told = "\n\n".join(w for w in words if w) or None
            answer = await self._ask_one_of(order, lambda u: self._outgoing(u, self._body_for(u, told)))
            extra["x-hhh-upstream"] = self._asking.answered_by or "-"
            return answer

        exchange = Exchange(
            parts.reader,
            self._wire,
            self._asked,
            ask,
            enforce=enforce,
            plan_first=enforce or route.instruct,
            hold_calls=enforce and asks(applied, "tool_call"),
            guard_timeout_s=self._app.config.guard_timeout_s,
            max_bytes=settings.max_body_bytes,
        )
        longest = max(u.timeouts.first_byte_s + u.timeouts.idle_s for u in self._app.config.upstreams())
        parts = replace(
            parts,
            generator=exchange,
            answers_elsewhere=True,
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
            self._entry.outcome["escalated_to"] = to.name
            return self._guarded(policy, route, enforce=enforce, escalating=to)

        request = ChatRequest(
            messages=self._asked.messages or (Message(role="user", content=""),),
            policy=policy,
            request_id=self._request_id,
            not_inspected=self._asked.not_inspected,
            caller=self._caller(applied),
            passthrough={"wire": self._wire.name, "body_sha256": hashlib.sha256(self._body or b"").hexdigest()},
        )
        guarded = Guarded(
            parts,
            exchange,
            self._wire.call(request, self._asked),
            self._out,
            block=self._app.config.block,
            enforce=enforce,
            escalate=escalate,
            extra=extra,
        )
        try:
            return await self._run(guarded, exchange)
        finally:
            if self._key is not None:
                self._app.keys.spend(self._key, exchange.spent_tokens)

    async def _run(self, guarded: Guarded, exchange: Exchange) -> Metadata | None:
        try:
            return await guarded.run()
        except BackendError:
            if exchange.kind == "error" and not self._out.begun:  # the upstream's own words, as they came
                assert exchange.answer is not None
                self._entry.outcome["not_inspected"] = [f"response: status {exchange.answer.status}"]
                headers = passing(exchange.answer.headers, without={b"content-length"})
                await self._out.whole(exchange.answer.status, headers, exchange.error_body)
                return None
            raise

    def _caller(self, policy: Policy) -> Caller:
        """What policies may ask of whoever sent this; of headers only those that this one reads."""
        policies, route = self._app.pipeline.policies, self._route
        name = (route.candidate if route else None) or self._app.pipeline.parts.candidate
        asked = [policy] if name is None else [policy, policies.candidate(name)]
        wanted = {header.encode() for p in asked for header in headers_read(p)}
        headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in self._in.headers if n in wanted}
        return replace(as_caller(self._key, self._scope["path"]), model=self._asked.model, headers=headers)

    # -- ends ---------------------------------------------------------------------------------------------------------

    async def _fail(self, error: Exception) -> None:
        """Tell the caller in the words of its wire; a stream that has begun ends with them."""
        self._entry.outcome.setdefault("error", type(error).__name__)
        if isinstance(error, HHHRouterError):
            self._entry.outcome["error"] = f"{error.code}: {error.message}"
        if self._out.over:
            return
        told = self._call_failure
        dialect = None
        if self._wire is not None:
            dialect = self._wire.call(ChatRequest(messages=(), request_id=self._request_id), self._asked)
            told = dialect.failure
        status, body, headers = told(error)
        if not self._out.begun:
            fields = {"content-type": "application/json", "x-hhh-request-id": self._request_id, **headers}
            extra = [_CLOSE] if self._app.draining or not self._in.is_over else []
            await self._out.whole(status, [*encoded(fields), *extra], dump(body))
        elif dialect is not None and self._out.is_event_stream:
            await self._out.part(dialect.broken(body), more=False)
        # else the body stays unfinished and the server cuts the connection, which a client takes for what it is

    def _start_intent(self, policy: str | None) -> None:
        assert self._route is not None
        found = self._app.pipeline.policies.get(policy)
        self._entry.begin(
            {
                "method": self._in.method,
                "path": self._in.path,
                "wire": self._wire.name if self._wire else None,
                "route": self._route.name,
                "mode": self._mode,
                "policy": f"{found.name}@{found.version}",
                "policy_sha256": found.hash,
                "body_sha256": hashlib.sha256(self._body).hexdigest() if self._body else None,
            }
        )

    async def _finish(self) -> None:
        await self._entry.end(
            {
                "status": self._out.status,
                "bytes": self._out.bytes,
                "sha256": self._out.sha256 if self._out.bytes else None,
                "whole": self._out.over,
                "upstreams": self._asking.tried,
            }
        )
