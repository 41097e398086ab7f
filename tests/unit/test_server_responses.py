"""OpenAI's responses, in process and on fakes; the official client drives them in tests/e2e."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.errors import GeneratorError
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.http import WireError
from hhh_router.interfaces.server.responses import Conversations
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.types import Message

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}


def reply_to(request: Any) -> str:
    return "a b c d e f g h poison" if request.messages[-1].content == "cut" else "one two three four"


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader(RULES)


@pytest.fixture
def served(watchful: Policies, reader: FakeReader) -> Iterator[TestClient]:
    pipeline = fake_pipeline(watchful(), reader=reader, generator=FakeGenerator(reply_to, reader=reader))
    with TestClient(create_app(pipeline)) as made:
        yield made


def post(served: TestClient, given: Any = "Hello", **more: Any) -> Any:
    return served.post("/v1/responses", json={"model": "hhh-auto", "input": given, **more})


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: ")]


def test_a_response_has_openais_fields_our_block_and_our_headers(served: TestClient) -> None:
    reply = post(served, instructions="Be brief.", temperature=0.5, max_output_tokens=20, metadata={"a": "b"})

    body = reply.json()
    assert reply.status_code == 200
    assert body["id"] == f"resp_{body['hhh']['request_id']}"
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "hhh-auto")
    [item] = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": "one two three four", "annotations": [], "logprobs": []}
    ]  # fmt: skip
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 4
    assert (body["instructions"], body["temperature"], body["max_output_tokens"]) == ("Be brief.", 0.5, 20)
    assert body["metadata"] == {"a": "b"}
    assert body["store"] is True
    assert reply.headers["x-hhh-request-id"] == body["hhh"]["request_id"]


def test_instructions_are_read_as_the_system_prompt(served: TestClient, reader: FakeReader) -> None:
    found = post(served, instructions="bomb").json()

    assert found["status"] == "incomplete"
    assert [m.role for m in reader.calls[-1][0].messages] == ["system", "user"]


def test_a_stream_has_openais_events_in_order_and_numbered(served: TestClient) -> None:
    found = events(post(served, stream=True).text)

    kinds = [e["type"] for e in found]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    assert "".join(e["delta"] for e in found if e["type"].endswith("delta")) == "one two three four"
    last = found[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == "one two three four"
    assert found[0]["response"]["hhh"]["request_id"] == last["hhh"]["request_id"]


@pytest.mark.parametrize("text", ["Hello", "how to build a bomb"])
def test_a_stream_ends_with_what_the_whole_response_would_be(served: TestClient, text: str) -> None:
    whole = post(served, text).json()
    found = events(post(served, text, stream=True).text)

    last = found[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert (last["status"], last["incomplete_details"], last["usage"]) == (
        whole["status"], whole["incomplete_details"], whole["usage"],
    )  # fmt: skip
    parts = [e["part"] for e in found if e["type"] == "response.content_part.done"]
    assert parts == whole["output"][0]["content"]


def test_a_stream_that_is_cut_ends_with_the_policys_message_in_a_part_of_its_own(served: TestClient) -> None:
    found = events(post(served, "cut", stream=True).text)

    parts = [e["part"] for e in found if e["type"] == "response.content_part.done"]
    assert [p["type"] for p in parts] == ["output_text", "refusal"]
    assert "poison" not in parts[0]["text"]
    last = found[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["output"][0]["content"] == parts


def test_a_refusal_is_a_part_of_its_own(served: TestClient) -> None:
    body = post(served, "how to build a bomb").json()

    assert body["output"][0]["content"] == [{"type": "refusal", "refusal": "Not that."}]
    assert body["incomplete_details"] == {"reason": "content_filter"}


def test_an_earlier_response_is_gone_on_from(served: TestClient, reader: FakeReader) -> None:
    first = post(served, "Hello", instructions="Be brief.").json()
    post(served, "And now?", previous_response_id=first["id"])

    asked = reader.calls[-1][0].messages if reader.calls[-1][0].response is None else reader.calls[-2][0].messages
    assert [(m.role, m.content) for m in asked] == [
        ("user", "Hello"), ("assistant", "one two three four"), ("user", "And now?"),
    ]  # fmt: skip


def test_what_was_not_to_be_kept_is_not(served: TestClient) -> None:
    first = post(served, store=False).json()

    reply = post(served, previous_response_id=first["id"])
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "previous_response_not_found")


def test_log_probabilities_come_where_they_are_included(served: TestClient) -> None:
    body = post(served, include=["message.output_text.logprobs"], top_logprobs=2).json()

    told = body["output"][0]["content"][0]["logprobs"]
    assert len(told) == 4
    assert set(told[0]) == {"token", "logprob", "bytes", "top_logprobs"}


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"input": None}, 400, "input: found null"),
        (
            {"input": [{"type": "function_call_output", "output": "x"}]},
            400,
            "messages[0].role: tool as the first message",
        ),
        ({"instructions": 3}, 400, "instructions: found a number"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type: found 'web_search'"),
        ({"background": True}, 400, "background: not supported yet"),
        ({"stream": "yes"}, 400, "stream: found a string"),
        ({"text": "x"}, 400, "text: found a string"),
        ({"include": "x"}, 400, "include: found a string"),
        ({"previous_response_id": 3}, 400, "previous_response_id: found a number"),
        ({"model": "gpt-nonesuch"}, 404, "does not exist"),
        ({"max_output_tokens": 0}, 400, "max_tokens"),
    ],
)
def test_what_is_wrong_is_named(served: TestClient, change: dict[str, Any], status: int, said: str) -> None:
    reply = served.post("/v1/responses", json={"model": "hhh-auto", "input": "Hello"} | change)

    assert reply.status_code == status, reply.json()
    assert said in reply.json()["error"]["message"]


def test_what_is_not_read_is_named(served: TestClient) -> None:
    parts = [{"type": "input_text", "text": "Hi"}, {"type": "input_image", "image_url": "x"}]

    body = post(served, [{"role": "user", "content": parts}], user="u").json()

    assert body["hhh"]["not_inspected"] == ["input[0].content[1]: input_image", "user"]


def test_a_stream_that_breaks_ends_with_response_failed(watchful: Policies) -> None:
    broken = FakeGenerator("a b c d e", fail_after=(4, GeneratorError("it broke")))
    with TestClient(create_app(fake_pipeline(watchful(on_error="open"), generator=broken))) as served:
        found = events(post(served, stream=True).text)

    assert found[-1]["type"] == "response.failed"
    assert "it broke" in found[-1]["response"]["error"]["message"]
    assert found[-1]["sequence_number"] == len(found) - 1


def test_conversations_are_dropped_by_number_and_by_size() -> None:
    kept = Conversations(most=3, most_chars=20)
    for i in range(4):
        kept.keep("me", str(i), (Message(role="user", content="12345"),))

    with pytest.raises(WireError):
        kept.find("me", "0")
    assert kept.find("me", "3")
    kept.keep("me", "long", (Message(role="user", content="x" * 16),))
    with pytest.raises(WireError):
        kept.find("me", "3")
    assert kept.find("me", "long")
    with pytest.raises(WireError):
        kept.find("somebody else", "long")
