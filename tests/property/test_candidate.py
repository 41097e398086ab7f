"""A candidate never changes what a caller gets, nor what is asked of the model; a record decides again as it was."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from hhh_router.calibration import Calibrators
from hhh_router.errors import PolicyError
from hhh_router.pipeline import ChatEvent
from hhh_router.pipeline.again import decide_again
from hhh_router.policy import load_policy, parse_policy
from hhh_router.policy.schema import SEVERITY
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.trace.block import Metadata
from hhh_router.types import Action, ChatRequest, GuardRequest, Message, ReadRequest

WORDS = {
    "bomb": {"needs.harmless": 6.0}, "knife": {"needs.harmless": 0.5}, "wonder": {"needs.honest": 6.0},
    "poison": {"outcomes.unsafe": 6.0}, "rust": {"outcomes.unsafe": 0.5}, "lie": {"outcomes.untruthful": 6.0},
}  # fmt: skip
text = st.lists(st.sampled_from([*WORDS, "bread", "tea"]), min_size=1, max_size=9).map(" ".join)
condition = st.sampled_from(
    ["needs.harmless", "needs.honest", "outcomes.unsafe", "outcomes.untruthful", "confidence", "weights.harmless"]
)


@st.composite
def rules(draw, checkpoint):
    then = {"input": ["flag", "refuse", "block", "escalate"]}.get(
        checkpoint, ["flag", "steer", "regenerate", "refuse", "block"]
    )
    lines = []
    for _ in range(draw(st.integers(0, 3))):
        when = f'{{{draw(condition)}: "{draw(st.sampled_from([">=", "<"]))} {draw(st.sampled_from([0.3, 0.6, 0.9]))}"}}'
        chosen = draw(st.sampled_from(then))
        more = ", raise: {harmless: 0.5}" if chosen in ("steer", "regenerate") else ""
        lines.append(f"    - {{when: {when}, then: {chosen}{more}}}")
    return "\n".join([*lines, "    - {then: allow}"])


@st.composite
def policies(draw, name):
    found = (
        f"version: 1\nname: {name}\nweights: {{helpful: {draw(st.integers(1, 4))}, harmless: 1, honest: 1}}\n"
        f"strength: 0.7\non_error: {draw(st.sampled_from(['open', 'closed']))}\n"
        f"mode: {draw(st.sampled_from(['enforce', 'enforce', 'shadow']))}\nstream: {{window_tokens: 2}}\n"
        f"checkpoints:\n  input:\n{draw(rules('input'))}\n  output:\n{draw(rules('output'))}\n"
    )
    try:
        parse_policy(found)
    except PolicyError:
        reject()  # a rule that another leaves nothing to, say
    return found


class Kept:
    """Holds records."""

    def __init__(self) -> None:
        self.blocks: list[Metadata] = []

    def write(self, metadata: Metadata, request: Any, reply: str | None) -> None:
        self.blocks.append(metadata)


def plain(block: Metadata) -> dict[str, Any]:
    return {k: v for k, v in block.as_json().items() if k != "timing_ms"}


def comparable(event: ChatEvent) -> tuple[Any, ...]:
    bare = getattr(event, "metadata", None)
    return (type(event), None if bare is None else plain(bare), replace(event, metadata=None) if bare else event)


def told(policy: Path, candidate: Path | None, prompt: str, replies: list[str], *, stream: bool):
    reader, sink = FakeReader(WORDS), Kept()
    generator = FakeGenerator(replies, reader=reader)
    more = {} if candidate is None else {"candidate": str(candidate)}
    pipeline = fake_pipeline(policy, reader=reader, generator=generator, sinks=[sink], **more)
    messages = (Message(role="user", content=prompt),)

    async def run() -> tuple[Any, ...]:
        asked = ChatRequest(messages=messages, request_id="r")
        events = [comparable(e) async for e in pipeline.chat(asked, stream=stream)]
        [guarded] = await pipeline.guard(
            [GuardRequest(read=ReadRequest(messages=messages, response=replies[0]), request_id="g")]
        )
        return events, plain(guarded.metadata)

    return asyncio.run(run()), reader.calls, sink.blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("policies")


@settings(max_examples=60)
@given(policies("ours"), policies("theirs"), text, st.lists(text, min_size=1, max_size=2), st.booleans())
def test_a_candidate_changes_no_event_and_no_reading(folder, ours, theirs, prompt, replies, stream):
    policy, candidate = folder / "ours.yaml", folder / "theirs.yaml"
    policy.write_text(ours)
    candidate.write_text(theirs)

    alone, read_alone, _ = told(policy, None, prompt, replies, stream=stream)
    beside, read_beside, blocks = told(policy, candidate, prompt, replies, stream=stream)

    assert beside == alone
    assert read_beside == read_alone
    assert all(b.candidate is not None for b in blocks)


@settings(max_examples=40)
@given(policies("ours"), text, st.lists(text, min_size=1, max_size=2), st.booleans())
def test_a_policy_that_is_its_own_candidate_is_never_stricter_or_looser(folder, ours, prompt, replies, stream):
    policy = folder / "own.yaml"
    policy.write_text(ours)

    _, _, blocks = told(policy, policy, prompt, replies, stream=stream)

    for block in blocks:
        assert block.candidate.relation in ("same", "unknown")
        assert all(c.enforced == c.candidate for c in block.candidate.compared)
        strictest = max((Action(d.action) for d in block.candidate.decisions), key=SEVERITY.__getitem__)
        if strictest.stops:
            assert any(Action(d.action).stops for d in block.decisions)


def said(decisions):
    return [(d.checkpoint, str(d.action), d.rule) for d in decisions]


@settings(max_examples=60)
@given(policies("ours"), policies("theirs"), text, st.lists(text, min_size=1, max_size=2), st.booleans())
def test_records_decide_again_as_they_were_and_as_their_candidate(folder, ours, theirs, prompt, replies, stream):
    policy, candidate = folder / "ours.yaml", folder / "theirs.yaml"
    policy.write_text(ours)
    candidate.write_text(theirs)

    _, _, blocks = told(policy, candidate, prompt, replies, stream=stream)

    for kept in blocks:
        block = Metadata.model_validate_json(json.dumps(kept.as_json()))  # as a file has it
        again = decide_again(block, load_policy(policy), Calibrators.none())
        other = decide_again(block, load_policy(candidate), Calibrators.none(), own=False)
        assert (said(again.decisions), again.unknown) == (said(block.decisions), ())
        assert said(other.decisions) == said(block.candidate.decisions)
        assert bool(other.unknown) == bool(block.candidate.unknown)
