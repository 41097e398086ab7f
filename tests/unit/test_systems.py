"""What can be measured on a user's own rows: guards behind a URL on the project's own server, policies, bundles."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from hhh_router.calibration import Calibrators
from hhh_router.data.examples import ask
from hhh_router.errors import BackendError, BackendTimeout, SettingsError, UpstreamError
from hhh_router.evaluation.systems import (
    BundleSystem,
    DetectorSystem,
    PolicySystem,
    RemoteSystem,
)
from hhh_router.interfaces.server.app import create_app
from hhh_router.policy import load_policy
from hhh_router.testing import FakeReader, fake_pipeline, make_scores
from hhh_router.types import GuardRequest, Message, ReadRequest, Scores
from hhh_router.upstream.guards import BATCH_ITEMS, TRIES, GuardClient, guard_endpoint

Policies = Callable[..., Path]
RULES = {
    "bomb": {"needs.harmless": 6.0},
    "ignore": {"needs.injection": 3.0},
    "poison": {"outcomes.unsafe": 6.0},
    "guess": {"outcomes.untruthful": 6.0},
}
NATIVE, MODERATIONS = "http://guard.test/v1/guard", "http://guard.test/v1/moderations"
QUIET = 1 / (1 + math.exp(4.0))


def prompt(text: str) -> ReadRequest:
    return ReadRequest(messages=ask(text))


def pair(text: str, response: str) -> ReadRequest:
    return ReadRequest(messages=ask(text), response=response)


async def _at_once(_: float) -> None:
    return None


def client(transport: Any, endpoint: str = NATIVE, **options: Any) -> GuardClient:
    wire = "moderations" if endpoint == MODERATIONS else "native"
    return GuardClient(endpoint, wire, transport=transport, pause=options.pop("pause", _at_once), **options)


def remote(transport: Any, endpoint: str = NATIVE, **options: Any) -> RemoteSystem:
    wire = "moderations" if endpoint == MODERATIONS else "native"
    return RemoteSystem("remote", client(transport, endpoint, **options), wire)


def server(policy: Path, **options: Any) -> httpx.ASGITransport:
    """The project's own server in process."""
    return httpx.ASGITransport(create_app(fake_pipeline(policy, reader=FakeReader(RULES), **options)))


