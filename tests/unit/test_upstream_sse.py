from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hhh_router.errors import UpstreamError
from hhh_router.upstream.sse import EventParser

STREAM = (
    b": warming up\n\n"
    b'data: {"a": "\xc3\xa4"}\n\n'
    b"event: message\r\nid: 7\r\ndata: two\r\ndata: lines\r\n\r\n"
    b"data:tight\r\rretry: 5\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = ['{"a": "ä"}', "two\nlines", "tight", "[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_wherever_the_network_cuts_them(cuts: list[int]) -> None:
    parser = EventParser()
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(places)]

    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_an_unfinished_event_is_no_event() -> None:
    assert list(EventParser().feed(b"data: half\n")) == []


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 200, b"data: x\n" * 50])
def test_an_event_without_end_is_refused(piece: bytes) -> None:
    with pytest.raises(UpstreamError, match="more than 100 bytes"):
        list(EventParser(max_bytes=100).feed(piece))


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UpstreamError, match="not UTF-8"):
        list(EventParser().feed(b"data: \xff\n\n"))
