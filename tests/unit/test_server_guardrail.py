"""LiteLLM's generic guardrail API, in process: both phases, joined by the call's id."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.guardrail import LONGEST_S, MOST_CALLS, PATH, Prompts
from hhh_router.pipeline.situation import SERVER
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.types import Message

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
SECRET = "sk-aaaabbbbccccddddeeee"
HELLO = (Message(role="user", content="Hello"),)


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader(RULES)


@pytest.fixture
def served(watchful: Policies, reader: FakeReader) -> Iterator[TestClient]:
    with TestClient(create_app(fake_pipeline(watchful(), reader=reader))) as made:
        yield made


def post(served: TestClient, phase: str, *texts: str, **more: Any) -> Any:
    return served.post(PATH, json={"input_type": phase, "texts": list(texts), "litellm_call_id": "c1", **more}).json()


def test_a_harmless_request_passes_and_a_harmful_one_is_blocked_with_the_policys_message(served: TestClient) -> None:
    assert post(served, "request", "Hello")["action"] == "NONE"

    found = post(served, "request", "how to build a bomb")
    assert (found["action"], found["blocked_reason"]) == ("BLOCKED", "Not that.")


def test_the_reply_is_read_with_the_prompt_of_the_same_call(served: TestClient, reader: FakeReader) -> None:
    post(served, "request", "Hello there")
    found = post(served, "response", "poison")

    assert found["action"] == "BLOCKED"
    assert reader.calls[-1][-1].mode == "both"
    assert reader.calls[-1][-1].messages[0].content == "Hello there"


def test_a_reply_of_an_unknown_call_is_read_alone(served: TestClient, reader: FakeReader) -> None:
    found = post(served, "response", "poison", litellm_call_id="never seen")

    assert found["action"] == "BLOCKED"
    assert reader.calls[-1][-1].mode == "response"


def test_partial_replies_of_a_stream_are_each_read_with_the_prompt(served: TestClient, reader: FakeReader) -> None:
    post(served, "request", "Hello")
    for text in ("a", "a b", "a b poison"):
        found = post(served, "response", text)

    assert found["action"] == "BLOCKED"
    assert {c[-1].mode for c in reader.calls[1:]} == {"both"}


def test_messages_keep_their_roles_and_the_system_prompt_is_read(served: TestClient, reader: FakeReader) -> None:
    rows = [{"role": "system", "content": "bomb"}, {"role": "user", "content": "Hi"}]

    found = post(served, "request", "bomb", "Hi", structured_messages=rows)

    assert found["action"] == "BLOCKED"
    assert [m.role for m in reader.calls[-1][0].messages] == ["system", "user"]


def test_an_order_that_no_model_knows_is_read_as_one_turn(served: TestClient, reader: FakeReader) -> None:
    rows = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]},
        {"role": "assistant", "content": "bomb"},
    ]

    found = post(served, "request", structured_messages=rows)

    assert found["action"] == "BLOCKED"
    [message] = reader.calls[-1][0].messages
    assert message.content == "user: Hi\nassistant: bomb"


def test_the_policy_comes_with_the_parameters(served: TestClient) -> None:
    found = post(served, "request", "Hello", additional_provider_specific_params={"policy": "balanced"})

    assert found["hhh"]["policy"]["name"] == "balanced"


def test_what_is_not_read_is_named(served: TestClient) -> None:
    found = post(served, "request", "Hello", tools=[{"name": "x"}], images=["data:"])

    assert found["hhh"]["not_inspected"] == ["images", "tools"]


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": {"name": "cook", "arguments": '{"what": "poison"}'}},
        {"id": None, "function": {"name": "cook", "arguments": '{"what": "poi'}, "more": "poison"},
    ],
)
def test_what_a_reply_wants_called_is_read(served: TestClient, reader: FakeReader, call: Any) -> None:
    post(served, "request", "Cook something")
    found = post(served, "response", tool_calls=[call])

    assert found["action"] == "BLOCKED"
    assert found["hhh"]["not_inspected"] == []
    assert "cook" in reader.calls[-1][-1].response


@pytest.mark.parametrize("phase", ["request", "response"])
def test_nothing_to_read_passes(served: TestClient, phase: str) -> None:
    assert post(served, phase, "", litellm_call_id="other") == {"action": "NONE"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input_type": "both"}, "input_type: found 'both'"),
        ({"input_type": "request", "texts": "x"}, "texts: found a string"),
        ({"input_type": "request", "texts": [1]}, "texts: found a list"),
        ({"input_type": "request", "texts": ["x"], "additional_provider_specific_params": {"policy": 3}}, "no string"),
        ({"input_type": "request", "additional_provider_specific_params": [1]}, "params: no object, found a list"),
        ({"input_type": "request", "additional_provider_specific_params": {"redact": ["all"]}}, "redact: no list"),
        ({"input_type": "request", "additional_provider_specific_params": {"redact": "secrets"}}, "redact: no list"),
        ({"input_type": "request", "additional_provider_specific_params": {"hold_chars": -1}}, "hold_chars: no count"),
        ({"input_type": "request", "additional_provider_specific_params": {"hold_chars": True}}, "hold_chars: no"),
    ],
)
def test_what_is_wrong_is_named(served: TestClient, body: dict[str, Any], said: str) -> None:
    reply = served.post(PATH, json=body)

    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_secrets_are_rewritten_in_what_is_let_through(served: TestClient, reader: FakeReader) -> None:
    wishes = {"additional_provider_specific_params": {"redact": ["secrets"]}}

    asked = post(served, "request", "Hello", f"use {SECRET}, write to a@b.example", **wishes)
    said = post(served, "response", f"It is {SECRET}", **wishes)
    clean = post(served, "response", "nothing here", **wishes)
    both = post(served, "request", "a@b.example", additional_provider_specific_params={"redact": ["secrets", "emails"]})

    assert asked["action"] == said["action"] == "GUARDRAIL_INTERVENED"
    assert asked["texts"] == ["Hello", "use [redacted:api-key], write to a@b.example"]
    assert "stream_holdback_chars" not in asked
    assert said["texts"] == ["It is [redacted:api-key]"]
    assert (clean["action"], "texts" in clean) == ("NONE", False)
    assert both["texts"] == ["[redacted:email]"]
    assert SECRET in reader.calls[1][-1].response  # what is judged is what was written


def test_a_stop_is_a_stop_with_or_without_rewriting(served: TestClient) -> None:
    found = post(served, "response", f"poison {SECRET}", additional_provider_specific_params={"redact": ["secrets"]})

    assert (found["action"], found["blocked_reason"], "texts" in found) == ("BLOCKED", "Cut.", False)


def test_the_end_of_a_stream_is_held_back_where_it_is_wished(served: TestClient) -> None:
    plain = post(served, "response", "a b c d")
    held = post(served, "response", "a b c d", "e", additional_provider_specific_params={"hold_chars": 3})
    line = post(served, "response", "done.\nkey sk-aa", additional_provider_specific_params={"redact": ["secrets"]})

    assert "stream_holdback_chars" not in plain
    assert held["stream_holdback_chars"] == [3, 1]
    assert line["stream_holdback_chars"] == [len("key sk-aa")]


def test_the_key_comes_as_litellm_sends_it(watchful: Policies) -> None:
    with TestClient(create_app(fake_pipeline(watchful(), api_key="s3cret"))) as served:
        body = {"input_type": "request", "texts": ["Hello"]}
        wrong = served.post(PATH, json=body, headers={"x-api-key": "no"})
        right = served.post(PATH, json=body, headers={"x-api-key": "s3cret"})

    assert (wrong.status_code, right.status_code) == (401, 200)


def test_prompts_are_forgotten_by_age_and_by_number() -> None:
    now = [0.0]
    prompts = Prompts(clock=lambda: now[0])
    prompts.keep("a", HELLO)
    assert prompts.find("a") == HELLO

    now[0] = LONGEST_S + 1
    assert prompts.find("a") == ()
    for i in range(MOST_CALLS + 5):
        prompts.keep(str(i), HELLO)
    assert prompts.find("0") == ()
    assert prompts.find(str(MOST_CALLS)) == HELLO
    assert len(prompts._kept) == MOST_CALLS


SCHOOLS = """
overlays:
  - tenants: [school-*]
    checkpoints:
      input:
        - {when: {text: ['answer key']}, then: refuse, message: "Please ask your teacher."}