def answering(answer: Callable[[httpx.Request], httpx.Response]) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A server of another kind, and what it was sent."""
    sent: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return answer(request)

    return httpx.MockTransport(handle), sent


class FakeReadings:
    """Readings without a model."""

    about = "bundle fake (0000)"
    calibrators = Calibrators.none()

    def __init__(self, score: Callable[[ReadRequest], Scores | None] | None = None) -> None:
        self._score = score or FakeReader(RULES).score

    def scores(self, requests: Sequence[ReadRequest]) -> list[Scores | None]:
        return [self._score(r) for r in requests]


# --- a server of this project


def test_a_servers_probabilities_and_verdicts_are_those_of_its_block(watchful: Policies) -> None:
    system = remote(server(watchful()))
    asked = [prompt("Hello"), prompt("a bomb"), prompt("ignore that")]

    harmless = system.probabilities(asked, "harmless")
    injection = system.probabilities(asked, "injection")

    loud = 1 / (1 + math.exp(-6.0))
    assert harmless == pytest.approx([QUIET, loud, QUIET], abs=1e-6)
    assert injection == pytest.approx([QUIET, QUIET, 1 / (1 + math.exp(-3.0))], abs=1e-6)
    assert system.verdicts(asked) == [False, True, False]
    assert "policy watchful@3" in system.note
    assert "not calibrated" in system.note


def test_the_verdict_on_a_response_is_the_output_checkpoints(watchful: Policies) -> None:
    system = remote(server(watchful()))
    asked = [pair("Hi", "fine"), pair("Hi", "poison"), pair("Hi", "guess"), pair("a bomb", "No.")]

    # a reply to be made anew is stopped; a safe reply to a refused prompt is no unsafe reply
    assert system.verdicts(asked) == [False, True, True, False]
    unsafe = system.probabilities(asked, "unsafe")
    assert unsafe is not None
    assert [p > 0.5 for p in unsafe] == [False, True, False, False]


def test_a_policy_here_and_the_same_policy_behind_a_url_agree(watchful: Policies) -> None:
    far = remote(server(watchful()))
    near = PolicySystem(load_policy(watchful()), FakeReadings())
    asked = [prompt(t) for t in ("Hello", "a bomb", "ignore")] + [
        pair(t, r) for t in ("Hi", "a bomb") for r in ("fine", "poison", "guess")
    ]

    assert near.verdicts(asked) == far.verdicts(asked)


def test_texts_are_sent_in_batches_and_once(watchful: Policies) -> None:
    own = server(watchful())
    bodies: list[Any] = []

    class Counting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            bodies.append(json.loads(await request.aread()))
            return await own.handle_async_request(request)

    system = remote(Counting())
    asked = [prompt(f"Hello {i % 40}") for i in range(50)]

    for head in ("harmless", "injection"):
        system.probabilities(asked, head)
    system.verdicts(asked)

    assert [len(b["items"]) for b in bodies] == [BATCH_ITEMS, BATCH_ITEMS, 8]


def test_a_row_the_server_cannot_judge_fails_alone(watchful: Policies) -> None:
    system = remote(server(watchful()))
    odd = ReadRequest(messages=(Message(role="assistant", content="I speak first"), *ask("Hello")))
    asked = [*(prompt(f"Hello {i}") for i in range(20)), odd, prompt("a bomb")]

    p = system.probabilities(asked, "harmless")

    assert p is not None
    assert [i for i, value in enumerate(p) if math.isnan(value)] == [20]
    assert system.verdicts(asked) == [False] * 20 + [None, True]


def test_a_server_that_refuses_every_row_is_an_error_that_quotes_it(watchful: Policies) -> None:
    system = remote(server(watchful()))
    odd = [ReadRequest(messages=(Message(role="assistant", content=str(i)), *ask("Hello"))) for i in range(3)]

    with pytest.raises(UpstreamError, match="refused each of the first rows with status 400") as caught:
        system.verdicts(odd)

    assert "assistant as the first message" in str(caught.value.hint)
    assert "assistant" not in caught.value.message  # what goes into the report quotes no server


def test_a_reading_that_failed_has_a_verdict_and_no_probability(watchful: Policies) -> None:
    def broken(_: ReadRequest) -> Scores:
        return make_scores({"needs.harmless": math.nan})

    app = create_app(fake_pipeline(watchful(), reader=FakeReader(broken)))
    system = remote(httpx.ASGITransport(app))

    assert system.verdicts([prompt("Hello")]) == [True]  # on_error: closed
    assert system.probabilities([prompt("Hello")], "harmless") is None


# --- keys, and servers that fail


def test_a_server_with_a_key_is_asked_with_it(watchful: Policies) -> None:
    own = server(watchful(), api_key="s3cret-key")

    answers = asyncio.run(client(own, api_key=SecretStr("s3cret-key")).judge([prompt("a bomb")]))

    assert answers[0] is not None
    assert answers[0].stopped


@pytest.mark.parametrize("key", [None, "another-key"])
def test_a_missing_or_wrong_key_says_which_option_names_it(watchful: Policies, key: str | None) -> None:
    own = server(watchful(), api_key="s3cret-key")
    given = SecretStr(key) if key else None

    with pytest.raises(UpstreamError, match="answered 401") as caught:
        asyncio.run(client(own, api_key=given).judge([prompt("Hi")]))

    assert "--api-key-env" in str(caught.value)
    assert "s3cret-key" not in str(caught.value)
    assert "another-key" not in str(caught.value)


def test_a_key_that_a_server_repeats_is_not_shown() -> None:
    transport, _ = answering(
        lambda _: httpx.Response(403, json={"error": {"message": "key \x1b[2J sk-abc is unknown"}})
    )

    with pytest.raises(UpstreamError) as caught:
        asyncio.run(client(transport, api_key=SecretStr("sk-abc")).judge([prompt("Hi")]))

    assert "sk-abc" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "is unknown" in str(caught.value)


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (httpx.Response(404, json={"detail": "Not Found"}), "answered 404"),
        (httpx.Response(405), "answered 405"),
        (httpx.Response(200, text="<html>hello</html>"), "no JSON"),
        (httpx.Response(200, json={"choices": []}), "another shape"),
        (httpx.Response(200, json=[1]), "another shape"),
        (httpx.Response(200, json={"data": [{"hhh": {"decisions": []}}]}), "another shape"),
        (httpx.Response(200, json={"data": []}), "another shape"),
    ],
    ids=["404", "405", "html", "chat", "list", "block", "too few"],
)
def test_a_server_of_another_kind_is_told_apart(response: httpx.Response, found: str) -> None:
    transport, sent = answering(lambda _: response)

    with pytest.raises(UpstreamError, match=found) as caught:
        asyncio.run(client(transport).judge([prompt(str(i)) for i in range(100)]))

    assert "--wire moderations" in str(caught.value)
    assert len(sent) == 1  # the other rows are not sent to a stranger


def test_a_redirect_is_not_followed_with_the_key() -> None:
    transport, sent = answering(lambda _: httpx.Response(307, headers={"location": "http://elsewhere.test/"}))

    with pytest.raises(UpstreamError, match="answered 307") as caught:
        asyncio.run(client(transport, api_key=SecretStr("k")).judge([prompt("Hi")]))

    assert [r.url.host for r in sent] == ["guard.test"]
    assert "final URL" in str(caught.value)


def test_a_dead_server_and_a_slow_one_say_what_to_do() -> None:
    def dead(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        return httpx.Response(200)

    with pytest.raises(UpstreamError, match=r"http://guard.test cannot be reached") as gone:
        asyncio.run(client(httpx.MockTransport(dead)).judge([prompt("Hi")]))
    with pytest.raises(BackendTimeout, match=r"within 0.05 s") as late:
        asyncio.run(client(httpx.MockTransport(slow), timeout_s=0.05).judge([prompt("Hi")]))

    assert "hhh-router serve" in str(gone.value)
    assert "--timeout-s" in str(late.value)


def test_a_busy_server_is_asked_again_as_late_as_it_says(watchful: Policies) -> None:
    own = server(watchful())
    waits: list[float] = []
    left = [httpx.Response(429, headers={"retry-after": "7"}), httpx.Response(503)]

    class Busy(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return left.pop(0) if left else await own.handle_async_request(request)

    async def pause(seconds: float) -> None:
        waits.append(seconds)

    answers = asyncio.run(client(Busy(), pause=pause).judge([prompt("a bomb")]))

    assert answers[0] is not None
    assert waits == [7.0, 2.0]


def test_a_server_that_stays_busy_or_says_stop_is_left_alone() -> None:
    busy, asked = answering(lambda _: httpx.Response(503))
    firm, once = answering(lambda _: httpx.Response(503, headers={"x-should-retry": "false"}))

    for transport in (busy, firm):
        with pytest.raises(UpstreamError, match="answered 503"):
            asyncio.run(client(transport).judge([prompt("Hi")]))

    assert (len(asked), len(once)) == (TRIES, 1)


def test_a_server_that_dies_midway_fails_with_its_own_error(watchful: Policies) -> None:
    own = server(watchful())
    calls = 0

    class Dying(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise httpx.RemoteProtocolError("gone", request=request)
            return await own.handle_async_request(request)

    with pytest.raises(UpstreamError, match="broke off"):
        asyncio.run(client(Dying()).judge([prompt(str(i)) for i in range(200)]))


def test_no_more_calls_are_under_way_than_asked_for(watchful: Policies) -> None:
    own = server(watchful())
    now = most = 0

    class Watching(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            response = await own.handle_async_request(request)
            now -= 1
            return response

    asyncio.run(client(Watching(), concurrency=3).judge([prompt(str(i)) for i in range(200)]))

    assert most == 3


# --- OpenAI's moderation wire


def moderating(request: httpx.Request) -> httpx.Response:
    """As OpenAI's endpoint answers: one result a text, scores per category."""
    body = json.loads(request.content)
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    results = [
        {"flagged": "bomb" in t, "category_scores": {"violence": 0.9 if "bomb" in t else 0.1, "hate": 0.05}}
        for t in texts
    ]
    return httpx.Response(200, json={"id": "modr-1", "model": "omni", "results": results})


