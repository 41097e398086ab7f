"""The OpenAPI document tells of every endpoint and field there is, and replies are what it says."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from hhh_router.interfaces.server import anthropic, feedback, guardrail, moderations, native, openai, responses
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.endpoints import ENDPOINTS
from hhh_router.interfaces.server.openapi import document
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

Policies = Callable[..., Path]
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"model": "hhh-auto", "messages": HELLO},
    "/v1/completions": {"model": "hhh-auto", "prompt": ["Hello", "bomb"], "n": 2, "echo": True, "logprobs": 1},
    "/v1/responses": {"model": "hhh-auto", "input": "Hello"},
    "/v1/messages": {"model": "hhh-auto", "messages": HELLO, "max_tokens": 8},
    "/v1/messages/count_tokens": {"model": "hhh-auto", "messages": HELLO},
    "/v1/moderations": {"input": ["Hello", "bomb"]},
    "/v1/decisions": {"input": "Hello", "questions": [{"type": "predicate", "name": "harmful"}]},
    "/v1/systemone": {"state": "Hello", "questions": {"harmful": {"type": "noul"}}},
    guardrail.PATH: {"input_type": "request", "texts": ["bomb"]},
    "/v1/guard": {"items": [{"prompt": "Hello"}, {"response": "poison"}]},
    "/v1/route": {"prompt": "Hello"},
    "/v1/feedback": {"labels": {"harmful": False}, "by": "me", "sampled": True, "probability": 0.5},
}
"""Path → a body that is answered."""


@pytest.fixture
def served(watchful: Policies) -> Iterator[TestClient]:
    reader = FakeReader({"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}})
    generator = FakeGenerator("one two three", reader=reader)
    with TestClient(create_app(fake_pipeline(watchful(), reader=reader, generator=generator))) as made:
        yield made


def properties(schema: dict[str, Any]) -> set[str]:
    found = set(schema.get("properties", {}))
    return found.union(*(properties(s) for s in schema.get("anyOf", ())))


def body_of(described: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return found


def test_every_route_is_described_and_nothing_else() -> None:
    app = create_app(fake_pipeline())

    routes = {(m.lower(), r.path) for r in app.routes if isinstance(r, Route) for m in (r.methods or set()) - {"HEAD"}}
    told = {(method, path) for path, item in document()["paths"].items() for method in item}
    assert told == routes


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", openai.READ_FIELDS | set(openai.NEUTRAL_VALUES)),
        ("/v1/responses", responses.READ_FIELDS | set(responses.NEUTRAL_VALUES)),
        ("/v1/messages", anthropic.READ_FIELDS | set(anthropic.NEUTRAL_VALUES)),
        ("/v1/moderations", moderations.FIELDS),
        ("/v1/guard", native.ITEM_FIELDS | {"items"}),
        ("/v1/route", native.ITEM_FIELDS | {"items"}),
        ("/v1/feedback", set(feedback.FIELDS)),
    ],
)
def test_every_field_that_is_read_or_refused_is_described(path: str, fields: set[str]) -> None:
    schema = body_of(document(), path)

    assert properties(schema) == set(fields)
    assert [name for name, said in schema.get("properties", {}).items() if not said] == []


def test_every_endpoint_that_takes_a_body_is_answered_as_described(served: TestClient) -> None:
    described = served.get("/openapi.json").json()
    assert set(BODIES) == {e.path for e in ENDPOINTS if e.takes is not None}

    for endpoint in ENDPOINTS:
        told = described["paths"][endpoint.path][endpoint.method.lower()]
        if endpoint.takes is not None:
            body = BODIES[endpoint.path]
            if endpoint.path == "/v1/feedback":  # about a request that was answered
                earlier = served.post("/v1/guard", json={"prompt": "Hello"}).json()["hhh"]["request_id"]
                body = {**body, "request_id": earlier}
            jsonschema.validate(body, {**body_of(described, endpoint.path), **_parts(described)})
            reply = served.post(endpoint.path, json=body)
        else:
            reply = served.get(endpoint.path)
        assert reply.status_code == 200, (endpoint.path, reply.text)
        [media] = [m for m in told["responses"]["200"]["content"] if reply.headers["content-type"].startswith(m)]
        schema = told["responses"]["200"]["content"][media]["schema"]
        given = reply.json() if media == "application/json" else reply.text
        jsonschema.validate(given, {**schema, **_parts(described)})


def test_errors_are_as_described(served: TestClient) -> None:
    described = document()

    for endpoint in ENDPOINTS:
        if endpoint.takes is not None:
            reply = served.post(endpoint.path, content=b"{")
            told = described["paths"][endpoint.path]["post"]["responses"]["4XX"]["content"]["application/json"]
            assert reply.status_code == 400
            jsonschema.validate(reply.json(), {**told["schema"], **_parts(described)})


def test_every_schema_is_one() -> None:
    described = document(keys=True)
    validator = jsonschema.Draft202012Validator

    for schema in described["components"]["schemas"].values():
        validator.check_schema(schema)
    for endpoint in ENDPOINTS:
        validator.check_schema(endpoint.gives)
        if endpoint.takes is not None:
            validator.check_schema(endpoint.takes)


def test_keys_are_described_where_they_are_needed() -> None:
    open_door = create_app(fake_pipeline())
    locked = create_app(fake_pipeline(api_key="s3cret"))

    with TestClient(open_door) as served:
        assert "security" not in json.dumps(served.get("/openapi.json").json())
    with TestClient(locked) as served:
        paths = served.get("/openapi.json").json()["paths"]
    assert paths["/v1/guard"]["post"]["security"]
    assert "security" not in paths["/health/live"]["get"]


def _parts(described: dict[str, Any]) -> dict[str, Any]:
    """So that references find their parts."""
    return {"components": described["components"]}
