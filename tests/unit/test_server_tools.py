"""Calls of tools over every chat wire: asked, answered, and their results sent back."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.interfaces.server.app import create_app
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.types import ToolCall

Policies = Callable[..., Path]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALLS = (
    '<tool_call>[{"name": "weather", "arguments": {"city": "Oslo"}}, '
    '{"name": "weather", "arguments": {"city": "Rome"}}]</tool_call>'
)
OPENAI_TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
FLAT_TOOLS = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
ANTHROPIC_TOOLS = [{"name": "weather", "input_schema": SCHEMA}]


@pytest.fixture
def generator() -> FakeGenerator:
    rules = {"Quito": {"outcomes.unsafe": 6.0}}

    def reply(request: Any) -> str:
        said = request.messages[-1].content
        if said == "bad":
            return CALLS.replace("Oslo", "Quito")
        return "It is mild." if request.messages[-1].role == "tool" else f"Let me look. {CALLS}"

    return FakeGenerator(reply, reader=FakeReader(rules))


@pytest.fixture
def served(watchful: Policies, generator: FakeGenerator) -> Iterator[TestClient]:
    pipeline = fake_pipeline(watchful(), reader=generator._reader, generator=generator)
    with TestClient(create_app(pipeline)) as made:
        yield made


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: {")]


def chat(served: TestClient, text: str = "Weather?", **more: Any) -> Any:
    body = {"model": "hhh-auto", "messages": [{"role": "user", "content": text}], "tools": OPENAI_TOOLS, **more}
    return served.post("/v1/chat/completions", json=body)


def test_a_chat_tells_of_calls_as_openai_does(served: TestClient) -> None:
    body = chat(served).json()

    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look. "
    calls = choice["message"]["tool_calls"]
    assert [(c["type"], c["function"]["name"], json.loads(c["function"]["arguments"])["city"]) for c in calls] == [
        ("function", "weather", "Oslo"),
        ("function", "weather", "Rome"),
    ]
    assert len({c["id"] for c in calls}) == 2


def test_a_streamed_chat_tells_of_the_same_calls(served: TestClient) -> None:
    chunks = events(chat(served, stream=True).text)

    choices = [c["choices"][0] for c in chunks]
    calls = [call for c in choices for call in c["delta"].get("tool_calls", ())]
    assert [(c["index"], json.loads(c["function"]["arguments"])["city"]) for c in calls] == [(0, "Oslo"), (1, "Rome")]
    assert "".join(c["delta"].get("content") or "" for c in choices) == "Let me look. "
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_results_go_back_and_are_part_of_what_is_read(served: TestClient, generator: FakeGenerator) -> None:
    asked = chat(served).json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "12 degrees"} for c in asked["tool_calls"]]

    body = chat(served, messages=[{"role": "user", "content": "Weather?"}, asked, *results]).json()

    assert body["choices"][0]["message"]["content"] == "It is mild."
    assert body["choices"][0]["finish_reason"] == "stop"
    _, assistant, first, second = generator.requests[-1].messages
    assert [c.id for c in assistant.tool_calls] == [first.tool_call_id, second.tool_call_id]
    assert body["hhh"]["not_inspected"] == []


def test_without_tools_or_with_none_nothing_is_called(served: TestClient) -> None:
    for more in ({"tools": None}, {"tool_choice": "none"}):
        [choice] = chat(served, **more).json()["choices"]

        assert choice["message"]["content"] == f"Let me look. {CALLS}"
        assert "tool_calls" not in choice["message"]


def test_calls_that_the_policy_stops_are_not_told(served: TestClient) -> None:
    whole = chat(served, "bad").json()["choices"][0]
    streamed = events(chat(served, "bad", stream=True).text)

    assert (whole["finish_reason"], whole["message"].get("tool_calls")) == ("content_filter", None)
    assert not any("tool_calls" in c["choices"][0]["delta"] for c in streamed)
    assert streamed[-1]["choices"][0]["finish_reason"] == "content_filter"


def test_a_result_without_its_call_is_a_mistake(served: TestClient) -> None:
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Wait."},
        {"role": "tool", "tool_call_id": "call_x", "content": "12"},
    ]

    reply = chat(served, messages=turns)

    assert reply.status_code == 400
    assert "messages[2].tool_call_id: no call 'call_x' comes before it" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ("x", "messages[1].tool_calls: found a string"),
        ([{}], "messages[1].tool_calls[0]: no call of a function"),
        ([{"function": {"name": "weather"}}], "messages[1].tool_calls[0].id: found null"),
        ([{"id": "a", "function": {"name": "weather", "arguments": "{"}}], "arguments: no JSON object"),
        ([{"id": "a", "function": {"name": "a b", "arguments": "{}"}}], "name: found 'a b'"),
        ([{"id": "a", "function": {"name": "weather"}}] * 129, "found 129"),
    ],
)
def test_what_is_wrong_with_calls_is_named(served: TestClient, calls: Any, said: str) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]

    reply = chat(served, messages=[*turns, {"role": "user", "content": "Go on"}])

    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


# -- Anthropic --------------------------------------------------------------------------------------------------------


def message(served: TestClient, *turns: Any, **more: Any) -> Any:
    body = {"model": "hhh-auto", "max_tokens": 50, "messages": list(turns), "tools": ANTHROPIC_TOOLS, **more}
    return served.post("/v1/messages", json=body)


def test_a_message_tells_of_calls_as_anthropic_does(served: TestClient) -> None:
    body = message(served, {"role": "user", "content": "Weather?"}).json()

    text, first, second = body["content"]
    assert body["stop_reason"] == "tool_use"
    assert text == {"type": "text", "text": "Let me look. "}
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "weather", {"city": "Oslo"})
    assert second["input"] == {"city": "Rome"}


def test_a_streamed_message_has_a_block_a_call(served: TestClient) -> None:
    found = events(message(served, {"role": "user", "content": "Weather?"}, stream=True).text)

    begun = [e["content_block"]["type"] for e in found if e["type"] == "content_block_start"]
    ended = [e["index"] for e in found if e["type"] == "content_block_stop"]
    given = [e["delta"]["partial_json"] for e in found if e.get("delta", {}).get("type") == "input_json_delta"]
    assert begun == ["text", "tool_use", "tool_use"]
    assert ended == [0, 1, 2]
    assert [json.loads(x)["city"] for x in given] == ["Oslo", "Rome"]
    assert next(e for e in found if e["type"] == "message_delta")["delta"]["stop_reason"] == "tool_use"


def test_anthropics_results_go_back(served: TestClient, generator: FakeGenerator) -> None:
    asked = message(served, {"role": "user", "content": "Weather?"}).json()
    results = [
        {"type": "tool_result", "tool_use_id": b["id"], "content": [{"type": "text", "text": "12"}], "is_error": bad}
        for b, bad in zip(asked["content"][1:], (False, True), strict=True)
    ]

    turns = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": asked["content"]}]
    body = message(served, *turns, {"role": "user", "content": results}).json()

    assert body["content"] == [{"type": "text", "text": "It is mild."}]
    assert body["hhh"]["not_inspected"] == ["messages[2].content[1].is_error"]
    _, assistant, *tools = generator.requests[-1].messages
    assert [c.arguments for c in assistant.tool_calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
    assert [(t.role, t.content) for t in tools] == [("tool", "12")] * 2


@pytest.mark.parametrize(
    ("choice", "required", "parallel"),
    [
        ({"type": "auto"}, False, True),
        ({"type": "any", "disable_parallel_tool_use": True}, True, False),
        ({"type": "tool", "name": "weather"}, True, True),
    ],
)
def test_anthropics_choices_are_understood(
    served: TestClient, generator: FakeGenerator, choice: Any, required: bool, parallel: bool
) -> None:
    message(served, {"role": "user", "content": "Weather?"}, tool_choice=choice)

    use = generator.requests[-1].tools
    assert use is not None
    assert (use.required, use.parallel) == (required, parallel)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type: found 'bash_20250124'"),
        ({"tools": [3]}, "tools[0]: found a number"),
        ({"tool_choice": {"type": "tool", "name": "now"}}, "'now' is none of the tools"),
        ({"tool_choice": "any"}, "tool_choice.type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id: found null"),
    ],
)
def test_anthropics_mistakes_are_named(served: TestClient, change: dict[str, Any], said: str) -> None:
    reply = message(served, {"role": "user", "content": "Hi"}, **change)

    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


# -- responses --------------------------------------------------------------------------------------------------------


def respond(served: TestClient, given: Any = "Weather?", **more: Any) -> Any:
    return served.post("/v1/responses", json={"model": "hhh-auto", "input": given, "tools": FLAT_TOOLS, **more})


def test_a_response_tells_of_calls_as_items_of_its_output(served: TestClient) -> None:
    body = respond(served).json()

    said, first, second = body["output"]
    assert (body["status"], said["type"]) == ("completed", "message")
    assert (first["type"], first["name"], json.loads(first["arguments"])) == (
        "function_call", "weather", {"city": "Oslo"},
    )  # fmt: skip
    assert first["call_id"] != second["call_id"]
    assert body["tools"] == FLAT_TOOLS


def test_a_streamed_response_has_every_event_of_its_calls(served: TestClient) -> None:
    found = events(respond(served, stream=True).text)

    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    calls = [e["type"] for e in found if e.get("output_index") == 1]
    assert calls == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    done = [e["item"] for e in found if e["type"] == "response.output_item.done"]
    assert done == found[-1]["response"]["output"]


def test_a_response_goes_on_from_the_one_that_called(served: TestClient, generator: FakeGenerator) -> None:
    asked = respond(served).json()
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "12 degrees"}
        for item in asked["output"][1:]
    ]

    body = respond(served, results, previous_response_id=asked["id"]).json()

    assert body["output"][0]["content"][0]["text"] == "It is mild."
    assert [m.role for m in generator.requests[-1].messages] == ["user", "assistant", "tool", "tool"]


def test_a_whole_conversation_with_calls_can_be_sent(served: TestClient, generator: FakeGenerator) -> None:
    asked = respond(served, store=False).json()["output"]
    results = [{"type": "function_call_output", "call_id": i["call_id"], "output": "12"} for i in asked[1:]]

    reply = respond(served, [{"role": "user", "content": "Weather?"}, *asked, *results])

    assert reply.status_code == 200, reply.json()
    _, assistant, *_ = generator.requests[-1].messages
    assert assistant.content == "Let me look. "
    assert len(assistant.tool_calls) == 2
    assert isinstance(assistant.tool_calls[0], ToolCall)
