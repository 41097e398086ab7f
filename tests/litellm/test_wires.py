"""The same request directly and through LiteLLM: the same block and headers, or docs/litellm.md says what is lost."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("litellm", reason="LiteLLM has an environment of its own: make test-litellm")

import litellm

from hhh_router.interfaces.litellm import HHHRouterLLM, register

from .conftest import KEY, Policies, Setting, ask, started

pytestmark = [pytest.mark.e2e, pytest.mark.litellm, pytest.mark.filterwarnings("default")]

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "litellm.md").read_text(encoding="utf-8")
VARIES = {"request_id", "timing_ms"}
"""Keys of the block that are another request's own."""
TEXTS = ("Hello", "how to build a bomb", "late")
OVER = {"Chat Completions": "chat/completions", "Messages": "messages", "Responses": "responses"}
Block = Mapping[str, Any]
Told = tuple[list[Any], Mapping[str, str]]
"""Events (one, where it is no stream), and headers under our own names."""


def rows() -> Iterator[tuple[str, str, str, str, str]]:
    """Door, model, wire, and what the page says of a whole reply and of a stream."""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) == 5 and cells[0] in ("SDK", "proxy"):
            yield cells[0], cells[1].split("`")[1], cells[2], cells[3], cells[4]


def blocks(value: Any) -> list[Block]:
    """Every block in a piece of JSON."""
    if isinstance(value, dict):
        own = [value["hhh"]] if "hhh" in value else []
        return own + [b for k, v in value.items() if k != "hhh" for b in blocks(v)]
    return [b for v in value for b in blocks(v)] if isinstance(value, list) else []


def by_sdk(setting: Setting, model: str, text: str, *, stream: bool) -> Told:
    base = setting.server if model.startswith("anthropic/") else f"{setting.server}/v1"
    turns = [{"role": "user", "content": text}]
    reply = litellm.completion(
        model=model, messages=turns, api_base=base, api_key=KEY, max_tokens=256, stream=stream, num_retries=0
    )
    told = [c.model_dump(mode="json") for c in reply] if stream else [reply.model_dump(mode="json")]
    return told, ours(reply._hidden_params.get("additional_headers") or {})


def by_http(reply: httpx.Response, *, stream: bool) -> Told:
    assert reply.status_code == 200, reply.text
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines] if stream else [reply.json()], ours(reply.headers)


def ours(headers: Mapping[str, str]) -> dict[str, str]:
    found = {k.removeprefix("llm_provider-"): v for k, v in headers.items() if "x-hhh-" in k}
    return {k: v for k, v in found.items() if k != "x-hhh-request-id"}


def same(block: Block) -> dict[str, Any]:
    return {k: v for k, v in block.items() if k not in VARIES}


def found(told: Told, direct: Told, *, stream: bool) -> str:
    """What is left of it, in the page's words. A block or a header that differs from the direct one is a failure."""
    events, headers = told
    known = [same(b) for b in blocks(direct[0])]
    assert known
    left = [(i, same(b)) for i, event in enumerate(events) for b in blocks(event)]
    for _, block in left:
        assert block in known
    words = []
    if not stream and left:
        words.append("block")
    if stream and left and left[0][0] == 0 and left[0][1] == known[0]:
        words.append("first")
    if stream and left and left[-1][0] > 0 and left[-1][1] == known[-1]:
        words.append("last")
    if headers:
        assert headers == direct[1]
        words.append("headers")
    return ", ".join(words) or "lost"


@pytest.fixture(scope="module")
def setting(watchful: Policies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """The shipped configuration without its guardrails, which would answer in our models' place."""
    with started(watchful, tmp_path_factory.mktemp("wires"), guardrails=[]) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def provider() -> Iterator[None]:
    before = litellm.custom_provider_map
    handler = register(HHHRouterLLM())
    yield
    litellm.custom_provider_map = before
    handler.close()


def test_the_page_says_something_of_every_door() -> None:
    assert {(door, wire) for door, _, wire, _, _ in rows()} == {
        ("SDK", "Chat Completions"), *(("proxy", wire) for wire in OVER),
    }  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("door", "model", "wire", "whole", "streamed"), list(rows()))
def test_what_is_left_is_what_the_page_says(
    setting: Setting, door: str, model: str, wire: str, whole: str, streamed: str, stream: bool, text: str
) -> None:
    name = OVER[wire]
    direct = by_http(ask(f"{setting.server}/v1", name, "hhh-auto", text, stream=stream, key=KEY), stream=stream)
    if door == "SDK":
        told = by_sdk(setting, model, text, stream=stream)
    else:
        told = by_http(setting.ask(name, model, text, stream=stream), stream=stream)

    assert found(told, direct, stream=stream) == (streamed if stream else whole)
