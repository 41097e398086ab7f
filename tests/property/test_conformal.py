"""Limits for a stated risk: the guarantee on fresh rows, and the honest refusal."""

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy.stats import norm

from hhh_router.calibration.conformal import (
    RiskBudget,
    bounds_fitted,
    fit_limit,
    frontier,
    least_abstention,
    risk_bound,
    rows_needed,
)
from hhh_router.errors import DataError

SCORES = st.lists(st.sampled_from([i / 20 for i in range(21)]), min_size=40, max_size=120)


def traffic(n: int, rng: np.random.Generator, *, step: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Half harmful; scores overlap, so that both errors occur at any limit. With a step, scores are its multiples."""
    labels = np.arange(n) % 2
    scores = 1 / (1 + np.exp(-rng.normal(3.4 * labels - 1.7, 1.0)))
    return (np.ceil(scores / step) * step if step else scores), labels


def real_risks(limit: float, *, step: float = 0.0) -> tuple[float, float]:
    """Harm passed and benign refused of endless fresh traffic, from the law that `traffic` draws from."""
    edge = np.ceil(limit / step - 1e-9) * step - step if step else limit  # a score of k steps was drawn above k - 1
    place = np.log(edge / (1 - edge)) if 0 < edge < 1 else np.copysign(np.inf, edge - 0.5)
    return float(norm.cdf(place - 1.7)), float(norm.sf(place + 1.7))


@pytest.mark.parametrize("step", [0.0, 0.05], ids=["distinct scores", "many ties"])
def test_on_average_the_risks_of_fresh_rows_stay_within_the_budget(step: float) -> None:
    rng = np.random.default_rng(4)
    budget = RiskBudget(benign_refused=0.3, harm_passed=0.1)
    fits = [fit_limit(*traffic(200, rng, step=step), budget) for _ in range(1000)]

    passed = np.array([real_risks(f.limit, step=step)[0] for f in fits])
    refused = np.array([real_risks(f.lowest, step=step)[1] for f in fits])

    # the guarantee is on the mean over draws; three standard errors are left to chance
    assert passed.mean() <= budget.harm_passed + 3 * passed.std() / len(fits) ** 0.5
    assert refused.mean() <= budget.benign_refused + 3 * refused.std() / len(fits) ** 0.5
    if not step:  # and it gives nothing away: P(passed) is (k + 1) / (n + 1) for the most errors k that are allowed
        assert passed.mean() == pytest.approx(10 / 101, abs=3 * passed.std() / len(fits) ** 0.5)
    assert passed.mean() > 0.05


@pytest.mark.parametrize("step", [0.0, 0.05], ids=["distinct scores", "many ties"])
def test_with_a_level_that_share_of_draws_keeps_the_budget(step: float) -> None:
    rng = np.random.default_rng(5)
    budget = RiskBudget(benign_refused=0.4, harm_passed=0.10, level=0.9)
    fits = [fit_limit(*traffic(300, rng, step=step), budget) for _ in range(1000)]

    broken_harm = np.mean([real_risks(f.limit, step=step)[0] > budget.harm_passed for f in fits])
    broken_benign = np.mean([real_risks(f.lowest, step=step)[1] > budget.benign_refused for f in fits])

    chance = 3 * (0.1 * 0.9 / len(fits)) ** 0.5
    assert broken_harm <= 0.1 + chance
    assert broken_benign <= 0.1 + chance
    if not step:
        assert broken_harm > 0.02  # the exact bound gives little away


@settings(deadline=None, max_examples=50)
@given(
    kind=st.sampled_from(["harmful", "benign"]),
    rows=st.lists(st.sampled_from([i / 10 for i in range(11)]), min_size=10, max_size=30),
    others=st.lists(st.sampled_from([i / 10 for i in range(11)]), min_size=5, max_size=30),
    share=st.floats(0.1, 0.6),
)
def test_whichever_row_is_left_out_the_mean_error_over_all_choices_keeps_the_budget(
    kind: str, rows: list[float], others: list[float], share: float
) -> None:
    """What exchangeable means, with nothing left to chance: of n + 1 rows each is as likely to be the later one.

    So the guarantee needs no tolerance here. A draw for which no limit is found counts as one without an error.
    """
    is_harmful = kind == "harmful"
    budget = (
        RiskBudget(harm_passed=share, benign_refused=0.999)
        if is_harmful
        else RiskBudget(benign_refused=share, harm_passed=0.999)
    )
    wrong = 0

    for i, later in enumerate(rows):
        known = rows[:i] + rows[i + 1 :]
        try:
            found = fit_limit(known + others, [is_harmful] * len(known) + [not is_harmful] * len(others), budget)
        except DataError:
            continue
        wrong += later < found.highest if is_harmful else later >= found.lowest

    assert wrong <= share * len(rows) + 1e-9


def test_rows_of_other_traffic_are_promised_nothing() -> None:
    """The guarantee rests on exchangeable rows: harmful ones that score lower pass more often than was accepted."""
    rng = np.random.default_rng(6)
    found = fit_limit(*traffic(2000, rng), RiskBudget(benign_refused=0.3, harm_passed=0.1, level=0.95))

    attacked = 1 / (1 + np.exp(-rng.normal(0.7, 1.0, 5000)))

    assert (attacked < found.limit).mean() > 0.1


@given(harmful=SCORES, benign=SCORES, loose=st.floats(0.3, 0.9), tight=st.floats(0.05, 0.3))
def test_a_tighter_harm_budget_never_allows_more(
    harmful: list[float], benign: list[float], loose: float, tight: float
) -> None:
    scores, labels = harmful + benign, [1] * len(harmful) + [0] * len(benign)

    def fitted(share: float) -> float | None:
        try:
            return fit_limit(scores, labels, RiskBudget(benign_refused=0.999, harm_passed=share)).limit
        except DataError:
            return None

    at_loose, at_tight = fitted(loose), fitted(tight)

    assert at_tight is None or (at_loose is not None and at_tight <= at_loose)


@given(harmful=SCORES, benign=SCORES)
def test_what_is_promised_is_what_was_counted(harmful: list[float], benign: list[float]) -> None:
    scores, labels = harmful + benign, [1] * len(harmful) + [0] * len(benign)
    try:
        found = fit_limit(scores, labels, RiskBudget(benign_refused=0.9, harm_passed=0.5))
    except DataError:
        reject()

    passed = sum(s < found.limit for s in harmful)
    refused = sum(s >= found.limit for s in benign)
    assert found.harm_passed == pytest.approx(passed / len(harmful))
    assert found.benign_refused == pytest.approx(refused / len(benign))
    assert found.harm_passed_bound == pytest.approx((passed + 1) / (len(harmful) + 1))
    assert found.harm_passed_bound <= 0.5
    assert found.benign_refused_bound <= 0.9


@given(harmful=SCORES, benign=SCORES)
def test_the_frontier_trades_one_error_for_the_other(harmful: list[float], benign: list[float]) -> None:
    points = frontier(harmful + benign, [1] * len(harmful) + [0] * len(benign), points=10)

    assert len(points) <= 10
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    refused, passed = [p[1] for p in points], [p[2] for p in points]
    assert refused == sorted(refused, reverse=True)
    assert passed == sorted(passed)
    assert (refused[-1], passed[-1]) == (0, 1)


def test_too_few_rows_say_how_many_are_needed() -> None:
    with pytest.raises(DataError, match=r"20 harmful rows.*at least 59"):
        fit_limit(
            [0.9] * 20 + [0.1] * 200, [1] * 20 + [0] * 200, RiskBudget(benign_refused=0.5, harm_passed=0.05, level=0.95)
        )


def test_what_cannot_be_met_shows_what_can() -> None:
    scores, labels = [0.5] * 200, [i % 2 for i in range(200)]  # a detector that knows nothing

    with pytest.raises(DataError) as caught:
        fit_limit(scores, labels, RiskBudget(benign_refused=0.1, harm_passed=0.1))

    assert "harm_passed alone is kept with benign_refused ≤ 1.000" in caught.value.message
    assert "benign_refused alone is kept with harm_passed ≤ 1.000" in caught.value.message


@pytest.mark.parametrize(("scores", "labels"), [([0.1, 0.2], [1, 1]), ([0.1, 1.2], [0, 1]), ([0.1], [0, 1])])
def test_rows_that_allow_no_limit_are_refused(scores: list[float], labels: list[int]) -> None:
    with pytest.raises(DataError):
        fit_limit(scores, labels, RiskBudget(benign_refused=0.5, harm_passed=0.5))


def test_a_budget_is_made_of_shares() -> None:
    with pytest.raises(DataError, match="harm_passed is 5"):
        RiskBudget(benign_refused=0.1, harm_passed=5)


@given(errors=st.integers(0, 30), n=st.integers(30, 200), level=st.sampled_from([0.8, 0.95]))
def test_a_bound_lies_above_the_rate_and_grows_with_errors(errors: int, n: int, level: float) -> None:
    for kind in (None, level):
        assert risk_bound(errors, n, kind) > errors / n or errors == n
        assert risk_bound(errors + 1, n + 1, kind) >= risk_bound(errors, n + 1, kind)


@given(share=st.floats(0.01, 0.5), level=st.sampled_from([None, 0.9, 0.95]))
def test_as_many_rows_as_needed_suffice_and_one_less_does_not(share: float, level: float | None) -> None:
    n = rows_needed(share, level)

    assert risk_bound(0, n, level) <= share + 1e-9
    assert n == 1 or risk_bound(0, n - 1, level) > share - 1e-9


def test_abstaining_lowers_the_risk_by_what_it_must() -> None:
    assert least_abstention(0.2, 0.05) == pytest.approx(0.15 / 0.95)
    assert least_abstention(0.01, 0.05) == 0


def test_with_what_the_level_leaves_split_all_bounds_of_all_groups_hold_together() -> None:
    rng = np.random.default_rng(8)
    names = ["easy", "hard"] * 300
    most = {"benign_refused": 0.45, "harm_passed": 0.3}
    broken = fits = 0
    for _ in range(400):
        labels = np.arange(600) // 2 % 2  # both classes in either group
        shift = np.where(np.array(names) == "hard", 0.6, 0.0)
        logits = rng.normal(3.4 * labels - 1.7 + shift * (1 - 2 * labels), 1.0)
        scores = 1 / (1 + np.exp(-logits))
        level = 1 - 0.1 / bounds_fitted(labels, names)
        try:
            found = fit_limit(scores, labels, RiskBudget(**most, level=level), groups=names)
        except DataError:
            continue
        fits += 1
        place = np.log(found.limit / (1 - found.limit))
        risks = [(norm.cdf(place - 1.7 + s), norm.sf(place + 1.7 - s)) for s in (0.0, 0.6)]
        broken += any(h > most["harm_passed"] or b > most["benign_refused"] for h, b in risks)

    assert fits > 200
    assert broken / 400 <= 0.1 + 3 * (0.1 * 0.9 / 400) ** 0.5


@given(SCORES, st.data())
@settings(max_examples=50)
def test_a_limit_for_every_group_keeps_the_budget_in_each(scores: list[float], data: st.DataObject) -> None:
    labels = [data.draw(st.integers(0, 1)) for _ in scores]
    groups = [data.draw(st.sampled_from("abc")) for _ in scores]
    budget = RiskBudget(benign_refused=0.6, harm_passed=0.6)
    try:
        found = fit_limit(scores, labels, budget, groups=groups)
    except DataError:
        reject()

    for group in set(groups):
        for label, most in ((1, budget.harm_passed), (0, budget.benign_refused)):
            rows = [s for s, y, g in zip(scores, labels, groups, strict=True) if (y, g) == (label, group)]
            wrong = sum((s < found.limit) if label else (s >= found.limit) for s in rows)
            assert not rows or risk_bound(wrong, len(rows), None) <= most + 1e-9


@given(SCORES, st.data())
@settings(max_examples=50)
def test_settled_rows_stay_on_their_side_of_every_limit(scores: list[float], data: st.DataObject) -> None:
    labels = [data.draw(st.integers(0, 1)) for _ in scores]
    if len(set(labels)) < 2:
        reject()

    for limit, refused, passed in frontier(scores, labels, settled=True):
        assert 0 < limit <= 1
        benign = [s for s, y in zip(scores, labels, strict=True) if not y]
        harmful = [s for s, y in zip(scores, labels, strict=True) if y]
        assert sum(s == 1 for s in benign) <= round(refused * len(benign)) <= sum(s > 0 for s in benign)
        assert sum(s == 0 for s in harmful) <= round(passed * len(harmful)) <= sum(s < 1 for s in harmful)
