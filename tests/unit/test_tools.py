"""Tools and calls as text, and how a reply is parted into words and calls."""

import json
from typing import Any

import pytest

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.tools import parse_tools
from hhh_router.tools import CLOSE, OPEN, CallScanner, as_openai, as_text, call_grammar, calls_as_text
from hhh_router.types import Message, Tool, ToolCall

WEATHER = Tool(name="weather", description="Of a city", parameters='{"type":"object"}')
CALL = ToolCall(id="call_1", name="weather", arguments='{"city": "Oslo"}')
WRITTEN = f'{OPEN}[{{"name": "weather", "arguments": {{"city": "Oslo"}}}}]{CLOSE}'


def scan(*pieces: str) -> tuple[str, list[ToolCall]]:
    scanner = CallScanner(["weather", "now"], prefix="call_r")
    texts, calls = [], []
    for piece in pieces:
        text, found = scanner.push(piece)
        texts.append(text)
        calls += found
    return "".join(texts) + scanner.end(), calls


def test_what_is_written_is_what_is_found_again() -> None:
    text, [found] = scan(calls_as_text([CALL]))

    assert text == ""
    assert (found.name, found.arguments) == (CALL.name, CALL.arguments)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_found_however_the_reply_is_cut(size: int) -> None:
    reply = f"Let me look, 1 < 2. {WRITTEN}"

    text, calls = scan(*(reply[i : i + size] for i in range(0, len(reply), size)))

    assert text == "Let me look, 1 < 2. "
    assert [(c.id, c.name, c.arguments) for c in calls] == [("call_r_0", "weather", '{"city": "Oslo"}')]


def test_calls_in_one_list_and_in_marks_of_their_own_are_the_same() -> None:
    one, other = '{"name": "now", "arguments": {}}', '{"name": "weather", "arguments": {"city": "Rom"}}'

    listed = scan(f"{OPEN}[{one}, {other}]{CLOSE}")
    apart = scan(f"{OPEN}\n{one}\n{CLOSE}\n{OPEN}\n{other}\n{CLOSE}")

    assert listed[1] == apart[1]
    assert [c.id for c in listed[1]] == ["call_r_0", "call_r_1"]


@pytest.mark.parametrize(
    "reply",
    [
        f"{OPEN}nonsense{CLOSE}",
        f'{OPEN}[{{"name": "unknown", "arguments": {{}}}}]{CLOSE}',
        f'{OPEN}[{{"name": "now", "arguments": "{{}}"}}]{CLOSE}',
        f'{OPEN}[{{"name": "now"}}]{CLOSE}',
        f"{OPEN}[]{CLOSE}",
        f"{OPEN}{'[' * 100_000}{CLOSE}",
        f'{OPEN}[{{"name": "now", "arguments": {{',
        "a < b and <tool",
        f"{CLOSE} only",
    ],
)
def test_what_is_no_call_stays_text(reply: str) -> None:
    assert scan(reply) == (reply, [])


def test_text_is_not_held_back_longer_than_it_may_become_a_mark() -> None:
    scanner = CallScanner(["now"], prefix="c")

    assert scanner.push("a <b")[0] == "a <b"
    assert scanner.push("a <tool_")[0] == "a "
    assert scanner.push("box")[0] == "<tool_box"


def test_a_model_is_told_of_tools_in_the_system_turn() -> None:
    system, user = as_text([Message(role="user", content="Hi")], [WEATHER])

    assert (system.role, user.content) == ("system", "Hi")
    told = system.content.split("<tools>")[1].split("</tools>")[0]
    assert json.loads(told) == [as_openai(WEATHER)["function"]]
    assert OPEN in system.content


def test_a_system_turn_of_the_callers_comes_first_and_calls_are_part_of_their_turn() -> None:
    turns = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="Hi"),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content="12 degrees", tool_call_id="call_1"),
    ]

    told = as_text(turns, [WEATHER])

    assert told[0].content.startswith("Be brief.\n\n")
    assert told[2] == Message(role="assistant", content=WRITTEN)
    assert told[3] == Message(role="tool", content="12 degrees")


def test_a_name_cannot_leave_its_place_in_the_grammar() -> None:
    grammar = call_grammar([WEATHER], required=True, parallel=False, listed=True, marks=False)

    assert '"{\\"name\\": \\"weather\\", \\"arguments\\": "' in grammar
    assert 'rest: "[" call "]"' in grammar  # nothing behind the first call


# -- as they come over the wire ---------------------------------------------------------------------------------------


def function(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def test_both_of_openais_forms_are_the_same_tool() -> None:
    nested = parse_tools([function(description="d", parameters={"type": "object"}, strict=True)])
    flat = parse_tools([{"type": "function", "name": "weather", "description": "d", "parameters": {}, "strict": True}])

    assert nested is not None
    assert flat is not None
    assert nested.tools[0].name == flat.tools[0].name == "weather"
    assert nested.tools[0].strict
    assert json.loads(flat.tools[0].parameters) == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("choice", "required", "only"),
    [
        (None, False, ()),
        ("auto", False, ()),
        ("required", True, ()),
        ({"type": "function", "function": {"name": "now"}}, True, ("now",)),
        ({"type": "function", "name": "now"}, True, ("now",)),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("now")]}}, False, ("now",)),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}, True, ("now",)),
    ],
)
def test_every_choice_of_openais_is_understood(choice: object, required: bool, only: tuple[str, ...]) -> None:
    use = parse_tools([function(), function("now")], choice)

    assert use is not None
    assert (use.required, use.only) == (required, only)
    assert [t.name for t in use.callable] == (list(only) or ["weather", "now"])


@pytest.mark.parametrize(("tools", "choice"), [(None, None), ([], "auto"), ([function()], "none")])
def test_nothing_to_call_is_none(tools: object, choice: object) -> None:
    assert parse_tools(tools, choice) is None


@pytest.mark.parametrize(
    ("tools", "choice", "found"),
    [
        ({}, None, "tools: found an object"),
        (["x"], None, r"tools\[0\]: found a string"),
        ([{"type": "web_search"}], None, r"tools\[0\]\.type: found 'web_search', not supported"),
        ([function("a b")], None, r"tools\[0\]\.function\.name: found 'a b'"),
        ([function(name=None)], None, r"tools\[0\]\.function\.name: found null"),
        ([function(), function()], None, "'weather' is there twice"),
        ([function(description=3)], None, r"description: found a number"),
        ([function(strict="yes")], None, r"strict: found a string"),
        ([function(parameters=[])], None, r"parameters: found a list"),
        ([function(parameters={"type": "string"})], None, r"parameters\.type: found 'string'"),
        ([function(parameters={"a": float("nan")})], None, r"parameters: no JSON"),
        ([function(f"t{i}") for i in range(10_000)], None, "tools: found 10000"),
        ([function()], "sometimes", "tool_choice: found 'sometimes'"),
        ([function()], 3, "tool_choice: found a number"),
        ([function()], {"type": "function", "name": "now"}, "'now' is none of the tools"),
        ([], "required", "there are no tools"),
    ],
)
def test_what_is_wrong_with_tools_is_named(tools: object, choice: object, found: str) -> None:
    with pytest.raises(InvalidRequest, match=found):
        parse_tools(tools, choice)
