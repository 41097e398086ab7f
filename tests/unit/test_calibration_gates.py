"""Fitting gates to soft targets: the parameters found, the figures, and which gate is chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax, xlogy

from hhh_router.calibration import gates
from hhh_router.calibration.gates import GateFit, chosen_gate, compare_gates, fit_gate
from hhh_router.errors import DataError
from hhh_router.routing import GATES, posterior
from hhh_router.routing.gate import GATE_PARAMETERS
from hhh_router.types import DIMENSIONS, EXPERTS

W = np.array([[0.8, 0.3, 0.0, 0.0], [0.0, 0.6, -0.5, 0.0], [0.0, 0.0, 1.4, 0.4], [0.2, 0.0, 0.0, 0.5]])
B = np.array([-0.6, 0.2, 0.7, -0.3])


def drawn(n: int, shares_of, *, sharpness: float = 40.0, seed: int = 0):
    """Needs, and soft targets scattered around the shares that a known gate gives to their logits (n, 4)."""
    rng = np.random.default_rng(seed)
    logits = np.column_stack([np.zeros(n), rng.normal(0, 1.5, (n, 3))])
    targets = np.array([rng.dirichlet(sharpness * p + 1e-3) for p in shares_of(logits)])
    return expit(logits[:, 1:]), targets


def by_odds(x):
    return softmax(x, axis=1)


def by_temperature(x):
    return softmax(x / 2.5, axis=1)


def by_dirichlet(x):
    return softmax(log_softmax(x, axis=1) @ W.T + B, axis=1)


def shares(fit: GateFit, needs) -> np.ndarray:
    """What the running gate makes of the fit's parameters, shape (n, 4)."""
    found = (posterior(dict(zip(DIMENSIONS, row, strict=True)), fit.name, fit.params) for row in needs.tolist())
    return np.array([[p[e] for e in EXPERTS] for p in found])


def cross_entropy(targets, p) -> np.ndarray:
    return -(targets * np.log(p)).sum(axis=1)


def test_odds_has_nothing_to_fit_so_its_figure_is_that_of_the_running_gate():
    needs, targets = drawn(200, by_temperature)

    fit = fit_gate("odds", needs, targets, seed=1)

    rows = cross_entropy(targets, shares(fit, needs))
    assert (fit.params, fit.n, fit.penalty) == ({}, 200, None)
    assert fit.cross_entropy == pytest.approx(rows.mean())
    assert fit.standard_error == pytest.approx(rows.std(ddof=1) / math.sqrt(200))


def test_the_temperature_that_made_the_targets_is_found_again():
    fit = fit_gate("softmax_ts", *drawn(2000, by_temperature), seed=1)

    assert fit.params == pytest.approx({"temperature": 2.5}, rel=0.05)


def test_the_temperature_is_the_one_a_plain_search_finds():
    needs, targets = drawn(150, by_dirichlet, sharpness=3.0)
    x = np.column_stack([np.zeros(150), np.log(needs / (1 - needs))])
    grid = np.geomspace(0.2, 20, 20001)
    best = min(grid, key=lambda t: cross_entropy(targets, softmax(x / t, axis=1)).mean())

    assert fit_gate("softmax_ts", needs, targets, seed=1).params["temperature"] == pytest.approx(best, rel=1e-3)


def test_the_dirichlet_gate_that_made_the_targets_is_found_again():
    """In what it does: W and b are not unique, as softmax ignores what is added to all four logits."""
    needs, targets = drawn(2000, by_dirichlet)
    fresh, _ = drawn(200, by_dirichlet, seed=9)
    logits = np.column_stack([np.zeros(200), np.log(fresh / (1 - fresh))])

    fit = fit_gate("dirichlet", needs, targets, seed=1)

    assert set(fit.params) == set(GATE_PARAMETERS["dirichlet"])
    assert fit.penalty in gates.GATE_PENALTIES
    assert np.abs(shares(fit, fresh) - by_dirichlet(logits)).max() < 0.05


