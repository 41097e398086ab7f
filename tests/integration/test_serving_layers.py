"""Layers as they are served, fused, folded and packed, against those they stand for."""

import pytest
import torch
from torch import Tensor, nn

from hhh_router.bundle import Bundle
from hhh_router.model import packed
from hhh_router.model.base import Backbone, load_backbone
from hhh_router.model.experts import load_experts
from hhh_router.model.fused import FAMILIES, FusedLayer
from hhh_router.model.int8 import Int8Linear
from hhh_router.model.mixture import FoldedMixture, Gates, MixtureLinear, install_mixture, joined, linear
from hhh_router.model.packed import PackedLinear, pack
from hhh_router.model.serving import install_serving
from hhh_router.model.worker import open_reader
from hhh_router.settings import Settings
from hhh_router.types import Weights

pytestmark = pytest.mark.integration

IDS = torch.tensor([[5, 9, 33, 70, 12, 8, 101, 44, 3, 17, 29, 64], [7, 2, 90, 41, 6, 77, 15, 60, 31, 9, 0, 0]])
MASK = torch.tensor([[1] * 12, [1] * 10 + [0] * 2])
BARE, MIXED = Weights(1, 0, 0, 0), Weights(0.1, 0.2, 0.3, 0.4)
needs_packing = pytest.mark.skipif(not packed._works(), reason="this torch or CPU has no packed bfloat16 product")


def load(bundle: Bundle, dtype: str = "float32") -> Backbone:
    return load_backbone(bundle.root / "backbone", bundle.manifest.backbone, dtype=dtype)


def plain(bundle: Bundle, dtype: str = "float32") -> tuple[Backbone, Gates]:
    backbone = load(bundle, dtype)
    return backbone, install_mixture(backbone.stack.model, load_experts(bundle))


def served(bundle: Bundle, dtype: str = "float32", quantise: str = "none") -> tuple[Backbone, Gates]:
    backbone = load(bundle, dtype)
    gates, _ = install_serving(backbone.stack.model, load_experts(bundle), quantise)
    return backbone, gates


@torch.inference_mode()
def logits(model: tuple[Backbone, Gates], rows: list[Weights], ids: Tensor = IDS, mask: Tensor | None = MASK) -> Tensor:
    backbone, gates = model
    gates.set(rows)
    state = backbone.stack.begin(ids, attention_mask=mask)
    found = backbone.stack.logits(backbone.stack.run(state, backbone.stack.depth))
    return found if mask is None else found[mask.bool()]


@pytest.mark.parametrize("rows", [[BARE, BARE], [MIXED, MIXED], [BARE, MIXED], [Weights(0, 0, 1, 0), MIXED]], ids=str)
def test_served_layers_give_what_the_family_gives(any_tiny: Bundle, rows: list[Weights]) -> None:
    expected = logits(plain(any_tiny), rows)

    found = logits(served(any_tiny), rows)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_served_layers_decode_with_a_cache_as_in_one_pass(any_tiny: Bundle) -> None:
    backbone, gates = served(any_tiny)
    stack, ids = backbone.stack, IDS[:1]
    whole = logits((backbone, gates), [MIXED], ids, None)

    with torch.inference_mode():
        cache, pieces = stack.new_cache(), []
        for start, stop in ((0, 6), *((i, i + 1) for i in range(6, ids.shape[1]))):
            state = stack.begin(ids[:, start:stop], cache=cache)
            pieces.append(stack.logits(stack.run(state, stack.depth)))

    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_only_families_known_here_are_fused(any_tiny: Bundle) -> None:
    backbone, _ = served(any_tiny)
    family = backbone.stack.model.config.model_type

    assert all(isinstance(layer, FusedLayer) == (family in FAMILIES) for layer in backbone.stack.layers)


def test_a_states_tensor_that_was_read_is_not_changed_by_later_layers(tiny: Bundle) -> None:
    backbone, gates = served(tiny)
    gates.set([MIXED, MIXED])
    with torch.inference_mode():
        state = backbone.stack.begin(IDS, attention_mask=MASK)
        read = backbone.stack.run(state, 2)
        kept = read.clone()
        backbone.stack.run(state, backbone.stack.depth)

    assert torch.equal(read, kept)


