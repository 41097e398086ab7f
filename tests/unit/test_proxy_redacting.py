"""What a policy takes out of requests and answers, wire by wire, and what it leaves alone."""

import json
from typing import Any

import pytest

from hhh_router.interfaces.proxy.exchange import Piece
from hhh_router.interfaces.proxy.frames import Frames
from hhh_router.interfaces.proxy.redacting import FrameRedacting
from hhh_router.interfaces.proxy.wires.texts import rewritten
from hhh_router.pipeline import ChatDelta
from hhh_router.trace.spans import redacted

MAIL = "ann@mail.example"
MARK = "[redacted:email]"


def take_out(text: str) -> str:
    return redacted(text, ["emails"])


CHAT = {
    "model": "m",
    "odd": {"kept": MAIL},
    "tools": [{"type": "function", "function": {"name": "send", "description": f"to {MAIL}"}}],
    "messages": [
        {"role": "system", "content": f"Write to {MAIL}"},
        {
            "role": "user",
            "name": "x",
            "content": [{"type": "text", "text": MAIL}, {"type": "image_url", "image_url": {}}],
        },
        {
            "role": "assistant",
            "content": None,
            "refusal": MAIL,
            "tool_calls": [{"id": "c1", "function": {"name": "send", "arguments": json.dumps({"to": MAIL, "n": 1})}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": f"sent to {MAIL}"},
    ],
}
MESSAGES = {
    "system": [{"type": "text", "text": MAIL, "cache_control": {"type": "ephemeral"}}],
    "metadata": {"user_id": MAIL},
    "messages": [
        {"role": "user", "content": MAIL},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": f"{MAIL}?", "signature": "s"},
                {"type": "tool_use", "id": "t1", "name": "send", "input": {"to": [MAIL]}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": MAIL}]},
                {"type": "document", "source": {"type": "text", "data": MAIL}},
            ],
        },
    ],
}
RESPONSES = {
    "instructions": MAIL,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": MAIL}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": MAIL}]},
        {"type": "function_call", "call_id": "c", "name": "send", "arguments": json.dumps({"to": MAIL})},
        {"type": "function_call_output", "call_id": "c", "output": MAIL},
        {"type": "custom_tool_call", "call_id": "d", "name": "say", "input": f"tell {MAIL}"},
    ],
}


@pytest.mark.parametrize(
    ("wire", "body", "kept"),
    [
        ("chat", CHAT, 2),  # what nobody reads, and a definition of a tool
        ("messages", MESSAGES, 2),  # a user's id, and signed reasoning
        ("responses", RESPONSES, 0),
        ("responses", {"input": MAIL}, 0),
        ("completions", {"prompt": [MAIL, "x"], "suffix": MAIL}, 0),
        ("completions", {"prompt": MAIL}, 0),
    ],
)
def test_every_text_of_a_request_is_rewritten_and_nothing_else(wire: str, body: dict[str, Any], kept: int) -> None:
    before = json.dumps(body)

    after = json.dumps(rewritten(wire, body, take_out))

    assert after.count(MAIL) == kept
    assert after.count(MARK) == before.count(MAIL) - kept
    assert after.replace(MARK, MAIL) == before
    assert json.dumps(body) == before


@pytest.mark.parametrize("wire", ["chat", "messages", "responses", "completions"])
def test_a_request_without_a_find_is_the_same_object(wire: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "prompt": [1, 2]}

    assert rewritten(wire, body, take_out) is body


# -- answers ----------------------------------------------------------------------------------------------------------


def sent(wire: str, frames: list[bytes], kinds: tuple[str, ...] = ("emails",)) -> tuple[list[bytes], FrameRedacting]:
    """Every piece of an answer as it leaves."""
    redacting = FrameRedacting(wire)
    told: list[ChatDelta] = []
    for raw in frames:
        [frame] = Frames(max_bytes=10**6).feed(raw) if not raw.startswith(b"{") else [None]
        body = json.loads(raw) if frame is None else frame.body()
        told += redacting.push(ChatDelta(text="", raw={"pieces": (Piece(raw, body),)}), kinds)
    told += redacting.end()
    return [piece.raw for delta in told if delta.raw for piece in delta.raw["pieces"]], redacting


def event(body: Any, name: str | None = None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(body)}\n\n".encode()


def chunk(text: str | None, finish: str | None = None, **delta: Any) -> bytes:
    content = {} if text is None else {"content": text}
    logprobs = {"content": [{"token": text, "logprob": -0.1}]} if text else None
    choice = {"index": 0, "delta": {**content, **delta}, "finish_reason": finish, "logprobs": logprobs}
    return event({"id": "x", "choices": [choice]})


def said(frames: list[bytes]) -> str:
    bodies = [json.loads(f.split(b"data: ")[1]) for f in frames if b"data: {" in f]
    return "".join(b["choices"][0]["delta"].get("content") or "" for b in bodies if b.get("choices"))


