"""Which rule wins, what its decision says, and which bounds its floors lead to."""

import math
from dataclasses import replace

import pytest

from hhh_router.errors import ReaderError
from hhh_router.policy import (
    Facts,
    Policy,
    Threshold,
    attempts,
    bounds,
    decide,
    load_policy,
    on_error_decision,
    parse_policy,
    thresholds,
)
from hhh_router.policy.decide import raise_lower
from hhh_router.types import Action, Evidence, Posterior, Scores, Weights

HEAD = "version: 1\nname: t\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\n"
FACTS = Facts(
    needs={"helpful": 0.9, "harmless": 0.4, "honest": 0.1},
    outcomes={"unsafe": 0.2, "untruthful": 0.3, "unhelpful": 0.1},
    weights=Weights(0.1, 0.5, 0.3, 0.1),
    confidence=0.8,
    in_distribution=True,
    mode="prompt",
)


def policy(*, rules: str = "[{then: allow}]", output: str = "[{then: allow}]", more: str = "") -> Policy:
    return parse_policy(f"{HEAD}checkpoints:\n  input: {rules}\n  output: {output}\n{more}")


def evidence(*, mode: str = "prompt", **needs: float) -> Evidence:
    return Evidence(
        mode=mode,
        needs=needs,
        posterior=Posterior(0.25, 0.25, 0.25, 0.25),
        outcomes={"unsafe": 0.2},
        in_distribution=True,
        calibrated=True,
        scores=Scores(mode=mode, needs={}, outcomes={}, distance=0.0, tokens=1),
    )


def test_the_first_rule_that_matches_wins():
    low, lower = 'needs.harmless: ">= 0.3"', 'needs.harmless: ">= 0.2"'
    rules = f"[{{when: {{{low}}}, then: flag}}, {{when: {{{lower}}}, then: block}}, {{then: allow}}]"

    decision = decide(policy(rules=rules), "input", FACTS)

    assert (decision.action, decision.rule) == (Action.FLAG, "checkpoints.input[0]")
    assert decision.reason == "needs.harmless 0.4000 >= 0.3"


def test_the_default_rule_holds_when_no_other_does():
    decision = decide(policy(rules='[{when: {needs.harmless: ">= 0.5"}, then: refuse}, {then: flag}]'), "input", FACTS)

    assert (decision.action, decision.rule) == (Action.FLAG, "checkpoints.input[1]")


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ('needs.harmless: ">= 0.4"', True),
        ('needs.harmless: "> 0.4"', False),
        ('needs.harmless: "<= 0.4"', True),
        ('needs.harmless: "< 0.4"', False),
        ('outcomes.untruthful: "> 0.29"', True),
        ('confidence: "< 0.81"', True),
        ('weights.base: "<= 0.1"', True),
        ('weights.helpful: "> 0.5"', False),
        ("in_distribution: true", True),
        ("in_distribution: false", False),
        ("mode: prompt", True),
        ("mode: both", False),
        ('needs.harmless: ">= 0.4", mode: both', False),
        ('needs.harmless: ">= 0.4", mode: prompt', True),
    ],
)
def test_a_rule_matches_when_all_its_conditions_hold(condition, holds):
    decision = decide(policy(rules=f"[{{when: {{{condition}}}, then: block}}, {{then: allow}}]"), "input", FACTS)

    assert (decision.action is Action.BLOCK) == holds


def test_a_rules_message_reaches_the_decision():
    refusing = policy(rules='[{when: {needs.harmless: ">= 0.3"}, then: refuse, message: "Not here."}, {then: allow}]')

    assert decide(refusing, "input", FACTS).message == "Not here."


@pytest.mark.parametrize("action", ["refuse", "escalate", "block"])
def test_whatever_stops_a_reply_tells_the_caller_something(action):
    assert decide(policy(rules=f"[{{then: {action}}}]"), "input", FACTS).message


def test_a_regenerate_carries_what_it_raises():
    rules = '[{when: {outcomes.unsafe: ">= 0.1"}, then: regenerate, raise: {harmless: 0.7}}, {then: allow}]'

    decision = decide(policy(output=rules), "output", FACTS)

    assert (decision.action, decision.raises) == (Action.REGENERATE, {"harmless": 0.7})


