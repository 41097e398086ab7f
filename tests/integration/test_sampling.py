"""How tokens are drawn and told, on a tiny random model."""

import json
import math
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hhh_router.bundle import Bundle
from hhh_router.errors import GeneratorError, InvalidRequest
from hhh_router.model.deltas import Deltas, Spelling
from hhh_router.model.sampler import Drawn, Sampler, draw_rows
from hhh_router.protocols import Delta, Event, Finished, TokenLogprob
from hhh_router.types import Sampling, Weights

from .test_batcher import Engine, ask, check_same

pytestmark = pytest.mark.integration
MIXED = Weights(0.1, 0.2, 0.3, 0.4)
CITY = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["city", "town"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 9999},
        "old": {"type": "boolean"},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["kind", "people", "old", "rivers"],
    "additionalProperties": False,
}


@pytest.fixture
def engine(tiny: Bundle, tmp_path: Path) -> Engine:
    return Engine(tiny, tmp_path)


def answer(engine: Engine, **sampling: Any) -> list[Event]:
    """The events of one request, answered in a batch."""
    engine.put(ask("tell me something", "r", **sampling), MIXED)
    engine.finish()
    *events, end = engine.found["r"]
    if end is not None:
        assert isinstance(end, Exception)
        raise end
    return events  # type: ignore[return-value]


def text_of(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta))


def reason_of(events: list[Event]) -> str:
    assert isinstance(events[-1], Finished)
    return events[-1].reason


def told(events: list[Event]) -> list[TokenLogprob]:
    return [t for e in events if isinstance(e, Delta) for t in e.told]


def drawn(events: list[Event]) -> list[int]:
    return [e.token for e in events if isinstance(e, Delta) and e.token is not None]


# -- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_followed_however_hot_the_drawing(engine: Engine, seed: int) -> None:
    events = answer(engine, json_schema=json.dumps(CITY), temperature=1.5, seed=seed, max_tokens=400)

    assert reason_of(events) == "stop"
    jsonschema.validate(json.loads(text_of(events)), CITY)


@pytest.mark.parametrize("seed", range(2))
def test_json_mode_gives_an_object(engine: Engine, seed: int) -> None:
    closing = dict.fromkeys(engine.batcher.encoder.tokenizer.convert_tokens_to_ids(list('"}')), 12.0)
    events = answer(
        engine, json_schema='{"type":"object"}', temperature=1.5, seed=seed, max_tokens=400, logit_bias=closing
    )

    assert reason_of(events) == "stop"
    assert isinstance(json.loads(text_of(events)), dict)


def test_rows_under_schemas_say_what_each_says_alone(engine: Engine) -> None:
    free = ask("hi", "free", temperature=1.5, seed=3, max_tokens=30)
    bound = ask("hi", "bound", temperature=1.5, seed=3, max_tokens=200, json_schema=json.dumps(CITY))
    engine.put(free, MIXED)
    engine.put(bound, MIXED)
    engine.finish()

    check_same(engine.found["free"], engine.alone(free, MIXED))
    check_same(engine.found["bound"], engine.alone(bound, MIXED))


def test_a_reply_cut_under_a_schema_ends_for_its_length(engine: Engine) -> None:
    events = answer(engine, json_schema=json.dumps(CITY), max_tokens=5)

    assert reason_of(events) == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(text_of(events))


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ("{", "response_format: EOF"),
        ('{"type": "xml"}', "response_format: Invalid type: xml"),
        ('{"type": "object", "not": {"type": "string"}}', 'response_format: Unimplemented keys: ."not".'),
        ('{"$ref": "http://localhost/x.json"}', "does not fetch"),
        ('{"type": "integer", "multipleOf": 1000003}', "response_format: multipleOf with 1000003"),
        ('{"allOf": [{"type": "number", "multipleOf": 9.97}, {"multipleOf": 991}]}', "multipleOf with 997 and 3"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_at_once(engine: Engine, schema: str, found: str) -> None:
    begun = time.monotonic()

    with pytest.raises(InvalidRequest, match=found):
        answer(engine, json_schema=schema)

    assert time.monotonic() - begun < 5
    assert not engine.batcher.busy


def test_a_schema_found_too_large_on_the_way_is_the_callers_to_fix(engine: Engine) -> None:
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(600)}}

    with pytest.raises(InvalidRequest, match=r"response_format: .*max is 2000") as raised:
        answer(engine, json_schema=json.dumps(wide))

    assert "<state>" not in raised.value.message


