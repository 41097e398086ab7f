"""Arrow routing: prototypes from factors, shares from states, and the temperature of least cross-entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hhh_router.calibration.arrow import arrow_shares, fit_temperature, prototypes
from hhh_router.errors import DataError

RNG = np.random.default_rng(0)
FACTORS = [(RNG.normal(size=(4, 12)), RNG.normal(size=(9, 4))) for _ in range(3)]
STATES = RNG.normal(size=(200, 12))
AXES = np.eye(3, 12)


def test_a_prototype_is_the_top_right_singular_vector_of_the_whole_product():
    found = prototypes(FACTORS)

    assert found.shape == (3, 12)
    for vector, (a, b) in zip(found, FACTORS, strict=True):
        expected = np.linalg.svd(b @ a)[2][0]
        assert abs(vector @ expected) == pytest.approx(1)
        assert vector @ vector == pytest.approx(1)


def test_no_direction_is_amplified_more_than_the_prototype():
    a, b = FACTORS[0]
    others = STATES / np.linalg.norm(STATES, axis=1, keepdims=True)

    gain = np.linalg.norm(b @ a @ prototypes(FACTORS)[0])

    assert (np.linalg.norm(others @ (b @ a).T, axis=1) <= gain).all()


def test_a_scale_of_the_expert_changes_no_prototype():
    scaled = [(a, 7 * b) for a, b in FACTORS]

    assert np.abs((prototypes(scaled) * prototypes(FACTORS)).sum(axis=1)) == pytest.approx(np.ones(3))


def test_shares_are_a_softmax_of_absolute_projections_and_base_has_none():
    states = np.zeros((1, 12))
    states[0, :3] = [1.0, -2.0, 0.5]

    (found,) = arrow_shares(states, AXES, temperature=0.5)

    raised = [math.exp(2.0), math.exp(4.0), math.exp(1.0)]
    assert found == pytest.approx([0.0, *(r / sum(raised) for r in raised)])


def test_the_sense_of_a_state_or_a_prototype_does_not_matter():
    expected = arrow_shares(STATES, AXES, 1.0)

    assert arrow_shares(-STATES, AXES, 1.0) == pytest.approx(expected)
    assert arrow_shares(STATES, AXES * [[1], [-1], [1]], 1.0) == pytest.approx(expected)


def test_huge_projections_do_not_overflow():
    found = arrow_shares(1e6 * STATES, AXES, 0.01)

    assert np.isfinite(found).all()
    assert found.sum(axis=1) == pytest.approx(np.ones(200))


def test_the_temperature_that_made_the_targets_is_found_again():
    targets = arrow_shares(STATES, AXES, temperature=0.37)

    assert fit_temperature(STATES, AXES, targets) == pytest.approx(0.37, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_temperature_is_the_one_a_plain_search_finds(scale):
    """With soft targets that also give shares to base, which are left aside."""
    targets = np.random.default_rng(1).dirichlet([3, 1, 1, 1], 200) + 0.8 * arrow_shares(STATES, AXES, 0.5)
    targets /= targets.sum(axis=1, keepdims=True)
    states = scale * STATES

    def loss(temperature):
        return -(targets[:, 1:] * np.log(arrow_shares(states, AXES, temperature)[:, 1:])).sum()

    best = min(scale * np.geomspace(0.3, 10, 3001), key=loss)

    assert fit_temperature(states, AXES, targets) == pytest.approx(best, rel=2e-3)


def test_targets_that_projections_explain_wholly_or_wrongly_give_a_finite_temperature():
    best = np.eye(4)[1 + np.abs(STATES[:, :3]).argmax(axis=1)]
    worst = np.eye(4)[1 + np.abs(STATES[:, :3]).argmin(axis=1)]

    cold, hot = (fit_temperature(STATES, AXES, targets) for targets in (best, worst))

    assert 0 < cold < 0.01
    assert 100 < hot < math.inf


def test_states_that_favour_no_expert_need_no_temperature():
    assert fit_temperature(np.zeros((5, 12)), AXES, np.full((5, 4), 0.25)) == 1.0


@pytest.mark.parametrize(
    ("factors", "complaint"),
    [
        ((np.ones((4, 12)), np.ones((9, 3))), r"A has shape \(4, 12\) and B \(9, 3\)"),
        ((np.ones((4, 11)), np.ones((9, 4))), r"expert 3: A has shape \(4, 11\)"),
        ((np.ones((4, 12)), np.zeros((9, 4))), "expert 3: BA is zero"),
        ((np.full((4, 12), np.nan), np.ones((9, 4))), "expert 3: its factors are not finite"),
    ],
)
def test_factors_without_a_prototype_are_named(factors, complaint):
    with pytest.raises(DataError, match=complaint):
        prototypes([*FACTORS, factors])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        arrow_shares(STATES, AXES, temperature)


@pytest.mark.parametrize(
    ("states", "axes", "complaint"),
    [
        (STATES[:, :5], AXES, r"states have shape \(200, 5\), prototypes \(3, 12\)"),
        (STATES, AXES[:2], r"prototypes \(2, 12\)"),
        (STATES[:0], AXES, r"states have shape \(0, 12\)"),
        (np.full((2, 12), np.inf), AXES, "not finite"),
    ],
)
def test_states_that_do_not_fit_are_named(states, axes, complaint):
    with pytest.raises(DataError, match=complaint):
        arrow_shares(states, axes, 1.0)


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (np.full((199, 4), 0.25), r"targets have shape \(199, 4\) for 200 rows"),
        (np.tile([1.0, 0.0, 0.0, 0.0], (200, 1)), "all base"),
        (np.tile([0.5, 0.6, 0.0, -0.1], (200, 1)), "below 0"),
    ],
)
def test_targets_that_cannot_be_fitted_are_named(targets, complaint):
    with pytest.raises(DataError, match=complaint):
        fit_temperature(STATES, AXES, targets)
