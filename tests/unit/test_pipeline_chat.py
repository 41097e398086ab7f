import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from hhh_router.errors import (
    BackendTimeout,
    DeadlineExceeded,
    GeneratorError,
    InvalidRequest,
    PolicyNotAllowed,
    ReaderError,
    UpstreamError,
)
from hhh_router.pipeline import ChatDelta, ChatEvent, ChatFinished, ChatStarted, Pipeline
from hhh_router.protocols import Delta, Event, Finished, Planned, Planner, Steerer, TokenLogprob, Unread, Window
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline, make_scores
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, Message, ReadRequest, Sampling, Scores, Weights

Policies = Callable[..., Path]

RULES = {
    "bomb": {"needs.harmless": 6.0},
    "wonder": {"needs.honest": 6.0},
    "poison": {"outcomes.unsafe": 6.0},
    "lie": {"outcomes.untruthful": 6.0},
    "shrug": {"outcomes.unhelpful": 6.0},
}
SAID = "one two three four five six seven eight"


def ask(text: str = "Hello?", **fields: Any) -> ChatRequest:
    return ChatRequest(messages=(Message(role="user", content=text),), **fields)


async def run(pipeline: Pipeline, request: ChatRequest | None = None, *, stream: bool = True) -> list[ChatEvent]:
    return [event async for event in pipeline.chat(request or ask(), stream=stream)]


def finished(events: Sequence[ChatEvent]) -> ChatFinished:
    assert isinstance(events[0], ChatStarted)
    assert isinstance(events[-1], ChatFinished)
    assert "".join(e.text for e in events if isinstance(e, ChatDelta)) == events[-1].text
    return events[-1]


def decided(metadata: Metadata) -> list[tuple[str, str]]:
    return [(d.checkpoint, d.action) for d in metadata.decisions]


def speaking(policy: Path, *replies: str, **settings: Any) -> tuple[Pipeline, FakeGenerator]:
    reader = FakeReader(RULES)
    generator = FakeGenerator(list(replies) or SAID, reader=reader)
    return fake_pipeline(policy, reader=reader, generator=generator, **settings), generator


@pytest.mark.parametrize("stream", [True, False])
async def test_a_harmless_reply_arrives_whole_with_its_record(watchful: Policies, stream: bool) -> None:
    pipeline, generator = speaking(watchful())

    events = await run(pipeline, stream=stream)

    done = finished(events)
    assert done.text == SAID
    assert (done.finish_reason, done.refusal) == ("stop", None)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (1, 8)
    assert decided(done.metadata) == [("input", "allow"), ("output", "allow")]
    assert done.metadata.mixture == Weights.from_mapping(done.metadata.weights).mixture
    assert done.metadata.mode == "both"
    assert done.metadata.receipt.reply_sha256 is not None
    assert generator.requests[0].request_id == done.metadata.request_id
    assert {"read", "judge", "first_text", "total"} <= set(done.metadata.timing_ms)


async def test_the_first_event_tells_needs_weights_and_the_input_decision(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful())

    started = (await run(pipeline))[0]

    assert isinstance(started, ChatStarted)
    assert set(started.metadata.needs) == {"helpful", "harmless", "honest", "injection"}
    assert math.isclose(sum(started.metadata.weights.values()), 1.0)
    assert started.metadata.decisions[0].checkpoint == "input"
    assert started.metadata.receipt.reply_sha256 is None


async def test_an_input_refusal_stops_before_generation(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful())

    done = finished(await run(pipeline, ask("how to build a bomb")))

    assert (done.text, done.refusal, done.finish_reason) == ("Not that.", "Not that.", "content_filter")
    assert done.usage.completion_tokens == 0
    assert decided(done.metadata) == [("input", "refuse")]
    assert done.metadata.layers_run == 16
    assert done.metadata.mixture is None


async def test_an_escalation_without_a_message_still_tells_the_caller_something(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful())

    done = finished(await run(pipeline, ask("I wonder")))

    assert done.finish_reason == "content_filter"
    assert done.text
    assert done.metadata.action == "escalate"


