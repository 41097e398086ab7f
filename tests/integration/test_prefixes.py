"""Prompts that begin alike: what is shared, what is salted, and that replies do not change by it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hhh_router.bundle import Bundle
from hhh_router.model.prefixes import BLOCK, Prefixes
from hhh_router.protocols import Delta, Finished
from hhh_router.types import ChatRequest, Message, Sampling, Weights

from .test_batcher import Engine, check_same

pytestmark = pytest.mark.integration
SYSTEM = "You are the assistant of a small library. " * 3  # some blocks of this model's bytes
WEIGHTS = [Weights(0, 1, 0, 0), Weights(0, 0, 1, 0), Weights(0, 0, 0, 1), Weights(1, 0, 0, 0)]


@pytest.fixture
def engine(tiny: Bundle, tmp_path: Path) -> Engine:
    return Engine(tiny, tmp_path)


def chat(name: str, *turns: str, system: str = SYSTEM, **sampling: object) -> ChatRequest:
    roles = ["user", "assistant"]
    said = [Message(role=roles[i % 2], content=text) for i, text in enumerate(turns)]
    given = {"max_tokens": 10} | sampling
    return ChatRequest(
        messages=(Message(role="system", content=system), *said), sampling=Sampling(**given), request_id=name  # type: ignore[arg-type]
    )  # fmt: skip


def tokens_run(engine: Engine, request: ChatRequest, weights: Weights) -> tuple[int, int]:
    """Tokens that the lowest and the uppermost layer are run on for one request."""
    counts = [0, 0]

    def count(which: int) -> Callable[..., None]:
        def add(module: object, given: tuple[object, ...]) -> None:
            counts[which] += given[0].shape[1]  # type: ignore[attr-defined]

        return add

    layers = engine.batcher.reader.stack.layers
    handles = [layers[place].register_forward_pre_hook(count(i)) for i, place in enumerate((0, -1))]
    answer(engine, request, weights)
    for handle in handles:
        handle.remove()
    return counts[0], counts[1]


def answer(engine: Engine, request: ChatRequest, weights: Weights) -> None:
    engine.put(request, weights)
    engine.finish()


def test_a_shared_system_prompt_is_read_once_below_and_once_per_mixture_above(engine: Engine) -> None:
    shared = len(SYSTEM) // BLOCK * BLOCK - BLOCK  # at least; the template adds some

    first = tokens_run(engine, chat("first", "one", max_tokens=1), WEIGHTS[0])
    again = tokens_run(engine, chat("again", "two", max_tokens=1), WEIGHTS[0])
    other = tokens_run(engine, chat("other", "six", max_tokens=1), WEIGHTS[1])
    other_again = tokens_run(engine, chat("other again", "ten", max_tokens=1), WEIGHTS[1])

    assert first[0] - again[0] >= shared
    assert first[1] - again[1] >= shared
    assert other[0] == again[0]
    assert other[1] == first[1]  # another mixture: all of it
    assert other_again[1] == again[1]


@pytest.mark.parametrize("kind", ["shared", "longer", "whole"])
def test_replies_are_those_of_the_plain_engine(any_tiny: Bundle, tmp_path: Path, kind: str) -> None:
    engine = Engine(any_tiny, tmp_path)
    texts = {
        "shared": ["one", "two words", "three more words"],
        "longer": ["go", "go on", "go on and on"],
        "whole": ["same"] * 3,
    }[kind]
    asked = [(chat(f"{i}-{j}", text), w) for i, text in enumerate(texts) for j, w in enumerate(WEIGHTS)]

    for request, weights in asked:  # some together, some after
        engine.put(request, weights)
        engine.batcher.turn()
    engine.finish()

    assert engine.batcher._prefixes.tokens > BLOCK
    for request, weights in asked:
        check_same(engine.found[request.request_id], engine.alone(request, weights))


def test_the_next_turn_of_a_chat_finds_the_last_reply(engine: Engine) -> None:
    weights = WEIGHTS[1]
    opening = chat("turn 1", "tell me something", max_tokens=3 * BLOCK, logit_bias={256: -100.0})
    answer(engine, opening, weights)
    reply = "".join(e.text for e in engine.found["turn 1"] if isinstance(e, Delta))
    prompt = next(e.prompt_tokens for e in engine.found["turn 1"] if isinstance(e, Finished))
    kept = engine.batcher._prefixes.tokens
    assert kept > (prompt // BLOCK + 1) * BLOCK  # blocks of the reply are there too

    second = chat("turn 2", "tell me something", reply, "and then?")
    answer(engine, second, weights)

    check_same(engine.found["turn 2"], engine.alone(second, weights))


def test_sharing_without_salt_would_be_wrong(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the salt is for: the same prompt under other weights has other states above the boundary."""
    monkeypatch.setattr(Prefixes, "_salt", staticmethod(lambda weights: WEIGHTS[0]))
    asked = [(chat(f"{i}", "tell me something", max_tokens=16), w) for i, w in enumerate(WEIGHTS)]
    for request, weights in asked:
        answer(engine, request, weights)

    wrong = 0
    for request, weights in asked[1:]:
        mine = [e.token for e in engine.found[request.request_id] if isinstance(e, Delta)]
        alone = [e.token for e in engine.alone(request, weights) if isinstance(e, Delta)]
        wrong += mine != alone
    assert wrong >= 2


def test_what_was_said_last_is_kept_and_no_more_than_allowed(tiny: Bundle, tmp_path: Path) -> None:
    engine = Engine(tiny, tmp_path, prefix_tokens=6 * BLOCK)
    for i in range(5):
        answer(engine, chat(f"{i}", "hello", system=f"{i} " * 40), WEIGHTS[0])
    assert engine.batcher._prefixes.tokens <= 6 * BLOCK

    none = Engine(tiny, tmp_path, prefix_tokens=0)
    answer(none, chat("a", "hello"), WEIGHTS[0])
    answer(none, chat("b", "hello"), WEIGHTS[0])
    assert none.batcher._prefixes.tokens == 0
    check_same(none.found["b"], none.alone(chat("b", "hello"), WEIGHTS[0]))


def test_states_under_further_weights_count_too(tiny: Bundle, tmp_path: Path) -> None:
    engine = Engine(tiny, tmp_path, prefix_tokens=8 * BLOCK)
    for weights in WEIGHTS:
        answer(engine, chat(str(weights), "hello", max_tokens=1), weights)

    blocks = engine.batcher._prefixes._blocks.values()
    assert 0 < sum(1 + len(b.upper) for b in blocks) <= 16
    assert engine.batcher._prefixes._halves == sum(1 + len(b.upper) for b in blocks)


def test_a_prompt_that_is_refused_leaves_nothing_above(engine: Engine) -> None:
    from hhh_router.types import Action

    engine.put(chat("no", "hello"), WEIGHTS[0], action=Action.REFUSE)
    engine.finish()

    assert engine.batcher._prefixes.tokens == 0
    answer(engine, chat("yes", "hello"), WEIGHTS[1])
    check_same(engine.found["yes"], engine.alone(chat("yes", "hello"), WEIGHTS[1]))
