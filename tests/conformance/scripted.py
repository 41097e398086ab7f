"""A server of ours whose model is a stand-in that calls tools: ``python -m tests.conformance.scripted``.

The default bundle, of 135M parameters, calls a tool when it must and hardly ever by itself; what is tried with this one
is that a client's loop of calls and results goes round, not that a model thinks of it. It also judges by words ("bomb"
in a prompt, "poison" in a reply), so that both sides of a refusal can be had for certain.
"""

from __future__ import annotations

import json
from typing import Any

from hhh_router.interfaces.server.run import listen, run
from hhh_router.settings import Settings
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.tools import calls_as_text
from hhh_router.types import ChatRequest, ToolCall

RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
ANSWER = "It is mild."


def says(request: ChatRequest) -> str:
    """A call of each tool that there is (all in one reply), then, once there are results, a sentence.

    A tool called ``final_result`` takes the answer itself: frameworks have it for replies of a given type, and it is
    called last and alone.
    """
    tools = request.tools.callable if request.tools is not None else ()
    last = [t for t in tools if t.name == "final_result"]
    others = [t for t in tools if t not in last]
    answered = request.messages[-1].role == "tool"
    wanted = last if answered or not others else others
    if answered and not wanted:
        return ANSWER
    if request.tools is not None and not request.tools.parallel:
        wanted = wanted[:1]
    calls = [ToolCall(id="", name=t.name, arguments=json.dumps(example_of(json.loads(t.parameters)))) for t in wanted]
    return calls_as_text(calls) or f"You said: {request.messages[-1].content}"


def example_of(schema: dict[str, Any], root: dict[str, Any] | None = None) -> Any:
    """A value that fits a schema of the plain kind that frameworks make of a function's arguments.

    >>> example_of({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}})
    {'city': 'Oslo', 'days': 1}
    """
    root = root or schema
    if "$ref" in schema:
        return example_of(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if choices := schema.get("enum") or [schema[k] for k in ("const", "default") if k in schema]:
        return choices[0]
    if options := schema.get("anyOf"):
        return example_of(options[0], root)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: example_of(part, root) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [example_of(schema.get("items", {"type": "string"}), root)]
    return {"string": "Oslo", "integer": 1, "number": 1.5, "boolean": True, "null": None}[kind]


def main() -> None:
    """Listen on a free port of loopback, say so as ``hhh-router serve`` does, and serve until interrupted."""
    reader = FakeReader(RULES)
    pipeline = fake_pipeline(reader=reader, generator=FakeGenerator(says, reader=reader))
    with listen("127.0.0.1", 0, Settings.load()) as listening:
        run(pipeline, listening, on_ready=lambda url: print(f"hhh-router listens on {url}/v1", flush=True))


if __name__ == "__main__":
    main()
