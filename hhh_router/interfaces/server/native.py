"""The project's own wire: ``/v1/guard``, ``/v1/route``, ``/v1/schema``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import parse_prompt
from hhh_router.interfaces.server.http import JsonReply, read_json, until_client_leaves
from hhh_router.interfaces.server.keys import called, check_policies
from hhh_router.pipeline import GuardResult, Pipeline, RouteResult
from hhh_router.trace import metadata_schema
from hhh_router.types import GuardRequest, ReadRequest

ITEM_FIELDS = frozenset({"prompt", "response", "policy"})


async def guard(request: Request, pipeline: Pipeline) -> Response:
    """``{prompt?, response?, policy?}`` → its verdict; ``{items: [...], policy?}`` → a list of verdicts."""
    return await _each(request, pipeline, "guard", pipeline.guard)


async def route(request: Request, pipeline: Pipeline) -> Response:
    """``{prompt, policy?}`` → its weights; ``{items: [...], policy?}`` → a list."""
    return await _each(request, pipeline, "route", pipeline.route)


async def schema(request: Request) -> Response:
    """The JSON schema of the ``hhh`` block."""
    return JsonReply(metadata_schema())


def listed(pipeline: Pipeline) -> list[dict[str, Any]]:
    """The policies a caller may pick, the default first."""
    found = []
    for name in pipeline.policies.names:
        policy = pipeline.policies.get(name)
        found.append(
            {
                "id": policy.name,
                "object": "policy",
                "version": policy.version,
                "hash": policy.hash[:16],
                "mode": policy.mode,
                "default": name == pipeline.policies.default.name,
            }
        )
    return found


async def _each(
    request: Request,
    pipeline: Pipeline,
    kind: str,
    judge: Callable[[Sequence[GuardRequest]], Coroutine[Any, Any, Sequence[GuardResult | RouteResult]]],
) -> Response:
    body = await read_json(request, max_bytes=pipeline.settings.max_body_bytes)
    if "items" not in body:
        asked = [_item(body, "")]
        check_policies(request, pipeline, asked)
        [result] = await until_client_leaves(request.receive, judge(called(request, asked)))
        return JsonReply({"object": kind, **_told(result)}, headers=result.metadata.headers())
    if unknown := sorted(set(body) - {"items", "policy"}):
        raise InvalidRequest(f"{unknown[0][:100]}: unknown field beside items", hint="use items and policy")
    items = body["items"]
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise InvalidRequest("items: no list of objects", hint='send [{"prompt": "…"}, …]')
    default = {"policy": _string(body, "policy", "")}
    asked = [_item({**default, **item}, f"items[{i}].") for i, item in enumerate(items)]
    check_policies(request, pipeline, asked)
    results = await until_client_leaves(request.receive, judge(called(request, asked)))
    return JsonReply({"object": "list", "data": [{"object": kind, **_told(r)} for r in results]})


def _item(fields: Mapping[str, Any], where: str) -> GuardRequest:
    if unknown := sorted(set(fields) - ITEM_FIELDS):
        raise InvalidRequest(f"{where}{unknown[0][:100]}: unknown field", hint="use prompt, response and policy")
    prompt = fields.get("prompt")
    turns, unread = ((), ()) if prompt is None else parse_prompt(prompt, where=f"{where}prompt")
    response, policy = _string(fields, "response", where), _string(fields, "policy", where)
    return GuardRequest(read=ReadRequest(messages=turns, response=response), policy=policy, not_inspected=unread)


def _string(fields: Mapping[str, Any], name: str, where: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{where}{name}: no string", hint=f"send the {name} as text")
    return value


def _told(result: GuardResult | RouteResult) -> dict[str, Any]:
    told: dict[str, Any] = {"action": str(result.action)}
    if isinstance(result, GuardResult):
        told["message"] = result.message
    else:
        told |= {"weights": dict(result.metadata.weights), "mixture": result.mixture}
    return told | {"hhh": result.metadata.as_json()}
