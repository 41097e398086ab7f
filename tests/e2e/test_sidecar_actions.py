"""What a sidecar does beside letting pass and blocking, and its routes from a proxy.yaml."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from hhh_router.errors import PolicyError
from hhh_router.interfaces.proxy.config import make_config, parse_proxy_file
from hhh_router.interfaces.proxy.open import plan_sidecar
from hhh_router.pipeline.situation import SIDECAR
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.trace.audit import SqliteAudit, read_rows

from .loopback import served, served_app
from .sidecars import RULES, Said, Stub, ask, closed_port, route_to, sidecar, sse
from .test_sidecar_guarded import GOOD, WIRES, Model, user

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
UNSURE = {**RULES, "premise": {"needs.honest": 6.0}}


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    upstream = Stub(Model())
    with served_app(upstream) as url:
        yield upstream, url.removesuffix("/v1")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_escalate_asks_the_stronger_upstream_and_flags(
    watchful: Policies, stub: tuple[Stub, str], wire: str, stream: bool, tmp_path: Path
) -> None:
    strong = Stub(Model())
    with served_app(strong) as url_of_strong:
        route = route_to(stub[1])
        stronger = replace(route_to(url_of_strong).to[0][0], name="strong", model="huge")
        route = replace(route, escalate_to=stronger)
        audit = SqliteAudit(tmp_path / "a.sqlite3")
        with sidecar(route, policy=watchful(), reader=FakeReader(UNSURE), audit=audit) as (url, _):
            heard = WIRES[wire](url, "a false premise", stream=stream)

    assert heard.text.strip() == GOOD
    assert [d["action"] for d in heard.last["decisions"]] == ["flag", "allow"]
    assert (len(stub[0].asked), [a.json["model"] for a in strong.asked]) == (0, ["huge"])
    outcome = next(json.loads(r.record) for r in read_rows(tmp_path / "a.sqlite3") if r.kind == "outcome")
    assert outcome["escalated_to"] == "strong"


def test_without_anyone_to_escalate_to_it_stops(watchful: Policies, stub: tuple[Stub, str]) -> None:
    with sidecar(route_to(stub[1]), policy=watchful(), reader=FakeReader(UNSURE)) as (url, _):
        heard = WIRES["chat"](url, "a false premise", stream=False)

    assert heard.end == "content_filter"
    assert stub[0].asked == []


def test_what_the_stronger_one_says_is_judged_too(watchful: Policies, stub: tuple[Stub, str]) -> None:
    route = route_to(stub[1])
    route = replace(route, escalate_to=route.to[0][0])
    with sidecar(route, policy=watchful(), reader=FakeReader(UNSURE)) as (url, _):
        heard = WIRES["chat"](url, "a false premise and trouble", stream=True)

    assert "poison" not in heard.everything
    assert heard.end == "content_filter"


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("fault", ["refused", "503"])
@pytest.mark.parametrize("mode", ["observe", "enforce"])
def test_the_own_mixture_answers_when_every_upstream_has_failed(
    stub: tuple[Stub, str], wire: str, stream: bool, fault: str, mode: str
) -> None:
    stub[0].answer = Said(status=503, pieces=[b"{}"])
    route = route_to(closed_port() if fault == "refused" else stub[1], answer_here=True, mode=mode)
    pipeline = fake_pipeline("balanced", generator=FakeGenerator("I answer from here."))
    with sidecar(route, pipeline=pipeline) as (url, _):
        heard = WIRES[wire](url, "Capital?", stream=stream)

    assert heard.text.strip() == "I answer from here."
    assert heard.last["mixture"].startswith("hhh@")


def test_weights_are_told_in_words_where_a_route_says_so(watchful: Policies, stub: tuple[Stub, str]) -> None:
    route = route_to(stub[1], instruct=True, mode="annotate")
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "system", "content": "Be brief."}, user("Is it true?")]},
        "/v1/messages": {"system": "Be brief.", "messages": [user("Is it true?")]},
        "/v1/responses": {"instructions": "Be brief.", "input": "Is it true?"},
    }
    reader = FakeReader({"true": {"needs.honest": 5.0}})
    with sidecar(route, policy=watchful(), reader=reader) as (url, _):
        for path, body in bodies.items():
            ask(url, path=path, body=body)

    chat, messages, responses = (a.json for a in stub[0].asked)
    assert [m["role"] for m in chat["messages"]] == ["system", "system", "user"]
    for told in (chat["messages"][1]["content"], messages["system"], responses["instructions"]):
        assert "Say what you do not know" in told
    assert messages["system"].startswith("Be brief.")


ROUTES = """\
version: 1
mode: annotate
upstreams:
  main: {url: "MAIN/v1", api_key_env: MAIN_KEY}
  claude: {url: "OTHER", api_key_env: CLAUDE_KEY, api_key_header: x-api-key, model: their-name}
