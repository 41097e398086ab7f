"""Fitting: the chosen method, the parameters found, and data that cannot be fitted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from hhh_router.calibration import FEATURES, fit
from hhh_router.calibration.metrics import nll
from hhh_router.errors import DataError


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def drawn(n: int, true_logit, *, seed: int = 0):
    """Logits and labels whose real log-odds are a known function of the logit."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, n)
    return x, (rng.random(n) < sigmoid(true_logit(x))).astype(int)


def bent(x):
    return -2.0 * np.logaddexp(0, -x) + 0.3 * np.logaddexp(0, x) + 0.5


@pytest.mark.parametrize(
    ("n", "true_logit", "method"),
    [
        (2000, lambda x: x / 2.5, "temperature"),
        (2000, lambda x: 0.5 * x - 1.5, "platt"),
        (2000, bent, "beta"),
        (300, bent, "platt"),
        (100, lambda x: 0.5 * x - 1.5, "temperature"),
    ],
    ids=["temperature suffices", "shifted", "bent", "bent but too few rows", "shifted but too few rows"],
)
def test_the_smallest_method_that_the_rows_justify_is_chosen(n, true_logit, method):
    assert fit.fit_head(*drawn(n, true_logit), seed=1).method == method


def test_only_methods_allowed_for_the_rows_are_tried():
    assert list(fit.fit_head(*drawn(149, bent), seed=1).candidates) == ["temperature"]
    assert list(fit.fit_head(*drawn(499, bent), seed=1).candidates) == ["temperature", "platt"]
    assert list(fit.fit_head(*drawn(500, bent), seed=1).candidates) == ["temperature", "platt", "beta"]


@pytest.mark.parametrize(
    ("true_logit", "expected"),
    [
        (lambda x: x / 2.5, {"temperature": 2.5}),
        (lambda x: 0.5 * x - 1.5, {"slope": 0.5, "intercept": -1.5}),
        (bent, {"a": 2.0, "b": 0.3, "c": 0.5}),
    ],
)
def test_the_parameters_that_made_the_data_are_found_again(true_logit, expected):
    found = fit.fit_head(*drawn(20_000, true_logit), seed=1)

    assert found.params == pytest.approx(expected, rel=0.12, abs=0.08)  # three standard errors at this many rows


def test_platt_parameters_are_those_of_another_optimiser():
    x, y = drawn(400, lambda x: 0.5 * x - 1.5)
    found = fit.fit_head(x, y, seed=1)
    target = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / (len(y) - y.sum() + 2))

    def loss(w):
        p = sigmoid(w[0] * x + w[1])
        return -np.sum(target * np.log(p) + (1 - target) * np.log(1 - p))

    other = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    assert found.method == "platt"
    assert [found.params["slope"], found.params["intercept"]] == pytest.approx(other.x, abs=1e-4)


def test_what_runs_is_what_was_fitted():
    x, y = drawn(3000, bent)
    found = fit.fit_head(x, y, seed=1)
    runtime = np.array([found.apply(v) for v in x])
    a, b, c = (found.params[k] for k in "abc")
    published = 1 / (1 + 1 / (np.exp(c) * sigmoid(x) ** a / (1 - sigmoid(x)) ** b))

    assert runtime == pytest.approx(published, abs=1e-6)
    assert nll(runtime, y) <= found.nll + 0.003  # the figure is held out, so a little above the fit's own


def test_figures_are_held_out():
    """With labels drawn by a coin, a figure of the fit on its own rows would beat ln 2; a held-out one does not."""
    rng = np.random.default_rng(2)
    below = 0
    for seed in range(10):
        x, y = rng.normal(size=40), rng.permutation([0, 1] * 20)
        below += fit.fit_head(x, y, seed=seed).nll < math.log(2)

    assert below <= 3


def test_calibration_lowers_nll_and_error_of_distorted_scores():
    found = fit.fit_head(*drawn(2000, lambda x: 0.4 * x - 1.0), seed=1)

    assert found.nll < found.nll_identity - 0.1
    assert found.ece < found.ece_identity / 3
    assert found.brier < found.brier_identity


