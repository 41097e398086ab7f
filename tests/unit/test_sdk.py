import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import hhh_router
from hhh_router import AsyncHHHRouter, Blocked, HHHRouter, HHHRouterError, Message, RequestError, Settings, Weights
from hhh_router.errors import InvalidRequest, PolicyError, PolicyNotAllowed, SettingsError
from hhh_router.pipeline import Pipeline
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.types import Action

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}, "lie": {"outcomes.untruthful": 6.0}}


def pipeline(
    policy: str | Path = "balanced", reply: str = "The capital of France is Paris.", **settings: object
) -> Pipeline:
    reader = FakeReader(RULES)
    return fake_pipeline(policy, reader=reader, generator=FakeGenerator(reply, reader=reader), **settings)


@pytest.fixture
def router(watchful: Policies) -> HHHRouter:
    with HHHRouter(pipeline=pipeline(watchful())) as router:
        yield router


def test_the_public_names_are_these() -> None:
    assert hhh_router.__all__ == [
        "Action",
        "AsyncHHHRouter",
        "BackendError",
        "Blocked",
        "ChatResult",
        "ChatStream",
        "ConfigError",
        "GuardResult",
        "HHHRouter",
        "HHHRouterError",
        "Message",
        "Metadata",
        "MissingExtra",
        "RequestError",
        "RouteResult",
        "Settings",
        "Weights",
    ]
    assert all(getattr(hhh_router, name).__name__ == name for name in hhh_router.__all__)
    assert dir(hhh_router) == hhh_router.__all__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Router'"):
        _ = hhh_router.Router


def test_importing_the_package_and_its_names_loads_no_torch_and_no_numpy() -> None:
    code = (
        "import sys, hhh_router\n"
        "light = 'pydantic' not in sys.modules\n"
        "[getattr(hhh_router, n) for n in hhh_router.__all__]\n"
        "print(light, *(m for m in ('torch', 'numpy', 'transformers', 'starlette', 'aiohttp') if m in sys.modules))"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said.split() == ["True"]


def test_a_chat_gives_text_weights_needs_confidence_and_decision(router: HHHRouter) -> None:
    result = router.chat("What is the capital of France?", max_tokens=50, temperature=0.7, top_p=0.9, seed=3, stop="\n")

    assert result.text == "The capital of France is Paris."
    assert result.action is Action.ALLOW
    assert isinstance(result.weights, Weights)
    assert set(result.needs) == {"helpful", "harmless", "honest", "injection"}
    assert 0 <= result.confidence <= 1
    assert result.metadata.request_id.startswith("hhh-")
    result.raise_for_decision()


def test_sampling_reaches_the_generator(watchful: Policies) -> None:
    generator = FakeGenerator("hi")
    with HHHRouter(pipeline=fake_pipeline(watchful(), generator=generator)) as router:
        router.chat("Hello", max_tokens=7, temperature=0.5, top_p=0.9, seed=11, stop=["a", "b"])

    sampling = generator.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.9)
    assert (sampling.seed, sampling.stop) == (11, ("a", "b"))


class City(BaseModel):
    name: str
    people: int


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}, SCHEMA),
        (City, City.model_json_schema()),
    ],
)
def test_a_response_format_reaches_the_generator_as_a_schema(watchful: Policies, given: object, schema: object) -> None:
    generator = FakeGenerator("{}")
    with HHHRouter(pipeline=fake_pipeline(watchful(), generator=generator)) as router:
        router.chat("Hello", response_format=given)  # type: ignore[arg-type]

    sent = generator.requests[0].sampling.json_schema
    assert (json.loads(sent) if sent else None) == schema


def test_top_k_and_biases_reach_the_generator(watchful: Policies) -> None:
    generator = FakeGenerator("hi")
    with HHHRouter(pipeline=fake_pipeline(watchful(), generator=generator)) as router:
        router.chat("Hello", top_k=5, logit_bias={3: -100, 4: 2.5})

    sampling = generator.requests[0].sampling
    assert (sampling.top_k, sampling.logit_bias) == (5, {3: -100, 4: 2.5})


