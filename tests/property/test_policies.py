"""Whatever is in a policy file or an evidence: a decision, or errors that say where."""

import random
import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hhh_router.calibration import Calibrators
from hhh_router.errors import PolicyError
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.policy import Condition, Facts, Floor, as_document, decide, list_policies, load_policy, parse_policy
from hhh_router.policy.load import policy_path
from hhh_router.types import DIMENSIONS, EXPERTS, OUTCOMES, Action, Scores, Weights

SHIPPED = {name: load_policy(name) for name in list_policies()}
TEXTS = {name: policy_path(name).read_text(encoding="utf-8") for name in list_policies()}
LINE = re.compile(r"p\.yaml:[1-9][0-9]*  \S.*: .+")
CALIBRATORS = Calibrators.none()

logit = st.floats(-30, 30)
probability = st.floats(0, 1)
shipped = st.sampled_from(sorted(SHIPPED))


@st.composite
def readings(draw, mode="prompt"):
    return Scores(
        mode=mode,
        needs={d: draw(logit) for d in DIMENSIONS},
        outcomes={o: draw(logit) for o in OUTCOMES},
        distance=draw(st.floats(0, 1e3)),
        tokens=draw(st.integers(1, 8192)),
    )


@st.composite
def facts(draw):
    parts = [draw(st.floats(1e-3, 1)) for _ in EXPERTS]
    return Facts(
        needs={d: draw(probability) for d in DIMENSIONS},
        outcomes={o: draw(probability) for o in OUTCOMES},
        weights=Weights(*(p / sum(parts) for p in parts)),
        confidence=draw(probability),
        in_distribution=draw(st.booleans()),
        mode=draw(st.sampled_from(["prompt", "response", "both"])),
    )


def reported(text: str | bytes) -> list[str]:
    """The mistakes of a text, none when it is a policy. Anything but a PolicyError escapes and fails the test."""
    try:
        parse_policy(text, source="p.yaml")
    except PolicyError as error:
        return error.message.split("\n")
    return []


@given(shipped, readings(), readings(mode="both"))
def test_every_shipped_policy_answers_every_evidence(name, asked, answered):
    policy = SHIPPED[name]

    plan = make_plan(asked, policy=policy, calibrators=CALIBRATORS)
    evidence, confidence, decision = judge_output(answered, plan=plan, policy=policy, calibrators=CALIBRATORS)

    assert plan.decision.rule.startswith("checkpoints.input[")
    assert decision.rule.startswith("checkpoints.output[")
    assert 0 <= plan.confidence <= 1
    assert 0 <= confidence <= 1
    assert evidence.mode == "both"
    for e in EXPERTS:
        assert policy.lower[e] - 1e-9 <= plan.weights[e] <= policy.upper[e] + 1e-9


@given(shipped, readings())
def test_the_same_evidence_gives_the_same_decision(name, asked):
    first = make_plan(asked, policy=SHIPPED[name], calibrators=CALIBRATORS)
    again = make_plan(replace(asked), policy=load_policy(name), calibrators=CALIBRATORS)

    assert first == again


@given(facts(), probability, probability)
def test_a_lower_refuse_threshold_never_allows_more(found, one, other):
    strict, lax = sorted((one, other))

    def at(threshold: float) -> Action:
        document = as_document(SHIPPED["balanced"])
        document["checkpoints"]["input"] = [
            {"when": {"needs.harmless": f">= {threshold:.17f}"}, "then": "refuse"},
            {"then": "allow"},
        ]
        return decide(parse_policy(yaml.safe_dump(document)), "input", found).action

    if at(strict) is Action.ALLOW:
        assert at(lax) is Action.ALLOW


@given(shipped, readings(), probability, probability, probability)
def test_a_lower_limit_of_a_floor_never_lowers_its_experts_weight(name, asked, one, other, least):
    policy = SHIPPED[name]
    least = min(max(least, policy.lower["harmless"]), policy.upper["harmless"])

    def weight(limit: float) -> float:
        floor = Floor(
            place="floors[9]",
            when=(Condition(quantity="needs.harmless", op=">=", value=limit),),
            raises={"harmless": least},
        )
        given_floor = replace(policy, floors=(*policy.floors, floor))
        return make_plan(asked, policy=given_floor, calibrators=CALIBRATORS).weights["harmless"]

    assert weight(min(one, other)) >= weight(max(one, other)) - 1e-9


