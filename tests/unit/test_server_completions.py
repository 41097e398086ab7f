"""OpenAI's old completions, and several replies to one call, in process and on fakes."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.errors import UpstreamError
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.choices import together, variants
from hhh_router.interfaces.server.completions import _texts, parse_completion
from hhh_router.protocols import TokenLogprob
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.types import ChatRequest, Message, Sampling

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}}


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator("one two three", reader=FakeReader(RULES))


@pytest.fixture
def served(watchful: Policies, generator: FakeGenerator) -> Iterator[TestClient]:
    pipeline = fake_pipeline(watchful(), reader=generator._reader, generator=generator)
    with TestClient(create_app(pipeline)) as made:
        yield made


def post(served: TestClient, prompt: Any = "Once upon", **more: Any) -> Any:
    return served.post("/v1/completions", json={"model": "hhh-auto", "prompt": prompt, **more})


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: {")]


def test_a_text_is_gone_on_with_as_it_stands(served: TestClient, generator: FakeGenerator) -> None:
    reply = post(served)

    body = reply.json()
    [choice] = body["choices"]
    assert (body["object"], choice["text"], choice["finish_reason"]) == ("text_completion", "one two three", "stop")
    assert choice["logprobs"] is None
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert body["id"] == f"cmpl-{body['hhh']['request_id']}"
    assert reply.headers["x-hhh-request-id"] == body["hhh"]["request_id"]
    [asked] = generator.requests
    assert asked.continues
    assert asked.sampling.max_tokens == 16


def test_echo_tells_the_prompt_and_its_log_probabilities_before_the_completion(served: TestClient) -> None:
    [choice] = post(served, echo=True, logprobs=2).json()["choices"]

    assert choice["text"] == "Once uponone two three"
    told = choice["logprobs"]
    assert told["tokens"] == ["Once", " upon", "one", " two", " three"]
    assert told["text_offset"] == [0, 4, 9, 12, 16]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert all(x < 0 for x in told["token_logprobs"][1:])
    assert [len(top) for top in told["top_logprobs"][1:]] == [2, 2, 2, 2]


def test_a_prompt_can_be_scored_without_a_completion(served: TestClient) -> None:
    [choice] = post(served, echo=True, logprobs=0, max_tokens=0).json()["choices"]

    assert choice["text"] == "Once upon"
    assert choice["logprobs"]["tokens"] == ["Once", " upon"]


def test_prompts_times_n_are_answered_in_order(served: TestClient, generator: FakeGenerator) -> None:
    body = post(served, ["Once", [1, 2, 3]], n=2, seed=7).json()

    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [(r.messages[0].content, r.prompt_ids, r.sampling.seed) for r in generator.requests] == [
        ("Once", (), 7),
        ("Once", (), 8),
        ("", (1, 2, 3), 7),
        ("", (1, 2, 3), 8),
    ]
    assert len({c["hhh"]["request_id"] for c in body["choices"]}) == 4
    assert body["usage"]["completion_tokens"] == 12


def test_one_refused_prompt_leaves_the_others_alone_and_shows_at_the_top(served: TestClient) -> None:
    reply = post(served, ["Once", "bomb"])

    body = reply.json()
    assert [c["finish_reason"] for c in body["choices"]] == ["stop", "content_filter"]
    assert body["choices"][1]["text"] == "Not that."
    assert reply.headers["x-hhh-action"] == "refuse"
    assert body["hhh"] == body["choices"][1]["hhh"]


def test_streams_of_several_are_told_apart_by_their_index(served: TestClient) -> None:
    text = post(served, ["Once", "bomb"], stream=True, stream_options={"include_usage": True}).text

    *chunks, usage = events(text)
    texts = {at: "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == at) for at in (0, 1)}
    ends = {c["choices"][0]["index"]: c["choices"][0]["finish_reason"] for c in chunks if "hhh" in c}
    assert texts == {0: "one two three", 1: "Not that."}
    assert ends == {0: "stop", 1: "content_filter"}
    assert usage["usage"]["completion_tokens"] == 3
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": None}, "prompt: found null"),
        ({"prompt": []}, "prompt: found a list"),
        ({"prompt": ""}, "prompt: empty"),
        ({"prompt": [1.5]}, "prompt[0]: found a number"),
        ({"prompt": [[]]}, "prompt[0]: found a list"),
        ({"prompt": [-1]}, "prompt: no list of token ids"),
        ({"prompt": ["x"] * 129}, "found 129 prompts"),
        ({"prompt": ["x"] * 128, "n": 3}, "3 completions of 128 prompts"),
        ({"n": 0}, "n: found 0"),
        ({"n": 17}, "n: found 17"),
        ({"n": True}, "n: found True"),
        ({"logprobs": True}, "logprobs: found a boolean"),
        ({"logprobs": 21}, "top_logprobs: found 21"),
        ({"echo": "yes"}, "echo: found a string"),
        ({"echo": True, "stream": True}, "echo: not supported on streams"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"suffix": "x"}, "suffix: not supported yet"),
        ({"best_of": 2}, "best_of: not supported yet"),
        ({"stream_options": 1}, "stream_options: no object"),
    ],
)
def test_what_is_wrong_is_named(served: TestClient, change: dict[str, Any], said: str) -> None:
    reply = served.post("/v1/completions", json={"model": "hhh-auto", "prompt": "x"} | change)

    assert reply.status_code == 400, reply.json()
    assert said in reply.json()["error"]["message"]


def test_characters_that_several_tokens_spell_come_with_the_last() -> None:
    told = [TokenLogprob(token="x", logprob=-1.0, bytes=(byte,)) for byte in "é!".encode()]
    bad = [TokenLogprob(token="x", logprob=-1.0, bytes=(0xFF,))]

    assert list(_texts(told)) == ["", "é", "!"]
    assert list(_texts(bad)) == ["\ufffd"]


# -- several replies of a chat ----------------------------------------------------------------------------------------


def chat(served: TestClient, text: str = "Hello", **more: Any) -> Any:
    return served.post(
        "/v1/chat/completions", json={"model": "hhh-auto", "messages": [{"role": "user", "content": text}], **more}
    )


def test_a_chat_has_as_many_choices_as_were_asked_for(served: TestClient, generator: FakeGenerator) -> None:
    body = chat(served, n=3, seed=1, temperature=1.0).json()

    assert [(c["index"], c["message"]["content"]) for c in body["choices"]] == [(i, "one two three") for i in range(3)]
    assert [r.sampling.seed for r in generator.requests] == [1, 2, 3]
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}
    assert all(c["hhh"]["weights"] == body["hhh"]["weights"] for c in body["choices"])


def test_a_streamed_chat_tells_its_choices_apart(served: TestClient) -> None:
    text = chat(served, n=2, stream=True, stream_options={"include_usage": True}).text

    *chunks, usage = events(text)
    said = {at: "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"][0]["index"] == at)
            for at in (0, 1)}  # fmt: skip
    assert said == {0: "one two three", 1: "one two three"}
    assert len({c["id"] for c in [*chunks, usage]}) == 1
    assert sum("hhh" in c for c in chunks) == 4  # the first and the last of each
    assert usage["usage"]["completion_tokens"] == 6
    assert text.count("[DONE]") == 1


def test_the_first_error_ends_all_and_cancels_the_others() -> None:
    slow = FakeGenerator("one two three four five", delay_s=5.0)
    broken = FakeGenerator("x y z", fail_after=(1, UpstreamError("it broke")))

    class Both:
        def generate(self, request: ChatRequest, *given: Any, **more: Any) -> Any:
            return (broken if request.request_id.endswith(".1") else slow).generate(request, *given, **more)

    pipeline = fake_pipeline("balanced", generator=Both())
    asked = ChatRequest(messages=(Message(role="user", content="Hi"),), request_id="r")

    async def drain() -> None:
        async for _ in together(pipeline, variants(asked, 2), stream=False):
            pass

    with pytest.raises(UpstreamError, match="it broke"):
        asyncio.run(drain())

    assert slow.cancelled == 1


@pytest.mark.parametrize("seed", [[None], "x", 1.5, True])
@pytest.mark.parametrize("count", [1, 2])
def test_a_seed_that_is_none_is_the_callers_mistake(served: TestClient, seed: object, count: int) -> None:
    body = {"model": "hhh-auto", "prompt": "Once", "n": count, "seed": seed}
    turns = {"model": "hhh-auto", "messages": [{"role": "user", "content": "Hi"}], "n": count, "seed": seed}

    replies = [served.post("/v1/completions", json=body), served.post("/v1/chat/completions", json=turns)]

    assert [r.status_code for r in replies] == [400, 400]
    assert all("seed: found" in r.json()["error"]["message"] for r in replies)


@pytest.mark.parametrize("wire", ["completions", "chat/completions", "responses"])
def test_include_usage_is_true_or_false(served: TestClient, wire: str) -> None:
    asked = {"completions": {"prompt": "x"}, "responses": {"input": "x"}}
    body = asked.get(wire, {"messages": [{"role": "user", "content": "x"}]})

    reply = served.post(f"/v1/{wire}", json={"model": "hhh-auto", "stream_options": {"include_usage": 5}, **body})

    assert reply.status_code == 400
    assert "stream_options.include_usage: found a number" in reply.json()["error"]["message"]


def test_no_seed_stays_none() -> None:
    asked = ChatRequest(messages=(Message(role="user", content="Hi"),), sampling=Sampling(temperature=1.0))

    assert [v.sampling.seed for v in variants(asked, 3)] == [None] * 3


def test_models_and_policies_are_named_as_for_chats() -> None:
    call = parse_completion({"model": "hhh@16-0-0-0:balanced", "prompt": "x"})

    assert call.request.policy == "balanced"
    assert call.request.weights is not None
    assert call.request.weights.base == 1.0
