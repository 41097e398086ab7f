"""Conditions on what surrounds a reading, the parameters of actions, shadow rules, rollouts and overlays."""

import pickle
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import yaml

from hhh_router.errors import PolicyError
from hhh_router.policy import (
    Condition,
    Facts,
    Policy,
    as_document,
    asks,
    attempts,
    bounds,
    decide,
    for_tenant,
    in_rollout,
    parse_policy,
    policy_schema,
    steers,
    thresholds,
)
from hhh_router.policy.arguments import MAX_FOUND, parse_path, select
from hhh_router.policy.hours import parse_hours
from hhh_router.policy.patterns import MAX_TEXT, BadPattern, compile_glob, compile_pattern
from hhh_router.policy.schema import ACTIONS
from hhh_router.types import Action, Caller, Conversation, Evidence, Posterior, Scores, Situation, ToolFacts, Weights

HEAD = "version: 1\nname: t\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\n"
NOON = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)  # a Friday
SITUATION = Situation(
    text="Please wire the money to my  Bank account today.",
    role="user",
    detect=lambda text: "en",
    tokens=1200,
    at=NOON,
    caller=Caller(
        model="gpt-5",
        route="/v1/chat/completions",
        tenant="school-north",
        key_scopes=("chat", "guard"),
        headers={"x-team": "red"},
        sticky="user-7",
    ),
    tool=ToolFacts(
        name="transfer_money",
        arguments={"amount": 5000, "to": [{"bank": "a", "vip": True}, {"bank": "b"}], "note": None, "text": "7000"},
    ),
    conversation=Conversation(turns=3, tool_calls=2, tokens=900, refusals=1, minutes=12.5),
)
FACTS = Facts(
    needs={"helpful": 0.9, "harmless": 0.4, "honest": 0.1},
    outcomes={"unsafe": 0.2, "untruthful": 0.3, "unhelpful": 0.1},
    weights=Weights(0.1, 0.5, 0.3, 0.1),
    confidence=0.8,
    in_distribution=True,
    mode="prompt",
    situation=SITUATION,
)


def policy(*, at: str = "input", rules: str = "[{then: allow}]", more: str = "") -> Policy:
    lists = {"input": "[{then: allow}]", "output": "[{then: allow}]"} | {at: rules}
    return parse_policy(
        f"{HEAD}checkpoints:\n" + "".join(f"  {c}: {text}\n" for c, text in lists.items()) + more, source="p.yaml"
    )


def holds(condition: str, facts: Facts = FACTS) -> bool | None:
    """Whether a condition holds at tool_call, where every fact can be asked."""
    found = decide(
        policy(at="tool_call", rules=f"[{{when: {{{condition}}}, then: hold}}, {{then: allow}}]"), "tool_call", facts
    )
    if found.rule == "on_error":
        assert found.action is Action.BLOCK
        return None
    return found.action is Action.HOLD


