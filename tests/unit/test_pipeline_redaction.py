"""What our own answers leave without: window by window, with calls of tools, and when a reply is made anew."""

from pathlib import Path
from typing import Any

import pytest

from hhh_router.pipeline import ChatDelta, ChatFinished
from hhh_router.pipeline.redaction import TextRedacting
from hhh_router.pipeline.results import ChatStarted
from hhh_router.protocols import TokenLogprob
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.types import ChatRequest, Message, Sampling, ToolCall

MAIL = "ann.lee@mail.example"
HEAD = "version: 1\nname: t\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\n"


def deployed(tmp_path: Path, output: str, replies: Any, *, mode: str = "enforce") -> Any:
    file = tmp_path / "p.yaml"
    lines = (
        f"checkpoints:\n  input: [{{then: allow}}]\n  output: {output}\nmode: {mode}\nstream: {{window_tokens: 2}}\n"
    )
    file.write_text(HEAD + lines)
    reader = FakeReader({"poison": {"outcomes.unsafe": 6.0}, "wrong": {"outcomes.untruthful": 6.0}})
    return fake_pipeline(policy=str(file), reader=reader, generator=FakeGenerator(replies, reader=reader))


async def chat(pipeline: Any, *, stream: bool = True, **sampling: Any) -> tuple[str, ChatFinished, list[ChatDelta]]:
    request = ChatRequest(messages=(Message(role="user", content="Hi"),), sampling=Sampling(**sampling))
    events = [event async for event in pipeline.chat(request, stream=stream)]
    pieces = [event for event in events if isinstance(event, ChatDelta)]
    assert isinstance(events[0], ChatStarted)
    return "".join(piece.text for piece in pieces), events[-1], pieces


@pytest.mark.parametrize("stream", [True, False])
async def test_a_find_is_replaced_and_counted_and_the_reply_s_record_has_what_left(
    tmp_path: Path, stream: bool
) -> None:
    pipeline = deployed(tmp_path, "[{then: allow, redact: [emails]}]", f"Write to {MAIL} or to bob@b.example .")

    text, done, _ = await chat(pipeline, stream=stream)

    assert text == done.text == "Write to [redacted:email] or to [redacted:email] ."
    assert done.metadata.redacted == {"output": {"emails": 2}}


async def test_what_a_later_window_redacts_is_looked_for_from_there_on(tmp_path: Path) -> None:
    rules = "[{when: {text: careful}, then: flag, redact: [emails]}, {then: allow}]"
    pipeline = deployed(tmp_path, rules, "ask a@a.example now be careful and ask b@b.example now")

    text, done, _ = await chat(pipeline)

    assert text == "ask a@a.example now be careful and ask [redacted:email] now"
    assert done.metadata.redacted == {"output": {"emails": 1}}


async def test_rules_see_the_text_as_the_model_said_it(tmp_path: Path) -> None:
    rules = "[{when: {text: 'mail.example .{0,9}poison'}, then: block, message: Cut.}, {then: allow, redact: [emails]}]"
    pipeline = deployed(tmp_path, rules, f"one {MAIL} two poison three")

    text, done, _ = await chat(pipeline)

    assert done.refusal == "Cut."
    assert MAIL not in text


async def test_a_reply_that_is_made_anew_is_redacted_from_its_start(tmp_path: Path) -> None:
    rules = "[{when: {outcomes.untruthful: '>= 0.9'}, then: regenerate}, {then: allow, redact: [emails]}]"
    pipeline = deployed(tmp_path, rules, ["wrong ann@a.example", f"right {MAIL} it is"])

    text, done, _ = await chat(pipeline, stream=False)

    assert text == "right [redacted:email] it is"
    assert done.metadata.redacted == {"output": {"emails": 1}}


async def test_in_shadow_mode_nothing_is_taken_out(tmp_path: Path) -> None:
    pipeline = deployed(tmp_path, "[{then: allow, redact: [emails]}]", f"Write to {MAIL} now", mode="shadow")

    text, done, _ = await chat(pipeline)

    assert text == f"Write to {MAIL} now"
    assert done.metadata.redacted == {}


async def test_log_probabilities_do_not_tell_what_was_taken_out(tmp_path: Path) -> None:
    pipeline = deployed(tmp_path, "[{then: allow, redact: [emails]}]", f"Write to {MAIL} now")

    _, done, pieces = await chat(pipeline, top_logprobs=1)

    assert [told.token for piece in pieces for told in piece.logprobs] == ["Write", " to", " now"]
    assert MAIL not in repr(done.logprobs)


def test_a_call_of_a_tool_ends_the_text_before_it_and_keeps_its_place() -> None:
    redacting, call = TextRedacting(), ToolCall(id="c", name="send", arguments='{"to": "ann@a.example"}')

    told = redacting.push(ChatDelta(text="to ann@"), ["emails"])
    told += redacting.push(ChatDelta(text="", tool_calls=(call,)), ["emails"])
    told += redacting.push(ChatDelta(text="a.example "), ["emails"])
    told += redacting.end()

    assert [(piece.text, piece.tool_calls) for piece in told] == [("to ann@", ()), ("", (call,)), ("a.example ", ())]


def test_pieces_without_a_find_are_the_same_objects() -> None:
    redacting = TextRedacting()
    first = ChatDelta(text="Hello ", logprobs=(TokenLogprob(token="Hello", logprob=-1.0, bytes=None),))

    assert redacting.push(first, ["emails"]) == [first]
    assert redacting.push(first, ["emails"])[0] is first
