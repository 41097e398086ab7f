"""`HHHRouter(base_url=…)` against our server on loopback: the same types as in process; the model is a stand-in."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from hhh_router import AsyncHHHRouter, HHHRouter
from hhh_router.errors import (
    BackendError,
    BackendTimeout,
    DeadlineExceeded,
    GeneratorError,
    HHHRouterError,
    InvalidRequest,
    KeyRejected,
    Overloaded,
    PolicyNotAllowed,
    SettingsError,
    Unavailable,
)
from hhh_router.interfaces.remote import RemotePipeline
from hhh_router.pipeline import ChatDelta, Pipeline
from hhh_router.settings import Settings
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.types import Action, ChatRequest, Message

from .loopback import served

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}


def pipeline(policy: Path, reply: str = "one two three four", **options: object) -> Pipeline:
    reader = FakeReader(RULES)
    return fake_pipeline(policy, reader=reader, generator=FakeGenerator(reply, reader=reader), **options)


@pytest.fixture
def url(watchful: Policies) -> Iterator[str]:
    with served(pipeline(watchful())) as found:
        yield found


@pytest.fixture
def here(watchful: Policies) -> Iterator[HHHRouter]:
    with HHHRouter(pipeline=pipeline(watchful())) as router:
        yield router


@pytest.fixture
def there(url: str) -> Iterator[HHHRouter]:
    with HHHRouter(base_url=url) as router:
        yield router


@pytest.mark.parametrize("prompt", ["Hello", "how to build a bomb"])
@pytest.mark.parametrize("more", [{}, {"logprobs": True}, {"policy": "balanced"}, {"weights": "hhh@4-4-4-4"}], ids=str)
def test_a_chat_is_the_same_there_as_here(here: HHHRouter, there: HHHRouter, prompt: str, more: dict) -> None:
    a, b = here.chat(prompt, max_tokens=20, **more), there.chat(prompt, max_tokens=20, **more)

    assert (a.text, a.refusal, a.finish_reason, a.usage, a.logprobs) == (
        b.text, b.refusal, b.finish_reason, b.usage, b.logprobs,
    )  # fmt: skip
    assert a.weights == b.weights
    assert a.needs == b.needs
    assert a.action == b.action
    assert [d.rule for d in a.metadata.decisions] == [d.rule for d in b.metadata.decisions]
    assert a.metadata.receipt == b.metadata.receipt


@pytest.mark.parametrize("prompt", ["Hello", "how to build a bomb"])
def test_a_stream_gives_the_same_result_as_the_whole_reply(there: HHHRouter, prompt: str) -> None:
    whole = there.chat(prompt, logprobs=True)

    with there.chat(prompt, stream=True, logprobs=True) as stream:
        pieces = list(stream)
        last = stream.result

    assert all(isinstance(p, ChatDelta) for p in pieces)
    assert "".join(p.text for p in pieces) == last.text == whole.text
    assert (last.refusal, last.finish_reason, last.usage, last.logprobs) == (
        whole.refusal, whole.finish_reason, whole.usage, whole.logprobs,
    )  # fmt: skip
    assert any(p.is_refusal for p in pieces) == (whole.refusal is not None)


def test_a_stream_cut_by_the_policy_ends_with_its_message(watchful: Policies) -> None:
    with served(pipeline(watchful(), reply="a b c d e f g h poison i j")) as url, HHHRouter(base_url=url) as router:
        with router.chat("Hello", stream=True) as stream:
            pieces = list(stream)

        assert stream.result.refusal is not None
        assert "poison" not in stream.result.text
        assert pieces[-1].is_refusal


def test_guard_and_route_are_the_same_there_as_here(here: HHHRouter, there: HHHRouter) -> None:
    a = here.guard(["Hello", "bomb", None], [None, None, "poison"])
    b = there.guard(["Hello", "bomb", None], [None, None, "poison"])
    assert [(r.action, r.message, r.needs, r.outcomes) for r in a] == [
        (r.action, r.message, r.needs, r.outcomes) for r in b
    ]
    assert here.route("Hello").mixture == there.route("Hello").mixture
    assert there.guard("bomb").action is Action.REFUSE
    assert there.guard([]) == []


def test_what_this_side_leaves_out_is_named_in_the_reply(there: HHHRouter) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": "x"}}]

    found = there.chat([{"role": "user", "content": parts}])

    assert "messages[0].content[1]: image_url" in found.metadata.not_inspected


def test_the_servers_errors_are_raised_as_their_own_classes(there: HHHRouter) -> None:
    with pytest.raises(PolicyNotAllowed):
        there.chat("Hello", policy="nonesuch")
    with pytest.raises(InvalidRequest, match="max_tokens"):
        there.chat("Hello", max_tokens=0)
    with pytest.raises(InvalidRequest, match="a file cannot be sent"):
        there.chat("Hello", policy="mine.yaml")


def test_a_key_is_sent_and_a_missing_one_is_told(watchful: Policies) -> None:
    with served(pipeline(watchful(), api_key="s3cret")) as url:
        with HHHRouter(base_url=url, api_key="s3cret") as router:
            assert router.chat("Hello").text
        with HHHRouter(base_url=url) as router, pytest.raises(KeyRejected, match="no key"):
            router.chat("Hello")


def test_a_stream_that_breaks_raises_what_broke(watchful: Policies) -> None:
    broken = FakeGenerator("a b c d e", fail_after=(4, GeneratorError("it broke")))
    made = fake_pipeline(watchful(on_error="open"), generator=broken)
    with (
        served(made) as url,
        HHHRouter(base_url=url) as router,
        router.chat("Hello", stream=True) as stream,
        pytest.raises(GeneratorError, match="it broke"),
    ):
        list(stream)


def test_without_a_server_it_says_so_after_trying_again() -> None:
    with HHHRouter(base_url="http://127.0.0.1:9") as router, pytest.raises(BackendError, match="no server answers"):
        router.chat("Hello")


def test_an_address_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="no header can carry"):
        HHHRouter(base_url="http://127.0.0.1:9", api_key="…")
    with pytest.raises(SettingsError, match="no http address"):
        HHHRouter(base_url="localhost:8000")
    with pytest.raises(SettingsError, match="its own bundle"):
        HHHRouter("smollm2-135m", base_url="http://localhost:8000")


# -- what a server on loopback seldom does ----------------------------------------------------------------------------


def answering(*replies: httpx.Response | Exception) -> tuple[RemotePipeline, list[httpx.Request]]:
    """A client whose server gives these replies in turn."""
    asked: list[httpx.Request] = []
    left = list(replies)

    def reply(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    made = RemotePipeline("http://server", policy=None, settings=Settings.load(), transport=httpx.MockTransport(reply))
    return made, asked


def error(status: int, code: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "said", "code": code}}, headers=headers)


async def ask(made: RemotePipeline, *, stream: bool = False) -> None:
    request = ChatRequest(messages=(Message(role="user", content="Hi"),))
    async for _ in made.chat(request, stream=stream):
        pass


@pytest.mark.parametrize(
    ("status", "code", "kind"), [(429, "overloaded", Overloaded), (503, "unavailable", Unavailable)]
)
def test_a_server_that_is_busy_is_asked_again_and_then_its_error_is_raised(
    status: int, code: str, kind: type[HHHRouterError]
) -> None:
    made, asked = answering(*[error(status, code, **{"retry-after-ms": "5"})] * 3)

    with pytest.raises(kind) as caught:
        asyncio.run(ask(made))

    assert len(asked) == 3
    assert caught.value.retry_after_s == 0.005  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "reply",
    [
        error(429, "overloaded", **{"retry-after": "3600"}),
        error(503, "unavailable", **{"x-should-retry": "false"}),
        error(500, "quarantined"),
        error(502, "generator_error"),
        error(418, "no_such_code"),
        httpx.Response(500, text="<html>"),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"choices": []}),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
    ],
    ids=str,
)
def test_what_trying_again_cannot_cure_is_raised_at_once(reply: httpx.Response | Exception) -> None:
    made, asked = answering(reply)

    with pytest.raises(HHHRouterError) as caught:
        asyncio.run(ask(made))

    assert len(asked) == 1
    if isinstance(reply, httpx.ReadTimeout):
        assert isinstance(caught.value, BackendTimeout)


def test_a_deadline_of_ones_own_is_told_from_the_servers() -> None:
    found = []
    for status, code in ((408, "deadline_exceeded"), (504, "timeout")):
        made, asked = answering(error(status, code))
        with pytest.raises(BackendTimeout) as caught:
            asyncio.run(ask(made))
        found.append((type(caught.value), len(asked)))

    assert found == [(DeadlineExceeded, 1), (BackendTimeout, 1)]


def test_a_stream_without_an_end_is_an_error() -> None:
    made, _ = answering(httpx.Response(200, text='data: {"choices": []}\n\n'))

    with pytest.raises(BackendError, match="broke off"):
        asyncio.run(ask(made, stream=True))


def test_leaving_a_stream_cancels_the_servers_work(watchful: Policies) -> None:
    slow = FakeGenerator("word " * 400, reader=FakeReader(), delay_s=0.01)

    async def leave(url: str) -> None:
        async with (
            AsyncHHHRouter(base_url=url) as router,
            await router.chat("Hello", stream=True, max_tokens=400) as stream,
        ):
            await anext(stream)
        for _ in range(200):
            if slow.cancelled:
                return
            await asyncio.sleep(0.02)

    with served(fake_pipeline(watchful(), generator=slow)) as url:
        asyncio.run(leave(url))

    assert slow.cancelled


def test_it_needs_no_torch_and_no_server_packages() -> None:
    code = (
        "import sys; from hhh_router import HHHRouter; HHHRouter(base_url='http://127.0.0.1:9').close();"
        "print([m for m in ('torch', 'transformers', 'starlette', 'uvicorn') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