routes:
  - {name: ours, models: ["ours-*"], mode: observe, to: main}
  - {name: theirs, paths: ["/v1/messages", "/v1/messages/*"], to: claude}
  - {name: rest, paths: ["/v1/chat/*"], to: [{upstream: claude, weight: 0}, {upstream: main, weight: 1}]}
"""


def test_routes_take_requests_by_path_and_model_with_keys_of_their_own(stub: tuple[Stub, str]) -> None:
    other = Stub(Model())
    with served_app(other) as url_of_other:
        text = ROUTES.replace("MAIN", stub[1]).replace("OTHER", url_of_other.removesuffix("/v1"))
        text = text.replace(f"{stub[1]}_KEY", "MAIN_KEY")
        config = make_config(parse_proxy_file(text.encode()), environ={"MAIN_KEY": "k1", "CLAUDE_KEY": "k2"})
        with sidecar(list(config.routes)) as (url, _):
            mine = [("Authorization", "Bearer sk-app"), ("Content-Type", "application/json")]
            chat = {"model": "ours-1", "messages": [user("Hi")]}
            ask(url, body=chat, headers=mine)
            _, headers, _ = ask(url, body={**chat, "model": "m"}, headers=mine)
            ask(url, path="/v1/messages", body={**chat, "model": "m"}, headers=mine)
            nowhere = ask(url, "GET", "/v1/models", None, [])

    assert [a.header("authorization") for a in stub[0].asked] == [["Bearer k1"], ["Bearer k1"]]
    assert [(a.header("x-api-key"), a.header("authorization")) for a in other.asked] == [(["k2"], [])]
    assert other.asked[0].json["model"] == "their-name"
    assert dict(headers)["x-hhh-upstream"] == "main"
    assert nowhere[0] == 404
    assert "no route" in json.loads(nowhere[2])["error"]["message"]


def test_official_clients_reach_our_own_server_through_a_sidecar(watchful: Policies) -> None:
    """Both doors guard: the sidecar reads what our own server, mixture and all, answers."""
    behind = fake_pipeline("balanced", generator=FakeGenerator("Paris it is."))
    with served(behind) as own, sidecar(route_to(own), policy=watchful()) as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            chat = client.chat.completions.create(model="hhh-auto", messages=[user("Capital?")])
            chunks = list(client.chat.completions.create(model="hhh-auto", messages=[user("Capital?")], stream=True))
            response = client.responses.create(model="hhh-auto", input="Capital?")
            with client.responses.stream(model="hhh-auto", input="Capital?") as events:
                streamed = list(events)[-1]
            models = [m.id for m in client.models.list()]
            verdict = client.moderations.create(input="Capital?", model="hhh-auto")
        with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client_a:
            message = client_a.messages.create(model="hhh-auto", max_tokens=9, messages=[user("Capital?")])
            tokens = client_a.messages.count_tokens(model="hhh-auto", messages=[user("Capital?")])

    blocks = [chat.model_extra, chunks[-1].model_extra, response.model_extra, message.model_extra]
    assert {b["hhh"]["policy"]["name"] for b in blocks if b} == {"watchful"}  # the sidecar's, not the server's
    assert chat.choices[0].message.content == "Paris it is."
    assert response.output_text == message.content[0].text == "Paris it is."
    assert streamed.type == "response.completed"
    assert "hhh-auto" in models
    assert verdict.results[0].flagged is False
    assert tokens.input_tokens > 0


TOOLS = """\
version: 1
name: tools
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0.5
checkpoints:
  input:
    - {when: {model: [claude-*]}, then: escalate, upstream: strong}
    - {then: allow}
  output: [{then: allow}]
  tool_call:
    - {when: {tool.name: [delete_*, "send"]}, then: block, message: "Not that tool."}
    - {then: allow}
