"""Many replies at once: what each row says must not depend on who shares its steps."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hhh_router.bundle import Bundle
from hhh_router.model.batcher import Batcher
from hhh_router.model.experts import load_experts
from hhh_router.model.generator import MixtureGenerator
from hhh_router.model.rows import ChatJob
from hhh_router.model.serving import install_serving
from hhh_router.model.worker import open_reader
from hhh_router.protocols import Delta, Event, Finished, Planned, Steered, Steerer, Window
from hhh_router.settings import Settings
from hhh_router.types import Action, ChatRequest, Message, Sampling, Scores, Weights

from .test_one_pass import planner

pytestmark = pytest.mark.integration
Collected = dict[str, list[Event | Exception | None]]


class Engine:
    """A batcher beside the plain generator, on one model."""

    def __init__(self, bundle: Bundle, cache: Path, *, dtype: str = "auto", **sizes: int) -> None:
        reader, encoder = open_reader(bundle, Settings.load(cache_dir=cache, threads=1, dtype=dtype))
        gates, _ = install_serving(reader.stack.model, load_experts(bundle), "none")
        self.plain = MixtureGenerator(reader.stack, encoder, reader, gates)
        self.batcher = Batcher(reader=reader, encoder=encoder, gates=gates, **sizes)
        self.found: Collected = {}
        self.jobs: dict[str, ChatJob] = {}

    def put(
        self,
        request: ChatRequest,
        weights: Weights,
        *,
        action: Action = Action.ALLOW,
        window: int = 5,
        steer: Steerer | None = None,
    ) -> None:
        events = self.found[request.request_id] = []
        job = ChatJob(
            request=request, planner=planner(action, weights), window_tokens=window, tell=events.append,
            end=events.append, steer=steer,
        )  # fmt: skip
        self.jobs[request.request_id] = job
        self.batcher.put(job)

    def finish(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.batcher.busy:
                return
            self.batcher.turn()
        raise AssertionError("the batch never ended")

    def alone(
        self, request: ChatRequest, weights: Weights, window: int = 5, steer: Steerer | None = None
    ) -> list[Event]:
        return list(self.plain.run(request, planner(weights=weights), window_tokens=window, steer=steer))


@pytest.fixture
def engine(tiny: Bundle, tmp_path: Path) -> Engine:
    return Engine(tiny, tmp_path)


def ask(text: str, name: str, **sampling: object) -> ChatRequest:
    given = {"max_tokens": 12} | sampling
    return ChatRequest(
        messages=(Message(role="user", content=text),), sampling=Sampling(**given), request_id=name  # type: ignore[arg-type]
    )  # fmt: skip


def many(count: int) -> list[tuple[ChatRequest, Weights]]:
    """Requests of different lengths, each with a mixture of its own."""
    mixtures = itertools.islice(
        (Weights.from_mixture(f"hhh@{16 - a - b - c}-{a}-{b}-{c}") for a in range(0, 9, 2) for b in range(0, 5)
         for c in range(0, 4)), count,
    )  # fmt: skip
    return [
        (ask("tell me " + "more " * (i % 7) + str(i), f"r{i}", max_tokens=4 + (i * 5) % 17), weights)
        for i, weights in enumerate(mixtures)
    ]


def shown(events: Sequence[Event | Exception | None]) -> list[object]:
    """What a caller could tell apart, without times."""
    kept: list[object] = []
    for event in events:
        if isinstance(event, Delta):
            kept.append((event.text, event.tokens))
        elif isinstance(event, Finished):
            kept.append((event.reason, event.prompt_tokens, event.completion_tokens))
        elif isinstance(event, Planned):
            kept.append((event.plan.weights, event.prompt_tokens, event.layers_run))
        elif isinstance(event, Window):
            kept.append((event.completion_tokens, event.is_final))
        elif isinstance(event, Steered):
            kept.append((event.weights, event.completion_tokens))
    return kept


def check_same(together: Sequence[Event | Exception | None], alone: Sequence[Event]) -> None:
    assert together[-1] is None  # it ended, and nothing went wrong
    assert shown(together) == shown(alone)
    for a, b in zip([e for e in together if e is not None], alone, strict=True):
        if isinstance(a, Window) and isinstance(b, Window):
            assert a.scores.outcomes == pytest.approx(b.scores.outcomes, abs=2e-3)
        if isinstance(a, Delta) and isinstance(b, Delta) and a.logprob is not None:
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


def test_32_staggered_requests_say_what_each_says_alone(any_tiny: Bundle, tmp_path: Path) -> None:
    engine = Engine(any_tiny, tmp_path, max_rows=8)
    asked = many(32)
    assert len({w for _, w in asked}) == 32

    for number, (request, weights) in enumerate(asked):
        engine.put(request, weights)
        for _ in range(number % 3):
            engine.batcher.turn()
    engine.finish()

    for request, weights in asked:
        check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_rows_share_steps(engine: Engine) -> None:
    for request, weights in many(4):
        engine.put(request, weights)
    passes = count_calls(engine, lambda: engine.finish())

    tokens = sum(isinstance(e, Delta) and e.tokens for events in engine.found.values() for e in events)
    assert passes < tokens


def count_calls(engine: Engine, act: Callable[[], None]) -> int:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = engine.batcher.reader.stack.layers[-1].register_forward_hook(count)
    act()
    handle.remove()
    return calls


def test_a_stop_takes_no_slot(engine: Engine) -> None:
    engine.put(ask("hello", "no"), Weights(1, 0, 0, 0), action=Action.REFUSE)
    calls = count_calls(engine, engine.finish)

    assert calls == 0
    assert [type(e) for e in engine.found["no"]] == [Planned, Finished, type(None)]
    assert engine.batcher.load.rows == 0


def test_each_row_has_its_own_sampling(engine: Engine) -> None:
    hot = {"temperature": 1.5, "top_p": 0.9}
    for name, seed in (("a", 1), ("b", 2), ("again", 1)):
        engine.put(ask("tell me something", name, seed=seed, **hot), Weights(0.1, 0.2, 0.3, 0.4))
    engine.put(ask("tell me something", "cold"), Weights(0.1, 0.2, 0.3, 0.4))
    engine.finish()

    assert shown(engine.found["a"]) == shown(engine.found["again"]) != shown(engine.found["b"])
    check_same(engine.found["cold"], engine.alone(ask("tell me something", "x"), Weights(0.1, 0.2, 0.3, 0.4)))


def test_a_stop_string_ends_one_row_alone(engine: Engine) -> None:
    weights = Weights(0.1, 0.2, 0.3, 0.4)
    whole = "".join(e.text for e in engine.alone(ask("hi", "x", max_tokens=20), weights) if isinstance(e, Delta))
    stopped = ask("hi", "stopped", max_tokens=20, stop=(whole[3:5],))
    engine.put(stopped, weights)
    engine.put(ask("hi", "whole", max_tokens=20), weights)
    engine.finish()

    check_same(engine.found["stopped"], engine.alone(stopped, weights))
    assert [e.stop for e in engine.found["stopped"] if isinstance(e, Finished)] == [whole[3:5]]
    check_same(engine.found["whole"], engine.alone(ask("hi", "x", max_tokens=20), weights))


def test_a_cancelled_row_is_gone_at_the_next_turn(engine: Engine) -> None:
    asked = many(4)[1:]  # the first one is over too soon
    for request, weights in asked:
        engine.put(request, weights)
    for _ in range(3):
        engine.batcher.turn()
    assert engine.batcher.load.rows == 3
    engine.jobs["r2"].cancel()

    engine.batcher.turn()

    assert engine.batcher.load.rows == 2
    engine.finish()
    for request, weights in (asked[0], asked[2]):
        check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_32_staggered_requests_on_the_default_model() -> None:
    engine = Engine(Bundle.load("smollm2-135m"), Settings.load().cache_dir, dtype="float32", max_rows=16)
    asked = many(32)
    for number, (request, weights) in enumerate(asked):
        engine.put(request, weights)
        if number % 2:
            engine.batcher.turn()
    engine.finish()

    for request, weights in asked:
        check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_in_bfloat16_staggered_requests_part_only_where_two_tokens_are_as_likely() -> None:
    """Attention rounds otherwise beside longer rows, and bfloat16 keeps eight bits of what it gives."""
    engine = Engine(Bundle.load("smollm2-135m"), Settings.load().cache_dir, dtype="bfloat16", max_rows=8)
    asked = many(12)
    for request, weights in asked:
        engine.put(request, weights)
    engine.finish()

    for request, weights in asked:
        together = [e for e in engine.found[request.request_id] if isinstance(e, Delta) and e.tokens]
        alone = [e for e in engine.alone(request, weights) if isinstance(e, Delta) and e.tokens]
        parted = next((i for i, (a, b) in enumerate(zip(together, alone, strict=False)) if a.token != b.token), None)
        for a, b in zip(together[:parted], alone[:parted], strict=False):
            assert a.logprob == pytest.approx(b.logprob, abs=0.15)
        if parted is None:
            assert len(together) == len(alone)
        else:
            assert together[parted].logprob == pytest.approx(alone[parted].logprob, abs=0.15)


def test_a_steered_row_goes_on_under_its_new_weights_and_the_others_under_theirs(engine: Engine) -> None:
    before, after = Weights(0, 1, 0, 0), Weights(0, 0, 1, 0)
    request = ask("tell me something", "steered", max_tokens=16, logit_bias={256: -100.0})
    seen: list[int] = []

    def steer(scores: Scores, logprobs: Sequence[float]) -> Weights | None:
        seen.append(len(logprobs))
        return after if len(logprobs) == 10 else None

    other, other_weights = many(2)[1]
    engine.put(request, before, steer=steer)
    engine.put(other, other_weights)
    engine.finish()
    steered = engine.found["steered"]

    assert seen == [5, 10, 15]
    check_same(steered, engine.alone(request, before, steer=steer))
    check_same(engine.found[other.request_id], engine.alone(other, other_weights))
    straight = [e.token for e in engine.alone(request, before) if isinstance(e, Delta)]
    turned = [e.token for e in steered if isinstance(e, Delta)]
    assert turned[:10] == straight[:10]  # what was drawn before is as it was
    assert turned != straight
