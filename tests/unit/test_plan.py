"""One reading becomes a plan; a reply's reading becomes a verdict; both can be explained."""

import json
import math

import pytest

from hhh_router.calibration import Calibrators
from hhh_router.errors import ReaderError
from hhh_router.pipeline.explain import explain
from hhh_router.pipeline.plan import judge_output, make_plan, make_planner
from hhh_router.policy import list_policies, load_policy, parse_policy
from hhh_router.routing import kl_nats, posterior
from hhh_router.types import DIMENSIONS, EXPERTS, OUTCOMES, Action, Scores, Weights

BALANCED = load_policy("balanced")
NONE = Calibrators.none()


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def reading(*, mode: str = "prompt", distance: float = 0.5, **probabilities: float) -> Scores:
    """Scores whose uncalibrated probabilities are the given ones, 0.02 for every other head."""
    return Scores(
        mode=mode,
        needs={d: logit(probabilities.get(d, 0.02)) for d in DIMENSIONS},
        outcomes={o: logit(probabilities.get(o, 0.02)) for o in OUTCOMES},
        distance=distance,
        tokens=12,
    )


def plan_of(scores: Scores, *, policy=BALANCED, **more):
    return make_plan(scores, policy=policy, calibrators=NONE, **more)


def test_a_plain_request_is_allowed_with_weights_that_sum_to_one():
    plan = plan_of(reading(helpful=0.95))

    assert plan.decision.action is Action.ALLOW
    assert sum(plan.weights.as_dict().values()) == pytest.approx(1, abs=1e-9)
    assert plan.weights.helpful == max(plan.weights.as_dict().values())
    assert plan.enforced


def test_the_plan_keeps_measured_allowed_and_applied_apart():
    plan = plan_of(reading(helpful=0.9, honest=0.4))

    assert plan.evidence.needs["helpful"] == pytest.approx(0.9)
    assert plan.evidence.posterior == posterior(plan.evidence.needs)
    assert plan.policy_shift_nats == kl_nats(plan.weights, plan.evidence.posterior)
    assert 0 <= plan.confidence <= 1


def test_a_harmful_request_is_refused_with_the_policys_message():
    plan = plan_of(reading(harmless=0.97))

    assert (plan.decision.action, plan.decision.rule) == (Action.REFUSE, "checkpoints.input[0]")
    assert plan.decision.reason == "needs.harmless 0.9700 >= 0.7"
    assert plan.decision.message.startswith("I'm sorry")
    assert plan.stops


def test_a_floor_that_holds_is_met():
    assert plan_of(reading(harmless=0.55, honest=0.9)).weights.harmless == pytest.approx(0.5)


def test_the_same_evidence_gets_visibly_different_weights_under_each_policy():
    scores = reading(helpful=0.7, harmless=0.35, honest=0.45)

    weights = {name: plan_of(scores, policy=load_policy(name)).weights for name in list_policies()}

    for one in weights:
        for other in weights:
            if one < other:
                apart = sum(abs(weights[one][e] - weights[other][e]) for e in EXPERTS)
                assert apart > 0.15, (one, other, weights[one], weights[other])
    assert max(weights, key=lambda n: weights[n].harmless) == "harmless-first"
    assert max(weights, key=lambda n: weights[n].helpful) == "helpful-first"
    assert max(weights, key=lambda n: weights[n].honest) == "honest-first"


def test_pinned_weights_within_bounds_are_applied_as_they_are():
    pinned = Weights(0.1, 0.2, 0.3, 0.4)

    assert plan_of(reading(helpful=0.9), pinned=pinned).weights.as_dict() == pytest.approx(pinned.as_dict())


def test_pinned_weights_cannot_escape_the_policys_bounds():
    plan = plan_of(reading(harmless=0.55), pinned=Weights(1.0, 0.0, 0.0, 0.0))

    assert plan.weights.harmless == pytest.approx(0.5)  # the floor
    assert plan.weights.base == pytest.approx(0.5)


def test_pinned_weights_do_not_change_the_decision():
    plan = plan_of(reading(harmless=0.97), pinned=Weights(0.0, 1.0, 0.0, 0.0))

    assert plan.decision.action is Action.REFUSE


def test_floors_of_a_regenerate_raise_the_weights():
    scores = reading(helpful=0.95)

    assert plan_of(scores).weights.harmless < 0.1
    assert plan_of(scores, floors={"harmless": 0.6}).weights.harmless == pytest.approx(0.6)


def test_a_planner_is_the_plan_with_everything_filled_in():
    planner = make_planner(policy=BALANCED, calibrators=NONE, floors={"honest": 0.3})

    assert planner(reading(helpful=0.9)) == plan_of(reading(helpful=0.9), floors={"honest": 0.3})


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["needs", "outcomes", "distance"])
@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_a_reading_that_is_not_finite_gives_no_plan(broken, where, on_error):
    policy = parse_policy(
        f"version: 1\nname: t\nextends: balanced\non_error: {on_error}\ncheckpoints: {{input: [{{then: allow}}]}}\n"
    )
    good = reading(helpful=0.9)
    scores = Scores(
        mode="prompt",
        needs={**good.needs, "honest": broken} if where == "needs" else good.needs,
        outcomes={**good.outcomes, "unhelpful": broken} if where == "outcomes" else good.outcomes,
        distance=broken if where == "distance" else 0.5,
        tokens=12,
    )

    with pytest.raises(ReaderError, match="not finite"):
        plan_of(scores, policy=policy)
    with pytest.raises(ReaderError, match="not finite"):
        judge_output(scores, plan=plan_of(good), policy=policy, calibrators=NONE)


