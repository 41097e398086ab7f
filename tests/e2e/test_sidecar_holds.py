"""Calls that wait for a person at the sidecar, and the webhooks of rules."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from cli.queue import app as queue_command
from hhh_router.interfaces.held import HeldCall, HeldCalls
from hhh_router.interfaces.webhook import SIGNATURE, signature
from hhh_router.pipeline.situation import SIDECAR
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.trace.audit import SqliteAudit, read_rows

from .loopback import served_app
from .sidecars import Said, Stub, ask, route_to, sidecar
from .test_sidecar_guarded import WIRES, Model, user

pytestmark = pytest.mark.e2e

POLICY = """\
version: 1
name: holds
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0.5
checkpoints:
  input: [{then: allow}]
  output: [{then: allow}]
  tool_call:
    - {when: {tool.name: [send]}, then: hold, message: "Somebody has to look at {tool}."WEBHOOK}
    - {then: allow}
stream: {window_tokens: 3}
"""
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [user("use a tool")]}),
    "responses": ("/v1/responses", {"input": "use a tool"}),
    "messages": ("/v1/messages", {"messages": [user("use a tool")], "max_tokens": 9}),
}


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    upstream = Stub(Model())
    with served_app(upstream) as url:
        yield upstream, url.removesuffix("/v1")


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    return tmp_path / "held.sqlite3"


def pipeline(tmp_path: Path, webhook: str | None = None, **settings: Any) -> Any:
    path = tmp_path / "holds.yaml"
    path.write_text(POLICY.replace("WEBHOOK", f', webhook: "{webhook}"' if webhook else ""))
    return fake_pipeline(path, reader=FakeReader(), door=SIDECAR, **settings)


def waiting(queue: Path, *, within_s: float = 20) -> HeldCall:
    """The one call that waits, once it does."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if queue.exists() and (calls := HeldCalls(queue).calls()):
            return calls[0]
        time.sleep(0.02)
    raise AssertionError("no call waits")


