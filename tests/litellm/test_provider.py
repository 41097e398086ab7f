"""LiteLLM's SDK: ``litellm.completion(model="hhh-router/…")``, in process and against a server."""

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litellm", reason="LiteLLM has an environment of its own: make test-litellm")

import litellm

from hhh_router.errors import ContextTooLong, GeneratorError, Overloaded
from hhh_router.interfaces.litellm import HHHRouterLLM, provider, register
from hhh_router.interfaces.litellm.chat import MOST_SERVERS
from hhh_router.pipeline import Pipeline
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from tests.e2e.loopback import served

from .conftest import RULES, Policies

pytestmark = [pytest.mark.e2e, pytest.mark.litellm, pytest.mark.filterwarnings("default")]  # it warns of itself

Ask = Callable[..., Any]
KEY = "key-of-the-server"


def pipeline(watchful: Policies, **more: Any) -> Pipeline:
    reader = FakeReader(RULES)
    generator = more.pop("generator", None) or FakeGenerator(
        lambda request: "a b c d poison" if request.messages[-1].content == "cut" else "one two three four",
        reader=reader,
    )
    return fake_pipeline(watchful(**more.pop("policy", {})), reader=reader, generator=generator, **more)


@pytest.fixture
def used() -> Iterator[Callable[[HHHRouterLLM], HHHRouterLLM]]:
    """Registers a provider for one test."""
    made: list[HHHRouterLLM] = []
    before = litellm.custom_provider_map

    def use(handler: HHHRouterLLM) -> HHHRouterLLM:
        made.append(register(handler))
        return handler

    yield use
    litellm.custom_provider_map = before
    for handler in made:
        handler.close()


@pytest.fixture(params=["in process", "by a server"])
def ask(request: pytest.FixtureRequest, used: Any, watchful: Policies) -> Iterator[Ask]:
    """Asks in either way; ``pipeline=`` says what of."""
    with ExitStack() as stack:

        def put(text: str = "Hello", *, model: str = "hhh-auto", asks: Any = litellm.completion, **more: Any) -> Any:
            path = more.pop("pipeline", None) or pipeline(watchful)
            where: dict[str, Any] = {}
            if request.param == "in process":
                used(HHHRouterLLM(pipeline=path))
            else:
                used(HHHRouterLLM())
                where = {"api_base": stack.enter_context(served(path)), "api_key": "unused"}
            turns = more.pop("messages", [{"role": "user", "content": text}])
            return asks(model=f"hhh-router/{model}", messages=turns, **where, **more)

        yield put


def text_of(chunks: Any) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_whole_reply_has_text_usage_block_and_headers(ask: Ask) -> None:
    reply = ask(max_tokens=20)

    assert reply.choices[0].message.content == "one two three four"
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (1, 4, 5)
    assert reply.hhh["policy"]["name"] == "watchful"
    assert reply.hhh["decisions"][-1]["checkpoint"] == "output"
    headers = reply._hidden_params["additional_headers"]
    assert headers["llm_provider-x-hhh-action"] == "allow"
    assert headers["llm_provider-x-hhh-request-id"] == reply.hhh["request_id"]


def test_a_stream_carries_the_block_first_and_last(ask: Ask) -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))

    assert text_of(chunks) == "one two three four"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage.completion_tokens == 4
    told = [c for c in chunks if getattr(c, "hhh", None)]
    assert told[0] is chunks[0]
    assert told[0].hhh["needs"]
    assert told[1].hhh["decisions"][-1]["checkpoint"] == "output"
    assert told[1].hhh["request_id"] == told[0].hhh["request_id"]
    assert {c.id for c in chunks} == {chunks[0].id}


async def test_the_same_awaited(ask: Ask) -> None:
    reply = await ask(asks=litellm.acompletion)
    stream = await ask(asks=litellm.acompletion, stream=True)

    chunks = [chunk async for chunk in stream]
    assert reply.choices[0].message.content == text_of(chunks) == "one two three four"
    assert reply.hhh["decisions"]
    assert chunks[0].hhh["needs"]