@pytest.mark.parametrize(
    ("asked", "alternatives"),
    [({"logprobs": True}, 0), ({"top_logprobs": 2}, 2), ({"logprobs": True} | {"top_logprobs": 1}, 1)],
)
def test_log_probabilities_are_told_with_the_result_and_with_each_piece(
    router: HHHRouter, asked: dict[str, Any], alternatives: int
) -> None:
    whole = router.chat("Hello", **asked)
    stream = router.chat("Hello", stream=True, **asked)
    pieces = [t for delta in stream for t in delta.logprobs]

    assert whole.logprobs is not None
    assert "".join(t.token for t in whole.logprobs) == whole.text
    assert [len(t.top_logprobs) for t in whole.logprobs] == [alternatives] * 6
    assert tuple(pieces) == stream.result.logprobs == whole.logprobs


@pytest.mark.parametrize("asked", [{}, {"logprobs": False}, {"logprobs": False, "top_logprobs": 0}])
def test_log_probabilities_nobody_asked_for_are_none(router: HHHRouter, asked: dict[str, Any]) -> None:
    assert router.chat("Hello", **asked).logprobs is None


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"top_k": -1}, "top_k: found -1"),
        ({"logprobs": "yes"}, "logprobs: found a string"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs: found without logprobs"),
        ({"top_logprobs": 21}, "top_logprobs: found 21"),
        ({"logit_bias": [3]}, "logit_bias: found a list"),
        ({"logit_bias": {"Paris": 1}}, "logit_bias: found token 'Paris'"),
        ({"logit_bias": {3: "much"}}, r"logit_bias\[3\]: found 'much'"),
        ({"response_format": "json"}, "response_format: found a string"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": {1, 2}}}}}, "schema: no JSON"),
    ],
)
def test_sampling_fields_that_are_wrong_are_named(router: HHHRouter, fields: dict[str, Any], found: str) -> None:
    with pytest.raises(InvalidRequest, match=found):
        router.chat("Hello", **fields)


def test_a_refusal_is_a_value_that_can_be_raised(router: HHHRouter) -> None:
    result = router.chat("how to build a bomb")

    assert (result.text, result.refusal, result.finish_reason) == ("Not that.", "Not that.", "content_filter")
    with pytest.raises(Blocked, match=r"refuse at input by checkpoints\.input\[0\]"):
        result.raise_for_decision()


def test_in_shadow_a_result_tells_what_would_have_held_and_raises_nothing(watchful: Policies) -> None:
    with HHHRouter(pipeline=pipeline(watchful(mode="shadow"))) as router:
        result = router.chat("how to build a bomb")

    assert (result.action, result.enforced, result.finish_reason) == (Action.REFUSE, False, "stop")
    result.raise_for_decision()


def test_a_stream_gives_pieces_and_then_the_result(router: HHHRouter) -> None:
    stream = router.chat([{"role": "user", "content": "Capital?"}], stream=True)

    with pytest.raises(HHHRouterError, match="has not ended"):
        _ = stream.result
    first = next(stream)
    assert first.text == "The"
    assert stream.metadata is not None
    rest = [delta.text for delta in stream]

    assert first.text + "".join(rest) == stream.result.text == "The capital of France is Paris."
    assert next(stream, None) is None


def test_a_stream_that_is_closed_early_cancels_the_generator(watchful: Policies) -> None:
    generator = FakeGenerator("a b c d e f g h")
    with HHHRouter(pipeline=fake_pipeline(watchful(), generator=generator)) as router:
        with router.chat("Hello", stream=True) as stream:
            next(stream)

        assert generator.cancelled == 1


