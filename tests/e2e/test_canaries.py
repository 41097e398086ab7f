"""Secrets planted wherever a caller, an upstream or a tool can put one, and looked for wherever anything is kept."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from hhh_router.interfaces.server.app import create_app
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.trace import JsonlSink

from .loopback import served_app
from .sidecars import Asked, Said, Stub, sse

pytestmark = pytest.mark.e2e

COMMAND = str(Path(sys.executable).with_name("hhh-router"))
KEY = "sk-canaryKEY0123456789abcdef"
PASSWORD = "canaryPASSWORD99"
QUERY = "canaryQUERYtoken77"
CASE = "CASE-4711"  # the deployment's own
CANARIES = (KEY, PASSWORD, QUERY, CASE)
PLAIN = "zebrafish"  # no secret: shows that what is looked through holds what was said

SAID = (
    f"{PLAIN} use {KEY}, or https://bob:{PASSWORD}@db.example/x?api_key={QUERY} about {CASE}; the password: {PASSWORD}"
)
HEADERS = {
    "authorization": f"Bearer {KEY}",
    "x-api-key": KEY,
    "cookie": f"session={PASSWORD}",
    "x-request-id": f"{CASE}-{KEY}",
    "x-trace": f"{CASE} https://bob:{PASSWORD}@x",
    "user-agent": f"app/{CASE} {KEY}",
    "idempotency-key": KEY,
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "send", "arguments": json.dumps({"password": PASSWORD, "to": SAID})},
}
MESSAGES = [
    {"role": "system", "content": f"Help with {CASE}."},
    {"role": "user", "content": SAID},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": SAID},
    {"role": "user", "content": f"And now? token={QUERY}"},
]


def upstream(asked: Asked) -> Said:
    """Repeats what it was told, as a model may, and in its errors, as a provider may."""
    body = asked.json if asked.body.startswith(b"{") else {}
    if "fail" in asked.target.decode() or body.get("user") == "fail":
        told = {"error": {"message": f"Incorrect API key provided: {KEY} for {SAID}", "code": KEY}}
        return Said(status=500, pieces=[json.dumps(told).encode()])
    if body.get("user") == "garbage":
        return Said(pieces=[f"{{{SAID}".encode()])
    message = {"role": "assistant", "content": SAID, "tool_calls": [CALL]}
    if body.get("stream"):
        events = [{"id": "x", "choices": [{"index": 0, "delta": {"content": f"{w} "}}]} for w in SAID.split()]
        end = {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        return Said(headers=[(b"content-type", b"text/event-stream")], pieces=sse(*events, end, "[DONE]"))
    whole = {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    return Said(pieces=[json.dumps(whole).encode()])


def ask_everything(url: str, *, chats: str = "/v1/chat/completions", model: str = "hhh-auto") -> list[httpx.Response]:
    """Requests with canaries in every part, right ones and wrong ones."""
    body: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 4, "metadata": {"token": QUERY}}
    answers = []
    with httpx.Client(base_url=url, headers=HEADERS, timeout=300) as client:

        def post(path: str, sent: Any) -> None:
            for name in ("idempotency-key", "x-request-id"):
                client.headers[name] = f"{HEADERS[name]}-{len(answers)}"
            answers.append(client.post(path, json=sent))

        post(f"{chats}?api_key={QUERY}&case={CASE}", body)
        post(chats, {**body, "stream": True})
        post(chats, {**body, "user": "fail"})
        post(chats, {**body, "user": "garbage"})
        post(chats, {**body, "model": f"{CASE}-{KEY}"})
        post(chats, {**body, "messages": [{"role": KEY, "content": CASE}]})
        post(chats, {**body, "hhh": {"policy": f"{CASE}/{KEY}"}})
        post("/v1/messages", {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": SAID}]})
        post("/v1/responses", {"model": model, "input": SAID, "max_output_tokens": 16})
        post(f"/v1/fail/{KEY}/{CASE}?token={QUERY}", {"x": SAID})
        answers.append(client.get(f"/v1/files/{CASE}-{KEY}?token={QUERY}"))
    return answers


def look(folder: Path, *more: tuple[str, str]) -> dict[str, str]:
    """Everything that was written below a folder, and what else is given, by name; fails where a canary is in it."""
    places = {str(p.relative_to(folder)): p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()}
    places |= dict(more)
    found = [f"{canary} in {name}: …{text[max(0, text.index(canary) - 200):][:300]}" for name, text in places.items()
             for canary in CANARIES if canary in text]  # fmt: skip
    assert not found, "\n".join(found)
    return places


@contextmanager
def running(folder: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """An installed command with every sink switched on, its output beside them; gives its base URL."""
    given = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HHH_ROUTER_THREADS": "1",
        "HHH_ROUTER_FEEDBACK": str(folder / "feedback.sqlite3"),
        "HHH_ROUTER_FEEDBACK_CONTENT": "full",
        "HHH_ROUTER_RECEIPTS_FILE": str(folder / "receipts.jsonl"),
        "HHH_ROUTER_RECEIPTS_KEY_FILE": str(folder.with_name("key.pem")),
        **environment,
    }
    folder.mkdir()
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", given["HHH_ROUTER_RECEIPTS_KEY_FILE"]], check=True
    )
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen([COMMAND, *arguments, "--port", "0"], stdout=file, stderr=file, env=given)
    try:
        until = time.monotonic() + 300
        while not (found := re.search(r"listens on (\S+)/v1", output.read_text())):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < until
            time.sleep(0.2)
        yield found.group(1)
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("mode", ["observe", "enforce"])
def test_no_sink_of_the_real_sidecar_gets_one(tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "sinks"
    stub = Stub(upstream)
    with served_app(stub) as theirs:
        (tmp_path / "proxy.yaml").write_text(
            f"version: 1\nmode: {mode}\nupstreams: {{main: {{url: '{theirs}'}}}}\nroutes: [{{to: main}}]\n"
            f"audit: {{path: {folder / 'audit.sqlite3'}, content: full, redact: ['CASE-\\d+']}}\n"
        )
        with running(folder, "proxy", "--config", str(tmp_path / "proxy.yaml"), "--policy", "helpful-first") as url:
            answers = ask_everything(url)
            metrics = httpx.get(f"{url}/hhh/metrics").text
            asked_here = httpx.post(f"{url}/hhh/v1/guard", json={"prompt": SAID, "response": SAID}, headers=HEADERS)

    assert any(KEY in a.text for a in answers), "the client gets what the upstream said"
    assert any(KEY in str(a.headers) for a in stub.asked), "and the upstream what the client said"
    assert asked_here.status_code == 200
    places = look(folder, ("metrics", metrics))
    kept = places["audit.sqlite3"] + places.get("audit.sqlite3-wal", "")
    for text in (kept, places["feedback.sqlite3"] + places.get("feedback.sqlite3-wal", "")):
        assert PLAIN in text
        assert "[redacted:own]" in text
        assert "[redacted:api-key]" in text
    assert "hhh-router/receipt/1" in places["receipts.jsonl"]
    assert "action=" in places["output"]


def test_no_sink_of_the_real_server_gets_one(tmp_path: Path) -> None:
    folder = tmp_path / "sinks"
    (tmp_path / "patterns").write_text("# cases\nCASE-\\d+\n")
    with running(folder, "serve", HHH_ROUTER_REDACT_FILE=str(tmp_path / "patterns")) as url:
        ask_everything(url)
        guarded = httpx.post(f"{url}/v1/guard", json={"prompt": SAID, "response": SAID}, headers=HEADERS, timeout=60)
        httpx.post(f"{url}/v1/feedback", json={"request_id": KEY, "labels": {CASE: True}, "by": KEY}, headers=HEADERS)
        metrics = httpx.get(f"{url}/metrics").text

    assert guarded.status_code == 200
    places = look(folder, ("metrics", metrics))
    kept = places["feedback.sqlite3"] + places.get("feedback.sqlite3-wal", "")
    assert PLAIN in kept
    assert "[redacted:own]" in kept
    assert "hhh-router/receipt/1" in places["receipts.jsonl"]
    assert "action=" in places["output"]


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def test_no_span_trace_or_log_line_gets_one(
    tmp_path: Path, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "hhh_router")
    (tmp_path / "patterns").write_text("CASE-\\d+\n")
    reader = FakeReader({"bomb": {"needs.harmless": 6.0}})
    pipeline = fake_pipeline(
        "balanced",
        reader=reader,
        generator=FakeGenerator(SAID, reader=reader),
        otel="content",
        redact_file=tmp_path / "patterns",
    )
    folder = tmp_path / "sinks"
    folder.mkdir()
    pipeline.add_sink(JsonlSink(folder / "trace.jsonl", "full"))
    with TestClient(create_app(pipeline), headers=HEADERS) as client:
        for stream in (False, True):
            body = {"model": "hhh-auto", "messages": MESSAGES[:2], "stream": stream, "stop": [CASE, KEY]}
            client.post("/v1/chat/completions", json=body, headers={"x-request-id": f"{CASE}-{KEY}-{stream}"})
        client.post("/v1/chat/completions", json={"model": f"{CASE}{KEY}", "messages": MESSAGES[:2]})
        client.post("/v1/guard", json={"prompt": SAID, "response": SAID})

    told = "\n".join(span.to_json() for span in spans.get_finished_spans())
    places = look(folder, ("spans", told), ("log", caplog.text))
    assert PLAIN in told
    assert "[redacted:own]" in told
    assert "[redacted:own]" in places["trace.jsonl"]
