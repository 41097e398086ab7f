"""Overlays only tighten, shadow changes nothing, and a rule is called unreachable only when it is."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from hhh_router.calibration import Calibrators
from hhh_router.errors import PolicyError
from hhh_router.pipeline.plan import make_plan
from hhh_router.policy import Facts, decide, for_tenant, parse_policy
from hhh_router.policy.patterns import BadPattern, compile_glob, compile_pattern, covers
from hhh_router.policy.reach import unreachable
from hhh_router.policy.rules import Condition, Rule, all_hold
from hhh_router.policy.schema import SEVERITY
from hhh_router.types import DIMENSIONS, OUTCOMES, Action, Caller, Scores, Situation, ToolFacts, Weights

HEAD = "version: 1\nname: t\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\n"
CALIBRATORS = Calibrators.none()
GRID = [0.0, 0.25, 0.5, 0.75, 1.0]
POINTS = [0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0, None]

logit = st.floats(-12, 12)


@st.composite
def conditions(draw):
    quantity = draw(st.sampled_from(["needs.harmless", "needs.honest", "outcomes.unsafe", "role", "tenant"]))
    words = {"role": ["user", "tool", "assistant"], "tenant": ["a", "a*", "ab", "'b?'"]}.get(quantity)
    if words is not None:
        return f"{quantity}: [{', '.join(draw(st.lists(st.sampled_from(words), min_size=1, max_size=2)))}]"
    op = draw(st.sampled_from([">=", ">", "<=", "<"]))
    limit = draw(st.sampled_from([0.25, 0.5, 0.75]))
    return f'{quantity}: "{op} {limit}"'


@st.composite
def rule_texts(draw, *, shadow: bool = False):
    when = {c.split(":")[0]: c for c in draw(st.lists(conditions(), min_size=1, max_size=3))}
    then = draw(st.sampled_from(["allow", "flag", "refuse", "escalate", "block"]))
    more = ", mode: shadow" if shadow else ""
    return f"{{when: {{{', '.join(when.values())}}}, then: {then}{more}}}"


@st.composite
def facts(draw):
    point = st.sampled_from(POINTS)
    needs = {n: p for n in DIMENSIONS if (p := draw(point)) is not None}
    outcomes = {o: p for o in OUTCOMES if (p := draw(point)) is not None}
    return Facts(
        needs=needs, outcomes=outcomes, weights=Weights(0.25, 0.25, 0.25, 0.25), confidence=0.5, in_distribution=True,
        mode="prompt",
        situation=Situation(
            role=draw(st.sampled_from(["user", "tool", "assistant", None])),
            caller=Caller(tenant=draw(st.sampled_from(["a", "ab", "bc", "", None]))),
        ),
    )  # fmt: skip


def parsed(rules: list[str], more: str = ""):
    """The policy with these rules at input, or None where one of them can never decide."""
    lists = ", ".join([*rules, "{then: allow}"])
    try:
        return parse_policy(f"{HEAD}checkpoints:\n  input: [{lists}]\n  output: [{{then: allow}}]\n{more}")
    except PolicyError as error:
        if not all("never" in line for line in error.message.splitlines()):
            raise
        return None


@settings(max_examples=300)
@given(st.lists(rule_texts(), max_size=3), st.lists(rule_texts(), min_size=1, max_size=3), facts())
def test_an_overlay_never_lets_through_what_its_policy_stops(rules, overlay, found):
    policy = parsed(rules, f"overlays: [{{tenants: '*', checkpoints: {{input: [{', '.join(overlay)}]}}}}]\n")
    if policy is None:
        return

    alone, laid = decide(policy, "input", found), decide(for_tenant(policy, "x"), "input", found)

    assert SEVERITY[laid.action] >= SEVERITY[alone.action]


@given(
    st.fixed_dictionaries(dict.fromkeys(DIMENSIONS, logit)),
    st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0.4, 1), st.floats(0, 0.3), st.floats(0.3, 1),
)  # fmt: skip
def test_an_overlay_never_takes_weight_from_harmless_and_honest(needs, low, honest, base, floor, helpful):
    policy = parsed(
        [],
        "bounds: {harmless: {min: 0.1}, honest: {min: 0.05}}\n"
        'floors: [{when: {needs.harmless: ">= 0.5"}, raise: {harmless: 0.4}}]\n'
        f"overlays: [{{tenants: a, bounds: {{harmless: {{min: {0.1 + low:.6f}}}, honest: {{min: {0.05 + honest:.6f}}},"
        f" base: {{max: {base:.6f}}}, helpful: {{max: {helpful:.6f}}}}},"
        f" floors: [{{when: {{needs.honest: '>= 0.4'}}, raise: {{honest: {0.35 + floor / 2:.6f}}}}}]}}]\n",
    )
    scores = Scores(mode="prompt", needs=needs, outcomes=dict.fromkeys(OUTCOMES, 0.0), distance=0.5, tokens=4)

    alone = make_plan(scores, policy=policy, calibrators=CALIBRATORS).weights
    laid = make_plan(scores, policy=for_tenant(policy, "a"), calibrators=CALIBRATORS).weights

    assert laid.harmless + laid.honest >= alone.harmless + alone.honest - 1e-9


@given(st.lists(rule_texts(), max_size=3), st.lists(rule_texts(shadow=True), max_size=3), facts(), st.randoms())
def test_rules_in_shadow_never_change_a_decision(rules, shadows, found, rng):
    mixed = rules.copy()
    for shadow in shadows:
        mixed.insert(rng.randrange(len(mixed) + 1), shadow)
    plain, watched = parsed(rules), parsed(mixed)
    if plain is None or watched is None:
        return

    alone, beside = decide(plain, "input", found), decide(watched, "input", found)

    assert (alone.action, alone.message) == (beside.action, beside.message)


@settings(max_examples=300)
@given(st.lists(rule_texts(), min_size=2, max_size=5), st.data())
def test_no_evidence_reaches_a_rule_that_is_called_unreachable(texts, data):
    rules = [rule_of(text, i) for i, text in enumerate(texts)]
    dead = [i for i, _ in unreachable(rules)]
    for _ in range(20):
        found = data.draw(facts())
        first = next((i for i, rule in enumerate(rules) if all_hold(rule.when, found) is not False), None)

        if first is not None and all_hold(rules[first].when, found) is True:
            assert first not in dead


def rule_of(text: str, i: int) -> Rule:
    policy = parse_policy(f"{HEAD}checkpoints:\n  input: [{text}, {{then: allow}}]\n  output: [{{then: allow}}]\n")
    return replace(policy.checkpoints["input"][0], place=f"rule {i}")


@given(st.sampled_from(["needs.harmless", "conversation.turns"]), st.data())
def test_what_one_comparison_implies_holds_wherever_it_does(quantity, data):
    op, limit = st.sampled_from([">=", ">", "<=", "<"]), st.sampled_from(GRID)
    one, other = (Condition(quantity=quantity, op=data.draw(op), value=data.draw(limit)) for _ in range(2))

    held = [(one._test(x), other._test(x)) for x in [i / 40 for i in range(41)]]
    if one.implies(other):
        assert all(b for a, b in held if a)


@settings(max_examples=300)
@given(st.text("ab*?", min_size=1, max_size=5), st.text("ab*?", min_size=1, max_size=5), st.text("ab", max_size=6))
def test_a_glob_that_covers_another_fits_whatever_it_fits(wide, narrow, name):
    if covers(wide, narrow) and compile_glob(narrow).fullmatch(name):
        assert compile_glob(wide).fullmatch(name)


@settings(max_examples=300)
@given(st.text("ab*?", min_size=1, max_size=6), st.text("ab", max_size=8))
def test_a_glob_fits_what_a_plain_search_finds(glob, name):
    def fits(pattern: str, text: str) -> bool:
        if not pattern:
            return not text
        if pattern[0] == "*":
            return any(fits(pattern[1:], text[i:]) for i in range(len(text) + 1))
        return bool(text) and pattern[0] in ("?", text[0]) and fits(pattern[1:], text[1:])

    assert bool(compile_glob(glob).fullmatch(name)) is fits(glob, name)


@settings(max_examples=200)
@given(st.text("ab()|{}[]0,9^$.?*+\\dsw", max_size=20), st.text("ab01 ", max_size=30))
def test_any_text_is_a_pattern_or_is_refused_with_a_reason(pattern, text):
    try:
        compiled = compile_pattern(pattern)
    except BadPattern:
        return
    compiled.search(text)


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    _json,
    st.sampled_from([f"tool.arguments{path}" for path in (".a", "..b", "[0].c", "[*]", ".*.a")]),
    st.sampled_from(['"> 1"', '"<= -3.5"', "true", "present", "absent", "[a*, b]", '"not in [a*]"', "'12'"]),
)  # fmt: skip
def test_whatever_the_arguments_are_there_is_a_verdict(arguments, path, value):
    policy = parse_policy(
        f"{HEAD}checkpoints:\n  input: [{{then: allow}}]\n  output: [{{then: allow}}]\n"
        f'  tool_call: [{{when: {{"{path}": {value}}}, then: hold}}, {{then: allow}}]\n'
    )
    found = Facts(
        needs={}, outcomes={}, weights=Weights(1.0, 0.0, 0.0, 0.0), confidence=None, in_distribution=None, mode=None,
        situation=Situation(tool=ToolFacts(name="t", arguments=arguments)),
    )  # fmt: skip

    decision = decide(policy, "tool_call", found)

    assert decision.action in (Action.HOLD, Action.ALLOW, Action.BLOCK)
    assert (decision.action is Action.BLOCK) == (decision.rule == "on_error")


def test_the_seeded_order_of_rules_does_not_matter_to_who_is_unreachable():
    rng = random.Random(7)
    rules = [rule_of(f"{{when: {{needs.harmless: '>= {x}'}}, then: flag}}", i) for i, x in enumerate((0.25, 0.5, 0.75))]
    for _ in range(6):
        rng.shuffle(rules)
        lowest = 1.0
        expected = []
        for i, rule in enumerate(rules):
            limit = float(rule.when[0].value)
            if limit >= lowest:
                expected.append(i)
            lowest = min(lowest, limit)

        assert [i for i, _ in unreachable(rules)] == expected
