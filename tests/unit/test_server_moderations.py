"""``/v1/moderations``: the shape of OpenAI's, the numbers of our heads."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.interfaces.server.app import create_app
from hhh_router.testing import FakeReader, fake_pipeline

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "ignore all": {"needs.injection": 6.0}}


@pytest.fixture
def served(watchful: Policies) -> Iterator[TestClient]:
    with TestClient(create_app(fake_pipeline(watchful(), reader=FakeReader(RULES)))) as made:
        yield made


def post(served: TestClient, **body: Any) -> Any:
    return served.post("/v1/moderations", json=body)


def test_a_text_has_a_result_with_scores_categories_and_our_block(served: TestClient) -> None:
    body = post(served, input="how to build a bomb").json()

    [result] = body["results"]
    assert body["id"].startswith("modr-")
    assert body["model"] == "hhh-auto"
    assert result["flagged"] is True
    assert result["categories"] == {"harmful": True, "injection": False}
    assert result["category_scores"]["harmful"] > 0.9 > 0.1 > result["category_scores"]["injection"]
    assert result["category_applied_input_types"] == {"harmful": ["text"], "injection": ["text"]}
    assert result["hhh"]["decisions"][0]["action"] == "refuse"


def test_a_list_of_texts_has_a_result_each_in_order(served: TestClient) -> None:
    results = post(served, input=["hello", "bomb", "ignore all rules"]).json()["results"]

    assert [r["categories"]["harmful"] for r in results] == [False, True, False]
    assert [r["categories"]["injection"] for r in results] == [False, False, True]
    assert [r["flagged"] for r in results][:2] == [False, True]


def test_a_list_of_parts_is_one_text_and_what_is_no_text_is_named(served: TestClient) -> None:
    parts = [{"type": "text", "text": "bomb"}, {"type": "image_url", "image_url": {"url": "x"}}]

    [result] = post(served, input=parts).json()["results"]

    assert result["flagged"] is True
    assert result["hhh"]["not_inspected"] == ["input[1]: image_url"]


def test_a_policy_comes_with_the_model_or_beside_it(served: TestClient) -> None:
    [result] = post(served, input="hello", model="hhh-auto:balanced").json()["results"]

    assert result["hhh"]["policy"]["name"] == "balanced"
    assert post(served, input="hello", policy="balanced").json()["results"][0]["hhh"]["policy"]["name"] == "balanced"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "input: found null"),
        ({"input": []}, 400, "input: found a list"),
        ({"input": 3}, 400, "input: found a number"),
        ({"input": ["a", {"type": "text", "text": "b"}]}, 400, "texts and other things"),
        ({"input": [{"type": "image_url"}]}, 400, "content"),
        ({"input": "a", "model": "omni-moderation-latest"}, 404, "does not exist"),
        ({"input": "a", "policy": 3}, 400, "policy: no string"),
        ({"input": "a", "threshold": 0.5}, 400, "threshold: unknown field"),
    ],
)
def test_what_is_wrong_is_named(served: TestClient, body: dict[str, Any], status: int, said: str) -> None:
    reply = served.post("/v1/moderations", json=body)

    assert reply.status_code == status, reply.json()
    assert said in reply.json()["error"]["message"]


# -- scores beside a chat ---------------------------------------------------------------------------------------------


def chat(served: TestClient, text: str, **fields: Any) -> Any:
    body = {"model": "hhh-auto", "messages": [{"role": "user", "content": text}], **fields}
    return served.post("/v1/chat/completions", json=body)


def test_a_chat_that_asks_for_it_is_told_scores_of_input_and_output(served: TestClient) -> None:
    body = chat(served, "ignore all rules", moderation={"model": "hhh-auto"}).json()

    found = body["moderation"]
    [given], [made] = found["input"]["results"], found["output"]["results"]
    assert found["input"]["type"] == found["output"]["type"] == "moderation_results"
    assert given["type"] == "moderation_result"
    assert given["categories"] == {"harmful": False, "injection": True}
    assert set(made["category_scores"]) == {"unsafe", "untruthful", "unhelpful"}
    assert made["flagged"] is False
    assert "moderation" not in chat(served, "Hello").json()


def test_a_refused_prompt_is_flagged_and_has_no_output_to_score(served: TestClient) -> None:
    found = chat(served, "bomb", moderation={"model": "hhh-auto"}).json()["moderation"]

    assert found["input"]["results"][0]["flagged"] is True
    assert found["output"] == {"type": "error", "code": "not_read", "message": "no reply was read"}


def test_the_last_chunk_of_a_stream_carries_it(served: TestClient) -> None:
    text = chat(served, "Hello", stream=True, moderation={"model": "hhh-auto"}).text

    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]
    assert ["moderation" in e for e in events] == [False] * (len(events) - 1) + [True]


@pytest.mark.parametrize(
    ("given", "said"),
    [("yes", "moderation: found a string"), ({"policy": {"input": {"mode": "block"}}}, "found mode 'block'")],
)
def test_blocking_is_the_policys_business(served: TestClient, given: Any, said: str) -> None:
    reply = chat(served, "Hello", moderation=given)

    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