def test_scores_that_order_labels_backwards_become_about_the_base_rate():
    x, y = drawn(1000, lambda x: -x)
    found = fit.fit_head(x, y, seed=1)

    assert found.auroc < 0.2
    assert found.apply(5.0) >= found.apply(-5.0)
    assert [found.apply(v) for v in (-5.0, 5.0)] == pytest.approx([y.mean()] * 2, abs=0.05)


def test_separable_scores_keep_finite_parameters():
    x = np.concatenate([np.linspace(-3, -1, 300), np.linspace(1, 3, 300)])
    found = fit.fit_head(x, (x > 0).astype(int), seed=1)

    assert all(math.isfinite(v) for v in found.params.values())
    assert found.apply(-1.0) < 0.05 < 0.95 < found.apply(1.0)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9, 1e200])
def test_the_unit_of_the_scores_does_not_matter(unit):
    x, y = drawn(400, lambda x: x / 2)
    found = fit.fit_head(x * unit, y, seed=1)

    assert found.apply(2.0 * unit) == pytest.approx(fit.fit_head(x, y, seed=1).apply(2.0), abs=1e-3)


def test_the_same_data_and_seed_give_the_same_calibration():
    x, y = drawn(600, bent)

    assert fit.fit_head(x, y, seed=3) == fit.fit_head(x, y, seed=3)


@pytest.mark.parametrize(
    ("logits", "labels", "complaint"),
    [
        (np.arange(29.0), [0, 1] * 14 + [1], "29 rows; calibration needs at least 30"),
        (np.arange(40.0), [1] * 40, "40 of 40 labels are 1; each class needs at least 5"),
        (np.arange(40.0), [0] * 36 + [1] * 4, "4 of 40 labels are 1; each class needs at least 5"),
        (np.full(40, 1.5), [0, 1] * 20, "all 40 logits are 1.5"),
        ([math.nan, *np.arange(39.0)], [0, 1] * 20, "row 0: the logit is nan"),
        ([*np.arange(39.0), math.inf], [0, 1] * 20, "row 39: the logit is inf"),
        (np.arange(40.0), [0, 1] * 19 + [0, 2], "row 39: found 2 among the labels"),
        (np.arange(40.0), [0, 1] * 15, r"shapes \(40,\) and \(30,\)"),
    ],
)
def test_data_that_cannot_be_fitted_is_named_with_what_to_do(logits, labels, complaint):
    with pytest.raises(DataError, match=complaint) as error:
        fit.fit_head(logits, labels, seed=1)

    assert error.value.hint


def test_folds_hold_every_row_once_and_each_class_evenly():
    labels = np.array([0] * 83 + [1] * 17)
    fold = fit.stratified_folds(labels, folds=5, seed=2)

    assert np.bincount(fold[labels == 0]).tolist() == [17, 17, 17, 16, 16]
    assert np.bincount(fold[labels == 1]).tolist() == [4, 4, 3, 3, 3]
    assert not np.array_equal(fold, fit.stratified_folds(labels, folds=5, seed=3))


def test_a_larger_model_must_win_by_more_than_a_standard_error():
    small = np.array([1.0, 1.0, 1.0, 1.0])
    certain, doubtful = small - [0.1, 0.2, 0.1, 0.2], small - [1.0, -0.9, 1.0, -0.9]

    assert fit.smallest_within_error({"small": small, "large": certain}) == "large"
    assert fit.smallest_within_error({"small": small, "large": doubtful}) == "small"


def test_a_distance_limit_leaves_one_in_a_hundred_outside():
    distances = np.random.default_rng(1).uniform(0.5, 2.0, 1000)

    assert (distances > fit.fit_distance_limit(distances)).sum() == 10
    with pytest.raises(DataError, match="12 distances"):
        fit.fit_distance_limit([1.0] * 12)
    with pytest.raises(DataError, match="row 0: the distance is nan"):
        fit.fit_distance_limit([math.nan] * 40)


