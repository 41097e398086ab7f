"""What a translated upstream makes of a request and of an answer, around LiteLLM, which stands scripted here."""

import asyncio
import base64
import gzip
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import pytest

from hhh_router.errors import BackendTimeout, NotReached, UpstreamError
from hhh_router.interfaces.proxy.translation import Translation, Translator
from hhh_router.interfaces.proxy.upstreams import Outgoing, Timeouts

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
CHUNK = {"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "Hi"}}]}


class Scripted:
    """LiteLLM's place: remembers what it was asked and gives what it was told to."""

    def __init__(self, *given: Any, keeps_responses: bool = False, pause_s: float = 0.0) -> None:
        self.given = given
        self.keeps_responses = keeps_responses
        self.pause_s = pause_s
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.closed = 0

    async def call(self, kind: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
        self.asked.append((kind, body))
        if isinstance(self.given[0], Exception):
            raise self.given[0]
        return self.events() if body.get("stream") else self.given[0]

    async def events(self) -> AsyncGenerator[Any, None]:
        try:
            for i, event in enumerate(self.given):
                if i:
                    await asyncio.sleep(self.pause_s)
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed += 1

    async def aclose(self) -> None:
        """Nothing is open."""


def outgoing(path: str, body: Any = None, method: str = "POST", **headers: str) -> Outgoing:
    raw = body if isinstance(body, bytes) or body is None or hasattr(body, "__aiter__") else json.dumps(body).encode()
    told = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return Outgoing(method=method, path=path, query="", headers=told, body=raw)


async def sent(model: Scripted, request: Outgoing, *, drop_params: bool = False, idle_s: float = 5) -> Translation:
    translator = Translator(model, shown="some/model", drop_params=drop_params, max_bytes=10_000)  # type: ignore[arg-type]
    return await translator.send(request, Timeouts(first_byte_s=5, idle_s=idle_s))


async def body_of(answer: Translation) -> bytes:
    return b"".join([piece async for piece in answer.pieces()])


async def json_of(answer: Translation) -> Any:
    return json.loads(await body_of(answer))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**HELLO, "api_base": "http://elsewhere"}, "api_base"),
        ("/v1/chat/completions", {**HELLO, "api_key": "mine"}, "api_key"),
        ("/v1/chat/completions", {**HELLO, "extra_headers": {"a": "b"}}, "extra_headers"),
        ("/v1/chat/completions", {**HELLO, "mock_response": "x"}, "mock_response"),
        ("/v1/chat/completions", {**HELLO, "custom_llm_provider": "openai"}, "custom_llm_provider"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/completions", {"prompt": "Hi", "vertex_credentials": "/etc/passwd"}, "vertex_credentials"),
        ("/v1/responses", {"input": "Hi", "litellm_metadata": {}}, "litellm_metadata"),
        ("/v1/responses", {"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "mcp", "server_url": "litellm_proxy/mcp/x"}]}, "tools"),
        ("/v1/embeddings", {"input": "Hi", "fallbacks": ["a"]}, "fallbacks"),
        ("/v1/chat/completions", {**HELLO, "stream": True, "n": 2}, "n"),
    ],
)
async def test_what_is_no_field_of_the_wire_never_reaches_litellm(path: str, body: Any, param: str) -> None:
    model = Scripted({})

    answer = await sent(model, outgoing(path, body))

    error = (await json_of(answer))["error"]
    assert (answer.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert model.asked == []


async def test_anthropics_clients_are_told_in_their_shape() -> None:
    answer = await sent(Scripted({}), outgoing("/v1/messages", {"messages": []}))

    assert answer.status == 400
    told = {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: missing"}}
    assert await json_of(answer) == told


async def test_strange_fields_are_left_out_where_the_upstream_says_so() -> None:
    model = Scripted({"choices": []})

    answer = await sent(model, outgoing("/v1/chat/completions", {**HELLO, "api_key": "x", "seed": 1}), drop_params=True)

    assert answer.status == 200
    assert model.asked == [("chat", {**HELLO, "seed": 1})]


async def test_a_question_is_not_changed_by_leaving_out_what_came_before() -> None:
    asked = outgoing("/v1/responses", {"input": "Hi", "previous_response_id": "resp_1"})

    forgetful = await sent(Scripted({}), asked, drop_params=True)
    remembering = await sent(Scripted({}, keeps_responses=True), asked)

    assert (forgetful.status, remembering.status) == (400, 200)


async def test_nulls_labels_and_our_own_fields_change_nothing() -> None:
    model = Scripted({"choices": []})
    body = {**HELLO, "model": "gpt", "hhh": {}, "metadata": {"a": "b"}, "store": True, "stop": None, "stream": False}

    await sent(model, outgoing("/v1/chat/completions", body))

    assert model.asked == [("chat", {**HELLO, "stream": False})]


async def test_a_compressed_body_is_read() -> None:
    model = Scripted({"choices": []})

    raw = gzip.compress(json.dumps(HELLO).encode())
    await sent(model, outgoing("/v1/chat/completions", raw, content_encoding="gzip"))

    assert model.asked == [("chat", HELLO)]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/files"), ("GET", "/v1/batches"), ("POST", "/v1/messages/count_tokens"), ("DELETE", "/v1/models/x")],
)
async def test_a_path_that_cannot_be_translated_is_501_and_not_to_be_repeated(method: str, path: str) -> None:
    answer = await sent(Scripted({}), outgoing(path, b"x", method))

    assert (answer.status, dict(answer.headers)[b"x-should-retry"]) == (501, b"false")
    assert "cannot be translated" in (await json_of(answer))["error"]["message"]


async def test_models_are_listed_in_either_shape() -> None:
    for_openai = await json_of(await sent(Scripted({}), outgoing("/v1/models", None, "GET")))
    asked = outgoing("/v1/models", None, "GET", anthropic_version="2023-06-01")
    for_anthropic = await json_of(await sent(Scripted({}), asked))

    assert [m["id"] for m in for_openai["data"]] == ["some/model"]
    assert (for_openai["object"], for_anthropic["data"][0]["type"]) == ("list", "model")


async def test_vectors_come_as_openais_clients_ask_for_them() -> None:
    vectors = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -2.0]}]}

    async def pieces() -> AsyncIterator[bytes]:
        raw = json.dumps({"input": "Hi", "encoding_format": "base64"}).encode()
        yield raw[:7]
        yield raw[7:]

    model = Scripted(vectors)
    told = await json_of(await sent(model, outgoing("/v1/embeddings", pieces())))

    assert model.asked == [("embeddings", {"input": "Hi"})]
    assert struct.unpack("<2f", base64.b64decode(told["data"][0]["embedding"])) == (0.5, -2.0)