mode: enforce
on_error: closed
stream: {window_tokens: 3}
"""


@pytest.fixture
def tools_policy(tmp_path: Path) -> Path:
    path = tmp_path / "tools.yaml"
    path.write_text(TOOLS)
    return path


@pytest.mark.parametrize("wire", ["chat", "responses", "messages"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_call_that_the_policy_forbids_never_reaches_the_app(
    tools_policy: Path, stub: tuple[Stub, str], wire: str, stream: bool
) -> None:
    pipeline = fake_pipeline(tools_policy, door=SIDECAR)
    with sidecar(route_to(stub[1]), pipeline=pipeline) as (url, _):
        stopped = WIRES[wire](url, "use a tool", stream=stream)
        passed = WIRES[wire](url, "Capital?", stream=stream)

    assert "Not that tool." in stopped.text
    assert "'send'" not in stopped.everything
    assert stopped.last["decisions"][-1]["checkpoint"] == "tool_call"
    assert passed.text.strip() == GOOD


@pytest.mark.parametrize("wire", ["chat", "responses", "messages"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_call_that_the_policy_allows_passes_as_it_came(
    tools_policy: Path, stub: tuple[Stub, str], wire: str, stream: bool
) -> None:
    tools_policy.write_text(TOOLS.replace(', "send"', ""))
    path, body = {
        "chat": ("/v1/chat/completions", {"messages": [user("use a tool")]}),
        "responses": ("/v1/responses", {"input": "use a tool"}),
        "messages": ("/v1/messages", {"messages": [user("use a tool")]}),
    }[wire]
    body = {**body, "model": "m", "stream": stream}
    _, _, direct = ask(stub[1], path=path, body=body)
    with sidecar(route_to(stub[1]), pipeline=fake_pipeline(tools_policy, door=SIDECAR), block="none") as (url, _):
        _, _, through = ask(url, path=path, body=body)

    assert through == direct
    assert b"send" in through


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_arguments_are_judged_by_their_values(tools_policy: Path, stub: tuple[Stub, str], stream: bool) -> None:
    for value, stops in (("poison", True), ("other", False)):
        rule = f'{{when: {{tool.arguments.x: [{value}]}}, then: block, message: "Not that value."}}'
        old = '{when: {tool.name: [delete_*, "send"]}, then: block, message: "Not that tool."}'
        tools_policy.write_text(TOOLS.replace(old, rule))
        with sidecar(route_to(stub[1]), pipeline=fake_pipeline(tools_policy, door=SIDECAR)) as (url, _):
            heard = WIRES["chat"](url, "use a tool", stream=stream)

        assert ("Not that value." in heard.text) is stops
        assert ("send" in heard.everything) is not stops


def test_of_two_calls_none_leaves_when_the_second_is_forbidden(tools_policy: Path, stub: tuple[Stub, str]) -> None:
    def call(index: int, name: str | None, arguments: str) -> dict[str, Any]:
        function = {"arguments": arguments, **({"name": name} if name else {})}
        piece = {"index": index, "function": function, **({"id": f"c{index}"} if name else {})}
        return {"id": "x", "choices": [{"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None}]}

    events = [call(0, "look", ""), call(0, None, '{"a":'), call(0, None, " 1}"), call(1, "delete_all", "{}")]
    last = {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    kind = [(b"content-type", b"text/event-stream")]
    stub[0].answer = Said(headers=kind, pieces=sse(*events, last, "[DONE]"))
    with sidecar(route_to(stub[1]), pipeline=fake_pipeline(tools_policy, door=SIDECAR)) as (url, _):
        heard = WIRES["chat"](url, "Hi", stream=True)

    assert "name='delete_all'" not in heard.everything
    assert "name='look'" not in heard.everything
    assert "Not that tool." in heard.text


def test_a_rule_names_the_upstream_that_it_escalates_to(tools_policy: Path, stub: tuple[Stub, str]) -> None:
    strong = Stub(Model())
    with served_app(strong) as url_of_strong:
        other = replace(route_to(url_of_strong).to[0][0], name="strong")
        pipeline = fake_pipeline(tools_policy, door=SIDECAR)
        with sidecar(route_to(stub[1]), pipeline=pipeline, others=(other,)) as (url, _):
            body = {"model": "claude-9", "messages": [user("Hi")]}
            _, headers, _ = ask(url, body=body)

    assert dict(headers)["x-hhh-upstream"] == "strong"
    assert (len(stub[0].asked), len(strong.asked)) == (0, 1)


def test_a_rule_that_escalates_to_nobody_is_found_at_the_start(tools_policy: Path) -> None:
    with pytest.raises(PolicyError, match="'strong' is no upstream here"):
        plan_sidecar(policy=str(tools_policy), bundle=None, upstream="http://x", config=None, mode=None, audit="none")


@pytest.mark.parametrize("mode", ["enforce", "annotate"])
def test_a_rules_steering_goes_to_the_upstream_where_it_is_enforced(
    tools_policy: Path, stub: tuple[Stub, str], mode: str
) -> None:
    rule = '{when: {text: tax}, then: flag, steering: "Recommend an adviser."}'
    tools_policy.write_text(TOOLS.replace("{when: {model: [claude-*]}, then: escalate, upstream: strong}", rule))
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [user("a tax question")]},
        "/v1/completions": {"prompt": "a tax question"},
        "/v1/messages": {"messages": [user("a tax question")]},
        "/v1/responses": {"input": "a tax question"},
    }
    pipeline = fake_pipeline(tools_policy, door=SIDECAR)
    with sidecar(route_to(stub[1], mode=mode), pipeline=pipeline) as (url, _):
        for path, body in bodies.items():
            ask(url, path=path, body=body)
        ask(url, body={"messages": [user("another question")]})

    told = ["Recommend an adviser." in a.body.decode() for a in stub[0].asked]
    assert told == [mode == "enforce"] * 4 + [False]


def chat_of(text: str, names: list[str]) -> tuple[str, Any, list[Any], bool]:
    def chunk(delta: Any, reason: str | None = None) -> Any:
        return {"id": "x", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    calls = [{"index": i, "id": f"c{i}", "function": {"name": n, "arguments": "{}"}} for i, n in enumerate(names)]
    events = [*(chunk({"content": f"{w} "}) for w in text.split()), *(chunk({"tool_calls": [c]}) for c in calls)]
    body = {"messages": [user("Hi")]}
    return "/v1/chat/completions", body, [*events, chunk({}, "tool_calls"), "[DONE]"], False


def messages_of(text: str, names: list[str]) -> tuple[str, Any, list[Any], bool]:
    def block(index: int, start: Any, *deltas: Any) -> list[Any]:
        told = [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        begun = {"type": "content_block_start", "index": index, "content_block": start}
        return [begun, *told, {"type": "content_block_stop", "index": index}]

    words = [{"type": "text_delta", "text": f"{w} "} for w in text.split()]
    whole = {"type": "input_json_delta", "partial_json": "{}"}
    uses = [
        event
        for i, name in enumerate(names, 1)
        for event in block(i, {"type": "tool_use", "id": f"t{i}", "name": name, "input": {}}, whole)
    ]
    start = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": {}}
    end = [{"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {}}, {"type": "message_stop"}]
    text_block = block(0, {"type": "text", "text": ""}, *words)
    events = [{"type": "message_start", "message": start}, *text_block, *uses]
    return "/v1/messages", {"messages": [user("Hi")], "max_tokens": 9}, [*events, *end], True


def responses_of(text: str, names: list[str]) -> tuple[str, Any, list[Any], bool]:
    head = {"id": "r", "object": "response", "model": "m", "status": "in_progress", "output": []}
    message = {"id": "i0", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    where = {"item_id": "i0", "output_index": 0, "content_index": 0}
    events: list[Any] = [
        {"type": "response.created", "response": head},
        {"type": "response.output_item.added", "output_index": 0, "item": message},
        {
            "type": "response.content_part.added",
            **where,
            "part": {"type": "output_text", "text": "", "annotations": []},
        },
        *({"type": "response.output_text.delta", **where, "delta": f"{w} "} for w in text.split()),
    ]
    for i, name in enumerate(names, 1):
        item = {"id": f"f{i}", "type": "function_call", "call_id": f"c{i}", "name": name, "arguments": "{}"}
        events += [
            {"type": "response.output_item.added", "output_index": i, "item": {**item, "arguments": ""}},
            {"type": "response.function_call_arguments.delta", "item_id": f"f{i}", "output_index": i, "delta": "{}"},
            {"type": "response.output_item.done", "output_index": i, "item": item},
        ]
    events.append({"type": "response.completed", "response": {**head, "status": "completed"}})
    return "/v1/responses", {"input": "Hi"}, [{**e, "sequence_number": n} for n, e in enumerate(events)], True


@pytest.mark.parametrize("made", [chat_of, messages_of, responses_of], ids=["chat", "messages", "responses"])
def test_a_call_that_is_forbidden_amid_a_stream_ends_it_in_the_wires_way(
    tools_policy: Path, stub: tuple[Stub, str], made: Callable[..., tuple[str, Any, list[Any], bool]]
) -> None:
    path, body, events, names = made("I will look at it and then I delete", ["look", "delete_all", "look_again"])
    stub[0].answer = Said(headers=[(b"content-type", b"text/event-stream")], pieces=sse(*events, names=names))
    tools = [{"type": "function", "function": {"name": n}} for n in ("z", "delete_all", "a")]
    with sidecar(route_to(stub[1]), pipeline=fake_pipeline(tools_policy, door=SIDECAR)) as (url, _):
        _, _, said = ask(url, path=path, body={**body, "model": "m", "stream": True, "tools": tools})

    told = [json.loads(f.split(b"data: ")[1]) for f in said.split(b"\n\n") if b"data: {" in f]
    assert stub[0].asked[0].json["tools"] == tools  # never dropped, never in another order
    for event in told:  # what was decided tells the tool's name, of course
        event.pop("hhh", None)
        event.get("response", {}).pop("hhh", None)
    heard = json.dumps(told)
    assert "I " in heard
    assert "Not that tool." in heard
    assert "delete_all" not in heard
    assert "look_again" not in heard
    if path == "/v1/messages":
        starts, stops = (
            [event["index"] for event in told if event["type"] == f"content_block_{kind}"] for kind in ("start", "stop")
        )
        assert starts == stops == list(range(len(starts)))
        assert [e["delta"]["stop_reason"] for e in told if e["type"] == "message_delta"] == ["refusal"]
        assert told[-1]["type"] == "message_stop"
    elif path == "/v1/responses":
        assert [e["sequence_number"] for e in told] == list(range(len(told)))
        assert told[-1]["type"] == "response.incomplete"
    else:
        assert told[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert said.rstrip().endswith(b"data: [DONE]")
