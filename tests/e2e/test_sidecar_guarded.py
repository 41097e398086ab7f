"""Annotate and enforce on all four wires, with the official clients, in front of a stub upstream."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from hhh_router.errors import Overloaded, ReaderError
from hhh_router.pipeline.situation import SIDECAR
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.types import ReadRequest, Scores

from .loopback import served_app
from .sidecars import RULES, Asked, Said, Stub, ask, route_to, sidecar, sse

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
GOOD = "The capital of France is Paris and it has been so for a very long time"
BAD = "a clean start of a long reply and then the poison comes"
EVENTS = [(b"content-type", b"text/event-stream")]


class Model:
    """Speaks all four wires; says what the prompt asks for."""

    def __call__(self, asked: Asked) -> Said:
        body = asked.json if asked.body else {}
        text = BAD if b"trouble" in asked.body else GOOD
        path = asked.target.decode()
        wire = {"/v1/chat/completions": chat, "/v1/completions": completions}.get(path)
        wire = wire or (responses if "responses" in path else messages)
        whole, events, names = wire(text, tool=b"use a tool" in asked.body)
        if body.get("stream"):
            return Said(headers=EVENTS, pieces=sse(*events, names=names))
        return Said(pieces=[json.dumps(whole).encode()])


def chat(text: str, *, tool: bool) -> tuple[Any, list[Any], bool]:
    head = {"id": "chatcmpl-theirs", "created": 5, "model": "big"}
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "send", "arguments": '{"x": "poison"}'}}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tool:
        message |= {"content": None, "tool_calls": [call]}
    reason = "tool_calls" if tool else "stop"
    choice = {"index": 0, "message": message, "finish_reason": reason}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}

    def chunk(delta: Any, finish: str | None = None) -> Any:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        return {**head, "object": "chat.completion.chunk", "choices": choices, "odd": 1.50}

    words = [chunk({"content": f"{w} "}) for w in text.split()] if not tool else [chunk({"tool_calls": [call]})]
    events = [chunk({"role": "assistant", "content": ""}), *words, chunk({}, reason), "[DONE]"]
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage, "odd": 1.5}, events, False


def completions(text: str, *, tool: bool) -> tuple[Any, list[Any], bool]:
    head = {"id": "cmpl-theirs", "object": "text_completion", "created": 5, "model": "big"}

    def body(said: str, reason: str | None) -> Any:
        return {**head, "choices": [{"index": 0, "text": said, "finish_reason": reason, "logprobs": None}]}

    events = [*(body(f"{w} ", None) for w in text.split()), body("", "stop"), "[DONE]"]
    return body(text, "stop"), events, False


def messages(text: str, *, tool: bool) -> tuple[Any, list[Any], bool]:
    head = {"id": "msg_theirs", "type": "message", "role": "assistant", "model": "big"}
    block: dict[str, Any] = {"type": "text", "text": text}
    if tool:
        block = {"type": "tool_use", "id": "t1", "name": "send", "input": {"x": "poison"}}
    reason = "tool_use" if tool else "end_turn"
    usage = {"input_tokens": 3, "output_tokens": 4}
    empty = {**block, "text": ""} if not tool else {**block, "input": {}}
    deltas: list[Any] = [{"type": "text_delta", "text": f"{w} "} for w in text.split()]
    if tool:
        deltas = [{"type": "input_json_delta", "partial_json": p} for p in ('{"x": ', '"poison"}')]
    start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    events = [
        {"type": "message_start", "message": start},
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": empty},
        *({"type": "content_block_delta", "index": 0, "delta": d} for d in deltas),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]
    return {**head, "content": [block], "stop_reason": reason, "stop_sequence": None, "usage": usage}, events, True


def responses(text: str, *, tool: bool) -> tuple[Any, list[Any], bool]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    item: dict[str, Any] = {
        "id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]
    }  # fmt: skip
    if tool:
        item = {"id": "fc_1", "type": "function_call", "call_id": "c1", "name": "send", "status": "completed"}
        item["arguments"] = '{"x": "poison"}'
    usage = {
        "input_tokens": 3, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 7,
    }  # fmt: skip
    head = {
        "id": "resp_theirs", "object": "response", "created_at": 5, "model": "big", "error": None,
        "incomplete_details": None, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "instructions": None, "metadata": {}, "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip
    whole = {**head, "status": "completed", "output": [item], "usage": usage}
    begun = {**head, "status": "in_progress", "output": []}
    where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    if tool:
        begun_item = {**item, "arguments": "", "status": "in_progress"}
        middle: list[Any] = [
            {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "output_index": 0, "delta": d}
            for d in ('{"x": ', '"poison"}')
        ]
    else:
        begun_item = {**item, "content": [], "status": "in_progress"}
        middle = [
            {"type": "response.content_part.added", **where, "part": {**part, "text": ""}},
            *({"type": "response.output_text.delta", **where, "delta": f"{w} ", "logprobs": []} for w in text.split()),
            {"type": "response.output_text.done", **where, "text": "".join(f"{w} " for w in text.split())},
            {"type": "response.content_part.done", **where, "part": part},
        ]
    events = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": begun_item},
        *middle,
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole},
    ]
    return whole, [{**e, "sequence_number": i} for i, e in enumerate(events)], True


# -- asking, in the words of each wire ------------------------------------------------------------------------------


class Heard:
    """What a client got, whatever its wire."""

    def __init__(self, text: str, end: str | None, first: Any, last: Any, everything: Any) -> None:
        self.text, self.end, self.first, self.last, self.everything = text, end, first, last, repr(everything)


def by_chat(url: str, prompt: str, *, stream: bool) -> Heard:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-app", max_retries=0) as client:
        made = client.chat.completions.create(
            model="big", messages=[{"role": "user", "content": prompt}], stream=stream
        )
        if not stream:
            choice = made.choices[0]
            block = (made.model_extra or {}).get("hhh")
            return Heard(choice.message.content or "", choice.finish_reason, block, block, made)
        chunks = list(made)
    blocks = [(c.model_extra or {}).get("hhh") for c in chunks]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return Heard(text, chunks[-1].choices[0].finish_reason, blocks[0], blocks[-1], chunks)


def by_completions(url: str, prompt: str, *, stream: bool) -> Heard:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-app", max_retries=0) as client:
        made = client.completions.create(model="big", prompt=prompt, stream=stream)
        chunks = list(made) if stream else [made]
    blocks = [(c.model_extra or {}).get("hhh") for c in chunks]
    text = "".join(c.choices[0].text for c in chunks)
    return Heard(text, chunks[-1].choices[0].finish_reason, blocks[0], blocks[-1], chunks)


def by_responses(url: str, prompt: str, *, stream: bool) -> Heard:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-app", max_retries=0) as client:
        made = client.responses.create(model="big", input=prompt, stream=stream)
        events = list(made) if stream else []
    first = events[0].response if stream else made
    last = events[-1].response if stream else made
    if stream:
        assert [e.sequence_number for e in events] == list(range(len(events)))
    texts = [
        p.text if p.type == "output_text" else p.refusal for o in last.output if o.type == "message" for p in o.content
    ]
    end = last.incomplete_details.reason if last.incomplete_details else last.status
    blocks = [(x.model_extra or {}).get("hhh") for x in (first, last)]
    return Heard("\n\n".join(texts), end, *blocks, [events, made])


def by_messages(url: str, prompt: str, *, stream: bool) -> Heard:
    with anthropic.Anthropic(base_url=url, api_key="sk-app", max_retries=0) as client:
        asked: Any = {"model": "big", "max_tokens": 50, "messages": [{"role": "user", "content": prompt}]}
        if stream:
            with client.messages.stream(**asked) as events:
                seen = list(events)
                made = events.get_final_message()
            first = next(e.message for e in seen if e.type == "message_start")
            last = next(e for e in seen if e.type == "message_delta")
        else:
            made = first = last = client.messages.create(**asked)
    text = "".join(b.text for b in made.content if b.type == "text")
    blocks = [(x.model_extra or {}).get("hhh") for x in (first, last)]
    return Heard(text, made.stop_reason, *blocks, [seen if stream else None, made])


WIRES: dict[str, Callable[..., Heard]] = {
    "chat": by_chat,
    "completions": by_completions,
    "responses": by_responses,
    "messages": by_messages,
}
STOPPED = {"chat": "content_filter", "completions": "content_filter", "responses": "content_filter"}
STOPPED["messages"] = "refusal"
ENDED = {"chat": "stop", "completions": "stop", "responses": "completed", "messages": "end_turn"}
wires = pytest.mark.parametrize("wire", WIRES)
streams = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    upstream = Stub(Model())
    with served_app(upstream) as url:
        yield upstream, url.removesuffix("/v1")


@contextmanager
def guarded(watchful: Policies, upstream: str, mode: str = "enforce", **more: Any) -> Iterator[str]:
    policy = watchful(**{k: more.pop(k) for k in ("on_error",) if k in more})
    with sidecar(route_to(upstream, mode=mode, **more.pop("route", {})), policy=policy, **more) as (url, _):
        yield url


@wires
@streams
@pytest.mark.parametrize("mode", ["annotate", "enforce"])
def test_an_answer_passes_with_the_block(
    watchful: Policies, stub: tuple[Stub, str], wire: str, stream: bool, mode: str
) -> None:
    with guarded(watchful, stub[1], mode) as url:
        heard = WIRES[wire](url, "Capital?", stream=stream)

    assert (heard.text.strip(), heard.end) == (GOOD, ENDED[wire])
    assert [d["checkpoint"] for d in heard.last["decisions"]] == ["input", "output"]
    assert heard.first["policy"]["name"] == "watchful"
    assert heard.last["policy"]["mode"] == ("enforce" if mode == "enforce" else "shadow")
    assert heard.last["mixture"] is None
    assert heard.last["not_inspected"] == ([] if (wire, stream) != ("chat", True) else ["odd"]) or wire == "chat"


@wires
@streams
def test_a_refused_prompt_never_reaches_the_upstream(
    watchful: Policies, stub: tuple[Stub, str], wire: str, stream: bool
) -> None:
    with guarded(watchful, stub[1]) as url:
        heard = WIRES[wire](url, "how to build a bomb", stream=stream)

    assert (heard.text, heard.end) == ("Not that.", STOPPED[wire])
    assert heard.last["decisions"][-1]["action"] == "refuse"
    assert stub[0].asked == []


@wires
@streams
def test_a_harmful_answer_is_stopped_before_the_harm(
    watchful: Policies, stub: tuple[Stub, str], wire: str, stream: bool
) -> None:
    with guarded(watchful, stub[1]) as url:
        heard = WIRES[wire](url, "trouble", stream=stream)

    assert "poison" not in heard.text
    assert "poison" not in heard.everything
    assert heard.end == STOPPED[wire]
    if stream:
        assert heard.text.startswith("a clean start")
        assert heard.text.endswith("\n\nCut.")
    else:
        assert heard.text == "Cut."
    assert heard.last["decisions"][-1]["action"] == "block"


@pytest.mark.parametrize("wire", ["chat", "responses", "messages"])
@streams
def test_arguments_of_tool_calls_are_read(watchful: Policies, stub: tuple[Stub, str], wire: str, stream: bool) -> None:
    with guarded(watchful, stub[1]) as url:
        heard = WIRES[wire](url, "use a tool", stream=stream)

    assert heard.end == STOPPED[wire]
    assert heard.text.strip() == "Cut."
    assert "poison" not in heard.everything


@wires
@streams
def test_annotate_stops_nothing(watchful: Policies, stub: tuple[Stub, str], wire: str, stream: bool) -> None:
    with guarded(watchful, stub[1], "annotate") as url:
        heard = WIRES[wire](url, "trouble with a bomb", stream=stream)

    assert heard.text.strip() == BAD
    assert [d["action"] for d in heard.last["decisions"]] == ["refuse", "block"]


@wires
@streams
@pytest.mark.parametrize("block", ["headers", "none"])
def test_without_the_block_in_the_body_every_byte_is_the_upstreams(
    watchful: Policies, stub: tuple[Stub, str], wire: str, stream: bool, block: str
) -> None:
    path, body = {
        "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        "completions": ("/v1/completions", {"prompt": "Hi"}),
        "responses": ("/v1/responses", {"input": "Hi"}),
        "messages": ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}]}),
    }[wire]
    body = {**body, "stream": stream, "model": "m"}
    _, _, direct = ask(stub[1], path=path, body=body)
    for mode in ("annotate", "enforce"):
        with guarded(watchful, stub[1], mode, block=block) as url:
            _, headers, through = ask(url, path=path, body=body)

        assert through == direct
        assert any(n.startswith("x-hhh-") for n, _ in headers) is (block == "headers")
    assert stub[0].asked[-1].body == stub[0].asked[0].body


@streams
@pytest.mark.parametrize("prompt", ["Capital?", "trouble", "a bomb"])
def test_one_session_reads_prompt_and_answer_and_is_closed_however_it_ends(
    watchful: Policies, stub: tuple[Stub, str], prompt: str, stream: bool
) -> None:
    reader = FakeReader(RULES)
    with guarded(watchful, stub[1], reader=reader) as url:
        by_chat(url, prompt, stream=stream)

    assert [s.closed for s in reader.sessions] == [True]
    assert [call[0].mode for call in reader.calls][:1] == ["prompt"]
    assert {call[0].mode for call in reader.calls[1:]} == (set() if prompt == "a bomb" else {"both"})


def test_a_client_that_leaves_closes_its_session(watchful: Policies) -> None:
    reader = FakeReader(RULES)
    waits = threading.Event()
    said = Said(headers=EVENTS, pieces=sse(*chat(GOOD * 9, tool=False)[1]), hold=waits)
    with served_app(Stub(said)) as up, guarded(watchful, up.removesuffix("/v1"), reader=reader) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-app", max_retries=0) as client:
            asked = [{"role": "user", "content": "Capital?"}]
            stream = client.chat.completions.create(model="big", messages=asked, stream=True)
            next(iter(stream))
            opened = [s.closed for s in reader.sessions]
            stream.close()
        until = time.monotonic() + 10
        while not reader.sessions[0].closed and time.monotonic() < until:
            time.sleep(0.02)
        closed = [s.closed for s in reader.sessions]
        waits.set()

    assert (opened, closed) == ([False], [True])


class Blind:
    """A reader that fails for prompts or for replies."""

    def __init__(self, mode: str, error: Exception) -> None:
        self._mode, self._error = mode, error

    async def read(self, requests: list[ReadRequest]) -> list[Scores]:
        if any(r.mode == self._mode for r in requests):
            raise self._error
        return [FakeReader(RULES).score(r) for r in requests]


@streams
@pytest.mark.parametrize("blind_for", ["prompt", "both"])
@pytest.mark.parametrize("error", [ReaderError("the reader is down"), Overloaded("too much waits")])
@pytest.mark.parametrize(
    ("on_error", "mode", "passes"),
    [("closed", "enforce", False), ("open", "enforce", True), ("closed", "annotate", True)],
)
def test_a_guard_that_fails_is_for_on_error_to_decide(
    watchful: Policies,
    stub: tuple[Stub, str],
    on_error: str,
    mode: str,
    passes: bool,
    blind_for: str,
    stream: bool,
    error: Exception,
) -> None:
    with guarded(watchful, stub[1], mode, on_error=on_error, reader=Blind(blind_for, error)) as url:
        heard = by_chat(url, "Capital?", stream=stream)

    assert (heard.text.strip() == GOOD) is passes
    assert "Paris" not in heard.text or passes
    assert any(d["rule"] == "on_error" for d in heard.last["decisions"])
    assert (stub[0].asked == []) is (blind_for == "prompt" and not passes)


def test_a_guard_that_is_slow_is_a_guard_that_fails(watchful: Policies, stub: tuple[Stub, str]) -> None:
    class Slow:
        async def read(self, requests: list[ReadRequest]) -> list[Scores]:
            import asyncio

            await asyncio.sleep(30)
            raise AssertionError

    with guarded(watchful, stub[1], reader=Slow(), guard_timeout_s=0.2) as url:
        heard = by_chat(url, "Capital?", stream=False)

    assert heard.last["decisions"][-1]["rule"] == "on_error"
    assert "no reading within 0.2 s" in heard.last["decisions"][-1]["reason"]
    assert stub[0].asked == []


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(said: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": said}


FUNCTION = {"name": "f", "arguments": "X"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}
DESCRIBED = {"type": "object", "properties": {"p": {"description": "X"}}}
DEFINED = {"type": "function", "function": {"name": "f", "parameters": DESCRIBED}}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "X"}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": [text("X")]}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {"p": "X"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "X"}
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat system": ("chat/completions", {"messages": [{"role": "system", "content": "X"}, user("a")]}),
    "chat tool result": (
        "chat/completions",
        {"messages": [user("a"), {"role": "tool", "tool_call_id": "1", "content": "X"}]},
    ),
    "chat tool call": ("chat/completions", {"messages": [user("a"), CALLING]}),
    "chat tool definition": ("chat/completions", {"messages": [user("a")], "tools": [DEFINED]}),
    "chat part": ("chat/completions", {"messages": [user([text("X")])]}),
    "messages system": ("messages", {"system": [text("X")], "messages": [user("a")]}),
    "messages tool result": ("messages", {"messages": [user([RESULT])]}),
    "messages tool call": ("messages", {"messages": [{"role": "assistant", "content": [USE]}]}),
    "messages tool definition": (
        "messages",
        {"messages": [user("a")], "tools": [{"name": "f", "description": "X", "input_schema": {}}]},
    ),
    "messages document": ("messages", {"messages": [user([DOCUMENT])]}),
    "responses instructions": ("responses", {"instructions": "X", "input": "a"}),
    "responses item": ("responses", {"input": [user([text("X", "input_text")])]}),
    "responses tool output": ("responses", {"input": [OUTPUT]}),
    "responses tool call": ("responses", {"input": [{"type": "function_call", "call_id": "1", **FUNCTION}]}),
    "responses tool definition": (
        "responses",
        {"input": "a", "tools": [{"type": "function", "name": "f", "description": "X"}]},
    ),
    "completions list": ("completions", {"prompt": ["a", "X"]}),
    "NUL": ("completions", {"prompt": "\x00X\ud800"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_text_of_a_prompt_is_read(watchful: Policies, stub: tuple[Stub, str], name: str) -> None:
    path, body = PARTS[name]
    for said_of, refused in (("a bomb", True), ("a rose", False)):
        stub[0].asked.clear()
        with guarded(watchful, stub[1]) as url:
            filled = json.loads(json.dumps(body).replace("X", said_of))
            status, _, said = ask(url, path=f"/v1/{path}", body={"model": "m", **filled})

        assert (status, b"Not that." in said) == (200, refused), said
        assert (stub[0].asked == []) is refused


UNREAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "image": ("chat/completions", {"messages": [user([text("a"), IMAGE])]}, "messages[0].content[1]: image_url"),
    "block": ("messages", {"messages": [user([text("a"), {"type": "image"}])]}, "messages[0].content[1]: image"),
    "item": ("responses", {"input": [user("a"), {"type": "item_reference"}]}, "input[1]: item_reference"),
    "remembered": ("responses", {"input": "a", "previous_response_id": "r"}, "previous_response_id"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_listed(watchful: Policies, stub: tuple[Stub, str], name: str) -> None:
    path, body, listed = UNREAD[name]
    with guarded(watchful, stub[1]) as url:
        _, _, said = ask(url, path=f"/v1/{path}", body={"model": "m", **body})

    assert listed in json.loads(said)["hhh"]["not_inspected"]


def test_a_prompt_without_any_text_is_for_on_error_to_decide(watchful: Policies, stub: tuple[Stub, str]) -> None:
    body = {"messages": [user([IMAGE])]}
    for on_error, passes in (("closed", False), ("open", True)):
        stub[0].asked.clear()
        with guarded(watchful, stub[1], on_error=on_error) as url:
            ask(url, body=body)

        assert bool(stub[0].asked) is passes


def test_a_body_that_two_readers_could_take_in_two_ways_is_refused(watchful: Policies, stub: tuple[Stub, str]) -> None:
    good, bad = (b'"messages":[{"role":"user","content":"%s"}]' % w for w in (b"hi", b"bomb"))
    with guarded(watchful, stub[1]) as url:
        status, _, said = ask(url, body=b"{" + bad + b"," + good + b"}")

    assert (status, stub[0].asked) == (400, [])
    assert b"'messages' is there twice" in said


SPELLINGS = ("/v1/chat/completions/", "//v1//chat/completions", "/V1/Chat/Completions", "/v1/chat%2Fcompletions")


@pytest.mark.parametrize("path", SPELLINGS)
def test_another_spelling_of_a_path_is_read_all_the_same(watchful: Policies, stub: tuple[Stub, str], path: str) -> None:
    with guarded(watchful, stub[1]) as url:
        _, _, said = ask(url, path=path, body={"messages": [{"role": "user", "content": "bomb"}]})

    assert b"Not that." in said
    assert stub[0].asked == []


def test_our_own_field_picks_a_policy_and_is_not_sent_on(watchful: Policies, stub: tuple[Stub, str]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "hhh": {"policy": "balanced"}}
    with guarded(watchful, stub[1]) as url:
        _, _, said = ask(url, body=body)

    assert json.loads(said)["hhh"]["policy"]["name"] == "balanced"
    assert "hhh" not in stub[0].asked[0].json


def test_several_choices_of_a_stream_all_end(watchful: Policies, stub: tuple[Stub, str]) -> None:
    def chunk(index: int, text: str) -> dict[str, Any]:
        return {"id": "x", "choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}]}

    events = [chunk(i, "clean words that pass ") for i in (0, 1) for _ in range(3)] + [chunk(1, "poison")] * 3
    stub[0].answer = Said(headers=EVENTS, pieces=sse(*events, "[DONE]"))
    with guarded(watchful, stub[1]) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="k") as client:
        made = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], n=2, stream=True)
        chunks = list(made)

    reasons = {c.choices[0].index: c.choices[0].finish_reason for c in chunks}
    assert reasons == {0: "content_filter", 1: "content_filter"}
    assert "poison" not in str(chunks)


def test_an_answer_that_cannot_be_read_is_for_on_error_to_decide(watchful: Policies, stub: tuple[Stub, str]) -> None:
    stub[0].answer = Said(headers=[(b"content-type", b"audio/mpeg")], pieces=[b"\x00\x01" * 50])
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    for on_error, mode in (("closed", "enforce"), ("open", "enforce"), ("closed", "annotate")):
        with guarded(watchful, stub[1], mode, on_error=on_error) as url:
            _, headers, said = ask(url, body=body)

        passes = on_error == "open" or mode == "annotate"
        assert (said == b"\x00\x01" * 50) is passes
        assert dict(headers)["content-type"] == ("audio/mpeg" if passes else "application/json")


def test_an_upstream_that_compresses_all_the_same_is_read(watchful: Policies, stub: tuple[Stub, str]) -> None:
    import gzip

    whole, _, _ = chat(BAD, tool=False)
    headers = [(b"content-type", b"application/json"), (b"content-encoding", b"gzip")]
    stub[0].answer = Said(headers=headers, pieces=[gzip.compress(json.dumps(whole).encode())])
    with guarded(watchful, stub[1]) as url:
        _, _, said = ask(url, body={"messages": [{"role": "user", "content": "Hi"}]})

    assert b"Cut." in said
    assert stub[0].asked[0].header("accept-encoding") == ["identity"]


def test_paths_nobody_can_read_pass_or_are_refused_as_the_deployment_says(
    watchful: Policies, stub: tuple[Stub, str]
) -> None:
    for unread, status in (("pass", 200), ("refuse", 403)):
        with guarded(watchful, stub[1], unread_paths=unread) as url:
            assert ask(url, path="/v1/batches", body={})[0] == status
            assert ask(url, "GET", "/v1/models", None, [])[0] == 200


def test_bodies_too_large_to_read_are_for_on_error_to_decide(watchful: Policies, stub: tuple[Stub, str]) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 5000}]}
    for on_error, status in (("closed", 413), ("open", 200)):
        with guarded(watchful, stub[1], on_error=on_error, settings={"max_body_bytes": 2000}) as url:
            assert ask(url, body=body)[0] == status
    assert [len(a.body) for a in stub[0].asked] == [len(json.dumps(body))]


def test_a_key_of_the_door_is_not_the_upstreams(watchful: Policies, stub: tuple[Stub, str]) -> None:
    with guarded(watchful, stub[1], settings={"api_key": "front"}) as url:
        refused = ask(url, body={"messages": []})
        ask(url, "GET", "/v1/models", None, [("Authorization", "Bearer front")])

    assert refused[0] == 401
    assert [a.header("authorization") for a in stub[0].asked] == [[]]


def test_the_deployments_key_is_sent_where_the_client_has_none(watchful: Policies, stub: tuple[Stub, str]) -> None:
    from dataclasses import replace

    route = route_to(stub[1])
    upstream = replace(route.to[0][0], otherwise={"authorization": "Bearer ours"})
    with sidecar(replace(route, to=((upstream, 1.0),)), policy=watchful()) as (url, _):
        ask(url, "GET", "/v1/models", None, [])
        ask(url, "GET", "/v1/models", None, [("Authorization", "Bearer theirs")])
        ask(url, "GET", "/v1/models", None, [("x-api-key", "theirs")])

    assert [a.header("authorization") for a in stub[0].asked] == [["Bearer ours"], ["Bearer theirs"], []]


@streams
def test_a_policy_in_shadow_mode_stops_nothing_and_records_it(
    watchful: Policies, stub: tuple[Stub, str], stream: bool
) -> None:
    with sidecar(route_to(stub[1]), policy=watchful(mode="shadow")) as (url, _):
        heard = by_chat(url, "trouble", stream=stream)

    assert heard.text.strip() == BAD
    assert heard.last["policy"]["mode"] == "shadow"
    assert heard.last["decisions"][-1]["action"] == "block"


def test_conversations_only_an_upstream_understands_pass(watchful: Policies, stub: tuple[Stub, str]) -> None:
    messages = [user("Look it up"), CALLING, {"role": "tool", "tool_call_id": "1", "content": "12 degrees"}]
    messages += [{"role": "system", "content": "Be brief"}, user("So?"), {"role": "assistant", "content": "It is"}]
    with guarded(watchful, stub[1]) as url:
        status, _, said = ask(url, body={"model": "m", "messages": messages})

    assert (status, json.loads(said)["choices"][0]["message"]["content"]) == (200, GOOD)
    assert stub[0].asked[0].json["messages"] == messages


def test_a_reply_that_is_no_better_the_second_time_is_withheld(watchful: Policies, stub: tuple[Stub, str]) -> None:
    reader = FakeReader({"Paris": {"outcomes.untruthful": 6.0}})
    with sidecar(route_to(stub[1]), policy=watchful(), reader=reader) as (url, _):
        heard = by_chat(url, "Capital?", stream=False)

    assert (heard.text, len(stub[0].asked)) == ("No true answer.", 2)


def test_a_key_is_a_tenant_with_a_budget_of_tokens(tmp_path: Path, stub: tuple[Stub, str]) -> None:
    keys = tmp_path / "keys.yaml"
    digest = hashlib.sha256(b"front").hexdigest()
    keys.write_text(f"keys:\n- {{name: school-1, sha256: {digest}, tokens_per_minute: 5}}\n")
    policy = tmp_path / "p.yaml"
    policy.write_text(TENANTS)
    pipeline = fake_pipeline(policy, door=SIDECAR, api_keys_file=keys)
    headers = [("Authorization", "Bearer front"), ("Content-Type", "application/json")]
    body = {"model": "m", "messages": [user("Hi")]}
    with sidecar(route_to(stub[1]), pipeline=pipeline) as (url, _):
        first = ask(url, body=body, headers=headers)
        second = ask(url, body=body, headers=headers)

    assert (first[0], dict(first[1])["x-hhh-action"]) == (200, "flag")
    assert (second[0], json.loads(second[2])["error"]["code"]) == (429, "overloaded")
    assert len(stub[0].asked) == 1


TENANTS = """\
version: 1
name: tenants
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0.5
checkpoints:
  input: [{when: {tenant: [school-*]}, then: flag}, {then: allow}]
  output: [{then: allow}]
mode: enforce
on_error: closed
stream: {window_tokens: 3}
"""