def test_what_straddles_frames_is_taken_out_and_other_frames_pass_byte_for_byte() -> None:
    frames = [
        chunk("", role="assistant"), chunk("Write "), chunk("to ann"), chunk("@mail"), chunk(".exam"), chunk("ple "),
        chunk("today"), chunk(None, "stop"), b"data: [DONE]\n\n",
    ]  # fmt: skip

    out, redacting = sent("chat", frames)

    assert said(out) == f"Write to {MARK} today"
    assert [f for f in out if f in frames] == [frames[0], frames[1], *frames[6:]]
    assert len(out) == len(frames)
    assert b"ann" not in b"".join(out)  # nor in log-probabilities
    assert b"@mail" not in b"".join(out)
    assert redacting.counts == {"emails": 1}


def test_frames_leave_as_soon_as_they_are_final() -> None:
    redacting = FrameRedacting("chat")

    def push(raw: bytes) -> int:
        [frame] = Frames(max_bytes=10**6).feed(raw)
        told = redacting.push(ChatDelta(text="", raw={"pieces": (Piece(raw, frame.body()),)}), ("emails",))
        return sum(len(delta.raw["pieces"]) for delta in told if delta.raw)

    assert [push(chunk("Hello ")), push(chunk("ann")), push(chunk(" and ")), push(chunk("bob"))] == [1, 0, 2, 0]
    assert push(chunk(None, "stop")) == 2


def test_calls_of_tools_pass_untouched_and_in_order() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "send", "arguments": json.dumps({"to": MAIL})}}
    frames = [chunk("I write to ann"), chunk(None, tool_calls=[call]), chunk(None, "tool_calls")]

    out, _ = sent("chat", frames)

    assert out == frames


def test_reasoning_and_content_are_texts_of_their_own() -> None:
    frames = [
        chunk(None, reasoning_content="ask ann@mail"), chunk(None, reasoning_content=".example"), chunk("Ask ann@"),
        chunk("mail.example"), chunk(None, "stop"),
    ]  # fmt: skip

    out, redacting = sent("chat", frames)

    assert redacting.counts == {"emails": 2}
    assert MAIL.encode() not in b"".join(out)


WHOLES: dict[str, Any] = {
    "chat": {"choices": [{"index": 0, "message": {"content": f"Ask {MAIL}", "tool_calls": [{"to": MAIL}]}, "n": 1.5}]},
    "completions": {"choices": [{"index": 0, "text": f"Ask {MAIL}", "logprobs": {"tokens": ["Ask"]}}]},
    "messages": {
        "type": "message",
        "content": [{"type": "text", "text": MAIL}, {"type": "tool_use", "input": {"a": MAIL}}],
    },
    "responses": {
        "object": "response",
        "output": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "none"}]},
            {
                "type": "message",
                "content": [{"type": "output_text", "text": MAIL}, {"type": "refusal", "refusal": "no"}],
            },
            {"type": "function_call", "arguments": json.dumps({"to": MAIL})},
        ],
    },
}


@pytest.mark.parametrize("wire", WHOLES)
def test_a_whole_answer_has_its_texts_replaced_and_its_calls_as_they_were(wire: str) -> None:
    [out], redacting = sent(wire, [json.dumps(WHOLES[wire]).encode()])

    assert out.count(MARK.encode()) == 1
    assert out.count(MAIL.encode()) == (0 if wire == "completions" else 1)
    assert redacting.counts == {"emails": 1}
    assert b'"tokens"' not in out


@pytest.mark.parametrize("wire", WHOLES)
def test_a_whole_answer_without_a_find_passes_byte_for_byte(wire: str) -> None:
    raw = json.dumps(WHOLES[wire]).replace(MAIL, "Bob").encode() + b"\n"

    assert sent(wire, [raw])[0] == [raw]


def test_messages_are_redacted_block_by_block() -> None:
    def delta(index: int, text: str) -> bytes:
        body = {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}}
        return event(body, "content_block_delta")

    frames = [
        event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        delta(0, "ann@mail"), delta(0, ".example"), event({"type": "content_block_stop", "index": 0}),
        delta(1, "bob"), event({"type": "message_stop"}),
    ]  # fmt: skip

    out, redacting = sent("messages", frames)

    assert MAIL.encode() not in b"".join(out)
    assert out[1].startswith(b"event: content_block_delta\n")
    assert b"".join(out).count(MARK.encode()) == 1
    assert [out[0], *out[3:]] == [frames[0], *frames[3:]]
    assert redacting.counts == {"emails": 1}


def test_what_responses_tell_twice_is_taken_out_twice_and_counted_once() -> None:
    where = {"item_id": "m", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": f"Ask {MAIL}", "logprobs": [{"token": "ann"}]}
    item = {"id": "m", "type": "message", "content": [part]}
    frames = [
        event({"type": "response.output_text.delta", **where, "delta": "Ask ann@"}),
        event({"type": "response.output_text.delta", **where, "delta": "mail.example"}),
        event({"type": "response.output_text.done", **where, "text": f"Ask {MAIL}"}),
        event({"type": "response.content_part.done", **where, "part": part}),
        event({"type": "response.output_item.done", "output_index": 0, "item": item}),
        event({"type": "response.completed", "response": {"output": [item]}}),
    ]

    out, redacting = sent("responses", frames)

    assert len(out) == len(frames)
    assert MAIL.encode() not in b"".join(out)
    assert b'"ann"' not in b"".join(out)
    assert redacting.counts == {"emails": 1}