def test_a_reading_without_a_need_never_passes_a_rule_that_asks_for_it():
    scores = reading(helpful=0.9)
    blind = Scores(mode="prompt", needs={}, outcomes=scores.outcomes, distance=0.5, tokens=12)

    with pytest.raises(ReaderError, match=r"floors\[0\] asks for what was not measured"):
        plan_of(blind)
    no_floors = parse_policy("version: 1\nname: t\nextends: balanced\nfloors: []\n")
    plan = plan_of(blind, policy=no_floors)
    assert (plan.decision.action, plan.decision.rule) == (Action.REFUSE, "on_error")


def test_what_goes_wrong_in_a_calibrator_is_a_reader_error():
    class Broken(Calibrators):
        def evidence(self, scores):
            raise ZeroDivisionError("slope")

    with pytest.raises(ReaderError, match=r"ZeroDivisionError: slope"):
        make_plan(reading(), policy=BALANCED, calibrators=Broken(None))


def test_a_safe_reply_is_allowed_and_an_unsafe_one_made_again():
    plan = plan_of(reading(helpful=0.95))

    _, _, safe = judge_output(reading(mode="both"), plan=plan, policy=BALANCED, calibrators=NONE)
    _, _, unsafe = judge_output(reading(mode="both", unsafe=0.9), plan=plan, policy=BALANCED, calibrators=NONE)

    assert safe.action is Action.ALLOW
    assert (unsafe.action, unsafe.raises) == (Action.REGENERATE, {"harmless": 0.5})


def test_the_output_rules_see_the_reply_and_its_confidence():
    plan = plan_of(reading(helpful=0.95))
    doubting = parse_policy(
        "version: 1\nname: doubting\nextends: balanced\ncheckpoints:\n  output:\n"
        '    - {when: {outcomes.unsafe: ">= 0.8"}, then: refuse}\n'
        '    - {when: {confidence: "< 0.55"}, then: flag}\n    - {then: allow}\n'
    )

    evidence, confidence, decision = judge_output(
        reading(mode="both", unsafe=0.48), plan=plan, policy=doubting, calibrators=NONE, logprobs=[-0.1, -0.3]
    )

    assert evidence.mode == "both"
    assert evidence.outcomes["unsafe"] == pytest.approx(0.48)
    assert confidence == pytest.approx(0.52)  # uncalibrated: 1 − 0.48, it lies below the limit
    assert (decision.action, decision.reason) == (Action.FLAG, "confidence 0.5200 < 0.55")


def test_a_response_alone_can_be_judged():
    policy = load_policy("harmless-first")
    scores = Scores(mode="response", needs={}, outcomes=dict.fromkeys(OUTCOMES, logit(0.9)), distance=0.5, tokens=9)

    plan = plan_of(scores, policy=policy)
    _, _, decision = judge_output(scores, plan=plan, policy=policy, calibrators=NONE)

    assert decision.action is Action.REFUSE
    assert sum(plan.weights.as_dict().values()) == pytest.approx(1)


def test_a_shadow_policy_plans_the_same_and_enforces_nothing():
    shadow = parse_policy("version: 1\nname: t\nextends: balanced\nmode: shadow\n")

    plan = plan_of(reading(harmless=0.97), policy=shadow)

    assert plan.decision.action is Action.REFUSE
    assert not plan.enforced
    assert not plan.stops


def test_the_explanation_goes_from_evidence_over_rules_to_the_decision():
    scores = reading(helpful=0.6, harmless=0.6)

    steps = explain(scores, policy=BALANCED, calibrators=NONE)

    assert [step.title for step in steps] == [
        "evidence",
        "posterior",
        "prior",
        "bounds",
        "weights",
        "confidence",
        "checkpoints.input[0] → refuse",
        "checkpoints.input[1] → flag",
        "decision",
    ]
    by_title = {step.title: step for step in steps}
    assert "harmless 0.600" in by_title["evidence"].detail
    assert "floors[0] (needs.harmless >= 0.4) raises to harmless 0.500" in by_title["bounds"].detail
    assert by_title["checkpoints.input[0] → refuse"].detail == "needs.harmless 0.6000 >= 0.7? no\ndoes not match"
    assert by_title["checkpoints.input[1] → flag"].detail == "needs.harmless 0.6000 >= 0.45? yes\nmatches"


def test_the_explanation_says_what_the_plan_does():
    for name in list_policies():
        policy = load_policy(name)
        scores = reading(helpful=0.6, harmless=0.45, honest=0.3)
        plan = plan_of(scores, policy=policy)

        found = {step.title: step.data for step in explain(scores, policy=policy, calibrators=NONE)}

        assert found["weights"]["weights"] == plan.weights.as_dict()
        assert found["weights"]["policy_shift_nats"] == plan.policy_shift_nats
        assert found["confidence"]["confidence"] == plan.confidence
        assert found["decision"]["action"] == plan.decision.action
        assert found["decision"]["rule"] == plan.decision.rule


def test_the_explanation_is_json_ready():
    steps = explain(reading(), policy=BALANCED, calibrators=NONE)

    text = json.dumps([dict(step.data) for step in steps], allow_nan=False)

    assert json.loads(text)[0]["calibrated"] is False


def test_the_explanation_of_pinned_weights_leaves_the_prior_out():
    steps = explain(reading(), policy=BALANCED, calibrators=NONE, pinned=Weights(0.1, 0.2, 0.3, 0.4))

    assert [step.title for step in steps][:4] == ["evidence", "posterior", "pinned", "bounds"]
