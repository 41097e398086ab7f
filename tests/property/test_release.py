"""Nothing leaves a stream that a cleared reading has not covered, however deltas and windows fall."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hhh_router.errors import ReaderError
from hhh_router.pipeline import ChatDelta, ChatFinished
from hhh_router.pipeline.release import Release
from hhh_router.protocols import Delta, Event, Finished, Planned, Planner, Steerer, Unread, Window
from hhh_router.testing import fake_pipeline, make_scores
from hhh_router.types import ChatRequest, Message

BAD = {"unsafe": {"outcomes.unsafe": 6.0}, "untruthful": {"outcomes.untruthful": 6.0}, "fine": {}}

Step = tuple[str, int]
deltas = st.tuples(st.just("delta"), st.integers(0, 4))
windows = st.tuples(st.sampled_from(["fine", "fine", "fine", "unsafe", "untruthful", "unread"]), st.integers(-3, 0))
scripts = st.lists(st.one_of(deltas, deltas, windows), max_size=25)


class Script:
    """Plays deltas and windows in any order; remembers which text was covered by a window that was fine.

    Each delta is one character, a private-use one of its own, so that any leak can be told.
    """

    def __init__(self, steps: Sequence[Step], *, ends: bool) -> None:
        self.steps = steps
        self.ends = ends
        self.cleared: list[set[str]] = []
        """One set for each attempt."""

    async def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int, steer: Steerer | None = None
    ) -> AsyncGenerator[Event, None]:
        attempt = len(self.cleared)
        cleared: set[str] = set()
        self.cleared.append(cleared)
        yield Planned(plan=planner(make_scores()), prompt_tokens=1, layers_run=30, read_ms=0.0)
        sent: list[tuple[int, str]] = []
        total = 0
        for i, (kind, n) in enumerate(self.steps):
            if kind == "delta":
                total += n
                text = chr(0xE000 + 100 * attempt + i)
                sent.append((total, text))
                yield Delta(text=text, tokens=n)
                continue
            covered = max(0, total + n)
            if kind == "unread":
                yield Unread(error=ReaderError("down"), completion_tokens=covered)
                continue
            if kind == "fine":
                cleared |= {text for upto, text in sent if upto <= covered}
            yield Window(scores=make_scores(BAD[kind], mode="both"), completion_tokens=covered, is_final=False)
        if self.ends:
            yield Finished(reason="stop", prompt_tokens=1, completion_tokens=total)


@given(steps=scripts, ends=st.booleans(), stream=st.booleans())
@settings(deadline=None, max_examples=300)
def test_no_uncleared_text_ever_leaves_a_stream(
    watchful: Callable[..., Path], steps: list[Step], ends: bool, stream: bool
) -> None:
    script = Script(steps, ends=ends)
    pipeline = fake_pipeline(_policy(watchful), generator=script)

    async def run() -> tuple[str, ChatFinished]:
        left = ""
        request = ChatRequest(messages=(Message(role="user", content="hi"),))
        async for event in pipeline.chat(request, stream=stream):
            if isinstance(event, ChatDelta):
                cleared = set().union(*script.cleared)
                assert {c for c in event.text if ord(c) >= 0xE000} <= cleared
                left += event.text
            last = event
        assert isinstance(last, ChatFinished)
        return left, last

    left, done = asyncio.run(run())

    assert left == done.text
    everything = "".join(
        chr(0xE000 + 100 * (len(script.cleared) - 1) + i) for i, s in enumerate(steps) if s[0] == "delta"
    )
    assert (done.finish_reason == "content_filter") == (done.refusal is not None)
    if done.refusal is None:
        assert left == everything
    elif not stream:
        assert left == done.refusal


_written: dict[str, Path] = {}


def _policy(watchful: Callable[..., Path]) -> Path:
    """Written once: hypothesis calls the test hundreds of times."""
    if "path" not in _written:
        _written["path"] = watchful()
    return _written["path"]


@given(st.lists(st.one_of(st.integers(0, 5), st.integers(-30, -1)), max_size=40))
def test_release_hands_out_each_piece_once_in_order_and_only_up_to_what_is_covered(steps: list[int]) -> None:
    release = Release()
    held: list[tuple[int, str]] = []
    out: list[str] = []
    total = 0

    for i, step in enumerate(steps):
        if step >= 0:
            total += step
            held.append((total, str(i)))
            release.hold(Delta(text=str(i), tokens=step))
        else:
            covered = -step
            cleared = [d.text for d in release.clear(covered_tokens=covered)]
            assert all(upto <= covered for upto, text in held if text in cleared)
            out += cleared

    assert release.tokens == total
    assert out + [d.text for d in release.take_all()] == [text for _, text in held]
    assert not release.uncleared