def meanwhile(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    return thread, found


@pytest.mark.parametrize("wire", BODIES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_an_approved_call_passes_as_it_came(
    tmp_path: Path, queue: Path, stub: tuple[Stub, str], wire: str, stream: bool
) -> None:
    path, body = BODIES[wire]
    body = {"model": "m", "stream": stream, **body}
    _, _, direct = ask(stub[1], path=path, body=body)
    audit = SqliteAudit(tmp_path / "a.sqlite3")
    with sidecar(
        route_to(stub[1]), pipeline=pipeline(tmp_path), audit=audit, hold_path=queue, hold_s=60.0, block="none"
    ) as (url, _):
        thread, found = meanwhile(lambda: ask(url, path=path, body=body))
        call = waiting(queue)
        result = CliRunner().invoke(queue_command, ["approve", call.id, "--queue", str(queue), "--by", "ann"])
        thread.join(30)

    assert result.exit_code == 0
    assert (call.door, call.tool, call.arguments, call.policy) == ("sidecar", "send", {"x": "poison"}, "holds@1")
    [(status, _, said)] = found
    assert status == 200
    if stream:
        assert b"ping" in said
    assert without_pings(said) == without_pings(direct)
    [outcome] = [json.loads(r.record) for r in read_rows(tmp_path / "a.sqlite3") if r.kind == "outcome"]
    assert outcome["held"] == [
        {"id": call.id, "tool": "send", "approved": True, "why": "approved by ann", "note": None}
    ]
    [decision] = [d for d in outcome["hhh"]["decisions"] if d["checkpoint"] == "tool_call"]
    assert (decision["action"], "approved by ann" in decision["reason"]) == ("flag", True)


def without_pings(said: bytes) -> list[bytes]:
    return [frame for frame in said.split(b"\n\n") if b"ping" not in frame]


@pytest.mark.parametrize("wire", BODIES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_denied_call_ends_in_the_wires_own_refusal(
    tmp_path: Path, queue: Path, stub: tuple[Stub, str], wire: str, stream: bool
) -> None:
    with sidecar(route_to(stub[1]), pipeline=pipeline(tmp_path), hold_path=queue, hold_s=60.0) as (url, _):
        thread, found = meanwhile(lambda: WIRES[wire](url, "use a tool", stream=stream))
        HeldCalls(queue).settle(waiting(queue).id, "denied", by="bob", note="not on Fridays")
        thread.join(30)

    [heard] = found
    assert "Somebody has to look at send." in heard.text
    assert "'send'" not in heard.everything
    assert heard.end in ("content_filter", "refusal")
    assert heard.last["decisions"][-1]["action"] == "hold"
    assert "denied by bob" in heard.last["decisions"][-1]["reason"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_what_nobody_approves_in_time_is_denied(
    tmp_path: Path, queue: Path, stub: tuple[Stub, str], stream: bool
) -> None:
    with sidecar(route_to(stub[1]), pipeline=pipeline(tmp_path), hold_path=queue, hold_s=0.5) as (url, _):
        heard = WIRES["chat"](url, "use a tool", stream=stream)

    assert "Somebody has to look at send." in heard.text
    assert "nobody approved it in time" in heard.last["decisions"][-1]["reason"]
    assert [c.status for c in HeldCalls(queue).calls(everything=True)] == ["expired"]


def test_a_stream_hears_that_its_call_still_waits(
    tmp_path: Path, queue: Path, stub: tuple[Stub, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hhh_router.pipeline.people.BEAT_S", 0.1)  # so that nobody waits for seconds
    with sidecar(route_to(stub[1]), pipeline=pipeline(tmp_path), hold_path=queue, hold_s=60.0) as (url, _):
        path, body = BODIES["chat"]
        thread, found = meanwhile(lambda: ask(url, path=path, body={"model": "m", "stream": True, **body}))
        call = waiting(queue)
        time.sleep(0.6)
        HeldCalls(queue).settle(call.id, "approved")
        thread.join(30)

    assert found[0][2].count(b": ping\n\n") >= 3
    assert b'"send"' in found[0][2]


def test_a_client_that_leaves_abandons_its_call(tmp_path: Path, queue: Path, stub: tuple[Stub, str]) -> None:
    with sidecar(route_to(stub[1]), pipeline=pipeline(tmp_path), hold_path=queue, hold_s=60.0) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "m", **BODIES["chat"][1]}))
        call = waiting(queue)
        connection.close()
        until = time.monotonic() + 20
        while HeldCalls(queue).find(call.id).status == "waiting" and time.monotonic() < until:
            time.sleep(0.05)

    assert HeldCalls(queue).find(call.id).status == "abandoned"


def test_the_openai_client_runs_an_approved_call_and_no_other(
    tmp_path: Path, queue: Path, stub: tuple[Stub, str]
) -> None:
    with (
        sidecar(route_to(stub[1]), pipeline=pipeline(tmp_path), hold_path=queue, hold_s=60.0) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):

        def chat() -> Any:
            try:
                with client.chat.completions.stream(model="m", messages=[user("use a tool")]) as events:
                    for _ in events:
                        pass
                    return events.get_final_completion().choices[0].message.tool_calls
            except openai.ContentFilterFinishReasonError as error:  # how this client tells a refusal
                return error

        answers = []
        for status in ("approved", "denied"):
            thread, found = meanwhile(chat)
            HeldCalls(queue).settle(waiting(queue).id, status)  # type: ignore[arg-type]
            thread.join(30)
            answers += found

    assert [call.function.name for call in answers[0]] == ["send"]
    assert isinstance(answers[1], openai.ContentFilterFinishReasonError)


def test_a_queue_that_cannot_be_used_lets_no_call_through(tmp_path: Path, stub: tuple[Stub, str]) -> None:
    broken = tmp_path / "no-queue"
    broken.write_bytes(b"this is no database" * 100)
    with sidecar(route_to(stub[1]), pipeline=pipeline(tmp_path), hold_path=broken, hold_s=60.0) as (url, _):
        heard = WIRES["chat"](url, "use a tool", stream=False)

    assert "'send'" not in heard.everything
    assert "could not be held" in heard.last["decisions"][-1]["reason"]


def test_webhooks_hear_of_a_rules_decision_and_of_the_held_call_signed(
    tmp_path: Path, queue: Path, stub: tuple[Stub, str]
) -> None:
    hook = Stub(Said(pieces=[b"{}"]))
    with served_app(hook) as address:
        url_of_hook = address.removesuffix("/v1")
        made = pipeline(tmp_path, f"{url_of_hook}/rule", webhook_secret="s3")
        with sidecar(
            route_to(stub[1]), pipeline=made, hold_path=queue, hold_s=0.5, hold_webhook=f"{url_of_hook}/held"
        ) as (url, _):
            WIRES["chat"](url, "use a tool", stream=True)
            until = time.monotonic() + 20
            while len(hook.asked) < 2 and time.monotonic() < until:
                time.sleep(0.05)

    told = {a.target.decode(): a for a in hook.asked}
    assert sorted(told) == ["/held", "/rule"]
    assert told["/rule"].json["event"] == "decision"
    assert (told["/rule"].json["action"], told["/rule"].json["tool"]) == ("hold", "send")
    assert told["/held"].json["call"]["tool"] == "send"
    for asked in hook.asked:
        [sent] = asked.header(SIGNATURE)
        at = int(sent.split(",")[0].removeprefix("t="))
        assert sent == signature("s3", asked.body, at)


def test_a_rule_that_flags_every_window_tells_its_webhook_once(tmp_path: Path, stub: tuple[Stub, str]) -> None:
    hook = Stub(Said(pieces=[b"{}"]))
    with served_app(hook) as address:
        path = tmp_path / "flags.yaml"
        rule = f'[{{then: flag, webhook: "{address.removesuffix("/v1")}/x"}}]'
        path.write_text(POLICY.replace("WEBHOOK", "").replace("output: [{then: allow}]", f"output: {rule}"))
        made = fake_pipeline(path, reader=FakeReader(), door=SIDECAR)
        with sidecar(route_to(stub[1]), pipeline=made) as (url, _):
            WIRES["chat"](url, "Capital?", stream=True)
            until = time.monotonic() + 20
            while not hook.asked and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.3)

    assert [(a.json["checkpoint"], a.json["action"]) for a in hook.asked] == [("output", "flag")]


@pytest.mark.parametrize("mode", ["annotate", "observe"])
def test_only_enforce_holds(tmp_path: Path, queue: Path, stub: tuple[Stub, str], mode: str) -> None:
    with sidecar(route_to(stub[1], mode=mode), pipeline=pipeline(tmp_path), hold_path=queue) as (url, _):
        heard = WIRES["chat"](url, "use a tool", stream=False)

    assert "'send'" in heard.everything
    assert not queue.exists()
