"""Where texts stand in the bodies of each wire, so that what a policy redacts can be replaced and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

Change = Callable[[str], str]

_TEXTS = ("text", "refusal")
_SPOKEN = ("content", "refusal", "reasoning_content", "reasoning")
_LOGPROBS = "logprobs"


@dataclass(frozen=True, slots=True)
class TextAt:
    """A text of an answer, in a body that may be changed."""

    where: tuple[object, ...]
    """The same for all pieces of one text."""
    holder: MutableMapping[str, Any]
    name: str
    is_piece: bool
    """Whether more of the same text may follow; else it is the whole of it, perhaps once more."""

    @property
    def text(self) -> str:
        """As it stands."""
        return str(self.holder[self.name])

    def put(self, text: str) -> None:
        """Change it. Log-probabilities beside it would tell its tokens, so they go."""
        self.holder[self.name] = text
        if self.holder.get(_LOGPROBS):
            self.holder[_LOGPROBS] = [] if isinstance(self.holder[_LOGPROBS], list) else None


# -- requests ---------------------------------------------------------------------------------------------------------


def rewritten(wire: str, body: Mapping[str, Any], change: Change) -> Mapping[str, Any]:
    """A request in which every text of the conversation was put through ``change``; itself where none became another.

    Definitions of tools, names, ids and what nobody reads stay. Reasoning that a provider has signed stays too, for it
    would not take it back otherwise; it is the provider's own.

    >>> rewritten("completions", {"prompt": "a", "n": 1}, str.upper)
    {'prompt': 'A', 'n': 1}
    """
    copy = deepcopy(dict(body))
    if wire == "completions":
        _in(copy, "prompt", change)
        _in(copy, "suffix", change)
    elif wire == "responses":
        _in(copy, "instructions", change)
        if isinstance(copy.get("input"), str):
            _in(copy, "input", change)
        for item in _rows(copy.get("input")):
            _item(item, change)
    else:
        _content(copy, "system", change)
        for row in _rows(copy.get("messages")):
            _turn(row, change)
    return copy if copy != body else body


def _turn(row: MutableMapping[str, Any], change: Change) -> None:
    """A message of chat completions, or of Anthropic's."""
    _content(row, "content", change)
    for name in ("refusal", "reasoning_content", "reasoning"):
        _in(row, name, change)
    for call in _rows(row.get("tool_calls")):
        for inner, name in (("function", "arguments"), ("custom", "input")):
            if isinstance(call.get(inner), dict):
                _arguments(call[inner], name, change)
    if isinstance(row.get("function_call"), dict):
        _arguments(row["function_call"], "arguments", change)


def _item(item: MutableMapping[str, Any], change: Change) -> None:
    """An item of a response's input."""
    for name in ("content", "output", "summary"):
        _content(item, name, change)
    for name in ("arguments", "input"):
        _arguments(item, name, change)


def _content(holder: MutableMapping[str, Any], name: str, change: Change) -> None:
    """A text, or the parts that hold texts, results of tools with parts of their own among them."""
    given = holder.get(name)
    if not isinstance(given, list):
        _in(holder, name, change)
        return
    for i, part in enumerate(given):
        if isinstance(part, str):
            given[i] = change(part)
        elif isinstance(part, dict) and "signature" not in part:
            for text in _TEXTS:
                _in(part, text, change)
            _content(part, "content", change)
            if "use" in str(part.get("type")):
                _arguments(part, "input", change)
            source = part.get("source")
            if isinstance(source, dict) and source.get("type") == "text":
                _in(source, "data", change)


def _arguments(holder: MutableMapping[str, Any], name: str, change: Change) -> None:
    """Arguments of a call: the texts in them, so that they stay the JSON that they are."""
    given = holder.get(name)
    if isinstance(given, str):
        try:
            inside = json.loads(given)
        except (ValueError, RecursionError):
            inside = given
        changed = _leaves(inside, change)
        if changed != inside:
            holder[name] = changed if isinstance(inside, str) else json.dumps(changed, ensure_ascii=False)
    elif given is not None:
        holder[name] = _leaves(given, change)


def _leaves(value: Any, change: Change, *, depth: int = 0) -> Any:
    if depth > 64:
        return value
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _leaves(inner, change, depth=depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_leaves(inner, change, depth=depth + 1) for inner in value]
    return value


def _in(holder: MutableMapping[str, Any], name: str, change: Change) -> None:
    given = holder.get(name)
    if isinstance(given, str):
        holder[name] = change(given)
    elif isinstance(given, MutableSequence):
        given[:] = [change(one) if isinstance(one, str) else one for one in given]


