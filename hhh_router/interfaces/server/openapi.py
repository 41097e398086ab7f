"""The OpenAPI document of a server, made of the table that it serves by."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from hhh_router.interfaces.server.endpoints import ENDPOINTS, Endpoint, Wire
from hhh_router.interfaces.server.fields import Schema, an_object, maybe
from hhh_router.interfaces.server.http import LONGEST_MS
from hhh_router.interfaces.server.idempotency import HEADER, LONGEST_KEY
from hhh_router.trace.block import Metadata

DIALECT: Final = "3.1.0"
_TEXT: Schema = {"type": "string"}
_ERRORS: Mapping[Wire, Schema] = {
    "openai": an_object(
        {
            "error": an_object(
                {"message": _TEXT, "type": _TEXT, "param": maybe(_TEXT), "code": maybe(_TEXT)}, ["message", "type"]
            )
        },
        ["error"],
    ),
    "anthropic": an_object(
        {"type": {"const": "error"}, "error": an_object({"type": _TEXT, "message": _TEXT}, ["type", "message"])},
        ["type", "error"],
    ),
}
_KEYS: Mapping[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def document(*, keys: bool = False) -> dict[str, Any]:
    """All endpoints with what they take, give and fail with, for OpenAPI 3.1.

    Args:
        keys: Callers need a key.
    """
    block = Metadata.model_json_schema(by_alias=True, ref_template="#/components/schemas/{model}")
    parts = block.pop("$defs")
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, keys=keys)
    return {
        "openapi": DIALECT,
        "info": {"title": "hhh-router", "version": version("hhh-router"), "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {"Metadata": block, **parts, **{f"Error_{wire}": schema for wire, schema in _ERRORS.items()}},
            **({"securitySchemes": dict(_KEYS)} if keys else {}),
        },
    }


def _operation(endpoint: Endpoint, *, keys: bool) -> dict[str, Any]:
    locked = keys and endpoint.needs_key
    told = {"application/json": {"schema": {"$ref": f"#/components/schemas/Error_{endpoint.wire}"}}}
    gives = {endpoint.media: {"schema": endpoint.gives}}
    if endpoint.streams:
        gives["text/event-stream"] = {}  # OpenAPI 3.1 has no words for events
    answers = {"200": {"description": "the reply", "content": gives}}
    if endpoint.path == "/health/ready":
        answers["503"] = {"description": "not ready", "content": gives}
    failures = ["4XX", "5XX"] if endpoint.takes is not None or locked else []
    answers |= {
        status: {"description": "what was found, where, and what to do", "content": told} for status in failures
    }
    made: dict[str, Any] = {"operationId": _name(endpoint), "summary": endpoint.does, "responses": answers}
    if (takes := endpoint.takes) is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": takes}}}
    if endpoint.generates:
        made["parameters"] = _HEADERS
    if locked:
        made["security"] = [{name: []} for name in _KEYS]
    return made


_HEADERS = [
    {
        "name": "x-request-timeout-ms",
        "in": "header",
        "description": "how long the caller waits",
        "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_MS},
    },
    {
        "name": HEADER,
        "in": "header",
        "description": "the same request under the same key is answered once, and told again after that",
        "schema": {"type": "string", "pattern": f"^[!-~]{{1,{LONGEST_KEY}}}$"},
    },
]


def _name(endpoint: Endpoint) -> str:
    """
    >>> from hhh_router.interfaces.server.endpoints import ENDPOINTS
    >>> _name(ENDPOINTS[0])
    'post_v1_chat_completions'
    """
    return "_".join([endpoint.method.lower(), *endpoint.path.strip("/").replace(".", "_").split("/")])