async def test_a_stream_is_cut_where_a_window_fails_and_ends_with_the_message(watchful: Policies) -> None:
    pipeline, generator = speaking(watchful(), "a b c d poison f g h i")

    done = finished(await run(pipeline))

    assert done.text == "a b c\n\nCut."
    assert (done.refusal, done.finish_reason) == ("Cut.", "content_filter")
    assert decided(done.metadata) == [("input", "allow"), ("output", "allow"), ("output", "block")]
    assert done.usage.completion_tokens == 6
    assert generator.cancelled == 1


async def test_a_whole_reply_that_fails_is_replaced_by_the_message_alone(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful(), "a b c d poison f")

    done = finished(await run(pipeline, stream=False))

    assert done.text == "Cut."


async def test_the_last_window_is_judged_before_the_rest_leaves(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful(), "a b c d poison")

    done = finished(await run(pipeline))

    assert done.text == "a b c\n\nCut."


async def test_regenerate_runs_once_more_with_raised_floors(watchful: Policies) -> None:
    pipeline, generator = speaking(watchful(), "a lie", "the truth")

    done = finished(await run(pipeline))

    assert done.text == "the truth"
    assert len(generator.requests) == 2
    assert done.metadata.weights["honest"] >= 0.75 - 1e-6
    assert decided(done.metadata) == [
        ("input", "allow"),
        ("output", "regenerate"),
        ("input", "allow"),
        ("output", "allow"),
    ]
    assert done.metadata.action == "allow"
    assert done.usage.completion_tokens == 4


async def test_a_second_regenerate_becomes_a_refusal(watchful: Policies) -> None:
    pipeline, generator = speaking(watchful(), "a lie", "another lie", "never said")

    done = finished(await run(pipeline))

    assert (done.text, done.finish_reason) == ("No true answer.", "content_filter")
    assert len(generator.requests) == 2
    assert decided(done.metadata)[-1] == ("output", "refuse")
    assert "the second reply is no better" in done.metadata.decisions[-1].reason


async def test_regenerate_after_text_was_released_becomes_a_refusal_on_a_stream_only(watchful: Policies) -> None:
    late = ("a b c d lie", "a b c d e")
    streaming, streamed = speaking(watchful(), *late)
    holding, held = speaking(watchful(), *late)

    cut = finished(await run(streaming))
    whole = finished(await run(holding, stream=False))

    assert cut.text == "a b c\n\nNo true answer."
    assert "text was already released" in cut.metadata.decisions[-1].reason
    assert whole.text == "a b c d e"
    assert (len(streamed.requests), len(held.requests)) == (1, 2)


async def test_a_flag_lets_the_reply_through_and_stays_visible(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful(), "shrug")

    done = finished(await run(pipeline))

    assert done.text == "shrug"
    assert done.metadata.action == "flag"


@pytest.mark.parametrize("prompt", ["hello", "how to build a bomb"])
async def test_shadow_holds_nothing_back_and_stops_nothing_but_records_it(watchful: Policies, prompt: str) -> None:
    text = "a b c poison lie"
    pipeline, generator = speaking(watchful(mode="shadow"), text)

    events = await run(pipeline, ask(prompt))

    done = finished(events)
    assert (done.text, done.finish_reason, done.refusal) == (text, "stop", None)
    assert len(generator.requests) == 1
    assert done.metadata.action == ("block" if prompt == "hello" else "refuse")
    assert done.metadata.policy.mode == "shadow"
    assert done.metadata.mixture is not None


async def test_shadow_lets_text_out_before_its_window_is_read(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful(mode="shadow"), "first " + SAID)
    enforcing, _ = speaking(watchful(), "first " + SAID)

    shadow_started, enforced_started = (await run(pipeline))[0], (await run(enforcing))[0]

    assert isinstance(shadow_started, ChatStarted)
    assert isinstance(enforced_started, ChatStarted)
    assert shadow_started.metadata.mode == "prompt"
    assert enforced_started.metadata.mode == "both"


async def test_pinned_weights_are_held_within_the_bounds() -> None:
    pipeline = fake_pipeline("balanced")
    pinned = Weights(1.0, 0.0, 0.0, 0.0)

    done = finished(await run(pipeline, ask(weights=pinned)))

    assert done.metadata.weights["base"] == pytest.approx(0.6)
    assert done.metadata.weights["harmless"] >= 0.05 - 1e-6


