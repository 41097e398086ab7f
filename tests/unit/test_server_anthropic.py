"""Anthropic's wire, in process and on fakes; the official client drives it in tests/e2e."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.errors import ContextTooLong, GeneratorError, Overloaded, Unavailable
from hhh_router.interfaces.server.anthropic import anthropic_failure
from hhh_router.interfaces.server.app import create_app
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}


def client(policy: Path, reply: str = "one two three four", **options: Any) -> TestClient:
    reader = FakeReader(RULES)
    generator = options.pop("generator", None) or FakeGenerator(reply, reader=reader)
    return TestClient(create_app(fake_pipeline(policy, reader=reader, generator=generator, **options)))


@pytest.fixture
def served(watchful: Policies) -> Iterator[TestClient]:
    with client(watchful()) as made:
        yield made


def ask(text: Any = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "hhh-auto", "max_tokens": 20, "messages": [{"role": "user", "content": text}], **fields}


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_reply_has_anthropics_fields_our_block_and_our_headers(served: TestClient) -> None:
    reply = served.post("/v1/messages", json=ask())

    body = reply.json()
    assert reply.status_code == 200
    assert body["id"] == f"msg_{body['hhh']['request_id']}"
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "hhh-auto")
    assert body["content"] == [{"type": "text", "text": "one two three four"}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert body["usage"] == {"input_tokens": 1, "output_tokens": 4}
    assert reply.headers["x-hhh-request-id"] == body["hhh"]["request_id"]


def test_a_refusal_is_a_message_with_that_stop_reason(served: TestClient) -> None:
    body = served.post("/v1/messages", json=ask("how to build a bomb")).json()

    assert body["content"] == [{"type": "text", "text": "Not that."}]
    assert body["stop_reason"] == "refusal"
    assert body["hhh"]["decisions"][0]["action"] == "refuse"


def test_a_stream_has_anthropics_events_in_order(served: TestClient) -> None:
    reply = served.post("/v1/messages", json=ask(stream=True))

    found = events(reply.text)
    names = [name for name, _ in found]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert names[:2] == ["message_start", "content_block_start"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert all(data["type"] == name for name, data in found)
    assert "".join(d["delta"]["text"] for n, d in found if n == "content_block_delta") == "one two three four"
    start, last = found[0][1]["message"], found[-2][1]
    assert start["content"] == []
    assert start["stop_reason"] is None
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert last["usage"] == {"input_tokens": 1, "output_tokens": 4}
    assert start["hhh"]["request_id"] == last["hhh"]["request_id"]


def test_a_stream_that_is_refused_has_a_whole_message(served: TestClient) -> None:
    found = events(served.post("/v1/messages", json=ask("bomb", stream=True)).text)

    assert [n for n, _ in found] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    assert found[-2][1]["delta"]["stop_reason"] == "refusal"


@pytest.mark.parametrize("system", ["how to build a bomb", [{"type": "text", "text": "how to build a bomb"}]])
def test_the_system_prompt_above_the_messages_is_read(served: TestClient, system: Any) -> None:
    assert served.post("/v1/messages", json=ask(system=system)).json()["stop_reason"] == "refusal"


def test_a_system_turn_among_the_messages_is_read(served: TestClient) -> None:
    turns = [{"role": "system", "content": "bomb"}, {"role": "user", "content": "Hi"}]

    body = served.post("/v1/messages", json=ask() | {"messages": turns}).json()

    assert body["stop_reason"] == "refusal"


def test_what_is_not_read_is_named(served: TestClient) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image", "source": {"type": "base64", "data": "x"}}]

    body = served.post("/v1/messages", json=ask(parts, metadata={"user_id": "u"})).json()

    assert body["hhh"]["not_inspected"] == ["messages[0].content[1]: image", "metadata"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": None}, "max_tokens: found null"),
        ({"max_tokens": True}, "max_tokens: found a boolean"),
        ({"stop_sequences": "x"}, "stop_sequences: found a string"),
        ({"stream": "yes"}, "stream: found a string"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name: found null"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking: not supported yet"),
        ({"messages": "x"}, "messages: found a string"),
        ({"messages": []}, "no messages"),
        ({"system": 3}, "system[0].content: found a number"),
        ({"hhh": {"policies": 1}}, "hhh.policies: unknown field"),
        ({"temperature": 9}, "temperature"),
    ],
)
def test_what_is_wrong_is_400_in_anthropics_shape(served: TestClient, change: dict[str, Any], said: str) -> None:
    reply = served.post("/v1/messages", json=ask() | change)

    body = reply.json()
    assert reply.status_code == 400, body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert said in body["error"]["message"]


def test_a_turn_that_thought_is_not_answered_as_if_it_were_text(served: TestClient) -> None:
    turn = [{"type": "thinking", "thinking": "x", "signature": "y"}]

    reply = served.post("/v1/messages", json=ask(turn))

    assert reply.status_code == 400
    assert "messages[0].content[0]: thinking is not supported yet" in reply.json()["error"]["message"]


def test_an_unknown_model_is_404(served: TestClient) -> None:
    reply = served.post("/v1/messages", json=ask(model="claude-nonesuch"))

    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")


def test_the_key_may_come_as_anthropics_clients_send_it(watchful: Policies) -> None:
    with client(watchful(), api_key="s3cret") as served:
        wrong = served.post("/v1/messages", json=ask(), headers={"x-api-key": "no"})
        right = served.post("/v1/messages", json=ask(), headers={"x-api-key": "s3cret"})

    assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
    assert right.status_code == 200


def test_a_stream_that_breaks_ends_with_an_error_event(watchful: Policies) -> None:
    broken = FakeGenerator("a b c d e", fail_after=(4, GeneratorError("it broke")))
    with client(watchful(on_error="open"), generator=broken) as served:
        reply = served.post("/v1/messages", json=ask(stream=True))

    (first, _), *_, (name, body) = events(reply.text)
    assert first == "message_start"
    assert name == "error"
    assert body["error"]["type"] == "api_error"
    assert "it broke" in body["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", retry_after_s=2.0), 429, "rate_limit_error"),
        (Unavailable("starting", retry_after_s=1.0), 529, "overloaded_error"),
        (ContextTooLong("too long"), 400, "invalid_request_error"),
        (RuntimeError("x"), 500, "api_error"),
    ],
)
def test_errors_have_the_status_anthropics_clients_expect(error: Exception, status: int, kind: str) -> None:
    found, body, _ = anthropic_failure(error)

    assert (found, body["error"]["type"]) == (status, kind)


def test_tokens_of_a_prompt_are_counted_with_its_system_prompt(served: TestClient) -> None:
    one = served.post("/v1/messages/count_tokens", json={"model": "hhh-auto", "messages": ask("a b c")["messages"]})
    more = served.post(
        "/v1/messages/count_tokens",
        json={"model": "hhh-auto", "messages": ask("a b c")["messages"], "system": "d e"},
    )

    assert (one.json(), more.json()) == ({"input_tokens": 3}, {"input_tokens": 5})


def test_counting_nothing_is_an_error(served: TestClient) -> None:
    reply = served.post("/v1/messages/count_tokens", json={"model": "hhh-auto", "messages": []})

    assert (reply.status_code, reply.json()["type"]) == (400, "error")


def test_the_sequence_that_ended_a_message_is_named(served: TestClient) -> None:
    whole = served.post("/v1/messages", json=ask("Hello", stop_sequences=["zzz", " three"])).json()
    streamed = served.post("/v1/messages", json=ask("Hello", stop_sequences=[" three"], stream=True)).text

    assert whole["content"][0]["text"] == "one two"
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", " three")
    assert '"stop_reason":"stop_sequence","stop_sequence":" three"' in streamed