def test_the_dirichlet_fit_minimises_its_published_loss():
    """Cross-entropy plus the mean square of off-diagonal weights and of biases, by a solver without gradients."""
    needs, targets = drawn(120, by_dirichlet, sharpness=5.0)
    fit = fit_gate("dirichlet", needs, targets, seed=1)
    logs = log_softmax(np.column_stack([np.zeros(120), np.log(needs / (1 - needs))]), axis=1)
    found = np.array([fit.params[name] for name in GATE_PARAMETERS["dirichlet"]])

    def loss(point):
        w, b = point.reshape(4, 5)[:, :4], point.reshape(4, 5)[:, 4]
        odir = (w[~np.eye(4, dtype=bool)] ** 2).mean() + (b**2).mean()
        return cross_entropy(targets, softmax(logs @ w.T + b, axis=1)).mean() + fit.penalty * odir

    other = minimize(loss, np.zeros(20), method="BFGS", options={"gtol": 1e-7, "maxiter": 5000})

    assert loss(found) == pytest.approx(other.fun, abs=1e-6)
    assert loss(found) <= loss(np.eye(4, 5).ravel())


@pytest.mark.parametrize("gate", GATES)
def test_the_figure_is_that_of_rows_which_were_not_fitted_to(gate):
    """On few, noisy rows a fit flatters itself on its own rows; the reported figure tells what fresh ones cost."""
    needs, targets = drawn(60, by_odds, sharpness=1.0)
    fresh_needs, fresh_targets = drawn(3000, by_odds, sharpness=1.0, seed=5)

    fit = fit_gate(gate, needs, targets, seed=1)

    own = cross_entropy(targets, shares(fit, needs)).mean()
    fresh = cross_entropy(fresh_targets, shares(fit, fresh_needs)).mean()
    assert fit.cross_entropy > own if fit.params else fit.cross_entropy == pytest.approx(own)
    assert abs(fit.cross_entropy - fresh) < 4 * fit.standard_error


def test_no_gate_beats_the_mean_entropy_of_the_targets():
    needs, targets = drawn(300, by_dirichlet)
    floor = -xlogy(targets, targets).sum(axis=1).mean()

    assert all(fit.cross_entropy > floor for fit in compare_gates(needs, targets, seed=1))


@pytest.mark.parametrize(
    ("shares_of", "chosen"),
    [(by_odds, "odds"), (by_temperature, "softmax_ts"), (by_dirichlet, "dirichlet")],
)
def test_the_smallest_gate_that_explains_the_targets_is_chosen(shares_of, chosen):
    fits = compare_gates(*drawn(600, shares_of, sharpness=10.0), seed=1)

    assert [f.name for f in fits] == list(GATES)
    assert [f.name for f in fits if f.chosen] == [chosen]


def test_a_comparison_shows_each_gate_as_fitted_alone_and_its_gap_to_the_chosen_one():
    needs, targets = drawn(300, by_temperature, sharpness=10.0)

    fits = compare_gates(needs, targets, seed=1)

    best = next(f for f in fits if f.chosen)
    for fit in fits:
        alone = fit_gate(fit.name, needs, targets, seed=1)
        assert (fit.params, fit.cross_entropy, fit.standard_error) == (
            alone.params,
            alone.cross_entropy,
            alone.standard_error,
        )
        assert fit.gap == pytest.approx(fit.cross_entropy - best.cross_entropy)
    assert (best.gap, best.gap_error) == (0, 0)
    assert fits[0].gap > fits[0].gap_error > 0  # so odds was passed over


def test_the_chosen_gate_keeps_the_figures_of_all_that_were_compared():
    needs, targets = drawn(300, by_temperature, sharpness=10.0)
    fits = compare_gates(needs, targets, seed=1)

    gate = chosen_gate(fits, data_sha256="ef" * 32, seed=1)

    best = next(f for f in fits if f.chosen)
    assert (gate.name, gate.params, gate.n, gate.cross_entropy) == ("softmax_ts", best.params, 300, best.cross_entropy)
    assert (gate.data_sha256, gate.seed) == ("ef" * 32, 1)
    assert {name: (c.cross_entropy, c.standard_error, c.gap, c.gap_error) for name, c in gate.candidates.items()} == {
        f.name: (f.cross_entropy, f.standard_error, f.gap, f.gap_error) for f in fits
    }