# -- failures ---------------------------------------------------------------------------------------------------------


def breaking(error: Exception, *, after: int = 0) -> FakeGenerator:
    return FakeGenerator(SAID, fail_after=(after, error))


def unreadable(request: ReadRequest) -> Scores:
    raise ReaderError("the reading failed")


def not_finite(request: ReadRequest) -> Scores:
    return make_scores({"needs.harmless": math.nan}, mode=request.mode)


def window_not_finite(request: ReadRequest) -> Scores:
    return make_scores({"outcomes.unsafe": math.nan} if request.mode == "both" else {}, mode=request.mode)


def window_without_heads(request: ReadRequest) -> Scores:
    return (
        Scores(mode=request.mode, needs={}, outcomes={}, distance=0.1, tokens=1)
        if request.mode == "both"
        else make_scores()
    )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("generator", "checkpoint"),
    [
        (FakeGenerator(reader=FakeReader(unreadable)), "input"),
        (FakeGenerator(reader=FakeReader(not_finite)), "input"),
        (FakeGenerator(reader=FakeReader(window_not_finite)), "output"),
        (FakeGenerator(reader=FakeReader(window_without_heads)), "output"),
        (breaking(GeneratorError("out of memory")), "output"),
        (breaking(ReaderError("a head is gone")), "output"),
    ],
)
async def test_a_failure_is_refused_when_on_error_is_closed(
    watchful: Policies, generator: FakeGenerator, checkpoint: str, stream: bool
) -> None:
    pipeline = fake_pipeline(watchful(), generator=generator)

    done = finished(await run(pipeline, stream=stream))

    last = done.metadata.decisions[-1]
    assert (last.checkpoint, last.action, last.rule) == (checkpoint, "refuse", "on_error")
    assert done.finish_reason == "content_filter"
    assert done.text == done.refusal
    assert not any(word in done.text for word in ("one", "Paris"))


async def test_nothing_measured_is_told_as_nothing(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(), generator=FakeGenerator(reader=FakeReader(unreadable)))

    done = finished(await run(pipeline))

    assert (done.metadata.needs, done.metadata.posterior, done.metadata.outcomes) == ({}, {}, {})
    assert done.metadata.confidence == 0.0
    assert not done.metadata.calibration.calibrated
    assert not done.metadata.calibration.in_distribution


async def test_an_open_policy_goes_on_when_a_reading_makes_no_sense(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(on_error="open"), generator=FakeGenerator(SAID, reader=FakeReader(not_finite)))

    done = finished(await run(pipeline))

    assert done.text == SAID
    assert [d.rule for d in done.metadata.decisions] == ["on_error", "on_error"]
    assert done.metadata.action == "allow"


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
async def test_an_open_policy_raises_when_there_is_no_reply_to_go_on_with(watchful: Policies, mode: str) -> None:
    pipeline = fake_pipeline(watchful(on_error="open", mode=mode), generator=breaking(GeneratorError("gone"), after=4))

    with pytest.raises(GeneratorError, match="gone"):
        await run(pipeline)


async def test_a_broken_stream_leaks_nothing_that_was_not_cleared(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(), generator=breaking(GeneratorError("gone"), after=5))

    done = finished(await run(pipeline))

    assert done.text.startswith("one two three\n\n")
    assert "four" not in done.text


@pytest.mark.parametrize("error", [UpstreamError("down", status=500), BackendTimeout("slow"), InvalidRequest("odd")])
async def test_errors_that_are_not_the_guards_reach_the_caller(watchful: Policies, error: Exception) -> None:
    pipeline = fake_pipeline(watchful(), generator=breaking(error))

    with pytest.raises(type(error)):
        await run(pipeline)


async def test_a_deadline_ends_the_reply(watchful: Policies) -> None:
    generator = FakeGenerator(SAID, delay_s=5)
    pipeline = fake_pipeline(watchful(), generator=generator, request_timeout_s=0.05)

    with pytest.raises(BackendTimeout, match=r"no end of the reply after 0\.05 s"):
        await run(pipeline)

    assert generator.cancelled == 1


