"""One request of a client: from its first byte to the outcome that is kept of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from hhh_router.errors import BackendError, HHHRouterError, InvalidRequest, Overloaded, Unavailable
from hhh_router.interfaces.proxy.client_request import ClientRequest
from hhh_router.interfaces.proxy.guarding import Guarding
from hhh_router.interfaces.proxy.headers import encoded, find
from hhh_router.interfaces.proxy.passing import Passing
from hhh_router.interfaces.proxy.routes import find_route
from hhh_router.interfaces.proxy.wires import find_wire
from hhh_router.interfaces.server.anthropic import anthropic_failure
from hhh_router.interfaces.server.http import Failure, WireError, dump, failure
from hhh_router.types import ChatRequest

if TYPE_CHECKING:
    from hhh_router.interfaces.proxy.app import Sidecar

_OWN_PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
"""Where the deployment's own mixture answers on a wire."""
_CLOSE = (b"connection", b"close")


class Handling:
    """One request, from its first byte to its outcome."""

    def __init__(self, app: Sidecar, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._client = ClientRequest(app, scope, receive, send)
        self._passing = Passing(self._client)
        self._call_failure: Callable[[Exception], Failure] = (
            failure if find(self._client.incoming.headers, b"anthropic-version") is None else anthropic_failure
        )

    async def run(self) -> None:
        """Answer. The work ends when the client leaves, or when the process has to."""
        work = asyncio.ensure_future(self._work())
        left = asyncio.ensure_future(self._client_leaves())
        outcome = self._client.entry.outcome
        self._app.track(asyncio.current_task())  # type: ignore[arg-type]  # ASGI runs in a task
        try:
            await asyncio.wait({work, left, self._app.cut}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                if left.done():
                    outcome["ended"] = "the client left"
                else:
                    outcome["ended"] = "the process shut down"
                    await self._fail(Unavailable("the proxy is shutting down", hint="try again", retry_after_s=5.0))
            else:
                work.result()
        except (OSError, ClientDisconnect):
            outcome["ended"] = "the client left"
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
            await self._finish()

    async def _client_leaves(self) -> None:
        while (await self._client.incoming.after_body())["type"] != "http.disconnect":
            pass

    async def _work(self) -> None:
        try:
            await self._answer()
        except (OSError, ClientDisconnect):
            raise  # nobody is there to be told
        except Exception as error:  # a door: whatever broke must reach the caller as an error of its wire
            await self._fail(error)

    async def _answer(self) -> None:
        app, client = self._app, self._client
        if not client.incoming.path.startswith("/"):
            raise InvalidRequest("the request's target is no path", hint="use this address as a base URL, not a proxy")
        if app.draining:
            raise Unavailable("the proxy is shutting down", hint="try again", retry_after_s=5.0)
        if app.is_full:
            app.refused += 1
            most = app.config.max_requests
            raise Overloaded(f"{most:,} requests are under way here already", hint="try again", retry_after_s=1.0)
        if app.keys.required:
            client.key = app.keys.caller(Request(client.scope))
            if client.key is not None:
                app.keys.admit(client.key, "chat")
        client.wire = find_wire(client.incoming.method, client.scope["path"])
        if client.wire is not None:
            client.body = await client.incoming.body(app.pipeline.settings.max_body_bytes)
        route = find_route(app.config.routes, client.scope["path"], client.model)
        if route is None:
            raise WireError(404, f"no route of this proxy takes {client.path}", code="no_route")
        client.route = route
        try:
            if client.wire is None:
                await self._passing.unread()
            elif client.mode == "observe":
                await self._passing.observed()
            else:
                await Guarding(client, self._passing).run()
        except BackendError as error:
            if not (route.answer_here and client.wire and client.wire.name in _OWN_PATHS) or client.out.begun:
                raise
            client.entry.outcome["upstream_failed"] = error.message
            await self._passing.answered_here(_OWN_PATHS[client.wire.name])

    async def _fail(self, error: Exception) -> None:
        """Tell the caller in the words of its wire; a stream that has begun ends with them."""
        client = self._client
        client.entry.outcome.setdefault("error", type(error).__name__)
        if isinstance(error, HHHRouterError):
            client.entry.outcome["error"] = f"{error.code}: {error.message}"
        if client.out.over:
            return
        told = self._call_failure
        dialect = None
        if client.wire is not None:
            dialect = client.wire.call(ChatRequest(messages=(), request_id=client.request_id), client.asked)
            told = dialect.failure
        status, body, headers = told(error)
        if not client.out.begun:
            fields = {"content-type": "application/json", "x-hhh-request-id": client.request_id, **headers}
            extra = [_CLOSE] if self._app.draining or not client.incoming.is_over else []
            await client.out.whole(status, [*encoded(fields), *extra], dump(body))
        elif dialect is not None and client.out.is_event_stream:
            await client.out.part(dialect.broken(body), more=False)
        # else the body stays unfinished and the server cuts the connection, which a client takes for what it is

    async def _finish(self) -> None:
        out = self._client.out
        await self._client.entry.end(
            {
                "status": out.status,
                "bytes": out.bytes,
                "sha256": out.sha256 if out.bytes else None,
                "whole": out.over,
                "upstreams": self._client.asking.tried,
                **({"hedge": self._client.asking.hedge} if self._client.asking.hedge else {}),
            }
        )