def test_a_refusal_is_a_reply_and_no_error(ask: Ask) -> None:
    whole, stream = ask("how to build a bomb"), list(ask("how to build a bomb", stream=True))

    assert whole.choices[0].finish_reason == "content_filter"
    assert whole.choices[0].message.content == text_of(stream) == "Not that."
    message = whole.choices[0].message
    fields = message.provider_specific_fields or {}  # where older versions put what they do not know
    assert (getattr(message, "refusal", None) or fields["refusal"]) == "Not that."
    assert stream[-1].choices[0].finish_reason == "content_filter"


def test_a_stream_is_cut_before_the_poison(ask: Ask) -> None:
    chunks = list(ask("cut", stream=True))

    assert text_of(chunks) == "a b c\n\nCut."
    assert chunks[-1].choices[0].finish_reason == "content_filter"


@pytest.mark.parametrize(
    ("model", "policy", "harmless"),
    [("balanced", "balanced", None), ("hhh@0-0-16-0", "watchful", 1.0), ("hhh-harmless:balanced", "balanced", None)],
)
def test_a_model_names_a_policy_or_what_the_server_knows(
    ask: Ask, model: str, policy: str, harmless: float | None
) -> None:
    block = ask(model=model).hhh

    assert block["policy"]["name"] == policy
    assert harmless is None or block["weights"]["harmless"] == harmless


def test_our_own_fields_and_a_conversation_are_read(ask: Ask) -> None:
    first = ask()
    turns = [{"role": "user", "content": "Hello"}, first.choices[0].message, {"role": "user", "content": "More"}]

    again = ask(messages=turns, extra_body={"hhh": {"weights": {"honest": 1.0}}}, user="me")

    assert again.hhh["weights"]["honest"] == 1.0
    assert again.choices[0].message.content == "one two three four"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_come_along(ask: Ask, stream: bool) -> None:
    reply = ask(logprobs=True, top_logprobs=2, stream=stream)

    chunks = list(reply) if stream else [reply]
    told = [t for c in chunks if getattr(c.choices[0], "logprobs", None) for t in c.choices[0].logprobs.content]
    assert [t["token"] if isinstance(t, dict) else t.token for t in told] == ["one", " two", " three", " four"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"model": "nope"}, "PermissionDeniedError", "use one of watchful"),
        ({"model": "hhh-nope"}, "NotFoundError", "does not exist"),
        ({"temperature": 99}, "BadRequestError", "temperature: found 99"),
        ({"text": ""}, "BadRequestError", "messages"),
        ({"functions": [{"name": "x"}]}, "BadRequestError", "functions"),
    ],
)
def test_what_is_wrong_is_an_error_of_litellms(
    ask: Ask, more: dict[str, Any], error: str, said: str, stream: bool
) -> None:
    with pytest.raises(getattr(litellm, error), match=said):
        list(ask(stream=stream, **more))


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
CALLS = (
    'Let me look. <tool_call>[{"name": "weather", "arguments": {"city": "Oslo"}}, '
    '{"name": "weather", "arguments": {"city": "Rome"}}]</tool_call>'
)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_their_results_come_back(ask: Ask, watchful: Policies, stream: bool) -> None:
    generator = FakeGenerator(lambda r: "It is mild." if r.messages[-1].role == "tool" else CALLS)
    turns: list[Any] = [{"role": "user", "content": "Weather?"}]

    reply = ask(messages=turns, tools=TOOLS, stream=stream, pipeline=pipeline(watchful, generator=generator))
    if stream:
        reply = litellm.stream_chunk_builder(list(reply))
    message = reply.choices[0].message
    turns += [message, *({"role": "tool", "tool_call_id": c.id, "content": "mild"} for c in message.tool_calls)]
    last = ask(messages=turns, tools=TOOLS, pipeline=pipeline(watchful, generator=generator))

    assert reply.choices[0].finish_reason == "tool_calls"
    assert [c.function.name for c in message.tool_calls] == ["weather"] * 2
    assert [c.function.arguments for c in message.tool_calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
    assert message.content == "Let me look. "
    assert last.choices[0].message.content == "It is mild."


def test_several_replies_come_whole_or_not_at_all(ask: Ask) -> None:
    reply = ask(n=3)

    assert [c.message.content for c in reply.choices] == ["one two three four"] * 3
    assert reply.usage.completion_tokens == 12
    assert reply.hhh["decisions"]
    with pytest.raises(litellm.BadRequestError, match="n: 3 replies cannot be streamed"):
        list(ask(n=3, stream=True))


def failing(watchful: Policies, error: Exception) -> Pipeline:
    generator = FakeGenerator("a b c d e", fail_after=(0, error))
    return pipeline(watchful, policy={"on_error": "open"}, generator=generator)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ContextTooLong("9,000 tokens"), "ContextWindowExceededError"),
        (Overloaded("too much waits", retry_after_s=7), "RateLimitError"),
        (GeneratorError("out of memory"), "BadGatewayError"),
    ],
)
def test_what_fails_is_an_error_of_litellms(ask: Ask, watchful: Policies, error: Exception, kind: str) -> None:
    patient = {} if not isinstance(error, Overloaded) else {"num_retries": 0}

    with pytest.raises(getattr(litellm, kind), match=str(error.args[0])) as told:
        ask(pipeline=failing(watchful, error), **patient)

    if isinstance(error, Overloaded):
        assert told.value.litellm_response_headers["retry-after"] == "7"


