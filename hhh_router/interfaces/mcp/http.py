"""The client's side over streamable HTTP: every session has a server of its own behind it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import anyio
import anyio.abc
from mcp.server.streamable_http import MCP_SESSION_ID_HEADER, StreamableHTTPServerTransport
from mcp.server.transport_security import RequestBodyLimitMiddleware, TransportSecuritySettings
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from hhh_router.interfaces.server.http import WireError
from hhh_router.interfaces.server.keys import KeyRing

_log = logging.getLogger(__name__)

PATH = "/mcp"
IDLE_S = 30 * 60.0
MOST_SESSIONS = 256
LINGER_S = 0.2
"""What was said last may still be on its way to the client when a session ends."""
_VERSION_HEADER = "mcp-protocol-version"
_LOOPBACK = ("127.0.0.1:*", "localhost:*", "[::1]:*")

Serve = Callable[[tuple[Any, Any]], Awaitable[None]]
"""Runs one session on the client's streams until it is over."""


class McpApp:
    """An ASGI application that serves MCP at ``/mcp``.

    Args:
        serve: Runs a session.
        work: Where sessions run.
        keys: Who may call.
        max_body_bytes: Largest message.
        on_loopback: Whether only this machine can reach it; then names of other machines are refused, so that no web
            page can make a browser call it (DNS rebinding).
    """

    def __init__(
        self, serve: Serve, work: anyio.abc.TaskGroup, *, keys: KeyRing, max_body_bytes: int, on_loopback: bool
    ) -> None:
        self._serve = serve
        self._work = work
        self._keys = keys
        self._security = TransportSecuritySettings(
            enable_dns_rebinding_protection=on_loopback,
            allowed_hosts=list(_LOOPBACK),
            allowed_origins=[f"http://{host}" for host in _LOOPBACK],
        )
        self._sessions: dict[str, StreamableHTTPServerTransport] = {}
        self._limited = RequestBodyLimitMiddleware(self._answer, max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served here")
        if scope["path"].rstrip("/") == "/health/live":
            return await PlainTextResponse("ok")(scope, receive, send)
        if scope["path"].rstrip("/") != PATH:
            return await _refused(404, f"nothing here; MCP is at {PATH}")(scope, receive, send)
        try:
            self._keys.caller(Request(scope))
        except WireError as error:
            return await _refused(error.status, error.message)(scope, receive, send)
        await self._limited(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        version = request.headers.get(_VERSION_HEADER)
        if version is not None and version not in HANDSHAKE_PROTOCOL_VERSIONS:
            known = ", ".join(HANDSHAKE_PROTOCOL_VERSIONS)
            return await _refused(400, f"protocol version {version[:40]!r} is not spoken here; use {known}")(
                scope, receive, send
            )
        session_id = request.headers.get(MCP_SESSION_ID_HEADER)
        if session_id is None:
            return await self._open(scope, receive, send)
        transport = self._sessions.get(session_id)
        if transport is None:
            return await _refused(404, "no such session; initialize a new one")(scope, receive, send)
        await transport.handle_request(scope, receive, send)
        if transport.is_terminated:
            self._sessions.pop(session_id, None)

    async def _open(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._sessions) >= MOST_SESSIONS:
            return await _refused(503, f"{MOST_SESSIONS} sessions are open; try again later")(scope, receive, send)
        transport = StreamableHTTPServerTransport(
            mcp_session_id=uuid4().hex, security_settings=self._security, idle_timeout=IDLE_S
        )
        status = 500

        async def watched(message: Any) -> None:
            nonlocal status
            status = message["status"] if message["type"] == "http.response.start" else status
            await send(message)

        assert transport.mcp_session_id is not None
        self._sessions[transport.mcp_session_id] = transport
        await self._work.start(self._run, transport)
        try:
            await transport.handle_request(scope, receive, watched)
        finally:
            if status >= 400:  # it began no session
                with anyio.CancelScope(shield=True):
                    await transport.terminate()

    async def _run(self, transport: StreamableHTTPServerTransport, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        assert transport.mcp_session_id is not None
        try:
            async with transport.connect() as streams:
                task_status.started()
                assert transport.idle_scope is not None
                with transport.idle_scope:
                    await self._serve(streams)
                    await anyio.sleep(LINGER_S)
        except Exception as error:  # a session that breaks takes no other with it
            _log.error("a session broke: %s", error)
        finally:
            self._sessions.pop(transport.mcp_session_id, None)
            with anyio.CancelScope(shield=True):
                await transport.terminate()


def _refused(status: int, message: str) -> JSONResponse:
    error = {"code": -32600, "message": f"hhh-router: {message}"}
    return JSONResponse({"jsonrpc": "2.0", "id": None, "error": error}, status_code=status)
