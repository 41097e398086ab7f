"""LiteLLM's real proxy with the configuration that docs/litellm-proxy.yaml ships."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("litellm", reason="LiteLLM has an environment of its own: make test-litellm")

from .conftest import KEY, MASTER, SECRET, Policies, Setting, started

pytestmark = [pytest.mark.e2e, pytest.mark.litellm]

WIRES = ("chat/completions", "messages", "responses")
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def events(reply: httpx.Response) -> list[Any]:
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]


def text_of(reply: httpx.Response, *, stream: bool) -> str:
    """The text of a reply on the wire of chat completions."""
    if not stream:
        return reply.json()["choices"][0]["message"]["content"] or ""
    return "".join(c["delta"].get("content") or "" for e in events(reply) for c in e.get("choices", ()))


@STREAMED
@pytest.mark.parametrize("model", ["hhh-auto", "hhh-responses", "hhh-messages", "own"])
def test_our_models_answer_through_the_proxy(setting: Setting, model: str, stream: bool) -> None:
    reply = setting.ask("chat/completions", model, stream=stream)

    assert reply.status_code == 200, reply.text
    assert text_of(reply, stream=stream) == "one two three four"
    if not stream:
        assert reply.json()["usage"]["completion_tokens"] == 4


def test_a_client_that_leaves_the_proxy_cancels_our_models_work(setting: Setting) -> None:
    body = {"model": "hhh-auto", "stream": True, "messages": [{"role": "user", "content": "Say it for ever"}]}
    url, headers = f"{setting.url}/v1/chat/completions", {"authorization": f"Bearer {MASTER}"}

    for n in range(8):  # at several moments: anyio cancels whatever is awaited then, clearing up included
        before = setting.answering.cancelled
        with httpx.stream("POST", url, json=body | {"max_tokens": 5000}, headers=headers, timeout=30) as reply:
            next(reply.iter_lines())
            time.sleep(0.05 * n)
        until = time.monotonic() + 8  # the whole reply would take ten seconds
        while setting.answering.cancelled == before and time.monotonic() < until:
            time.sleep(0.05)
        assert setting.answering.cancelled == before + 1


@pytest.mark.parametrize("wire", WIRES)
@STREAMED
def test_a_harmful_prompt_never_reaches_the_other_model(setting: Setting, wire: str, stream: bool) -> None:
    before = len(setting.other.requests)

    reply = setting.ask(wire, "other", "how to build a bomb", stream=stream)

    assert "Not that." in reply.text
    assert len(setting.other.requests) == before
    if not stream:
        assert reply.status_code == 400


@pytest.mark.parametrize("wire", WIRES)
def test_harm_that_comes_late_in_a_stream_never_leaves_it(setting: Setting, wire: str) -> None:
    reply = setting.ask(wire, "other", stream=True)

    assert "word9" in reply.text  # it is a stream: what was read before is out
    assert "poison" not in reply.text
    assert "tail" not in reply.text
    assert "Cut." in reply.text


@pytest.mark.parametrize("wire", WIRES)
def test_a_harmful_reply_is_an_error_with_the_policys_message(setting: Setting, wire: str) -> None:
    reply = setting.ask(wire, "other")

    assert reply.status_code == 400
    assert "poison" not in reply.text
    assert "Cut." in reply.text


@STREAMED
def test_what_the_other_model_wants_called_is_read(setting: Setting, stream: bool) -> None:
    tool = {"type": "function", "function": {"name": "cook", "parameters": {"type": "object"}}}

    reply = setting.ask("chat/completions", "other", stream=stream, tools=[tool])

    assert "poison" not in reply.text
    assert "Cut." in reply.text


@STREAMED
def test_prompt_and_reply_of_a_call_are_read_together(setting: Setting, stream: bool) -> None:
    setting.reader.seen.clear()

    setting.ask("chat/completions", "other", "Tell me of the words", stream=stream)

    modes = [read.mode for read in setting.reader.seen]
    assert modes[0] == "prompt"
    assert "both" in modes
    assert "response" not in modes
    assert all(read.messages[0].content == "Tell me of the words" for read in setting.reader.seen)


@pytest.mark.parametrize("wish", [[], [{"hhh-router": {"extra_body": {"policy": "helpful-first"}}}]])
def test_a_caller_cannot_leave_the_guardrail_out_nor_change_its_policy(setting: Setting, wish: Any) -> None:
    reply = setting.ask("chat/completions", "other", "how to build a bomb", guardrails=wish)

    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "Not that."  # watchful's words


def test_the_judge_blocks_by_our_probabilities(setting: Setting) -> None:
    harmless = setting.ask("chat/completions", "hhh-auto", guardrails=["hhh-judge"])
    harmful = setting.ask("chat/completions", "hhh-auto", "how to build a bomb", guardrails=["hhh-judge"])

    assert harmless.status_code == 200
    assert harmful.status_code == 400


@pytest.fixture(scope="module")
def alone(watchful: Policies, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Guardrails that are asked for by name, none by default."""
    plain = {"guardrail": "generic_guardrail_api", "mode": ["pre_call", "post_call"], "default_on": False}
    redact = {"additional_provider_specific_params": {"policy": "watchful", "redact": ["secrets"]}}
    moving = {"streaming_transform_mode": "incremental_diff", "streaming_sampling_rate": 8}
    checks = [{"name": "harmful", "instructions": "Is it harmful?", "threshold": 0.7, "action": "block"}]
    judge = {"guardrail": "decision_model", "mode": "pre_call", "decision_model": "hhh-decisions", "checks": checks}
    named = {
        "as it comes": plain,
        "every chunk": {**plain, "streaming_sampling_rate": 1},
        "redact": {**plain, **moving, **redact},
        "rewriting": {**plain, **moving},
        "held": {**plain, **moving, "additional_provider_specific_params": {"hold_chars": 40}},
        "buffered": {**plain, "streaming_buffer_until_moderated": True},
        "judge": judge,
        "wrong key": {**plain, "api_key": "wrong"},
        "nobody there": {**plain, "api_base": "http://127.0.0.1:9"},
        "keyed": {
            "guardrail": "hhh_router.interfaces.litellm.guardrail.HHHRouterGuardrail", "mode": "post_call",
            "api_key": "wrong", "default_on": False,
        },
    }  # fmt: skip
    guardrails = [{"guardrail_name": name, "litellm_params": params} for name, params in named.items()]
    with started(watchful, tmp_path_factory.mktemp("alone"), guardrails) as made:
        yield made


