"""Settings → pipeline on a tiny bundle: the real model, reader and generator behind every door."""

import asyncio
import json
from pathlib import Path

import pytest

from hhh_router import AsyncHHHRouter, HHHRouter
from hhh_router.assemble import build_pipeline, check_upstream
from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError, ContextTooLong, PolicyError, SettingsError
from hhh_router.settings import Settings

pytestmark = pytest.mark.integration

REFUSING = """\
version: 1
name: refusing
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0
checkpoints:
  input: [{then: refuse, message: "Not today."}]
  output: [{then: allow}]
"""


def settings_for(bundle: Path, **more: object) -> Settings:
    return Settings.load(bundle=str(bundle), threads=1, **more)


def test_one_router_chats_streams_guards_and_routes(tiny: Bundle) -> None:
    with HHHRouter(pipeline=build_pipeline(settings_for(tiny.root), sinks=())) as router:
        whole = router.chat("hello there", max_tokens=8)
        stream = router.chat("hello there", max_tokens=8, stream=True)
        streamed = "".join(delta.text for delta in stream)
        verdicts = router.guard(["a", "b c d"], ["x", None])
        [route] = router.route(["hello there"])

    assert whole.text == streamed == stream.result.text
    assert whole.usage == stream.result.usage
    assert whole.metadata.layers_run == tiny.manifest.backbone.layers
    assert whole.metadata.bundle.name == tiny.manifest.name
    assert whole.metadata.receipt.bundle_sha256 == tiny.sha256
    assert whole.weights == route.weights
    assert [v.metadata.mode for v in verdicts] == ["both", "prompt"]
    assert json.dumps(whole.metadata.as_json(), allow_nan=False)


def test_an_input_refusal_leaves_the_upper_layers_unrun(tiny: Bundle, tmp_path: Path) -> None:
    policy = tmp_path / "refusing.yaml"
    policy.write_text(REFUSING)

    with HHHRouter(bundle=tiny.root, policy=policy, threads=1) as router:
        result = router.chat("anything")

    assert (result.text, result.finish_reason) == ("Not today.", "content_filter")
    assert result.metadata.layers_run == tiny.manifest.first_adapted_layer
    assert result.usage.completion_tokens == 0


def test_a_prompt_beyond_the_window_is_named(tiny: Bundle) -> None:
    with HHHRouter(bundle=tiny.root, threads=1) as router:
        with pytest.raises(ContextTooLong):
            router.chat("word " * 5000)
        with pytest.raises(ContextTooLong, match="1 of 2"):
            router.guard(["fine", "word " * 5000])
        assert router.chat("still alive", max_tokens=2).finish_reason in ("length", "stop")


async def test_a_stream_left_early_frees_the_model(tiny: Bundle) -> None:
    async with AsyncHHHRouter(bundle=tiny.root, threads=1) as router:
        stream = await router.chat("hello", stream=True, max_tokens=400)
        async with stream:
            await anext(stream)
        again = await asyncio.wait_for(router.chat("hello", max_tokens=2), 20)

    assert again.usage.completion_tokens <= 2


def test_a_changed_file_refuses_to_start(copy_of_tiny: Path) -> None:
    heads = copy_of_tiny / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1] + b"\x7f")

    with pytest.raises(BundleError, match=r"heads\.safetensors: sha256"):
        build_pipeline(settings_for(copy_of_tiny))


def test_a_bundle_without_calibrators_starts_only_when_allowed(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibrators": None}))

    with pytest.raises(BundleError, match="no calibrators"):
        build_pipeline(settings_for(copy_of_tiny))
    with HHHRouter(bundle=copy_of_tiny, threads=1, allow_uncalibrated=True) as router:
        assert not router.guard("hello").metadata.calibration.calibrated


def test_a_bundle_without_heads_does_not_start(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"heads": None}))

    with pytest.raises(BundleError, match="no router heads"):
        build_pipeline(settings_for(copy_of_tiny))


def test_cheap_mistakes_are_found_before_the_model_is_loaded(tiny: Bundle) -> None:
    with pytest.raises(PolicyError):
        build_pipeline(settings_for(tiny.root, policy="nope"))
    with pytest.raises(SettingsError, match="no http"):
        check_upstream("localhost:9000")
