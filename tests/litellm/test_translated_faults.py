"""What goes wrong behind a translated upstream, and what is not to be had there, told in the client's own wire."""

import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litellm", reason="LiteLLM has an environment of its own: make test-litellm")

import anthropic
import openai

from hhh_router.errors import SettingsError
from hhh_router.interfaces.proxy.config import make_config, parse_proxy_file
from hhh_router.interfaces.proxy.hedging import Hedge
from hhh_router.interfaces.proxy.routes import Route
from hhh_router.interfaces.proxy.upstreams import Breaker, Timeouts, Upstream
from tests.e2e.loopback import served_app
from tests.e2e.sidecars import Asked, Said, Stub, ask, closed_port, sidecar, sse
from tests.e2e.test_sidecar_guarded import EVENTS, GOOD, WIRES, Model, by_chat

from .providers import KEY, Policies, guarded, translated

pytestmark = [pytest.mark.e2e, pytest.mark.litellm, pytest.mark.filterwarnings("default")]  # it warns of itself

TURNS = [{"role": "user", "content": "Hi"}]
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": TURNS}),
    "completions": ("/v1/completions", {"prompt": "Hi"}),
    "responses": ("/v1/responses", {"input": "Hi"}),
    "messages": ("/v1/messages", {"messages": TURNS, "max_tokens": 9}),
}
wires = pytest.mark.parametrize("wire", ASKED)
providers = pytest.mark.parametrize("provider", ["anthropic", "mistral"])
streams = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


def failing(status: int) -> Said:
    """An error that repeats the key it was sent."""
    error = {"type": "error", "error": {"type": "x", "message": f"told by the provider of {KEY}"}}
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"7")]
    return Said(status=status, headers=headers, pieces=[json.dumps(error).encode()])


@wires
@providers
@streams
@pytest.mark.parametrize("status", [401, 413, 429, 503, 529])
def test_an_error_keeps_its_status_and_is_put_in_the_clients_shape(
    watchful: Policies, provider: str, wire: str, stream: bool, status: int
) -> None:
    path, body = ASKED[wire]

    with guarded(watchful, provider, failing(status)) as (url, stub):
        got, headers, data = ask(url, path=path, body={**body, "stream": stream})

    assert got == (529 if (wire, status) == ("messages", 503) else status)
    assert dict(headers)["retry-after"] == "7"
    assert len(stub.asked) == 1
    told = json.loads(data)
    assert told["error"]["message"].endswith("told by the provider of [key]")
    assert (told.get("type") == "error") is (wire == "messages")
    assert KEY not in data.decode()


def test_official_clients_raise_their_own_errors(watchful: Policies) -> None:
    with (
        guarded(watchful, "anthropic", failing(429)) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="sk-app", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as raised,
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    with (
        guarded(watchful, "mistral", failing(429)) as (url, _),
        anthropic.Anthropic(base_url=url, api_key="sk-app", max_retries=0) as other,
        pytest.raises(anthropic.RateLimitError),
    ):
        other.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])

    assert raised.value.response.headers["retry-after"] == "7"


def test_what_the_provider_does_not_take_is_told_or_left_out(watchful: Policies) -> None:
    path, body = ASKED["chat"]
    asked = {**body, "logit_bias": {"5": 1}}

    with guarded(watchful, "anthropic", Model()) as (url, stub):
        status, _, data = ask(url, path=path, body=asked)
    with guarded(watchful, "anthropic", Model(), drop_params=True) as (url, dropping):
        dropped, _, _ = ask(url, path=path, body=asked)

    error = json.loads(data)["error"]
    assert (status, error["code"], stub.asked) == (400, "unsupported_parameter", [])
    assert "logit_bias" in error["message"]
    assert "litellm_settings" not in error["message"]
    assert (dropped, len(dropping.asked)) == (200, 1)