async def test_a_deadline_of_the_caller_is_told_as_the_callers(watchful: Policies) -> None:
    generator = FakeGenerator(SAID, delay_s=5)
    pipeline = fake_pipeline(watchful(), generator=generator)

    with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s, as this request asked"):
        await run(pipeline, ask(timeout_s=0.05))


async def test_an_upstreams_silence_before_the_callers_deadline_is_the_upstreams(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(), generator=breaking(BackendTimeout("silent")))

    with pytest.raises(BackendTimeout, match="silent") as caught:
        await run(pipeline, ask(timeout_s=60))

    assert not isinstance(caught.value, DeadlineExceeded)


async def test_closing_the_stream_cancels_the_generator(watchful: Policies) -> None:
    pipeline, generator = speaking(watchful())

    async with aclosing(pipeline.chat(ask())) as events:
        async for event in events:
            if isinstance(event, ChatDelta):
                break

    assert generator.cancelled == 1


async def test_cancelling_the_caller_cancels_the_generator(watchful: Policies) -> None:
    generator = FakeGenerator(SAID, delay_s=5)
    task = asyncio.create_task(run(fake_pipeline(watchful(), generator=generator)))
    await asyncio.sleep(0.02)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert generator.cancelled == 1


class Scripted:
    """A generator that follows no contract but its script; ``None`` asks the planner."""

    def __init__(self, *script: Event | None) -> None:
        self._script = script

    async def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int, steer: Steerer | None = None
    ) -> AsyncGenerator[Event, None]:
        for event in self._script:
            yield event or Planned(plan=planner(make_scores()), prompt_tokens=4, layers_run=30, read_ms=1.0)


END = Finished(reason="stop", prompt_tokens=4, completion_tokens=2)


def window(covered: int, *, is_final: bool = False) -> Window:
    return Window(scores=make_scores(mode="both"), completion_tokens=covered, is_final=is_final)


@pytest.mark.parametrize(
    "script",
    [
        (Delta(text="secret"), END),
        (None, Delta(text="secret"), END),
        (None, Delta(text="secret"), window(0, is_final=True), END),
        (None, Delta(text="secret", tokens=0), END),
        (None, window(9, is_final=True), Delta(text="secret"), END),
        (None, Delta(text="secret")),
        (None,),
        (),
    ],
)
async def test_a_generator_that_breaks_its_contract_releases_nothing(watchful: Policies, script: Sequence[Any]) -> None:
    pipeline = fake_pipeline(watchful(), generator=Scripted(*script))

    done = finished(await run(pipeline))

    assert done.metadata.decisions[-1].rule == "on_error"
    assert "secret" not in done.text


async def test_an_empty_reply_is_a_reply(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(), generator=Scripted(None, window(0, is_final=True), END))

    done = finished(await run(pipeline))

    assert (done.text, done.finish_reason) == ("", "stop")


async def test_text_free_chunks_wait_for_the_text_before_them_and_then_pass(watchful: Policies) -> None:
    call = Delta(text="", tokens=0, raw={"tool": 1})
    pipeline = fake_pipeline(
        watchful(), generator=Scripted(None, Delta(text="a"), call, window(1), call, window(1, is_final=True), END)
    )

    events = await run(pipeline)

    assert [(e.text, e.raw) for e in events if isinstance(e, ChatDelta)] == [
        ("a", None),
        ("", {"tool": 1}),
        ("", {"tool": 1}),
    ]


async def test_tokens_that_show_no_text_yet_make_no_pieces(watchful: Policies) -> None:
    script = (None, Delta(text=""), Delta(text="é"), window(2, is_final=True), END)

    events = await run(fake_pipeline(watchful(), generator=Scripted(*script)))

    assert [e.text for e in events if isinstance(e, ChatDelta)] == ["é"]
    assert finished(events).usage.completion_tokens == 2


@pytest.mark.parametrize(("on_error", "text"), [("closed", None), ("open", "ab")])
async def test_an_unread_window_is_for_on_error_to_decide(watchful: Policies, on_error: str, text: str | None) -> None:
    failed = Unread(error=ReaderError("too long"), completion_tokens=1)
    script = (None, Delta(text="a"), failed, Delta(text="b"), window(2, is_final=True), END)
    pipeline = fake_pipeline(watchful(on_error=on_error), generator=Scripted(*script))

    done = finished(await run(pipeline))

    assert (done.text == text) if text else (done.finish_reason == "content_filter")
    assert any(d.rule == "on_error" and "too long" in d.reason for d in done.metadata.decisions)


