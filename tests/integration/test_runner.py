"""Many texts at once under their own weights must give what each gives alone."""

import pytest
import torch

from hhh_router.bundle import Bundle
from hhh_router.model.base import Backbone, load_backbone
from hhh_router.model.experts import load_experts
from hhh_router.model.mixture import install_mixture
from hhh_router.model.runner import Runner, as_reply
from hhh_router.types import Message, ReadRequest, Weights

pytestmark = pytest.mark.integration

BASE, HARMLESS, MIXED = Weights(1, 0, 0, 0), Weights(0, 0, 1, 0), Weights(0.25, 0.25, 0.25, 0.25)
TEXTS = ["Hello", "What is the tallest tree in the garden?", "", "List three towns by the sea, with a reason for each."]


@pytest.fixture(scope="module")
def backbone(tiny: Bundle) -> Backbone:
    return load_backbone(tiny.root / "backbone", tiny.manifest.backbone)


@pytest.fixture(scope="module")
def runner(tiny: Bundle, backbone: Backbone) -> Runner:
    gates = install_mixture(backbone.stack.model, load_experts(tiny))
    return Runner(backbone, gates, tiny.manifest.first_adapted_layer)


def ask(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def test_a_batch_of_mixed_weights_scores_each_reply_as_it_scores_alone(runner: Runner, backbone: Backbone) -> None:
    replies = [as_reply(backbone, ask(t), f"{t} indeed.", 200) for t in TEXTS]
    weights = [BASE, HARMLESS, MIXED, HARMLESS]

    together = runner.log_likelihoods(replies, {"bare": [BASE] * 4, "mixed": weights})

    for i, reply in enumerate(replies):
        alone = runner.log_likelihoods([reply], {"it": [weights[i]]})["it"][0]
        assert together["mixed"][i] == pytest.approx(alone, abs=1e-3)
    assert together["mixed"][0] == together["bare"][0]
    assert together["mixed"][1] != pytest.approx(together["bare"][1], abs=1e-3)


def test_the_bare_backbone_scores_as_transformers_does(runner: Runner, backbone: Backbone) -> None:
    reply = as_reply(backbone, ask(TEXTS[1]), "An old oak.", 200)

    found = runner.log_likelihoods([reply], {"bare": [BASE]})["bare"][0]

    with torch.no_grad():
        logits = backbone.stack.model(torch.tensor([reply.ids])).logits[0].log_softmax(-1)
    expected = sum(logits[i - 1, reply.ids[i]].item() for i in range(reply.start, len(reply.ids)))
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_batch_writes_the_replies_that_each_prompt_gets_alone(runner: Runner, backbone: Backbone) -> None:
    prompts = [backbone.encoder.encode(ReadRequest(messages=ask(t))).ids for t in TEXTS * 3]
    weights = [BASE, HARMLESS, MIXED, HARMLESS] * 3

    together = runner.generate(prompts, weights, max_tokens=12)

    for i in range(4):
        assert together[i] == runner.generate([prompts[i]], [weights[i]], max_tokens=12)[0]
        assert together[i + 4] == together[i]
    assert together[1] != runner.generate([prompts[1]], [BASE], max_tokens=12)[0]


def test_a_reply_that_is_cut_away_scores_nothing(runner: Runner, backbone: Backbone) -> None:
    reply = as_reply(backbone, ask("A long question about nothing at all"), "Yes.", 10)

    assert reply.tokens == 0
    assert runner.log_likelihoods([reply], {"bare": [BASE]})["bare"] == [0.0]
