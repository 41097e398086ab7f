"""OpenAI's wire, without a server."""

import json
import math
from typing import Any

import pytest
from pydantic import SecretStr

from hhh_router.errors import (
    ContextTooLong,
    GeneratorError,
    InvalidRequest,
    MissingExtra,
    Overloaded,
    PolicyNotAllowed,
    Quarantined,
    SettingsError,
    Unavailable,
    UpstreamError,
)
from hhh_router.interfaces.sdk import HHHRouter
from hhh_router.interfaces.server.http import WireError, check_exposure, dump, failure
from hhh_router.interfaces.server.models import MODEL_NAMES, parse_model
from hhh_router.interfaces.server.openai import ChunkWriter, completion, parse_chat
from hhh_router.pipeline import ChatDelta, ChatFinished, TokenLogprob, Usage
from hhh_router.settings import Settings
from hhh_router.testing import fake_pipeline
from hhh_router.trace.block import Metadata
from hhh_router.types import Message, Sampling, Weights


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "hhh-auto", "messages": [{"role": "user", "content": "Hi"}], **fields}


def test_a_plain_body_is_understood() -> None:
    call = parse_chat(
        body(
            max_completion_tokens=9,
            temperature=0.5,
            top_p=0.9,
            seed=3,
            stop=["\n"],
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    sampling = call.request.sampling
    assert call.request.messages == (Message(role="user", content="Hi"),)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (
        9,
        0.5,
        0.9,
        3,
        ("\n",),
    )
    assert (call.stream, call.include_usage, call.model) == (True, True, "hhh-auto")
    assert call.request.not_inspected == ()


def test_the_developer_role_is_the_system_role_and_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "What"}, {"type": "image_url"}, {"type": "text", "text": "is it?"}]
    call = parse_chat(
        body(messages=[{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts, "name": "ada"}])
    )

    assert call.request.messages == (
        Message(role="system", content="Be kind"),
        Message(role="user", content="What\nis it?"),
    )
    assert call.request.not_inspected == ("messages[1].content[1]: image_url", "messages[1].name")


def test_unknown_harmless_fields_are_accepted_and_listed() -> None:
    call = parse_chat(body(user="u1", metadata={"a": "b"}, store=True, service_tier="auto", made_up=None, brand_new=1))

    assert call.request.not_inspected == ("user", "metadata", "store", "service_tier", "brand_new")


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "x"}]},
        {"function_call": {"name": "x"}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"web_search_options": {}},
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"^{next(iter(fields))}: not supported yet"):
        parse_chat(body(**fields))


def test_values_that_change_nothing_are_accepted() -> None:
    neutral = {"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "response_format": {"type": "text"}}

    call = parse_chat(body(**neutral, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, audio=None))

    assert call.request.not_inspected == ()
    assert call.request.sampling == Sampling()


SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}}


def test_sampling_fields_are_read() -> None:
    call = parse_chat(
        body(
            top_k=40,
            logit_bias={"5": -100, "07": 2.5},
            logprobs=True,
            top_logprobs=3,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}},
        )
    )

    sampling = call.request.sampling
    assert (sampling.top_k, sampling.logit_bias, sampling.top_logprobs) == (40, {5: -100, 7: 2.5}, 3)
    assert sampling.json_schema == json.dumps(SCHEMA, separators=(",", ":"))  # in the order it was sent
    assert call.request.not_inspected == ()


@pytest.mark.parametrize(
    ("fields", "top"),
    [
        ({}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"top_logprobs": 0}, None),
        ({"logprobs": None, "top_logprobs": None}, None),
    ],
)
def test_log_probabilities_are_told_when_asked_for(fields: dict[str, Any], top: int | None) -> None:
    assert parse_chat(body(**fields)).request.sampling.top_logprobs == top


def test_json_mode_is_the_schema_of_any_object() -> None:
    schema = parse_chat(body(response_format={"type": "json_object"})).request.sampling.json_schema

    assert json.loads(schema or "") == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"messages": None}, "messages: found null"),
        ({"messages": "hi"}, "messages: found a string"),
        ({"stream": "yes"}, "stream: found 'yes'"),
        ({"stream_options": 5}, "stream_options: no object"),
        ({"stop": 5}, "stop: found a number"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens: said twice"),
        ({"hhh": []}, None),
        ({"hhh": "balanced"}, "hhh: no object"),
        ({"hhh": {"polcy": "x"}}, "hhh.polcy: unknown field"),
        ({"hhh": {"policy": 5}}, "hhh.policy: no string"),
        ({"hhh": {"weights": "hhh@1"}}, "hhh.weights: "),
        ({"model": "hhh-auto:a", "hhh": {"policy": "b"}}, "policy: said twice, differently"),
        ({"model": "hhh-honest", "hhh": {"weights": {"helpful": 1}}}, "weights: said twice"),
        ({"model": None}, "model: missing"),
        ({"logprobs": 1}, "logprobs: found a number"),
        ({"top_logprobs": 3}, "top_logprobs: found without logprobs"),
        ({"logit_bias": []}, "logit_bias: found a list"),
        ({"logit_bias": {"-5": 1}}, "logit_bias: found token '-5'"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias: found token '9{40}'"),
        ({"response_format": "json"}, "response_format: found a string"),
        ({"response_format": {}}, r"response_format\.type: found null"),
        ({"response_format": {"type": "xml"}}, r"response_format\.type: found 'xml'"),
        ({"response_format": {"type": "json_schema"}}, r"response_format\.json_schema: found null"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            r"json_schema\.schema: found null",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}},
            r"json_schema\.schema: found a boolean",
        ),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], found: str | None) -> None:
    if found is None:
        parse_chat(body(**fields))
        return
    with pytest.raises(InvalidRequest, match=found):
        parse_chat(body(**fields))


