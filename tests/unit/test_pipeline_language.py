"""The language of a text: told where a rule asks, at every door, and refused at start where nothing can tell it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hhh_router.calibration import Calibrators
from hhh_router.errors import MissingExtra
from hhh_router.interfaces.mcp.checks import check_policy
from hhh_router.pipeline import PolicyStore
from hhh_router.pipeline import language as languages
from hhh_router.pipeline.language import MOST_CHARACTERS, ready_language, tell_language
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.pipeline.situation import PIPELINE, SERVER, SIDECAR, answered_situation, asked_situation
from hhh_router.policy import lacking, parse_policy
from hhh_router.testing import make_scores
from hhh_router.types import Action, Caller, Message, ToolCall

HEAD = "version: 1\nname: t\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\n"
ONLY = "{when: {language: 'not in [en, und]'}, then: refuse}"
SENTENCES = [
    ("en", "How do I bake bread?"),
    ("de", "Wie backe ich Brot?"),
    ("fr", "Quelle est la capitale de l'Espagne ?"),
    ("es", "¿Cuál es la capital de Francia?"),
    ("pl", "Opowiedz mi dowcip o kotach"),
    ("ru", "Расскажи анекдот про котов"),
    ("ja", "フランスの首都はどこですか？"),
    ("zh", "给我讲个笑话"),
    ("ar", "ما هي عاصمة فرنسا؟"),
]


def policy(checkpoint: str = "input", rule: str = ONLY):
    rules = {"input": "[{then: allow}]", "output": "[{then: allow}]", checkpoint: f"[{rule}, {{then: allow}}]"}
    body = "".join(f"  {name}: {text}\n" for name, text in rules.items())
    return parse_policy(f"{HEAD}checkpoints:\n{body}", source="p.yaml")


@pytest.fixture
def without_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)  # as where it is not installed
    languages._identifier.cache_clear()
    yield
    languages._identifier.cache_clear()


def decided(given, *said: str, calls: tuple[Message, ...] = ()) -> Action:
    messages = (*(Message(role="user", content=text) for text in said), *calls)
    situation = asked_situation(messages, Caller(), None)
    plan = make_plan(make_scores({}), policy=given, calibrators=Calibrators.none(), situation=situation)
    return plan.decision.action


@pytest.mark.parametrize(("code", "text"), SENTENCES)
def test_short_sentences_are_told_apart(code, text):
    assert tell_language(text) == code


@pytest.mark.parametrize("text", ["", "ok", "123 456", "https://example.com/a/b"])
def test_what_cannot_be_told_is_undetermined(text):
    assert tell_language(text) in ("und", "zxx")


def test_only_the_beginning_of_a_long_text_is_looked_at():
    english = "How do I bake bread with my cats? " * (MOST_CHARACTERS // 30)

    assert tell_language(english + "Wie backe ich Brot mit meinen Katzen? " * 10_000) == "en"


def test_a_rule_on_language_decides_at_input_and_at_output():
    assert decided(policy(), "How do I bake bread?") is Action.ALLOW
    assert decided(policy(), "Wie backe ich ein gutes Brot?") is Action.REFUSE
    assert decided(policy(), "ok") is Action.ALLOW

    given = policy("output", ONLY)
    asked = asked_situation((Message(role="user", content="How do I bake bread?"),), Caller(), None)
    plan = make_plan(make_scores({}), policy=given, calibrators=Calibrators.none(), situation=asked)
    for reply, action in (("You knead the dough.", "allow"), ("Du knetest zuerst den Teig.", "refuse")):
        answered = answered_situation(asked, reply)
        _, _, decision = judge_output(
            replace(make_scores({}), mode="both"), plan=plan, policy=given, calibrators=Calibrators.none(),
            situation=answered,
        )  # fmt: skip
        assert decision.action == action


def test_what_a_tool_brought_back_has_a_language_of_its_own():
    given = policy("tool_result", ONLY.replace("refuse", "block"))
    call = ToolCall(id="c", name="read", arguments="{}")
    asked = "What does the page say about bread?"

    def after(result: str) -> Action:
        called = Message(role="assistant", content="", tool_calls=(call,))
        return decided(given, asked, calls=(called, Message(role="tool", content=result, tool_call_id="c")))

    assert after("The bread is baked for an hour.") is Action.ALLOW
    assert after("Das Brot wird eine Stunde lang gebacken.") is Action.BLOCK


def test_every_door_supplies_it():
    for door in (PIPELINE, SERVER, SIDECAR):
        assert lacking(policy(), door) == []
    check_policy(policy("tool_call", ONLY.replace("refuse", "block")))


def test_a_policy_that_asks_for_it_is_refused_at_start_without_the_extra(without_extra, tmp_path: Path):
    file = tmp_path / "p.yaml"
    body = "checkpoints:\n  input: [{}{{then: allow}}]\n  output: [{{then: allow}}]\n"
    file.write_text(HEAD + body.format(f"{ONLY}, "))

    with pytest.raises(MissingExtra, match="the condition 'language' needs the 'language' extra"):
        PolicyStore(file)
    with pytest.raises(MissingExtra):
        check_policy(policy("tool_call", ONLY.replace("refuse", "block")))
    ready_language(policy(rule="{when: {text: a}, then: refuse}"))
    assert tell_language("How do I bake bread?") is None

    file.write_text(HEAD + body.format(""))
    store = PolicyStore(file)
    file.write_text((HEAD + body.format(f"{ONLY}, ")).replace("version: 1", "version: 2"))
    assert not store.reload()
    assert store.default.version == 1
    assert "language" in (store.status.error or "")


def test_without_rules_that_ask_no_language_is_told(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(languages, "_identifier", lambda: asked.append("asked"))

    assert decided(policy(rule="{when: {text: knife}, then: refuse}"), "Wie backe ich Brot?") is Action.ALLOW
    assert asked == []
