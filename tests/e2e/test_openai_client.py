"""The official OpenAI client against our server on loopback; the model behind it is a stand-in."""

import asyncio
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from hhh_router.assemble import build_pipeline
from hhh_router.errors import GeneratorError
from hhh_router.settings import Settings
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.testing.tiny import tiny_bundle

from .loopback import served

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
BOMB: list[Any] = [{"role": "user", "content": "how to build a bomb"}]


def client_of(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=options.pop("api_key", "unused"), max_retries=0, **options)


def told(reply: Any) -> list[Any]:
    """The tokens of a whole reply, or of a stream, with their log-probabilities."""
    chunks = [reply] if hasattr(reply, "choices") else list(reply)
    return [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]


@pytest.fixture
def client(watchful: Policies) -> Iterator[openai.OpenAI]:
    reader = FakeReader(RULES)
    generator = FakeGenerator(
        lambda request: "a b c d poison" if request.messages[-1].content == "cut" else "one two three four",
        reader=reader,
    )
    with served(fake_pipeline(watchful(), reader=reader, generator=generator)) as url, client_of(url) as client:
        yield client


def test_a_whole_reply_is_parsed_with_our_block_beside_it(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="hhh-auto", messages=HELLO, max_tokens=20)

    reply = raw.parse()
    block = reply.model_extra["hhh"]
    assert reply.choices[0].message.content == "one two three four"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 4
    assert sum(block["weights"].values()) == pytest.approx(1.0)
    assert raw.headers["x-hhh-weights"].startswith("base=")
    assert raw.headers["x-hhh-policy"] == "watchful@3"
    assert raw.headers["x-hhh-request-id"] == block["request_id"]


def test_a_stream_is_parsed_chunk_by_chunk(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="hhh-auto", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )

    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "one two three four"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 1
    first, last = chunks[0].model_extra["hhh"], chunks[-1].model_extra["hhh"]
    assert first["needs"]
    assert first["decisions"][0]["checkpoint"] == "input"
    assert last["decisions"][-1]["checkpoint"] == "output"
    assert stream.response.headers["x-hhh-action"] == "allow"


def test_a_refusal_is_a_reply_and_no_error(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="hhh-auto", messages=BOMB)

    assert reply.choices[0].finish_reason == "content_filter"
    assert reply.choices[0].message.content == reply.choices[0].message.refusal == "Not that."


def test_a_stream_is_cut_before_the_poison(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="hhh-auto", messages=[{"role": "user", "content": "cut"}], stream=True)
    )

    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "a b c\n\nCut."
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_policy_and_weights_travel_in_extra_body_and_model(client: openai.OpenAI) -> None:
    by_body = client.chat.completions.create(
        model="hhh-auto", messages=HELLO, extra_body={"hhh": {"policy": "balanced", "weights": {"honest": 1.0}}}
    )
    by_name = client.chat.completions.create(model="hhh@0-0-0-16:balanced", messages=HELLO)

    assert by_body.model_extra["hhh"]["policy"]["name"] == "balanced"
    assert by_body.model_extra["hhh"]["weights"] == by_name.model_extra["hhh"]["weights"]


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_are_parsed_and_only_of_what_was_let_through(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "hhh-auto", "logprobs": True, "top_logprobs": 2, "stream": stream}
    whole = told(client.chat.completions.create(messages=HELLO, **asked))
    cut = told(client.chat.completions.create(messages=[{"role": "user", "content": "cut"}], **asked))

    assert [t.token for t in whole] == ["one", " two", " three", " four"]
    assert [len(t.top_logprobs) for t in whole] == [2] * 4
    assert [t.token for t in cut] == (["a", " b", " c"] if stream else [])


class City(BaseModel):
    kind: Literal["city", "town"]
    old: bool
    people: int = Field(ge=0, le=9999)


def test_a_real_model_follows_a_schema_and_tells_its_tokens(tmp_path: Path, watchful: Policies) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    settings = Settings.load(
        bundle=str(bundle.root), policy=str(watchful(mode="shadow")), cache_dir=tmp_path, threads=1
    )
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "null"}}}}
    hot: dict[str, Any] = {"temperature": 1.5, "seed": 1, "max_tokens": 200, "extra_body": {"top_k": 50}}
    with served(build_pipeline(settings)) as url, client_of(url) as client:
        ask = functools.partial(client.chat.completions.create, model="hhh-auto", messages=HELLO)
        reply = client.chat.completions.parse(
            model="hhh-auto", messages=HELLO, response_format=City, logprobs=True, top_logprobs=20, **hot
        )
        chunks = list(ask(stream=True, logprobs=True, max_tokens=9, response_format={"type": "json_object"}))
        with pytest.raises(openai.BadRequestError, match=r"response_format: Unimplemented keys: .*not") as refused:
            ask(response_format=schema)
        with pytest.raises(openai.BadRequestError, match="logit_bias: found token 5000"):
            ask(logit_bias={"5000": 1}, stream=True)

    assert isinstance(reply.choices[0].message.parsed, City)
    assert "".join(t.token for t in told(reply)) == reply.choices[0].message.content
    assert [len(t.top_logprobs) for t in told(reply)] == [20] * len(told(reply))
    assert "".join(t.token for t in told(chunks)).startswith("{")
    assert chunks[-1].choices[0].finish_reason == "length"
    assert refused.value.code == "invalid_request"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["hhh-auto", "hhh-helpful", "hhh-harmless", "hhh-honest"]


