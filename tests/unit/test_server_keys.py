"""API keys of a server: scopes, limits, and mistakes in their file."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient
from typer.testing import CliRunner

from hhh_router.cli.main import app
from hhh_router.errors import Overloaded, SettingsError
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.http import check_exposure
from hhh_router.interfaces.server.keys import Key, KeyRing
from hhh_router.interfaces.server.run import listen
from hhh_router.settings import Settings
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

Policies = Callable[..., Path]


def entry(name: str, **more: Any) -> dict[str, Any]:
    """A key that is the name itself."""
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **more}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return path


@pytest.fixture
def served(watchful: Policies, tmp_path: Path) -> Iterator[TestClient]:
    keys = write(
        tmp_path / "keys.yaml", entry("all"), entry("chats", doors=["chat"]), entry("judges", doors=["judge"]),
        entry("balanced", policies=["balanced"]), entry("two", requests_per_minute=2),
        entry("few", tokens_per_minute=5),
    )  # fmt: skip
    reader = FakeReader()
    pipeline = fake_pipeline(
        watchful(), reader=reader, generator=FakeGenerator("one two three four", reader=reader), api_keys_file=keys,
        api_key="master",
    )  # fmt: skip
    with TestClient(create_app(pipeline)) as made:
        yield made


CHAT = {"model": "hhh-auto", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}


def post(served: TestClient, key: str, path: str = "/v1/chat/completions", **body: Any) -> Any:
    given = body or (CHAT if "chat" in path or "messages" in path else {"prompt": "Hello"})
    return served.post(path, json=given, headers={"authorization": f"Bearer {key}"})


@pytest.mark.parametrize("key", ["all", "master"])
def test_a_key_without_scopes_opens_everything(served: TestClient, key: str) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/guard"):
        assert post(served, key, path).status_code == 200
    assert served.get("/metrics", headers={"x-api-key": key}).status_code == 200


@pytest.mark.parametrize("key", ["nobody", "", "ALL"])
def test_any_other_key_opens_nothing(served: TestClient, key: str) -> None:
    assert post(served, key).status_code == 401
    assert served.get("/v1/models", headers={"x-api-key": key}).status_code == 401
    assert served.get("/health/live").status_code == 200


def test_a_door_that_is_not_open_is_403(served: TestClient) -> None:
    assert post(served, "chats").status_code == 200
    closed = post(served, "chats", "/v1/guard")
    assert (closed.status_code, closed.json()["error"]["code"]) == (403, "door_not_allowed")
    assert post(served, "judges", "/v1/guard").status_code == 200
    assert post(served, "judges", "/v1/messages").json()["error"]["type"] == "permission_error"
    assert served.get("/metrics", headers={"x-api-key": "chats"}).status_code == 403
    assert served.get("/v1/models", headers={"x-api-key": "chats"}).status_code == 200


def test_a_policy_that_is_not_open_is_403_on_every_wire(served: TestClient) -> None:
    refused = [
        post(served, "balanced"),  # the default is another one
        post(served, "balanced", "/v1/messages"),
        post(served, "balanced", "/v1/responses", model="hhh-auto", input="Hi"),
        post(served, "balanced", "/v1/guard"),
        post(served, "balanced", "/v1/guard", items=[{"prompt": "a", "policy": "balanced"}, {"prompt": "b"}]),
        post(served, "balanced", "/v1/moderations", input="Hi"),
        post(served, "balanced", "/beta/litellm_basic_guardrail_api", input_type="request", texts=["Hi"]),
    ]
    assert [r.status_code for r in refused] == [403] * len(refused)
    assert "balanced" in refused[0].json()["error"]["message"]
    assert post(served, "balanced", **(CHAT | {"model": "hhh-auto:balanced"})).status_code == 200
    assert post(served, "balanced", "/v1/guard", prompt="Hi", policy="balanced").status_code == 200


def test_requests_of_a_minute_are_limited_for_each_key_alone(served: TestClient) -> None:
    found = [post(served, "two") for _ in range(3)]

    assert [r.status_code for r in found] == [200, 200, 429]
    assert int(found[2].headers["retry-after"]) <= 30
    assert "2 requests a minute" in found[2].json()["error"]["message"]
    assert post(served, "all").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_counted_once_they_are_known(served: TestClient, stream: bool) -> None:
    first = post(served, "few", **(CHAT | {"stream": stream}))  # takes 5 at least
    second = post(served, "few", **CHAT)

    assert first.status_code == 200
    assert second.status_code == 429
    assert "5 tokens a minute" in second.json()["error"]["message"]


def test_limits_are_refilled_as_time_goes_by() -> None:
    now = [0.0]
    key = Key(**entry("a", requests_per_minute=60))
    ring = KeyRing((key,), clock=lambda: now[0])
    for _ in range(60):
        ring.admit(key, "chat")
    with pytest.raises(Overloaded) as caught:
        ring.admit(key, "chat")
    assert caught.value.retry_after_s == pytest.approx(1)

    now[0] = 1.01
    ring.admit(key, "chat")
    with pytest.raises(Overloaded):
        ring.admit(key, "chat")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys: []", "keys: "),
        ("keys: [{name: a}]", "keys.0.sha256"),
        ("keys: [{name: a, sha256: short}]", "keys.0.sha256"),
        ("keys: [{name: a, sha256: " + "a" * 64 + ", doors: [cellar]}]", "keys.0.doors.0"),
        ("keys: [{name: a, sha256: " + "a" * 64 + ", secret: x}]", "keys.0.secret"),
        ("keys: [{name: a, sha256: " + "a" * 64 + "}, {name: a, sha256: " + "b" * 64 + "}]", "two keys have the name"),
        (
            "keys: [{name: a, sha256: " + "a" * 64 + "}, {name: b, sha256: " + "a" * 64 + "}]",
            "two keys have the sha256",
        ),
        ("keys: [{name: everything, sha256: " + "a" * 64 + "}]", "rename"),
        ("keys: [", "no YAML"),
        ("- a", "file: "),
    ],
)
def test_a_file_with_mistakes_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)

    with pytest.raises(SettingsError) as caught:
        KeyRing.open(Settings.load(api_keys_file=path))

    assert said in str(caught.value)


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [")

    with pytest.raises(SettingsError, match="no YAML"):
        listen("127.0.0.1", 0, Settings.load(api_keys_file=path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="HHH_ROUTER_API_KEYS_FILE"):
        KeyRing.open(Settings.load(api_keys_file=tmp_path / "none.yaml"))


def test_a_file_of_keys_lets_a_server_listen_beyond_loopback(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no key is set"):
        check_exposure("0.0.0.0", Settings.load())
    check_exposure("0.0.0.0", Settings.load(api_keys_file=write(tmp_path / "k.yaml", entry("a"))))


def test_a_new_key_is_one_whose_entry_lets_it_in(tmp_path: Path, watchful: Policies) -> None:
    made = json.loads(CliRunner().invoke(app, ["key", "new", "team a", "--json"]).stdout)
    keys = write(tmp_path / "keys.yaml", made["entry"])

    with TestClient(create_app(fake_pipeline(watchful(), api_keys_file=keys))) as served:
        assert post(served, made["key"]).status_code == 200
        assert post(served, made["entry"]["sha256"]).status_code == 401


def test_a_new_key_is_shown_on_stdout_and_its_entry_beside_it() -> None:
    found = CliRunner().invoke(app, ["key", "new", "team"])

    key = found.stdout.strip()
    assert key.startswith("hhh-")
    assert hashlib.sha256(key.encode()).hexdigest() in found.stderr
    assert key not in found.stderr


def test_what_one_caller_has_asked_another_cannot_go_on_from(served: TestClient) -> None:
    asked = {"model": "hhh-auto", "input": "Hi"}
    first = post(served, "all", "/v1/responses", **asked).json()["id"]

    assert post(served, "chats", "/v1/responses", **asked, previous_response_id=first).status_code == 404
    assert post(served, "all", "/v1/responses", **asked, previous_response_id=first).status_code == 200


def test_the_reply_of_a_call_is_not_read_with_another_callers_prompt(watchful: Policies, tmp_path: Path) -> None:
    path = "/beta/litellm_basic_guardrail_api"
    reader = FakeReader()
    keys = write(tmp_path / "keys.yaml", entry("one"), entry("other"))
    with TestClient(create_app(fake_pipeline(watchful(), reader=reader, api_keys_file=keys))) as served:
        post(served, "one", path, input_type="request", texts=["Hi"], litellm_call_id="c")
        post(served, "other", path, input_type="response", texts=["Ho"], litellm_call_id="c")
        assert reader.calls[-1][-1].mode == "response"
        post(served, "one", path, input_type="response", texts=["Ho"], litellm_call_id="c")
        assert reader.calls[-1][-1].mode == "both"
