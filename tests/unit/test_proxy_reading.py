"""What is read of conversations and of events, whatever shape they come in."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hhh_router.errors import UpstreamError
from hhh_router.interfaces.proxy.frames import Frames
from hhh_router.interfaces.proxy.wires import find_wire
from hhh_router.interfaces.proxy.wires.chat import ChatReply
from hhh_router.interfaces.proxy.wires.reading import readable
from hhh_router.types import Message

STREAM = (
    b": warming up\n\n"
    b'data: {"a": "\xc3\xa4"}\n\n'
    b"event: message\r\nid: 7\r\ndata: two\r\ndata: lines\r\n\r\n"
    b"data:tight\r\rretry: 5\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [None, '{"a": "ä"}', "two\nlines", "tight", None, "[DONE]"]


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in pairs]


def test_what_a_chat_template_would_refuse_is_put_in_its_order() -> None:
    odd = turns(
        ("system", "Be kind"),
        ("user", "a"),
        ("user", "b"),
        ("assistant", ""),
        ("assistant", "c"),
        ("system", "Be brief"),
        ("critic", "d"),
        ("tool", "e"),
        ("user", " "),
    )

    assert [(m.role, m.content) for m in readable(odd)] == [
        ("system", "Be kind"),
        ("user", "a\nb"),
        ("assistant", "c"),
        ("user", "Be brief\nd"),
        ("tool", "e"),
    ]


def test_no_text_of_any_turn_is_lost() -> None:
    said = turns(("critic", "one"), ("system", "two"), ("system", "three"), ("user", "four"))

    assert "\n".join(m.content for m in readable(said)).split("\n") == ["one", "two", "three", "four"]
    assert readable([]) == readable(turns(("user", ""))) == ()


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_wherever_the_network_cuts_them(cuts: list[int]) -> None:
    frames = Frames(max_bytes=1000)
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(places)]

    found = [frame for piece in pieces for frame in frames.feed(piece)]
    assert [frame.data for frame in found] == EVENTS
    assert b"".join(frame.raw for frame in found) == STREAM


def test_an_unfinished_event_is_no_event_and_is_not_lost() -> None:
    frames = Frames(max_bytes=100)

    assert list(frames.feed(b"data: half\n")) == []
    assert frames.rest() == b"data: half\n"


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 200, b"data: x\n" * 50])
def test_an_event_without_end_is_refused(piece: bytes) -> None:
    with pytest.raises(UpstreamError, match="more than 100 bytes"):
        list(Frames(max_bytes=100).feed(piece))


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UpstreamError, match="not UTF-8"):
        list(Frames(max_bytes=100).feed(b"data: \xff\n\n"))


EVENTS_THAT_SPEAK = {
    "content": ("chat", {"choices": [{"index": 0, "delta": {"content": "X"}}]}),
    "refusal": ("chat", {"choices": [{"index": 0, "delta": {"refusal": "X"}}]}),
    "reasoning": ("chat", {"choices": [{"index": 0, "delta": {"reasoning_content": "X"}}]}),
    "parts": ("chat", {"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "X"}]}}]}),
    "second choice": ("chat", {"choices": [{"index": 1, "delta": {"content": "X"}}]}),
    "tool": ("chat", {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": "X"}}]}}]}),
    "function": ("chat", {"choices": [{"index": 0, "delta": {"function_call": {"arguments": "X"}}}]}),
    "custom": ("chat", {"choices": [{"index": 0, "delta": {"tool_calls": [{"custom": {"input": "X"}}]}}]}),
    "text": ("completions", {"choices": [{"index": 0, "text": "X"}]}),
    "block": ("messages", {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "X"}}),
    "thinking": (
        "messages",
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "X"}},
    ),
    "input": (
        "messages",
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": "X"}},
    ),
    "delta": ("responses", {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "X"}),
    "only done": (
        "responses",
        {"type": "response.output_text.done", "output_index": 0, "content_index": 0, "text": "X"},
    ),
    "part added": (
        "responses",
        {
            "type": "response.content_part.added",
            "output_index": 0,
            "content_index": 0,
            "part": {"type": "output_text", "text": "X"},
        },
    ),
    "arguments": (
        "responses",
        {"type": "response.function_call_arguments.done", "output_index": 0, "arguments": "X"},
    ),
    "only the end": (
        "responses",
        {
            "type": "response.completed",
            "response": {"output": [{"type": "message", "content": [{"type": "output_text", "text": "X"}]}]},
        },
    ),
}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@pytest.mark.parametrize("name", EVENTS_THAT_SPEAK)
def test_whatever_brings_text_is_read_when_it_comes(name: str) -> None:
    wire_name, event = EVENTS_THAT_SPEAK[name]
    wire = find_wire("POST", PATHS.get(wire_name, f"/v1/{wire_name}"))
    assert wire is not None
    reply = wire.reply()

    assert "X" in reply.event(event)
    assert "X" in reply.text


UNREAD_EVENTS = {
    "audio": ("chat", {"choices": [{"index": 0, "delta": {"audio": {"data": "x"}}}]}, "choices[0].delta.audio"),
    "logprobs": ("chat", {"choices": [{"index": 0, "delta": {}, "logprobs": {"content": [1]}}]}, "choices[0].logprobs"),
    "citations": ("chat", {"choices": [], "citations": ["u"]}, "citations"),
    "whole in a stream": ("chat", {"choices": [{"index": 0, "message": {"content": "x"}}]}, "choices[0].message"),
    "citation": (
        "messages",
        {"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta"}},
        "content[0]: citations_delta",
    ),
    "image": (
        "responses",
        {"type": "response.image_generation_call.partial_image", "partial_image_b64": "x"},
        "response.image_generation_call.partial_image",
    ),
}


@pytest.mark.parametrize("name", UNREAD_EVENTS)
def test_what_brings_something_else_is_listed(name: str) -> None:
    wire_name, event, listed = UNREAD_EVENTS[name]
    wire = find_wire("POST", PATHS.get(wire_name, f"/v1/{wire_name}"))
    assert wire is not None
    reply = wire.reply()
    reply.event(event)

    assert list(reply.unread) == [listed]


@pytest.mark.parametrize(
    "event",
    [{"choices": "poison"}, {"choices": [{"index": "0"}]}, {"choices": [{"delta": "x"}]}, {"error": {"message": "m"}}],
)
def test_an_event_that_nobody_can_read_is_an_error(event: dict[str, object]) -> None:
    wire = find_wire("POST", "/v1/chat/completions")
    assert wire is not None
    reply = wire.reply()
    with pytest.raises(UpstreamError):
        reply.event(event)


def test_the_text_of_an_event_is_where_clients_look_for_it_and_the_rest_is_told_as_unread() -> None:
    # Whoever reads the kind words in "message" would clear the others, which clients show.
    reply = ChatReply()

    new = reply.event({"choices": [{"index": 0, "message": {"content": "kind"}, "delta": {"content": "unkind"}}]})

    assert (new, reply.text) == ("unkind", "unkind")
    assert list(reply.unread) == ["choices[0].message"]
