"""The server tells policies whose key a request came with, and by which endpoint."""

import hashlib
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from hhh_router.interfaces.server.app import create_app
from hhh_router.pipeline import PolicyStore
from hhh_router.pipeline.situation import PIPELINE, SERVER
from hhh_router.policy import lacking, load_policy
from hhh_router.testing import fake_pipeline

POLICY = """\
version: 1
name: p
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0.5
checkpoints:
  input:
    - when: {route: /v1/messages}
      then: block
      message: "Not by this way."
    - when: {key.scope: "not in [chat]"}
      then: flag
    - then: allow
  output: [{then: allow}]
overlays:
  - tenants: school-*
    checkpoints: {input: [{when: {text: bomb}, then: refuse, message: "Ask your teacher."}]}
"""
KEYS = {"school-north": "s" * 20, "bank": "b" * 20, "judge": "j" * 20}


@pytest.fixture
def client(tmp_path: Path):
    policy, keys = tmp_path / "p.yaml", tmp_path / "keys.yaml"
    policy.write_text(POLICY)
    rows = [f"  - {{name: {n}, sha256: {hashlib.sha256(k.encode()).hexdigest()}" for n, k in KEYS.items()]
    keys.write_text("keys:\n" + "".join(f"{row}{', doors: [judge]' if 'judge' in row else ''}}}\n" for row in rows))
    pipeline = fake_pipeline(policy=policy, door=SERVER, api_keys_file=keys)
    with TestClient(create_app(pipeline)) as client:
        yield client


def asked(client: TestClient, path: str, name: str, text: str = "about a bomb"):
    body = {"model": "hhh-auto", "max_tokens": 8, "messages": [{"role": "user", "content": text}]}
    if path in ("/v1/guard", "/v1/route"):
        body = {"prompt": text}
    if path == "/v1/moderations":
        body = {"input": text}
    return client.post(path, json=body, headers={"authorization": f"Bearer {KEYS[name]}"})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/guard", "/v1/route"])
def test_a_tenants_overlay_holds_for_its_key_alone(client: TestClient, path: str):
    assert asked(client, path, "school-north").headers["x-hhh-action"] == "refuse"
    assert asked(client, path, "school-north", "about bread").headers["x-hhh-action"] == "allow"
    assert asked(client, path, "bank").headers["x-hhh-action"] == "allow"


def test_a_rule_can_ask_for_the_endpoint_and_what_a_key_opens(client: TestClient):
    assert asked(client, "/v1/messages", "bank").headers["x-hhh-action"] == "block"
    assert asked(client, "/v1/guard", "judge").headers["x-hhh-action"] == "flag"
    assert (
        asked(client, "/v1/moderations", "school-north").json()["results"][0]["hhh"]["decisions"][0]["action"]
        == "refuse"
    )


def test_such_a_policy_is_for_the_server_and_not_for_the_sdk(tmp_path: Path):
    file = tmp_path / "p.yaml"
    file.write_text(POLICY)

    assert PolicyStore(file, door=SERVER).default.name == "p"
    assert len(lacking(load_policy(file), PIPELINE)) == 3
