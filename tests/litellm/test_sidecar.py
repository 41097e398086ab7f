"""LiteLLM's SDK through a sidecar in front of a server of ours, on two wires."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("litellm", reason="LiteLLM has an environment of its own: make test-litellm")

import litellm

from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from tests.e2e.loopback import served
from tests.e2e.sidecars import route_to, sidecar

pytestmark = [pytest.mark.e2e, pytest.mark.litellm, pytest.mark.filterwarnings("default")]  # it warns of itself

RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
GOOD = "The capital of France is Paris and it has been so for long"
BAD = "a clean start of a long reply and then the poison comes"


@pytest.fixture
def url(watchful: Callable[..., Path]) -> Iterator[str]:
    behind = fake_pipeline("balanced", generator=FakeGenerator(lambda asked: _reply(asked.messages[-1].content)))
    with served(behind) as own, sidecar(route_to(own), policy=watchful(), reader=FakeReader(RULES)) as (url, _):
        yield url


def _reply(prompt: str) -> str:
    return BAD if "trouble" in prompt else GOOD


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("wire", ["openai", "anthropic"])
@pytest.mark.parametrize(
    ("prompt", "text", "reason"),
    [("Capital?", GOOD, "stop"), ("a bomb", "Not that.", "content_filter"), ("trouble", "Cut.", "content_filter")],
)
def test_litellm_gets_what_was_cleared(url: str, wire: str, prompt: str, text: str, reason: str, stream: bool) -> None:
    base = f"{url}/v1" if wire == "openai" else url
    reply = litellm.completion(
        model=f"{wire}/hhh-auto",
        messages=[{"role": "user", "content": prompt}],
        api_base=base,
        api_key="sk-app",
        max_tokens=100,
        stream=stream,
        num_retries=0,
    )

    if stream:
        chunks = list(reply)
        said = "".join(c.choices[0].delta.content or "" for c in chunks)
        ended = next(c.choices[0].finish_reason for c in reversed(chunks) if c.choices[0].finish_reason)
    else:
        said, ended = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert said.endswith(text)
    assert "poison" not in said
    assert ended == reason
