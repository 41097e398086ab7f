"""What holds for every calibrator and every reading, and what calibration does to distorted data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hhh_router.calibration import Calibrators, HeadCalibration
from hhh_router.calibration.fit import fit_head
from hhh_router.calibration.metrics import auroc, ece
from hhh_router.errors import ReaderError
from hhh_router.types import DIMENSIONS, OUTCOMES, Scores, Weights

finite = st.floats(allow_nan=False, allow_infinity=False)
moderate = st.floats(-50, 50)
slope = st.floats(0, 1e3)
FIGURES = {
    "n": 100,
    "positives": 50,
    "nll": 0.5,
    "brier": 0.2,
    "ece": 0.1,
    "nll_identity": 0.6,
    "brier_identity": 0.2,
    "ece_identity": 0.1,
    "auroc": 0.8,
}


@st.composite
def calibrations(draw) -> HeadCalibration:
    method = draw(st.sampled_from(["temperature", "platt", "beta"]))
    params = {
        "temperature": lambda: {"temperature": draw(st.floats(1e-3, 1e3))},
        "platt": lambda: {"slope": draw(slope), "intercept": draw(moderate)},
        "beta": lambda: {"a": draw(slope), "b": draw(slope), "c": draw(moderate)},
    }[method]()
    return HeadCalibration(method=method, params=params, **FIGURES)


@given(calibrations(), finite)
def test_every_finite_logit_gets_a_probability_inside_zero_and_one(calibration, logit):
    assert 0 < calibration.apply(logit) < 1


@given(calibrations(), finite, finite)
def test_a_higher_logit_never_gets_a_lower_probability(calibration, one, other):
    low, high = sorted((one, other))

    assert calibration.apply(low) <= calibration.apply(high) + 1e-12  # rounding of near-equal logits


@given(calibrations(), calibrations(), moderate)
def test_order_survives_whatever_the_calibrator(one, other, logit):
    for calibration in (one, other):
        assert calibration.apply(logit - 1.0) <= calibration.apply(logit) <= calibration.apply(logit + 1.0)


@given(
    st.sampled_from(["prompt", "response", "both"]),
    st.lists(st.floats(), min_size=7, max_size=7),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=4),
)
def test_a_reading_becomes_probabilities_or_an_error_and_nothing_between(mode, numbers, limits):
    scores = Scores(
        mode=mode,
        needs=dict(zip(DIMENSIONS, numbers[:3], strict=True)),
        outcomes=dict(zip(OUTCOMES, numbers[3:6], strict=True)),
        distance=numbers[6],
        tokens=5,
    )
    calibrators = Calibrators.none()

    if all(map(math.isfinite, numbers)):
        evidence = calibrators.evidence(scores)
        confidence = calibrators.confidence(
            evidence, weights=Weights(1.0, 0.0, 0.0, 0.0), policy_shift_nats=0.0, limits=limits
        )
        assert all(0 < p < 1 for p in [*evidence.needs.values(), *evidence.outcomes.values(), confidence.value])
        assert sum(evidence.posterior.as_dict().values()) == pytest.approx(1)
    else:
        with pytest.raises(ReaderError):
            calibrators.evidence(scores)


def test_well_calibrated_probabilities_have_a_small_error():
    """A perfect forecaster has √(2/π · mean p(1−p) · 15/n) = .009 with 20,000 rows and p uniform."""
    rng = np.random.default_rng(1)
    p = rng.uniform(0, 1, 20_000)

    assert ece(p, rng.random(20_000) < p) < 0.018


@pytest.mark.parametrize(
    "distort",
    [lambda z: 4 * z, lambda z: z / 3, lambda z: 2 * z + 1.5, lambda z: np.where(z > 0, 3 * z, 0.7 * z)],
    ids=["overconfident", "underconfident", "shifted", "bent"],
)
def test_fitting_undoes_a_distortion_and_keeps_the_order(distort):
    rng = np.random.default_rng(2)
    true_logit = rng.normal(-0.5, 1.5, 8000)
    labels = (rng.random(8000) < 1 / (1 + np.exp(-true_logit))).astype(int)
    distorted = distort(true_logit)
    fitted, fresh = slice(0, 4000), slice(4000, 8000)

    calibration = fit_head(distorted[fitted], labels[fitted], seed=3)
    before = ece(1 / (1 + np.exp(-distorted[fresh])), labels[fresh])
    calibrated = [calibration.apply(x) for x in distorted[fresh]]
    after = ece(calibrated, labels[fresh])

    assert before > 0.07
    assert after < 0.035  # a perfect forecaster has about .018 on 4,000 rows
    assert auroc(calibrated, labels[fresh]) == pytest.approx(auroc(distorted[fresh], labels[fresh]), abs=1e-9)
