"""A candidate policy beside the one in force: what is recorded of it, who is told, and what is counted."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.errors import PolicyError, PolicyNotAllowed, SettingsError
from hhh_router.interfaces.sdk import HHHRouter
from hhh_router.interfaces.server.app import create_app
from hhh_router.pipeline import ChatFinished, Pipeline, PolicyStore
from hhh_router.pipeline.comparison import MOST_PAIRS, Comparisons
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.trace import JsonlSink
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, GuardRequest, Message, ReadRequest, Tool, Toolset

RULES = {
    "bomb": {"needs.harmless": 6.0}, "knife": {"needs.harmless": 0.5}, "poison": {"outcomes.unsafe": 6.0},
    "lie": {"outcomes.untruthful": 6.0},
}  # fmt: skip
SAID = "one two three four five six"


def write(folder: Path, name: str, *, refuse: float = 0.9, output: str = "", more: str = "", version: int = 1) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"version: {version}\nname: {name}\nweights: {{helpful: 1, harmless: 1, honest: 1}}\nstrength: 0.5\n"
        f'checkpoints:\n  input: [{{when: {{needs.harmless: ">= {refuse}"}}, then: refuse}}, {{then: allow}}]\n'
        f"  output: [{output}{{then: allow}}]\n{more}stream: {{window_tokens: 2}}\n"
    )
    return path


class Kept:
    def __init__(self) -> None:
        self.blocks: list[Metadata] = []

    def write(self, metadata: Metadata, request: Any, reply: str | None) -> None:
        self.blocks.append(metadata)


def made(ours: Path, theirs: Path | str, replies: Sequence[str] = (SAID,), **more: Any) -> tuple[Pipeline, Kept]:
    reader, sink = FakeReader(RULES), Kept()
    generator = FakeGenerator(list(replies), reader=reader)
    return fake_pipeline(ours, reader=reader, generator=generator, sinks=[sink], candidate=str(theirs), **more), sink


def chatted(pipeline: Pipeline, prompt: str = "Hello", *, stream: bool = False, **fields: Any) -> ChatFinished:
    async def run() -> Any:
        asked = ChatRequest(messages=(Message(role="user", content=prompt),), **fields)
        *_, last = [event async for event in pipeline.chat(asked, stream=stream)]
        return last

    return asyncio.run(run())


def compared(block: Metadata) -> list[tuple[str, str, str]]:
    assert block.candidate is not None
    return [(c.checkpoint, c.enforced, c.candidate) for c in block.candidate.compared]


def test_records_have_the_candidates_decisions_and_callers_do_not(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    pipeline, sink = made(write(tmp_path, "ours"), write(tmp_path, "theirs", refuse=0.6))
    pipeline.add_sink(JsonlSink(trace))

    done = chatted(pipeline, "a knife")

    [block] = sink.blocks
    assert done.text == SAID
    assert "candidate" not in done.metadata.as_json()
    assert done.metadata.recorded.as_json() == block.as_json()
    assert block.candidate is not None
    found = block.candidate
    assert (found.policy.name, found.relation, found.unknown) == ("theirs", "stricter", [])
    assert [(d.checkpoint, d.action) for d in block.candidate.decisions] == [("input", "refuse")]
    assert compared(block) == [("input", "allow", "refuse")]
    assert json.loads(trace.read_text())["hhh"]["candidate"]["relation"] == "stricter"


def test_callers_are_told_where_the_deployment_says_so(tmp_path: Path) -> None:
    pipeline, _ = made(write(tmp_path, "ours"), write(tmp_path, "theirs", refuse=0.6), candidate_told=True)

    assert chatted(pipeline, "a knife").metadata.as_json()["candidate"]["relation"] == "stricter"


def test_what_was_stopped_before_the_candidate_saw_it_is_unknown(tmp_path: Path) -> None:
    pipeline, sink = made(write(tmp_path, "ours", refuse=0.6), write(tmp_path, "theirs"))

    chatted(pipeline, "a knife")

    [block] = sink.blocks
    assert block.candidate is not None
    assert (block.candidate.relation, block.candidate.unknown) == ("looser", ["output: no reply was made"])


REST = "the rest of the reply, which was"
BLOCKS = '{when: {outcomes.unsafe: ">= 0.9"}, then: block}, '
AGAIN = '{when: {outcomes.untruthful: ">= 0.9"}, then: regenerate}, '
STEERS = '{when: {outcomes.untruthful: ">= 0.9"}, then: steer}, '


@pytest.mark.parametrize(
    ("ours", "theirs", "replies", "relation", "unknown"),
    [
        (
            BLOCKS,
            "",
            ["one poison three four five"],
            "looser",
            f"{REST} stopped after 2 tokens",
        ),
        ("", BLOCKS, ["one poison three four five"], "stricter", None),
        (BLOCKS, BLOCKS, ["one poison three four five"], "same", None),
        (
            AGAIN,
            "",
            ["one lie three four", SAID],
            "looser",
            f"{REST} made again after 2 tokens",
        ),
        ("", AGAIN, ["one lie three four"], "stricter", "what would follow its regenerate"),
        (AGAIN, AGAIN, ["one lie three four", SAID], "unknown", "what would follow its regenerate"),
        ("", STEERS, ["one lie three four"], "stricter", "what would follow its steer"),
        (BLOCKS, "", ["one two three poison"], "looser", None),
    ],
)
def test_where_the_two_part_the_rest_is_unknown(
    tmp_path: Path, ours: str, theirs: str, replies: list[str], relation: str, unknown: str | None
) -> None:
    pipeline, sink = made(write(tmp_path, "ours", output=ours), write(tmp_path, "theirs", output=theirs), replies)

    chatted(pipeline)

    found = sink.blocks[0].candidate
    assert found is not None
    assert found.relation == relation
    assert found.unknown == ([] if unknown is None else [f"output: {unknown}"])


def test_a_regenerate_that_comes_too_late_is_a_refusal_as_it_would_be(tmp_path: Path) -> None:
    pipeline, sink = made(write(tmp_path, "ours"), write(tmp_path, "theirs", output=AGAIN), ["one two three lie five"])

    chatted(pipeline, stream=True)

    assert compared(sink.blocks[0])[-1] == ("output", "allow", "refuse")


def test_calls_of_tools_are_compared_with_nothing_asked_as_allow(tmp_path: Path) -> None:
    tools = "  tool_call: [{when: {tool.name: [delete_*]}, then: block}, {then: allow}]\n"
    call = '<tool_call>{"name": "delete_all", "arguments": {}}</tool_call>'
    pipeline, sink = made(write(tmp_path, "ours"), write(tmp_path, "theirs", more=tools), [call])

    done = chatted(pipeline, tools=Toolset(tools=(Tool(name="delete_all"),)))

    assert [c.name for c in done.tool_calls] == ["delete_all"]
    assert ("tool_call", "allow", "block") in compared(sink.blocks[0])


def test_a_guarded_reply_is_compared_at_both_checkpoints(tmp_path: Path) -> None:
    pipeline, sink = made(write(tmp_path, "ours"), write(tmp_path, "theirs", refuse=0.6, output=BLOCKS))
    read = ReadRequest(messages=(Message(role="user", content="a knife"),), response="poison")

    [result] = asyncio.run(pipeline.guard([GuardRequest(read=read)]))

    assert str(result.action) == "allow"
    assert compared(sink.blocks[0]) == [("input", "allow", "refuse"), ("output", "allow", "block")]
    assert len(pipeline.parts.reader.calls) == 1  # type: ignore[attr-defined]


def test_nobody_can_pick_the_candidate_and_other_policies_have_none(tmp_path: Path) -> None:
    theirs = write(tmp_path, "theirs", refuse=0.6)
    pipeline, sink = made(write(tmp_path, "ours"), theirs, allowed_policies=("balanced",))

    for name in ("theirs", str(theirs)):
        with pytest.raises(PolicyNotAllowed):
            chatted(pipeline, policy=name)
    chatted(pipeline, policy="balanced")

    assert "theirs" not in pipeline.policies.names
    assert sink.blocks[0].candidate is None


def test_the_candidate_is_reloaded_with_the_rest_or_stays_as_it_was(tmp_path: Path) -> None:
    ours, theirs = write(tmp_path, "ours"), write(tmp_path, "theirs")
    store = PolicyStore(ours, candidate=theirs)

    write(tmp_path, "theirs", version=2)
    assert store.reload()
    assert store.candidate(str(theirs)).version == 2
    assert store.status.candidates["theirs"].startswith("2 ")

    write(tmp_path, "ours", version=2)
    theirs.write_text("version: nonsense\n")
    assert not store.reload()
    assert (store.default.version, store.candidate(str(theirs)).version) == (1, 2)


def test_a_candidate_that_the_door_could_not_carry_out_is_refused_at_start(tmp_path: Path) -> None:
    asks = write(tmp_path, "asks", output="{when: {tenant: [a]}, then: block}, ")

    with pytest.raises(PolicyError, match="tenant is not known"):
        PolicyStore("balanced", candidate=asks)


def test_the_sdk_takes_a_candidate_and_tells_of_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="its own candidate"):
        HHHRouter(base_url="http://127.0.0.1:1", candidate="strict")
    router = HHHRouter(pipeline=made(write(tmp_path, "ours"), "harmless-first", candidate_told=True)[0])

    block = router.guard("a knife").metadata

    assert block.candidate is not None
    assert block.candidate.policy.name == "harmless-first"
    router.close()


def test_a_server_counts_disagreements_and_tells_shares_with_intervals(tmp_path: Path) -> None:
    pipeline, _ = made(write(tmp_path, "ours"), write(tmp_path, "theirs", refuse=0.6))
    with TestClient(create_app(pipeline)) as served:
        served.post("/v1/guard", json={"items": [{"prompt": p} for p in ["bread"] * 30 + ["a knife"] * 10]})
        page = served.get("/metrics").text
        told = served.get("/v1/drift").json()

    assert 'hhh:policy_disagreements_total{candidate="refuse",checkpoint="input",enforced="allow"} 10.0' in page
    assert 'hhh:policy_comparisons_total{checkpoint="input"} 40.0' in page
    assert 'hhh:policy_compared_requests_total{relation="stricter"} 10.0' in page
    [pair] = told["comparisons"]
    assert (pair["policy"], pair["candidate"], pair["requests"]) == ("ours@1", "theirs@1", 40)
    assert pair["disagreements"] == [{"checkpoint": "input", "enforced": "allow", "candidate": "refuse", "n": 10}]
    figures = {f["name"]: f for f in told["figures"] if f["of"] == "ours@1 → theirs@1"}
    assert figures["candidate_stricter"]["value"] == figures["candidate_newly_stopped"]["value"] == 0.25
    assert 0 < figures["candidate_stricter"]["low"] < 0.25 < figures["candidate_stricter"]["high"] < 0.6
    assert figures["candidate_looser"]["value"] == 0.0


def test_pairs_are_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    pipeline, sink = made(write(tmp_path, "ours"), write(tmp_path, "theirs"))
    chatted(pipeline)
    counts = Comparisons()

    for i in range(MOST_PAIRS + 3):
        policy = sink.blocks[0].policy.model_copy(update={"hash": f"{i:016x}", "version": i})
        counts.add(sink.blocks[0].model_copy(update={"policy": policy}))

    assert [c.policy for c in counts.pairs] == [f"ours@{i}" for i in range(3, MOST_PAIRS + 3)]