def test_fits_of_which_none_was_chosen_make_no_gate():
    with pytest.raises(ValueError, match="not enough values"):
        chosen_gate([fit_gate("odds", *drawn(60, by_odds), seed=1)], data_sha256="", seed=1)


def test_a_gate_gives_way_only_to_one_that_beats_it_by_more_than_a_standard_error():
    noise = np.array([1.0, -1.0] * 50)  # standard error of the mean of each difference: 0.1 or a little more
    base = np.full(100, 2.0)
    hardly, clearly = base - 0.05 - noise, base - 0.3 - noise

    assert gates._smallest_unbeaten([base, hardly]) == 0
    assert gates._smallest_unbeaten([base, clearly]) == 1
    # the second does not beat the first, but the third does, and not by enough to beat the second too
    assert gates._smallest_unbeaten([base, base - 0.09 - noise, base - 0.12 + 0 * noise]) == 1


def test_data_and_seed_fix_every_number():
    needs, targets = drawn(80, by_dirichlet, sharpness=3.0)

    assert compare_gates(needs, targets, seed=1) == compare_gates(needs, targets, seed=1)
    assert compare_gates(needs, targets, seed=1) != compare_gates(needs, targets, seed=2)


@pytest.mark.parametrize("gate", GATES)
def test_certain_needs_and_separable_targets_give_finite_parameters(gate):
    needs = np.eye(3)[np.arange(60) % 3]
    targets = np.column_stack([np.zeros(60), needs])

    fit = fit_gate(gate, needs, targets, seed=1)

    assert all(math.isfinite(v) for v in fit.params.values())
    assert shares(fit, needs)[0, 1] > 0.9


@pytest.mark.parametrize("gate", GATES)
def test_needs_that_say_nothing_are_no_failure(gate):
    rng = np.random.default_rng(1)
    fit = fit_gate(gate, np.full((90, 3), 0.5), rng.dirichlet(np.ones(4), 90), seed=1)

    assert fit.cross_entropy == pytest.approx(math.log(4), abs=0.05)


GOOD_NEEDS, GOOD_TARGETS = np.full((40, 3), 0.5), np.full((40, 4), 0.25)


def spoilt(values, row, value):
    copy = values.copy()
    copy[row] = value
    return copy


@pytest.mark.parametrize(
    ("needs", "targets", "complaint"),
    [
        (GOOD_NEEDS[:29], GOOD_TARGETS[:29], "29 rows; a gate needs at least 30"),
        (GOOD_NEEDS[:, :2], GOOD_TARGETS, r"found \(40, 2\) and \(40, 4\)"),
        (GOOD_NEEDS, GOOD_TARGETS[:39], r"found \(40, 3\) and \(39, 4\)"),
        (spoilt(GOOD_NEEDS, 3, [0.5, 1.5, 0.5]), GOOD_TARGETS, r"row 3: needs are \[0.5, 1.5, 0.5\]"),
        (spoilt(GOOD_NEEDS, 4, math.nan), GOOD_TARGETS, "row 4: needs are"),
        (GOOD_NEEDS, spoilt(GOOD_TARGETS, 5, [0.5, 0.5, 0.5, 0.0]), "row 5: targets are"),
        (GOOD_NEEDS, spoilt(GOOD_TARGETS, 6, [-0.5, 0.5, 0.5, 0.5]), "row 6: targets are"),
        (GOOD_NEEDS, spoilt(GOOD_TARGETS, 7, math.nan), "row 7: targets are"),
    ],
)
def test_rows_that_cannot_be_fitted_are_named(needs, targets, complaint):
    for call in (lambda: fit_gate("odds", needs, targets, seed=1), lambda: compare_gates(needs, targets, seed=1)):
        with pytest.raises(DataError, match=complaint):
            call()


def test_an_unknown_gate_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=f"gate 'arrow' is not known; use {', '.join(GATES)}"):
        fit_gate("arrow", GOOD_NEEDS, GOOD_TARGETS, seed=1)