def mistake(**parts: str) -> str:
    with pytest.raises(PolicyError) as caught:
        policy(**parts)
    [line] = caught.value.message.splitlines()
    return line


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("role: user", True),
        ("role: [tool, user]", True),
        ("role: tool", False),
        ("language: [de, en]", True),
        ("language: de", False),
        ('length.characters: ">= 48"', True),
        ('length.characters: "> 48"', False),
        ('length.tokens: ">= 1000"', True),
        ("text: 'bank\\s{1,5}account'", True),
        ("text: ['crypto', 'WIRE.{0,20}money']", True),
        ("text: '^wire'", False),
        ('model: "gpt-*"', True),
        ('model: "GPT-*"', False),
        ("route: /v1/*", True),
        ("tenant: [bank, school-*]", True),
        ('tenant: "not in [school-*]"', False),
        ("key.scope: guard", True),
        ("key.scope: admin", False),
        ('key.scope: "not in [admin]"', True),
        ('key.scope: "not in [guard]"', False),
        ("headers.x-team: 'r?d'", True),
        ("headers.x-other: 'r?d'", False),
        ('headers.x-other: "not in [red]"', True),
        ("time: fri 09:00-17:00", True),
        ("time: fri 09:00-17:00 America/New_York", False),
        ('time: "not in [mon-thu 00:00-24:00; sat,sun 00:00-24:00]"', True),
        ('conversation.turns: "> 2"', True),
        ('conversation.tool_calls: ">= 3"', False),
        ('conversation.tokens: "< 1000"', True),
        ('conversation.refusals: ">= 1"', True),
        ('conversation.minutes: "> 12"', True),
        ('tool.name: "in [delete_*, transfer_*]"', True),
        ("tool.name: [read_*]", False),
        ('tool.name: "not in [read_*, list_*]"', True),
        ('tool.arguments.amount: "> 1000"', True),
        ('tool.arguments.amount: "> 5000"', False),
        ('"tool.arguments.to[*].bank": [b, c]', True),
        ('"tool.arguments.to[1].bank": a', False),
        ('tool.arguments..bank: "not in [a, b]"', False),
        ('tool.arguments..bank: "not in [a]"', True),
        ('"tool.arguments.to[0].vip": true', True),
        ("tool.arguments.iban: absent", True),
        ("tool.arguments.iban: present", False),
        ("tool.arguments.iban: DE*", False),
        ("tool.arguments.note: present", True),
        ("tool.arguments.note: 'null'", True),
        ('tool.arguments.text: "> 1000"', None),  # a text is no number, and must not pass for a small one
        ('tool.arguments.amount: "5000"', True),
        ("tool.arguments.to: x", None),
        ('needs.harmless: ">= 0.4", tool.name: transfer_*', True),
    ],
)
def test_each_condition_asks_its_fact(condition, expected):
    assert holds(condition) is expected


@pytest.mark.parametrize(
    ("condition", "situation"),
    [
        ("role: user", replace(SITUATION, role=None)),
        ("text: money", replace(SITUATION, text=None)),
        ("text: money", replace(SITUATION, text="x" * (MAX_TEXT + 1))),
        ('length.characters: ">= 0"', replace(SITUATION, text=None)),
        ("tenant: a", replace(SITUATION, caller=Caller())),
        ('headers.x-team: "not in [red]"', replace(SITUATION, caller=Caller())),
        ("time: 00:00-24:00", replace(SITUATION, at=None)),
        ("time: 00:00-24:00", replace(SITUATION, at=datetime(2026, 11, 27, 12))),  # without a zone
        ('conversation.turns: ">= 0"', replace(SITUATION, conversation=Conversation())),
        ("tool.name: a", replace(SITUATION, tool=None)),
        ("tool.arguments.amount: absent", replace(SITUATION, tool=ToolFacts(name="t"))),  # the arguments are no JSON
    ],
)
def test_a_fact_nobody_knows_is_not_measured(condition, situation):
    assert holds(condition, replace(FACTS, situation=situation)) is None


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("[{when: {text: 'a+'}, then: refuse}, {then: allow}]", "has a repeat without an end"),
        ("[{when: {text: '(a{1,20}){1,20}b'}, then: refuse}, {then: allow}]", "ways from one position, at most 500"),
        ("[{when: {text: '(?=a)'}, then: refuse}, {then: allow}]", "refers back, looks around or sets flags"),
        ("[{when: {text: '(a)\\1'}, then: refuse}, {then: allow}]", "refers back, looks around or sets flags"),
        ("[{when: {text: '(a'}, then: refuse}, {then: allow}]", "is no regular expression"),
        ("[{when: {text: []}, then: refuse}, {then: allow}]", "0 patterns"),
        ("[{when: {tenant: []}, then: refuse}, {then: allow}]", "a list names nothing"),
        ("[{when: {tenant: 'a[b]'}, then: refuse}, {then: allow}]", "is no name"),
        ("[{when: {time: 9-17}, then: refuse}, {then: allow}]", "is no time of the week"),
        ("[{when: {time: '09:00-17:00 Mars/Base'}, then: refuse}, {then: allow}]", "time zone 'Mars/Base'"),
        ("[{when: {headers.authorization: a}, then: refuse}, {then: allow}]", "that holds no secret"),
        ("[{when: {headers.X-Team: a}, then: refuse}, {then: allow}]", "name a header in lower case"),
        (
            "[{when: {tool.name: a}, then: refuse}, {then: allow}]",
            "'tool.name' is known at tool_call or tool_result only",
        ),
        ("[{when: {role: users}, then: refuse}, {then: allow}]", "did you mean user?"),
        ("[{when: {tool: a}, then: refuse}, {then: allow}]", "'tool' is a group"),
        ("[{then: refuse, message: 'no {rul}'}, ]", "'{rul}' is no placeholder, did you mean rule?"),
        ("[{then: refuse, message: 'no {rule!r}'}]", "is no placeholder"),
        ("[{then: refuse, message: 'no {'}]", "has a brace that opens or closes nothing"),
        ("[{then: refuse, upstream: big}]", "refuse hands nothing on"),
        ("[{then: refuse, steering: be nice}]", "reaches no model"),
        ("[{then: refuse, redact: [emails]}]", "lets nothing through"),
        ("[{then: allow, redact: [email]}]", "did you mean emails?"),
        ("[{then: allow, webhook: 'ftp://a'}]", "is no http(s) URL"),
        ("[{then: allow, webhook: 'https://u:p@a.org'}]", "is no http(s) URL"),
        ("[{then: allow, mode: shadow}]", "the default rule has to hold for everybody"),
        ("[{then: allow, rollout: 10}]", "the default rule has to hold for everybody"),
        ("[{when: {role: user}, then: refuse, rollout: 0.001}, {then: allow}]", "reaches nobody"),
    ],
)
def test_a_mistake_in_the_language_has_its_line_and_reason(rules, expected):
    line = mistake(rules=rules)

    assert line.startswith("p.yaml:6  checkpoints.input[0]")
    assert expected in line


