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


def test_risk_is_the_error_of_the_most_confident_rows_at_each_coverage(sample):
    confidence, right = sample
    by_hand = [
        (float((confidence >= c).mean()), float(1 - right[confidence >= c].mean())) for c in sorted({*confidence})[::-1]
    ]

    points = metrics.risk_coverage_points(confidence, right, points=1000)

    assert np.array(points) == pytest.approx(np.array(by_hand))
    assert points[-1] == pytest.approx((1.0, 1 - right.mean()))
    assert len(metrics.risk_coverage_points(confidence, right, points=10)) <= 10


def test_without_ties_the_mean_of_the_risks_is_the_aurc():
    rng = np.random.default_rng(2)
    confidence, right = rng.permutation(50) / 50, rng.integers(0, 2, 50)

    risks = [risk for _, risk in metrics.risk_coverage_points(confidence, right)]

    assert metrics.aurc(confidence, right) == pytest.approx(np.mean(risks))


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


def test_the_area_under_the_roc_points_is_the_auroc(sample):
    p, y = sample

    x, t = zip(*metrics.roc_points(p, y, points=1000), strict=True)

    assert np.trapezoid(t, x) == pytest.approx(metrics.auroc(p, y))


def test_thinned_curves_keep_both_ends_and_little_area(sample):
    p, y = sample

    roc, pr = metrics.roc_points(p, y, points=12), metrics.pr_points(p, y, points=12)
    x, t = zip(*roc, strict=True)

    assert len(roc) <= 12
    assert len(pr) <= 12
    assert roc[0] == (0, 0)
    assert roc[-1] == (1, 1)
    assert pr[-1] == pytest.approx((1, y.mean()))
    assert np.trapezoid(t, x) == pytest.approx(metrics.auroc(p, y), abs=0.03)


def test_precision_and_recall_are_counted_at_a_threshold(sample):
    p, y = sample
    limit = 0.7
    flagged = p >= limit

    points = metrics.pr_points(p, y, points=1000)

    recall = (flagged & (y == 1)).sum() / y.sum()
    precision = y[flagged].mean()
    assert any(point == pytest.approx((recall, precision)) for point in points)


def test_each_subgroup_is_measured_by_itself_and_small_ones_left_out(sample):
    p, y = sample
    names = ["a" if i < 380 else "b" for i in range(400)]

    found = metrics.subgroup_ece(p, y, names)

    assert list(found) == ["a"]
    assert found["a"] == (380, pytest.approx(metrics.ece(p[:380], y[:380])))
    with pytest.raises(DataError, match="399 groups for 400 rows"):
        metrics.subgroup_ece(p, y, names[:-1])


def test_reliability_is_the_table_in_plain_numbers(sample):
    p, y = sample
    table = metrics.reliability_table(p, y, bins=7)

    assert metrics.reliability(p, y, bins=7) == [(b.probability, b.frequency, b.n) for b in table]
    assert len(metrics.reliability(p, y)) == 15


def test_subgroup_ece_is_the_error_of_each_group_by_itself(sample):
    p, y = sample
    groups = ["mail" if i % 4 == 0 else "chat" for i in range(400)]
    mail = np.arange(400) % 4 == 0

    found = metrics.subgroup_ece(p, y, groups)

    assert list(found) == ["mail", "chat"]  # as they first appear
    assert found["mail"] == (100, pytest.approx(metrics.ece(p[mail], y[mail], bins=5)))  # 20 rows a bin
    assert found["chat"] == (300, pytest.approx(metrics.ece(p[~mail], y[~mail])))


def test_subgroup_ece_shows_what_the_error_over_all_rows_hides():
    p = np.full(400, 0.5)
    y = np.repeat([1, 0], 200)

    found = metrics.subgroup_ece(p, y, ["too low"] * 200 + ["too high"] * 200)

    assert metrics.ece(p, y) == 0
    assert found == {"too low": (200, 0.5), "too high": (200, 0.5)}


def test_a_group_of_fewer_rows_than_asked_for_is_left_out(sample):
    groups = ["small"] * 39 + ["large"] * 361

    assert list(metrics.subgroup_ece(*sample, groups)) == ["large"]
    assert list(metrics.subgroup_ece(*sample, groups, least=39)) == ["small", "large"]


