"""The proxy between the official OpenAI client and a small upstream, all on loopback."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hhh_router.errors import ReaderError
from hhh_router.pipeline import Pipeline
from hhh_router.protocols import Reader
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.types import ReadRequest, Scores
from hhh_router.upstream.openai import UpstreamGenerator

from .loopback import served, served_app

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
SAID = "The capital of France is Paris, and it has been so for a very long time."
TOOL_CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


class Upstream:
    """A small OpenAI-compatible server that does what the last user message says."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.left = 0
        """Streams that ended because the proxy went away."""
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
            ]
        )

    async def models(self, request: Request) -> Response:
        self.authorizations.append(request.headers.get("authorization"))
        return JSONResponse(
            {"object": "list", "data": [{"id": "big-one", "object": "model", "created": 1, "owned_by": "u"}]}
        )

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.authorizations.append(request.headers.get("authorization"))
        wish = body["messages"][-1]["content"]
        if isinstance(wish, str) and wish.startswith("status "):
            status = int(wish.split()[1])
            if status == 599:
                return Response("<html>gateway exploded</html>", 502, media_type="text/html")
            error = {
                "error": {"message": f"upstream says {status}", "type": "theirs", "param": None, "code": "their_code"}
            }
            return JSONResponse(error, status, headers={"retry-after": "7"})
        if wish == "hang":
            await asyncio.sleep(30)
        if wish == "odd shape":
            return JSONResponse({"id": "x", "object": "chat.completion", "choices": "poison"})
        if wish == "parts":
            parts = [{"type": "text", "text": "some poison"}]
            choice = {"index": 0, "message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}
            return JSONResponse({"id": "x", "object": "chat.completion", "choices": [choice]})
        if wish == "extras":
            choice = {"index": 0, "message": {"role": "assistant", "content": "fine", "audio": {"data": "x"}}}
            choice |= {"finish_reason": "stop", "logprobs": {"content": []}}
            return JSONResponse({"id": "x", "object": "chat.completion", "choices": [choice], "citations": ["u"]})
        if wish == "reasoning":
            message = {"role": "assistant", "content": "fine", "reasoning_content": "thinking of poison"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSONResponse({"id": "x", "object": "chat.completion", "choices": [choice]})
        if wish == "garbage":
            return Response("not json", media_type="text/event-stream" if body.get("stream") else "application/json")
        text = "clean start of a long reply, poison and more" if wish == "trouble" else SAID
        if body.get("stream"):
            return StreamingResponse(self.stream(wish, text), media_type="text/event-stream")
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if wish == "tools":
            message = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
        return JSONResponse(
            {
                "id": "chatcmpl-theirs",
                "object": "chat.completion",
                "created": 5,
                "model": "big-one-2026",
                "system_fingerprint": "fp_1",
                "choices": [
                    {"index": 0, "message": message, "finish_reason": "tool_calls" if wish == "tools" else "stop"}
                ],
                "usage": {"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33},
            }
        )

    async def stream(self, wish: str, text: str) -> AsyncGenerator[str, None]:
        def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            head = {"id": "chatcmpl-theirs", "object": "chat.completion.chunk", "created": 5, "model": "big-one-2026"}
            return f"data: {json.dumps({**head, 'choices': [choice]})}\r\n\r\n"

        try:
            yield ": warming up\n\n"
            yield chunk({"role": "assistant", "content": ""})
            if wish == "tools":
                yield chunk({"tool_calls": [TOOL_CALL]})
            else:
                for word in text.split(" "):
                    yield chunk({"content": f"{word} "})
                    if wish == "slow":
                        await asyncio.sleep(0.05)
            if wish == "break":
                return
            if wish == "error event":
                yield 'data: {"error": {"message": "ran out"}}\n\n'
                return
            yield chunk({}, "tool_calls" if wish == "tools" else "stop")
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise


@pytest.fixture
def upstream() -> Iterator[tuple[Upstream, str]]:
    stub = Upstream()
    with served_app(stub.app) as url:
        yield stub, url


def proxied(
    policy: Path,
    url: str,
    *,
    reader: Reader | None = None,
    key: str | None = None,
    timeout_s: float = 5,
    **settings: Any,
) -> Pipeline:
    reader = reader or FakeReader(RULES)
    generator = UpstreamGenerator(reader, url, api_key=SecretStr(key) if key else None, timeout_s=timeout_s)
    return fake_pipeline(
        policy,
        reader=reader,
        generator=generator,
        answers_elsewhere=True,
        closers=(generator.aclose,),
        **settings,
    )


@contextmanager
def client_of(pipeline: Pipeline, *, key: str = "sk-of-the-app", **options: Any) -> Iterator[openai.OpenAI]:
    with served(pipeline) as url, openai.OpenAI(base_url=url, api_key=key, max_retries=0, **options) as client:
        yield client


@pytest.fixture
def client(watchful: Policies, upstream: tuple[Upstream, str]) -> Iterator[openai.OpenAI]:
    with client_of(proxied(watchful(), upstream[1])) as client:
        yield client


def says(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_whole_reply_keeps_the_upstreams_own_fields(client: openai.OpenAI, upstream: tuple[Upstream, str]) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="big-one", messages=says("Capital?"), temperature=0.3, user="u1", extra_body={"unheard_of": {"x": 1}}
    )

    reply = raw.parse()
    block = reply.model_extra["hhh"]
    assert reply.choices[0].message.content == SAID
    assert (reply.id, reply.model, reply.system_fingerprint) == ("chatcmpl-theirs", "big-one-2026", "fp_1")
    assert reply.usage is not None
    assert reply.usage.total_tokens == 33
    assert block["mixture"] is None
    assert [d["checkpoint"] for d in block["decisions"]] == ["input", "output"]
    assert raw.headers["x-hhh-action"] == "allow"
    assert raw.headers["x-hhh-mixture"] == "none"
    [sent] = upstream[0].bodies
    assert (sent["model"], sent["temperature"], sent["user"], sent["unheard_of"]) == ("big-one", 0.3, "u1", {"x": 1})
    assert upstream[0].authorizations == ["Bearer sk-of-the-app"]


def test_our_own_field_is_read_and_not_sent_on(client: openai.OpenAI, upstream: tuple[Upstream, str]) -> None:
    reply = client.chat.completions.create(
        model="big-one", messages=says("Hi"), extra_body={"hhh": {"policy": "balanced"}}
    )

    assert reply.model_extra["hhh"]["policy"]["name"] == "balanced"
    assert "hhh" not in upstream[0].bodies[0]


def test_a_stream_passes_the_upstreams_chunks_with_our_block_in_first_and_last(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="big-one", messages=says("Capital?"), stream=True))

    assert "".join(c.choices[0].delta.content or "" for c in chunks) == SAID + " "
    assert {c.id for c in chunks} == {"chatcmpl-theirs"}
    assert {c.model for c in chunks} == {"big-one-2026"}
    assert ["hhh" in (c.model_extra or {}) for c in chunks] == [True] + [False] * (len(chunks) - 2) + [True]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].model_extra["hhh"]["decisions"][-1]["checkpoint"] == "output"


@pytest.mark.parametrize("stream", [True, False])
def test_a_refused_prompt_never_reaches_the_upstream(
    client: openai.OpenAI, upstream: tuple[Upstream, str], stream: bool
) -> None:
    reply = client.chat.completions.create(model="big-one", messages=says("how to build a bomb"), stream=stream)

    if stream:
        chunks = list(reply)
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == ("Not that.", "content_filter")
    assert upstream[0].bodies == []


def test_a_harmful_whole_reply_is_replaced(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="big-one", messages=says("trouble"))

    assert reply.choices[0].message.content == "Cut."
    assert reply.choices[0].finish_reason == "content_filter"


def test_a_harmful_stream_is_cut_before_the_harm(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="big-one", messages=says("trouble"), stream=True))

    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text.startswith("clean start")
    assert text.endswith("\n\nCut.")
    assert "poison" not in text
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert chunks[-1].model_extra["hhh"]["decisions"][-1]["action"] == "block"