@pytest.mark.parametrize(
    ("checkpoint", "action"),
    [("tool_call", "refuse"), ("tool_result", "hold"), ("session", "regenerate"), ("tool_call", "steer")],
)
def test_an_action_belongs_to_its_checkpoints(checkpoint, action):
    line = mistake(at=checkpoint, rules=f"[{{then: {action}}}]")

    assert f"'{action}'" in line
    assert f"use {', '.join(map(str, ACTIONS[checkpoint][:-1]))} or {ACTIONS[checkpoint][-1]}" in line


def test_a_policy_without_a_tool_checkpoint_does_not_ask_there():
    assert not asks(policy(), "tool_call")
    assert asks(policy(at="tool_call", rules="[{then: block}]"), "tool_call")
    with pytest.raises(ValueError, match="no checkpoint 'tool_call'"):
        decide(policy(), "tool_call", FACTS)


def test_a_decision_carries_what_its_rule_asks_to_be_done():
    found = decide(
        policy(
            rules="[{when: {role: user}, then: escalate, upstream: big, webhook: 'https://a.org/x',"
            " message: '{policy}@{version} {checkpoint} {rule} {action} {tool} {{}}'}, {then: allow}]"
        ),
        "input",
        FACTS,
    )

    assert (found.upstream, found.webhook) == ("big", "https://a.org/x")
    assert found.message == "t@1 input checkpoints.input[0] escalate transfer_money {}"

    passed = decide(policy(rules="[{then: flag, redact: [ips, emails], steering: 'Be brief.'}]"), "input", FACTS)
    assert (passed.redact, passed.steering) == (("emails", "ips"), "Be brief.")


