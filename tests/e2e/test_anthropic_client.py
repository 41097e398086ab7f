"""The official Anthropic client against our server on loopback; the model behind it is a stand-in."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from hhh_router.errors import GeneratorError
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

from .loopback import served

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}}


def client_of(url: str, **options: Any) -> anthropic.Anthropic:
    key = options.pop("api_key", "unused")
    # strict: the client itself refuses a body that does not fit its types
    return anthropic.Anthropic(
        base_url=url.removesuffix("/v1"), api_key=key, max_retries=0, _strict_response_validation=True, **options
    )


@pytest.fixture
def client(watchful: Policies) -> Iterator[anthropic.Anthropic]:
    reader = FakeReader(RULES)
    generator = FakeGenerator("one two three four", reader=reader)
    with served(fake_pipeline(watchful(), reader=reader, generator=generator)) as url, client_of(url) as client:
        yield client


def ask(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "hhh-auto", "max_tokens": 20, "messages": [{"role": "user", "content": text}], **more}


def test_a_whole_message_is_parsed_with_our_block_and_headers_beside_it(client: anthropic.Anthropic) -> None:
    raw = client.messages.with_raw_response.create(**ask())

    reply = raw.parse()
    assert reply.content[0].type == "text"
    assert reply.content[0].text == "one two three four"
    assert reply.stop_reason == "end_turn"
    assert reply.usage.output_tokens == 4
    assert reply.model_extra is not None
    assert reply.model_extra["hhh"]["request_id"] == raw.headers["x-hhh-request-id"]


def test_a_refusal_has_its_own_stop_reason(client: anthropic.Anthropic) -> None:
    reply = client.messages.create(**ask("how to build a bomb"))

    assert reply.stop_reason == "refusal"
    assert reply.content[0].type == "text"
    assert reply.content[0].text == "Not that."


def test_a_stream_is_accumulated_by_the_client_and_says_the_same(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ask()) as stream:
        pieces = list(stream.text_stream)
        last = stream.get_final_message()

    assert "".join(pieces) == "one two three four"
    assert last.content[0].type == "text"
    assert last.content[0].text == "one two three four"
    assert last.stop_reason == "end_turn"
    assert last.usage.output_tokens == 4


def test_raw_events_carry_our_block_first_and_last(client: anthropic.Anthropic) -> None:
    events = list(client.messages.create(**ask(), stream=True))

    start, delta = events[0], events[-2]
    assert start.type == "message_start"
    assert delta.type == "message_delta"
    assert start.message.model_extra is not None
    assert delta.model_extra is not None
    assert start.message.model_extra["hhh"]["request_id"] == delta.model_extra["hhh"]["request_id"]


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(
        model="hhh-auto", messages=[{"role": "user", "content": "a b c"}], system="d e"
    )

    assert counted.input_tokens == 5


def test_mistakes_and_wrong_keys_raise_the_clients_own_errors(watchful: Policies) -> None:
    with served(fake_pipeline(watchful(), api_key="s3cret")) as url:
        with client_of(url, api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**ask())
        with client_of(url, api_key="s3cret") as client:
            with pytest.raises(anthropic.NotFoundError):
                client.messages.create(**ask() | {"model": "nonesuch"})
            with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
                client.messages.create(**ask() | {"max_tokens": 0})
            assert client.messages.create(**ask()).stop_reason == "end_turn"


def test_a_stream_that_breaks_raises(watchful: Policies) -> None:
    broken = FakeGenerator("a b c d e", fail_after=(4, GeneratorError("it broke")))
    with (
        served(fake_pipeline(watchful(on_error="open"), generator=broken)) as url,
        client_of(url) as client,
        pytest.raises(anthropic.APIStatusError, match="it broke"),
    ):
        list(client.messages.create(**ask(), stream=True))


def test_tools_are_called_and_their_results_taken_by_the_strict_client(watchful: Policies) -> None:
    call = '<tool_call>[{"name": "weather", "arguments": {"city": "Oslo"}}]</tool_call>'
    generator = FakeGenerator(lambda request: "It is mild." if request.messages[-1].role == "tool" else f"Wait. {call}")
    tools: Any = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    with served(fake_pipeline(watchful(), generator=generator)) as url, client_of(url) as client:
        asked = client.messages.create(**ask(tools=tools))
        with client.messages.stream(**ask(tools=tools)) as stream:
            streamed = stream.get_final_message()
        used = next(b for b in asked.content if b.type == "tool_use")
        result: Any = {"type": "tool_result", "tool_use_id": used.id, "content": "12 degrees"}
        turns: Any = [
            *ask()["messages"],
            {"role": "assistant", "content": asked.content},
            {"role": "user", "content": [result]},
        ]
        answered = client.messages.create(**(ask(tools=tools) | {"messages": turns}))

    assert asked.stop_reason == streamed.stop_reason == "tool_use"
    assert used.input == {"city": "Oslo"}
    assert [b.type for b in streamed.content] == ["text", "tool_use"]
    assert answered.content[0].type == "text"
    assert answered.content[0].text == "It is mild."