"""


@pytest.mark.parametrize(
    ("setting", "told", "stopped"),
    [
        ("team_alias", {"user_api_key_team_alias": "school-north"}, True),
        ("team_alias", {"user_api_key_team_alias": "office"}, False),
        ("team_alias", {"user_api_key_team_alias": None}, False),
        ("team_alias", {}, False),
        ("team_id", {"user_api_key_team_id": "school-7", "user_api_key_team_alias": "office"}, True),
        ("key_alias", {"user_api_key_alias": "school-key"}, True),
        ("org_id", {"user_api_key_org_id": "school-org"}, True),
        ("user_id", {"user_api_key_user_id": "school-user"}, True),
        ("key", {"user_api_key_team_alias": "school-north"}, False),
    ],
)
def test_overlays_go_by_whom_litellm_calls_for(
    watchful: Policies, tmp_path: Path, setting: str, told: dict[str, Any], stopped: bool
) -> None:
    policy = tmp_path / "schools.yaml"
    policy.write_text(watchful().read_text() + SCHOOLS)
    pipeline = fake_pipeline(policy, reader=FakeReader(RULES), door=SERVER, guardrail_tenant=setting)

    with TestClient(create_app(pipeline)) as served:
        found = post(served, "request", "Where is the answer key?", request_data=told)

    assert found.get("blocked_reason") == ("Please ask your teacher." if stopped else None)


def test_a_tenant_that_is_no_name_is_a_mistake(watchful: Policies) -> None:
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES), guardrail_tenant="team_id")

    with TestClient(create_app(pipeline)) as served:
        for wrong in (7, "x" * 300):
            found = post(served, "request", "Hello", request_data={"user_api_key_team_id": wrong})

            assert found["error"]["message"].startswith("request_data.user_api_key_team_id: no name")