def test_what_a_client_wrote_is_in_no_reason():
    secret = replace(
        SITUATION,
        text="my word is hunter2",
        tool=ToolFacts(name="t", arguments={"key": "hunter2"}),
        caller=Caller(headers={"x-a": "hunter2"}),
    )
    rules = "[{when: {text: hunter, tool.arguments.key: hun*, headers.x-a: hun*}, then: block}, {then: allow}]"
    facts = replace(FACTS, situation=secret)
    asked = policy(at="tool_call", rules=rules)

    assert decide(asked, "tool_call", facts).action is Action.BLOCK
    assert "hunter2" not in decide(asked, "tool_call", facts).reason
    assert "hunter2" not in " ".join(attempts(asked, "tool_call", facts)[0].found)


def test_a_shadow_rule_records_and_changes_nothing():
    plain = policy(rules='[{when: {needs.harmless: ">= 0.3"}, then: flag}, {then: allow}]')
    tried = policy(
        rules='[{when: {role: user}, then: block, mode: shadow, message: "no"},'
        ' {when: {needs.injection: ">= 0.5"}, then: refuse, mode: shadow},'
        ' {when: {needs.harmless: ">= 0.3"}, then: flag}, {then: allow}]'
    )

    found = decide(tried, "input", FACTS)

    assert found.action is decide(plain, "input", FACTS).action is Action.FLAG
    assert [(d.action, d.rule) for d in found.shadow] == [
        (Action.BLOCK, "checkpoints.input[0]"),
        (Action.REFUSE, "on_error"),  # what it asks for was not measured
    ]
    assert thresholds(tried, "input") == thresholds(plain, "input")


def test_a_steer_in_shadow_steers_nothing():
    rules = '[{when: {outcomes.unsafe: ">= 0.3"}, then: steer, mode: shadow}, {then: allow}]'

    assert not steers(policy(at="output", rules=rules))
    assert steers(policy(at="output", rules=rules.replace("shadow", "enforce")))


def test_a_rollout_is_for_its_share_and_sticky():
    rolled = policy(rules="[{when: {role: user}, then: refuse, rollout: 25}, {then: allow}]")

    def decided(user: int) -> Action:
        who = replace(SITUATION, caller=Caller(sticky=f"user-{user}"))
        return decide(rolled, "input", replace(FACTS, situation=who)).action

    found = [decided(user) for user in range(4000)]
    assert 0.22 < found.count(Action.REFUSE) / 4000 < 0.28
    assert found == [decided(user) for user in range(4000)]


def test_a_higher_percentage_keeps_everybody_it_had():
    users = [Situation(caller=Caller(sticky=str(i))) for i in range(2000)]
    small = {i for i, who in enumerate(users) if in_rollout("p", 5, who)}
    large = {i for i, who in enumerate(users) if in_rollout("p", 50, who)}

    assert small < large
    assert all(in_rollout("p", 100, who) for who in users)
    assert {i for i, who in enumerate(users) if in_rollout("q", 5, who)} != small


def test_a_rollout_without_anybody_to_go_by_is_for_on_error():
    rolled = policy(rules="[{when: {role: user}, then: flag, rollout: 25}, {then: allow}]")
    found = decide(rolled, "input", replace(FACTS, situation=Situation(role="user")))

    assert (found.rule, found.action) == ("on_error", Action.REFUSE)
    assert "whose rollout it is" in found.reason


OVERLAYS = """\
overlays:
  - tenants: [school-*]
    bounds: {harmless: {min: 0.3}, base: {max: 0.2}}
    floors: [{when: {role: user}, raise: {harmless: 0.5}}]
    on_error: closed
    checkpoints:
      input: [{when: {needs.harmless: ">= 0.4"}, then: refuse, message: "Ask your teacher."}]
      tool_call: [{when: {tool.name: delete_*}, then: block}]
  - tenants: lab
    may_loosen: true
    checkpoints:
      input: [{when: {needs.harmless: "< 0.9"}, then: allow}]
    on_error: open
"""
LAID = policy(rules='[{when: {needs.harmless: ">= 0.3"}, then: flag, redact: [emails]}, {then: allow}]', more=OVERLAYS)


