"""Bets against a bound: how often they err when the bound holds, whenever one looks, and what they are equal to."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from hhh_router.calibration.betting import (
    BETS,
    Row,
    log_miscalibration,
    log_wealth,
    lower_bound,
    upper_bound,
    weighted_mean,
)

ALPHA = 0.05
rows = st.lists(
    st.builds(
        Row,
        x=st.floats(0, 1),
        weight=st.sampled_from([1.0, 2.5, 20.0]),
        n=st.integers(1, 50),
    ),
    min_size=1,
    max_size=12,
)


@given(rows, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_evidence_against_a_bound_never_rises_with_the_bound(found: list[Row], m: float, other: float) -> None:
    low, high = sorted((m, other))

    assert log_wealth(found, low) >= log_wealth(found, high) - 1e-9


@given(rows)
def test_the_interval_holds_the_estimate_and_is_wider_with_more_confidence(found: list[Row]) -> None:
    mean = weighted_mean(found)

    assert lower_bound(found, ALPHA) <= mean + 1e-9
    assert upper_bound(found, ALPHA) >= mean - 1e-9
    assert lower_bound(found, 0.01) <= lower_bound(found, ALPHA)


@given(rows)
def test_what_is_seen_in_groups_or_one_by_one_says_the_same(found: list[Row]) -> None:
    single = [Row(r.x, r.weight) for r in found for _ in range(r.n)]

    assert log_wealth(single[::-1], 0.3) == pytest.approx(log_wealth(found, 0.3), abs=1e-6)


@pytest.mark.parametrize(("k", "n", "m"), [(0, 10, 0.2), (5, 25, 0.05), (40, 100, 0.3), (7, 7, 0.9)])
def test_of_counts_it_is_a_mixture_of_likelihood_ratios(k: int, n: int, m: float) -> None:
    # 1 + c(x/m − 1) is the likelihood ratio of a coin with q = m + c(1 − m) to one with m; by scipy's own formula
    ratios = [binom.pmf(k, n, m + c * (1 - m)) / binom.pmf(k, n, m) for c in BETS]

    assert log_wealth([Row(1.0, n=k), Row(0.0, n=n - k)], m) == pytest.approx(math.log(np.mean(ratios)), abs=1e-9)


def _paths(gains: np.ndarray) -> np.ndarray:
    """Largest wealth on the way of each row of gains; by numpy, not by the code under test."""
    return np.stack([np.cumsum(np.log1p(c * gains), axis=1) for c in BETS]).transpose(1, 2, 0)


def test_it_is_wrong_less_often_than_stated_however_often_one_looks() -> None:
    rng = np.random.default_rng(1)
    m, runs, length = 0.05, 2000, 400
    x = rng.random((runs, length)) < m  # exactly at the bound: the worst case that is still fine

    wealth = np.log(np.exp(_paths(x / m - 1)).mean(axis=2)).max(axis=1)

    assert (wealth >= math.log(1 / ALPHA)).mean() < ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    k = int(x[0].sum())
    end = np.log(np.exp(_paths(x[:1] / m - 1)).mean(axis=2))[0, -1]
    assert log_wealth([Row(1.0, n=k), Row(0.0, n=length - k)], m) == pytest.approx(end, abs=1e-9)


def test_looking_at_a_binomial_bound_after_every_row_errs_far_more_often() -> None:
    rng = np.random.default_rng(2)
    m, runs, length = 0.05, 400, 400
    errors = np.cumsum(rng.random((runs, length)) < m, axis=1)
    n = np.arange(1, length + 1)

    rejected = (binom.sf(errors - 1, n, m) <= ALPHA).any(axis=1)

    assert rejected.mean() > 2 * ALPHA  # why no plain Clopper-Pearson bound is watched


def test_weights_make_rates_of_all_traffic_out_of_a_lopsided_draw() -> None:
    # 1 in 50 benign requests is refused; of the refused every second is labelled, of the others every 25th
    rng = np.random.default_rng(3)
    refused = rng.random(60_000) < 0.02
    p = np.where(refused, 0.5, 0.04)
    drawn = rng.random(60_000) < p
    found = [Row(1.0, 2.0, int((refused & drawn).sum())), Row(0.0, 25.0, int((~refused & drawn).sum()))]

    hajek = (refused[drawn] / p[drawn]).sum() / (1 / p[drawn]).sum()  # by numpy
    unweighted = refused[drawn].mean()

    assert weighted_mean(found) == pytest.approx(hajek, abs=1e-12)
    assert abs(hajek - 0.02) < 0.004
    assert unweighted > 0.15  # what one would believe without the weights
    assert lower_bound(found, ALPHA / 2) < 0.02 < upper_bound(found, ALPHA / 2)


def test_weighted_bets_err_less_often_than_stated() -> None:
    rng = np.random.default_rng(4)
    m, runs, length = 0.1, 1000, 1500
    refused = rng.random((runs, length)) < m
    drawn = rng.random((runs, length)) < np.where(refused, 0.5, 0.05)
    weight = np.where(refused, 2.0, 20.0) * drawn

    wealth = np.log(np.exp(_paths((weight / 20) * (refused / m - 1))).mean(axis=2)).max(axis=1)

    assert (wealth >= math.log(1 / ALPHA)).mean() < ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    k, rest = int((refused[0] & drawn[0]).sum()), int((~refused[0] & drawn[0]).sum())
    end = np.log(np.exp(_paths((weight[:1] / 20) * (refused[:1] / m - 1))).mean(axis=2))[0, -1]
    assert log_wealth([Row(1.0, 2.0, k), Row(0.0, 20.0, rest)], m) == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("slope", [0.4, 2.5], ids=["too extreme", "too timid"])
def test_miscalibration_is_found_and_calibration_is_not_accused(slope: float) -> None:
    rng = np.random.default_rng(5)
    logit = rng.normal(0, 2, 600)
    p = 1 / (1 + np.exp(-logit))
    right = rng.random(600) < p
    wrong = rng.random(600) < 1 / (1 + np.exp(-slope * logit))

    assert log_miscalibration([(q, bool(y), 1.0) for q, y in zip(p, wrong, strict=True)], 0.02) > math.log(20)
    assert log_miscalibration([(q, bool(y), 1.0) for q, y in zip(p, right, strict=True)], 0.02) < math.log(20)


def test_a_calibrated_head_is_accused_less_often_than_stated() -> None:
    rng = np.random.default_rng(6)
    accused = 0
    for _ in range(200):
        p = rng.beta(0.5, 2, 100)
        y = rng.random(100) < p
        found = [(q, bool(v), 1.0) for q, v in zip(p, y, strict=True)]
        accused += any(log_miscalibration(found[:n], 0.0) >= math.log(20) for n in (25, 50, 75, 100))

    assert accused <= 200 * ALPHA + 3 * math.sqrt(200 * ALPHA)
