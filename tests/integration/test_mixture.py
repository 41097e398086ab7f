"""The stack, the mixture and one pass, on tiny random models of every supported family."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hhh_router.bundle import Bundle
from hhh_router.model.base import Backbone, load_backbone
from hhh_router.model.experts import load_experts
from hhh_router.model.mixture import Gates, install_mixture
from hhh_router.types import DIMENSIONS, Weights

pytestmark = pytest.mark.integration

IDS = torch.tensor([[5, 9, 33, 70, 12, 8, 101, 44, 3, 17, 29, 64]])
ONE = {
    "helpful": Weights(0, 1, 0, 0),
    "harmless": Weights(0, 0, 1, 0),
    "honest": Weights(0, 0, 0, 1),
}
MIXED = Weights(0.1, 0.2, 0.3, 0.4)


def load(bundle: Bundle) -> Backbone:
    return load_backbone(bundle.root / "backbone", bundle.manifest.backbone)


def mixed(bundle: Bundle) -> tuple[Backbone, Gates]:
    backbone = load(bundle)
    return backbone, install_mixture(backbone.stack.model, load_experts(bundle))


@torch.inference_mode()
def logits(backbone: Backbone, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None) -> torch.Tensor:
    state = backbone.stack.begin(ids, attention_mask=mask)
    return backbone.stack.logits(backbone.stack.run(state, backbone.stack.depth))


def test_layer_loop_equals_transformers_own_forward(any_tiny: Bundle) -> None:
    backbone = load(any_tiny)
    reference = AutoModelForCausalLM.from_pretrained(any_tiny.root / "backbone", dtype=torch.float32).eval()

    with torch.inference_mode():
        expected = reference(IDS).logits

    assert torch.equal(logits(backbone), expected)


def test_decoding_with_a_cache_equals_one_full_pass(any_tiny: Bundle) -> None:
    backbone, gates = mixed(any_tiny)
    gates.set([MIXED])
    stack = backbone.stack

    with torch.inference_mode():
        cache = stack.new_cache()
        pieces = []
        for start, stop in ((0, 6), *((i, i + 1) for i in range(6, IDS.shape[1]))):
            state = stack.begin(IDS[:, start:stop], cache=cache)
            stack.run(state, 2)  # a pause in the middle must not matter
            pieces.append(stack.logits(stack.run(state, stack.depth)))

    torch.testing.assert_close(torch.cat(pieces, 1), logits(backbone), rtol=1e-4, atol=1e-5)


def test_all_weight_on_base_is_the_bare_backbone_bit_for_bit(any_tiny: Bundle) -> None:
    bare = logits(load(any_tiny))
    backbone, gates = mixed(any_tiny)

    gates.set([Weights(1, 0, 0, 0)])

    assert torch.equal(logits(backbone), bare)


def test_a_base_row_stays_bare_beside_mixed_rows(any_tiny: Bundle) -> None:
    bare = logits(load(any_tiny), IDS.repeat(2, 1))
    backbone, gates = mixed(any_tiny)

    gates.set([MIXED, Weights(1, 0, 0, 0)])
    together = logits(backbone, IDS.repeat(2, 1))

    assert torch.equal(together[1], bare[1])
    assert not torch.allclose(together[0], bare[0])


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_one_expert_alone_equals_peft(any_tiny: Bundle, dimension: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(any_tiny.root / "backbone", dtype=torch.float32)
    reference = PeftModel.from_pretrained(reference, any_tiny.root / "experts" / dimension).eval()
    backbone, gates = mixed(any_tiny)
    gates.set([ONE[dimension]])

    with torch.inference_mode():
        expected = reference(IDS).logits

    torch.testing.assert_close(logits(backbone), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(load(any_tiny)), atol=1e-2)


def test_a_mixture_equals_the_float64_sum_of_merged_updates(any_tiny: Bundle) -> None:
    reference = AutoModelForCausalLM.from_pretrained(any_tiny.root / "backbone", dtype=torch.float64).eval()
    for expert in load_experts(any_tiny):
        for module, factor in expert.factors.items():
            update = expert.scale * MIXED[expert.dimension] * (factor.up.double() @ factor.down.double())
            reference.get_submodule(module).weight.data += update
    backbone, gates = mixed(any_tiny)
    gates.set([MIXED])

    with torch.inference_mode():
        expected = reference(IDS).logits

    torch.testing.assert_close(logits(backbone).double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_one_batch_keep_their_own_weights(any_tiny: Bundle) -> None:
    backbone, gates = mixed(any_tiny)
    rows = [MIXED, ONE["harmless"], ONE["honest"]]
    alone = []
    for weights in rows:
        gates.set([weights])
        alone.append(logits(backbone)[0])

    gates.set(rows)
    together = logits(backbone, IDS.repeat(3, 1))

    for row, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_padded_rows_equal_unpadded_ones(any_tiny: Bundle) -> None:
    backbone = load(any_tiny)
    short = IDS[:, :7]
    ids = torch.zeros((2, IDS.shape[1]), dtype=torch.long)
    ids[0], ids[1, :7] = IDS[0], short[0]
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0

    padded = logits(backbone, ids, mask)

    torch.testing.assert_close(padded[1, :7], logits(backbone, short)[0], rtol=1e-4, atol=1e-5)