def test_the_first_overlay_that_names_a_tenant_holds():
    assert for_tenant(LAID, "school-north").overlay == "overlays[0]"
    assert for_tenant(LAID, "lab").overlay == "overlays[1]"
    assert for_tenant(LAID, "other") is LAID
    assert for_tenant(LAID, "") is LAID
    assert for_tenant(LAID, "lab").hash == LAID.hash
    with pytest.raises(ValueError, match="the tenant is not known"):
        for_tenant(LAID, None)
    assert for_tenant(policy(), None).overlay is None


def test_of_an_overlay_and_its_policy_the_stricter_decision_holds():
    school = for_tenant(LAID, "school-north")

    found = decide(school, "input", FACTS)
    assert (found.action, found.rule) == (Action.REFUSE, "overlays[0].checkpoints.input[0]")
    assert found.message == "Ask your teacher."
    mild = decide(school, "input", replace(FACTS, needs={"harmless": 0.35}))
    assert (mild.action, mild.rule, mild.redact) == (Action.FLAG, "checkpoints.input[0]", ("emails",))
    unread = decide(school, "input", replace(FACTS, needs={}))
    assert (unread.action, unread.rule) == (Action.REFUSE, "on_error")


def test_an_overlay_may_ask_where_its_policy_does_not():
    school = for_tenant(LAID, "school-north")
    delete = replace(FACTS, situation=replace(SITUATION, tool=ToolFacts(name="delete_all", arguments={})))

    assert asks(school, "tool_call")
    assert not asks(LAID, "tool_call")
    assert decide(school, "tool_call", delete).action is Action.BLOCK
    assert decide(school, "tool_call", FACTS).action is Action.ALLOW


def test_an_overlay_that_may_loosen_is_asked_first():
    assert decide(for_tenant(LAID, "lab"), "input", FACTS).action is Action.ALLOW
    assert for_tenant(LAID, "lab").on_error == "open"


def test_an_overlays_floors_and_bounds_are_in_force():
    evidence = Evidence(
        mode="prompt",
        needs={},
        posterior=Posterior(0.25, 0.25, 0.25, 0.25),
        outcomes={},
        in_distribution=True,
        calibrated=True,
        scores=Scores(mode="prompt", needs={}, outcomes={}, distance=0.0, tokens=1),
    )

    within = bounds(for_tenant(LAID, "school-x"), evidence, situation=SITUATION)
    assert (within.lower["harmless"], within.upper["base"]) == (0.5, 0.2)
    assert within.raised == ("overlays[0].floors[0]",)
    assert bounds(LAID, evidence, situation=SITUATION).lower["harmless"] == 0.0


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("bounds: {harmless: {min: 0.05}}", "0.05 is below 0.1"),
        ("bounds: {base: {max: 0.9}}", "0.9 is above 0.8"),
        ("bounds: {helpful: {min: 0.3}}", "a min for helpful may weaken harmless or honest"),
        ("bounds: {honest: {max: 0.3}}", "a max for honest may weaken harmless or honest"),
        ("floors: [{when: {role: user}, raise: {helpful: 0.5}}]", "helpful may weaken harmless or honest"),
        ("on_error: open", "open is less strict"),
        ("mode: shadow", "shadow is less strict"),
    ],
)
def test_an_overlay_that_loosens_is_a_mistake_unless_it_may(overlay, expected):
    base = "bounds: {harmless: {min: 0.1}, base: {max: 0.8}}\n"
    text = f"overlays:\n  - tenants: a\n    {overlay}\n"

    line = mistake(more=base + text)
    assert expected in line
    assert "an overlay may only tighten, unless it has may_loosen: true" in line
    assert policy(more=base + text + "    may_loosen: true\n").overlays[0].may_loosen


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("{bounds: {harmless: {min: 0.2}}}", "tenants: is missing"),
        ("{tenants: []}", "names nothing"),
        ("{tenants: 'not in [a]'}", "name those whom it is for"),
        ("{tenants: a, bounds: {harmless: {min: 0.6}, honest: {min: 0.6}}}", "the minima sum to 1.2"),
        ("{tenants: a, strength: 1}", "'strength' is not a known key"),
    ],
)
def test_a_mistake_in_an_overlay_is_reported(overlay, expected):
    assert expected in mistake(more=f"overlays: [{overlay}]\n")


