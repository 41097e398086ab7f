"""The figures of the confidence against independent computations on made-up readings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hhh_router.calibration import CalibrationFile, Calibrators, HeadCalibration, ModeCalibration
from hhh_router.calibration import metrics as m
from hhh_router.calibration.confidence import ConfidenceModel, FeatureWeight
from hhh_router.data.examples import Example, ask
from hhh_router.errors import DataError
from hhh_router.evaluation.confidence import (
    KAPPA,
    LARGEST_SHARE,
    MAX_SOFTMAX,
    Judged,
    confidence_figures,
    judge,
    mean_contributions,
    refusal_limit,
)
from hhh_router.pipeline.plan import make_plan
from hhh_router.policy import load_policy, parse_policy
from hhh_router.types import EXPERTS, NEEDS, OUTCOMES, Posterior, Scores

N = 300


def prompt(number: int, harmful: int) -> Example:
    return Example(source="made", split="eval", messages=ask(f"prompt {number}"), needs={"harmless": float(harmful)})


def reading(logit: float, tokens: int = 20) -> Scores:
    needs = dict.fromkeys(NEEDS, -1.0) | {"harmless": logit}
    return Scores(mode="prompt", needs=needs, outcomes=dict.fromkeys(OUTCOMES, -2.0), distance=1.0, tokens=tokens)


@pytest.fixture(scope="module")
def calibrators() -> Calibrators:
    figures = {"n": 500, "positives": 200, "nll": 0.4, "brier": 0.1, "ece": 0.03, "nll_identity": 0.5,
               "brier_identity": 0.2, "ece_identity": 0.1, "auroc": 0.9}  # fmt: skip
    head = HeadCalibration(method="temperature", params={"temperature": 1.0}, candidates={}, **figures)
    term = {"min_margin": FeatureWeight(mean=1.0, scale=2.0, weight=1.5),
            "log_tokens": FeatureWeight(mean=3.0, scale=1.0, weight=-0.5)}  # fmt: skip
    model = ConfidenceModel(
        bias=0.7, terms=term, penalty=0.1, n=500, right=400, nll=0.4, brier=0.1, ece=0.03, auroc=0.7
    )
    mode = ModeCalibration(
        n=500, distance_limit=2.0, needs=dict.fromkeys(NEEDS, head), outcomes=dict.fromkeys(OUTCOMES, head),
        confidence=model,
    )  # fmt: skip
    return Calibrators(
        CalibrationFile.create(
            heads_sha256="0" * 64, dtype="float32", data_sha256="1" * 64, seed=1,
            train_prior=Posterior(*(1 / len(EXPERTS) for _ in EXPERTS)), modes={"prompt": mode},
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def sample() -> tuple[list[Example], list[Scores]]:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, N)
    harmful = rng.random(N) < 1 / (1 + np.exp(-logits))
    rows = [prompt(i, int(y)) for i, y in enumerate(harmful)]
    return rows, [reading(float(x), tokens=int(rng.integers(5, 200))) for x in logits]


def test_the_limit_is_the_one_at_which_the_policy_refuses() -> None:
    assert refusal_limit(load_policy("balanced")) == 0.70


def test_a_policy_that_never_refuses_by_harm_has_no_verdict_to_judge() -> None:
    lax = parse_policy(
        "version: 1\nname: lax\nweights: {helpful: 1.0, harmless: 1.0, honest: 1.0}\nstrength: 0.0\n"
        "checkpoints:\n  input: [{when: {needs.harmless: '>= 0.5'}, then: flag}, {then: allow}]\n"
        "  output: [{then: allow}]\non_error: closed\n"
    )

    with pytest.raises(DataError, match="'lax' refuses at no limit"):
        refusal_limit(lax)


def test_a_verdict_is_right_where_limit_and_label_agree(calibrators: Calibrators) -> None:
    at_limit = math.log(0.7 / 0.3)
    cases = [(at_limit + 0.01, 1), (at_limit - 0.01, 1), (at_limit + 0.01, 0), (at_limit - 0.01, 0)]

    judged = judge(
        [prompt(i, y) for i, (_, y) in enumerate(cases)], [reading(x) for x, _ in cases], load_policy("balanced"),
        calibrators,
    )  # fmt: skip

    assert judged.right.tolist() == [1, 0, 0, 1]
    assert judged.limit == 0.70


def test_kappa_is_what_a_request_is_served_with(
    calibrators: Calibrators, sample: tuple[list[Example], list[Scores]]
) -> None:
    rows, scores = sample
    policy = load_policy("balanced")

    judged = judge(rows, scores, policy, calibrators)

    plans = [make_plan(s, policy=policy, calibrators=calibrators) for s in scores]
    assert judged.confidences[KAPPA].tolist() == [p.confidence for p in plans]
    p = 1 / (1 + np.exp(-np.array([s.needs["harmless"] for s in scores])))
    assert judged.confidences[MAX_SOFTMAX] == pytest.approx(np.maximum(p, 1 - p))
    shares = [max(plan.evidence.posterior.as_dict().values()) for plan in plans]
    assert judged.confidences[LARGEST_SHARE].tolist() == shares


def test_contributions_sum_to_the_logit_of_kappa(
    calibrators: Calibrators, sample: tuple[list[Example], list[Scores]]
) -> None:
    judged = judge(*sample, load_policy("balanced"), calibrators)

    total = sum(judged.contributions.values())

    assert set(judged.contributions) == {"bias", "min_margin", "log_tokens"}
    assert 1 / (1 + np.exp(-total)) == pytest.approx(judged.confidences[KAPPA])
    by_hand = -0.5 * (np.log1p([s.tokens for s in sample[1]]) - 3.0)
    assert judged.contributions["log_tokens"] == pytest.approx(by_hand)
    assert mean_contributions(judged.contributions)["log_tokens"] == pytest.approx(np.abs(by_hand).mean())


def test_without_a_confidence_model_there_are_no_contributions(sample: tuple[list[Example], list[Scores]]) -> None:
    judged = judge(*sample, load_policy("balanced"), Calibrators.none())

    assert judged.contributions == {}
    assert all(len(values) == N for values in judged.confidences.values())


def made(kappa: np.ndarray, other: np.ndarray, right: np.ndarray) -> tuple[list[Example], Judged]:
    rows = [prompt(i, 0) for i in range(len(right))]
    confidences = {KAPPA: kappa, MAX_SOFTMAX: other, LARGEST_SHARE: other}
    return rows, Judged(limit=0.7, right=right, confidences=confidences, contributions={"x": np.full(len(right), -2.0)})


def test_a_calibrated_confidence_meets_both_targets_and_a_coin_neither() -> None:
    rng = np.random.default_rng(9)
    kappa = rng.uniform(0.2, 1, 4000)
    right = (rng.random(4000) < kappa).astype(float)
    coin = rng.uniform(0.5, 1, 4000)

    good, bad, _ = confidence_figures("t", *made(kappa, coin, right), policy="p", seed=1, bootstraps=50)
    worse, *_ = confidence_figures("t", *made(coin, kappa, right), policy="p", seed=1, bootstraps=50)

    assert good["meets_ece"]
    assert good["meets_aurc"]
    assert not worse["meets_ece"]
    assert not worse["meets_aurc"]
    assert good["aurc_difference"] == pytest.approx(m.aurc(kappa, right) - m.aurc(coin, right))
    low, high = good["aurc_difference_interval"]
    assert low < good["aurc_difference"] < high < 0
    assert (good["ece"], good["brier"]) == (pytest.approx(m.ece(kappa, right)), pytest.approx(m.brier(kappa, right)))
    assert bad["auroc"] == pytest.approx(m.auroc(coin, right))
    assert "meets_ece" not in bad


def test_every_row_says_where_it_comes_from_and_has_a_curve_to_draw() -> None:
    rng = np.random.default_rng(3)
    right = rng.integers(0, 2, 60).astype(float)

    figures = confidence_figures("t", *made(rng.random(60), rng.random(60), right), policy="p", seed=7, bootstraps=20)

    assert [f["confidence"] for f in figures] == [KAPPA, MAX_SOFTMAX, LARGEST_SHARE]
    for row in figures:
        assert (row["n"], row["seed"], len(row["data_sha256"])) == (60, 7, 64)
        assert row["accuracy"] == pytest.approx(right.mean())
        assert row["curve"][-1] == [1.0, pytest.approx(1 - right.mean(), abs=1e-4)]
        for key in ("accuracy", "ece", "brier", "auroc", "aurc"):
            low, high = row[f"{key}_interval"]
            assert low <= high
    assert figures[0]["contributions"] == {"x": 2.0}


def test_where_every_verdict_is_right_there_is_no_ranking_to_measure() -> None:
    figures = confidence_figures(
        "t", *made(np.full(40, 0.9), np.full(40, 0.8), np.ones(40)), policy="p", seed=7, bootstraps=20
    )

    assert figures[0]["auroc"] is None
    assert figures[0]["auroc_interval"] is None
    assert figures[0]["aurc"] == 0.0
    assert figures[0]["meets_aurc"] is False  # equal is not better