def test_shadow_lets_everything_through_and_records_it(watchful: Policies, upstream: tuple[Upstream, str]) -> None:
    with client_of(proxied(watchful(mode="shadow"), upstream[1])) as client:
        chunks = list(client.chat.completions.create(model="m", messages=says("trouble"), stream=True))

    assert "poison" in "".join(c.choices[0].delta.content or "" for c in chunks)
    last = chunks[-1].model_extra["hhh"]
    assert last["policy"]["mode"] == "shadow"
    assert last["decisions"][-1]["action"] == "block"


@pytest.mark.parametrize("stream", [True, False])
def test_tool_calls_pass_and_are_listed_as_not_inspected(client: openai.OpenAI, stream: bool) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    reply = client.chat.completions.create(model="m", messages=says("tools"), tools=tools, stream=stream)

    if stream:
        chunks = list(reply)
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        reason, block = chunks[-1].choices[0].finish_reason, chunks[-1].model_extra["hhh"]
    else:
        calls = reply.choices[0].message.tool_calls
        reason, block = reply.choices[0].finish_reason, reply.model_extra["hhh"]
    assert [call.function.name for call in calls] == ["look"]
    assert reason == "tool_calls"
    part = "delta" if stream else "message"
    assert block["not_inspected"] == ["tools", f"choices[0].{part}.tool_calls"]