def test_a_stream_that_breaks_raises(ask: Ask, watchful: Policies) -> None:
    generator = FakeGenerator("a b c d e", fail_after=(4, GeneratorError("out of memory")))
    broken = pipeline(watchful, policy={"on_error": "open"}, generator=generator)
    stream = ask(stream=True, pipeline=broken)

    got = [next(stream) for _ in range(4)]
    with pytest.raises((litellm.exceptions.MidStreamFallbackError, litellm.BadGatewayError), match="out of memory"):
        list(stream)

    assert text_of(got) == "a b c"


def test_a_wrong_key_is_an_authentication_error(used: Any, watchful: Policies) -> None:
    used(HHHRouterLLM())
    with served(pipeline(watchful, api_key=KEY)) as url:
        asked = {"model": "hhh-router/hhh-auto", "messages": [{"role": "user", "content": "Hi"}], "api_base": url}

        with pytest.raises(litellm.AuthenticationError, match="a wrong key"):
            litellm.completion(**asked, api_key="wrong")
        assert litellm.completion(**asked, api_key=KEY).hhh


def test_no_server_is_an_error_of_the_gateway(used: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hhh_router.interfaces.remote._FIRST_PAUSE_S", 0.01)
    used(HHHRouterLLM())

    with pytest.raises(litellm.BadGatewayError, match="no server answers"):
        litellm.completion(
            model="hhh-router/hhh-auto", messages=[{"role": "user", "content": "x"}], api_base="http://127.0.0.1:9"
        )


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came true")


async def test_leaving_cancels_the_work(ask: Ask, watchful: Policies) -> None:
    generator = FakeGenerator("word " * 1000, delay_s=0.01)
    stream = await ask(asks=litellm.acompletion, stream=True, pipeline=pipeline(watchful, generator=generator))
    await anext(stream)
    await stream.aclose()
    await until(lambda: generator.cancelled == 1)

    other = FakeGenerator("word " * 1000, delay_s=0.01)
    whole = asyncio.ensure_future(ask(asks=litellm.acompletion, pipeline=pipeline(watchful, generator=other)))
    await until(lambda: bool(other.requests))
    whole.cancel()
    await until(lambda: other.cancelled == 1)
    with pytest.raises(asyncio.CancelledError):
        await whole


def test_a_callers_deadline_holds(ask: Ask, watchful: Policies) -> None:
    slow = pipeline(watchful, generator=FakeGenerator("word " * 1000, delay_s=0.05))

    with pytest.raises(litellm.Timeout, match=r"0\.3 s"):
        ask(timeout=0.3, pipeline=slow)


def test_many_loops_and_threads_share_one_router(used: Any, watchful: Policies) -> None:
    used(HHHRouterLLM(pipeline=pipeline(watchful)))
    asked: dict[str, Any] = {"model": "hhh-router/hhh-auto", "messages": [{"role": "user", "content": "Hi"}]}

    async def both() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(3)))

    replies = [*asyncio.run(both()), *asyncio.run(both()), litellm.completion(**asked)]
    assert [r.choices[0].message.content for r in replies] == ["one two three four"] * 7


