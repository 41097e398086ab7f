"""Int8 weights of decode steps: close to the base, only where they are asked for, and never in what is calibrated."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from hhh_router.bundle import Bundle
from hhh_router.errors import SettingsError
from hhh_router.model.base import Backbone
from hhh_router.model.batcher import Batcher
from hhh_router.model.decoded import next_token_nats, read_decoded
from hhh_router.model.experts import load_experts
from hhh_router.model.generator import MixtureGenerator
from hhh_router.model.int8 import MOST_ROWS, Int8Linear, Phase, check_int8, install_int8
from hhh_router.model.mixture import MixtureLinear, install_mixture
from hhh_router.model.quantisation import MOST_NATS
from hhh_router.model.reader import RunningReply
from hhh_router.model.runner import as_reply
from hhh_router.model.worker import open_reader
from hhh_router.protocols import Delta, Event, Finished, Planned
from hhh_router.settings import Settings
from hhh_router.types import Message, ReadRequest, Weights

from .test_batcher import Engine, ask, many

pytestmark = pytest.mark.integration
MIXED = Weights(0.1, 0.2, 0.3, 0.4)


class Quantised(Engine):
    """The batcher and the plain generator of `test_batcher`, on one model with int8 layers."""

    def __init__(self, bundle: Bundle, cache: Path, *, dtype: str = "auto", **sizes: int) -> None:
        self.reader, self.encoder = open_reader(bundle, Settings.load(cache_dir=cache, threads=1, dtype=dtype))
        stack = self.reader.stack
        self.gates = install_mixture(stack.model, load_experts(bundle))
        self.phase = install_int8(stack.model)
        self.plain = MixtureGenerator(stack, self.encoder, self.reader, self.gates, self.phase)
        self.batcher = Batcher(
            reader=self.reader, encoder=self.encoder, gates=self.gates, phase=self.phase, **sizes
        )  # fmt: skip
        self.found, self.jobs = {}, {}

    def layers(self) -> list[Int8Linear]:
        return [m for m in self.reader.stack.model.modules() if isinstance(m, Int8Linear)]


@pytest.fixture
def engine(tiny: Bundle, tmp_path: Path) -> Quantised:
    return Quantised(tiny, tmp_path, max_rows=MOST_ROWS["float32"])


def count(engine: Quantised) -> tuple[list[int], list[int]]:
    """Rows that pass through each int8 layer from now on, and those of them that take the base weights."""
    rows: list[int] = []
    base: list[int] = []
    for layer in engine.layers():
        layer.register_forward_pre_hook(lambda _, given: rows.append(given[0].numel() // given[0].shape[-1]))
        layer.base.register_forward_pre_hook(lambda _, given: base.append(given[0].numel() // given[0].shape[-1]))
    return rows, base


def small(inputs: int = 64, outputs: int = 48, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> Int8Linear:
    torch.manual_seed(0)
    return Int8Linear(nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).to(dtype), Phase(most_rows=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_close_to_the_base_and_those_of_rounded_weights(dtype: torch.dtype, bias: bool) -> None:
    layer = small(bias=bias, dtype=dtype)
    x = torch.randn(2, 2, 64).to(dtype)

    with layer._phase.decoding():
        y = layer(x)

    weights = layer.rounded.float() * layer.scales.float()[:, None]
    expected = x.bfloat16().float() @ weights.T + (layer.base.bias.float() if bias else 0)
    assert y.dtype == dtype
    assert y.shape == (2, 2, 48)
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(y.float(), layer.base(x).float(), atol=0.05, rtol=0.05)


def test_what_it_gives_may_be_added_to_in_place() -> None:
    layer = small()
    x = torch.randn(3, 1, 64)

    with layer._phase.decoding(), torch.inference_mode():
        first = layer(x)
        again = layer(x).view(-1, 48).addmm_(torch.ones(3, 2), torch.ones(2, 48)).view(3, 1, 48)
        after = layer(x)

    torch.testing.assert_close(again, first + 2)
    assert torch.equal(after, first)


def test_a_channel_of_zeros_stays_zero() -> None:
    base = nn.Linear(32, 4, bias=False).requires_grad_(False)
    base.weight[1] = 0
    layer = Int8Linear(base, Phase(most_rows=4))

    with layer._phase.decoding():
        y = layer(torch.randn(2, 32))

    assert y.isfinite().all()
    assert torch.equal(y[:, 1], torch.zeros(2))


def test_few_rows_of_a_decode_step_take_int8_weights_and_more_take_the_base() -> None:
    layer = small()
    few, many_rows = torch.randn(4, 1, 64), torch.randn(5, 1, 64)

    assert torch.equal(layer(few), layer.base(few))
    with layer._phase.decoding():
        assert not torch.equal(layer(few), layer.base(few))
        assert torch.equal(layer(many_rows), layer.base(many_rows))
    assert torch.equal(layer(few), layer.base(few))


def test_a_step_that_fails_leaves_the_phase_as_it_was() -> None:
    phase = Phase(most_rows=4)

    with pytest.raises(ZeroDivisionError), phase.decoding():
        raise ZeroDivisionError

    assert phase.rows == 0


def test_a_row_comes_out_the_same_however_many_there_are() -> None:
    layer = small(inputs=96)
    x = torch.randn(40, 96)

    with layer._phase.decoding(any_rows=True):
        together, alone = layer(x), torch.cat([layer(x[i : i + 1]) for i in range(len(x))])

    assert torch.equal(together, alone)


def test_every_linear_layer_and_the_head_get_a_copy_below_the_mixture(any_tiny: Bundle, tmp_path: Path) -> None:
    engine = Quantised(any_tiny, tmp_path)
    model = engine.reader.stack.model

    adapted = [m for m in model.modules() if isinstance(m, MixtureLinear)]
    assert adapted
    assert all(isinstance(m.base, Int8Linear) for m in adapted)
    assert isinstance(model.lm_head, Int8Linear)
    assert len(engine.layers()) == 7 * engine.reader.stack.depth + 1
    assert isinstance(engine.reader.stack.text.embed_tokens, nn.Embedding)
    assert engine.phase.added_bytes == sum(m.base.weight.numel() + 2 * len(m.base.weight) for m in engine.layers())


def test_a_layer_whose_input_does_not_fit_the_kernel_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 2)).requires_grad_(False)

    phase = install_int8(model)

    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[1], Int8Linear)
    assert phase.added_bytes == 2 * 64 + 2 * 2


# -- phases -----------------------------------------------------------------------------------------------------------


def test_readings_are_the_same_to_the_bit_with_int8_layers(tiny: Bundle, tmp_path: Path) -> None:
    plain, encoder = open_reader(tiny, Settings.load(cache_dir=tmp_path, threads=1))
    quantised = Quantised(tiny, tmp_path)
    requests = [
        ReadRequest(messages=(Message(role="user", content="x" * 300),), response="y" * 120),
        ReadRequest(messages=(Message(role="user", content="x" * 300),)),
        ReadRequest(messages=(Message(role="user", content="a"),)),
        ReadRequest(messages=(), response="b"),
    ]

    for request in requests:
        text = encoder.encode(request)
        assert quantised.reader.score([text]) == plain.score([text])


def test_only_decode_steps_take_int8_weights(engine: Quantised) -> None:
    rows, base = count(engine)
    engine.put(ask("hi", "one", max_tokens=5, logit_bias={256: -100.0, 257: -100.0}), MIXED)
    engine.batcher.turn()  # reads the prompt and decodes a token

    layers = len(engine.layers())
    assert base.count(1) == 1  # of the prompt's pass the head alone looks at one row, and it takes the base weights
    assert rows.count(1) == layers + 1
    before = len(base)
    engine.finish()
    assert len(base) == before  # no step after it takes base weights


def test_a_short_prompt_is_read_with_the_base_weights(tiny: Bundle, tmp_path: Path) -> None:
    quantised = Quantised(tiny, tmp_path)
    quantised.phase._most_rows = 10_000  # so that size alone would choose int8 for any prompt
    plain = Engine(tiny, tmp_path)
    for engine in (quantised, plain):
        engine.put(ask("hi", "one", max_tokens=1), MIXED)
        engine.finish()

    (found,), (expected,) = ([x for x in e.found["one"] if isinstance(x, Planned)] for e in (quantised, plain))
    assert found.plan.evidence.scores == expected.plan.evidence.scores


def test_more_rows_than_the_limit_take_the_base_weights(tiny: Bundle, tmp_path: Path) -> None:
    engine = Quantised(tiny, tmp_path, max_rows=12)
    _, base = count(engine)
    for number in range(10):
        engine.put(ask("hi", f"r{number}", max_tokens=30, logit_bias={256: -100.0, 257: -100.0}), MIXED)
    engine.finish()

    assert set(base) >= {9, 10}
    assert 8 not in base


def test_replies_say_what_each_says_alone_where_all_steps_take_int8(any_tiny: Bundle, tmp_path: Path) -> None:
    engine = Quantised(any_tiny, tmp_path, max_rows=MOST_ROWS["float32"])
    asked = many(24)
    for number, (request, weights) in enumerate(asked):
        engine.put(request, weights)
        for _ in range(number % 3):
            engine.batcher.turn()
    engine.finish()

    same = [agree(engine.found[request.request_id], engine.alone(request, weights)) for request, weights in asked]
    assert sum(same) >= len(same) - 2


def test_rows_of_one_length_say_to_the_bit_what_each_says_alone(any_tiny: Bundle, tmp_path: Path) -> None:
    """Without a mask attention rounds as it does for one row, so nothing is left that company could change."""
    engine = Quantised(any_tiny, tmp_path, max_rows=MOST_ROWS["float32"])
    mixtures = [weights for _, weights in many(MOST_ROWS["float32"])]
    asked = [ask("tell me more", f"r{i}", max_tokens=8) for i in range(len(mixtures))]
    for request, weights in zip(asked, mixtures, strict=True):
        engine.put(request, weights)
    while engine.batcher.load.waiting:
        engine.batcher._admit(engine.batcher._waiting.popleft())  # all of them before the first step
    engine.finish()

    for request, weights in zip(asked, mixtures, strict=True):
        together = [e for e in engine.found[request.request_id] if isinstance(e, Delta) and e.tokens]
        alone = [e for e in engine.alone(request, weights) if isinstance(e, Delta) and e.tokens]
        assert [(e.token, e.logprob) for e in together] == [(e.token, e.logprob) for e in alone]


def agree(together: Sequence[Event | Exception | None], alone: Sequence[Event]) -> bool:
    """Whether two replies are the same to the end; where they part, both tokens must have been as likely.

    Attention over more rows rounds otherwise, and the product rounds that to bfloat16, which ties may show.
    """
    assert together[-1] is None
    found, expected = ([e for e in events if isinstance(e, Delta) and e.tokens] for events in (together, alone))
    for a, b in zip(found, expected, strict=False):
        assert a.logprob == pytest.approx(b.logprob, abs=0.05)
        if a.token != b.token:
            return False
    assert last(together).completion_tokens == last(alone).completion_tokens
    return True


def last(events: Sequence[Event | Exception | None]) -> Finished:
    return next(e for e in events if isinstance(e, Finished))


def test_a_reply_that_int8_layers_made_is_not_kept_for_later_prompts(tiny: Bundle, tmp_path: Path) -> None:
    kept = {}
    for name, engine in (("base", Engine(tiny, tmp_path)), ("int8", Quantised(tiny, tmp_path))):
        engine.put(ask("x" * 100, "one", max_tokens=80, logit_bias={256: -100.0, 257: -100.0}), MIXED)
        engine.finish()
        prompt = engine.jobs["one"].prompt_tokens
        assert last(engine.found["one"]).completion_tokens == 80
        kept[name] = engine.batcher._prefixes.tokens > prompt

    assert kept == {"base": True, "int8": False}


def test_a_reply_read_in_one_pass_is_as_it_was_decoded(tiny: Bundle, tmp_path: Path) -> None:
    engine = Quantised(tiny, tmp_path)
    text = engine.encoder.encode(ReadRequest(messages=(Message(role="user", content="hello"),), response="so it is"))
    reader, stack = engine.reader, engine.reader.stack
    with torch.inference_mode():
        cache = stack.new_cache()
        state = stack.begin(torch.tensor([text.ids[: text.prompt_tokens]]), cache=cache)
        reply = RunningReply(reader, reader.prompt(list(reader.states(state)), text), text.prompt_tokens)
        for token in text.ids[text.prompt_tokens :]:
            with engine.phase.decoding():
                reply.add(list(reader.states(stack.begin(torch.tensor([[token]]), cache=cache))))

    found, expected = read_decoded(reader, text, engine.phase), reply.scores()

    assert found.mode == expected.mode == "both"
    assert found.outcomes == pytest.approx(expected.outcomes, abs=1e-4)
    assert found.outcomes != reader.score([text])[0].outcomes


# -- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [("cuda:0", "bfloat16", "runs on CPUs only"), ("cpu", "float16", "runs in float16")],
)
def test_another_device_or_precision_is_refused_with_what_to_set(device: str, dtype: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        check_int8(device, dtype)

    assert "HHH_ROUTER_QUANTISE=none" in (caught.value.hint or "")


def test_a_torch_without_the_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> torch.Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", unsupported)

    with pytest.raises(SettingsError, match="no int8 product here"):
        check_int8("cpu", "float32")


def test_the_default_model_keeps_its_next_tokens_in_bfloat16() -> None:
    engine = Quantised(Bundle.load("smollm2-135m"), Settings.load().cache_dir, dtype="bfloat16")
    backbone = Backbone(stack=engine.reader.stack, encoder=engine.encoder)
    told = [
        ("What is the capital of France?", "The capital of France is Paris, on the river Seine."),
        ("Write two lines about the sea.", "The sea is grey in the morning,\nand blue when the gulls come home."),
        ("How do I boil an egg?", "Put it in boiling water, wait eight minutes, then cool it under the tap."),
        ("What will the lottery numbers be tomorrow?", "I do not know, and nobody can: they are drawn at random."),
    ]
    rows = [as_reply(backbone, (Message(role="user", content=q),), a, 200, end=False) for q, a in told]

    nats = torch.cat([next_token_nats(backbone, engine.gates, engine.phase, row, MIXED) for row in rows])

    assert len(nats) > 40
    assert 0 < nats.mean() < MOST_NATS
