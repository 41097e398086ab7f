"""What is remembered of requests, what may be said of them, and what becomes of it."""

import asyncio
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hhh_router.errors import InvalidRequest, SettingsError, Unavailable, UnknownRequest
from hhh_router.testing import fake_pipeline, make_scores
from hhh_router.trace.feedback import LABELS, Label, Labelled, Remembered, make_label
from hhh_router.trace.feedback_store import MAX_TEXT_BYTES, FeedbackStore, draw_requests, read_labelled, read_remembered
from hhh_router.types import ChatRequest, GuardRequest, Message, ReadRequest

ASKED = ReadRequest(messages=(Message(role="user", content="my key is sk-abcdefghijklmnopqrstuvwx, hello"),))


def seen(name: str, *, stopped: bool = False, reply: bool = False, **more: Any) -> Remembered:
    fields: dict[str, Any] = {
        "request_id": name, "time": 0.0, "policy": "p", "policy_version": 1, "policy_sha256": "ab" * 32,
        "bundle_sha256": "cd" * 32, "calibration_id": "cal-1", "heads_sha256": "ef" * 32, "dtype": "bfloat16",
        "action": "refuse" if stopped else "allow", "stopped": stopped, "prompt": make_scores(),
        "reply": make_scores(mode="both") if reply else None,
    }  # fmt: skip
    return Remembered(**{**fields, **more})


def harmful(name: str, value: bool = True, **more: Any) -> Label:
    return Label(request_id=name, labels={"harmful": value}, **more)