@pytest.mark.parametrize("found", [{}, {"harmless": math.nan}, {"harmless": math.inf}])
@pytest.mark.parametrize(("on_error", "action"), [("closed", Action.REFUSE), ("open", Action.ALLOW)])
def test_a_rule_on_what_was_not_measured_is_decided_by_on_error(found, on_error, action):
    rules = '[{when: {needs.harmless: ">= 0.9"}, then: refuse}, {then: allow}]'

    decision = decide(policy(rules=rules, more=f"on_error: {on_error}\n"), "input", replace(FACTS, needs=found))

    assert (decision.action, decision.rule) == (action, "on_error")
    assert decision.reason == "checkpoints.input[0] asks for what was not measured (needs.harmless)"


def test_a_rule_that_fails_anyway_may_ask_for_what_was_not_measured():
    rules = '[{when: {needs.harmless: ">= 0.9", mode: both}, then: refuse}, {then: allow}]'

    decision = decide(policy(rules=rules), "input", replace(FACTS, needs={}))

    assert (decision.action, decision.rule) == (Action.ALLOW, "checkpoints.input[1]")


def test_an_unknown_confidence_is_not_taken_for_a_high_one():
    rules = '[{when: {confidence: "< 0.5"}, then: escalate}, {then: allow}]'

    decision = decide(policy(rules=rules), "input", replace(FACTS, confidence=None))

    assert (decision.action, decision.rule) == (Action.REFUSE, "on_error")


def test_a_checkpoint_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no checkpoint 'tool_call'"):
        decide(policy(), "tool_call", FACTS)


def test_on_error_closed_refuses_with_a_message_and_open_allows():
    closed = on_error_decision(load_policy("balanced"), "output", "the reader failed")
    opened = on_error_decision(policy(more="on_error: open\n"), "output", "the reader failed")

    assert (closed.action, closed.rule, closed.reason) == (Action.REFUSE, "on_error", "the reader failed")
    assert closed.message
    assert (opened.action, opened.message) == (Action.ALLOW, None)


def test_a_shadow_policy_decides_like_one_that_enforces():
    rules = '[{when: {needs.harmless: ">= 0.3"}, then: refuse}, {then: allow}]'

    assert decide(policy(rules=rules, more="mode: shadow\n"), "input", FACTS) == decide(
        policy(rules=rules), "input", FACTS
    )


def test_thresholds_are_the_numbers_on_needs_and_outcomes_that_rules_act_on_each_once():
    rules = (
        '[{when: {needs.harmless: ">= 0.9", confidence: "< 0.5", mode: prompt}, then: refuse}, '
        '{when: {needs.harmless: ">= 0.9", weights.base: "> 0.5"}, then: block}, '
        '{when: {outcomes.unsafe: "> 0.6"}, then: escalate}, '
        '{when: {outcomes.unsafe: "> 0.3"}, then: flag}, {when: {needs.honest: "> 0.2"}, then: allow}, {then: allow}]'
    )

    assert thresholds(policy(rules=rules), "input") == (
        Threshold(quantity="needs.harmless", op=">=", value=0.9),
        Threshold(quantity="outcomes.unsafe", op=">", value=0.6),
    )
    assert thresholds(policy(rules=rules), "output") == ()


def test_attempts_show_every_rule_up_to_the_one_that_settles_it():
    rules = (
        '[{when: {needs.harmless: ">= 0.9"}, then: refuse}, {when: {in_distribution: true}, then: flag}, {then: allow}]'
    )

    tried = attempts(policy(rules=rules), "input", FACTS)

    assert [(a.rule.place, a.found, a.holds) for a in tried] == [
        ("checkpoints.input[0]", ("needs.harmless 0.4000 >= 0.9? no",), False),
        ("checkpoints.input[1]", ("in_distribution true is true? yes",), True),
    ]


def test_bounds_are_the_policys_own_without_floors():
    found = bounds(policy(more="bounds: {base: {max: 0.4}, honest: {min: 0.2}}\n"), evidence())

    assert found.lower == {"base": 0.0, "helpful": 0.0, "harmless": 0.0, "honest": 0.2}
    assert found.upper == {"base": 0.4, "helpful": 1.0, "harmless": 1.0, "honest": 1.0}
    assert found.raised == ()