@pytest.mark.parametrize(
    ("on_error", "mode", "passes"),
    [("closed", "enforce", False), ("open", "enforce", True), ("closed", "shadow", True)],
)
async def test_an_unread_prompt_is_for_on_error_to_decide(
    watchful: Policies, on_error: str, mode: str, passes: bool
) -> None:
    script = (Unread(error=ReaderError("down")), Delta(text="a"), window(1, is_final=True), END)
    pipeline = fake_pipeline(watchful(on_error=on_error, mode=mode), generator=Scripted(*script))

    done = finished(await run(pipeline))

    assert (done.text == "a") is passes
    assert (done.finish_reason == "content_filter") is not passes


# -- log-probabilities ------------------------------------------------------------------------------------------------

TELLING = Sampling(top_logprobs=2)


def told(events: Sequence[ChatEvent]) -> list[str]:
    """Every token of which a piece told the log-probability."""
    return [t.token for e in events if isinstance(e, ChatDelta) for t in e.logprobs]


@pytest.mark.parametrize("stream", [True, False])
async def test_log_probabilities_come_with_their_text_and_whole_at_the_end(watchful: Policies, stream: bool) -> None:
    pipeline, _ = speaking(watchful())

    events = await run(pipeline, ask(sampling=TELLING), stream=stream)

    done = finished(events)
    assert done.logprobs is not None
    assert [t.token for t in done.logprobs] == told(events)
    assert "".join(told(events)) == SAID
    assert done.logprobs[0].logprob == done.logprobs[0].top_logprobs[0].logprob == -0.1
    assert [len(t.top_logprobs) for t in done.logprobs] == [2] * 8
    assert all(t.token == e.text for e in events if isinstance(e, ChatDelta) for t in e.logprobs)


async def test_nobody_is_told_log_probabilities_that_were_not_asked_for(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful())

    events = await run(pipeline)

    assert finished(events).logprobs is None
    assert told(events) == []


async def test_log_probabilities_of_withheld_text_never_leave(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful(), "a b c d poison f g h i")

    events = await run(pipeline, ask(sampling=TELLING))

    done = finished(events)
    assert done.text == "a b c\n\nCut."
    assert told(events) == ["a", " b", " c"]
    assert done.logprobs is not None
    assert [t.token for t in done.logprobs] == ["a", " b", " c"]
    assert [e.logprobs for e in events if isinstance(e, ChatDelta) and e.is_refusal] == [()]


@pytest.mark.parametrize(("text", "reply"), [("how to build a bomb", SAID), ("Hello?", "a b c d poison")])
async def test_a_refusal_that_stands_alone_has_no_log_probabilities(watchful: Policies, text: str, reply: str) -> None:
    pipeline, _ = speaking(watchful(), reply)

    events = await run(pipeline, ask(text, sampling=TELLING), stream=False)

    assert finished(events).logprobs is None
    assert told(events) == []


async def test_a_reply_made_anew_tells_nothing_of_the_first(watchful: Policies) -> None:
    pipeline, _ = speaking(watchful(), "a lie", "the truth")

    events = await run(pipeline, ask(sampling=TELLING))

    assert told(events) == ["the", " truth"]


async def test_tokens_told_after_the_text_ended_wait_for_its_last_reading(watchful: Policies) -> None:
    half = TokenLogprob(token="\\xc3", logprob=-1.0, bytes=(0xC3,))
    said = TokenLogprob(token="a", logprob=-1.0, bytes=(97,))
    script = [None, Delta(text="a", told=(said,)), Delta(text=""), Delta(text="", tokens=0, told=(half,))]
    read = [*script, window(2, is_final=True), END]

    cleared = await run(fake_pipeline(watchful(), generator=Scripted(*read)), ask(sampling=TELLING))
    unread = await run(fake_pipeline(watchful(), generator=Scripted(*script, END)), ask(sampling=TELLING))

    assert [(e.text, len(e.logprobs)) for e in cleared if isinstance(e, ChatDelta)] == [("a", 1), ("", 1)]
    assert told(unread) == []


