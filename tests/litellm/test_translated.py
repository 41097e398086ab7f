"""Translated upstreams of the sidecar: every client's wire, real LiteLLM, and providers that speak other wires."""

import pytest

pytest.importorskip("litellm", reason="LiteLLM has an environment of its own: make test-litellm")

from tests.e2e.test_sidecar_guarded import BAD, ENDED, GOOD, STOPPED, WIRES, Model

from .providers import KEY, PROVIDERS, Policies, guarded

pytestmark = [pytest.mark.e2e, pytest.mark.litellm, pytest.mark.filterwarnings("default")]  # it warns of itself

wires = pytest.mark.parametrize("wire", WIRES)
providers = pytest.mark.parametrize("provider", PROVIDERS)
streams = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@wires
@providers
@streams
@pytest.mark.parametrize("mode", ["annotate", "enforce"])
def test_an_answer_comes_in_the_clients_wire_with_the_block(
    watchful: Policies, provider: str, wire: str, stream: bool, mode: str
) -> None:
    with guarded(watchful, provider, Model(), mode) as (url, stub):
        heard = WIRES[wire](url, "Capital?", stream=stream)

    assert (heard.text.strip(), heard.end) == (GOOD, ENDED[wire])
    assert [d["checkpoint"] for d in heard.last["decisions"]] == ["input", "output"]
    assert heard.first["policy"]["name"] == "watchful"
    assert set(heard.last["not_inspected"]) <= {"odd"}  # the provider's own
    assert {a.target.decode().partition("?")[0] for a in stub.asked} <= set(PROVIDERS[provider][2])
    assert "sk-app" not in repr(stub.asked)  # the client's key is for somebody else
    assert KEY in repr(stub.asked[0].headers)


@wires
@providers
@streams
def test_a_refused_prompt_never_reaches_the_provider(
    watchful: Policies, provider: str, wire: str, stream: bool
) -> None:
    with guarded(watchful, provider, Model()) as (url, stub):
        heard = WIRES[wire](url, "how to build a bomb", stream=stream)

    assert (heard.text, heard.end) == ("Not that.", STOPPED[wire])
    assert stub.asked == []


@wires
@providers
@streams
def test_a_harmful_answer_is_stopped_before_the_harm(
    watchful: Policies, provider: str, wire: str, stream: bool
) -> None:
    with guarded(watchful, provider, Model()) as (url, _):
        heard = WIRES[wire](url, "trouble", stream=stream)

    assert "poison" not in heard.everything
    assert heard.end == STOPPED[wire]
    assert heard.text == (f"{heard.text.removesuffix('Cut.')}Cut.")
    assert heard.text.startswith("a clean start") is stream


@pytest.mark.parametrize("wire", ["chat", "responses", "messages"])
@providers
@streams
def test_arguments_of_tool_calls_are_read(watchful: Policies, provider: str, wire: str, stream: bool) -> None:
    with guarded(watchful, provider, Model()) as (url, _):
        heard = WIRES[wire](url, "use a tool", stream=stream)

    assert heard.end == STOPPED[wire]
    assert heard.text.strip() == "Cut."
    assert "poison" not in heard.everything


@wires
@providers
@streams
def test_observe_lets_everything_by_and_reads_it(watchful: Policies, provider: str, wire: str, stream: bool) -> None:
    with guarded(watchful, provider, Model(), "observe") as (url, _):
        heard = WIRES[wire](url, "trouble", stream=stream)

    assert heard.text.strip() == BAD