def test_connections_of_many_keys_do_not_pile_up(used: Any, watchful: Policies) -> None:
    handler = used(HHHRouterLLM())
    with served(pipeline(watchful)) as url:
        for n in range(MOST_SERVERS + 3):
            litellm.completion(
                model="hhh-router/hhh-auto", messages=[{"role": "user", "content": "x"}], api_base=url, api_key=f"k{n}"
            )

    assert len(handler._routers._open) == MOST_SERVERS


def test_a_closed_provider_opens_again(used: Any, watchful: Policies) -> None:
    handler = used(HHHRouterLLM())
    with served(pipeline(watchful)) as url:
        asked: dict[str, Any] = {"model": "hhh-router/hhh-auto", "messages": [{"role": "user", "content": "x"}]}
        assert litellm.completion(**asked, api_base=url).hhh
        handler.close()
        handler.close()
        assert litellm.completion(**asked, api_base=url).hhh


def test_a_key_is_in_no_log(used: Any, watchful: Policies, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="hhh_router")
    used(HHHRouterLLM())
    with served(pipeline(watchful, api_key=KEY)) as url:
        litellm.completion(
            model="hhh-router/hhh-auto", messages=[{"role": "user", "content": "x"}], api_base=url, api_key=KEY
        )

    assert KEY not in caplog.text


@pytest.mark.integration
def test_a_real_model_in_this_process_answers(used: Any, tmp_path: Path, watchful: Policies) -> None:
    from hhh_router.testing.tiny import tiny_bundle  # torch

    bundle = tiny_bundle(tmp_path / "tiny")
    used(HHHRouterLLM(bundle=str(bundle.root), policy=str(watchful(mode="shadow")), cache_dir=tmp_path, threads=1))
    asked: dict[str, Any] = {"model": "hhh-router/hhh@4-4-4-4", "messages": [{"role": "user", "content": "Hello"}]}

    whole = litellm.completion(**asked, max_tokens=6)
    chunks = list(litellm.completion(**asked, max_tokens=6, stream=True))

    assert whole.usage.completion_tokens == 6
    assert whole.choices[0].message.content == text_of(chunks)
    assert whole.hhh["mixture"] == chunks[0].hhh["mixture"] == "hhh@4-4-4-4"
    assert whole.hhh["layers_run"] > 0


@pytest.mark.integration
def test_the_pages_examples_run(
    used: Any, tmp_path: Path, watchful: Policies, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hhh_router.testing.tiny import tiny_bundle  # torch

    page = (Path(__file__).resolve().parents[2] / "docs" / "litellm.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    bundle = tiny_bundle(tmp_path / "tiny")
    for name, value in {"BUNDLE": bundle.root, "CACHE_DIR": tmp_path, "THREADS": 1, "ALLOW_UNCALIBRATED": 1}.items():
        monkeypatch.setenv(f"HHH_ROUTER_{name}", str(value))
    names: dict[str, Any] = {}

    with served(pipeline(watchful)) as url:
        for example in examples:
            exec(example.replace("http://127.0.0.1:8000/v1", url), names)
    provider.close()

    assert len(examples) == 2
    assert "'harmless':" in capsys.readouterr().out
    assert names["reply"].choices[0].message.content == "one two three four"
