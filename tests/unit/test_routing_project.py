"""Shares become weights within bounds."""

import math

import pytest

from hhh_router.routing import kl_nats, project, tilt, weigh
from hhh_router.types import EXPERTS, Posterior, Weights

EVEN = Posterior(0.25, 0.25, 0.25, 0.25)
FREE = dict.fromkeys(EXPERTS, 0.0)
FULL = dict.fromkeys(EXPERTS, 1.0)


def test_shares_within_bounds_are_only_normalised():
    found = project({"base": 1, "helpful": 2, "harmless": 3, "honest": 4}, FREE, FULL)

    assert list(found.as_dict().values()) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_what_a_bound_takes_comes_from_the_others_in_proportion():
    found = project({"base": 0.6, "helpful": 0.3, "harmless": 0.1}, {"harmless": 0.55}, FULL)

    assert found.harmless == 0.55
    assert found.base / found.helpful == pytest.approx(2)


def test_bounds_that_leave_no_choice_are_the_weights():
    tight = {"base": 0.1, "helpful": 0.2, "harmless": 0.3, "honest": 0.4}

    assert project({"base": 1.0}, tight, tight).as_dict() == pytest.approx(tight)
    assert project({"base": 1.0}, tight, FULL).as_dict() == pytest.approx(tight)
    assert project({"base": 1.0}, FREE, tight).as_dict() == pytest.approx(tight)


def test_an_expert_without_a_share_gets_its_lower_bound():
    found = project({"base": 0.5, "helpful": 0.5}, {"honest": 0.2}, FULL)

    assert found == Weights(0.4, 0.4, 0.0, 0.2)


def test_experts_without_a_share_divide_what_nobody_else_may_take():
    found = project({"helpful": 1.0}, FREE, {**FULL, "helpful": 0.4, "honest": 0.1})

    assert found.as_dict() == pytest.approx({"base": 0.25, "helpful": 0.4, "harmless": 0.25, "honest": 0.1})


def test_no_shares_at_all_are_divided_evenly():
    assert project({}, FREE, FULL) == Weights(0.25, 0.25, 0.25, 0.25)


def test_shares_many_orders_apart_still_sum_to_one():
    found = project({"base": 1e300, "helpful": 1e-300, "harmless": 5e-324}, {"honest": 0.1}, {**FULL, "base": 0.5})

    assert sum(found.as_dict().values()) == pytest.approx(1, abs=1e-12)
    assert found.base == 0.5  # beside it the other shares are nothing, so they divide the rest
    assert [found.helpful, found.harmless, found.honest] == pytest.approx([1 / 6] * 3)


@pytest.mark.parametrize("share", [math.nan, math.inf, -0.1])
def test_shares_that_are_no_numbers_are_an_error(share):
    with pytest.raises(ValueError, match="shares must be finite"):
        project({"base": share}, FREE, FULL)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (dict.fromkeys(EXPERTS, 0.3), FULL),
        (FREE, dict.fromkeys(EXPERTS, 0.2)),
        ({**FREE, "base": 0.5}, {**FULL, "base": 0.4}),
        ({**FREE, "base": math.nan}, FULL),
        ({**FREE, "base": -0.1}, FULL),
    ],
)
def test_bounds_that_cannot_be_met_are_an_error(lower, upper):
    with pytest.raises(ValueError, match=r"bounds must satisfy|no weights that sum to 1"):
        project(EVEN.as_dict(), lower, upper)


def test_strength_zero_leaves_the_router_alone():
    base = Posterior(0.1, 0.2, 0.3, 0.4)

    found = weigh(base, prior={"helpful": 100.0}, train_prior=EVEN, strength=0.0, lower=FREE, upper=FULL)

    assert found.as_dict() == pytest.approx(base.as_dict())


def test_strength_one_is_the_exact_prior_shift_correction():
    base = Posterior(0.1, 0.2, 0.3, 0.4)
    train = Posterior(0.4, 0.3, 0.2, 0.1)
    prior = {"base": 1.0, "helpful": 2.0, "harmless": 3.0, "honest": 4.0}

    found = weigh(base, prior=prior, train_prior=train, strength=1.0, lower=FREE, upper=FULL)

    expected = [base[e] * prior[e] / train[e] for e in EXPERTS]  # Bayes: p · new prior / old prior
    assert list(found.as_dict().values()) == pytest.approx([x / sum(expected) for x in expected])


def test_a_prior_equal_to_the_training_prior_changes_nothing():
    train = Posterior(0.4, 0.3, 0.2, 0.1)
    base = Posterior(0.1, 0.2, 0.3, 0.4)
    prior = {e: 7 * train[e] for e in EXPERTS}

    found = weigh(base, prior=prior, train_prior=train, strength=0.7, lower=FREE, upper=FULL)

    assert found.as_dict() == pytest.approx(base.as_dict())


def test_a_prior_of_zero_rules_an_expert_out_and_a_bound_brings_it_back():
    prior = {"base": 1.0, "helpful": 1.0, "harmless": 0.0, "honest": 1.0}

    out = weigh(EVEN, prior=prior, train_prior=EVEN, strength=0.5, lower=FREE, upper=FULL)
    back = weigh(EVEN, prior=prior, train_prior=EVEN, strength=0.5, lower={"harmless": 0.2}, upper=FULL)

    assert out.harmless == 0.0
    assert back.harmless == 0.2


def test_a_prior_that_rules_out_all_the_router_wants_stands_alone():
    prior = {"base": 0.0, "helpful": 0.0, "harmless": 1.0, "honest": 3.0}

    shares = tilt(Posterior(0.5, 0.5, 0.0, 0.0), prior=prior, train_prior=EVEN, strength=0.5)

    assert shares == {"base": 0.0, "helpful": 0.0, "harmless": 0.25, "honest": 0.75}


@pytest.mark.parametrize("prior", [{"base": -1.0}, {"base": math.nan}, dict.fromkeys(EXPERTS, 0.0)])
def test_a_prior_that_is_none_is_an_error(prior):
    with pytest.raises(ValueError, match="prior must be finite"):
        tilt(EVEN, prior=prior, train_prior=EVEN, strength=0.5)


def test_a_strength_outside_zero_to_one_is_an_error():
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength must lie in"):
            tilt(EVEN, prior={}, train_prior=EVEN, strength=strength)


def test_the_policy_shift_is_the_divergence_in_nats():
    weights, posterior = Weights(0.5, 0.5, 0.0, 0.0), Posterior(0.25, 0.25, 0.25, 0.25)

    assert kl_nats(weights, posterior) == pytest.approx(math.log(2))


def test_the_policy_shift_is_finite_where_the_posterior_is_zero():
    assert 20 < kl_nats(Weights(0.0, 0.0, 1.0, 0.0), Posterior(1.0, 0.0, 0.0, 0.0)) < 30
