"""How a model is told of tools, and how it says which one to call: as text between two marks.

Where a model's chat template knows tools, the template writes them. This is the form for all others: the one that
SmolLM2's larger models were trained on, a JSON list of calls between ``<tool_call>`` and ``</tool_call>``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hhh_router.types import Message, Tool, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
"""What stands around calls in the text of every generator."""
MOST_CALLS = 16
"""In one reply: a small model may otherwise write them to the end of its budget."""

_TOLD = (
    "You can call functions. These are there, each with a JSON schema of its arguments:\n"
    "<tools>{tools}</tools>\n"
    "To call some of them, answer with nothing but a JSON list of calls, like this:\n"
    f'{OPEN}[{{{{"name": "…", "arguments": {{{{…}}}}}}}}]{CLOSE}\n'
    "Their results then follow. Where no function helps, answer in words."
)


def as_openai(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI's wire and chat templates write it.

    >>> as_openai(Tool(name="now"))["function"]["name"]
    'now'
    """
    function = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return {"type": "function", "function": function}


def call_as_openai(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI's wire writes it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def calls_as_text(calls: Sequence[ToolCall]) -> str:
    """Calls as a model that was told of its tools in text writes them.

    >>> calls_as_text([ToolCall(id="call_0", name="now", arguments="{}")])
    '<tool_call>[{"name": "now", "arguments": {}}]</tool_call>'
    """
    if not calls:
        return ""
    return f"{OPEN}[{', '.join(f'{_named(c.name)}{c.arguments}}}' for c in calls)}]{CLOSE}"


def as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[Message, ...]:
    """A conversation in which tools and calls are told as text, for templates that know neither.

    The last turn stays the last, with its own text.
    """
    turns = [
        Message(role=m.role, content="\n".join(filter(None, (m.content, calls_as_text(m.tool_calls)))))
        for m in messages
    ]
    if not tools:
        return tuple(turns)
    told = _TOLD.format(tools=json.dumps([as_openai(t)["function"] for t in tools], ensure_ascii=False))
    if turns and turns[0].role == "system":
        turns[0] = replace(turns[0], content=f"{turns[0].content}\n\n{told}")
    else:
        turns.insert(0, Message(role="system", content=told))
    return tuple(turns)


def _named(name: str) -> str:
    """The beginning of a call, up to its arguments."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


# -- what a model may write -------------------------------------------------------------------------------------------


def call_grammar(
    tools: Iterable[Tool], *, required: bool, parallel: bool, listed: bool, marks: bool, reply: str | None = None
) -> str:
    """What a reply may be, as llguidance's Lark: words, or words and then calls with arguments that fit.

    Args:
        tools: Those that may be called.
        required: The reply must be calls and nothing else.
        parallel: There may be several.
        listed: They stand in one JSON list between one pair of marks, as `calls_as_text` writes them; otherwise each
            between marks of its own, as Hermes' and Qwen's templates do.
        marks: ``<tool_call>`` and ``</tool_call>`` are tokens of their own in this vocabulary.
        reply: JSON schema, as text, of a reply in words; None leaves it free.
    """
    opens, closes = (OPEN, CLOSE) if marks else (json.dumps(OPEN), json.dumps(CLOSE))
    more = f"{{0,{MOST_CALLS - 1}}}"
    rules, names = [], []
    for i, tool in enumerate(tools):
        names.append(f"call_{i}")
        schema = json.loads(tool.parameters)
        compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        schema["x-guidance"] = compact | ({} if tool.strict else {"lenient": True})
        rules += [f'call_{i}: {json.dumps(_named(tool.name))} args_{i} "}}"', f"args_{i}: %json {json.dumps(schema)}"]
    if listed:
        others = f'(", " call){more} ' if parallel else ""
        rest = f'"[" call {others}"]" {closes}'
    else:
        others = f' ("\\n" {opens} "\\n" call "\\n" {closes}){more}' if parallel else ""
        rest = f'"\\n" call "\\n" {closes}{others}'
    if required:
        start = [f"start: {opens} rest"]
    elif reply is not None:
        start = [f"start: {opens} rest | reply", f"reply: %json {reply}"]
    else:
        head = f"head: TEXT {opens}" if marks else f"head[lazy]: TEXT {opens}"
        start = ["start: head rest | TEXT", head, r"TEXT: /(.|\n)*/"]
    return "\n".join(["%llguidance {}", *start, f"rest: {rest}", f"call: {' | '.join(names)}", *rules, ""])


class CallScanner:
    """Parts a reply, as it comes, into what is said and what is called.

    >>> scanner = CallScanner(["now"], prefix="call_7")
    >>> scanner.push("Let me look. <tool"), scanner.push('_call>[{"name": "now", "arguments": {}}]</tool_call>')
    (('Let me look. ', ()), ('', (ToolCall(id='call_7_0', name='now', arguments='{}'),)))
    """

    def __init__(self, names: Iterable[str], *, prefix: str) -> None:
        """Look for calls of these tools; ``prefix`` begins the ids they are given."""
        self._names = frozenset(names)
        self._prefix = prefix
        self._held = ""
        self._found = 0

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Add a piece of the reply; returns what of it can be told by now.

        What stands between the marks and is no call of a tool there is stays text, so that nothing is lost.
        """
        self._held += text
        said: list[str] = []
        calls: list[ToolCall] = []
        while (at := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, at)) >= 0:
            end += len(CLOSE)
            found = self._parse(self._held[at + len(OPEN) : end - len(CLOSE)])
            said.append(self._held[:at] if found else self._held[:end])
            calls += found
            self._held = self._held[end:]
        if at < 0:
            at = self._held.rfind("<")
            if at < 0 or not OPEN.startswith(self._held[at:]):
                at = len(self._held)
        said.append(self._held[:at])
        self._held = self._held[at:]
        return "".join(said), tuple(calls)

    def end(self) -> str:
        """What is still kept back once no more text comes: a call that broke off, say."""
        held, self._held = self._held, ""
        return held

    def _parse(self, text: str) -> list[ToolCall]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return []
        rows = found if isinstance(found, list) else [found]
        if not rows or not all(self._is_call(row) for row in rows):
            return []
        calls = []
        for row in rows:
            arguments = json.dumps(row["arguments"], ensure_ascii=False)
            calls.append(ToolCall(id=f"{self._prefix}_{self._found}", name=row["name"], arguments=arguments))
            self._found += 1
        return calls

    def _is_call(self, row: object) -> bool:
        if not isinstance(row, Mapping) or not isinstance(row.get("arguments"), Mapping):
            return False
        return isinstance(row.get("name"), str) and row["name"] in self._names
