"""One request through the real two-stage pass: read at l_r, plan, stop or go on, read again while decoding."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError, ContextTooLong, GeneratorError
from hhh_router.model.engine import EmbeddedModel
from hhh_router.model.experts import load_experts
from hhh_router.model.worker import load_embedded
from hhh_router.protocols import Delta, Event, Finished, Planned, Planner, Window
from hhh_router.settings import Settings
from hhh_router.types import (
    Action,
    ChatRequest,
    Decision,
    Evidence,
    Message,
    Plan,
    Posterior,
    ReadRequest,
    Sampling,
    Scores,
    Weights,
)

pytestmark = pytest.mark.integration
EVEN = Posterior(0.25, 0.25, 0.25, 0.25)
MIXED = Weights(0.1, 0.2, 0.3, 0.4)


@pytest.fixture
async def model(tiny: Bundle, tmp_path: Path) -> AsyncIterator[EmbeddedModel]:
    loaded = load_embedded(tiny, Settings.load(cache_dir=tmp_path, threads=1))
    yield loaded
    await loaded.aclose()


def planner(action: Action = Action.ALLOW, weights: Weights = MIXED) -> Planner:
    def plan(scores: Scores) -> Plan:
        evidence = Evidence(
            mode="prompt", needs={}, posterior=EVEN, outcomes={}, in_distribution=True, calibrated=False, scores=scores
        )
        decision = Decision(checkpoint="input", action=action, rule="test", reason="test")
        return Plan(evidence=evidence, decision=decision, weights=weights, policy_shift_nats=0.0, confidence=0.5)

    return plan


def ask(text: str, **sampling: object) -> ChatRequest:
    return ChatRequest(
        messages=(Message(role="user", content=text),), sampling=Sampling(**({"max_tokens": 20} | sampling))
    )  # type: ignore[arg-type]


async def events(model: EmbeddedModel, request: ChatRequest, plan: Planner, window_tokens: int = 8) -> list[Event]:
    return [e async for e in model.generator.generate(request, plan, window_tokens=window_tokens)]


def text_of(found: list[Event]) -> str:
    return "".join(e.text for e in found if isinstance(e, Delta))


async def test_a_stop_leaves_the_upper_layers_unrun(model: EmbeddedModel) -> None:
    calls: list[int] = []
    layers = model.engine._batcher.reader.stack.layers
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))

    found = await events(model, ask("hello"), planner(Action.REFUSE))

    assert calls == [0, 1]
    assert [type(e) for e in found] == [Planned, Finished]
    assert found[0].layers_run == 2


async def test_going_on_runs_every_layer_once_for_the_prompt(model: EmbeddedModel) -> None:
    calls: list[int] = []
    layers = model.engine._batcher.reader.stack.layers
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))

    found = await events(model, ask("hello", max_tokens=1), planner())

    assert calls[:4] == [0, 1, 2, 3]
    assert found[0].layers_run == 4


async def test_windows_read_what_a_guard_would_read_of_the_finished_reply(model: EmbeddedModel) -> None:
    request = ask("tell me something", max_tokens=17)

    found = await events(model, request, planner(), window_tokens=6)
    last = next(e for e in reversed(found) if isinstance(e, Window))
    (guarded,) = await model.reader.read([ReadRequest(messages=request.messages, response=text_of(found))])

    assert last.is_final
    assert [e.completion_tokens for e in found if isinstance(e, Window)] == [6, 12, 17]
    if guarded.tokens == last.scores.tokens:  # random bytes may not survive decoding to text and back
        for name, logit in guarded.outcomes.items():
            assert last.scores.outcomes[name] == pytest.approx(logit, abs=1e-3)
    assert last.scores.needs == pytest.approx(guarded.needs, abs=1e-3)


async def test_weights_change_greedy_text(model: EmbeddedModel) -> None:
    replies = {
        text_of(await events(model, ask("tell me something"), planner(weights=w)))
        for w in (Weights(1, 0, 0, 0), Weights(0, 1, 0, 0), Weights(0, 0, 1, 0), Weights(0, 0, 0, 1))
    }

    assert len(replies) == 4


async def test_requests_that_run_at_once_do_not_mix_their_weights(model: EmbeddedModel) -> None:
    weightings = [Weights(1, 0, 0, 0), Weights(0, 1, 0, 0), Weights(0, 0, 1, 0), Weights(0.1, 0.2, 0.3, 0.4)]
    alone = [text_of(await events(model, ask("tell me something"), planner(weights=w))) for w in weightings]

    together = await asyncio.gather(*(events(model, ask("tell me something"), planner(weights=w)) for w in weightings))

    assert [text_of(t) for t in together] == alone


async def test_a_seed_repeats_a_sampled_reply(model: EmbeddedModel) -> None:
    hot = {"temperature": 1.5, "top_p": 0.9}
    first, again, other = [
        text_of(await events(model, ask("tell me something", seed=seed, **hot), planner())) for seed in (1, 1, 2)
    ]

    assert first == again != other


async def test_a_stop_string_ends_the_reply_and_is_not_part_of_it(model: EmbeddedModel) -> None:
    whole = text_of(await events(model, ask("tell me something"), planner()))
    stop = whole[4:6]

    found = await events(model, ask("tell me something", stop=(stop,)), planner())

    assert text_of(found) == whole[: whole.index(stop)]
    assert found[-1].reason == "stop"


async def test_a_prompt_beyond_the_window_is_a_named_error(model: EmbeddedModel) -> None:
    with pytest.raises(ContextTooLong, match=r"\d+ tokens"):
        await events(model, ask("x" * 600), planner())
    with pytest.raises(ContextTooLong, match="text 1 of 2"):
        await model.reader.read(
            [ReadRequest(messages=ask("a").messages), ReadRequest(messages=ask("x" * 600).messages)]
        )


async def test_a_batch_reads_like_single_texts_in_any_order(model: EmbeddedModel) -> None:
    requests = [ReadRequest(messages=ask("word " * n).messages) for n in (30, 1, 12, 5)]
    requests += [ReadRequest(messages=ask("hi").messages, response="well"), ReadRequest(response="alone")]

    batch = await model.reader.read(requests)
    single = [(await model.reader.read([r]))[0] for r in requests]

    for a, b in zip(batch, single, strict=True):
        assert (a.mode, a.tokens, a.layers_run) == (b.mode, b.tokens, 2)
        assert a.outcomes == pytest.approx(b.outcomes, abs=1e-4)
        assert a.needs == pytest.approx(b.needs, abs=1e-4)


async def test_needs_are_the_requests_whatever_the_reply(model: EmbeddedModel) -> None:
    prompt = ask("hello there").messages
    alone, calm, rude = await model.reader.read(
        [ReadRequest(messages=prompt, response=r) for r in (None, "good day", "go away!!")]
    )

    assert calm.needs == pytest.approx(alone.needs, abs=1e-4)
    assert rude.needs == pytest.approx(alone.needs, abs=1e-4)
    assert calm.outcomes != pytest.approx(rude.outcomes, abs=1e-4)


async def test_a_failing_planner_reaches_the_caller_and_the_model_goes_on(model: EmbeddedModel) -> None:
    def broken(scores: Scores) -> Plan:
        raise RuntimeError("boom")

    with pytest.raises(GeneratorError, match="boom"):
        await events(model, ask("hello"), broken)

    assert text_of(await events(model, ask("hello"), planner()))


async def test_closing_the_stream_ends_the_work(model: EmbeddedModel) -> None:
    stream = model.generator.generate(ask("hello", max_tokens=400), planner(), window_tokens=8)
    async for event in stream:
        if isinstance(event, Delta):
            break
    await stream.aclose()

    (scores,) = await asyncio.wait_for(model.reader.read([ReadRequest(messages=ask("next").messages)]), timeout=5)
    assert scores.tokens


def test_nan_in_an_adapter_is_refused(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / "experts" / "honest" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)

    with pytest.raises(BundleError, match="NaN"):
        load_experts(Bundle.load(copy_of_tiny))
    with pytest.raises(BundleError, match="sha256"):
        Bundle.load(copy_of_tiny).verify()


def test_a_bundle_for_another_backbone_is_refused(copy_of_tiny: Path, tmp_path: Path) -> None:
    manifest = (copy_of_tiny / "manifest.json").read_text()
    (copy_of_tiny / "manifest.json").write_text(manifest.replace('"layers": 4', '"layers": 6'))

    with pytest.raises(BundleError, match=r"(?s)is 4.*says 6.*another backbone"):
        load_embedded(Bundle.load(copy_of_tiny), Settings.load(cache_dir=tmp_path, threads=1))


def test_dora_and_other_inexact_adapters_are_refused(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / "experts" / "helpful" / "adapter_config.json"
    path.write_text(path.read_text().replace('"use_dora": false', '"use_dora": true'))

    with pytest.raises(BundleError, match="use_dora"):
        load_experts(Bundle.load(copy_of_tiny))


async def test_a_caller_who_does_not_read_loses_the_reply_and_frees_the_row(
    model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hhh_router.model.engine._UNREAD_EVENTS", 5)
    stream = model.generator.generate(
        ask("hello", max_tokens=400, logit_bias={256: -100.0}), planner(), window_tokens=8
    )
    await anext(stream)

    while model.engine._turning:  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)

    assert model.engine.load.rows == 0
    with pytest.raises(GeneratorError, match="have not been read"):
        async for _ in stream:
            pass


async def test_draining_waits_for_what_has_only_just_come(model: EmbeddedModel) -> None:
    tasks = [asyncio.create_task(events(model, ask(f"number {i}", max_tokens=6), planner())) for i in range(4)]
    await asyncio.sleep(0)  # each has been put in, none has been looked at

    assert await asyncio.to_thread(model.engine.drain, 60)

    assert all([isinstance((await t)[-1], Finished) for t in tasks])
