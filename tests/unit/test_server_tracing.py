"""OpenTelemetry spans, as its own SDK exports them."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from hhh_router.errors import GeneratorError, MissingExtra
from hhh_router.interfaces.server.app import create_app
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

Policies = Callable[..., Path]
SECRET = "my secret plan"
CHATS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "hhh-auto", "messages": [{"role": "user", "content": SECRET}]},
    "/v1/responses": {"model": "hhh-auto", "input": SECRET},
    "/v1/messages": {"model": "hhh-auto", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 8},
}
PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    found = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    trace.set_tracer_provider(provider)
    return found


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[Callable[[], tuple[ReadableSpan, ...]]]:
    exporter.clear()
    yield exporter.get_finished_spans
    exporter.clear()


def client(policy: Path, *, otel: str = "on", **options: Any) -> TestClient:
    reader = FakeReader({"bomb": {"needs.harmless": 6.0}})
    generator = options.pop("generator", None) or FakeGenerator("one two three", reader=reader)
    return TestClient(create_app(fake_pipeline(policy, reader=reader, generator=generator, otel=otel)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", CHATS)
def test_a_chat_is_one_span_with_what_was_asked_decided_and_applied(
    watchful: Policies, spans: Any, path: str, stream: bool
) -> None:
    with client(watchful()) as served:
        reply = served.post(path, json=CHATS[path] | {"stream": stream, "temperature": 0.5})

    [span] = spans()
    told = dict(span.attributes)
    assert (span.name, span.kind, span.status.status_code) == ("chat hhh-auto", SpanKind.INTERNAL, StatusCode.UNSET)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "hhh-router"
    assert told["gen_ai.request.model"] == "hhh-auto"
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.output.type"] == "text"
    assert told["gen_ai.response.id"] == told["hhh.request_id"] == reply.headers["x-hhh-request-id"]
    assert told["gen_ai.response.model"] == told["hhh.mixture"] == reply.headers["x-hhh-mixture"]
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 3)
    assert (told["hhh.policy"], told["hhh.policy.mode"], told["hhh.action"]) == ("watchful@3", "enforce", "allow")
    assert sum(told[f"hhh.weights.{e}"] for e in ("base", "helpful", "harmless", "honest")) == pytest.approx(1)
    assert 0 <= told["hhh.confidence"] <= 1
    assert told["hhh.calibrated"] is False
    assert SECRET not in span.to_json()
    assert "one two" not in span.to_json()


def test_a_clients_trace_goes_on(watchful: Policies, spans: Any) -> None:
    with client(watchful()) as served:
        served.post("/v1/messages", json=CHATS["/v1/messages"], headers=PARENT)

    [span] = spans()
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"


def test_content_is_told_where_it_is_asked_for_and_secrets_are_not(watchful: Policies, spans: Any) -> None:
    key = "sk-" + "a1B2" * 12
    with client(watchful(), otel="content") as served:
        body = {"model": "hhh-auto", "messages": [{"role": "user", "content": f"{SECRET} {key}"}]}
        served.post("/v1/chat/completions", json=body)

    [span] = spans()
    [asked] = json.loads(span.attributes["gen_ai.input.messages"])
    [replied] = json.loads(span.attributes["gen_ai.output.messages"])
    assert asked["role"] == "user"
    assert asked["parts"][0]["content"].startswith(SECRET)
    assert replied == {
        "role": "assistant",
        "parts": [{"type": "text", "content": "one two three"}],
        "finish_reason": "stop",
    }
    assert key not in span.to_json()


def test_several_replies_are_one_span(watchful: Policies, spans: Any) -> None:
    with client(watchful()) as served:
        reply = served.post("/v1/chat/completions", json=CHATS["/v1/chat/completions"] | {"n": 3}).json()

    [span] = spans()
    assert span.attributes["gen_ai.request.choice.count"] == 3
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",) * 3
    assert span.attributes["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"] == 3
    assert span.attributes["gen_ai.usage.output_tokens"] == reply["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_named_without_its_words(watchful: Policies, spans: Any, stream: bool) -> None:
    broken = FakeGenerator("a b c d e", reader=FakeReader(), fail_after=(4, GeneratorError("out of memory")))
    with client(watchful(on_error="open"), generator=broken) as served:
        served.post("/v1/chat/completions", json=CHATS["/v1/chat/completions"] | {"stream": stream})

    [span] = spans()
    assert span.attributes["error.type"] == "generator_error"
    assert span.status.status_code is StatusCode.ERROR
    assert "out of memory" not in span.to_json()
    assert span.events == ()


def test_a_judgement_is_one_span_however_many_texts(watchful: Policies, spans: Any) -> None:
    with client(watchful()) as served:
        served.post("/v1/guard", json={"prompt": "bomb"}, headers=PARENT)
        served.post("/v1/guard", json={"items": [{"prompt": "a"}, {"prompt": "b"}]})
        served.post("/v1/guard", json={"prompt": 5})

    one, many, wrong = spans()
    assert one.name == "guard /v1/guard"
    assert f"{one.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert (one.attributes["hhh.action"], one.attributes["hhh.policy"]) == ("refuse", "watchful@3")
    assert many.attributes["http.response.status_code"] == 200
    assert wrong.attributes["error.type"] == "invalid_request"
    assert wrong.events == ()


def test_a_replayed_reply_makes_no_span(watchful: Policies, spans: Any) -> None:
    with client(watchful()) as served:
        for _ in range(2):
            served.post("/v1/messages", json=CHATS["/v1/messages"], headers={"idempotency-key": "k"})

    assert len(spans()) == 1


def test_it_is_off_by_default_and_says_what_is_missing(
    watchful: Policies, spans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(create_app(fake_pipeline(watchful()))) as served:
        served.post("/v1/chat/completions", json=CHATS["/v1/chat/completions"])
    assert spans() == ()

    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(MissingExtra, match=r"HHH_ROUTER_OTEL needs the 'otel' extra"):
        create_app(fake_pipeline(watchful(), otel="on"))