def _rows(value: object) -> Sequence[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else ()


# -- answers ----------------------------------------------------------------------------------------------------------


def answer_texts(wire: str, body: MutableMapping[str, Any]) -> Iterator[TextAt]:
    """The texts in an answer, or in an event of one, that people read. Calls of tools are for programs and stay.

    >>> event = {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}
    >>> [(t.where, t.text, t.is_piece) for t in answer_texts("chat", event)]
    [((0, 'content'), 'Hi', True)]
    """
    if wire in ("chat", "completions"):
        for i, choice in enumerate(_rows(body.get("choices"))):
            yield from _of_choice(choice, choice.get("index", i))
    elif wire == "messages":
        yield from _of_message(body)
    else:
        yield from _of_response(body)


def ends_texts(wire: str, body: Mapping[str, Any]) -> Callable[[tuple[object, ...]], bool] | None:
    """Which texts have come to their end before an event, or with it; None where none has.

    A text ends too where another of the same choice, item or block goes on.
    """
    kind = str(body.get("type"))
    if wire in ("chat", "completions"):
        over: dict[object, set[object]] = {}
        for i, choice in enumerate(_rows(body.get("choices"))):
            index = choice.get("index", i)
            given = choice.get("delta")
            delta: Mapping[str, Any] = given if isinstance(given, dict) else {}
            spoken: set[object] = {name for name in _SPOKEN if delta.get(name)}
            if choice.get("finish_reason") is not None:
                over[index] = set()
            elif spoken or delta.get("tool_calls") or delta.get("function_call"):
                over[index] = spoken
        return (lambda where: where[0] in over and where[-1] not in over[where[0]]) if over else None
    if wire == "messages":
        if kind == "content_block_stop":
            return lambda where: where[0] == body.get("index")
        if kind == "content_block_start":
            return lambda where: where[0] != body.get("index")
        return (lambda where: True) if kind in ("message_delta", "message_stop") else None
    if kind.startswith("response.") and not kind.endswith((".delta", ".created", ".in_progress", ".queued")):
        return lambda where: True
    return None


def _of_choice(choice: MutableMapping[str, Any], index: object) -> Iterator[TextAt]:
    if isinstance(choice.get("text"), str) and choice["text"]:
        yield TextAt((index, "text"), choice, "text", True)
    for part, is_piece in (("delta", True), ("message", False)):
        holder = choice.get(part)
        if isinstance(holder, dict):
            for name in _SPOKEN:
                if isinstance(holder.get(name), str) and holder[name]:
                    yield _Spoken((index, name), holder, name, is_piece, choice)
                for row in _rows(holder.get(name)):  # some servers tell it in parts
                    if isinstance(row.get("text"), str):
                        yield _Spoken((index, name), row, "text", is_piece, choice)


@dataclass(frozen=True, slots=True)
class _Spoken(TextAt):
    """A text whose log-probabilities stand one level above."""

    choice: MutableMapping[str, Any]

    def put(self, text: str) -> None:
        """See `TextAt`."""
        self.holder[self.name] = text
        if self.choice.get(_LOGPROBS):
            self.choice[_LOGPROBS] = None


def _of_message(body: MutableMapping[str, Any]) -> Iterator[TextAt]:
    if body.get("type") == "content_block_start" and isinstance(block := body.get("content_block"), dict):
        yield from _named(block, body.get("index"), is_piece=True)
    elif body.get("type") == "content_block_delta" and isinstance(delta := body.get("delta"), dict):
        yield from _named(delta, body.get("index"), is_piece=True)
    for i, block in enumerate(_rows(body.get("content"))):
        yield from _named(block, i, is_piece=False)


def _named(block: MutableMapping[str, Any], index: object, *, is_piece: bool) -> Iterator[TextAt]:
    for name in ("text", "thinking"):
        if isinstance(block.get(name), str) and block[name]:
            yield TextAt((index, name), block, name, is_piece)


_PIECES = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "text",
    "response.reasoning_text.delta": "text",
    "response.reasoning_summary_text.delta": "summary",
}
_WHOLES = {
    "response.output_text.done": "text",
    "response.refusal.done": "refusal",
    "response.reasoning_text.done": "text",
    "response.reasoning_summary_text.done": "text",
}


def _of_response(body: MutableMapping[str, Any]) -> Iterator[TextAt]:
    kind = str(body.get("type"))
    at, index = body.get("output_index"), body.get("content_index", body.get("summary_index", 0))
    if kind in _PIECES and isinstance(body.get("delta"), str):
        yield TextAt((at, index, _PIECES[kind]), body, "delta", True)
    elif kind in _WHOLES and isinstance(body.get(_WHOLES[kind]), str):
        yield TextAt((at, index, "whole"), body, _WHOLES[kind], False)
    for holder in (body.get("part"), body.get("item"), body.get("response"), body):
        if isinstance(holder, dict):
            yield from _inside(holder)


def _inside(holder: MutableMapping[str, Any]) -> Iterator[TextAt]:
    """Texts of a part, of an item with parts, or of a response with items."""
    if holder.get("type") in ("output_text", "refusal", "summary_text", "reasoning_text", "text"):
        for name in _TEXTS:
            if isinstance(holder.get(name), str) and holder[name]:
                yield TextAt(("whole",), holder, name, False)
    for name in ("content", "summary", "output"):
        for row in _rows(holder.get(name)):
            yield from _inside(row)