def confidence_rows(n: int, *, seed: int = 0):
    """Feature rows in which only two features, and a constant one, have something to say."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(FEATURES)))
    x[:, FEATURES.index("mode_both")] = 1.0
    logit = 1.0 + 1.5 * x[:, FEATURES.index("min_margin")] - 1.0 * x[:, FEATURES.index("distance")]
    rows = [dict(zip(FEATURES, map(float, row), strict=True)) for row in x]
    return rows, [bool(b) for b in rng.random(n) < sigmoid(logit)], sigmoid(logit)


def test_confidence_finds_the_features_that_matter_and_drops_most_others():
    rows, right, _ = confidence_rows(2000)
    model = fit.fit_confidence(rows, right, seed=1)
    weights = {name: term.weight for name, term in model.terms.items()}
    noise = [abs(w) for name, w in weights.items() if name not in ("min_margin", "distance")]

    assert weights["min_margin"] > 1.0
    assert weights["distance"] < -0.6
    assert max(noise) < 0.1
    assert noise.count(0.0) >= len(noise) / 2
    assert model.constant == ("mode_both",)


def test_confidence_tracks_the_real_probability_on_fresh_rows():
    rows, right, _ = confidence_rows(2000)
    fresh, _, truth = confidence_rows(500, seed=9)
    model = fit.fit_confidence(rows, right, seed=1)
    found = np.array([model.apply(row).value for row in fresh])

    assert np.mean(np.abs(found - truth)) < 0.05
    assert model.ece < 0.05
    assert model.auroc > 0.8


def test_confidence_in_pure_noise_is_mostly_the_base_rate():
    """The one-standard-error rule lets noise through in about one draw of six, and then with small weights."""
    rows, _, _ = confidence_rows(400)
    constant = 0
    for seed in range(6):
        right = list(np.random.default_rng(seed).random(400) < 0.8)
        model = fit.fit_confidence(rows, right, seed=1)
        constant += not any(term.weight for term in model.terms.values())
        assert np.mean([model.apply(row).value for row in rows]) == pytest.approx(np.mean(right), abs=0.01)
        assert model.auroc < 0.62

    assert constant >= 4


def test_the_elastic_net_meets_its_optimality_conditions():
    """Subgradient conditions of mean NLL + λ(½‖w‖₁ + ¼‖w‖²), which only the minimum meets."""
    rng = np.random.default_rng(6)
    z = rng.normal(size=(300, 8))
    y = (rng.random(300) < sigmoid(z[:, 0] - 0.5 * z[:, 1])).astype(float)
    penalty = 0.1
    w, bias = fit._elastic_net(z, y, penalty=penalty, weights=np.zeros(8), bias=0.0)
    error = sigmoid(z @ w + bias) - y
    slope = z.T @ error / 300 + penalty / 2 * w

    assert error.mean() == pytest.approx(0, abs=1e-6)
    assert 0 < np.count_nonzero(w) < 8
    assert slope[w != 0] == pytest.approx(-penalty / 2 * np.sign(w[w != 0]), abs=1e-5)
    assert np.all(np.abs(slope[w == 0]) <= penalty / 2 + 1e-5)


def test_the_same_rows_and_seed_give_the_same_confidence_model():
    rows, right, _ = confidence_rows(200)

    assert fit.fit_confidence(rows, right, seed=3) == fit.fit_confidence(rows, right, seed=3)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda rows, right: right.__setitem__(slice(None), [True] * 60), "60 of 60 outcomes .* are 1"),
        (lambda rows, right: rows[3].update(distance=math.nan), "row 3: distance is nan"),
        (lambda rows, right: rows[5].pop("log_tokens"), "row 5: features differ from row 0 in log_tokens"),
        (lambda rows, right: [row.update(astrology=1.0) for row in rows], "'astrology' is no feature"),
        (lambda rows, right: rows.pop(), "59 feature rows but 60 outcomes"),
    ],
)
def test_feature_rows_that_cannot_be_fitted_are_named(spoil, complaint):
    rows, right, _ = confidence_rows(60)
    spoil(rows, right)

    with pytest.raises(DataError, match=complaint):
        fit.fit_confidence(rows, right, seed=1)
