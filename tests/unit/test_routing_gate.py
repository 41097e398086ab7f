"""Needs become shares."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from hhh_router.routing import GATES, posterior
from hhh_router.routing.gate import GATE_PARAMETERS
from hhh_router.types import EXPERTS

NEEDS = {"helpful": 0.9, "harmless": 0.2, "honest": 0.5}
LOGITS = np.log([1, 9, 0.25, 1])  # of base and the three needs


def dirichlet_params(weights, bias):
    named = {f"{e}.{of}": float(weights[i, j]) for i, e in enumerate(EXPERTS) for j, of in enumerate(EXPERTS)}
    return named | {f"{e}.bias": float(b) for e, b in zip(EXPERTS, bias, strict=True)}


def test_shares_are_in_proportion_to_the_odds_and_base_to_one():
    found = posterior({"helpful": 0.9, "harmless": 0.2, "honest": 0.5})

    odds = [1, 9, 0.25, 1]
    assert list(found.as_dict().values()) == pytest.approx([o / sum(odds) for o in odds])


def test_nothing_at_stake_leaves_the_base_model():
    assert posterior({"helpful": 0.0, "harmless": 0.0, "honest": 0.0}).base > 0.99


def test_a_certain_need_is_held_at_six_logits():
    certain = posterior({"helpful": 1.0, "harmless": 0.0, "honest": 0.0})

    assert certain.helpful / certain.base == pytest.approx(math.exp(6))
    assert certain == posterior({"helpful": 1 - 1e-12, "harmless": 1e-12, "honest": 1e-5})


def test_needs_of_other_heads_are_left_aside():
    needs = {"helpful": 0.5, "harmless": 0.5, "honest": 0.5}

    assert posterior({**needs, "injection": 0.9}) == posterior(needs)


@pytest.mark.parametrize("need", [math.nan, math.inf, -0.1, 1.1])
def test_a_need_that_is_no_probability_is_an_error(need):
    with pytest.raises(ValueError, match=r"needs\.harmless: .* is no probability"):
        posterior({"helpful": 0.5, "harmless": need, "honest": 0.5})


def test_a_missing_need_is_an_error():
    with pytest.raises(ValueError, match=r"needs\.honest: None is no probability"):
        posterior({"helpful": 0.5, "harmless": 0.5})


def test_an_unknown_gate_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=f"gate 'arrow' is not known; use {', '.join(GATES)}"):
        posterior({"helpful": 0.5, "harmless": 0.5, "honest": 0.5}, gate="arrow")


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_softmax_ts_divides_the_logits_of_all_four_by_the_temperature(temperature):
    found = posterior(NEEDS, "softmax_ts", {"temperature": temperature})

    assert list(found.as_dict().values()) == pytest.approx(softmax(LOGITS / temperature).tolist())


def test_dirichlet_is_a_linear_map_of_the_log_posterior():
    rng = np.random.default_rng(2)
    weights, bias = rng.normal(size=(4, 4)), rng.normal(size=4)

    found = posterior(NEEDS, "dirichlet", dirichlet_params(weights, bias))

    assert list(found.as_dict().values()) == pytest.approx(softmax(weights @ log_softmax(LOGITS) + bias).tolist())


@pytest.mark.parametrize(
    ("gate", "neutral"),
    [("softmax_ts", {"temperature": 1.0}), ("dirichlet", dirichlet_params(np.eye(4), np.zeros(4)))],
)
def test_a_larger_gate_contains_odds(gate, neutral):
    assert posterior(NEEDS, gate, neutral).as_dict() == pytest.approx(posterior(NEEDS).as_dict())


@pytest.mark.parametrize("need", [0.0, 1.0])
def test_every_gate_takes_certain_needs(need):
    params = {"odds": None, "softmax_ts": {"temperature": 0.01}, "dirichlet": dirichlet_params(50 * np.eye(4), [0] * 4)}
    certain = {"helpful": need, "harmless": need, "honest": need}

    assert set(params) == set(GATES)
    for gate in GATES:
        assert math.fsum(posterior(certain, gate, params[gate]).as_dict().values()) == pytest.approx(1)


def test_gates_are_listed_from_the_fewest_parameters_to_the_most():
    assert [len(GATE_PARAMETERS[gate]) for gate in GATES] == [0, 1, 20]


@pytest.mark.parametrize(
    ("gate", "params", "complaint"),
    [
        ("softmax_ts", None, "gate 'softmax_ts' needs temperature; 'temperature' is not given"),
        ("softmax_ts", {"temperature": 0.0}, "temperature must be > 0, found 0.0"),
        ("softmax_ts", {"temperature": math.nan}, "temperature must be finite, found nan"),
        ("softmax_ts", {"temperature": 1e-320}, "logits that are not finite"),
        ("softmax_ts", {"temperature": 1.0, "bias": 0.0}, "has no parameter 'bias'; it has temperature"),
        ("dirichlet", {"base.base": 1.0}, "'base.helpful' is not given"),
        ("odds", {"temperature": 1.0}, "gate 'odds' has no parameter 'temperature'; it has none"),
    ],
)
def test_parameters_that_are_not_the_gates_are_named(gate, params, complaint):
    with pytest.raises(ValueError, match=complaint):
        posterior(NEEDS, gate, params)