def test_layers_with_and_without_bias_join() -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(8, 6, bias=True), nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8)
    gates = Gates([1.0, 1.0, 1.0], torch.device("cpu"), torch.float32)

    together = joined([a.requires_grad_(False), b.requires_grad_(False)], gates)

    torch.testing.assert_close(together(x), torch.cat([a(x), b(x)], dim=-1))


@needs_packing
def test_packed_layers_give_what_plain_ones_give_but_for_rounding(any_tiny: Bundle) -> None:
    expected = logits(plain(any_tiny, "bfloat16"), [MIXED, BARE]).float()

    model = served(any_tiny, "bfloat16")
    found = logits(model, [MIXED, BARE]).float()

    assert not [m for m in model[0].stack.model.modules() if isinstance(m, nn.Linear)]
    exact = logits(plain(any_tiny), [MIXED, BARE])
    # no further from float32 than twice what bfloat16 itself is
    assert (found - exact).norm() < 2 * (expected - exact).norm()


@needs_packing
@pytest.mark.parametrize("size", [(64, 96, True), (30, 48, False), (576, 192, False)], ids=str)
def test_a_packed_row_is_the_same_to_the_bit_whoever_is_beside_it(size: tuple[int, int, bool]) -> None:
    torch.manual_seed(0)
    inner, outer, bias = size
    layer = nn.Linear(inner, outer, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(70, inner, dtype=torch.bfloat16)

    made = PackedLinear(layer)

    together = made(x)
    for rows in (1, 2, 3, 8, 16, 17, 33, 64):
        assert torch.equal(made(x[:rows]), together[:rows])
    torch.testing.assert_close(together, layer(x), rtol=0.02, atol=0.02)


def test_nothing_is_packed_in_float32() -> None:
    model = nn.Sequential(nn.Linear(8, 8))

    assert pack(model) == 0
    assert isinstance(model[0], nn.Linear)


def test_nothing_is_packed_where_torch_lacks_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: nn.Linear) -> PackedLinear:
        raise AttributeError("no such operation")

    monkeypatch.setattr(packed, "PackedLinear", missing)
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))

    assert pack(model) == 0
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_copies_are_made_of_served_layers_but_not_of_the_experts_second_factors(tiny: Bundle, dtype: str) -> None:
    backbone, _ = served(tiny, dtype, "int8")
    model = backbone.stack.model

    mixtures = [m for m in model.modules() if isinstance(m, FoldedMixture)]
    assert mixtures
    assert all(isinstance(m.both, Int8Linear) and not isinstance(m.up, Int8Linear) for m in mixtures)
    assert isinstance(model.lm_head, Int8Linear)
    assert not [m for m in model.modules() if isinstance(m, MixtureLinear)]


def test_a_frozen_layer_of_given_weights_keeps_them() -> None:
    weight = torch.randn(3, 5)

    made = linear(weight, torch.ones(3))

    assert made.weight.data_ptr() == weight.data_ptr()
    assert not made.weight.requires_grad
    torch.testing.assert_close(
        made(torch.ones(2, 5)), torch.nn.functional.linear(torch.ones(2, 5), weight, torch.ones(3))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_bundle_says_the_same_served_as_plain(dtype: str) -> None:
    """Where the next token moves, it does so by rounding: far less than the bound on quantised weights."""
    default_bundle, settings = Bundle.load("smollm2-135m"), Settings.load(threads=2, dtype=dtype)
    found = []
    for make in (lambda m, e: install_mixture(m, e), lambda m, e: install_serving(m, e, "none")[0]):
        reader, encoder = open_reader(default_bundle, settings)
        gates = make(reader.stack.model, load_experts(default_bundle))
        ids = torch.tensor([encoder.tokenizer.encode("Photosynthesis turns light into energy. " * 8)])
        backbone = Backbone(stack=reader.stack, encoder=encoder)
        found.append(torch.log_softmax(logits((backbone, gates), [MIXED], ids, None).float(), dim=-1))

    nats = (found[0].exp() * (found[0] - found[1])).sum(-1).mean().item()

    assert nats < (1e-6 if dtype == "float32" else 3e-3)