@pytest.mark.parametrize(
    ("wire", "more", "status"),
    [
        ("chat", {"messages": 5}, 400),
        ("chat", {"messages": [{"role": "user", "content": 7}]}, 422),
        ("chat", {"max_tokens": "many"}, 422),
        ("chat", {"response_format": {"type": "json_schema"}}, 422),
        ("completions", {"prompt": [1, 2]}, 422),
        ("responses", {"reasoning": 5}, 422),
        ("messages", {"metadata": 5}, 422),
    ],
)
def test_what_cannot_be_translated_is_the_callers_and_opens_no_breaker(
    watchful: Policies, caplog: pytest.LogCaptureFixture, wire: str, more: dict[str, Any], status: int
) -> None:
    path, body = ASKED[wire]
    breaker = Breaker(after=1, pause_s=60)

    with guarded(watchful, "anthropic", Model(), "observe", breaker=breaker) as (url, stub):
        got, _, data = ask(url, path=path, body={**body, **more})
        again, _, _ = ask(url, path=path, body=body)

    assert (got, again, len(stub.asked)) == (status, 200, 1)
    assert b"Traceback" not in data
    assert "cannot translate" not in caplog.text


def test_no_words_of_a_prompt_reach_a_log_when_a_provider_quotes_it(
    watchful: Policies, caplog: pytest.LogCaptureFixture
) -> None:
    said = json.dumps({"error": {"message": "no: xyzzy-of-the-prompt"}}).encode()
    path, body = ASKED["chat"]

    with guarded(watchful, "mistral", Said(status=500, pieces=[said])) as (url, _):
        _, _, data = ask(url, path=path, body=body)

    assert b"xyzzy" in data
    assert "xyzzy" not in caplog.text


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x.png", "http://169.254.169.254/latest", Path("/etc/passwd").as_uri()]
)
def test_images_are_not_fetched_from_within(watchful: Policies, url: str) -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}

    with guarded(watchful, "anthropic", Model(), "observe") as (base, stub):
        status, _, _ = ask(base, body={"messages": [picture]})

    assert status in (400, 422)
    assert stub.asked == []


@pytest.mark.parametrize("where", ["nobody there", "overloaded", "silent"])
def test_another_upstream_answers_when_the_provider_does_not(watchful: Policies, where: str) -> None:
    held = Said(hold=threading.Event(), pieces=[b"{}"], headers=[])
    stub = Stub(held if where == "silent" else failing(529))
    breaker = Breaker(after=1, pause_s=60)
    with served_app(stub) as theirs, served_app(Stub(Model())) as other:
        base = closed_port() if where == "nobody there" else theirs.removesuffix("/v1")
        first = translated("anthropic/claude-sonnet-4-5", base, timeouts=Timeouts(first_byte_s=1.0), breaker=breaker)
        route = Route(name="all", to=((first, 1.0),), fallback=(Upstream(name="b", url=other),))
        with sidecar(route, policy=watchful()) as (url, _):
            heard = by_chat(url, "Capital?", stream=True)
            again = by_chat(url, "Capital?", stream=True)

    assert heard.text.strip() == again.text.strip() == GOOD
    assert breaker.wait_s > 0  # so that it was not asked the second time
    assert len(stub.asked) == (0 if where == "nobody there" else 1)


def test_a_hedge_answers_beside_a_silent_provider_which_is_hung_up_on(watchful: Policies) -> None:
    stub = Stub(Said(hold=threading.Event(), pieces=[b"{}"]))
    with served_app(stub) as theirs, served_app(Stub(Model())) as other:
        first = translated("anthropic/claude-sonnet-4-5", theirs.removesuffix("/v1"))
        second = translated("mistral/mistral-large-latest", other, name="b")
        route = Route(name="all", to=((first, 1.0),), hedge=Hedge(to=second, after_s=0.3))
        with sidecar(route, policy=watchful()) as (url, _):
            status, headers, data = ask(url, body={"messages": TURNS})
            until = time.monotonic() + 5
            while not stub.left and time.monotonic() < until:
                time.sleep(0.02)

    assert (status, json.loads(data)["choices"][0]["message"]["content"]) == (200, GOOD)
    assert (dict(headers)["x-hhh-upstream"], dict(headers)["x-hhh-hedge"]) == ("b", "won")
    assert stub.left == 1


