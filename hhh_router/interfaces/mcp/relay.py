"""One client and one server: every message passes, calls of tools and what comes back of them by way of the policy."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import anyio.abc
from mcp.shared.message import ClientMessageMetadata, ServerMessageMetadata, SessionMessage
from mcp_types import (
    CONNECTION_CLOSED,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
)

from hhh_router.errors import BackendError
from hhh_router.interfaces.held import Asked as AskedToHold
from hhh_router.interfaces.held import HeldCall
from hhh_router.interfaces.holding import Holding
from hhh_router.interfaces.mcp import answers, texts
from hhh_router.interfaces.mcp.checks import Checks, Judged, Session
from hhh_router.pipeline.parts import new_request_id
from hhh_router.trace.audit import Audit
from hhh_router.types import Action, Decision

_log = logging.getLogger(__name__)

MOST_AT_ONCE = 256
"""Calls of one session that are read, held or answered at the same time."""
_SERVER_LEFT = "the server left"
_TINY = 1e-9
"""Progress has to grow from message to message, and the server's own begins after ours."""


class Reads(Protocol):
    """Where messages come from."""

    def __aiter__(self) -> AsyncIterator[SessionMessage | Exception]:
        """Messages, and what could not be understood."""
        ...


class Writes(Protocol):
    """Where messages go."""

    async def send(self, item: SessionMessage, /) -> None:
        """Send one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What all sessions share."""

    checks: Checks
    audit: Audit
    holding: Holding
    server: str = ""
    """What stands behind, for the audit."""
    handshake_only: bool = False
    """Whether a client that looks for a protocol without sessions is told that there is none here."""


@dataclass(slots=True, kw_only=True)
class _Asked:
    """A request of the client's that is under way."""

    method: str
    tool: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    progress: str | int | None = None
    request_id: str | None = None
    """Of its rows in the audit; None where there are none."""
    outcome: dict[str, Any] = field(default_factory=dict)
    scope: anyio.CancelScope | None = None
    """Of the work before the server sees it; None once it has."""
    over: Callable[[], Any] | None = None
    """Tells the transport that nothing will be answered."""


_Key = tuple[str, RequestId]


def _key(request_id: RequestId) -> _Key:
    return type(request_id).__name__, request_id