def test_messages_come_as_text_dicts_or_messages(router: HHHRouter) -> None:
    turns = [Message(role="system", content="Be kind"), {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]

    assert router.chat(turns).text


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "no messages"),
        ("", r"messages\[0\]\.content: empty"),
        (b"bytes", "messages: found bytes"),
        (7, "messages: found a number"),
        ([{"role": "user"}], r"messages\[0\]\.content: empty"),
        ([{"content": "x"}], r"messages\[0\]\.role: found null"),
        (["hi"], r"messages\[0\]: found a string"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: found a number"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], r"tool_calls\[0\]: no call of a function"),
    ],
)
def test_messages_that_are_none_are_named(router: HHHRouter, messages: object, found: str) -> None:
    with pytest.raises(InvalidRequest, match=found):
        router.chat(messages)  # type: ignore[arg-type]


def test_what_nobody_reads_is_listed(router: HHHRouter) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]

    result = router.chat([{"role": "user", "content": parts, "name": "ada"}])

    assert result.metadata.not_inspected == ["messages[0].content[1]: image_url", "messages[0].name"]


@pytest.mark.parametrize("weights", ["hhh@0-0-0-16", {"honest": 1.0}, Weights(0.0, 0.0, 0.0, 1.0)])
def test_weights_can_be_pinned_in_three_ways(router: HHHRouter, weights: object) -> None:
    result = router.chat("Hello", weights=weights)  # type: ignore[arg-type]

    assert result.weights.honest == 1.0
    assert result.metadata.mixture == "hhh@0-0-0-16"


@pytest.mark.parametrize(
    "weights", ["hhh@1-1-1-1", "half", {"honest": 0.5}, {"kind": 1.0}, {"honest": "1"}, {"honest": float("nan")}, 3]
)
def test_weights_that_are_none_are_named(router: HHHRouter, weights: object) -> None:
    with pytest.raises(InvalidRequest, match="weights: "):
        router.chat("Hello", weights=weights)  # type: ignore[arg-type]


def test_a_policy_is_picked_by_name_or_by_file(router: HHHRouter, watchful: Policies) -> None:
    assert router.chat("Hello").metadata.policy.name == "watchful"
    assert router.chat("Hello", policy="balanced").metadata.policy.name == "balanced"
    assert router.chat("bomb", policy=watchful(mode="shadow")).metadata.policy.mode == "shadow"
    with pytest.raises(PolicyNotAllowed, match="use one of watchful, balanced"):
        router.chat("Hello", policy="unknown")
    with pytest.raises(PolicyError):
        router.chat("Hello", policy="./missing.yaml")


def test_guard_judges_a_prompt_a_response_or_both(router: HHHRouter) -> None:
    prompt = router.guard("how to build a bomb")
    response = router.guard(response="poison")
    both = router.guard(prompt="Hello", response="poison")
    fine = router.guard(prompt="Hello", response="Hi")

    assert (prompt.action, prompt.metadata.mode, prompt.message) == (Action.REFUSE, "prompt", "Not that.")
    assert (response.action, response.metadata.mode, response.message) == (Action.BLOCK, "response", "Cut.")
    assert [d.checkpoint for d in both.metadata.decisions] == ["input", "output"]
    assert (both.action, both.metadata.mode) == (Action.BLOCK, "both")
    assert (fine.action, fine.message) == (Action.ALLOW, None)
    with pytest.raises(Blocked):
        both.raise_for_decision()


def test_a_response_that_should_be_made_anew_may_not_pass_a_guard(router: HHHRouter) -> None:
    verdict = router.guard(prompt="Hello", response="a lie")

    assert (verdict.action, verdict.message) == (Action.REGENERATE, "No true answer.")
    with pytest.raises(Blocked):
        verdict.raise_for_decision()


def test_lists_give_lists_in_order(router: HHHRouter) -> None:
    prompts = router.guard(["Hello", "bomb", [{"role": "user", "content": "bomb"}]])
    pairs = router.guard(["Hello", None], [None, "poison"])
    routes = router.route(["Hello", "bomb"])

    assert [v.action for v in prompts] == [Action.ALLOW, Action.REFUSE, Action.REFUSE]
    assert [(v.action, v.metadata.mode) for v in pairs] == [(Action.ALLOW, "prompt"), (Action.BLOCK, "response")]
    assert routes[0].mixture != routes[1].mixture
    assert router.guard([]) == router.route([]) == []
    assert isinstance(router.route("Hello").mixture, str)