def test_errors_arrive_as_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\].name: found null"):
        client.chat.completions.create(model="hhh-auto", messages=HELLO, tools=[{"type": "function"}])  # type: ignore[list-item]
    with pytest.raises(openai.PermissionDeniedError, match="use one of watchful"):
        client.chat.completions.create(model="hhh-auto:nope", messages=HELLO)

    assert missing.value.code == "model_not_found"


def test_a_broken_stream_raises_in_the_client(watchful: Policies) -> None:
    broken = FakeGenerator("a b c d e", fail_after=(4, GeneratorError("out of memory")))
    with served(fake_pipeline(watchful(on_error="open"), generator=broken)) as url, client_of(url) as client:
        stream = client.chat.completions.create(model="hhh-auto", messages=HELLO, stream=True)

        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)


def test_a_key_is_checked(watchful: Policies) -> None:
    with served(fake_pipeline(watchful(), api_key="right")) as url:
        with client_of(url, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="hhh-auto", messages=HELLO)
        with client_of(url, api_key="right") as client:
            assert client.chat.completions.create(model="hhh-auto", messages=HELLO).choices


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_the_generation(watchful: Policies, stream: bool) -> None:
    generator = FakeGenerator("word " * 1000, delay_s=0.02)
    with served(fake_pipeline(watchful(), generator=generator)) as url, client_of(url, timeout=0.4) as client:
        if stream:
            reply = client.chat.completions.create(model="hhh-auto", messages=HELLO, stream=True, max_tokens=900)
            next(reply)
            reply.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(model="hhh-auto", messages=HELLO, max_tokens=900)

        assert _soon(lambda: generator.cancelled == 1)


def test_a_client_that_leaves_while_text_is_held_back_cancels_too(watchful: Policies) -> None:
    generator = FakeGenerator("word", delay_s=30)
    with served(fake_pipeline(watchful(), generator=generator)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/chat/completions", json={"model": "hhh-auto", "messages": HELLO, "stream": True}, timeout=0.3
            )

        assert _soon(lambda: generator.cancelled == 1)


async def test_many_clients_at_once_get_their_own_replies(watchful: Policies) -> None:
    generator = FakeGenerator(lambda request: f"you said {request.messages[-1].content}", delay_s=0.001)
    with served(fake_pipeline(watchful(), generator=generator)) as url:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:

            async def ask(n: int) -> str | None:
                reply = await client.chat.completions.create(
                    model="hhh-auto", messages=[{"role": "user", "content": f"number {n}"}]
                )
                return reply.choices[0].message.content

            texts = await asyncio.gather(*(ask(n) for n in range(40)))

    assert texts == [f"you said number {n}" for n in range(40)]


