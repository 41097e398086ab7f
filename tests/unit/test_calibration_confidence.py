"""The features confidence is made of, and what is said without a model."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from hhh_router.calibration import FEATURES, ConfidenceModel, FeatureWeight, confidence_features
from hhh_router.calibration.confidence import unfitted_confidence
from hhh_router.types import Evidence, Posterior, Scores, Weights

UNIFORM = Weights(0.25, 0.25, 0.25, 0.25)


def evidence(mode: str = "prompt", *, needs: bool = True, distance: float = 0.8, tokens: int = 9) -> Evidence:
    return Evidence(
        mode=mode,  # type: ignore[arg-type]
        needs={"helpful": 0.9, "harmless": 0.2, "honest": 0.1} if needs else {},
        posterior=Posterior(0.1, 0.7, 0.1, 0.1),
        outcomes={"unsafe": 0.3, "untruthful": 0.6, "unhelpful": 0.1},
        in_distribution=distance <= 1,
        calibrated=True,
        scores=Scores(mode=mode, needs={}, outcomes={}, distance=distance, tokens=tokens),  # type: ignore[arg-type]
    )


def features(found: Evidence | None = None, **changed) -> dict[str, float]:
    arguments = {"weights": UNIFORM, "policy_shift_nats": 0.3, "limits": [(0.2, 0.9), (0.3, 0.5)]} | changed
    return confidence_features(found or evidence(), **arguments)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_the_features_are_the_documented_ones_and_few():
    assert tuple(features()) == FEATURES
    assert len(FEATURES) <= 24  # what the method allows
    assert all(math.isfinite(v) for v in features().values())


def test_margins_are_those_of_the_nearest_limit():
    nearest = logit(0.3) - logit(0.5)

    assert features()["nearest_margin"] == pytest.approx(nearest)
    assert features()["min_margin"] == pytest.approx(-nearest)
    assert features()["no_limits"] == 0.0


def test_the_least_claim_is_the_least_sure_verdict_and_may_lie_far_from_its_limit():
    assert features(limits=[(0.2, 0.9), (0.3, 0.5)])["least_claim"] == pytest.approx(logit(0.7))
    assert features(limits=[(0.6, 0.7)])["least_claim"] == pytest.approx(logit(0.4))  # let through, and likely harmful
    assert features(limits=[])["least_claim"] == 0.0


def test_a_checkpoint_without_numbers_says_so_instead_of_claiming_a_margin():
    found = features(limits=[])

    assert (found["no_limits"], found["min_margin"], found["nearest_margin"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_limit_at_the_end_of_the_scale_has_a_finite_margin(limit):
    assert math.isfinite(features(limits=[(0.5, limit)])["min_margin"])


def test_logits_entropy_shift_and_length_are_what_they_say():
    found = features()

    assert found["max_outcome_logit"] == pytest.approx(logit(0.6))
    assert found["harmless_logit"] == pytest.approx(logit(0.2))
    assert found["weights_entropy_nats"] == pytest.approx(math.log(4))
    assert found["policy_shift_nats"] == 0.3
    assert found["log_tokens"] == pytest.approx(math.log(10))


def test_missing_needs_and_log_probabilities_are_flagged_not_zero_in_silence():
    bare = features(evidence(needs=False))
    full = features(logprobs=[-1.0, -3.0])

    assert (bare["has_needs"], bare["harmless_logit"], bare["has_logprobs"]) == (0.0, 0.0, 0.0)
    assert (full["has_needs"], full["has_logprobs"]) == (1.0, 1.0)
    assert (full["mean_logprob"], full["min_logprob"]) == (-2.0, -3.0)


def test_a_servers_minus_9999_and_nan_do_not_swamp_the_log_probabilities():
    found = features(logprobs=[-9999.0, math.nan, -math.inf, 0.0])

    assert (found["mean_logprob"], found["min_logprob"]) == (pytest.approx(-40 / 3), -20.0)
    assert features(logprobs=[math.nan])["has_logprobs"] == 0.0


def test_mode_and_distance_are_flagged():
    found = features(evidence("both", distance=99.0))

    assert (found["mode_both"], found["mode_response"], found["in_distribution"]) == (1.0, 0.0, 0.0)
    assert found["distance"] == 10.0


def test_without_a_model_each_limit_is_a_claim_and_the_weakest_counts():
    # 0.2 stays below 0.9: "not so", right with 0.8. 0.6 reaches 0.5: "so", right with 0.6
    confidence = unfitted_confidence(evidence(), [(0.2, 0.9), (0.6, 0.5)])

    assert confidence.value == pytest.approx(0.6)
    assert not confidence.calibrated
    assert confidence.contributions == {}


def test_without_a_model_a_lenient_limit_can_leave_little_confidence():
    assert unfitted_confidence(evidence(), [(0.85, 0.9)]).value == pytest.approx(0.15)


def test_without_model_and_limits_the_least_decided_outcome_counts():
    assert unfitted_confidence(evidence(), []).value == pytest.approx(0.6)  # untruthful 0.6; the others .7 and .9


def test_an_outlier_cannot_decide_alone():
    model = ConfidenceModel(
        bias=0.0,
        terms={"log_tokens": FeatureWeight(mean=0.0, scale=0.01, weight=0.5)},
        penalty=0.1,
        n=100,
        right=50,
        nll=0.5,
        brier=0.2,
        ece=0.1,
        auroc=0.5,
    )

    assert model.apply(features()).contributions["log_tokens"] == 0.5 * 6.0


def test_a_feature_of_another_version_is_refused():
    with pytest.raises(ValidationError, match="'astrology' is no feature of this version"):
        ConfidenceModel(
            bias=0.0,
            terms={"astrology": FeatureWeight(mean=0.0, scale=1.0, weight=1.0)},
            penalty=0.1,
            n=100,
            right=50,
            nll=0.5,
            brier=0.2,
            ece=0.1,
            auroc=0.5,
        )