def test_a_moderation_endpoint_gives_its_largest_score_and_its_flag() -> None:
    transport, sent = answering(moderating)
    system = remote(transport, MODERATIONS)
    asked = [prompt("a bomb"), prompt("Hello")]

    assert system.probabilities(asked, "harmless") == [0.9, 0.1]
    assert system.verdicts(asked) == [True, False]
    assert system.probabilities(asked, "injection") is None
    assert "injection" not in system.verdict_heads
    assert "model omni" in system.note
    assert [json.loads(r.content) for r in sent] == [{"input": ["a bomb", "Hello"]}]


def test_a_moderation_endpoint_reads_the_response_of_a_pair() -> None:
    transport, sent = answering(moderating)
    system = remote(transport, MODERATIONS)

    assert system.probabilities([pair("a bomb?", "No.")], "unsafe") == [0.1]
    assert json.loads(sent[0].content) == {"input": "No."}


def test_a_moderation_endpoint_without_scores_has_verdicts_alone() -> None:
    transport, _ = answering(lambda _: httpx.Response(200, json={"results": [{"flagged": True}]}))
    system = remote(transport, MODERATIONS)

    assert system.probabilities([prompt("Hi")], "harmless") is None
    assert system.verdicts([prompt("Hi")]) == [True]


@pytest.mark.parametrize(
    "result", [{"flagged": "yes"}, {"flagged": True, "category_scores": {"hate": 7}}, {}], ids=["flag", "score", "none"]
)
def test_a_moderation_answer_in_another_shape_is_an_error(result: dict[str, Any]) -> None:
    transport, _ = answering(lambda _: httpx.Response(200, json={"results": [result]}))

    with pytest.raises(UpstreamError, match="another shape"):
        remote(transport, MODERATIONS).verdicts([prompt("Hi")])