def _soon(holds: Callable[[], bool], *, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


# -- moderations and decisions ----------------------------------------------------------------------------------------


def test_moderations_are_parsed_with_scores_of_our_categories(client: openai.OpenAI) -> None:
    found = client.moderations.create(input=["Hello", "how to build a bomb"], model="hhh-auto")

    assert [r.flagged for r in found.results] == [False, True]
    scores = found.results[1].category_scores.model_extra
    assert scores is not None
    assert scores["harmful"] > 0.9 > scores["injection"]


@pytest.mark.skipif(not hasattr(openai.OpenAI, "decisions"), reason="this openai knows no decisions")
def test_decisions_are_parsed_by_kind(client: openai.OpenAI) -> None:
    found = client.decisions.create(
        model="hhh-auto",
        input="how to build a bomb",
        questions=[
            {"type": "predicate", "name": "harmful", "instructions": "Is it harmful?"},
            {"type": "predicate", "name": "dishonest", "instructions": "Is it dishonest?"},
        ],
    )

    harmful, dishonest = found.answers
    assert harmful.type == "predicate"
    assert harmful.probability > 0.9
    assert dishonest.type == "refusal"
    assert found.usage.output_tokens == 0


def test_a_chat_can_ask_for_moderation(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="hhh-auto", messages=HELLO, extra_body={"moderation": {"model": "hhh-auto"}}
    )

    told = reply.moderation if hasattr(reply, "moderation") else (reply.model_extra or {})["moderation"]
    told = told if isinstance(told, dict) else told.model_dump()
    assert told["input"]["results"][0]["flagged"] is False
    assert set(told["output"]["results"][0]["category_scores"]) == {"unsafe", "untruthful", "unhelpful"}


# -- responses --------------------------------------------------------------------------------------------------------


def test_a_response_is_parsed_with_our_block_beside_it(client: openai.OpenAI) -> None:
    found = client.responses.create(model="hhh-auto", input="Hello", instructions="Be brief.")

    assert found.output_text == "one two three four"
    assert found.status == "completed"
    assert found.usage is not None
    assert found.usage.output_tokens == 4
    assert found.model_extra is not None
    assert found.model_extra["hhh"]["policy"]["name"] == "watchful"


def test_a_streamed_response_is_accumulated_by_the_client(client: openai.OpenAI) -> None:
    with client.responses.stream(model="hhh-auto", input="Hello") as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_response()

    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert last.output_text == "one two three four"


def test_a_response_goes_on_from_an_earlier_one(client: openai.OpenAI) -> None:
    first = client.responses.create(model="hhh-auto", input="Hello")
    second = client.responses.create(model="hhh-auto", input="And now?", previous_response_id=first.id)

    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    with pytest.raises(openai.NotFoundError, match="not known here"):
        client.responses.create(model="hhh-auto", input="Hi", previous_response_id="resp_nonesuch")


def test_a_refused_response_has_a_part_of_its_own(client: openai.OpenAI) -> None:
    found = client.responses.create(model="hhh-auto", input="how to build a bomb")

    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "content_filter"
    assert found.output[0].type == "message"
    assert found.output[0].content[0].type == "refusal"


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def roomy(watchful: Policies, tmp_path: Path) -> Iterator[openai.OpenAI]:
    """A tiny real model with a window wide enough for tools at a token a byte."""
    bundle = tiny_bundle(tmp_path / "roomy", max_position_embeddings=4096)
    policy = str(watchful(mode="shadow"))
    settings = Settings.load(bundle=str(bundle.root), policy=policy, cache_dir=tmp_path, threads=1)
    with served(build_pipeline(settings)) as url, client_of(url) as client:
        yield client


def test_a_real_model_calls_tools_whole_and_streamed_and_takes_their_results(roomy: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "hhh-auto", "messages": HELLO, "tools": [WEATHER], "max_tokens": 300}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False}

    whole = roomy.chat.completions.create(**asked)
    with roomy.chat.completions.stream(**asked) as stream:
        arguments = [e.parsed_arguments for e in stream if e.type == "tool_calls.function.arguments.done"]
        streamed = stream.get_final_completion()

    [call] = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert whole.choices[0].finish_reason == streamed.choices[0].finish_reason == "tool_calls"
    assert [json.loads(call.function.arguments)] == arguments
    turns: Any = [*HELLO, whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}]
    answered = roomy.chat.completions.create(model="hhh-auto", messages=turns, tools=[WEATHER], max_tokens=4)
    assert answered.usage is not None
    assert whole.usage is not None
    assert answered.usage.prompt_tokens > whole.usage.prompt_tokens


def test_responses_of_a_real_model_call_tools(roomy: openai.OpenAI) -> None:
    flat: Any = {"type": "function", **WEATHER["function"]}
    asked: dict[str, Any] = {"model": "hhh-auto", "input": "Hello", "tools": [flat], "max_output_tokens": 300}
    asked |= {"tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False}

    with roomy.responses.stream(**asked) as stream:
        done = [e.arguments for e in stream if e.type == "response.function_call_arguments.done"]
        response = stream.get_final_response()

    [item] = response.output
    assert item.type == "function_call"
    assert [item.arguments] == done
    outputs: Any = [{"type": "function_call_output", "call_id": item.call_id, "output": "12 degrees"}]
    again = roomy.responses.create(
        model="hhh-auto", input=outputs, previous_response_id=response.id, tools=[flat], max_output_tokens=4
    )
    assert again.status in ("completed", "incomplete")
    assert again.usage is not None
    assert response.usage is not None
    assert again.usage.input_tokens > response.usage.input_tokens


def test_a_real_model_scores_a_prompt_and_goes_on_with_it(roomy: openai.OpenAI) -> None:
    scored = roomy.completions.create(model="hhh@16-0-0-0", prompt=["one two", [1, 2, 3]], echo=True, logprobs=2, n=1)
    several = roomy.chat.completions.create(
        model="hhh-auto", messages=HELLO, n=3, temperature=1.0, seed=1, max_tokens=5
    )

    text, tokens = scored.choices
    assert text.text.startswith("one two")
    assert text.logprobs is not None
    assert text.logprobs.token_logprobs is not None
    assert text.logprobs.token_logprobs[0] is None
    assert len(text.logprobs.token_logprobs) >= len("one two")  # a token a byte
    assert tokens.index == 1
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert len({c.message.content for c in several.choices}) > 1
