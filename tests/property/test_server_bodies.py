"""Whatever a client sends, it is told what is wrong in its wire's own shape: no body makes the server fail."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from hhh_router.interfaces.server import anthropic, completions, openai, responses
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.guardrail import PATH
from hhh_router.interfaces.server.openapi import document
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.trace.feedback_store import FeedbackStore
from hhh_router.types import ReadRequest
from tests.unit.test_feedback_store import seen

PART = {"type": "text", "text": "Hi"}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [PART, {"type": "image_url", "image_url": {"url": "data:,"}}]},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on."},
]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS, "strict": True}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto", "parallel_tool_calls": False}
FLAT_TOOLS = {**TOOLS, "tools": [{"type": "function", **FUNCTION}]}
THEIR_TOOLS = {
    "tools": [{"name": "weather", "description": "Of a city.", "input_schema": PARAMETERS}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
}
CALLED = [
    {"role": "user", "content": "And there?"},
    {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
]
FLAT_CALLED = [
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
]
THEIR_CALLED = [
    {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Ur"}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [PART], "is_error": False}]},
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
OURS = {"policy": "balanced", "weights": {"base": 0.5, "honest": 0.5}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "hhh-auto", "messages": TURNS, "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
        "seed": 1, "stop": ["x"], "logit_bias": {"5": 1}, "logprobs": True, "top_logprobs": 2,
        "response_format": FORMAT, "moderation": {"model": "hhh-auto"}, "stream": False,
        "stream_options": {"include_usage": True}, "hhh": OURS, "n": 1, "tools": [], "user": "me",
    },
    "/v1/completions": {
        "model": "hhh-auto", "prompt": ["a", "b"], "max_tokens": 8, "n": 2, "seed": 1, "stop": "x", "logprobs": 1,
        "stream_options": {"include_usage": True}, "temperature": 0.5, "logit_bias": {"5": 1}, "hhh": OURS,
    },
    "/v1/responses": {
        "model": "hhh-auto:balanced", "input": [{"type": "message", **turn} for turn in TURNS[1:]],
        "instructions": "Be brief.", "max_output_tokens": 8, "text": {"format": {"type": "text"}},
        "include": ["message.output_text.logprobs"], "top_logprobs": 1, "store": True, "metadata": {"a": "b"},
        "previous_response_id": None, "hhh": OURS,
    },
    "/v1/messages": {
        "model": "hhh-honest", "messages": TURNS[1:], "system": [PART], "max_tokens": 8, "stop_sequences": ["x"],
        "temperature": 1, "top_k": 3, "stream": False, "hhh": {"policy": "balanced"}, "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {"model": "hhh-auto", "messages": TURNS[1:], "system": "Be kind."},
    "/v1/moderations": {"input": ["a", "b"], "model": "hhh-auto", "policy": "balanced"},
    "/v1/decisions": {
        "model": "hhh-auto",
        "input": [
            {"role": "user", "content": "Hi"},
            {"type": "function_call", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "output": "x"},
            {"role": "assistant", "content": "Done."},
        ],
        "questions": [
            {"type": "predicate", "name": "harmful"},
            {"type": "choice", "instructions": "Which?", "choices": ["a", {"value": "b", "description": "the other"}]},
            {"type": "score", "instructions": "How?", "levels": ["low", {"label": "high"}]},
        ],
    },
    "/v1/systemone": {
        "state": {"any": ["thing", 1]},
        "questions": {
            "harmful": {"type": "noul", "criteria": {"true": "yes", "false": "no"}},
            "which": {"type": "choice", "instructions": "Which?", "criteria": {"a": "one", "b": None}},
            "how": {"type": "score", "criteria": ["low", "high"]},
        },
    },
    PATH: {
        "input_type": "request", "texts": ["Hi"], "structured_messages": TURNS, "litellm_call_id": "1", "images": ["x"],
        "additional_provider_specific_params": {"policy": "balanced"},
    },
    "/v1/guard": {"items": [{"prompt": TURNS, "policy": "balanced"}, {"response": "No."}], "policy": "balanced"},
    "/v1/route": {"prompt": "Hi", "policy": "balanced"},
    "/v1/feedback": {
        "request_id": "known", "labels": {"harmful": True, "passed_wrongly": True, "unsafe": False}, "by": "me",
        "sampled": True, "probability": 0.5,
    },
}  # fmt: skip
"""Path → a body that is answered, with as many fields as there can be."""
CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "hhh-auto", "messages": CALLED, "n": 2, "seed": 5, **TOOLS},
    "/v1/responses": {"model": "hhh-auto", "input": [TURNS[1], *FLAT_CALLED], **FLAT_TOOLS},
    "/v1/messages": {"model": "hhh-auto", "messages": [TURNS[1], *THEIR_CALLED], "max_tokens": 8, **THEIR_TOOLS},
    "/v1/messages/count_tokens": {"model": "hhh-auto", "messages": [TURNS[1], *THEIR_CALLED], **THEIR_TOOLS},
}
"""The same with tools, which are called."""
CASES = [pytest.param(path, body, id=path) for path, body in BODIES.items()]
CASES += [pytest.param(path, body, id=f"{path} with tools") for path, body in CALLS.items()]
WIRES = {
    "/v1/chat/completions": (openai.READ_FIELDS, openai.NEUTRAL_VALUES),
    "/v1/completions": (completions.READ_FIELDS, completions.NEUTRAL_VALUES),
    "/v1/responses": (responses.READ_FIELDS, responses.NEUTRAL_VALUES),
    "/v1/messages": (anthropic.READ_FIELDS, anthropic.NEUTRAL_VALUES),
}
ODD: tuple[Any, ...] = (
    None, True, False, 0, 2, -1, 0.5, 10**400, -(10**19), 1e308, float("1e-320"), "", " ", "\x00", "\ud800", "hhh-auto",
    "text", "x" * 5000, [], {}, [[]], [None], [""], [{}], {"": None}, {"type": None}, {"type": {}}, {"type": []},
    {"role": "user"}, {"role": [], "content": {}}, {"type": "text", "text": {}}, {"type": "json_schema"},
)  # fmt: skip
"""What nobody expects at any place."""


@pytest.fixture(scope="module")
def served() -> Iterator[TestClient]:
    reader = FakeReader({"Go": {"needs.honest": 2.0}})
    pipeline = fake_pipeline(reader=reader, generator=FakeGenerator("one two", reader=reader))
    store = FeedbackStore()
    store.remember(seen("known", reply=True, time=1e12), ReadRequest(), None)
    pipeline.remember_in(store)
    with TestClient(create_app(pipeline), raise_server_exceptions=False) as made:
        yield made


@pytest.mark.parametrize(("path", "start"), CASES)
def test_the_bodies_to_start_from_are_answered(served: TestClient, path: str, start: Any) -> None:
    reply = served.post(path, json=start)

    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("path", "start"), CASES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_body_with_anything_anywhere_makes_no_server_error(
    served: TestClient, path: str, start: Any, data: st.DataObject
) -> None:
    body = copy.deepcopy(start)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        _change(body, data, path)

    reply = served.post(path, content=json.dumps(body))

    assert reply.status_code < 500, reply.text
    if reply.status_code != 200 and "text/event-stream" not in reply.headers["content-type"]:
        described = document()
        told = described["paths"][path]["post"]["responses"]["4XX"]["content"]["application/json"]["schema"]
        jsonschema.validate(reply.json(), {**told, "components": described["components"]})
        assert "something went wrong" not in reply.text


def _change(body: dict[str, Any], data: st.DataObject, path: str) -> None:
    """Put something odd in some place, take something away, or add a field that the wire knows."""
    if not (places := list(_places(body))):
        return
    inside, at = data.draw(st.sampled_from(places), label="place")
    match data.draw(st.sampled_from(["put", "put", "drop", "add", "twice"]), label="what"):
        case "put":
            inside[at] = copy.deepcopy(data.draw(st.sampled_from(ODD), label="value"))
        case "drop":
            del inside[at]
        case "add":
            read, neutral = WIRES.get(path, (frozenset({"model", "policy"}), {}))
            name = data.draw(st.sampled_from(sorted({*read, *neutral})), label="field")
            body[name] = copy.deepcopy(data.draw(st.sampled_from(ODD), label="value"))
        case "twice":
            inside[at] = [inside[at]] * 2


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for at in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, at
        yield from _places(value[at])
