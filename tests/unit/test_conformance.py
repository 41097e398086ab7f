"""The catalogue of clients, their page and the stand-in that calls tools."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.interfaces.server.app import create_app
from hhh_router.testing import FakeGenerator, fake_pipeline
from tests.conformance.catalogue import CLIENTS, FEATURES, Client
from tests.conformance.clients import probe
from tests.conformance.run import SCRIPTS, summary
from tests.conformance.scripted import ANSWER, example_of, says
from tests.conformance.table import page

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": probe.WEATHER["parameters"]}}


def tried(*found: tuple[str, str, str]) -> dict[str, Any]:
    rows = [{"feature": f, "by": "bundle", "outcome": o, "told": t} for f, o, t in found]
    return {"versions": {"x": "1.0"}, "found": rows}


def test_every_client_has_a_script_that_names_known_features() -> None:
    for client in CLIENTS:
        text = (SCRIPTS / client.script).read_text(encoding="utf-8")
        named = set(re.findall(r"""feature\(["']([^"']+)["']""", text)) | set(re.findall(r"^  (\w+): \[", text, re.M))
        assert named, client.script
        assert named <= set(FEATURES), client.script
    assert len({c.slug for c in CLIENTS}) == len({c.name for c in CLIENTS}) == len(CLIENTS)


def test_packages_are_pinned() -> None:
    for client in CLIENTS:
        for package in client.packages:
            assert re.search(r"(==|.@)\d+(\.\d+)+$", package), package


def test_the_page_tells_reasons_and_what_was_not_run() -> None:
    clients = (Client(slug="a", name="A", script="a.py"), Client(slug="b", name="B", script="b.py"))
    results = {"A": tried(("chat", "pass", ""), ("stream", "fail", "it broke\noff"))}

    text = page(clients, results)

    assert "| A | pass | **fail** |" in text
    assert "  - stream: **fail**: it broke off\n" in text
    assert "- **B**: not run." in text


def test_what_broke_off_is_told_though_nothing_failed() -> None:
    result = tried(("chat", "pass", "")) | {"broke": "the script did not end within 3 s; its last line: x"}

    assert "did not end within 3 s" in summary(result)
    assert "**fail**: the script did not end" in page((Client(slug="a", name="A", script="a.py"),), {"A": result})


def test_the_stand_in_calls_every_tool_once_and_then_answers() -> None:
    with TestClient(create_app(fake_pipeline(generator=FakeGenerator(says)))) as client:
        turns: list[Any] = [{"role": "user", "content": "Hi"}]
        body: dict[str, Any] = {"model": "hhh-auto", "tools": [TOOL]}
        called = client.post("/v1/chat/completions", json=body | {"messages": turns}).json()["choices"][0]["message"]
        [call] = called["tool_calls"]
        turns += [called, {"role": "tool", "tool_call_id": call["id"], "content": "12"}]
        said = client.post("/v1/chat/completions", json=body | {"messages": turns}).json()["choices"][0]["message"]

    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert said["content"] == ANSWER


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"enum": ["x", "y"]}, "x"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 1),
        ({"type": "array", "items": {"type": "boolean"}}, [True]),
        (
            {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"b": {"type": "number"}}}}},
            {"b": 1.5},
        ),
    ],
)
def test_examples_fit_their_schema(schema: dict[str, Any], value: Any) -> None:
    assert example_of(schema) == value


def test_the_pages_examples_are_about_ten_lines_and_all_are_run() -> None:
    blocks = dict(re.findall(r"<!-- run: ([\w-]+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
    scripts = "".join((SCRIPTS / c.script).read_text(encoding="utf-8") for c in CLIENTS)

    assert set(blocks) == set(re.findall(r'example\("([\w-]+)", url\)', scripts))
    assert len(blocks) == PAGE.count("```python")
    for name, code in blocks.items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 13, name
        compile(code, name, "exec")


def test_an_example_that_is_not_there_is_an_error() -> None:
    with pytest.raises(LookupError, match="0 examples called 'nonesuch'"):
        probe.example("nonesuch", "http://127.0.0.1:1/v1")
