"""From options to a running MCP proxy: every option and file is checked before anything is started."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp_types import INTERNAL_ERROR, ErrorData, JSONRPCError, JSONRPCRequest

from hhh_router.assemble import build_pipeline, check_upstream, open_redactor
from hhh_router.errors import HHHRouterError, MissingExtra, ReaderError, SettingsError
from hhh_router.interfaces.held import HeldCalls, default_queue
from hhh_router.interfaces.holding import Holding
from hhh_router.interfaces.mcp.checks import Checks, Session, check_policy, needs_reading
from hhh_router.interfaces.mcp.reading import Guards
from hhh_router.interfaces.mcp.relay import Deployment, Relay
from hhh_router.interfaces.mcp.stdio import own_stdio
from hhh_router.interfaces.remote import RemotePipeline
from hhh_router.interfaces.webhook import Webhook
from hhh_router.pipeline import GuardResult, Pipeline
from hhh_router.policy import Policy, load_policy
from hhh_router.settings import DEFAULT_POLICY, Settings
from hhh_router.trace.audit import Audit, SqliteAudit, check_place, default_audit, open_audit
from hhh_router.trace.redact import Redactor
from hhh_router.types import GuardRequest

_log = logging.getLogger(__name__)

MAX_EVENT_BYTES = 64_000_000
"""Of one message that an HTTP server sends."""
MOST_AUDITS = 100
"""Proxies at a time that each need a file of their own."""
_OURS = "HHH_ROUTER_"
_TIMEOUT = httpx2.Timeout(30.0, read=300.0)  # as the SDK's own client: a server may be silent for long

Streams = tuple[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class McpPlan:
    """Everything that could be checked before anything is started."""

    settings: Settings
    policy: Policy
    command: tuple[str, ...]
    """Empty where ``url`` says where the server is."""
    url: str | None
    guard_url: str | None
    audit: str | None
    """A file, a URL, ``none``, or None for a file of the user's own."""
    queue: Path
    redactor: Redactor
    """Replaces secrets in whatever is kept or told."""

    @property
    def reads_here(self) -> bool:
        """Whether a model is needed in this process."""
        return needs_reading(self.policy) and self.guard_url is None

    @property
    def server(self) -> str:
        """What stands behind, without its arguments, which may hold secrets."""
        return self.url or Path(self.command[0]).name


def plan_mcp(
    *,
    command: Sequence[str],
    url: str | None,
    policy: str | None,
    bundle: str | None,
    guard_url: str | None,
    audit: str | None,
    queue: Path | None,
    hold_s: float | None,
) -> McpPlan:
    """Check every option and file.

    Raises:
        ConfigError: One of them is wrong.
    """
    if bool(command) == (url is not None):
        raise SettingsError(
            "a command and --url exclude each other" if command else "no server is named",
            hint="name the server to guard: hhh-router mcp-proxy … -- COMMAND ARGS, or --url URL",
        )
    if url is not None:
        check_upstream(url)
    elif shutil.which(command[0]) is None:
        raise SettingsError(f"{command[0]!r} is no command that can be run", hint="write it as in the client's config")
    settings = Settings.load(bundle=bundle, hold_s=hold_s)
    if audit is not None:
        check_place(audit)
    elif settings.audit_url is not None:
        audit = settings.audit_url.get_secret_value()
    loaded = load_policy(policy or settings.policy)
    check_policy(loaded)
    return McpPlan(
        settings=settings,
        policy=loaded,
        command=tuple(command),
        url=url,
        guard_url=guard_url,
        audit=audit,
        queue=queue or default_queue(),
        redactor=open_redactor(settings),
    )


@asynccontextmanager
async def deployed(plan: McpPlan, guards: Guards | None = None, *, over_http: bool) -> AsyncIterator[Deployment]:
    """What all sessions share, opened and closed.

    Args:
        plan: From `plan_mcp`.
        guards: Reads, in place of what the plan says.
        over_http: Whether clients come over HTTP.
    """
    if guards is None and needs_reading(plan.policy):
        guards = _guards(plan)
    audit = _open_audit(plan.audit, plan.redactor)
    checks = Checks(plan.policy, guards)
    webhook = Webhook(plan.settings.webhook_secret, redactor=plan.redactor)
    try:
        holding = Holding(
            HeldCalls(plan.queue, redactor=plan.redactor),
            webhook,
            hold_s=plan.settings.hold_s,
            url=plan.settings.hold_webhook,
        )
        yield Deployment(
            checks=checks,
            audit=audit,
            holding=holding,
            server=plan.server,
            handshake_only=over_http or plan.url is not None,
        )
    finally:
        with anyio.CancelScope(shield=True):
            await webhook.aclose()
            await checks.aclose()
            await audit.aclose()


async def run_stdio(plan: McpPlan, guards: Guards | None = None) -> bool:
    """Serve the client that started this process, until it leaves; True when the server left first.

    Raises:
        SettingsError: The server cannot be started.
    """
    with _ended_by(signal.SIGTERM):
        async with (
            deployed(plan, guards, over_http=False) as deployment,
            _opened(plan) as server,
            own_stdio() as client,
        ):
            return await Relay(deployment, client, server, Session()).run()
    return False


