"""Events survive whatever cuts the network makes, byte for byte."""

from hypothesis import given
from hypothesis import strategies as st

from hhh_router.interfaces.proxy.frames import Frames

ENDS = st.sampled_from(["\n", "\r\n"])
LINES = st.lists(st.sampled_from(["data: {}", "data:x", ": note", "event: a", "id: 1", "data: é"]), min_size=1)


@given(events=st.lists(st.tuples(LINES, ENDS), max_size=6), cuts=st.lists(st.integers(1, 40), max_size=60))
def test_every_byte_comes_out_once_and_in_order_however_it_is_cut(
    events: list[tuple[list[str], str]], cuts: list[int]
) -> None:
    raw = "".join(end.join(lines) + end + end for lines, end in events).encode()
    whole = list(Frames(max_bytes=10_000).feed(raw))
    frames = Frames(max_bytes=10_000)
    cut, at = [], 0
    for size in [*cuts, len(raw)]:
        cut += list(frames.feed(raw[at : at + size]))
        at += size

    assert b"".join(f.raw for f in cut) + frames.rest() == raw
    assert cut == whole
    assert [f.data for f in whole] == [
        "\n".join(line[5:].removeprefix(" ") for line in lines if line.startswith("data")) or None
        if any(line.startswith("data") for line in lines)
        else None
        for lines, _ in events
    ]