def test_a_floor_that_holds_raises_the_lower_bound():
    floored = policy(more='floors: [{when: {needs.harmless: ">= 0.5"}, raise: {harmless: 0.6}}]\n')

    assert bounds(floored, evidence(harmless=0.5)).lower["harmless"] == 0.6
    assert bounds(floored, evidence(harmless=0.5)).raised == ("floors[0]",)
    assert bounds(floored, evidence(harmless=0.49)).lower["harmless"] == 0.0
    assert bounds(floored, evidence(harmless=0.49)).raised == ()


def test_the_highest_of_several_floors_holds():
    more = (
        'floors: [{when: {needs.harmless: ">= 0.2"}, raise: {harmless: 0.6}}, '
        '{when: {needs.harmless: ">= 0.1"}, raise: {harmless: 0.3}}]\n'
    )

    found = bounds(policy(more=more), evidence(harmless=0.5), {"harmless": 0.4})

    assert found.lower["harmless"] == 0.6
    assert found.raised == ("floors[0]", "floors[1]")


def test_further_floors_stay_within_the_maximum_and_never_lower():
    bounded = policy(more="bounds: {harmless: {min: 0.3, max: 0.5}}\n")

    assert bounds(bounded, evidence(), {"harmless": 0.9}).lower["harmless"] == 0.5
    assert bounds(bounded, evidence(), {"harmless": 0.1}).lower["harmless"] == 0.3


def test_floors_that_cannot_all_be_met_are_shortened_by_one_factor():
    more = (
        "bounds: {base: {min: 0.1}}\n"
        'floors: [{when: {needs.harmless: ">= 0.5"}, raise: {harmless: 0.6}}, '
        '{when: {needs.honest: ">= 0.5"}, raise: {honest: 0.6}}]\n'
    )

    lower = bounds(policy(more=more), evidence(harmless=0.9, honest=0.9)).lower

    assert lower["base"] == 0.1  # the policy's own minima stay whole
    assert lower["harmless"] == pytest.approx(0.45)
    assert lower["honest"] == pytest.approx(0.45)
    assert sum(lower.values()) == pytest.approx(1.0, abs=1e-12)


def test_minima_that_already_sum_to_one_leave_no_room_for_a_floor():
    lower = {"base": 0.5, "helpful": 0.5, "harmless": 0.0, "honest": 0.0}
    upper = dict.fromkeys(lower, 1.0)

    assert raise_lower(lower, upper, {"harmless": 0.5}) == lower


def test_a_floor_on_what_was_not_measured_is_a_reader_error():
    floored = policy(more='floors: [{when: {needs.harmless: ">= 0.5"}, raise: {harmless: 0.6}}]\n')

    with pytest.raises(ReaderError, match=r"floors\[0\] asks for what was not measured \(needs.harmless\)"):
        bounds(floored, evidence())
    assert bounds(floored, evidence(mode="response")).raised == ()


def test_the_shipped_policies_refuse_plain_harm_and_answer_plain_requests():
    for name in ("balanced", "harmless-first", "helpful-first", "honest-first"):
        shipped = load_policy(name)
        harmful = replace(FACTS, needs={"helpful": 0.05, "harmless": 0.99, "honest": 0.1})
        plain = replace(FACTS, needs={"helpful": 0.95, "harmless": 0.03, "honest": 0.1})
        assert decide(shipped, "input", harmful).action is Action.REFUSE
        assert decide(shipped, "input", plain).action is Action.ALLOW


def test_the_shipped_policies_differ_in_when_they_refuse():
    def refuses(name: str, need: float) -> bool:
        facts = replace(FACTS, needs={"helpful": 0.3, "harmless": need, "honest": 0.1})
        return decide(load_policy(name), "input", facts).action is Action.REFUSE

    assert [refuses(n, 0.60) for n in ("harmless-first", "balanced", "helpful-first")] == [True, False, False]
    assert [refuses(n, 0.75) for n in ("harmless-first", "balanced", "helpful-first")] == [True, True, False]