async def run_http(
    plan: McpPlan, listening: socket.socket, guards: Guards | None = None, *, on_ready: Callable[[str], None]
) -> None:
    """Serve clients over HTTP until SIGINT or SIGTERM.

    Raises:
        MissingExtra: The web framework is not installed.
    """
    try:
        import uvicorn

        from hhh_router.interfaces.mcp.http import PATH, McpApp
        from hhh_router.interfaces.server.http import is_loopback
        from hhh_router.interfaces.server.keys import KeyRing
    except ImportError as error:
        raise MissingExtra("serve", needed_for="MCP over HTTP") from error
    host, port = listening.getsockname()[:2]
    async with deployed(plan, guards, over_http=True) as deployment, anyio.create_task_group() as work:
        app = McpApp(
            partial(_serve, plan, deployment),
            work,
            keys=KeyRing.open(plan.settings),
            max_body_bytes=plan.settings.max_body_bytes,
            on_loopback=is_loopback(host),
        )
        config = uvicorn.Config(app, lifespan="off", ws="none", log_level="warning", log_config=None, access_log=False)
        config.timeout_graceful_shutdown = 3  # streams that stand open would never end by themselves
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}{PATH}")
        await uvicorn.Server(config).serve(sockets=[listening])
        work.cancel_scope.cancel()


async def _serve(plan: McpPlan, deployment: Deployment, client: Streams) -> None:
    """One session over HTTP. A server that cannot be had is told to the client that asked for it."""
    try:
        async with _opened(plan) as server:
            await Relay(deployment, client, server, Session()).run()
    except SettingsError as error:
        _log.error("%s", error.message)
        async for item in client[0]:
            if not isinstance(item, Exception) and isinstance(item.message, JSONRPCRequest):
                told = ErrorData(code=INTERNAL_ERROR, message=f"hhh-router: {error.message}")
                await client[1].send(SessionMessage(JSONRPCError(jsonrpc="2.0", id=item.message.id, error=told)))
                return


@asynccontextmanager
async def _opened(plan: McpPlan) -> AsyncIterator[Streams]:
    """The server, started or connected to."""
    if plan.url is not None:
        key = plan.settings.upstream_api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else None
        async with (
            _Http(headers=headers, timeout=_TIMEOUT) as http,
            streamable_http_client(plan.url, http_client=http, max_sse_event_size=MAX_EVENT_BYTES) as streams,
        ):
            yield streams
        return
    command, *args = plan.command
    # what the client gave this process is meant for the server, except what is ours
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    opened = stdio_client(StdioServerParameters(command=command, args=args, env=env))
    try:
        streams = await opened.__aenter__()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{command!r} cannot be started ({error})", hint="run it by hand to see why") from error
    try:
        yield streams
    finally:
        await opened.__aexit__(None, None, None)


class _Http(httpx2.AsyncClient):
    """A client that answers in the place of a server which cannot be reached; the SDK would end the session."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """See `httpx2.AsyncClient.send`."""
        try:
            return await super().send(request, **options)
        except httpx2.TransportError as error:
            _log.warning("%s cannot be reached (%s)", request.url.host, type(error).__name__)
            said = f"hhh-router: the MCP server cannot be reached ({type(error).__name__})"
            told = {"jsonrpc": "2.0", "id": None, "error": {"code": INTERNAL_ERROR, "message": said}}
            return httpx2.Response(502, request=request, json=told)


@contextmanager
def _ended_by(number: signal.Signals) -> Iterator[None]:
    """A signal ends what is within as if it had been cancelled, so that everything is closed."""
    loop = asyncio.get_running_loop()
    scope = anyio.CancelScope()
    with suppress(NotImplementedError, ValueError):  # not here, or not on the main thread
        loop.add_signal_handler(number, scope.cancel)
    try:
        with scope:
            yield
    finally:
        with suppress(NotImplementedError, ValueError):
            loop.remove_signal_handler(number)


def _open_audit(named: str | None, redactor: Redactor) -> Audit:
    """The audit that is named; else the first of the user's own that no other proxy writes."""
    if named is not None:
        return open_audit(named, redactor=redactor)
    for n in range(1, MOST_AUDITS + 1):
        try:
            name = "mcp.sqlite3" if n == 1 else f"mcp-{n}.sqlite3"
            return SqliteAudit(default_audit().with_name(name), redactor=redactor)
        except SettingsError as error:
            if "another process" not in error.message or n == MOST_AUDITS:
                raise
    raise AssertionError


def _guards(plan: McpPlan) -> Guards:
    if plan.guard_url is not None:
        return RemotePipeline(plan.guard_url, policy=None, settings=plan.settings)
    return _Loading(plan.settings.model_copy(update={"policy": DEFAULT_POLICY}))


class _Loading:
    """A pipeline that is loaded on a thread, so that the client is answered meanwhile; what is to be read waits."""

    def __init__(self, settings: Settings) -> None:
        self._task = asyncio.ensure_future(asyncio.to_thread(build_pipeline, settings))
        self._task.add_done_callback(_tell_failure)

    async def guard(self, requests: Sequence[GuardRequest]) -> list[GuardResult]:
        """See `Pipeline.guard`.

        Raises:
            ReaderError: It could not be loaded.
        """
        try:
            pipeline: Pipeline = await asyncio.shield(self._task)
        except HHHRouterError as error:
            raise ReaderError(f"there is nothing to read with: {error.message}", hint=error.hint) from error
        return await pipeline.guard(requests)

    async def aclose(self) -> None:
        """Close it once it is loaded."""
        with suppress(HHHRouterError):
            await (await self._task).aclose()


def _tell_failure(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("the model cannot be loaded: %s", error)