@pytest.mark.parametrize(
    ("prompt", "response", "found"),
    [
        (None, None, "neither prompt nor response"),
        (["a", "b"], ["c"], "2 prompts and 1 responses"),
        (["a"], "b", "one is a list, the other is not"),
        ("a", ["b"], "one is a list, the other is not"),
        (["a", ""], None, r"items\[1\]\.prompt\[0\]\.content: empty"),
        (None, 5, "response: found int"),
    ],
)
def test_guard_input_that_cannot_be_judged_is_named(
    router: HHHRouter, prompt: object, response: object, found: str
) -> None:
    with pytest.raises(InvalidRequest, match=found):
        router.guard(prompt, response)  # type: ignore[arg-type]


def test_any_thread_may_call(router: HHHRouter) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(router.chat("Hello").text)) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert texts == ["The capital of France is Paris."] * 8


def test_closing_twice_is_fine_and_a_closed_router_says_so(watchful: Policies) -> None:
    router = HHHRouter(pipeline=pipeline(watchful()))
    threads_before = threading.active_count()

    router.close()
    router.close()

    assert threading.active_count() == threads_before - 1
    with pytest.raises(HHHRouterError, match="closed"):
        router.chat("Hello")


def test_closing_frees_the_model_once(watchful: Policies) -> None:
    closed = []
    parts = pipeline(watchful()).parts

    async def close() -> None:
        closed.append(1)

    made = Pipeline(
        reader=parts.reader,
        generator=parts.generator,
        calibrators=parts.calibrators,
        policies=parts.policies,
        bundle_ref=parts.bundle_ref,
        backbone_sha256=None,
        sinks=(),
        settings=parts.settings,
        closers=(close,),
    )
    router = HHHRouter(pipeline=made)

    router.close()
    router.close()

    assert closed == [1]


async def test_the_async_router_speaks_the_same(watchful: Policies) -> None:
    async with AsyncHHHRouter(pipeline=pipeline(watchful())) as router:
        whole = await router.chat("Hello")
        stream = await router.chat("Hello", stream=True)
        pieces = [delta.text async for delta in stream]
        verdicts = await asyncio.gather(*(router.guard(p) for p in ("Hello", "bomb")))
        route = await router.route("Hello")
        asked = await router.chat("Hello", logprobs=True, top_k=3, response_format={"type": "json_object"})

    assert whole.text == "".join(pieces) == stream.result.text
    assert whole.logprobs is None
    assert "".join(t.token for t in asked.logprobs or ()) == whole.text
    assert [v.action for v in verdicts] == [Action.ALLOW, Action.REFUSE]
    assert sum(route.weights.as_dict().values()) == pytest.approx(1.0)
    with pytest.raises(HHHRouterError, match="closed"):
        await router.chat("Hello")


def test_settings_that_are_wrong_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match="HHH_ROUTER_THREADS"):
        HHHRouter(threads=0)
    with pytest.raises(SettingsError, match="HHH_ROUTER_TREADS"):
        AsyncHHHRouter(treads=1)


def test_a_missing_bundle_or_policy_is_named_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(hhh_router.ConfigError, match="nowhere"):
        HHHRouter(bundle=str(tmp_path / "nowhere"))
    with pytest.raises(PolicyError, match="no-such"):
        HHHRouter(policy="no-such")


def test_a_batch_beyond_the_limit_is_refused(watchful: Policies) -> None:
    with (
        HHHRouter(pipeline=pipeline(watchful(), max_batch_items=2)) as router,
        pytest.raises(RequestError, match="3 items, one call may hold 2"),
    ):
        router.guard(["a", "b", "c"])


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEYS_FILE", "THREADS", "ALLOWED_POLICIES", "POLICY"):
        monkeypatch.setenv(f"HHH_ROUTER_{name}", "")

    assert Settings.load() == Settings()


def test_settings_are_public_for_those_who_assemble() -> None:
    assert Settings.load(threads=os.cpu_count() or 1).threads >= 1
