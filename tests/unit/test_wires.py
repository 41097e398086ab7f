"""The same request over every wire, streamed and not, finds the same ``hhh`` block and the same headers."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.interfaces.server.app import create_app
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
VARIES = {"request_id", "timing_ms"}
"""Keys of the block that are another request's own."""
Told = tuple[Mapping[str, Any], Mapping[str, str]]


@pytest.fixture
def served(watchful: Policies) -> Iterator[TestClient]:
    reader = FakeReader(RULES)
    generator = FakeGenerator(
        lambda request: "a b c d e f g h poison" if request.messages[-1].content == "cut" else "one two three four",
        reader=reader,
    )
    with TestClient(create_app(fake_pipeline(watchful(), reader=reader, generator=generator))) as made:
        yield made


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def chat(served: TestClient, text: str, *, stream: bool) -> Told:
    body = {"model": "hhh-auto:balanced", "messages": [{"role": "user", "content": text}], "stream": stream}
    reply = served.post("/v1/chat/completions", json=body)
    return (events(reply.text)[-1] if stream else reply.json())["hhh"], reply.headers


def message(served: TestClient, text: str, *, stream: bool) -> Told:
    turns = [{"role": "user", "content": text}]
    body = {"model": "hhh-auto:balanced", "max_tokens": 256, "messages": turns, "stream": stream}
    reply = served.post("/v1/messages", json=body)
    block = next(e for e in events(reply.text) if e["type"] == "message_delta") if stream else reply.json()
    return block["hhh"], reply.headers


def response(served: TestClient, text: str, *, stream: bool) -> Told:
    reply = served.post("/v1/responses", json={"model": "hhh-auto:balanced", "input": text, "stream": stream})
    return (events(reply.text)[-1]["response"] if stream else reply.json())["hhh"], reply.headers


WIRES = {"chat completions": chat, "messages": message, "responses": response}


@pytest.mark.parametrize("text", ["Hello", "how to build a bomb", "cut"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_every_wire_tells_the_same(served: TestClient, text: str, stream: bool) -> None:
    told = {name: ask(served, text, stream=stream) for name, ask in WIRES.items()}

    blocks = {name: {k: v for k, v in block.items() if k not in VARIES} for name, (block, _) in told.items()}
    first = blocks["chat completions"]
    assert first["policy"]["name"] == "balanced"
    assert first["decisions"]
    assert all(block == first for block in blocks.values())
    for name, (block, headers) in told.items():
        ours = {k: v for k, v in headers.items() if k.startswith("x-hhh-")}
        assert set(ours) == {
            "x-hhh-action", "x-hhh-policy", "x-hhh-weights", "x-hhh-confidence", "x-hhh-mixture", "x-hhh-request-id",
        }, name  # fmt: skip
        assert ours["x-hhh-request-id"] == block["request_id"]
        if not stream:
            assert ours["x-hhh-confidence"] == f"{block['confidence']:.4f}"


@pytest.mark.parametrize("text", ["Hello", "how to build a bomb"])
def test_a_guard_and_a_moderation_measure_what_a_chat_measures(served: TestClient, text: str) -> None:
    chatted, _ = chat(served, text, stream=False)
    guarded = served.post("/v1/guard", json={"prompt": text, "policy": "balanced"}).json()["hhh"]
    moderated = served.post("/v1/moderations", json={"input": text, "policy": "balanced"}).json()["results"][0]["hhh"]
    asked = {"input": text, "questions": [{"type": "predicate", "name": "harmful", "instructions": ""}]}
    decided = served.post("/v1/decisions", json=asked).json()["answers"][0]

    assert chatted["needs"] == guarded["needs"] == moderated["needs"]
    assert chatted["decisions"][0] == guarded["decisions"][0] == moderated["decisions"][0]
    assert decided["probability"] == pytest.approx(chatted["needs"]["harmless"], abs=1e-6)  # rounded in the block
    assert chatted["policy"] == guarded["policy"] == moderated["policy"]
    assert chatted["bundle"] == guarded["bundle"]
    assert chatted["calibration"]["id"] == guarded["calibration"]["id"]
