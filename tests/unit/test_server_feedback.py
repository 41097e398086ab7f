"""``POST /v1/feedback`` and ``GET /v1/drift``, and the SDK's way to them."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from hhh_router.cli.main import app as command
from hhh_router.errors import InvalidRequest, UnknownRequest
from hhh_router.interfaces.aio import AsyncHHHRouter
from hhh_router.interfaces.remote import RemotePipeline
from hhh_router.interfaces.sdk import HHHRouter
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.feedback import MAX_BODY_BYTES
from hhh_router.settings import Settings
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.trace.feedback_store import FeedbackStore, read_labelled

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}}


@pytest.fixture
def served(watchful: Policies) -> Iterator[TestClient]:
    with TestClient(create_app(fake_pipeline(watchful(), reader=FakeReader(RULES)))) as made:
        yield made


def asked(served: TestClient, prompt: str = "Hello", **headers: str) -> str:
    return served.post("/v1/guard", json={"prompt": prompt}, headers=headers).headers["x-hhh-request-id"]


def said(served: TestClient, name: str, **fields: Any) -> httpx.Response:
    return served.post("/v1/feedback", json={"request_id": name, "labels": {"harmful": True}, **fields})


def test_a_label_is_told_to_be_in_memory_only_where_no_file_is_named(served: TestClient) -> None:
    reply = said(served, asked(served), by="ann")

    assert reply.status_code == 200
    assert reply.json()["durable"] is False
    assert {k: reply.json()[k] for k in ("object", "by", "labels", "status")} == {
        "object": "feedback", "by": "ann", "labels": {"harmful": True}, "status": "stored",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_of_any_wire_can_be_labelled_with_its_reply(served: TestClient, path: str, stream: bool) -> None:
    body: dict[str, Any] = {"model": "hhh-auto", "stream": stream}
    body |= {"input": "Hi"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "Hi"}]}
    if path == "/v1/messages":
        body["max_tokens"] = 8
    name = served.post(path, json=body).headers["x-hhh-request-id"]

    assert said(served, name, labels={"unsafe": False, "untruthful": True}).json()["status"] == "stored"


def test_an_unknown_request_is_404_and_a_mistake_400_in_openais_shape(served: TestClient) -> None:
    unknown, wrong = said(served, "hhh-nobody"), said(served, asked(served), labels={"unsafe": True})

    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_request")
    more = said(served, asked(served), comment="my text")
    assert "comment: unknown field" in more.json()["error"]["message"]


def test_a_body_is_bounded(served: TestClient) -> None:
    assert said(served, asked(served), by="x" * MAX_BODY_BYTES).status_code == 413


def test_the_door_has_a_scope_of_its_own_and_two_keys_are_two_labellers(watchful: Policies, tmp_path: Path) -> None:
    def entry(name: str, *doors: str) -> str:
        return (
            f"  - {{name: {name}, sha256: {hashlib.sha256(name.encode()).hexdigest()}, doors: [{', '.join(doors)}]}}\n"
        )

    keys = tmp_path / "keys.yaml"
    keys.write_text("keys:\n" + entry("app", "judge") + entry("one", "feedback") + entry("two", "feedback", "metrics"))
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES), api_keys_file=keys)
    with TestClient(create_app(pipeline)) as made:
        name = asked(made, **{"x-api-key": "app"})

        def post(key: str) -> httpx.Response:
            body = {"request_id": name, "labels": {"harmful": False}}
            return made.post("/v1/feedback", json=body, headers={"x-api-key": key})

        assert post("app").json()["error"]["code"] == "door_not_allowed"
        assert post("nobody").status_code == 401
        assert [post(k).json()["status"] for k in ("one", "two", "one")] == ["stored", "stored", "unchanged"]
        assert made.get("/v1/drift", headers={"x-api-key": "one"}).status_code == 403
        assert made.get("/v1/drift", headers={"x-api-key": "two"}).json()["object"] == "drift"


def test_drift_is_told_before_anything_was_asked(served: TestClient) -> None:
    bare = {"object": "drift", "labelled": 0, "outside": 0, "figures": [], "comparisons": []}
    assert served.get("/v1/drift").json() == bare | {"figures": served.get("/v1/drift").json()["figures"]}


async def test_the_remote_sdk_says_the_same_as_the_one_in_process(watchful: Policies, tmp_path: Path) -> None:
    local = fake_pipeline(watchful(), reader=FakeReader(RULES))
    local.remember_in(FeedbackStore(tmp_path / "f.sqlite3"))
    served = create_app(local)
    transport = httpx.ASGITransport(served)
    remote = RemotePipeline("http://there", policy=None, settings=Settings.load(), transport=transport)
    here, there = AsyncHHHRouter(pipeline=local), AsyncHHHRouter(pipeline=remote)  # type: ignore[arg-type]
    name = (await here.guard("bomb")).metadata.request_id

    first = await there.feedback(name, {"refused_wrongly": True}, by="ann", sampled=True, probability=0.5)
    second = await here.feedback(name, {"refused_wrongly": True}, by="ann", sampled=True, probability=0.5)

    assert (first.status, second.status, first.durable) == ("stored", "unchanged", True)
    with pytest.raises(UnknownRequest):
        await there.feedback("nobody", {"harmful": True})
    with pytest.raises(InvalidRequest, match="passed_wrongly"):
        await there.feedback(name, {"passed_wrongly": True})
    await there.aclose()
    await here.aclose()
    [row] = read_labelled(tmp_path / "f.sqlite3")
    assert row.should_stop is False


async def test_in_process_nothing_is_remembered_unless_a_file_is_named(watchful: Policies) -> None:
    async with AsyncHHHRouter(pipeline=fake_pipeline(watchful())) as router:
        name = (await router.guard("hello")).metadata.request_id
        with pytest.raises(InvalidRequest, match="no request is remembered here"):
            await router.feedback(name, {"harmful": True})


def test_the_commands_draw_and_add(watchful: Policies, tmp_path: Path) -> None:
    path = tmp_path / "f.sqlite3"
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES))
    pipeline.remember_in(FeedbackStore(path))
    with HHHRouter(pipeline=pipeline) as router:
        router.guard(["bomb", "hello", "hi"])
    run = CliRunner().invoke
    drawn = [json.loads(x) for x in run(command, ["feedback", "draw", str(path), "--rate", "1"]).stdout.splitlines()]
    assert [row["action"] for row in drawn] == ["refuse", "allow", "allow"]
    drawn[0]["labels"] = {"harmful": True}
    drawn[1]["labels"] = {"harmful": False}
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(map(json.dumps, drawn)))

    outcome = [run(command, ["feedback", "add", str(labels), "--store", str(path), "--by", "ann"]) for _ in range(2)]
    assert outcome[0].stdout == "1 not labelled, 2 stored\n"
    assert outcome[1].stdout == "1 not labelled, 2 unchanged\n"
    left = run(command, ["feedback", "draw", str(path), "--rate", "1"]).stdout.splitlines()
    assert [json.loads(x)["request_id"] for x in left] == [drawn[2]["request_id"]]

    labels.write_text(json.dumps({"request_id": "nobody", "labels": {"harmful": True}}))
    wrong = run(command, ["feedback", "add", str(labels), "--store", str(path)])
    assert wrong.exit_code == 2
    assert "labels.jsonl:1: request nobody is not remembered" in wrong.stderr
    labels.write_text(json.dumps({**drawn[0], "probabilty": 1}))
    assert "'probabilty': unknown field" in run(command, ["feedback", "add", str(labels), "--store", str(path)]).stderr