@given(facts(), probability)
def test_a_higher_need_is_never_let_through_where_a_lower_one_was_stopped(found, need):
    low, high = sorted((found.needs["harmless"], need))
    for policy in SHIPPED.values():
        before = decide(policy, "input", replace(found, needs={**found.needs, "harmless": low}))
        after = decide(policy, "input", replace(found, needs={**found.needs, "harmless": high}))
        if before.action.stops:
            assert after.action.stops


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_losing_any_measured_number_never_turns_a_stop_into_an_allow(name):
    harmful = Facts(
        needs={"helpful": 0.1, "harmless": 0.99, "honest": 0.1},
        outcomes=dict.fromkeys(OUTCOMES, 0.99),
        weights=Weights(0.25, 0.25, 0.25, 0.25),
        confidence=0.9,
        in_distribution=True,
        mode="both",
    )
    for checkpoint in ("input", "output"):
        for lost in (replace(harmful, needs={}), replace(harmful, outcomes={}), replace(harmful, confidence=None)):
            whole, broken = decide(SHIPPED[name], checkpoint, harmful), decide(SHIPPED[name], checkpoint, lost)
            assert whole.action not in (Action.ALLOW, Action.FLAG)
            assert broken.action not in (Action.ALLOW, Action.FLAG)


@settings(max_examples=300)
@given(shipped, st.randoms(use_true_random=False), st.integers(1, 8))
def test_a_mangled_policy_is_a_policy_or_a_list_of_places(name, rng, edits):
    text = TEXTS[name]
    for _ in range(edits):
        text = _mangled(text, rng)

    assert all(LINE.fullmatch(line) for line in reported(text))


@settings(max_examples=200)
@given(st.one_of(st.text(max_size=300), st.binary(max_size=300)))
@example("\ud800")
@example("a: \ud800")
@example('a: "\\ud800"')
@example('name: "\\uD800"\nversion: 1')
@example('a: "\\U00110000"')
@example("? {a: b}\n: c")
@example("!!python/object/apply:os.system ['true']")
@example("a: !<tag:\x07> b")
@example("%YAML 9.9\n---\na: 1")
@example("&a [*a]")
@example("{a: 1, a: 1}")
@example("\x85: \u2028")
@example("'" + "\u2029" * 3)
@example("0x1F: 1\n1:30: 2\n2001-01-01: 3\n~: 4")
def test_any_text_at_all_is_a_list_of_places(raw):
    found = reported(raw)

    assert found
    assert all(LINE.fullmatch(line) for line in found)


_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(EXPERTS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=8), st.sampled_from(["when", "then", "min", *EXPERTS])), inner),
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    shipped,
    st.sampled_from(["version", "name", "weights", "strength", "bounds", "floors", "checkpoints", "mode", "stream"]),
    _values,
)
def test_any_value_at_any_key_is_accepted_or_reported(name, key, value):
    document = as_document(SHIPPED[name])
    document[key] = value

    assert all(LINE.fullmatch(line) for line in reported(yaml.safe_dump(document, allow_unicode=True)))


_BITS = (
    "\t", "\n", " ", ":", "-", "{", "}", "[", "]", '"', "'", "&a ", "*a", "!!map ", "<<: ", "? ", "|", ">", "#", "%",
    "@", "\x00", "\ufeff", "\x85", "null", "true", ".nan", ".inf", "-1", "1e999", "0x10", "2", "harmles", "then: hold",
)  # fmt: skip


def _mangled(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.randrange(1, 40))
    match rng.randrange(5):
        case 0:
            return text[:at] + text[end:]
        case 1:
            return text[:at] + rng.choice(_BITS) + text[at:]
        case 2:
            return text[:at] + text[at:end] * 2 + text[end:]
        case 3:
            lines = text.splitlines(keepends=True) or [""]
            rng.shuffle(lines)
            return "".join(lines)
        case _:
            lines = text.splitlines(keepends=True) or [""]
            i = rng.randrange(len(lines))
            lines[i] = rng.choice(["", "  ", "    "]) + lines[i].lstrip(" ")
            return "".join(lines)