TOLD = TokenLogprob(
    token="\\xe2",
    logprob=-0.5,
    bytes=(0xE2,),
    top_logprobs=(
        TokenLogprob(token="\\xe2", logprob=-0.5, bytes=(0xE2,)),
        TokenLogprob(token="<|mark|>", logprob=-math.inf, bytes=None),
    ),
)
TOLD_JSON = {
    "content": [
        {
            "token": "\\xe2",
            "logprob": -0.5,
            "bytes": [0xE2],
            "top_logprobs": [
                {"token": "\\xe2", "logprob": -0.5, "bytes": [0xE2]},
                {"token": "<|mark|>", "logprob": -9999.0, "bytes": None},
            ],
        }
    ],
    "refusal": None,
}


def record() -> Metadata:
    with HHHRouter(pipeline=fake_pipeline()) as router:
        return router.chat("Hi").metadata


def ended(**fields: Any) -> ChatFinished:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return ChatFinished(**({"text": "x", "finish_reason": "stop", "usage": usage, "metadata": record()} | fields))


@pytest.mark.parametrize(
    ("logprobs", "sent"), [((TOLD,), TOLD_JSON), (None, None), ((), {"content": [], "refusal": None})]
)
def test_a_whole_reply_tells_log_probabilities_in_openais_shape(logprobs: Any, sent: object) -> None:
    reply = completion(parse_chat(body()), ended(logprobs=logprobs))

    assert json.loads(dump(reply))["choices"][0]["logprobs"] == sent


def test_each_chunk_tells_its_own_log_probabilities_and_a_refusal_tells_none() -> None:
    writer = ChunkWriter(parse_chat(body(stream=True)), record())

    chunks = writer.delta(ChatDelta(text="a", logprobs=(TOLD,)))
    chunks += writer.delta(ChatDelta(text="b"))
    chunks += writer.delta(ChatDelta(text="No.", is_refusal=True))
    chunks += writer.end(ended(refusal="No.", logprobs=(TOLD,)))

    assert [c["choices"][0]["logprobs"] for c in chunks] == [None, TOLD_JSON, None, None, None]


def test_a_model_name_tells_mixture_and_policy() -> None:
    assert parse_model("hhh-auto").weights is None
    assert parse_model("hhh-harmless").weights == Weights(0.0, 0.0, 1.0, 0.0)
    assert parse_model("hhh@0-8-4-4").weights == Weights(0.0, 0.5, 0.25, 0.25)
    assert parse_model("hhh-auto:harmless-first").policy == "harmless-first"
    assert len(MODEL_NAMES) == 4


@pytest.mark.parametrize("name", ["gpt-4o", "hhh@1-1-1-1", "hhh-kind", "HHH-auto", "hhh@"])
def test_an_unknown_model_is_404_and_never_another_mixture(name: str) -> None:
    with pytest.raises(WireError) as raised:
        parse_model(name)

    assert (raised.value.status, raised.value.code) == (404, "model_not_found")
    assert raised.value.body["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequest("x", hint="y"), 400, "invalid_request_error", "invalid_request"),
        (ContextTooLong("x"), 400, "invalid_request_error", "context_length_exceeded"),
        (PolicyNotAllowed("x"), 403, "permission_error", "policy_not_allowed"),
        (GeneratorError("x"), 502, "server_error", "generator_error"),
        (Overloaded("x"), 429, "rate_limit_error", "overloaded"),
        (Unavailable("x"), 503, "server_error", "unavailable"),
        (Quarantined("x"), 500, "server_error", "quarantined"),
        (MissingExtra("model", needed_for="x"), 501, "server_error", "missing_extra"),
        (UpstreamError("x", status=500, body={"error": {}}), 502, "server_error", "upstream_error"),
        (UpstreamError("x", status=429), 429, "rate_limit_error", "upstream_error"),
        (ZeroDivisionError("secret detail"), 500, "server_error", "internal_error"),
    ],
)
def test_every_error_has_openais_shape(error: Exception, status: int, kind: str, code: str) -> None:
    found, told, _ = failure(error)

    assert found == status
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert (told["error"]["type"], told["error"]["code"]) == (kind, code)
    assert "secret detail" not in told["error"]["message"]


@pytest.mark.parametrize("kind", [Overloaded, Unavailable])
def test_who_is_turned_away_is_told_when_to_come_back(kind: type[Overloaded | Unavailable]) -> None:
    _, _, headers = failure(kind("x", retry_after_s=2.5))

    assert headers == {"retry-after": "3", "retry-after-ms": "2500"}
    assert failure(kind("x"))[2] == {}


def test_a_quarantined_request_is_not_to_be_sent_again() -> None:
    assert failure(Quarantined("x"))[2] == {"x-should-retry": "false"}


def test_an_upstreams_own_4xx_passes_in_its_own_words() -> None:
    said = {"error": {"message": "slow down", "type": "tokens", "code": "rate_limit_exceeded"}}

    assert failure(UpstreamError("x", status=429, body=said, retry_after="7")) == (429, said, {"retry-after": "7"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_listening_beyond_loopback_needs_a_key(host: str) -> None:
    with pytest.raises(SettingsError, match="HHH_ROUTER_API_KEY"):
        check_exposure(host, Settings.load())

    check_exposure(host, Settings.load(api_key=SecretStr("k")))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.3.2.1"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(host, Settings.load())


def test_half_a_surrogate_pair_is_written_as_an_escape() -> None:
    assert json.loads(dump({"text": "a\ud83d"})) == {"text": "a\ud83d"}
    assert dump({"text": "ä"}) == '{"text":"ä"}'.encode()