# -- requests ---------------------------------------------------------------------------------------------------------


async def test_a_bad_request_reaches_no_generator(watchful: Policies) -> None:
    pipeline, generator = speaking(watchful())

    with pytest.raises(InvalidRequest):
        await run(pipeline, ask(""))
    with pytest.raises(PolicyNotAllowed):
        await run(pipeline, ask(policy="../../etc/passwd"))

    assert generator.requests == []


async def test_every_finished_request_is_written_to_every_sink_once(watchful: Policies) -> None:
    class Keeping:
        def __init__(self) -> None:
            self.kept: list[tuple[str, str | None]] = []

        def write(self, metadata: Metadata, request: Any, reply: str | None) -> None:
            self.kept.append((metadata.action, reply))

    sinks = (Keeping(), Keeping())
    reader = FakeReader(RULES)
    pipeline = fake_pipeline(watchful(), reader=reader, generator=FakeGenerator("fine", reader=reader), sinks=sinks)

    await run(pipeline)
    await run(pipeline, ask("bomb"))

    assert [s.kept for s in sinks] == [[("allow", "fine"), ("refuse", "Not that.")]] * 2


STEERING = """
version: 1
name: steering
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0
floors:
  - when: {needs.honest: ">= 0.5"}
    raise: {honest: 0.3}
checkpoints:
  input: [{then: allow}]
  output:
    - when: {outcomes.unhelpful: ">= 0.5"}
      then: block
    - when: {outcomes.unsafe: ">= 0.5"}
      then: steer
      raise: {harmless: 0.6}
    - when: {outcomes.untruthful: ">= 0.5"}
      then: steer
      raise: {honest: 0.2}
    - then: allow
mode: MODE
stream: {window_tokens: 2}
"""


def steering(tmp_path: Path, reply: str, mode: str = "enforce") -> Pipeline:
    path = tmp_path / "steering.yaml"
    path.write_text(STEERING.replace("MODE", mode))
    return speaking(path, reply)[0]


async def test_a_steer_raises_the_weights_of_what_follows_and_lets_the_reply_through(tmp_path: Path) -> None:
    pipeline = steering(tmp_path, "calm words poison here and more words yet")

    events = await run(pipeline)

    done = finished(events)
    assert done.text == "calm words poison here and more words yet"
    assert ("output", "steer") in decided(done.metadata)
    assert done.metadata.action == "steer"
    first, then = done.metadata.trajectory
    assert (first.from_token, then.from_token) == (0, 4)
    assert first.weights["harmless"] < 0.6
    assert then.weights["harmless"] == pytest.approx(0.6, abs=1e-6)
    assert done.metadata.weights == then.weights
    assert done.metadata.mixture == then.mixture
    started = events[0]
    assert isinstance(started, ChatStarted)
    assert started.metadata.weights == first.weights
    assert started.metadata.trajectory == []


async def test_a_later_window_can_raise_more_and_takes_nothing_back(tmp_path: Path) -> None:
    done = finished(await run(steering(tmp_path, "a lie is one and poison is two and then an end")))

    trajectory = done.metadata.trajectory
    assert [t.from_token for t in trajectory] == [0, 2, 6]
    assert trajectory[1].weights["honest"] >= 0.2 - 1e-6
    assert trajectory[2].weights["honest"] >= 0.2 - 1e-6
    assert trajectory[2].weights["harmless"] == pytest.approx(0.6, abs=1e-6)


async def test_the_last_window_steers_nothing(tmp_path: Path) -> None:
    done = finished(await run(steering(tmp_path, "calm words poison")))

    assert done.metadata.trajectory == []
    assert decided(done.metadata)[-1] == ("output", "steer")


async def test_after_a_steer_a_rule_may_still_cut(tmp_path: Path) -> None:
    done = finished(await run(steering(tmp_path, "some poison here shrug and more")))

    assert done.finish_reason == "content_filter"
    assert "more" not in done.text


async def test_a_shadow_policy_records_a_steer_and_changes_no_weights(tmp_path: Path) -> None:
    done = finished(await run(steering(tmp_path, "calm words poison here and more words yet", mode="shadow")))

    assert ("output", "steer") in decided(done.metadata)
    assert done.metadata.trajectory == []