async def test_a_label_is_kept_with_the_scores_and_survives_a_restart(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite3")
    store.remember(seen("a", reply=True), ASKED, "hi")
    assert await store.label(harmful("a", by="ann", probability=0.25)) == "stored"
    await store.aclose()

    [row] = read_labelled(tmp_path / "f.sqlite3")
    assert row == Labelled(request=seen("a", reply=True), said=(harmful("a", by="ann", probability=0.25),))
    assert row.weight == 4
    again = FeedbackStore(tmp_path / "f.sqlite3")
    assert await again.label(harmful("a", by="ann", probability=0.25)) == "unchanged"
    await again.aclose()


async def test_a_second_word_of_a_labeller_replaces_the_first_and_another_labeller_is_another() -> None:
    store = FeedbackStore()
    store.remember(seen("a"), ASKED, None)

    assert await store.label(harmful("a", by="ann")) == "stored"
    assert await store.label(harmful("a", False, by="ann")) == "replaced"
    assert await store.label(harmful("a", by="bob")) == "stored"
    assert await store.label(harmful("a", by="bob"), key="theirs") == "stored"

    [row] = await store.labelled()
    assert [label.labels["harmful"] for label in row.said] == [False, True, True]
    assert row.verdict("harmful") is True
    assert row.weight is None
    await store.aclose()


async def test_a_tie_is_no_verdict() -> None:
    row = Labelled(request=seen("a"), said=(harmful("a", by="x"), harmful("a", False, by="y")))

    assert row.verdict("harmful") is None
    assert row.should_stop is None


async def test_no_text_is_kept_unless_the_deployment_says_so(tmp_path: Path) -> None:
    for content in ("hash", "full"):
        path = tmp_path / f"{content}.sqlite3"
        store = FeedbackStore(path, content=content)  # type: ignore[arg-type]
        store.remember(seen("a"), ASKED, "the reply")
        await store.aclose()

    assert next(read_remembered(tmp_path / "hash.sqlite3")).texts is None
    kept = next(read_remembered(tmp_path / "full.sqlite3")).texts
    assert kept is not None
    assert kept["reply"] == "the reply"
    assert "hello" in json.dumps(kept)
    assert b"sk-abcdefghijklmnopqrstuvwx" not in (tmp_path / "full.sqlite3").read_bytes()
    assert b"hello" not in (tmp_path / "hash.sqlite3").read_bytes()
    assert stat.S_IMODE((tmp_path / "hash.sqlite3").stat().st_mode) == 0o600


async def test_texts_beyond_reason_are_left_out_and_the_rest_is_kept(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite3", content="full")
    store.remember(seen("a"), ASKED, "x" * MAX_TEXT_BYTES)
    await store.aclose()

    assert next(read_remembered(tmp_path / "f.sqlite3")) == seen("a")


async def test_the_ring_forgets_the_oldest_but_never_what_is_labelled(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite3", most=50)
    store.remember(seen("first", time=1e9), ASKED, None)
    await store.label(harmful("first"))
    for i in range(300):
        store.remember(seen(f"r{i}", time=1e12), ASKED, None)
        await asyncio.sleep(0)
    await store.aclose()

    left = [r.request_id for r in read_remembered(tmp_path / "f.sqlite3")]
    assert left[0] == "first"
    assert left[-1] == "r299"
    assert 50 <= len(left) - 1 <= 100


async def test_what_is_too_old_is_forgotten(tmp_path: Path) -> None:
    now = [1000.0]
    store = FeedbackStore(tmp_path / "f.sqlite3", most=1, longest_s=10, clock=lambda: now[0])
    store.remember(seen("old", time=985.0), ASKED, None)

    with pytest.raises(UnknownRequest, match="old is not remembered"):
        await store.label(harmful("old"))
    await store.aclose()


async def test_a_second_request_of_the_same_id_does_not_take_the_place_of_the_first() -> None:
    store = FeedbackStore()
    store.remember(seen("a", stopped=True), ASKED, None)
    await store.label(harmful("a"))
    store.remember(seen("a", stopped=False), ASKED, None)

    [row] = await store.labelled()
    assert row.request.stopped
    await store.aclose()


async def test_two_processes_may_share_a_file(tmp_path: Path) -> None:
    one, other = FeedbackStore(tmp_path / "f.sqlite3"), FeedbackStore(tmp_path / "f.sqlite3")
    for i in range(50):
        one.remember(seen(f"a{i}"), ASKED, None)
        other.remember(seen(f"b{i}"), ASKED, None)
    said = [one.label(harmful(f"a{i}")) for i in range(50)] + [other.label(harmful(f"b{i}")) for i in range(50)]

    assert await asyncio.gather(*said) == ["stored"] * 100
    assert len(await one.labelled()) == 100
    await one.aclose()
    await other.aclose()


async def test_a_request_that_is_no_json_is_counted_and_the_others_are_kept() -> None:
    deep: Any = {}
    deep["loop"] = deep
    store = FeedbackStore(content="full")
    store.remember(seen("bad"), ChatRequest(messages=ASKED.messages, passthrough=deep), None)
    store.remember(seen("good"), ASKED, None)

    assert await store.label(harmful("good")) == "stored"
    assert store.failures == 1
    await store.aclose()


async def test_a_closed_store_says_so() -> None:
    store = FeedbackStore()
    await store.aclose()
    store.remember(seen("a"), ASKED, None)

    with pytest.raises(Unavailable):
        await store.label(harmful("a"))


def test_a_path_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but long enough to be taken for one " * 50)

    with pytest.raises(SettingsError, match="no feedback can be kept"):
        FeedbackStore(tmp_path / "text")
    with pytest.raises(SettingsError, match="no feedback can be read"):
        read_labelled(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingsError, match="cannot be kept there"):
        FeedbackStore(tmp_path / "folder")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 201}, "request_id"),
        ({"labels": {}}, "labels: no object"),
        ({"labels": ["harmful"]}, "labels: no object"),
        ({"labels": {"harmless": True}}, "labels.harmless: no label"),
        ({"labels": {"harmful": 1}}, "labels.harmful: neither"),
        ({"labels": {"harmful": None}}, "labels.harmful: neither"),
        ({"labels": {"refused_wrongly": True, "harmful": True}}, "refused_wrongly and harmful"),
        ({"labels": {"refused_wrongly": True, "passed_wrongly": False}}, "one or the other"),
        ({"by": "x" * 101}, "by: "),
        ({"by": "a\nb"}, "by: "),
        ({"sampled": "yes"}, "sampled: "),
        ({"sampled": True}, "probability: has to be told"),
        ({"probability": 0.5}, "probability: only goes with"),
        ({"sampled": True, "probability": 0}, "not between"),
        ({"sampled": True, "probability": float("nan")}, "not between"),
        ({"sampled": True, "probability": True}, "has to be told"),
        ({"sampled": True, "probability": 1.1}, "not between"),
    ],
)
def test_what_is_no_label_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_label(**{"request_id": "a", "labels": {"harmful": True}, **fields})

    assert said in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (seen("a"), "unsafe"),
        (seen("a", stopped=True), "passed_wrongly"),
        (seen("a"), "refused_wrongly"),
    ],
)
async def test_what_cannot_be_said_of_a_request_is_not_kept(request_: Remembered, name: str) -> None:
    store = FeedbackStore()
    store.remember(request_, ASKED, None)

    with pytest.raises(InvalidRequest, match=f"labels.{name}"):
        await store.label(Label(request_id="a", labels={name: True}))
    assert await store.labelled() == []
    await store.aclose()


