"""Whatever way a text is cut into pieces: what is found in it is what is found in the whole of it."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hhh_router.interfaces.proxy.exchange import Piece
from hhh_router.interfaces.proxy.frames import Frames
from hhh_router.interfaces.proxy.redacting import FrameRedacting
from hhh_router.pipeline import ChatDelta
from hhh_router.policy.schema import REDACTIONS
from hhh_router.trace.spans import Spans, find_spans, redacted, without

KEY = f"-----BEGIN RSA PRIVATE KEY-----\n{'MIIEabc' * 9}\n{'x1y2' * 12}\n-----END RSA PRIVATE KEY-----"
PLANTED = (
    "sk-aaaabbbbccccddddeeee", "password = hunter22", 'api_key: "quoted value"', "Authorization: Bearer abc.def-123",
    "AKIAABCDEFGHIJKLMNOP", f"eyJ{'a' * 40}.{'b' * 90}.{'c' * 43}", "https://me:pass@host.example/x", KEY,
    "someone.else@mail.example", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432",
    "192.168.0.17", "2001:db8::8a2e:370:7334", "+49 (30) 123-4567", "(555) 123-4567", "089/1234567",
)  # fmt: skip
PROSE = (
    "The key is ", "\n", " and then ", "token", ": ", "a - b", "“ü” ", "password", "https://", " " * 9, "Hi", ".",
    " 12", "-----BEGIN ", "-----", "漢字の文章", " my_", "authorization:", " bearer ", "AB12 ", "::", "@", "4111 ", "0",
    "'", '"', ",", "=",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PROSE + PLANTED), min_size=1, max_size=14).map("".join)
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=40)
KINDS = st.lists(st.sampled_from(REDACTIONS), min_size=1, unique=True)


def streamed(text: str, sizes: list[int], kinds: list[str]) -> str:
    """What leaves of a text that comes in pieces, piece by piece."""
    spans, sent, left, turn = Spans(kinds), "", 0, 0
    at = 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        spans.feed(text[at : at + size])
        at, turn = at + size, turn + 1
        sent += without(text[left : spans.final], spans.found, left)
        left = spans.final
    spans.end()
    return sent + without(text[left:], spans.found, left)


@given(TEXTS, SIZES, KINDS)
@example(f"Here: {KEY} done", [7], ["secrets"])
@example("4111 1111 1111 1111 2", [3], ["cards"])
@example("password = 'a", [1], ["secrets"])
def test_what_leaves_a_stream_is_what_leaves_the_whole(text: str, sizes: list[int], kinds: list[str]) -> None:
    assert streamed(text, sizes, kinds) == redacted(text, kinds)


@given(TEXTS, KINDS)
def test_spans_are_in_order_and_apart(text: str, kinds: list[str]) -> None:
    found = find_spans(text, kinds)

    assert all(span.start < span.end <= len(text) for span in found)
    assert all(one.end <= other.start for one, other in itertools.pairwise(found))


@given(TEXTS, SIZES)
def test_nothing_is_held_that_nobody_looks_for(text: str, sizes: list[int]) -> None:
    assert streamed(text, sizes, []) == text


@given(st.text(max_size=60), SIZES, KINDS)
def test_any_text_at_all(text: str, sizes: list[int], kinds: list[str]) -> None:
    assert streamed(text, sizes, kinds) == redacted(text, kinds)


# -- in the frames of a stream: the sidecar lets the same text out, frame for frame, on every wire -------------------


def chat(piece: str) -> Any:
    return {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}


def completions(piece: str) -> Any:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": None}]}


def messages(piece: str) -> Any:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}


def responses(piece: str) -> Any:
    return {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": piece}


def said(body: Any) -> str:
    if "choices" in body:
        choice = body["choices"][0]
        return str(choice["text"] if "text" in choice else choice["delta"]["content"])
    return str(body["delta"]["text"] if isinstance(body["delta"], dict) else body["delta"])


WIRES = {"chat": chat, "completions": completions, "messages": messages, "responses": responses}


@pytest.mark.parametrize("wire", WIRES)
@given(text=TEXTS, sizes=SIZES, bytes_=SIZES, kinds=KINDS)
def test_frames_tell_the_redacted_text(
    wire: str, text: str, sizes: list[int], bytes_: list[int], kinds: list[str]
) -> None:
    stream, at, turn = b"", 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        stream += f"data: {json.dumps(WIRES[wire](text[at : at + size]))}\n\n".encode()
        at, turn = at + size, turn + 1
    frames, redacting, out = Frames(max_bytes=10**6), FrameRedacting(wire), list[ChatDelta]()
    at = turn = 0
    while at < len(stream):  # as the network cuts it
        size = bytes_[turn % len(bytes_)]
        for frame in frames.feed(stream[at : at + size]):
            piece = Piece(frame.raw, frame.body())
            out += redacting.push(ChatDelta(text="", raw={"pieces": (piece,)}), kinds)
        at, turn = at + size, turn + 1
    out += redacting.end()

    pieces = [piece for delta in out if delta.raw for piece in delta.raw["pieces"]]
    told = "".join(said(json.loads(piece.raw.removeprefix(b"data: "))) for piece in pieces)
    assert told == redacted(text, kinds)
    assert len(pieces) == stream.count(b"\n\n")
