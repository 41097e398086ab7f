"""What ends a row, what never gets one, and that the others do not notice."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hhh_router.bundle import Bundle
from hhh_router.errors import (
    BackendTimeout,
    ContextTooLong,
    GeneratorError,
    HHHRouterError,
    InvalidRequest,
    Overloaded,
    Quarantined,
)
from hhh_router.model import memory
from hhh_router.model.batcher import Batcher
from hhh_router.model.grammar import Following
from hhh_router.model.memory import KEPT_BYTES
from hhh_router.model.rows import ChatJob
from hhh_router.protocols import Event, Finished
from hhh_router.types import Scores, Weights

from .test_batcher import Engine, ask, check_same, engine, many
from .test_one_pass import planner

pytestmark = pytest.mark.integration
__all__ = ["engine"]  # the fixture


def test_a_poisoned_row_fails_alone_and_leaves_nothing_behind(engine: Engine) -> None:
    asked = many(4)
    for request, weights in asked[:3]:
        engine.put(request, weights)
    for _ in range(3):
        engine.batcher.turn()
    slot = next(i for i, row in enumerate(engine.batcher._rows) if row.job.request.request_id == "r1")
    with torch.inference_mode():
        for keys, values in engine.batcher._slots._layers.values():
            keys[slot, :, 0] = torch.nan
            values[slot, :, 0] = torch.nan
    engine.put(*asked[3])
    engine.finish()

    assert isinstance(engine.found["r1"][-1], HHHRouterError)
    for request, weights in (asked[0], asked[2], asked[3]):
        check_same(engine.found[request.request_id], engine.alone(request, weights))
    engine.put(ask("after", "after"), asked[0][1])
    engine.finish()
    check_same(engine.found["after"], engine.alone(ask("after", "x"), asked[0][1]))


def test_a_step_that_fails_costs_only_the_row_whose_fault_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = many(3)
    for request, weights in asked:
        engine.put(request, weights)
    whole = Batcher._pass

    def failing(batcher: Batcher, slots: Sequence[int]) -> object:
        if any(batcher._rows[i].job.request.request_id == "r1" and batcher._rows[i].drawn == 3 for i in slots):
            raise RuntimeError("boom")
        return whole(batcher, slots)

    monkeypatch.setattr(Batcher, "_pass", failing)
    engine.finish()

    (error,) = [e for e in engine.found["r1"] if isinstance(e, Exception)]
    assert isinstance(error, Quarantined)
    assert "boom" in error.message
    for request, weights in (asked[0], asked[2]):
        check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_a_failing_planner_ends_its_own_request(engine: Engine) -> None:
    request, weights = many(1)[0]
    engine.put(request, weights)
    events: list[Event | Exception | None] = []

    def broken(scores: object) -> None:
        raise RuntimeError("no plan")

    engine.batcher.put(
        ChatJob(request=ask("x", "x"), planner=broken, window_tokens=5, tell=events.append, end=events.append)  # type: ignore[arg-type]
    )
    engine.finish()

    assert [type(e) for e in events] == [GeneratorError]
    check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_requests_wait_for_room_and_none_is_forgotten(tiny: Bundle, tmp_path: Path) -> None:
    engine = Engine(tiny, tmp_path, max_rows=8, max_tokens=200)
    asked = many(10)
    most = 0
    for request, weights in asked:
        engine.put(request, weights)
    while engine.batcher.busy:
        engine.batcher.turn()
        rows = engine.batcher._rows
        most = max(most, len(rows))
        assert len(rows) * max((r.job.need for r in rows), default=0) <= 200
        assert engine.batcher.load.slot_tokens <= 128 * 8  # eight rows are let in, each in whole steps of room

    assert 1 < most < 8
    for request, weights in asked:
        check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_what_can_never_fit_is_refused_at_once(tiny: Bundle, tmp_path: Path) -> None:
    engine = Engine(tiny, tmp_path, max_tokens=100)
    engine.put(ask("x" * 600, "long"), Weights(1, 0, 0, 0))
    engine.put(ask("x", "greedy", max_tokens=400), Weights(1, 0, 0, 0))

    assert not engine.batcher.busy
    for name, said in (("long", "fills|window"), ("greedy", "room for 100")):
        (error,) = engine.found[name]
        assert isinstance(error, ContextTooLong)
        with pytest.raises(ContextTooLong, match=said):
            raise error


def test_a_bias_on_a_token_that_is_none_is_refused_at_once(engine: Engine) -> None:
    vocabulary = engine.batcher.reader.stack.config.vocab_size
    engine.put(ask("x", "last", logit_bias={vocabulary - 1: 1.0}), Weights(1, 0, 0, 0))
    engine.put(ask("x", "beyond", logit_bias={3: 1.0, vocabulary: 1.0}), Weights(1, 0, 0, 0))

    (error,) = engine.found["beyond"]
    assert isinstance(error, InvalidRequest)
    assert f"token {vocabulary}" in error.message
    engine.finish()
    assert engine.found["last"][-1] is None


def test_room_that_long_requests_needed_is_let_go_once_nothing_is_under_way(engine: Engine) -> None:
    engine.put(ask("x" * 250, "long", max_tokens=200, logit_bias={256: -100.0}), Weights(0, 1, 0, 0))
    engine.batcher.turn()
    assert engine.batcher.load.slot_tokens >= 450

    engine.finish()

    assert engine.batcher.load.slot_tokens == 0
    engine.put(ask("hi", "short", max_tokens=4), Weights(0, 1, 0, 0))
    engine.batcher.turn()
    assert 0 < engine.batcher.load.slot_tokens < 450


def test_a_full_queue_turns_the_next_one_away_and_says_when_to_come_back(tiny: Bundle, tmp_path: Path) -> None:
    engine = Engine(tiny, tmp_path, max_rows=1, max_waiting=2)
    asked = many(4)
    for request, weights in asked:
        engine.put(request, weights)
    engine.finish()

    (error,) = engine.found["r3"]
    assert isinstance(error, Overloaded)
    assert "2 chats" in error.message
    assert error.retry_after_s is not None
    assert error.retry_after_s >= 1
    for request, weights in asked[:3]:
        check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_a_queue_is_bounded_by_the_tokens_of_its_prompts_too(tiny: Bundle, tmp_path: Path) -> None:
    engine = Engine(tiny, tmp_path, max_rows=1, max_waiting_tokens=400)
    for name in ("a", "b", "c"):
        engine.put(ask("x" * 150, name, max_tokens=2), Weights(1, 0, 0, 0))
    engine.put(ask("x", "small", max_tokens=2), Weights(1, 0, 0, 0))
    engine.finish()

    (error,) = engine.found["c"]
    assert isinstance(error, Overloaded)
    assert "tokens of prompts" in error.message
    assert [engine.found[n][-1] for n in ("a", "b", "small")] == [None] * 3


def test_a_wait_past_the_deadline_is_refused_at_once(engine: Engine) -> None:
    engine.batcher.max_rows = 1
    for request, weights in many(3):
        engine.put(request, weights)
    engine.batcher._pace.row_s = 100.0
    engine.put(replace(ask("hi", "hurried"), timeout_s=20), Weights(1, 0, 0, 0))
    engine.put(replace(ask("hi", "patient"), timeout_s=2000), Weights(1, 0, 0, 0))

    (error,) = engine.found["hurried"]
    assert isinstance(error, Overloaded)
    assert error.retry_after_s > 100  # type: ignore[operator]
    engine.finish()
    assert engine.found["patient"][-1] is None


def test_a_deadline_ends_a_row_and_what_waits(engine: Engine) -> None:
    engine.batcher.max_rows = 1
    endless = ask("hi", "decoding", max_tokens=400, logit_bias=dict.fromkeys(engine.batcher._ends, -100.0))
    engine.put(replace(endless, timeout_s=30), Weights(0, 1, 0, 0))
    engine.put(replace(ask("hi", "waiting"), timeout_s=30), Weights(0, 1, 0, 0))
    for _ in range(3):
        engine.batcher.turn()
    for job in engine.jobs.values():
        job.deadline = time.monotonic() - 1

    engine.batcher.turn()

    assert not engine.batcher.busy
    for name in ("decoding", "waiting"):
        assert isinstance(engine.found[name][-1], BackendTimeout)


def test_with_memory_nearly_full_a_chat_is_turned_away_before_the_system_ends_the_process(engine: Engine) -> None:
    engine.batcher.free_bytes = lambda: KEPT_BYTES

    engine.put(ask("hello", "a"), Weights(1, 0, 0, 0))
    engine.finish()

    assert isinstance(engine.found["a"][-1], Overloaded)
    assert engine.found["a"][-1].retry_after_s >= 1


def test_with_memory_for_some_the_next_chat_waits_until_one_has_left(engine: Engine) -> None:
    free = [1 << 40]
    engine.batcher.free_bytes = lambda: free[0]
    for request, weights in many(2):
        engine.put(request, weights)
    engine.batcher.turn()
    free[0] = KEPT_BYTES  # taken by somebody else meanwhile
    engine.batcher.turn()
    assert (engine.batcher.load.rows, engine.batcher.load.waiting) == (1, 1)

    free[0] = 1 << 40
    engine.finish()

    for request, weights in many(2):
        check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_a_tokens_bytes_are_those_that_its_keys_and_values_take(any_tiny: Bundle, tmp_path: Path) -> None:
    engine = Engine(any_tiny, tmp_path)
    engine.put(ask("hello", "a", max_tokens=4), Weights(1, 0, 0, 0))
    engine.batcher.turn()

    rows, tokens = engine.batcher._slots._room
    kept = sum(side.nbytes for pair in engine.batcher._slots._layers.values() for side in pair)
    assert kept == rows * tokens * engine.batcher.reader.stack.token_bytes


def test_what_is_free_is_told_where_the_system_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", group)
    assert memory.free_bytes(torch.device("cpu")) is None
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    assert memory.free_bytes(torch.device("cpu")) == 1_024_000

    group.mkdir()
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("300000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert memory.free_bytes(torch.device("cpu")) == 250_000
    (group / "memory.max").write_text("max\n")
    assert memory.free_bytes(torch.device("cpu")) == 1_024_000


def test_no_memory_for_a_row_turns_it_away_and_leaves_the_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, weights = many(1)[0]
    engine.put(request, weights)
    engine.batcher.turn()

    def none_left(*_: object) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("hhh_router.model.slots._zeros", none_left)
        engine.put(ask("x" * 300, "large"), weights)
        engine.batcher.turn()
    engine.finish()

    assert isinstance(engine.found["large"][-1], Overloaded)
    check_same(engine.found[request.request_id], engine.alone(request, weights))
    engine.put(ask("x" * 300, "again", max_tokens=3), weights)
    engine.finish()
    assert engine.found["again"][-1] is None


def test_a_stop_string_that_never_comes_ends_at_the_limit(engine: Engine) -> None:
    weights = Weights(0.1, 0.2, 0.3, 0.4)
    never = ask("hi", "never", max_tokens=9, stop=("\x07 no such text",))
    engine.put(never, weights)
    engine.finish()

    check_same(engine.found["never"], engine.alone(never, weights))
    assert engine.batcher.load.rows == 0


def test_nan_logits_are_an_error_of_that_row(engine: Engine) -> None:
    (broken, weights), (fine, other) = many(2)
    engine.put(broken, weights)
    engine.put(fine, other)
    engine.batcher.turn()
    engine.batcher.turn()
    engine.batcher._rows[0].logits = torch.full_like(engine.batcher._rows[0].logits, torch.nan)
    engine.finish()

    (error,) = [e for e in engine.found["r0"] if isinstance(e, Exception)]
    assert "NaN" in str(error)
    check_same(engine.found["r1"], engine.alone(fine, other))


def test_a_steerer_that_fails_ends_its_own_row(engine: Engine) -> None:
    def broken(scores: Scores, logprobs: Sequence[float]) -> Weights | None:
        raise RuntimeError("no steering")

    other, weights = many(2)[1]
    engine.put(ask("hi", "broken", logit_bias={256: -100.0}), Weights(0, 1, 0, 0), steer=broken)
    engine.put(other, weights)
    engine.finish()

    assert isinstance(engine.found["broken"][-1], GeneratorError)
    check_same(engine.found[other.request_id], engine.alone(other, weights))


def test_a_caller_who_leaves_at_the_very_end_takes_nobody_along(engine: Engine) -> None:
    (left, weights), (stays, other) = many(2)
    ended: list[Exception | None] = []

    def tell(event: Event) -> None:
        if isinstance(event, Finished):
            raise GeneratorError("the caller has left")

    engine.put(stays, other)
    job = ChatJob(request=left, planner=planner(weights=weights), window_tokens=5, tell=tell, end=ended.append)
    engine.batcher.put(job)
    engine.finish()

    assert [type(e) for e in ended] == [GeneratorError]
    check_same(engine.found[stays.request_id], engine.alone(stays, other))


def test_a_schema_that_breaks_midway_ends_its_own_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    other, weights = many(2)[1]
    engine.put(ask("hi", "schema", max_tokens=40, json_schema='{"type": "object"}'), Weights(0, 1, 0, 0))
    engine.put(other, weights)
    engine.batcher.turn()
    engine.batcher.turn()

    def broken(following: Following, logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no matcher")

    monkeypatch.setattr(Following, "mask", broken)
    engine.finish()

    error = engine.found["schema"][-1]
    assert isinstance(error, GeneratorError)
    assert "no matcher" in error.message
    check_same(engine.found[other.request_id], engine.alone(other, weights))
