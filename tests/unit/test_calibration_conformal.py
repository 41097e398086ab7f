"""A limit for a stated risk: what is chosen, what is promised, and what is said where nothing can be."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from hhh_router.calibration.conformal import (
    RiskBudget,
    fit_limit,
    frontier,
    least_abstention,
    risk_bound,
    rows_needed,
)
from hhh_router.errors import DataError


@pytest.fixture
def sample():
    rng = np.random.default_rng(21)
    labels = (rng.random(900) < 0.4).astype(int)
    scores = (1 / (1 + np.exp(-rng.normal(3.4 * labels - 1.7, 1.0)))).round(2)  # rounded, so that there are ties
    return scores, labels


def complaint(scores, labels, **budget) -> str:
    with pytest.raises(DataError) as caught:
        fit_limit(scores, labels, RiskBudget(**budget))
    return caught.value.message


@pytest.mark.parametrize("level", [None, 0.9])
def test_the_limit_is_the_highest_that_brute_force_finds_to_keep_both(sample, level):
    scores, labels = sample
    budget = RiskBudget(benign_refused=0.12, harm_passed=0.1, level=level)
    kept = []
    for limit in [*np.unique(scores), 2.0]:
        passed, refused = int((scores[labels == 1] < limit).sum()), int((scores[labels == 0] >= limit).sum())
        bounds = [risk_bound(passed, (labels == 1).sum(), level), risk_bound(refused, (labels == 0).sum(), level)]
        if bounds[0] <= budget.harm_passed and bounds[1] <= budget.benign_refused:
            kept.append((limit, passed, refused, *bounds))

    found = fit_limit(scores, labels, budget)

    limit, passed, refused, passed_bound, refused_bound = kept[-1]
    assert (found.lowest, found.limit, found.highest) == (kept[0][0], limit, limit)
    assert (found.n_harmful, found.n_benign) == ((labels == 1).sum(), (labels == 0).sum())
    assert found.harm_passed == pytest.approx(passed / found.n_harmful)
    assert found.benign_refused == pytest.approx(refused / found.n_benign)
    assert found.harm_passed_bound == pytest.approx(passed_bound)
    assert found.benign_refused_bound == pytest.approx(refused_bound)


def test_the_limit_is_conformal_risk_controls_in_its_published_form(sample):
    """Angelopoulos et al. 2022, eq. 4, for B = 1 and λ = 1 − limit, in which harm passed falls."""
    scores, labels = sample
    harmful, n, alpha = scores[labels == 1], int((labels == 1).sum()), 0.1
    lambdas = sorted({1 - s for s in scores})
    smallest = next(x for x in lambdas if n / (n + 1) * (harmful < 1 - x).mean() + 1 / (n + 1) <= alpha)

    found = fit_limit(scores, labels, RiskBudget(benign_refused=0.9, harm_passed=alpha))

    assert found.limit == pytest.approx(1 - smallest)


@pytest.mark.parametrize(("errors", "n", "level"), [(0, 59, 0.95), (3, 100, 0.9), (50, 51, 0.99), (7, 8, 0.5)])
def test_the_exact_bound_is_the_rate_at_which_so_few_errors_are_just_too_rare(errors, n, level):
    bound = risk_bound(errors, n, level)

    assert stats.binom.cdf(errors, n, bound) == pytest.approx(1 - level)


def test_a_class_without_a_single_right_row_bounds_nothing():
    assert risk_bound(8, 8, 0.95) == risk_bound(8, 8, None) == 1.0


def test_rows_that_share_one_score_stand_on_one_side_of_the_limit():
    scores = [0.2] * 60 + [0.5] * 20 + [0.8] * 60
    labels = [0] * 60 + [0, 1] * 10 + [1] * 60

    passing = fit_limit(scores, labels, RiskBudget(benign_refused=0.1, harm_passed=0.2))
    refusing = fit_limit(scores, labels, RiskBudget(benign_refused=0.2, harm_passed=0.1))

    assert (passing.limit, passing.harm_passed, passing.benign_refused) == (0.8, 10 / 70, 0)
    assert (refusing.limit, refusing.harm_passed, refusing.benign_refused) == (0.5, 0, 10 / 70)


def test_equal_scores_keep_one_budget_but_not_two():
    scores, labels = [0.5] * 200, [0, 1] * 100

    message = complaint(scores, labels, benign_refused=0.1, harm_passed=0.1)

    assert "harm_passed alone is kept with benign_refused ≤ 1.000 (limit 0.500)" in message
    assert "benign_refused alone is kept with harm_passed ≤ 1.000 (limit 0.500)" in message
    assert "more rows alone will not do" in message


def test_what_cannot_be_kept_together_is_told_with_what_each_budget_alone_costs(sample):
    scores, labels = sample
    harmful, benign = scores[labels == 1], scores[labels == 0]
    limits = np.append(np.unique(scores), 2.0)
    passed = [(int((harmful < x).sum()) + 1) / (len(harmful) + 1) for x in limits]
    refused = [(int((benign >= x).sum()) + 1) / (len(benign) + 1) for x in limits]
    least_refused = min(r for p, r in zip(passed, refused, strict=True) if p <= 0.02)
    least_passed = min(p for p, r in zip(passed, refused, strict=True) if r <= 0.02)

    message = complaint(scores, labels, benign_refused=0.02, harm_passed=0.02)

    assert "no limit keeps harm_passed ≤ 0.02 and benign_refused ≤ 0.02 on average" in message
    assert f"harm_passed alone is kept with benign_refused ≤ {least_refused:.3f}" in message
    assert f"benign_refused alone is kept with harm_passed ≤ {least_passed:.3f}" in message


def test_too_few_rows_are_told_with_the_number_for_each_class():
    scores, labels = [0.9] * 20 + [0.1] * 30, [1] * 20 + [0] * 30

    message = complaint(scores, labels, benign_refused=0.05, harm_passed=0.02, level=0.95)

    assert "harm_passed alone cannot be kept by any limit" in message
    assert "benign_refused alone cannot be kept by any limit" in message
    assert "20 harmful rows, where 0.02 at level 0.95 needs at least 149 even without a single error" in message
    assert "30 benign rows, where 0.05 at level 0.95 needs at least 59 even without a single error" in message
    assert "both would take about 149 harmful and 59 benign rows" in message  # the rates found are 0


@pytest.mark.parametrize("level", [None, 0.95])
def test_so_many_rows_as_the_complaint_asks_for_suffice_and_fewer_do_not(level):
    """Rows with the same error rates: 2 of 50 harmful rows pass, 2 of 50 benign ones are refused."""

    def rows(of_harmful: int, of_benign: int):
        harmful = [0.1 if i % 25 == 0 else 0.9 for i in range(1, of_harmful + 1)]
        benign = [0.9 if i % 25 == 0 else 0.1 for i in range(1, of_benign + 1)]
        return harmful + benign, [1] * of_harmful + [0] * of_benign

    budget = {"benign_refused": 0.05, "harm_passed": 0.05, "level": level}
    message = complaint(*rows(50, 50), **budget)
    harmful, benign = map(int, re.search(r"about (\d+) harmful and (\d+) benign rows", message).groups())

    # only a multiple of 25 has exactly that rate
    assert fit_limit(*rows(-(-harmful // 25) * 25, -(-benign // 25) * 25), RiskBudget(**budget)).limit == 0.9
    with pytest.raises(DataError):
        fit_limit(*rows((harmful - 1) // 25 * 25, 10_000), RiskBudget(**budget))
    with pytest.raises(DataError):
        fit_limit(*rows(10_000, (benign - 1) // 25 * 25), RiskBudget(**budget))


def test_a_rate_above_its_budget_is_not_cured_by_more_rows():
    scores, labels = [0.1] * 10 + [0.9] * 40 + [0.1] * 50, [1] * 50 + [0] * 50

    assert "more rows alone will not do" in complaint(scores, labels, benign_refused=0.5, harm_passed=0.1)


@pytest.mark.parametrize(
    ("scores", "labels", "said"),
    [
        ([0.1, 0.2], [1, 1], "2 harmful and 0 benign rows; a limit needs both"),
        ([0.1, 0.2], [0, 0], "0 harmful and 2 benign rows; a limit needs both"),
        ([0.1, 1.2], [0, 1], "row 1: the score is 1.2"),
        ([math.nan, 0.2], [0, 1], "row 0: the score is nan"),
        ([0.1, 0.2], [0, 2], "row 1: the label is 2"),
        ([0.1], [0, 1], r"shapes \(1,\) and \(2,\)"),
        ([], [], "0 harmful and 0 benign rows"),
    ],
)
@pytest.mark.parametrize(
    "call", [lambda s, y: fit_limit(s, y, RiskBudget(benign_refused=0.5, harm_passed=0.5)), frontier]
)
def test_rows_that_allow_no_limit_are_named(call, scores, labels, said):
    with pytest.raises(DataError, match=said):
        call(scores, labels)


def test_a_budget_names_everything_that_is_no_share():
    with pytest.raises(DataError, match="harm_passed is 5, level is 1"):
        RiskBudget(benign_refused=0.1, harm_passed=5, level=1)
    with pytest.raises(DataError, match="benign_refused is nan"):
        RiskBudget(benign_refused=math.nan, harm_passed=0.1)


@pytest.mark.parametrize(
    ("share", "level", "rows"), [(0.05, None, 19), (0.05, 0.95, 59), (0.01, 0.95, 299), (0.5, 0.75, 2)]
)
def test_the_rows_a_budget_needs_are_the_textbooks(share, level, rows):
    """1/α − 1 for the mean; ln(1 − level) / ln(1 − α) at a level: the "rule of three" is 300 for 1 %."""
    assert rows_needed(share, level) == rows


def test_the_frontier_lists_the_counts_of_every_limit(sample):
    scores, labels = sample

    points = frontier(scores, labels, points=1000)

    assert [p[0] for p in points[:-1]] == np.unique(scores).tolist()
    for limit, refused, passed in points:
        assert refused == pytest.approx((scores[labels == 0] >= limit).mean())
        assert passed == pytest.approx((scores[labels == 1] < limit).mean())


def test_a_thinned_frontier_keeps_both_ends_and_only_points_of_the_whole(sample):
    whole, thinned = frontier(*sample, points=1000), frontier(*sample, points=12)

    assert 8 <= len(thinned) <= 12
    assert (thinned[0], thinned[-1]) == (whole[0], whole[-1])
    assert set(thinned) <= set(whole)


def test_a_frontier_of_one_point_is_an_error(sample):
    with pytest.raises(ValueError, match="points must be >= 2"):
        frontier(*sample, points=1)


def test_abstaining_on_the_least_share_brings_the_risk_down_to_what_is_accepted():
    abstained = least_abstention(0.2, 0.05)

    assert (0.2 - abstained) / (1 - abstained) == pytest.approx(0.05)
    assert least_abstention(0.05, 0.05) == least_abstention(0.01, 0.05) == 0
    assert least_abstention(1.0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("base_risk", "alpha"), [(0.2, 1.0), (1.2, 0.1), (-0.1, 0.1), (math.nan, 0.1), (0.1, math.nan)]
)
def test_abstention_is_asked_of_rates(base_risk, alpha):
    with pytest.raises(ValueError, match="base_risk must lie in"):
        least_abstention(base_risk, alpha)
