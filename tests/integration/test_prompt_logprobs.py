"""Log-probabilities of a prompt, against those that transformers gives for the same tokens."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hhh_router.bundle import Bundle
from hhh_router.errors import ContextTooLong, InvalidRequest
from hhh_router.protocols import Finished, Planned
from hhh_router.types import ChatRequest, Message, Sampling, Weights

from .test_batcher import Engine

pytestmark = pytest.mark.integration
BARE = Weights(1.0, 0.0, 0.0, 0.0)
MIXED = Weights(0.1, 0.2, 0.3, 0.4)
TEXT = "Once upon a time there was a fox; " * 6  # more tokens than are scored together


@pytest.fixture
def engine(tiny: Bundle, tmp_path: Path) -> Engine:
    return Engine(tiny, tmp_path)


def scored(text: str = TEXT, ids: tuple[int, ...] = (), top: int = 3, max_tokens: int = 0) -> ChatRequest:
    return ChatRequest(
        messages=(Message(role="user", content="" if ids else text),),
        prompt_ids=ids,
        continues=True,
        request_id="r",
        sampling=Sampling(max_tokens=max_tokens, prompt_logprobs=top),
    )


def run(engine: Engine, request: ChatRequest, weights: Weights) -> Planned:
    engine.put(request, weights)
    engine.finish()
    first, *_, end = engine.found["r"]
    if isinstance(end, Exception):
        raise end
    assert isinstance(first, Planned)
    return first


def test_they_are_those_of_the_bare_model(engine: Engine, tiny: Bundle) -> None:
    found = run(engine, scored(), BARE).prompt_logprobs

    assert found is not None
    ids = engine.batcher.encoder.prompt(scored()).ids
    model = AutoModelForCausalLM.from_pretrained(tiny.root / "backbone", dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    assert math.isnan(found[0].logprob)
    assert [t.logprob for t in found[1:]] == pytest.approx(expected, abs=1e-4)
    assert "".join(t.token for t in found) == TEXT
    for at in (1, 77, len(ids) - 1):
        assert [o.logprob for o in found[at].top_logprobs] == pytest.approx(
            logprobs[at - 1].topk(3).values.tolist(), abs=1e-4
        )


def test_they_are_the_mixtures_own_and_the_plain_engines(engine: Engine) -> None:
    mixed = run(engine, scored(), MIXED).prompt_logprobs

    [alone, *_] = engine.alone(scored(), MIXED)
    bare = run(engine, scored(), BARE).prompt_logprobs

    assert isinstance(alone, Planned)
    assert mixed is not None
    assert alone.prompt_logprobs is not None
    assert bare is not None
    assert [t.logprob for t in mixed[1:]] == pytest.approx([t.logprob for t in alone.prompt_logprobs[1:]], abs=1e-4)
    assert [t.logprob for t in mixed[1:]] != pytest.approx([t.logprob for t in bare[1:]], abs=1e-2)


def test_they_are_the_same_when_the_prompt_is_known_already(engine: Engine) -> None:
    first = run(engine, scored(), MIXED).prompt_logprobs
    again = run(engine, scored(max_tokens=2), MIXED).prompt_logprobs

    assert first is not None
    assert again is not None
    assert [t.logprob for t in first[1:]] == pytest.approx([t.logprob for t in again[1:]], abs=1e-5)


def test_token_ids_are_taken_as_they_are_and_marks_in_text_are_text(engine: Engine) -> None:
    encoder = engine.batcher.encoder
    end = encoder.end_id

    assert encoder.prompt(scored(ids=(1, end, 2))).ids == (1, end, 2)
    assert end not in encoder.prompt(scored("a<|im_end|>b")).ids
    with pytest.raises(InvalidRequest, match="found token 99999"):
        encoder.prompt(scored(ids=(1, 99999)))
    with pytest.raises(ContextTooLong, match="600 tokens"):
        encoder.prompt(scored(ids=(1,) * 600))


def test_nothing_is_drawn_where_nothing_is_wanted(engine: Engine) -> None:
    run(engine, scored(), MIXED)

    *_, finished, _ = engine.found["r"]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.completion_tokens) == ("length", 0)
    assert not engine.batcher.busy