@wires
@providers
@pytest.mark.parametrize("mode", ["observe", "enforce"])
def test_silence_within_a_stream_ends_it_with_the_wires_own_error(
    watchful: Policies, provider: str, wire: str, mode: str
) -> None:
    model = Model()

    def stuck(asked: Asked) -> Said:
        said = model(asked)
        return Said(headers=said.headers, pieces=said.pieces[:9], hold=threading.Event())

    path, body = ASKED[wire]
    with guarded(watchful, provider, stuck, mode, timeouts=Timeouts(first_byte_s=20, idle_s=0.6)) as (url, stub):
        status, _, data = ask(url, path=path, body={**body, "stream": True})
        until = time.monotonic() + 5
        while not stub.left and time.monotonic() < until:
            time.sleep(0.02)

    if status == 200:  # something was cleared before
        assert b"fell silent" in data.split(b"\n\n")[-2]
    else:
        assert (status, mode) == (504, "enforce")
    assert stub.left == 1


@wires
@providers
@pytest.mark.parametrize("mode", ["observe", "enforce"])
def test_a_client_that_leaves_cancels_the_providers_work(
    watchful: Policies, provider: str, wire: str, mode: str
) -> None:
    model = Model()

    def slow(asked: Asked) -> Said:
        said = model(asked)
        return Said(headers=said.headers, pieces=said.pieces, pause_s=0.1, hold=threading.Event())

    path, body = ASKED[wire]
    with guarded(watchful, provider, slow, mode) as (url, stub):
        host, port = url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
        if mode == "observe":
            response = connection.getresponse()
            response.read1(10)
            response.close()
        else:
            while not stub.sent:
                time.sleep(0.02)
        connection.close()
        until = time.monotonic() + 5
        while not stub.left and time.monotonic() < until:
            time.sleep(0.02)

    assert stub.left == 1


def test_a_slow_provider_is_a_timeout(watchful: Policies) -> None:
    said = Said(pieces=[b"{}"], hold=threading.Event())
    path, body = ASKED["messages"]

    with guarded(watchful, "mistral", said, timeouts=Timeouts(first_byte_s=0.5)) as (url, _):
        status, _, data = ask(url, path=path, body=body)

    assert (status, json.loads(data)["error"]["type"]) == (504, "timeout_error")


def test_what_is_no_answer_of_the_provider_is_502(watchful: Policies) -> None:
    path, body = ASKED["chat"]
    said = Said(pieces=[b"<html>"], headers=[(b"content-type", b"text/html")])

    with guarded(watchful, "mistral", said) as (url, _):
        status, _, data = ask(url, path=path, body=body)

    assert status == 502, data
    assert b"Traceback" not in data


# -- Google's, whose wire is neither ----------------------------------------------------------------------------------


def gemini(asked: Asked) -> Said:
    usage = {"promptTokenCount": 3, "candidatesTokenCount": 4, "totalTokenCount": 7}

    def part(**said: Any) -> dict[str, Any]:
        return {"candidates": [{"index": 0, "content": {"role": "model", "parts": [said]}}], "modelVersion": "g"}

    def ended(body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "candidates": [{**body["candidates"][0], "finishReason": "STOP"}], "usageMetadata": usage}

    if b"tools" in asked.body:
        call = {"name": "send", "args": {"x": 1}}
        return Said(pieces=[json.dumps(ended(part(functionCall=call, thoughtSignature="c2ln"))).encode()])
    if b"streamGenerateContent" not in asked.target:
        return Said(pieces=[json.dumps(ended(part(text=GOOD))).encode()])
    words = [part(text=f"{w} ") for w in GOOD.split()]
    return Said(headers=EVENTS, pieces=sse(*words[:-1], ended(words[-1])))


@wires
@streams
def test_gemini_answers_in_every_wire(watchful: Policies, wire: str, stream: bool) -> None:
    stub = Stub(gemini)
    with served_app(stub) as theirs:
        upstream = translated("gemini/gemini-2.5-flash", theirs.removesuffix("/v1"))
        with sidecar(Route(name="all", to=((upstream, 1.0),)), policy=watchful()) as (url, _):
            heard = WIRES[wire](url, "Capital?", stream=stream)

    assert heard.text.strip() == GOOD
    assert heard.last["policy"]["name"] == "watchful"
    assert "gemini-2.5-flash" in stub.asked[0].target.decode()