def test_few_rows_are_cut_into_few_bins_so_that_their_error_is_not_noise():
    rng = np.random.default_rng(8)
    p = rng.uniform(0.2, 0.8, (200, 40))  # 200 groups of 40 rows of a perfect forecaster
    y = rng.random((200, 40)) < p
    groups = np.repeat(np.arange(200), 40).tolist()

    adapted = np.mean([error for _, error in metrics.subgroup_ece(p.ravel(), y.ravel(), groups).values()])
    in_fifteen = np.mean([metrics.ece(a, b) for a, b in zip(p, y, strict=True)])

    assert adapted < 0.5 * in_fifteen


def test_the_roc_has_a_point_for_every_rule(sample):
    p, y = sample
    by_hand = [(0.0, 0.0)]
    by_hand += [((p[y == 0] >= t).mean(), (p[y == 1] >= t).mean()) for t in sorted({*p}, reverse=True)]

    assert metrics.roc_points(p, y, points=1000) == pytest.approx(np.array(by_hand))


def test_the_area_under_the_roc_points_is_auroc(sample):
    x, y = np.array(metrics.roc_points(*sample, points=1000)).T

    assert np.trapezoid(y, x) == pytest.approx(metrics.auroc(*sample))


def test_precision_and_recall_are_those_of_every_rule(sample):
    p, y = sample
    by_hand = [((p[y == 1] >= t).mean(), y[p >= t].mean()) for t in sorted({*p}, reverse=True)]

    found = metrics.pr_points(p, y, points=1000)

    assert found == pytest.approx(np.array(by_hand))
    assert found[-1] == (1.0, y.mean())


def test_equal_scores_give_one_step_of_a_curve():
    assert metrics.roc_points([0.5] * 6, [0, 1] * 3) == [(0.0, 0.0), (1.0, 1.0)]
    assert metrics.pr_points([0.5] * 6, [0, 1] * 3) == [(1.0, 0.5)]


@pytest.mark.parametrize("curve", [metrics.roc_points, metrics.pr_points])
@pytest.mark.parametrize("points", [2, 5, 30])
def test_a_thinned_curve_keeps_both_ends_and_points_of_the_whole_in_order(sample, curve, points):
    whole, thinned = curve(*sample, points=1000), curve(*sample, points=points)

    assert 2 <= len(thinned) <= points
    assert (thinned[0], thinned[-1]) == (whole[0], whole[-1])
    places = [whole.index(point) for point in thinned]
    assert places == sorted(set(places))


def test_a_thinned_roc_loses_little_of_its_area(sample):
    x, y = np.array(metrics.roc_points(*sample, points=30)).T

    assert np.trapezoid(y, x) == pytest.approx(metrics.auroc(*sample), abs=0.01)


def test_thinning_spreads_points_along_the_curve_not_over_its_rows():
    """A steep start with most of the rows, as of a good detector, must not take all the points."""
    x = np.r_[np.zeros(900), np.linspace(0, 1, 100)]
    y = np.r_[np.linspace(0, 1, 900), np.ones(100)]

    chosen = metrics.thin(x, y, points=21)

    assert len(chosen) == 21
    assert (x[chosen] > 0).sum() == pytest.approx(10, abs=1)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: metrics.roc_points([0.1, 0.2], [1, 1]), "all 2 labels are 1"),
        (lambda: metrics.pr_points([0.1, 0.2], [0, 0]), "all 2 labels are 0"),
        (lambda: metrics.subgroup_ece([0.1, 0.2], [0, 1], ["a"]), "1 groups for 2 rows"),
        (lambda: metrics.reliability([0.1, 1.2], [0, 1]), "row 1: probability is 1.2"),
    ],
)
def test_data_a_drawing_cannot_be_made_of_is_named(call, complaint):
    with pytest.raises(DataError, match=complaint):
        call()


@pytest.mark.parametrize("curve", [metrics.roc_points, metrics.pr_points])
def test_a_curve_of_one_point_is_an_error(curve):
    with pytest.raises(ValueError, match="points must be >= 2, found 1"):
        curve([0.1, 0.9], [0, 1], points=1)