# -- bias and top-k ---------------------------------------------------------------------------------------------------


def test_a_bias_of_minus_100_bans_a_token(engine: Engine) -> None:
    first = drawn(answer(engine))[0]

    assert first not in drawn(answer(engine, logit_bias={first: -100.0}, max_tokens=40))


def test_a_bias_of_100_forces_a_token(engine: Engine) -> None:
    events = answer(engine, logit_bias={70: 100.0}, temperature=1.0, seed=1)

    assert set(drawn(events)) == {70}


def test_one_likeliest_token_is_greedy_decoding(engine: Engine) -> None:
    greedy = drawn(answer(engine, max_tokens=30))

    assert drawn(answer(engine, max_tokens=30, top_k=1, temperature=2.0, seed=5)) == greedy
    assert drawn(answer(engine, max_tokens=30, temperature=2.0, seed=5)) != greedy


# -- log-probabilities ------------------------------------------------------------------------------------------------


def test_alternatives_are_sorted_and_begin_with_the_drawn_token_when_greedy(engine: Engine) -> None:
    events = answer(engine, top_logprobs=5, max_tokens=30)

    for t in told(events):
        values = [other.logprob for other in t.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        assert (t.top_logprobs[0].token, t.top_logprobs[0].logprob) == (t.token, t.logprob)
        assert sum(map(math.exp, values)) <= 1 + 1e-6


def test_every_token_is_told_once_in_order_and_spells_the_text(engine: Engine) -> None:
    letters = dict.fromkeys(engine.batcher.encoder.tokenizer.convert_tokens_to_ids(list("abc")), 90.0)
    events = answer(engine, top_logprobs=0, max_tokens=30, temperature=1.5, seed=2, logit_bias=letters, stop=("abca",))

    said = told(events)
    assert b"".join(bytes(t.bytes or ()) for t in said).decode() == "".join(t.token for t in said) == text_of(events)
    logprobs = [e.logprob for e in events if isinstance(e, Delta) and e.token is not None]
    assert [t.logprob for t in said] == logprobs[: len(said)]
    assert all(t.top_logprobs == () for t in said)


def test_told_log_probabilities_are_the_models_own_whatever_is_banned(engine: Engine) -> None:
    free = answer(engine, top_logprobs=2, max_tokens=1)
    bound = answer(engine, top_logprobs=2, max_tokens=1, logit_bias={drawn(free)[0]: -100.0})

    ((first,), (second,)) = told(free), told(bound)
    assert second.top_logprobs == first.top_logprobs
    assert second.logprob == first.top_logprobs[1].logprob < first.logprob


def test_nothing_is_told_that_was_not_asked_for(engine: Engine) -> None:
    assert told(answer(engine)) == []


def test_log_probabilities_are_the_same_alone_and_in_a_batch(engine: Engine) -> None:
    request = ask("hi", "r", top_logprobs=3)
    engine.put(request, MIXED)
    engine.put(ask("something else", "beside"), MIXED)
    engine.finish()

    together = told([e for e in engine.found["r"] if isinstance(e, Delta)])
    alone = told(engine.alone(request, MIXED))
    assert [t.token for t in together] == [t.token for t in alone]
    assert [t.logprob for t in together] == pytest.approx([t.logprob for t in alone], abs=1e-3)


# -- which text tokens come with --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aé", [("a", ["a"]), ("", []), ("é", ["\\xc3", "\\xa9"])]),  # half a character waits for the other
        ("aST", [("a", ["a"]), ("", []), ("", [])]),  # a stop string is no part of the reply
        ("aSx", [("a", ["a"]), ("", []), ("Sx", ["S", "x"])]),  # what only began like one is
        ("aS", [("a", ["a"]), ("", []), ("S", ["S"])]),
        ("a\xc3", [("a", ["a"]), ("", []), ("", ["\\xc3"])]),  # half a character at the end: no text, but told
    ],
)
def test_a_token_is_told_with_the_text_that_its_own_completes(
    tiny: Bundle, text: str, pieces: list[tuple[str, list[str]]]
) -> None:
    tokenizer = load_tokenizer(tiny)
    cut = text.endswith("\xc3")
    ids = tokenizer.encode(text[:-1] + "é" if cut else text, add_special_tokens=False)
    deltas = Deltas(tokenizer, Spelling(tokenizer), Sampling(stop=("ST",), top_logprobs=0))

    found = [deltas.push(Drawn(token, -1.0)) for token in (ids[:-1] if cut else ids)]
    found += [end] if (end := deltas.end()) else []

    assert [(d.text, [t.token for t in d.told]) for d in found] == pieces


