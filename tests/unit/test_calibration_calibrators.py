"""One head's calibrator: three maps from a logit to a probability."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from hhh_router.calibration import HeadCalibration
from hhh_router.calibration.calibrators import logit_of, probability, softplus

FIGURES = {
    "n": 600,
    "positives": 200,
    "nll": 0.4,
    "brier": 0.1,
    "ece": 0.02,
    "nll_identity": 0.6,
    "brier_identity": 0.2,
    "ece_identity": 0.1,
    "auroc": 0.9,
}


def head(method: str, **params: float) -> HeadCalibration:
    return HeadCalibration.model_validate({"method": method, "params": params, **FIGURES})


def test_temperature_divides_the_logit():
    assert head("temperature", temperature=2.0).apply(3.0) == pytest.approx(1 / (1 + math.exp(-1.5)), abs=1e-12)


def test_platt_scales_and_shifts_the_logit():
    assert head("platt", slope=0.5, intercept=-1.0).apply(3.0) == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-12)


@pytest.mark.parametrize("logit", [-6.0, -0.3, 0.0, 1.7, 8.0])
def test_beta_is_the_published_formula_on_the_sigmoid(logit):
    a, b, c = 1.7, 0.6, -0.4
    s = 1 / (1 + math.exp(-logit))
    # the beta calibration map of Kull, Silva Filho & Flach 2017: 1 / (1 + 1 / (e^c · s^a / (1 − s)^b))
    published = 1 / (1 + 1 / (math.exp(c) * s**a / (1 - s) ** b))

    assert head("beta", a=a, b=b, c=c).apply(logit) == pytest.approx(published, rel=1e-9)


def test_beta_with_equal_slopes_is_platt():
    beta, platt = head("beta", a=0.7, b=0.7, c=0.2), head("platt", slope=0.7, intercept=0.2)

    assert [beta.apply(x / 3) for x in range(-20, 20)] == pytest.approx([platt.apply(x / 3) for x in range(-20, 20)])


@pytest.mark.parametrize("logit", [1e308, -1e308, 1e-308, 750.0, -750.0])
@pytest.mark.parametrize(
    "calibration",
    [
        head("temperature", temperature=0.01),
        head("platt", slope=100.0, intercept=-5.0),
        head("beta", a=100.0, b=100.0, c=1.0),
        head("beta", a=0.0, b=0.0, c=1.0),
    ],
    ids=lambda c: f"{c.method} {c.params}",
)
def test_no_finite_logit_yields_zero_one_or_nan(calibration, logit):
    assert 0 < calibration.apply(logit) < 1


def test_the_logit_of_a_probability_inverts_the_logistic_function():
    assert [logit_of(probability(x)) for x in (-8.0, -1.0, 0.0, 3.0)] == pytest.approx([-8.0, -1.0, 0.0, 3.0])


def test_softplus_agrees_with_its_definition_where_that_can_be_computed():
    assert [softplus(x) for x in (-5.0, 0.5, 20.0)] == pytest.approx([math.log(1 + math.exp(x)) for x in (-5, 0.5, 20)])


@pytest.mark.parametrize(
    ("method", "params", "complaint"),
    [
        ("temperature", {"slope": 1.0}, "params of temperature are temperature; found slope"),
        ("temperature", {"temperature": 0.0}, "temperature must be > 0"),
        ("platt", {"slope": -0.1, "intercept": 0.0}, "slope must be >= 0"),
        ("beta", {"a": 1.0, "b": -1.0, "c": 0.0}, "b must be >= 0"),
        ("beta", {"a": 1.0, "b": 1.0}, "params of beta are a, b, c"),
        ("platt", {"slope": math.nan, "intercept": 0.0}, "finite"),
        ("isotonic", {}, "'temperature', 'platt' or 'beta'"),
    ],
)
def test_parameters_that_break_the_promises_are_refused(method, params, complaint):
    with pytest.raises(ValidationError, match=complaint):
        head(method, **params)
