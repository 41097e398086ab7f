"""The sidecar as a raw ASGI application: whatever comes goes to an upstream, and the answer comes back as it is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from hhh_router.interfaces.proxy.approvals import Approvals
from hhh_router.interfaces.proxy.entry import Keep
from hhh_router.interfaces.proxy.handling import Handling
from hhh_router.interfaces.proxy.headers import encoded
from hhh_router.interfaces.proxy.incoming import Out
from hhh_router.interfaces.proxy.observe import Observer
from hhh_router.interfaces.proxy.routes import ProxyConfig
from hhh_router.interfaces.proxy.upstreams import Upstreams
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.http import dump
from hhh_router.interfaces.server.keys import KeyRing
from hhh_router.interfaces.server.metrics import Counts
from hhh_router.pipeline import Pipeline
from hhh_router.pipeline.parts import Parts
from hhh_router.trace.audit import Audit
from hhh_router.trace.content import kept_content

PREFIX = "/hhh"
"""Under it the deployment's own server answers; no provider's path begins so."""


class Sidecar:
    """The application.

    Args:
        pipeline: Reads and judges, and answers under ``/hhh`` and where a route falls back on the own mixture.
        config: Routes, modes, limits.
        upstreams: Asks them.
        audit: Keeps intents and outcomes.
        draw: A number in [0, 1), for weighted routes.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        config: ProxyConfig,
        upstreams: Upstreams,
        audit: Audit,
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.pipeline = pipeline
        self.config = config
        self.upstreams = upstreams
        self.audit = audit
        self.draw = draw
        self.keep: Keep | None = (
            partial(kept_content, redactor=pipeline.parts.redactor) if config.audit_content == "full" else None
        )
        settings = pipeline.settings
        self.approvals = Approvals(
            path=config.hold_path,
            wait_s=config.hold_s or settings.hold_s,
            url=config.hold_webhook or settings.hold_webhook,
            secret=settings.webhook_secret,
            redactor=pipeline.parts.redactor,
        )
        self.keys = KeyRing.open(pipeline.settings)
        self.refused = 0
        """Requests that were told to come back, for too many were under way."""
        self.own: ASGIApp = create_app(pipeline, counts=self._counts())
        self.observer = Observer(
            lambda: self.parts,
            lambda request_id, record: audit.write("verdict", request_id, record),
            most_waiting=config.observe_queue,
            max_bytes=pipeline.settings.max_body_bytes,
            keep=self.keep,
        )
        self.draining = False
        self._drained = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._cut: asyncio.Future[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "websockets are not passed on"})
        elif scope["path"] == PREFIX or scope["path"].startswith(f"{PREFIX}/"):
            await self.answer_here(scope, receive, send)
        else:
            await Handling(self, scope, receive, send).run()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new in and let what is under way end; after ``timeout_s`` it ends with an error of its wire."""
        self.draining = True
        try:
            await self._drain(timeout_s)
        finally:
            self._drained.set()

    async def _drain(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=timeout_s)
        if not self.cut.done():
            self.cut.set_result(None)
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=5)
        await self.observer.drain(max(1.0, deadline - loop.time()))
        await self.pipeline.drain(max(1.0, deadline - loop.time()))  # last: until here answers are still read

    def track(self, task: asyncio.Task[None]) -> None:
        """Count a request as under way until its task ends."""
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def _counts(self) -> list[Counts]:
        def one(name: str, told: str, value: Callable[[], float]) -> Counts:
            return Counts(name=name, told=told, values=lambda: {(): value()})

        return [
            one("proxy_refused", "Requests told to come back: too many were under way", lambda: self.refused),
            one("proxy_audit_lost", "Rows of the audit that could not be stored", lambda: self.audit.failures),
            one("proxy_not_observed", "Exchanges that were not read for lack of room", lambda: self.observer.dropped),
            Counts(
                name="proxy_hedges",
                told="Requests for which this upstream was asked beside another",
                labels=("upstream", "outcome"),
                values=lambda: {(to, ended): n for (to, ended), n in self.upstreams.hedges.items()},
            ),
        ]

    @property
    def is_full(self) -> bool:
        """Whether more requests are under way than may be, the one that asks among them."""
        return len(self._under_way) > self.config.max_requests

    @property
    def parts(self) -> Parts:
        """The deployment, with people to ask and to tell."""
        return replace(self.pipeline.parts, hold=self.approvals.hold, tell=self.approvals.tell)

    @property
    def cut(self) -> asyncio.Future[None]:
        """Done when answers under way have to end; one for all of them."""
        if self._cut is None:
            self._cut = asyncio.get_running_loop().create_future()
        return self._cut

    async def answer_here(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The deployment's own server, under its prefix."""
        path = scope["path"][len(PREFIX) :] or "/"
        if path == "/health/ready" and (why := self._not_ready()) is not None:
            headers = encoded({"content-type": "application/json", "retry-after": "5"})
            await Out(send).whole(503, headers, dump({"status": why}))
            return
        await self.own({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    def _not_ready(self) -> str | None:
        """Why requests should go elsewhere, beside what the own server knows."""
        if self.draining:
            return "draining"
        return "audit" if self.audit.is_failing and self.config.audit_failure == "closed" else None

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self.draining:  # the server does not wait for it: what is read meanwhile would find the audit closed
            await self._drained.wait()
        await self.upstreams.aclose()
        for upstream in self.config.upstreams():
            if upstream.translator is not None:
                await upstream.translator.aclose()
        await self.approvals.aclose()
        await self.pipeline.aclose()
        await self.audit.aclose()
        await send({"type": "lifespan.shutdown.complete"})