@pytest.mark.parametrize(
    ("stopped", "labels", "should"),
    [
        (True, {"harmful": True}, True),
        (True, {"harmful": False}, False),
        (True, {"refused_wrongly": True}, False),
        (True, {"refused_wrongly": False, "harmful": False}, True),
        (False, {"passed_wrongly": True, "harmful": False}, True),
        (False, {"passed_wrongly": False, "harmful": True}, False),
        (False, {"honest": True}, None),
    ],
)
def test_a_verdict_on_the_decision_outweighs_the_label(stopped: bool, labels: dict[str, bool], should: bool) -> None:
    row = Labelled(request=seen("a", stopped=stopped), said=(Label(request_id="a", labels=labels),))

    assert row.should_stop is should


async def test_requests_are_drawn_with_the_stated_probabilities_whatever_was_said_of_them(tmp_path: Path) -> None:
    path = tmp_path / "f.sqlite3"
    store = FeedbackStore(path)
    for i in range(4000):
        store.remember(seen(f"r{i}", stopped=i % 4 == 0, time=1e12), ASKED, None)
    await store.label(harmful("r1"))
    await store.aclose()

    drawn = list(draw_requests(path, rate=0.1, rate_stopped=0.5, seed=3))

    assert drawn == list(draw_requests(path, rate=0.1, rate_stopped=0.5, seed=3))
    assert drawn != list(draw_requests(path, rate=0.1, rate_stopped=0.5, seed=4))
    stopped = [row for row in drawn if row["action"] == "refuse"]
    assert {row["probability"] for row in stopped} == {0.5}
    assert abs(len(stopped) - 500) < 4 * (1000 * 0.25) ** 0.5
    assert abs(len(drawn) - len(stopped) - 300) < 4 * (3000 * 0.09) ** 0.5
    everything = [row["request_id"] for row in draw_requests(path, rate=1, rate_stopped=1, seed=3)]
    assert "r1" in everything  # a complaint does not keep a request out of the draw
    again = FeedbackStore(path)
    await again.label(harmful("r1", probability=1.0))
    await again.aclose()
    assert "r1" not in [row["request_id"] for row in draw_requests(path, rate=1, rate_stopped=1, seed=3)]


async def test_the_pipeline_remembers_both_readings_of_chats_and_guards(watchful: Callable[..., Path]) -> None:
    store = FeedbackStore()
    pipeline = fake_pipeline(watchful())
    pipeline.remember_in(store)
    async for event in pipeline.chat(ChatRequest(messages=ASKED.messages, request_id="chat")):
        last = event
    both = ReadRequest(messages=ASKED.messages, response="hi")
    await pipeline.guard(
        [
            GuardRequest(read=both, request_id="both"),
            GuardRequest(read=ReadRequest(response="hi"), request_id="reply"),
            GuardRequest(read=ASKED, request_id="prompt"),
        ]
    )
    for name in ("chat", "both", "reply", "prompt"):
        await store.label(harmful(name))

    rows = {row.request.request_id: row.request for row in await store.labelled()}
    modes = {n: (r.prompt and r.prompt.mode, r.reply and r.reply.mode) for n, r in rows.items()}
    assert modes == {
        "chat": ("prompt", "both"), "both": ("prompt", "both"), "reply": (None, "response"), "prompt": ("prompt", None),
    }  # fmt: skip
    assert rows["chat"].policy_sha256 == last.metadata.receipt.policy_sha256  # type: ignore[union-attr]
    await pipeline.aclose()


def test_every_label_is_named_once() -> None:
    assert len(set(LABELS)) == len(LABELS)