def test_the_canonical_form_says_all_of_it_again():
    text = as_document(LAID)
    rich = policy(
        at="tool_call",
        rules='[{when: {tool.name: "not in [a, b]", time: "not in [mon 09:00-10:00; tue,wed 09:00-10:00]",'
        " text: [x, y], tool.arguments.a: absent, tool.arguments.b: true, role: [user, tool]},"
        " then: hold, webhook: 'http://a/b', rollout: 12.5, mode: shadow}, {then: allow, redact: [cards]}]",
    )
    assert parse_policy(yaml.safe_dump(text)).hash == LAID.hash
    again = parse_policy(yaml.safe_dump(as_document(rich)))
    assert (again.hash, as_document(again)) == (rich.hash, as_document(rich))
    assert set(again.checkpoints["tool_call"][0].when) == set(rich.checkpoints["tool_call"][0].when)


def test_conditions_survive_being_sent_to_another_process():
    for rule in LAID.overlays[0].checkpoints["tool_call"]:
        [condition] = rule.when
        assert pickle.loads(pickle.dumps(condition)) == condition


# -- rules that can never decide -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        '{needs.harmless: ">= 0.5"} {needs.harmless: ">= 0.7"}',
        '{needs.harmless: ">= 0.5"} {needs.harmless: "> 0.5"}',
        '{needs.harmless: ">= 0.5"} {needs.harmless: ">= 0.6", role: user}',
        '{needs.harmless: ">= 0.5"} {needs.harmless: "< 0.6"} {needs.honest: ">= 0.5", needs.harmless: ">= 0.1"}',
        '{needs.harmless: "< 0.5"} {needs.harmless: ">= 0.5"} {conversation.turns: ">= 3", needs.harmless: ">= 0"}',
        "{tenant: [a*, b]} {tenant: [abc, b]}",
        "{role: [user, tool]} {role: tool}",
        'tenant: "not in [a]"} {tenant: "not in [a, b]"}'.replace("tenant", "{tenant", 1),
        "{text: [a, b]} {text: b}",
        "{role: user} {role: user}",
    ],
)
def test_a_rule_that_earlier_ones_leave_nothing_to_is_a_mistake(rules):
    whens = [w if w.startswith("{") else "{" + w for w in rules.replace("} {", "}|{").split("|")]
    text = "[" + ", ".join(f"{{when: {w}, then: flag}}" for w in whens) + ", {then: allow}]"

    line = mistake(rules=text)

    assert line.startswith(f"p.yaml:6  checkpoints.input[{len(whens) - 1}]: is never reached")