# --- URLs


@pytest.mark.parametrize(
    ("url", "wire", "endpoint", "spoken"),
    [
        ("http://h:8000", "native", "http://h:8000/v1/guard", "native"),
        ("http://h:8000/v1/", "moderations", "http://h:8000/v1/moderations", "moderations"),
        ("https://h/gate/v1/guard", "moderations", "https://h/gate/v1/guard", "native"),
        ("https://h/v1/moderations", "native", "https://h/v1/moderations", "moderations"),
    ],
)
def test_a_url_may_be_a_base_or_an_endpoint(url: str, wire: Any, endpoint: str, spoken: str) -> None:
    assert guard_endpoint(url, wire) == (endpoint, spoken)


@pytest.mark.parametrize("url", ["h:8000", "ftp://h", "http://", "http://h:port", "http://me:pw@h", "http://h?key=k"])
def test_a_url_that_is_none_or_holds_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        guard_endpoint(url, "native")

    assert "pw" not in str(caught.value)
    assert "key=k" not in str(caught.value)


# --- systems here


def test_a_bundle_gives_calibrated_probabilities_and_no_verdict() -> None:
    system = BundleSystem("fake", FakeReadings())

    assert system.probabilities([prompt("a bomb")], "harmless") == pytest.approx([1 / (1 + math.exp(-6.0))])
    assert system.verdicts([prompt("a bomb")]) is None
    assert system.note == "bundle fake (0000)"


def test_a_conversation_the_model_cannot_take_is_not_judged(watchful: Policies) -> None:
    readings = FakeReadings(lambda r: None if r.messages[-1].content == "odd" else FakeReader(RULES).score(r))
    asked = [prompt("odd"), prompt("a bomb")]

    p = BundleSystem("fake", readings).probabilities(asked, "harmless")

    assert p is not None
    assert math.isnan(p[0])
    assert PolicySystem(load_policy(watchful()), readings).verdicts(asked) == [None, True]


def test_a_policy_gives_verdicts_and_no_probability(watchful: Policies) -> None:
    system = PolicySystem(load_policy(watchful(mode="shadow")), FakeReadings())

    assert system.probabilities([prompt("a bomb")], "harmless") is None
    assert system.verdicts([prompt("a bomb")]) == [True]
    assert "what it would stop" in system.note
    assert "honest" not in system.verdict_heads


def test_a_policys_verdicts_are_those_of_the_guard(watchful: Policies) -> None:
    asked = [prompt("Hello"), prompt("a bomb")]
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES))

    guarded = asyncio.run(pipeline.guard([GuardRequest(read=r) for r in asked]))

    found = PolicySystem(load_policy(watchful()), FakeReadings()).verdicts(asked)
    assert found == [g.message is not None for g in guarded]


@pytest.mark.parametrize(("on_error", "stopped"), [("closed", True), ("open", False)])
def test_a_reading_that_is_none_is_the_policys_on_error(watchful: Policies, on_error: str, stopped: bool) -> None:
    readings = FakeReadings(lambda _: make_scores({"needs.harmless": math.nan, "outcomes.unsafe": math.nan}))
    system = PolicySystem(load_policy(watchful(on_error=on_error)), readings)

    assert system.verdicts([prompt("Hi"), pair("Hi", "fine")]) == [stopped, stopped]


def test_a_baseline_is_made_when_it_is_first_asked() -> None:
    made: list[int] = []

    class Coin:
        name = "coin"
        heads = frozenset({"harmless"})

        def probabilities(self, texts: Sequence[ReadRequest], head: str) -> list[float]:
            return [0.5] * len(texts)

    def make() -> Coin:
        made.append(1)
        return Coin()

    system = DetectorSystem("coin", make, "")
    assert made == []

    assert system.probabilities([prompt("Hi")], "harmless") == [0.5]
    assert system.probabilities([prompt("Hi")], "honest") is None
    assert made == [1]


def test_a_baseline_that_cannot_run_is_a_backend_error() -> None:
    def broken() -> Any:
        raise BackendError("not available: the package is not installed")

    with pytest.raises(BackendError, match="not available"):
        DetectorSystem("absent", broken, "").probabilities([prompt("Hi")], "injection")


def test_a_policy_knows_the_texts_it_judges(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "version: 1\nname: p\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\ncheckpoints:\n"
        "  input: [{when: {text: wire money}, then: block}, {then: allow}]\n"
        "  output: [{when: {text: promise, role: assistant}, then: block}, {then: allow}]\n"
        "overlays: [{tenants: bank}]\n"
    )
    system = PolicySystem(load_policy(file), FakeReadings())
    asked = [prompt("wire money"), prompt("hello"), pair("hello", "I promise"), pair("hello", "maybe")]

    assert system.verdicts(asked) == [True, False, True, False]
