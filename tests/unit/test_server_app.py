"""The application in process, without a socket."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from hhh_router.errors import GeneratorError
from hhh_router.interfaces.server.app import create_app
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.trace import metadata_schema

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
HEADERS = {"x-hhh-action", "x-hhh-policy", "x-hhh-weights", "x-hhh-confidence", "x-hhh-mixture", "x-hhh-request-id"}


def client(policy: Path, reply: str = "one two three four", **options: Any) -> TestClient:
    reader = FakeReader(RULES)
    generator = options.pop("generator", None) or FakeGenerator(reply, reader=reader)
    return TestClient(create_app(fake_pipeline(policy, reader=reader, generator=generator, **options)))


@pytest.fixture
def served(watchful: Policies) -> Iterator[TestClient]:
    with client(watchful()) as made:
        yield made


def ask(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "hhh-auto", "messages": [{"role": "user", "content": text}], **fields}


def chunks(text: str) -> list[Any]:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(e) if e != "[DONE]" else e for e in events]


def test_a_reply_has_openais_fields_our_block_and_our_headers(served: TestClient) -> None:
    reply = served.post("/v1/chat/completions", json=ask())

    body = reply.json()
    assert reply.status_code == 200
    assert body["id"] == f"chatcmpl-{body['hhh']['request_id']}"
    assert (body["object"], body["model"]) == ("chat.completion", "hhh-auto")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two three four", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
    assert set(reply.headers) >= HEADERS
    assert reply.headers["x-hhh-request-id"] == body["hhh"]["request_id"]
    jsonschema.validate(body["hhh"], metadata_schema())


def test_a_refusal_is_200_with_the_message_as_content_and_refusal(served: TestClient) -> None:
    reply = served.post("/v1/chat/completions", json=ask("how to build a bomb"))

    [choice] = reply.json()["choices"]
    assert reply.status_code == 200
    assert choice["message"] == {"role": "assistant", "content": "Not that.", "refusal": "Not that."}
    assert choice["finish_reason"] == "content_filter"
    assert reply.headers["x-hhh-action"] == "refuse"
    assert reply.headers["x-hhh-mixture"] == "none"


def test_a_stream_carries_the_block_in_its_first_and_last_chunk(served: TestClient) -> None:
    reply = served.post("/v1/chat/completions", json=ask(stream=True))

    *sent, done = chunks(reply.text)
    assert done == "[DONE]"
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert set(reply.headers) >= HEADERS
    assert ["hhh" in c for c in sent] == [True] + [False] * (len(sent) - 2) + [True]
    assert sent[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in sent) == "one two three four"
    assert sent[-1]["choices"][0]["finish_reason"] == "stop"
    assert {c["id"] for c in sent} == {f"chatcmpl-{reply.headers['x-hhh-request-id']}"}
    assert sent[0]["hhh"]["decisions"][0]["checkpoint"] == "input"
    assert sent[-1]["hhh"]["receipt"]["reply_sha256"]
    for block in (sent[0]["hhh"], sent[-1]["hhh"]):
        jsonschema.validate(block, metadata_schema())


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(served: TestClient) -> None:
    reply = served.post("/v1/chat/completions", json=ask(stream=True, stream_options={"include_usage": True}))

    *sent, usage, _ = chunks(reply.text)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 5
    assert all(c["usage"] is None for c in sent)
    assert "hhh" in sent[-1]
    assert "hhh" in usage


def test_a_stream_that_is_cut_ends_with_the_message_and_content_filter(watchful: Policies) -> None:
    with client(watchful(), "a b c d poison") as served:
        sent = chunks(served.post("/v1/chat/completions", json=ask(stream=True)).text)

    deltas = [c["choices"][0]["delta"] for c in sent[:-1]]
    assert "".join(d.get("content", "") for d in deltas) == "a b c\n\nCut."
    assert deltas[-2]["refusal"] == "Cut."
    assert sent[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert sent[-2]["hhh"]["decisions"][-1]["action"] == "block"


def test_a_stream_refused_before_its_first_byte_says_so_in_its_headers(served: TestClient) -> None:
    reply = served.post("/v1/chat/completions", json=ask("bomb", stream=True))

    assert reply.status_code == 200
    assert reply.headers["x-hhh-action"] == "refuse"


def test_a_stream_that_breaks_sends_an_error_event_and_no_done(watchful: Policies) -> None:
    broken = FakeGenerator("a b c d e", fail_after=(4, GeneratorError("out of memory")))
    with client(watchful(on_error="open"), generator=broken) as served:
        reply = served.post("/v1/chat/completions", json=ask(stream=True))

    *_, last = chunks(reply.text)
    assert reply.status_code == 200
    assert last["error"]["code"] == "generator_error"
    assert "[DONE]" not in reply.text


def test_a_failure_before_the_first_byte_has_its_status(watchful: Policies) -> None:
    for stream in (True, False):
        broken = FakeGenerator(fail_after=(0, GeneratorError("out of memory")))
        with client(watchful(on_error="open"), generator=broken) as served:
            reply = served.post("/v1/chat/completions", json=ask(stream=stream))

        assert reply.status_code == 502
        assert reply.json()["error"]["code"] == "generator_error"
        assert reply.headers["x-hhh-request-id"]


def test_an_error_nobody_foresaw_is_500_without_a_traceback(watchful: Policies) -> None:
    broken = FakeGenerator(fail_after=(0, ZeroDivisionError("secret detail")))
    with client(watchful(), generator=broken) as served:
        reply = served.post("/v1/chat/completions", json=ask())

    assert reply.status_code == 500
    assert "secret detail" not in reply.text
    assert "Traceback" not in reply.text


def test_policy_and_weights_come_in_the_body_or_in_the_model_name(served: TestClient) -> None:
    by_body = served.post("/v1/chat/completions", json=ask(hhh={"policy": "balanced", "weights": "hhh@8-4-2-2"})).json()
    by_name = served.post("/v1/chat/completions", json=ask(model="hhh@8-4-2-2:balanced")).json()
    expert = served.post("/v1/chat/completions", json=ask(model="hhh-honest")).json()

    assert by_body["hhh"]["policy"]["name"] == by_name["hhh"]["policy"]["name"] == "balanced"
    assert by_body["hhh"]["mixture"] == by_name["hhh"]["mixture"] == "hhh@8-4-2-2"
    assert expert["hhh"]["weights"]["honest"] == 1.0


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_request"),
        (b"{", 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
        (b'{"model": NaN}', 400, "invalid_request"),
        (b'{"model": "\xff"}', 400, "invalid_request"),
        (b"[" * 100_000, 400, "invalid_request"),
        (b"{}", 400, "invalid_request"),
        (json.dumps(ask(model="gpt-4o")).encode(), 404, "model_not_found"),
        (json.dumps(ask("")).encode(), 400, "invalid_request"),
        (json.dumps(ask("a\x00b")).encode(), 400, "invalid_request"),
        (json.dumps(ask("a\ud800b")).encode(), 400, "invalid_request"),
        (json.dumps(ask(temperature=99)).encode(), 400, "invalid_request"),
        (json.dumps(ask(max_tokens=0)).encode(), 400, "invalid_request"),
        (json.dumps(ask(max_tokens="9")).encode(), 400, "invalid_request"),
        (json.dumps(ask(tools=[{}])).encode(), 400, "invalid_request"),
        (json.dumps(ask(hhh={"policy": "/etc/passwd"})).encode(), 403, "policy_not_allowed"),
        (json.dumps(ask(hhh={"policy": "../watchful.yaml"})).encode(), 403, "policy_not_allowed"),
        (json.dumps(ask("x" * 70_000)).encode(), 413, "too_large"),
    ],
)
def test_bad_bodies_are_named(watchful: Policies, body: bytes, status: int, code: str) -> None:
    with client(watchful(), max_body_bytes=65_536) as served:
        if body == b"[" * 100_000:
            body = body[:60_000]
        reply = served.post("/v1/chat/completions", content=body)

    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.json()["error"]["message"]


def test_a_body_without_a_declared_length_is_limited_too(watchful: Policies) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    with client(watchful(), max_body_bytes=65_536) as served:
        reply = served.post("/v1/chat/completions", content=pieces())

    assert reply.status_code == 413


def test_guard_judges_one_or_many(served: TestClient) -> None:
    one = served.post("/v1/guard", json={"prompt": "bomb"})
    pair = served.post("/v1/guard", json={"prompt": [{"role": "user", "content": "Hi"}], "response": "poison"}).json()
    items = [{"prompt": "Hi"}, {"response": "poison", "policy": "balanced"}]
    many = served.post("/v1/guard", json={"items": items, "policy": "watchful"}).json()

    assert (one.json()["object"], one.json()["action"], one.json()["message"]) == ("guard", "refuse", "Not that.")
    assert one.headers["x-hhh-action"] == "refuse"
    assert (pair["action"], pair["hhh"]["mode"]) == ("block", "both")
    assert [d["hhh"]["policy"]["name"] for d in many["data"]] == ["watchful", "balanced"]
    assert many["object"] == "list"
    jsonschema.validate(many["data"][0]["hhh"], metadata_schema())


def test_route_tells_weights_and_the_mixtures_name(served: TestClient) -> None:
    one = served.post("/v1/route", json={"prompt": "Hi"}).json()
    many = served.post("/v1/route", json={"items": [{"prompt": "Hi"}, {"prompt": "bomb"}]}).json()

    assert sum(one["weights"].values()) == pytest.approx(1.0)
    assert one["mixture"] == many["data"][0]["mixture"] != many["data"][1]["mixture"]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({}, "neither prompt nor response"),
        ({"promt": "x"}, "promt: unknown field"),
        ({"prompt": 5}, "prompt: found a number"),
        ({"response": 5}, "response: no string"),
        ({"items": {}}, "items: no list"),
        ({"items": [5]}, "items: no list"),
        ({"items": [{"prompt": "a"}, {"x": 1}]}, "items[1].x: unknown field"),
        ({"items": [{"prompt": "a"}, {"prompt": ""}]}, "items[1].prompt[0].content: empty"),
        ({"items": [], "prompt": "x"}, "prompt: unknown field beside items"),
        ({"items": [{"prompt": "a"}] * 5}, "5 items, one call may hold 4"),
    ],
)
def test_guard_bodies_that_cannot_be_judged_are_named(watchful: Policies, body: Any, found: str) -> None:
    with client(watchful(), max_batch_items=4) as served:
        reply = served.post("/v1/guard", json=body)

    assert reply.status_code == 400
    assert found in reply.json()["error"]["message"]


def test_models_health_and_schema(served: TestClient) -> None:
    assert [m["id"] for m in served.get("/v1/models").json()["data"]] == [
        "hhh-auto",
        "hhh-helpful",
        "hhh-harmless",
        "hhh-honest",
    ]
    assert served.get("/health/live").json() == {"status": "ok"}
    assert served.get("/health/ready").json()["policy"] == "watchful"
    assert served.get("/v1/schema").json() == metadata_schema()


def test_what_is_not_served_says_what_is(served: TestClient) -> None:
    missing = served.post("/v1/embeddings", json={})
    wrong = served.get("/v1/chat/completions")

    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "POST /v1/chat/completions" in missing.json()["error"]["message"]
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_key_is_demanded_everywhere_but_for_health_and_schema(watchful: Policies) -> None:
    with client(watchful(), api_key="top-secret") as served:
        for given in (None, "Bearer wrong", "top-secret", "Bearer ", "Bearer ö"):
            headers = {} if given is None else {"authorization": given.encode()}
            refused = served.post("/v1/chat/completions", json=ask(), headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "top-secret" not in refused.text
        accepted = served.post("/v1/chat/completions", json=ask(), headers={"authorization": "Bearer top-secret"})
        assert accepted.status_code == 200
        assert served.get("/v1/models").status_code == 401
        assert served.post("/v1/guard", json={"prompt": "x"}).status_code == 401
        assert served.get("/health/live").status_code == 200
        assert served.get("/v1/schema").status_code == 200


def test_the_pipeline_is_closed_with_the_server(watchful: Policies) -> None:
    closed = []

    async def close() -> None:
        closed.append(1)

    pipeline = fake_pipeline(watchful(), closers=(close,))

    with TestClient(create_app(pipeline)):
        assert closed == []

    assert closed == [1]