def test_a_call_of_a_tool_keeps_what_gemini_wants_back(watchful: Policies) -> None:
    tools = [{"type": "function", "function": {"name": "send", "parameters": {"type": "object"}}}]
    stub = Stub(gemini)
    with served_app(stub) as theirs:
        upstream = translated("gemini/gemini-2.5-flash", theirs.removesuffix("/v1"))
        with sidecar(Route(name="all", to=((upstream, 1.0),)), policy=watchful()) as (url, _):
            _, _, data = ask(url, body={"messages": TURNS, "tools": tools})
            turn = json.loads(data)["choices"][0]["message"]
            result = {"role": "tool", "tool_call_id": turn["tool_calls"][0]["id"], "content": "done"}
            ask(url, body={"messages": [*TURNS, turn, result], "tools": tools})

    assert turn["tool_calls"][0]["function"] == {"name": "send", "arguments": '{"x": 1}'}
    assert b"c2ln" in stub.asked[1].body


# -- what else there is -----------------------------------------------------------------------------------------------


def test_vectors_are_had_through_openais_client(watchful: Policies) -> None:
    vector = {"object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -2.0]}]}
    stub = Stub(Said(pieces=[json.dumps({**vector, "usage": {"prompt_tokens": 1, "total_tokens": 1}}).encode()]))
    with served_app(stub) as theirs:
        upstream = translated("mistral/mistral-embed", theirs)
        with (
            sidecar(Route(name="all", to=((upstream, 1.0),)), policy=watchful()) as (url, _),
            openai.OpenAI(base_url=f"{url}/v1", api_key="sk-app", max_retries=0) as client,
        ):
            made = client.embeddings.create(model="m", input=["Hi"])
            [listed] = client.models.list().data

    assert made.data[0].embedding == [0.5, -2.0]
    assert stub.asked[0].json["model"] == "mistral-embed"
    assert listed.id == "mistral/mistral-embed"


def test_files_are_not_translated(watchful: Policies) -> None:
    with guarded(watchful, "mistral", Model()) as (url, stub):
        status, _, data = ask(url, "GET", "/v1/files", headers=[])

    assert (status, json.loads(data)["error"]["code"]) == (501, "path_not_translated")
    assert stub.asked == []


@pytest.mark.parametrize("field", ["api_base", "api_key", "custom_llm_provider", "litellm_metadata", "mock_response"])
@wires
def test_a_caller_cannot_reach_litellms_own_options(watchful: Policies, wire: str, field: str) -> None:
    path, body = ASKED[wire]

    with guarded(watchful, "anthropic", Model()) as (url, stub):
        status, _, _ = ask(url, path=path, body={**body, field: "http://127.0.0.1:9"})

    assert (status, stub.asked) == (400, [])


def test_an_upstream_of_the_file_is_opened_with_its_own_key() -> None:
    text = (
        "version: 1\nupstreams:\n  gem: {litellm: gemini/gemini-2.5-flash, api_key_env: GEM, retries: 2}\n"
        "routes: [{to: gem}]\n"
    )

    config = make_config(parse_proxy_file(text.encode()), environ={"GEM": KEY})

    [upstream] = config.upstreams()
    assert (upstream.name, upstream.url, upstream.retries) == ("gem", "litellm:gemini/gemini-2.5-flash", 2)
    assert upstream.translator is not None
    assert KEY not in repr(config)
    assert upstream.headers == {}


def test_a_provider_that_nobody_knows_is_told_with_its_line() -> None:
    text = "version: 1\nupstreams:\n  gem: {litellm: gemeni/gemini-2.5-flash}\nroutes: [{to: gem}]\n"

    with pytest.raises(SettingsError, match=r"p\.yaml:3  upstreams\.gem\.litellm: LiteLLM knows no provider"):
        make_config(parse_proxy_file(text.encode(), source="p.yaml"))
