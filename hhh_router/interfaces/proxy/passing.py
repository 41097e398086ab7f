"""Passing a request on: to an upstream and back byte for byte, or to the deployment's own mixture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hhh_router.errors import UpstreamError
from hhh_router.interfaces.proxy.client_request import ClientRequest
from hhh_router.interfaces.proxy.headers import passing, replaced
from hhh_router.interfaces.proxy.instruct import instructed
from hhh_router.interfaces.proxy.observe import Seen, Tee
from hhh_router.interfaces.proxy.upstreams import BREAKS, KEYS, RETRIED, Answer, Outgoing, Upstream
from hhh_router.interfaces.server.http import WireError, dump
from hhh_router.interfaces.server.keys import CONVERSATION

_OWN_MODEL = "hhh-auto"
_NEVER_SENT = frozenset({b"host", b"expect", CONVERSATION})


class Passing:
    """How one request goes on."""

    def __init__(self, client: ClientRequest) -> None:
        self._client = client
        self._app = client.app

    async def unread(self) -> None:
        """A path that nobody can read."""
        client = self._client
        if client.mode == "enforce" and self._app.config.unread_paths == "refuse" and client.incoming.method != "GET":
            raise WireError(
                403,
                f"{client.path}: nobody here can read such requests, so they do not pass",
                code="path_not_allowed",
            )
        client.entry.outcome["not_inspected"] = [f"path {client.path}"]
        client.start_intent(client.route.policy)
        body = client.incoming.pieces() if client.incoming.has_body else None
        await self._relay(await self.ask(lambda upstream: self.outgoing(upstream, body)), Tee(0))

    async def observed(self) -> None:
        """Read beside it, later. A body that is too large is not read at all."""
        client = self._client
        if client.body is None:
            client.entry.outcome["not_inspected"] = ["request: larger than what is read"]
            body = client.incoming.pieces()
            client.start_intent(client.route.policy)
            await self._relay(await self.ask(lambda upstream: self.outgoing(upstream, body)), Tee(0))
            return
        client.start_intent(client.route.policy)
        tee = Tee(self._app.pipeline.settings.max_body_bytes)
        answer = await self.ask(lambda upstream: self.outgoing(upstream, self.body_for(upstream)))
        broke = True
        try:
            await self._relay(answer, tee)
            broke = False
        finally:
            assert client.wire is not None
            taken = self._app.observer.take(
                Seen(
                    request_id=client.request_id,
                    wire=client.wire,
                    policy=client.route.policy,
                    candidate=client.route.candidate,
                    caller=client.caller(self._app.pipeline.policies.get(client.route.policy)),
                    body=client.body,
                    body_encoding=client.encoding,
                    status=answer.status,
                    headers=answer.headers,
                    answer=tee.copy,
                    is_cut=broke or tee.is_cut,
                )
            )
            if not taken:
                client.entry.outcome["not_inspected"] = ["all of it: too much waits to be read"]

    async def answered_here(self, path: str) -> None:
        """Let the deployment's own mixture answer; its door guards it as it does every chat."""
        client = self._client
        client.asking.answered_by = _OWN_MODEL
        client.asking.tried.append(f"{_OWN_MODEL}: asked")
        data = dump({**(client.rewritten or client.object()), "model": _OWN_MODEL})
        without = {b"content-length", b"content-encoding"}
        headers = [*passing(client.incoming.headers, without=without), (b"content-length", str(len(data)).encode())]
        pending: list[Any] = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Any:
            return pending.pop() if pending else await asyncio.Event().wait()  # a client that leaves is seen outside

        scope = {**client.scope, "path": path, "raw_path": path.encode(), "headers": headers}
        await self._app.own(scope, receive, client.out.asgi)

    async def ask(self, make: Callable[[Upstream], Outgoing]) -> Answer:
        """Ask the route's upstreams in their order."""
        return await self.ask_one_of(self._client.route.order(self._app.draw), make)

    async def ask_one_of(
        self, order: list[Upstream], make: Callable[[Upstream], Outgoing], *, may_hedge: bool = True
    ) -> Answer:
        """Ask these in their order, and the route's hedge beside the first.

        Raises:
            UpstreamError: None of them answers; where the own mixture stands in, also a status that says so.
        """
        asking = self._client.asking
        answer = await self._app.upstreams.ask(order, make, asking, self._client.hedge() if may_hedge else None)
        if self._client.route.answer_here and answer.status in BREAKS | RETRIED:
            answer.close()
            raise UpstreamError(f"the last upstream answered {answer.status}", status=answer.status)
        return answer

    def outgoing(self, upstream: Upstream, body: Any) -> Outgoing:
        """The request as an upstream gets it."""
        incoming, wire = self._client.incoming, self._client.wire
        without = set(_NEVER_SENT)
        if incoming.is_chunked or isinstance(body, bytes):
            without.add(b"content-length")
        if isinstance(body, bytes) and body is not self._client.body:
            without.add(b"content-encoding")  # what we write is plain
        if self._app.keys.required:
            without |= KEYS  # they are this door's
        headers = passing(incoming.headers, without=without)
        if wire is not None and self._client.mode != "observe":  # so that the answer can be read
            headers = replaced(headers, [(b"accept-encoding", b"identity")])
        return Outgoing(
            method=incoming.method,
            path=incoming.path,
            query=incoming.query,
            headers=headers,
            body=body,
            changes_nothing=incoming.method in ("GET", "HEAD", "OPTIONS") or wire is not None,
        )

    def body_for(self, upstream: Upstream, instruction: str | None = None) -> bytes:
        """The client's own bytes, unless something has to be taken out of them or put in."""
        client = self._client
        assert client.body is not None
        assert client.wire is not None
        has_ours = client.mode != "observe" and b'"hhh"' in client.body
        if not has_ours and upstream.model is None and instruction is None and client.rewritten is None:
            return client.body
        body = {k: v for k, v in (client.rewritten or client.object()).items() if k != "hhh"}
        if upstream.model is not None:
            body["model"] = upstream.model
        if instruction is not None:
            body = instructed(client.wire.name, body, instruction)
        return dump(body) if body != client.object() else client.body

    async def _relay(self, answer: Answer, tee: Tee) -> None:
        """The upstream's answer, byte for byte as it comes."""
        out = self._client.out
        try:
            await out.begin(answer.status, passing(answer.headers))
            async for piece in answer.pieces():
                tee.add(piece)
                await out.part(piece)
            await out.part(b"", more=False)
        finally:
            answer.close()
