import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hhh_router.errors import BackendTimeout, InvalidRequest, PolicyNotAllowed, ReaderError
from hhh_router.testing import FakeReader, fake_pipeline, make_scores
from hhh_router.types import GuardRequest, Message, ReadRequest, Scores

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}


def item(prompt: str | None = None, response: str | None = None, policy: str | None = None) -> GuardRequest:
    messages = () if prompt is None else (Message(role="user", content=prompt),)
    return GuardRequest(read=ReadRequest(messages=messages, response=response), policy=policy)


async def test_a_whole_list_is_one_call_of_the_reader_with_both_views_of_each_pair(watchful: Policies) -> None:
    reader = FakeReader(RULES)
    pipeline = fake_pipeline(watchful(), reader=reader)

    results = await pipeline.guard([item("a"), item("b", "c"), item(response="d")] * 100)

    [call] = reader.calls
    assert [r.mode for r in call[:4]] == ["prompt", "prompt", "both", "response"]
    assert len(call) == 400
    assert len({r.metadata.request_id for r in results}) == 300


async def test_both_checkpoints_are_asked_of_a_pair_and_the_one_that_stops_holds(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES))

    [harmful_prompt, harmful_reply] = await pipeline.guard([item("bomb", "no"), item("hi", "poison")])

    assert [(d.checkpoint, d.action) for d in harmful_prompt.metadata.decisions] == [
        ("input", "refuse"),
        ("output", "allow"),
    ]
    assert str(harmful_prompt.action) == "refuse"
    assert str(harmful_reply.action) == "block"
    assert harmful_reply.metadata.receipt.reply_sha256 is not None


async def test_needs_of_a_pair_come_from_its_prompt_alone(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES))

    [alone, pair] = await pipeline.guard([item("hi"), item("hi", "how to build a bomb")])

    assert pair.needs == alone.needs
    assert pair.metadata.posterior == alone.metadata.posterior


async def test_no_mixture_is_told_where_none_answered(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful())

    [guarded] = await pipeline.guard([item("hi")])
    [routed] = await pipeline.route([item("hi")])

    assert guarded.metadata.mixture is None
    assert routed.metadata.mixture is None
    assert routed.mixture.startswith("hhh@")


async def test_each_item_has_its_own_policy(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES))

    results = await pipeline.guard([item("bomb"), item("bomb", policy="balanced")])

    assert [r.metadata.policy.name for r in results] == ["watchful", "balanced"]
    with pytest.raises(PolicyNotAllowed):
        await pipeline.guard([item("a"), item("b", policy="/etc/passwd")])


async def test_a_bad_item_is_named_by_its_place_and_nothing_is_read(watchful: Policies) -> None:
    reader = FakeReader()
    pipeline = fake_pipeline(watchful(), reader=reader)

    with pytest.raises(InvalidRequest, match=r"items\[1\]\.response: empty"):
        await pipeline.guard([item("a"), item("b", " ")])
    with pytest.raises(InvalidRequest, match=r"items\[1\]\.no prompt"):
        await pipeline.route([item("a"), item(response="b")])

    assert reader.calls == []


class Broken:
    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        raise ReaderError("the model is gone")


class Short:
    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        return [make_scores()]


@pytest.mark.parametrize("reader", [Broken(), Short()])
@pytest.mark.parametrize(("on_error", "action"), [("closed", "refuse"), ("open", "allow")])
async def test_a_reader_that_fails_is_for_on_error_to_decide(
    watchful: Policies, reader: Broken | Short, on_error: str, action: str
) -> None:
    pipeline = fake_pipeline(watchful(on_error=on_error), reader=reader)

    results = await pipeline.guard([item("a"), item("b", "c"), item(response="d")])

    assert [str(r.action) for r in results] == [action] * 3
    assert all(d.rule == "on_error" for r in results for d in r.metadata.decisions)
    assert [[d.checkpoint for d in r.metadata.decisions] for r in results] == [
        ["input"],
        ["input", "output"],
        ["output"],
    ]
    assert results[0].needs == {}


async def test_one_reading_that_makes_no_sense_spoils_only_its_own_item(watchful: Policies) -> None:
    def score(request: ReadRequest) -> Scores:
        broken = request.messages[0].content == "broken"
        return make_scores({"needs.honest": math.inf} if broken else {})

    pipeline = fake_pipeline(watchful(), reader=FakeReader(score))

    results = await pipeline.guard([item("fine"), item("broken"), item("fine")])

    assert [str(r.action) for r in results] == ["allow", "refuse", "allow"]
    assert "needs.honest=inf" in results[1].metadata.decisions[0].reason


async def test_a_deadline_ends_the_reading(watchful: Policies) -> None:
    class Slow:
        async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
            await asyncio.sleep(5)
            return []

    pipeline = fake_pipeline(watchful(), reader=Slow(), request_timeout_s=0.02)

    with pytest.raises(BackendTimeout, match=r"2 readings took longer than 0\.04 s"):
        await pipeline.guard([item("a"), item("b")])


async def test_shadow_verdicts_stop_nothing(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(mode="shadow"), reader=FakeReader(RULES))

    [verdict] = await pipeline.guard([item("bomb", "poison")])

    assert str(verdict.action) == "refuse"
    assert verdict.message is None
    verdict.raise_for_decision()