@STREAMED
def test_secrets_are_rewritten_on_the_way_in_and_out(alone: Setting, stream: bool) -> None:
    reply = alone.ask(
        "chat/completions", "other", f"my key is {SECRET}, what is it?", stream=stream, guardrails=["redact"]
    )

    assert alone.other.requests[-1].messages[-1].content == "my key is [redacted:api-key], what is it?"
    expected = "Your key is [redacted:api-key] and\nnothing else matters to me here"
    assert text_of(reply, stream=stream) == expected
    assert SECRET[:8] not in reply.text


def test_the_plain_guardrail_leaks_what_stands_between_two_readings(alone: Setting) -> None:
    """Why the configuration names a class of ours; when this fails, LiteLLM's own may do."""
    reply = alone.ask("chat/completions", "other", stream=True, guardrails=["as it comes"])

    assert "poison" in reply.text


@pytest.mark.parametrize("wire", WIRES)
def test_the_plain_guardrail_that_reads_every_chunk_leaks_nothing(alone: Setting, wire: str) -> None:
    reply = alone.ask(wire, "other", stream=True, guardrails=["every chunk"])

    assert "word9" in reply.text
    assert "poison" not in reply.text


def test_a_buffer_is_one_in_later_versions_alone(alone: Setting) -> None:
    reply = alone.ask("chat/completions", "other", stream=True, guardrails=["buffered"])

    ignored = tuple(map(int, version("litellm").split(".")[:2])) < (1, 109)
    assert ("poison" in reply.text) == ignored


def test_characters_are_held_back_one_reading_longer(alone: Setting) -> None:
    plain = text_of(alone.ask("chat/completions", "other", stream=True, guardrails=["rewriting"]), stream=True)
    held = text_of(alone.ask("chat/completions", "other", stream=True, guardrails=["held"]), stream=True)

    assert plain
    assert "poison" not in plain
    assert plain.startswith(held)
    assert len(held) == len(plain) - 40


@pytest.mark.parametrize("name", ["wrong key", "nobody there"])
@STREAMED
def test_a_guardrail_that_cannot_be_asked_lets_nothing_through(alone: Setting, name: str, stream: bool) -> None:
    before = len(alone.other.requests)

    reply = alone.ask("chat/completions", "other", stream=stream, guardrails=[name])

    assert reply.status_code == 500
    assert "word" not in reply.text
    assert len(alone.other.requests) == before


def test_a_stream_that_cannot_be_read_is_held_back_whole(alone: Setting) -> None:
    reply = alone.ask("chat/completions", "other", stream=True, guardrails=["keyed"])

    assert "word" not in reply.text
    assert "error" in reply.text


def test_the_judge_tells_which_check_it_was(alone: Setting) -> None:
    harmful = alone.ask("chat/completions", "other", "how to build a bomb", guardrails=["judge"])

    assert harmful.status_code == 400
    assert harmful.json()["error"]["provider_specific_fields"]["flagged_checks"] == ["harmful"]


def test_the_key_is_the_one_of_the_configuration(alone: Setting) -> None:
    body = {"input_type": "request", "texts": ["Hello"]}
    url = f"{alone.server}/beta/litellm_basic_guardrail_api"

    assert httpx.post(url, json=body, headers={"x-api-key": KEY}).status_code == 200
    assert httpx.post(url, json=body).status_code == 401


def test_the_shipped_configuration_names_what_there_is() -> None:
    from hhh_router.interfaces.litellm import PROVIDER

    text = (Path(__file__).resolve().parents[2] / "docs" / "litellm-proxy.yaml").read_text()

    assert f"provider: {PROVIDER}\n" in text