async def test_a_body_that_is_too_large_is_413() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 6000

    assert (await sent(Scripted({}), outgoing("/v1/embeddings", pieces()))).status == 413


async def test_an_error_of_the_provider_keeps_status_and_retry_after() -> None:
    error = UpstreamError("slow down", status=429, retry_after="7")

    answer = await sent(Scripted(error), outgoing("/v1/chat/completions", {**HELLO, "stream": True}))

    told = (await json_of(answer))["error"]
    assert (answer.status, dict(answer.headers)[b"retry-after"]) == (429, b"7")
    assert (told["type"], told["message"]) == ("rate_limit_error", "some/model: slow down")


async def test_an_error_before_the_first_event_is_still_told_as_one() -> None:
    class Late(Scripted):
        async def call(self, kind: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
            return self.events()

    late = Late(UpstreamError("too many", status=529))
    answer = await sent(late, outgoing("/v1/messages", {**HELLO, "max_tokens": 5, "stream": True}))

    assert answer.status == 529
    assert (await json_of(answer))["error"]["type"] == "overloaded_error"


async def test_what_never_answered_is_left_to_the_order_of_upstreams() -> None:
    with pytest.raises(NotReached):
        await sent(Scripted(NotReached("no")), outgoing("/v1/chat/completions", HELLO))


async def test_a_stream_is_framed_as_the_wire_has_it() -> None:
    own = {**CHUNK, "provider_specific_fields": {"citations": None}}

    told = await body_of(await sent(Scripted(own), outgoing("/v1/chat/completions", {**HELLO, "stream": True})))

    first, mark, rest = told.split(b"\n\n")
    choice = {"index": 0, "delta": {"content": "Hi"}, "logprobs": None, "finish_reason": None}
    assert json.loads(first.removeprefix(b"data: ")) == {**CHUNK, "choices": [choice]}
    assert (mark, rest) == (b"data: [DONE]", b"")


async def test_events_of_a_response_are_numbered() -> None:
    events = [{"type": "response.created", "sequence_number": 4}, {"type": "response.output_text.delta", "delta": "x"}]

    told = await body_of(await sent(Scripted(*events), outgoing("/v1/responses", {"input": "Hi", "stream": True})))

    bodies = [json.loads(part.partition(b"data: ")[2]) for part in told.split(b"\n\n") if part]
    assert [b["sequence_number"] for b in bodies] == [0, 1]
    assert told.startswith(b"event: response.created\n")


async def test_a_provider_that_falls_silent_is_told_of_and_hung_up_on() -> None:
    model = Scripted(CHUNK, CHUNK, pause_s=30)
    answer = await sent(model, outgoing("/v1/chat/completions", {**HELLO, "stream": True}), idle_s=0.05)

    with pytest.raises(BackendTimeout):
        await body_of(answer)

    assert model.closed == 1


async def test_a_stream_that_is_left_is_hung_up_on() -> None:
    model = Scripted(CHUNK, CHUNK)
    answer = await sent(model, outgoing("/v1/chat/completions", {**HELLO, "stream": True}))

    answer.close()
    await asyncio.sleep(0.01)

    assert model.closed == 1
