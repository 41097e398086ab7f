"""Whatever the evidence and the policy: weights are a distribution within the bounds, and the nearest one."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from hhh_router.policy.decide import raise_lower
from hhh_router.routing import kl_nats, posterior, project, weigh
from hhh_router.types import DIMENSIONS, EXPERTS, Posterior

EXACT = 1e-9

probability = st.floats(0, 1)
positive = st.floats(1e-3, 1.0)


@st.composite
def needs(draw):
    return {d: draw(probability) for d in DIMENSIONS}


@st.composite
def simplex(draw, kind=Posterior):
    parts = [draw(positive) for _ in EXPERTS]
    return kind(*(p / math.fsum(parts) for p in parts))


@st.composite
def feasible_bounds(draw):
    """Lower and upper bounds around some distribution, so that at least that one lies within them."""
    inside = draw(simplex())
    lower = {e: inside[e] * draw(probability) for e in EXPERTS}
    upper = {e: inside[e] + (1 - inside[e]) * draw(probability) for e in EXPERTS}
    return lower, upper


@st.composite
def raw_shares(draw):
    return {e: draw(st.one_of(st.just(0.0), st.floats(1e-9, 1e3))) for e in EXPERTS}


@given(raw_shares(), feasible_bounds())
def test_weights_sum_to_one_and_keep_their_bounds(shares, limits):
    lower, upper = limits

    found = project(shares, lower, upper)

    assert abs(math.fsum(found.as_dict().values()) - 1) <= EXACT
    for e in EXPERTS:
        assert lower[e] - EXACT <= found[e] <= upper[e] + EXACT


@given(needs(), simplex(), feasible_bounds(), st.floats(0, 1), raw_shares())
def test_every_evidence_gets_weights_under_every_prior(found_needs, train_prior, limits, strength, prior):
    assume(sum(prior.values()) > 0)
    lower, upper = limits

    found = weigh(
        posterior(found_needs), prior=prior, train_prior=train_prior, strength=strength, lower=lower, upper=upper
    )

    assert abs(math.fsum(found.as_dict().values()) - 1) <= EXACT
    assert all(lower[e] - EXACT <= found[e] <= upper[e] + EXACT for e in EXPERTS)
    assert 0 <= kl_nats(found, posterior(found_needs)) < math.inf


@given(raw_shares(), feasible_bounds())
def test_the_same_evidence_gives_the_same_weights(shares, limits):
    assert project(shares, *limits) == project(dict(reversed(shares.items())), *limits)


@given(raw_shares(), feasible_bounds(), st.sampled_from(EXPERTS), probability, probability)
def test_raising_a_floor_never_lowers_that_experts_weight(shares, limits, expert, one, other):
    lower, upper = limits
    low, high = sorted((one, other))

    before = project(shares, raise_lower(lower, upper, {expert: low}), upper)
    after = project(shares, raise_lower(lower, upper, {expert: high}), upper)

    assert after[expert] >= before[expert] - EXACT


@given(
    raw_shares(), feasible_bounds(), st.dictionaries(st.sampled_from(EXPERTS), probability), st.sampled_from(EXPERTS)
)
def test_a_floor_beside_others_never_lowers_that_experts_weight(shares, limits, wanted, expert):
    lower, upper = limits
    without = {e: w for e, w in wanted.items() if e != expert}

    before = project(shares, raise_lower(lower, upper, without), upper)
    after = project(shares, raise_lower(lower, upper, wanted), upper)

    assert after[expert] >= before[expert] - EXACT


@given(feasible_bounds(), st.dictionaries(st.sampled_from(EXPERTS), probability))
def test_raised_bounds_stay_feasible_and_never_below_the_policys(limits, wanted):
    lower, upper = limits

    raised = raise_lower(lower, upper, wanted)

    assert math.fsum(raised.values()) <= 1 + EXACT
    for e in EXPERTS:
        assert lower[e] <= raised[e] <= max(upper[e], lower[e]) + EXACT


@given(needs(), st.sampled_from(DIMENSIONS), probability)
def test_a_higher_need_never_lowers_its_experts_share(found_needs, dimension, need):
    low, high = sorted((found_needs[dimension], need))

    before = posterior({**found_needs, dimension: low})
    after = posterior({**found_needs, dimension: high})

    assert after[dimension] >= before[dimension] - 1e-15


@settings(max_examples=60)
@given(simplex(), feasible_bounds())
def test_the_projection_is_the_nearest_point_in_kl(shares, limits):
    """Compared with a general solver that knows nothing of clipping."""
    lower, upper = limits
    assume(all(upper[e] - lower[e] > 1e-3 for e in EXPERTS))
    p = np.array([shares[e] for e in EXPERTS])

    def divergence(w):
        w = np.clip(w, 1e-12, None)
        return float(np.sum(w * np.log(w / p)))

    def slope(w):
        return np.log(np.clip(w, 1e-12, None) / p) + 1

    found = np.array([project(shares.as_dict(), lower, upper)[e] for e in EXPERTS])
    solved = minimize(
        divergence,
        x0=_inside(lower, upper),
        jac=slope,
        bounds=[(lower[e], upper[e]) for e in EXPERTS],
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assume(solved.success)

    assert divergence(found) <= solved.fun + 1e-9
    assert found == pytest.approx(solved.x, abs=2e-4)


def _inside(lower, upper):
    low = np.array([lower[e] for e in EXPERTS])
    high = np.array([upper[e] for e in EXPERTS])
    return low + (high - low) * (1 - low.sum()) / (high - low).sum()


@given(simplex(), feasible_bounds(), st.randoms(use_true_random=False))
def test_no_other_point_within_the_bounds_is_nearer(shares, limits, random):
    """The same claim without a solver: mass moved between any two experts only takes the weights further away."""
    lower, upper = limits
    best = project(shares.as_dict(), lower, upper)

    def divergence(w):
        return math.fsum(w[e] * math.log(w[e] / shares[e]) for e in EXPERTS if w[e] > 0)

    giver, taker = random.sample(EXPERTS, 2)
    most = min(best[giver] - lower[giver], upper[taker] - best[taker])
    moved = best.as_dict()
    step = max(0.0, most) * random.random()
    moved[giver] -= step
    moved[taker] += step

    assert divergence(best.as_dict()) <= divergence(moved) + EXACT