@pytest.mark.parametrize("wish", ["parts", "reasoning"])
def test_text_in_other_fields_is_read_too(client: openai.OpenAI, wish: str) -> None:
    reply = client.chat.completions.create(model="m", messages=says(wish))

    assert reply.choices[0].message.content == "Cut."


def test_whatever_else_the_upstream_sends_is_listed(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="m", messages=says("extras"))

    assert reply.choices[0].message.content == "fine"
    assert reply.model_extra["hhh"]["not_inspected"] == [
        "citations",
        "choices[0].logprobs",
        "choices[0].message.audio",
    ]


def test_conversations_only_an_upstream_understands_pass(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "Look it up"},
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "It is"},
    ]

    reply = client.chat.completions.create(model="m", messages=messages)

    assert reply.choices[0].message.content == SAID
    assert "messages[1].tool_calls" in reply.model_extra["hhh"]["not_inspected"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [400, 401, 404, 429])
def test_the_upstreams_own_4xx_passes_in_its_own_words(client: openai.OpenAI, status: int, stream: bool) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="m", messages=says(f"status {status}"), stream=stream)

    assert raised.value.status_code == status
    assert raised.value.code == "their_code"
    assert f"upstream says {status}" in raised.value.message
    assert raised.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wish", ["status 500", "status 503", "status 599", "garbage", "odd shape"])
def test_an_upstream_that_fails_is_502(client: openai.OpenAI, wish: str, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model="m", messages=says(wish), stream=stream)

    assert raised.value.status_code == 502
    assert raised.value.code == "upstream_error"
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("stream", [True, False])
def test_an_upstream_that_hangs_is_504(watchful: Policies, upstream: tuple[Upstream, str], stream: bool) -> None:
    by_silence = proxied(watchful(), upstream[1], timeout_s=0.3)
    by_deadline = proxied(watchful(), upstream[1], request_timeout_s=0.3)

    for pipeline in (by_silence, by_deadline):
        with client_of(pipeline) as client, pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(model="m", messages=says("hang"), stream=stream)
        assert (raised.value.status_code, raised.value.code) == (504, "timeout")


def test_an_upstream_that_is_not_there_is_502_and_says_what_to_do(watchful: Policies) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    pipeline = proxied(watchful(), f"http://127.0.0.1:{port}/v1")
    with client_of(pipeline) as client, pytest.raises(openai.InternalServerError, match="--upstream") as raised:
        client.chat.completions.create(model="m", messages=says("Hi"))

    assert raised.value.status_code == 502


