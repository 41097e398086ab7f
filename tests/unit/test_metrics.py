"""Figures of merit against brute force, scipy and published examples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hhh_router.calibration import metrics
from hhh_router.errors import DataError


@pytest.fixture
def sample():
    rng = np.random.default_rng(11)
    p = rng.uniform(0.01, 0.99, 400).round(2)  # rounded, so that there are ties
    return p, (rng.random(400) < p).astype(int)


def test_nll_and_brier_are_their_definitions_row_by_row(sample):
    p, y = sample
    by_hand = [-math.log(a if b else 1 - a) for a, b in zip(p, y, strict=True)]

    assert metrics.nll(p, y) == pytest.approx(sum(by_hand) / len(by_hand))
    assert metrics.brier(p, y) == pytest.approx(sum((a - b) ** 2 for a, b in zip(p, y, strict=True)) / len(p))


def test_a_certain_mistake_costs_much_but_not_infinity():
    assert metrics.nll([0.0], [1]) == pytest.approx(-math.log(1e-12))


def test_auroc_is_the_share_of_ordered_pairs_with_ties_as_half(sample):
    p, y = sample
    pairs = itertools.product(p[y == 1], p[y == 0])
    by_hand = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])

    assert metrics.auroc(p, y) == pytest.approx(by_hand)


def test_auroc_is_scipys_mann_whitney_u(sample):
    p, y = sample
    u = stats.mannwhitneyu(p[y == 1], p[y == 0]).statistic

    assert metrics.auroc(p, y) == pytest.approx(u / ((y == 1).sum() * (y == 0).sum()))


@pytest.mark.parametrize("max_fpr", [0.0, 0.01, 0.05, 0.29, 1.0])
def test_recall_at_fpr_is_the_best_of_all_thresholds(sample, max_fpr):
    p, y = sample
    recalls = [0.0]
    for threshold in {*p, 2.0}:
        flagged = p >= threshold
        if flagged[y == 0].mean() <= max_fpr:
            recalls.append(flagged[y == 1].mean())

    assert metrics.recall_at_fpr(p, y, max_fpr) == pytest.approx(max(recalls))


def test_recall_counts_a_tie_with_a_negative_against_the_rule():
    assert metrics.recall_at_fpr([0.9, 0.9, 0.1], [1, 0, 0], max_fpr=0.01) == 0.0


def test_f1_is_the_harmonic_mean_of_precision_and_recall(sample):
    p, y = sample
    flagged = p >= 0.6
    precision, recall = y[flagged].mean(), flagged[y == 1].mean()

    assert metrics.f1(p, y, 0.6) == pytest.approx(2 * precision * recall / (precision + recall))
    assert metrics.f1(p, y, 2.0) == 0.0


def test_over_refusal_looks_at_benign_rows_alone():
    assert metrics.over_refusal([1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]) == 0.25


def test_ece_of_distinct_probabilities_is_the_textbook_sum():
    rng = np.random.default_rng(5)
    p = np.sort(rng.uniform(0, 1, 150))
    y = (rng.random(150) < p).astype(int)
    by_hand = sum(10 / 150 * abs(y[i : i + 10].mean() - p[i : i + 10].mean()) for i in range(0, 150, 10))

    assert metrics.ECE_BINS == 15
    assert metrics.ece(p, y) == pytest.approx(by_hand)
    assert [b.n for b in metrics.reliability_table(p, y)] == [10] * 15


def test_ece_does_not_depend_on_the_order_of_equal_probabilities():
    p = [0.5] * 60
    y = [0] * 30 + [1] * 30

    assert metrics.ece(p, y) == 0.0
    assert len(metrics.reliability_table(p, y)) == 1


def test_ece_of_a_constant_is_its_distance_from_the_base_rate():
    assert metrics.ece([0.9] * 10, [1, 0] * 5) == pytest.approx(0.4)


def test_the_reliability_table_covers_every_row_in_rising_order(sample):
    table = metrics.reliability_table(*sample)

    assert sum(b.n for b in table) == 400
    assert [b.probability for b in table] == sorted(b.probability for b in table)
    assert sum(b.n * b.frequency for b in table) == pytest.approx(sample[1].sum())


def test_aurc_is_the_mean_risk_over_all_coverages():
    confidence, right = [0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]
    risks = [0 / 1, 1 / 2, 1 / 3, 2 / 4]

    assert metrics.aurc(confidence, right) == pytest.approx(sum(risks) / 4)


def test_aurc_with_ties_is_the_mean_over_the_orders_they_allow():
    confidence, right = [0.9, 0.5, 0.5, 0.5], [1, 1, 0, 0]
    risks = []
    for order in itertools.permutations([1, 0, 0]):
        errors = np.cumsum([0, *(1 - r for r in order)])
        risks.append(np.mean(errors / np.arange(1, 5)))

    assert metrics.aurc(confidence, right) == pytest.approx(np.mean(risks))


def test_the_bootstrap_interval_of_a_mean_is_about_the_normal_one():
    x = np.random.default_rng(3).normal(2.0, 1.0, 500)
    low, high = metrics.bootstrap_interval(lambda a: float(np.mean(a)), x, n=2000, seed=1)
    half = 1.96 * x.std(ddof=1) / math.sqrt(500)

    assert low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_the_bootstrap_interval_depends_on_the_seed_alone(sample):
    intervals = [metrics.bootstrap_interval(metrics.auroc, *sample, n=200, seed=s) for s in (1, 1, 2)]

    assert intervals[0] == intervals[1] != intervals[2]


def test_the_bootstrap_keeps_rows_paired():
    x = np.arange(50.0)
    low, high = metrics.bootstrap_interval(lambda a, b: float(np.abs(a - b).max()), x, x, n=100, seed=1)

    assert (low, high) == (0.0, 0.0)


def test_the_bootstrap_leaves_out_resamples_with_one_class_but_not_most_of_them():
    low, high = metrics.bootstrap_interval(metrics.auroc, np.arange(20.0), [0, 0] + [1] * 18, n=300, seed=1)
    assert 0 <= low <= high <= 1

    with pytest.raises(DataError, match=r"a value on only \d+ of 300"):
        metrics.bootstrap_interval(metrics.f1, [0.1] * 9, [0] * 9, [0.5] * 9, n=300, seed=1)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: metrics.auroc([0.1, 0.2], [1, 1]), "all 2 labels are 1"),
        (lambda: metrics.recall_at_fpr([0.1, 0.2], [0, 0]), "all 2 labels are 0"),
        (lambda: metrics.nll([], []), "length above 0"),
        (lambda: metrics.nll([0.1], [1, 0]), r"shapes \(1,\) and \(2,\)"),
        (lambda: metrics.brier([0.1, math.nan], [0, 1]), "row 1: value is nan"),
        (lambda: metrics.brier([0.1, 3.2], [0, 1]), "row 1: probability is 3.2"),
        (lambda: metrics.ece([0.1, 0.2], [0, 2]), "row 1: label is 2"),
        (lambda: metrics.over_refusal([1, 0], [0, 0]), "needs benign rows"),
        (lambda: metrics.f1([0.4], [0], 0.5), "needs rows labelled 1"),
        (lambda: metrics.bootstrap_interval(metrics.nll, [0.5], [1, 0], seed=1), r"found \[1, 2\]"),
    ],
)
def test_data_a_figure_cannot_be_taken_of_is_named(call, complaint):
    with pytest.raises(DataError, match=complaint):
        call()