@pytest.mark.parametrize(
    "rules",
    [
        "{when: {needs.harmless: '>= 0.7'}, then: refuse}, {when: {needs.harmless: '>= 0.5'}, then: flag}",
        "{when: {needs.harmless: '>= 0.5'}, then: flag, mode: shadow}, {when: {needs.harmless: '>= 0.7'}, then: flag}",
        "{when: {needs.harmless: '>= 0.5'}, then: refuse, rollout: 5}, {when: {needs.harmless: '>= 0.7'}, then: flag}",
        "{when: {needs.harmless: '>= 0.5', role: tool}, then: refuse}, {when: {needs.harmless: '>= 0.7'}, then: flag}",
        "{when: {tenant: a}, then: refuse}, {when: {tenant: a*}, then: flag}",
        "{when: {needs.harmless: '> 0.5'}, then: refuse}, {when: {needs.harmless: '>= 0.5'}, then: flag}",
        "{when: {in_distribution: true}, then: flag}, {when: {in_distribution: false}, then: refuse}",
    ],
)
def test_a_rule_that_something_is_left_to_is_none(rules):
    assert len(policy(rules=f"[{rules}, {{then: allow}}]").checkpoints["input"]) == 3


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ('weights.harmless: "< 0.2"', "bounds.harmless is 0.3 to 1"),
        ('weights.base: "> 0.4"', "bounds.base is 0 to 0.4"),
        ('weights.helpful: ">= 0.8"', "the weights it asks for sum to more than 1"),
        ('needs.harmless: ">= 0.5", mode: response', "never measured where a response alone was read"),
    ],
)
def test_a_rule_that_contradicts_the_bounds_is_a_mistake(condition, expected):
    line = mistake(
        rules=f"[{{when: {{{condition}}}, then: flag}}, {{then: allow}}]",
        more="bounds: {harmless: {min: 0.3}, base: {max: 0.4}}\n",
    )

    assert expected in line


# -- the parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["(a|a){0,7}b", ".{0,400}x", "(a{0,20}){0,2}!", r"(\w{1,10}\s){1,2}z"])
def test_the_slowest_pattern_that_is_accepted_takes_well_under_a_second_a_text(pattern):
    compiled = compile_pattern(pattern)
    text = "a" * MAX_TEXT

    begun = time.process_time()
    compiled.search(text)

    assert time.process_time() - begun < 5  # about 0.3 s on one idle core; what is refused would take hours


@pytest.mark.parametrize("glob", ["*a*b*c*d*e*f*g*h", "?*?*?*"])
def test_a_glob_goes_one_way(glob):
    begun = time.process_time()

    compile_glob(glob).fullmatch("a" * 5000)

    assert time.process_time() - begun < 2


@pytest.mark.parametrize("text", ["", "a,b", " a", "[a]", "x" * 201, ">= 1", "a\nb"])
def test_what_is_no_name_is_refused(text):
    with pytest.raises(BadPattern):
        compile_glob(text)


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("09:00-17:00", "2026-11-27T09:00", True),
        ("09:00-17:00", "2026-11-27T17:00", False),
        ("sun-tue 00:00-24:00", "2026-11-30T12:00", True),  # a Monday
        ("sun-tue 00:00-24:00", "2026-11-27T12:00", False),
        ("fri 22:00-06:00", "2026-11-28T03:00", True),
        ("sat 22:00-06:00", "2026-11-28T03:00", False),
        ("fri 23:00-24:00 Asia/Tokyo", "2026-11-27T14:30", True),
    ],
)
def test_times_of_the_week(text, at, expected):
    assert parse_hours(text).holds(datetime.fromisoformat(f"{at}+00:00")) is expected


def test_a_path_that_finds_too_much_concludes_nothing():
    path = parse_path("tool.arguments[*][*]")
    assert path is not None

    assert select([[0] * 200] * 50, path) == (0,) * 10_000
    assert select([[0] * 201] * 50, path) is None
    assert MAX_FOUND == 10_000


def test_arguments_nested_very_deep_are_searched_without_recursion():
    value: object = {"path": "/etc/passwd"}
    for _ in range(5000):
        value = [value]

    assert select(value, parse_path("tool.arguments..path") or ()) == ("/etc/passwd",)


def test_a_condition_of_no_known_name_cannot_be_made():
    with pytest.raises(ValueError, match="is no condition"):
        Condition(quantity="needs.luck", op=">=", value=0.5)


def test_the_json_schema_knows_what_each_checkpoint_may_ask():
    rules = policy_schema()["properties"]["checkpoints"]["properties"]

    assert "tool.name" in rules["tool_call"]["items"]["properties"]["when"]["properties"]
    assert "tool.name" not in rules["input"]["items"]["properties"]["when"]["properties"]
    assert "steering" in rules["input"]["items"]["properties"]
    assert "steering" not in rules["output"]["items"]["properties"]
