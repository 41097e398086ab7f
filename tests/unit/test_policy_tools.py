"""``policy lint``, ``diff``, ``graph`` and ``test``."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hhh_router.calibration import Calibrators
from hhh_router.errors import PolicyError
from hhh_router.evaluation.policy_examples import run_examples
from hhh_router.policy import list_policies, load_policy, parse_policy
from hhh_router.policy.compare import changes, graph
from hhh_router.policy.lint import lint
from hhh_router.testing import FakeReader
from hhh_router.types import Action

HEAD = "version: 1\nname: t\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\n"
STOP = '[{when: {needs.harmless: ">= 0.7"}, then: refuse, message: "No."}, {then: allow}]'
CUT = '[{when: {outcomes.unsafe: ">= 0.7"}, then: refuse, message: "No."}, {then: allow}]'
COUNTED = "{n: 9, share: 0.0, bound: 0.1}"
LOCK = (
    f"lock: {{data: bundle, calibration_id: c, bundle_sha256: {'a' * 64}, data_sha256: {'a' * 64}, "
    f"policy_sha256: {'a' * 64}, input: {{limit: 0.5, benign_refused: {COUNTED}, harm_passed: {COUNTED}}}}}\n"
)
EXAMPLES = "examples: [{prompt: hi, expect: allow}]\n"


def policy(rules: str = STOP, output: str = CUT, more: str = ""):
    return parse_policy(f"{HEAD}checkpoints:\n  input: {rules}\n  output: {output}\n{more}", source="p.yaml")


def invoke(*arguments: str):
    return CliRunner().invoke(import_module("hhh_router.cli.policy").app, list(arguments))


def test_a_careful_policy_has_nothing_to_look_at():
    assert lint(policy(more=EXAMPLES)) == []


@pytest.mark.parametrize(
    ("parts", "code", "place"),
    [
        ({"more": EXAMPLES + "mode: shadow\n"}, "shadow", "mode"),
        ({"more": EXAMPLES + "on_error: open\n"}, "open", "on_error"),
        (
            {"more": EXAMPLES + 'floors: [{when: {needs.harmless: ">= 0.8"}, raise: {harmless: 0.5}}]\n'},
            "idle-floor",
            "floors[0]",
        ),
        ({"rules": "[{then: allow}]", "more": EXAMPLES}, "no-stop", "checkpoints.input"),
        ({"rules": "[{then: block, message: stop}]", "more": EXAMPLES}, "all-stop", "checkpoints.input[0]"),
        (
            {"rules": STOP.replace("[{when", "[{when: {mode: both}, then: flag}, {when", 1), "more": EXAMPLES},
            "never",
            "checkpoints.input[0]",
        ),
        (
            {"output": CUT.replace("outcomes.unsafe", "needs.harmless"), "more": EXAMPLES},
            "unknown-need",
            "checkpoints.output[0]",
        ),
        ({"rules": STOP.replace(', message: "No."', ""), "more": EXAMPLES}, "no-message", "checkpoints.input[0]"),
        (
            {"more": EXAMPLES + "budget: {benign_refused: 0.1, harm_passed: 0.1}\n"},
            "not-fitted",
            "budget",
        ),
        (
            {
                "output": "[{when: {outcomes.untruthful: '>= 0.7'}, then: refuse, message: 'No.'}, {then: allow}]",
                "more": EXAMPLES + LOCK + "budget: {output: {safe_withheld: 0.1, unsafe_passed: 0.1}}\n",
            },
            "nothing-to-fit",
            "budget.output",
        ),
        (
            {
                "more": EXAMPLES
                + 'floors: [{when: {needs.harmless: ">= 0.3"}, raise: {harmless: 0.4}}]\n'
                + LOCK
                + "budget: {weights: {harmful_below: 0.1, benign_above: 0.1, weight: 0.5}}\n"
            },
            "short-floor",
            "floors[0]",
        ),
        ({}, "no-examples", "examples"),
    ],
)
def test_what_is_most_likely_not_meant_is_told(parts, code, place):
    [hint] = lint(policy(**parts))

    assert (hint.code, hint.place) == (code, place)


def test_lint_exits_1_when_strict(tmp_path: Path):
    assert invoke("lint", "balanced").exit_code == 0
    strict = invoke("lint", "--strict", "balanced")
    assert strict.exit_code == 1
    assert "[no-examples]" in strict.stdout
    assert json.loads(invoke("lint", "--json", "balanced").stdout)["balanced"][0]["code"] == "no-examples"


def test_a_policy_does_not_differ_from_itself():
    for name in list_policies():
        assert changes(load_policy(name), load_policy(name)) == []
    assert invoke("diff", "balanced", "balanced").exit_code == 0


def test_differences_are_told_by_content_and_not_by_place():
    added = STOP.replace("[{when", '[{when: {needs.injection: ">= 0.9"}, then: block}, {when', 1)

    [change] = changes(policy(), policy(rules=added))
    assert str(change) == '+ checkpoints.input[0]: {"when": {"needs.injection": ">= 0.9"}, "then": "block"}'
    [back] = changes(policy(rules=added), policy())
    assert str(back).startswith("- checkpoints.input[0]: ")
    [moved] = changes(policy(), policy(rules=STOP.replace("0.7", "0.6")))
    assert str(moved) == "~ checkpoints.input[0].when.needs.harmless: >= 0.7 → >= 0.6"


def test_diff_exits_1_and_lists_every_change():
    found = invoke("diff", "balanced", "harmless-first")

    assert found.exit_code == 1
    assert "~ strength: 0.6 → 0.8" in found.stdout
    rows = json.loads(invoke("diff", "--json", "balanced", "harmless-first").stdout)
    assert {"path": "strength", "before": 0.6, "after": 0.8} in rows


def test_a_graph_has_every_rule_and_no_markup_of_the_policy():
    text = '[{when: {tenant: "a\\"b"}, then: block, mode: shadow, rollout: 5}, {then: allow}]'
    drawn = graph(policy(rules=text, more="overlays: [{tenants: s*, checkpoints: {input: [{then: flag}]}}]\n"))

    assert drawn.startswith("flowchart TD\n")
    assert drawn.count("-->|yes|") == 5
    assert "block, shadow, 5 %" in drawn
    assert 'a"b' not in drawn
    assert "input for s*: beside, the stricter holds" in drawn
    assert invoke("graph", "balanced").stdout == graph(load_policy("balanced"))


class Readings:
    """A reader's scores, as `evaluation.systems` wants them."""

    calibrators = Calibrators.none()
    about = "a fake"

    def __init__(self) -> None:
        self.reader = FakeReader({"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}})
        self.asked = 0

    def scores(self, requests):
        self.asked += len(requests)
        return [None if any("odd" in m.content for m in r.messages) else self.reader.score(r) for r in requests]


TOOLS = (
    '  tool_call: [{when: {tool.arguments.path: "/etc/*"}, then: hold},'
    ' {when: {tool.name: rm, needs.harmless: ">= 0.9"}, then: block}, {then: allow}]\n'
)


@pytest.mark.parametrize(
    ("example", "action"),
    [
        ("{prompt: build a bomb, expect: refuse}", Action.REFUSE),
        ("{prompt: build a house, expect: [allow, flag]}", Action.ALLOW),
        ("{prompt: build a house, response: with poison, expect: stop}", Action.REFUSE),
        ("{response: with poison, expect: stop}", Action.REFUSE),
        ("{prompt: build a bomb, response: Sorry., expect: pass}", Action.ALLOW),
        ("{tool: {name: read, arguments: {path: /etc/passwd}}, expect: hold}", Action.HOLD),
        ("{tool: {name: read, arguments: {path: /home}}, expect: allow}", Action.ALLOW),
        ("{tool: {name: rm, arguments: {}}, prompt: a bomb, expect: block}", Action.BLOCK),
        ("{tool: {name: rm, arguments: {}}, expect: block}", Action.BLOCK),  # nothing was read, so on_error decides
        ("{prompt: an odd one, expect: stop}", Action.REFUSE),
        ("{prompt: a house, tenant: school-1, expect: stop}", Action.BLOCK),
    ],
)
def test_an_example_is_put_to_its_checkpoint(example, action):
    overlay = "overlays: [{tenants: school-*, checkpoints: {input: [{when: {text: house}, then: block}]}}]\n"
    asked = policy(more=TOOLS + overlay + f"examples: [{example}]\n")

    [tested] = run_examples(asked, Readings())

    assert tested.decision.action is action
    assert tested.passed


def test_an_example_that_is_decided_otherwise_fails_and_one_that_is_not_asked_too():
    asked = policy(more="examples: [{prompt: hi, expect: block}, {tool: {name: a}, expect: hold}]\n")

    one, other = run_examples(asked, Readings())

    assert (one.passed, one.decision.action) == (False, Action.ALLOW)
    assert (other.passed, other.decision) == (False, None)


def test_each_text_is_read_once():
    readings = Readings()
    run_examples(policy(more="examples: [{prompt: a, expect: pass}, {prompt: a, expect: allow}]\n"), readings)

    assert readings.asked == 1


def test_a_policy_without_examples_cannot_be_tested():
    found = invoke("test", "balanced")

    assert isinstance(found.exception, PolicyError)
    assert "has no examples" in str(found.exception)
