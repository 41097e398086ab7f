"""Needs become shares."""

import math

import pytest

from hhh_router.routing import GATES, posterior


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