@pytest.mark.parametrize("wish", ["break", "error event"])
def test_a_stream_that_breaks_raises_and_releases_only_what_was_read(client: openai.OpenAI, wish: str) -> None:
    seen: list[str] = []
    stream = client.chat.completions.create(model="m", messages=says(wish), stream=True)

    with pytest.raises(openai.APIError) as raised:
        seen.extend(chunk.choices[0].delta.content or "" for chunk in stream)

    assert ("ran out" in str(raised.value)) is (wish == "error event")
    assert SAID.startswith("".join(seen).strip())


def test_a_client_that_leaves_closes_the_upstreams_stream(
    client: openai.OpenAI, upstream: tuple[Upstream, str]
) -> None:
    stream = client.chat.completions.create(model="m", messages=says("slow"), stream=True)
    next(iter(stream))
    stream.close()

    deadline = time.monotonic() + 5
    while upstream[0].left == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert upstream[0].left == 1


class Blind:
    """A reader whose model is gone, for prompts or for replies."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    async def read(self, requests: list[ReadRequest]) -> list[Scores]:
        if any(r.mode == self._mode for r in requests):
            raise ReaderError("the reader is down")
        return [FakeReader().score(r) for r in requests]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("blind_for", ["prompt", "both"])
@pytest.mark.parametrize(
    ("on_error", "mode", "passes"),
    [("closed", "enforce", False), ("open", "enforce", True), ("closed", "shadow", True)],
)
def test_a_guard_that_fails_is_for_on_error_to_decide(
    watchful: Policies,
    upstream: tuple[Upstream, str],
    on_error: str,
    mode: str,
    passes: bool,
    blind_for: str,
    stream: bool,
) -> None:
    policy = watchful(on_error=on_error, mode=mode)
    with client_of(proxied(policy, upstream[1], reader=Blind(blind_for))) as client:
        reply = client.chat.completions.create(model="m", messages=says("Capital?"), stream=stream)
        if stream:
            chunks = list(reply)
            text = "".join(c.choices[0].delta.content or "" for c in chunks).strip()
            block = chunks[-1].model_extra["hhh"]
        else:
            text, block = reply.choices[0].message.content, reply.model_extra["hhh"]

    assert (text == SAID) is passes
    assert "Paris" not in text or passes
    assert any(d["rule"] == "on_error" and "the reader is down" in d["reason"] for d in block["decisions"])
    assert (upstream[0].bodies == []) is (blind_for == "prompt" and not passes)


def test_models_are_the_upstreams(client: openai.OpenAI, upstream: tuple[Upstream, str]) -> None:
    assert [m.id for m in client.models.list()] == ["big-one"]
    assert upstream[0].authorizations == ["Bearer sk-of-the-app"]


def test_with_a_key_of_its_own_the_proxy_keeps_it_and_sends_the_upstreams(
    watchful: Policies, upstream: tuple[Upstream, str]
) -> None:
    pipeline = proxied(watchful(), upstream[1], key="sk-upstream", api_key="front-door")

    with client_of(pipeline, key="front-door") as client:
        client.chat.completions.create(model="m", messages=says("Hi"))

    assert upstream[0].authorizations == ["Bearer sk-upstream"]


def test_keys_never_reach_logs_or_records(
    watchful: Policies, upstream: tuple[Upstream, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="hhh_router")
    with client_of(proxied(watchful(), upstream[1]), key="sk-canary-1234567890") as client:
        reply = client.chat.completions.create(model="m", messages=says("Hi"))
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model="m", messages=says("status 500"))

    assert "canary" not in caplog.text
    assert "canary" not in json.dumps(reply.model_extra)
    assert "canary" not in str(raised.value)


def test_guard_and_health_are_served_beside_it_and_the_rest_is_not(client: openai.OpenAI) -> None:
    verdict = client.post("/guard", body={"prompt": "bomb"}, cast_to=object)

    assert verdict["action"] == "refuse"  # type: ignore[index]
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.embeddings.create(model="m", input="x")