class Relay:
    """A session.

    Args:
        deployment: What it shares with others.
        client: Where the client's messages come from, and where messages to it go.
        server: The same of the server.
    """

    def __init__(
        self, deployment: Deployment, client: tuple[Reads, Writes], server: tuple[Reads, Writes], session: Session
    ) -> None:
        self._all = deployment
        self._checks = deployment.checks
        self._from_client, self._client = client
        self._from_server, self._server = server
        self._session = session
        self._under_way: dict[_Key, _Asked] = {}
        self._version: str | None = None  # of the protocol, once both sides know it
        self._recorded: set[str] = set()  # definitions that were not simply allowed, once each
        self._tasks: dict[str, tuple[str, Mapping[str, Any]]] = {}  # a server's own task → the call it stands for

    async def run(self) -> bool:
        """Until one of both leaves; True when it was the server."""
        ended = "the proxy was stopped"
        try:
            async with anyio.create_task_group() as work:

                async def from_server() -> None:
                    nonlocal ended
                    async with anyio.create_task_group() as replies:  # what it said before it left is still told
                        async for item in self._from_server:
                            await self._on_server(item, replies)
                    ended = _SERVER_LEFT
                    work.cancel_scope.cancel()

                work.start_soon(from_server)
                async for item in self._from_client:
                    await self._on_client(item, work)
                ended = "the client left"
                work.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(5, shield=True):
                await self._end(ended)
        return ended == _SERVER_LEFT

    # -- from the client ----------------------------------------------------------------------------------------------

    async def _on_client(self, item: SessionMessage | Exception, work: anyio.abc.TaskGroup) -> None:
        if isinstance(item, Exception):
            _log.warning("a message of the client's was no JSON-RPC (%s)", type(item).__name__)
            return await self._tell(answers.error(None, PARSE_ERROR, "the message is no JSON-RPC"))
        message = item.message
        if isinstance(message, JSONRPCNotification) and message.method == "notifications/cancelled":
            return await self._cancelled(message)
        if not isinstance(message, JSONRPCRequest):
            return await self._pass(message)
        key = _key(message.id)
        if key in self._under_way:
            return await self._tell(answers.error(message.id, INVALID_REQUEST, "a request with this id is under way"))
        if message.method == "server/discover" and self._all.handshake_only:
            return await self._tell(answers.error(message.id, METHOD_NOT_FOUND, "use initialize"))
        asked = _Asked(method=message.method, progress=_progress_token(message), over=_over(item))
        if message.method != "tools/call":
            if message.method == "tasks/result" or message.method == "tasks/get":
                task = (message.params or {}).get("taskId")
                asked.tool, asked.arguments = self._tasks.get(str(task), ("", {}))
            self._under_way[key] = asked
            return await self._pass(message)
        params = message.params or {}
        name, arguments = params.get("name"), params.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict | None):
            said = "tools/call: 'name' is a text and 'arguments' an object"
            return await self._tell(answers.error(message.id, INVALID_PARAMS, said))
        if sum(a.method == "tools/call" for a in self._under_way.values()) >= MOST_AT_ONCE:
            return await self._tell(answers.error(message.id, INTERNAL_ERROR, f"{MOST_AT_ONCE} calls are under way"))
        asked.tool, asked.arguments = name, arguments or {}
        asked.scope = anyio.CancelScope()
        self._under_way[key] = asked
        work.start_soon(self._call, message, asked)

    async def _cancelled(self, message: JSONRPCNotification) -> None:
        request_id = (message.params or {}).get("requestId")
        asked = self._under_way.get(_key(request_id)) if isinstance(request_id, int | str) else None
        if asked is not None and asked.scope is not None:  # the server has not seen it
            asked.scope.cancel()
            return
        await self._pass(message)
        if asked is not None:
            asked.outcome["cancelled"] = True
            if asked.over is not None:
                await asked.over()

    async def _call(self, message: JSONRPCRequest, asked: _Asked) -> None:
        """A call: asked about, perhaps held, then passed on or refused."""
        assert asked.scope is not None
        answer: JSONRPCMessage | None = None
        with asked.scope:
            try:
                answer = await self._before(message, asked)
                asked.scope = None
                if answer is None:
                    await self._pass(message)
                    return
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return  # the server has left; the end of the session answers
            except Exception as error:  # a door: nothing that breaks here may let a call through
                answer = answers.broken(message.id, error)
                asked.outcome["error"] = type(error).__name__
        if answer is None:  # the client has cancelled it
            asked.outcome["ended"] = "cancelled"
            if asked.over is not None:
                await asked.over()
        else:
            await self._tell(answer)
        await self._over(_key(message.id))

    async def _before(self, message: JSONRPCRequest, asked: _Asked) -> JSONRPCMessage | None:
        """The answer in the server's place; None where the server is to be asked."""
        judged = await self._checks.call(self._session, asked.tool, asked.arguments)
        decision = judged.decision
        held: HeldCall | None = None
        asked.request_id = new_request_id()
        self._record(asked, judged)
        await self._all.audit.write("intent", asked.request_id, self._intent(asked, decision))
        self._tell_of(decision, asked)
        if not self._checks.enforced or not decision.action.stops:
            return None
        if decision.action is Action.HOLD:
            held = await self._hold(message.id, asked, decision)
            if held.status == "approved":
                return None
        asked.outcome["ended"] = "refused"
        return JSONRPCResponse(jsonrpc="2.0", id=message.id, result=answers.refusal(decision, held))

    async def _hold(self, request_id: RequestId, asked: _Asked, decision: Decision) -> HeldCall:
        policy = self._checks.policy
        wanted = AskedToHold(
            door="mcp",
            request_id=asked.request_id or "",
            session=self._session.id,
            tool=asked.tool,
            arguments=dict(asked.arguments),
            policy=f"{policy.name}@{policy.version}",
            rule=decision.rule,
            reason=decision.reason,
        )

        async def beat(call: HeldCall, n: int) -> None:
            said = {"progressToken": asked.progress, "progress": n * _TINY, "message": f"held as {call.id}"}
            await self._tell(
                JSONRPCNotification(jsonrpc="2.0", method="notifications/progress", params=said), about=request_id
            )

        settled = await self._all.holding.hold(wanted, beat=None if asked.progress is None else beat)
        asked.outcome["held"] = {
            "id": settled.id,
            "status": settled.status,
            "by": settled.decided_by,
            "note": settled.note,
        }
        return settled

    # -- from the server ----------------------------------------------------------------------------------------------

    async def _on_server(self, item: SessionMessage | Exception, replies: anyio.abc.TaskGroup) -> None:
        if isinstance(item, Exception):
            _log.warning("a message of the server's was no JSON-RPC (%s); it was left out", type(item).__name__)
            return
        message = item.message
        if not isinstance(message, JSONRPCResponse | JSONRPCError):
            return await self._tell(message, about=self._belongs_to(message))
        asked = None if message.id is None else self._under_way.get(_key(message.id))
        if message.id is None:
            return await self._tell(message)
        if asked is None or asked.scope is not None:  # answered already, not asked yet, or never asked
            _log.warning("the server answered what it was not asked; it was left out")
            return
        if asked.method in ("tools/call", "tasks/result", "tasks/get"):
            asked.scope = anyio.CancelScope()  # a second answer is none
            replies.start_soon(self._answered, message, asked)
        elif asked.method == "tools/list" and isinstance(message, JSONRPCResponse):
            asked.scope = anyio.CancelScope()
            replies.start_soon(self._listed, message, asked)
        else:
            if asked.method == "initialize" and isinstance(message, JSONRPCResponse):
                version = message.result.get("protocolVersion")
                self._version = version if isinstance(version, str) else None
            del self._under_way[_key(message.id)]
            await self._tell(message)

    async def _answered(self, message: JSONRPCResponse | JSONRPCError, asked: _Asked) -> None:
        """What came back from a tool: read, then passed on or withheld."""
        assert message.id is not None
        answer: JSONRPCMessage = message
        try:
            unread: list[str] = []
            if isinstance(message, JSONRPCError):
                text = texts.of_error(message.error.message, message.error.data)
                asked.outcome["status"] = "error"
            else:
                text, unread = texts.of_result(message.result)
                asked.outcome["status"] = "failed" if message.result.get("isError") else "ok"
                task = message.result.get("task")
                if isinstance(task, dict) and asked.method == "tools/call":
                    self._tasks[str(task.get("taskId"))] = asked.tool, asked.arguments
            asked.outcome["result_sha256"] = _sha256(
                message.result if isinstance(message, JSONRPCResponse) else message.error.model_dump()
            )
            judged = await self._checks.result(self._session, asked.tool, asked.arguments, text, unread)
            self._record(asked, judged)
            self._tell_of(judged.decision, asked)
            if self._checks.enforced and judged.decision.action.stops:
                asked.outcome["ended"] = "withheld"
                answer = JSONRPCResponse(jsonrpc="2.0", id=message.id, result=answers.refusal(judged.decision, None))
        except Exception as error:  # a door: nothing that breaks here may let a result through
            answer = answers.broken(message.id, error)
            asked.outcome["error"] = type(error).__name__
        await self._tell(answer)
        await self._over(_key(message.id))

    async def _listed(self, message: JSONRPCResponse, asked: _Asked) -> None:
        """The definitions: those of tools that may never be called, or that are no definitions, are left out."""
        answer: JSONRPCMessage = message
        try:
            tools = message.result.get("tools")
            if isinstance(tools, list):
                shown = []
                verdicts = await asyncio.gather(
                    *(self._definition(tool) for tool in tools)
                )  # so that they are read together
                for tool, judged in zip(tools, verdicts, strict=True):
                    if judged is None or not judged.decision.action.stops or not self._checks.enforced:
                        shown.append(tool)
                    if judged is not None and judged.decision.action is not Action.ALLOW:
                        await self._record_definition(tool, judged)
                if len(shown) < len(tools):
                    answer = JSONRPCResponse(jsonrpc="2.0", id=message.id, result={**message.result, "tools": shown})
        except Exception as error:  # a door
            answer = answers.broken(message.id, error)
        await self._tell(answer)
        await self._over(_key(message.id))

    async def _definition(self, tool: Any) -> Judged | None:
        return await self._checks.definition(self._session, tool) if isinstance(tool, dict) else None

    def _belongs_to(self, message: JSONRPCMessage) -> RequestId | None:
        """The request that a message of the server's own is about: over HTTP it takes that one's stream."""
        if not isinstance(message, JSONRPCRequest | JSONRPCNotification):
            return None
        if message.method.endswith(("list_changed", "resources/updated")):
            return None
        token = (message.params or {}).get("progressToken") if message.method == "notifications/progress" else None
        latest = None
        for (_, request_id), asked in self._under_way.items():
            if token is not None and asked.progress == token:
                return request_id
            latest = request_id
        return latest

    # -- telling and recording ----------------------------------------------------------------------------------------

    async def _pass(self, message: JSONRPCMessage) -> None:
        headers = {"mcp-protocol-version": self._version} if self._version else None  # where it goes over HTTP
        await self._server.send(SessionMessage(message, ClientMessageMetadata(headers=headers)))

    async def _tell(self, message: JSONRPCMessage, *, about: RequestId | None = None) -> None:
        try:
            await self._client.send(SessionMessage(message, ServerMessageMetadata(related_request_id=about)))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            _log.info("the client has left before it was told")

    def _tell_of(self, decision: Decision, asked: _Asked) -> None:
        if decision.webhook is None:
            return
        policy = self._checks.policy
        told = {
            "event": "decision",
            "request_id": asked.request_id,
            "session": self._session.id,
            "policy": f"{policy.name}@{policy.version}",
            "tool": asked.tool,
            **answers.told(decision),
        }
        self._all.holding.webhook.tell(decision.webhook, told)

    def _intent(self, asked: _Asked, decision: Decision) -> dict[str, Any]:
        policy = self._checks.policy
        return {
            "door": "mcp",
            "server": self._all.server,
            "session": self._session.id,
            "method": asked.method,
            "tool": asked.tool,
            "arguments_sha256": _sha256(asked.arguments),
            "policy": f"{policy.name}@{policy.version}",
            "policy_sha256": policy.hash,
            "mode": policy.mode,
            "action": str(decision.action),
        }

    def _record(self, asked: _Asked, judged: Judged) -> None:
        block = asked.outcome.setdefault("hhh", {"decisions": [], "shadow": [], "readings": {}, "not_inspected": []})
        block["decisions"].append(answers.told(judged.decision))
        block["shadow"] += [answers.told(d) for d in judged.decision.shadow]
        block["not_inspected"] += judged.not_inspected
        if judged.reading is not None:
            block["readings"][judged.decision.checkpoint] = judged.reading.as_json()

    async def _record_definition(self, tool: Mapping[str, Any], judged: Judged) -> None:
        digest = _sha256(tool)
        if digest in self._recorded:
            return
        self._recorded.add(digest)
        asked = _Asked(method="tools/list", tool=str(tool.get("name")), request_id=new_request_id())
        self._record(asked, judged)
        record = {**self._intent(asked, judged.decision), **asked.outcome, "definition_sha256": digest}
        try:
            await self._all.audit.write("verdict", asked.request_id or "", record)
        except BackendError as error:
            _log.error("verdict on a definition not stored: %s", error.message)

    async def _over(self, key: _Key) -> None:
        asked = self._under_way.pop(key, None)
        if asked is None or asked.request_id is None:
            return
        record = {"ended": "answered", "tainted": self._session.tainted, **asked.outcome}
        try:
            await self._all.audit.write("outcome", asked.request_id, record)
        except BackendError as error:
            _log.error("%s: outcome not stored: %s", asked.request_id, error.message)

    async def _end(self, ended: str) -> None:
        """Answer what is under way, where there is somebody to hear it, and record how it ended."""
        for key in list(self._under_way):
            asked = self._under_way[key]
            asked.outcome.setdefault("ended", ended)
            if ended == _SERVER_LEFT and "cancelled" not in asked.outcome:
                await self._tell(answers.error(key[1], CONNECTION_CLOSED, "the MCP server has ended"))
            await self._over(key)


def _progress_token(message: JSONRPCRequest) -> str | int | None:
    meta = (message.params or {}).get("_meta")
    token = meta.get("progressToken") if isinstance(meta, dict) else None
    return token if isinstance(token, str | int) else None


def _over(item: SessionMessage) -> Callable[[], Any] | None:
    return item.metadata.on_request_unanswered if isinstance(item.metadata, ServerMessageMetadata) else None


def _sha256(value: Any) -> str:
    told = json.dumps(value, sort_keys=True, separators=(",", ":"))  # ASCII, whatever half a character is in it
    return hashlib.sha256(told.encode()).hexdigest()
