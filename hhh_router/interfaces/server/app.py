"""The application: routes, keys, health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hhh_router.assemble import open_memory
from hhh_router.interfaces.server import anthropic, completions, decisions, guardrail, native, openai, responses
from hhh_router.interfaces.server.chat import ChatResponse
from hhh_router.interfaces.server.choices import ChoicesResponse
from hhh_router.interfaces.server.endpoints import ENDPOINTS, Wire
from hhh_router.interfaces.server.feedback import Monitor, feedback
from hhh_router.interfaces.server.http import (
    Failure,
    JsonReply,
    WireError,
    endpoint,
    failed,
    failure,
    read_json,
    retry_after,
    timeout_s,
)
from hhh_router.interfaces.server.idempotency import Replies, once
from hhh_router.interfaces.server.keys import Key, KeyRing, caller_of, check_policy, owner
from hhh_router.interfaces.server.metrics import CountReplies, Counts, Metrics
from hhh_router.interfaces.server.models import list_models
from hhh_router.interfaces.server.moderations import moderations
from hhh_router.interfaces.server.openai import parse_chat
from hhh_router.interfaces.server.openapi import document
from hhh_router.interfaces.server.tracing import Tracing
from hhh_router.pipeline import Pipeline

C = TypeVar("C", openai.Call, completions.Call, anthropic.Call, responses.Call)
Handler = Callable[[Request], Awaitable[Response]]

WORDS: Mapping[Wire, Callable[[Exception], Failure]] = {"openai": failure, "anthropic": anthropic.anthropic_failure}
"""How each wire tells an error."""


def create_app(pipeline: Pipeline, *, counts: Sequence[Counts] = ()) -> Starlette:
    """The HTTP door of a pipeline, as an ASGI application. It closes the pipeline when it shuts down.

    Args:
        pipeline: Answers.
        counts: Told at ``/metrics`` too.
    """
    settings = pipeline.settings
    started = int(time.time())
    metrics = Metrics(lambda: pipeline.load, pipeline.parts.calibrators.references())
    for counted in counts:
        metrics.watch(counted)
    pipeline.add_sink(metrics)
    if pipeline.parts.memory is None:
        pipeline.remember_in(open_memory(settings))
    monitor = Monitor(pipeline, metrics)

    keys = KeyRing.open(settings)
    replies = Replies()
    tracing = Tracing.from_settings(settings, pipeline.parts.redactor)

    def answered(call: C, request: Request, body: Mapping[str, Any]) -> Response:
        key: Key | None = request.state.key
        if key is not None and key.policies is not None:
            check_policy(key, pipeline.policies.get(call.request.policy).name)
        spend = (lambda tokens: None) if key is None else partial(keys.spend, key)
        call = _until(call, request)
        if isinstance(call, completions.Call) or (isinstance(call, openai.Call) and call.count > 1):
            response: ChatResponse = ChoicesResponse(pipeline, call, spend=spend)
        else:
            response = ChatResponse(pipeline, call, spend=spend)
        wait_s = min(call.request.timeout_s or settings.request_timeout_s, settings.request_timeout_s)
        answer = response if tracing is None else tracing.chat(request, response)
        return once(replies, request, body, answer, owner=owner(request), wait_s=wait_s, told=call.failure)

    async def chat(request: Request) -> Response:
        body = await read_json(request, max_bytes=settings.max_body_bytes)
        return answered(parse_chat(body, request_id=pipeline.parts.new_id()), request, body)

    async def complete(request: Request) -> Response:
        body = await read_json(request, max_bytes=settings.max_body_bytes)
        call = completions.parse_completion(body, request_id=pipeline.parts.new_id())
        return answered(call, request, body)

    conversations = responses.Conversations()

    async def respond(request: Request) -> Response:
        body = await read_json(request, max_bytes=settings.max_body_bytes)
        call = responses.parse_response(body, conversations, owner=owner(request), request_id=pipeline.parts.new_id())
        return answered(call, request, body)

    async def messages(request: Request) -> Response:
        body = await read_json(request, max_bytes=settings.max_body_bytes)
        call = anthropic.parse_message(body, request_id=pipeline.parts.new_id())
        return answered(call, request, body)

    async def count_tokens(request: Request) -> Response:
        return await anthropic.count_tokens(request, pipeline)

    async def moderate(request: Request) -> Response:
        return await moderations(request, pipeline)

    prompts = guardrail.Prompts()

    async def litellm(request: Request) -> Response:
        return await guardrail.guardrail(request, pipeline, prompts)

    async def decide(request: Request) -> Response:
        return await decisions.decisions(request, pipeline)

    async def systemone(request: Request) -> Response:
        return await decisions.systemone(request, pipeline)

    async def models(request: Request) -> Response:
        return JsonReply(list_models(started))

    async def guard(request: Request) -> Response:
        return await native.guard(request, pipeline)

    async def route(request: Request) -> Response:
        return await native.route(request, pipeline)

    async def say(request: Request) -> Response:
        reply = await feedback(request, pipeline)
        reply.background = BackgroundTask(monitor.look, again=True)  # nobody waits for the figures
        return reply

    async def drift(request: Request) -> Response:
        return JsonReply(monitor.told(await monitor.look()))

    async def policies(request: Request) -> Response:
        return JsonReply({"object": "list", "data": native.listed(pipeline)})

    described = document(keys=keys.required)

    async def openapi_json(request: Request) -> Response:
        return JsonReply(described)

    async def scrape(request: Request) -> Response:
        await monitor.look()
        return metrics.page()

    async def live(request: Request) -> Response:
        return JsonReply({"status": "ok"})

    async def ready(request: Request) -> Response:
        parts, load = pipeline.parts, pipeline.load
        is_ready = load.state == "ready"
        return JsonReply(
            status_code=200 if is_ready else 503,
            headers={} if is_ready else retry_after(load.wait_s),
            content={
                "status": "ok" if is_ready else load.state,
                "policy": pipeline.policies.default.name,
                "bundle": parts.bundle_ref.name,
                "engine": {"rows": load.rows, "waiting": load.waiting, "waiting_texts": load.waiting_texts},
            },
        )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        watching = asyncio.create_task(monitor.watch())
        yield
        watching.cancel()
        await asyncio.wait([watching])
        await pipeline.aclose()

    work: dict[str, Handler] = {
        "/v1/chat/completions": chat,
        "/v1/completions": complete,
        "/v1/models": models,
        "/v1/responses": respond,
        "/v1/messages": messages,
        "/v1/messages/count_tokens": count_tokens,
        "/v1/moderations": moderate,
        "/v1/decisions": decide,
        "/v1/systemone": systemone,
        guardrail.PATH: litellm,
        "/v1/guard": guard,
        "/v1/route": route,
        "/v1/feedback": say,
        "/v1/drift": drift,
        "/v1/policies": policies,
        "/v1/schema": native.schema,
        "/openapi.json": openapi_json,
        "/metrics": scrape,
        "/health/live": live,
        "/health/ready": ready,
    }
    if tracing is not None:
        work |= {e.path: tracing.judging(e.path, work[e.path]) for e in ENDPOINTS if e.door == "judge"}
    routes = [
        Route(
            e.path,
            endpoint(work[e.path], keys=keys, door=e.door, needs_key=e.needs_key, told=WORDS[e.wire]),
            methods=[e.method],
        )
        for e in ENDPOINTS
    ]
    paths = frozenset(r.path for r in routes)
    return Starlette(
        routes=routes,
        middleware=[Middleware(CountReplies, metrics=metrics, paths=paths)],
        exception_handlers={HTTPException: _not_served},
        lifespan=lifespan,
    )


def _until(call: C, request: Request) -> C:
    """The call with who asks, and with the deadline that the caller's header names."""
    limit = timeout_s(request)
    asked = replace(call.request, caller=caller_of(request))
    return replace(call, request=asked if limit is None else replace(asked, timeout_s=limit))


async def _not_served(request: Request, error: Exception) -> Response:
    """404 and 405, naming what is served, in the shape of the wire that the path is nearest to."""
    assert isinstance(error, HTTPException)
    there = ", ".join(f"{'/'.join(sorted(r.methods - {'HEAD'}))} {r.path}" for r in _routes(request) if r.methods)
    message = f"{request.method} {request.url.path[:200]} is not served here; there is {there}"
    code = "not_found" if error.status_code == 404 else "method_not_allowed"
    told = WORDS["anthropic" if request.url.path.startswith("/v1/messages") else "openai"]
    reply = failed(WireError(error.status_code, message, code=code), told)
    reply.headers.update(error.headers or {})
    return reply


def _routes(request: Request) -> list[Route]:
    return [r for r in request.app.routes if isinstance(r, Route)]