def test_a_mark_has_a_name_and_no_bytes(tiny: Bundle) -> None:
    tokenizer = load_tokenizer(tiny)
    mark = tokenizer.convert_tokens_to_ids("<|im_start|>")

    assert Spelling(tokenizer).tell(mark, -1.0) == TokenLogprob(token="<|im_start|>", logprob=-1.0, bytes=None)
    assert Spelling(tokenizer).of(10_000) is None


def test_every_byte_is_spelt_by_its_token(tiny: Bundle) -> None:
    tokenizer = load_tokenizer(tiny)
    spelling = Spelling(tokenizer)

    for text in ("plain", " Ünïcödé\n\t", "日本語", "🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(spelling.of(i) or b"" for i in ids).decode() == text


def test_vocabularies_that_spell_bytes_out_are_read_too() -> None:
    backend = Tokenizer(models.BPE(vocab={"▁a": 0, "<0xE2>": 1, "b": 2}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=backend))

    assert [spelling.of(i) for i in range(4)] == [b" a", b"\xe2", b"b", None]


def load_tokenizer(bundle: Bundle) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(bundle.root / "backbone")


ROWS = [
    Sampling(),
    Sampling(temperature=1.3, seed=1),
    Sampling(temperature=1.3, seed=1, top_p=0.5),
    Sampling(temperature=0.7, seed=2, top_k=3, top_logprobs=4),
    Sampling(logit_bias={5: 50.0}),
]


def test_rows_drawn_together_are_what_each_draws_alone() -> None:
    logits = torch.randn((len(ROWS), 40), generator=torch.Generator().manual_seed(3))
    cpu = torch.device("cpu")
    together, alone = [Sampler(s, cpu) for s in ROWS], [Sampler(s, cpu) for s in ROWS]

    for _ in range(20):
        assert draw_rows(together, logits) == [s.draw(row) for s, row in zip(alone, logits, strict=True)]


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_has_no_token_to_draw_fails_alone(value: float, temperature: float) -> None:
    logits = torch.randn((3, 40), generator=torch.Generator().manual_seed(3))
    logits[1] = value
    samplers = [Sampler(Sampling(temperature=temperature, seed=4), torch.device("cpu")) for _ in range(3)]

    first, second, third = draw_rows(samplers, logits)

    assert isinstance(second, GeneratorError)
    assert isinstance(first, Drawn)
    assert isinstance(third, Drawn)


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-5])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    logits = 30 * torch.randn((50, 40), generator=torch.Generator().manual_seed(3))
    sampler = Sampler(Sampling(temperature=temperature, seed=4), torch.device("cpu"))

    assert [sampler.draw(row).token for row in logits] == logits.argmax(dim=1).tolist()


def test_a_bias_against_every_token_leaves_nothing_to_draw() -> None:
    sampler = Sampler(Sampling(logit_bias=dict.fromkeys(range(40), -math.inf)), torch.device("cpu"))

    with pytest.raises(GeneratorError, match="no token is left"):
        sampler.draw(torch.zeros(40))
