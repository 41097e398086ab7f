"""What every door makes of loosely typed input: messages, weights, stop strings."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hhh_router.errors import InvalidRequest
from hhh_router.types import Message, ToolCall, Weights

ROLE_NAMES = {"developer": "system"}
"""Other names of roles → ours: OpenAI's newer models call the system turn ``developer``."""
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_KNOWN_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id"})
MOST_CALLS = 128
"""In one turn of a conversation."""
TOOL_NAME = r"[A-Za-z0-9_.-]{1,128}"

MessageLike = Message | Mapping[str, Any]


def parse_messages(
    rows: Sequence[MessageLike], *, where: str = "messages", any_calls: bool = False, names: Sequence[str] = ()
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Turns with plain text, and what of the input nobody will read.

    >>> parts = [{"type": "text", "text": "Hi"}, {"type": "image_url"}]
    >>> [message], unread = parse_messages([{"role": "user", "content": parts}])
    >>> message.content, unread
    ('Hi', ('messages[0].content[1]: image_url',))

    Args:
        rows: Messages, or mappings with ``role`` and ``content`` (a string, or a list of parts).
        where: What to call the list in messages.
        any_calls: Calls that are no functions' are nobody's mistake (an upstream understands them); they are not read.
        names: What to call each turn in messages, where these are not the client's own rows.

    Raises:
        InvalidRequest: Not a list of messages.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise InvalidRequest(f"{where}: found {kind_of(rows)}", hint="send a list of messages")
    messages: list[Message] = []
    unread: list[str] = []
    for i, row in enumerate(rows):
        here = names[i] if names else f"{where}[{i}]"
        if isinstance(row, Message):
            messages.append(replace(row, role=ROLE_NAMES.get(row.role, row.role)))
            continue
        if not isinstance(row, Mapping):
            raise InvalidRequest(f"{here}: found {kind_of(row)}", hint="send objects with 'role' and 'content'")
        role = row.get("role")
        if not isinstance(role, str):
            raise InvalidRequest(f"{here}.role: found {kind_of(role)}", hint="send system, user, assistant or tool")
        messages.append(
            Message(
                role=ROLE_NAMES.get(role, role),
                content=_text(row.get("content"), here, unread),
                tool_calls=_calls(row.get("tool_calls"), f"{here}.tool_calls", unread if any_calls else None),
                tool_call_id=_call_id(row.get("tool_call_id"), here),
            )
        )
        unread += [f"{here}.{key}" for key in row if key not in _KNOWN_KEYS and row[key] is not None]
    return tuple(messages), tuple(unread)


def _text(content: object, here: str, unread: list[str]) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise InvalidRequest(f"{here}.content: found {kind_of(content)}", hint="send text, or a list of parts")
    texts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise InvalidRequest(f"{here}.content[{j}]: found {kind_of(part)}", hint="send parts with a 'type'")
        text = part.get(_TEXT_PARTS.get(kind, ""))
        if isinstance(text, str):
            texts.append(text)
        else:
            unread.append(f"{here}.content[{j}]: {kind}")
    return "\n".join(texts)


def parse_calls(given: object, here: str) -> tuple[ToolCall, ...]:
    """The calls of an assistant's turn.

    Raises:
        InvalidRequest: No list of calls of functions with arguments as JSON text.
    """
    return tuple(
        _call(row, f"{here}[{i}]") for i, row in enumerate(rows_of(given, here, "send a list of calls", MOST_CALLS))
    )


def _calls(given: object, here: str, unread: list[str] | None) -> tuple[ToolCall, ...]:
    try:
        return parse_calls(given, here)
    except InvalidRequest:
        if unread is None:
            raise
        unread.append(here)
        return ()


def _call(row: object, here: str) -> ToolCall:
    inner = row.get("function") if isinstance(row, Mapping) else None
    if not isinstance(row, Mapping) or not isinstance(inner, Mapping):
        raise InvalidRequest(f"{here}: no call of a function", hint='send {"id", "type": "function", "function": {…}}')
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise InvalidRequest(f"{here}.id: found {kind_of(row.get('id'))}", hint="send the id the call was given")
    arguments = inner.get("arguments")
    arguments = "{}" if arguments in (None, "") else arguments
    try:
        known = isinstance(arguments, str) and isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise InvalidRequest(f"{here}.function.arguments: no JSON object", hint='send JSON as text, such as "{}"')
    return ToolCall(
        id=row["id"], name=checked_name(inner.get("name"), f"{here}.function.name"), arguments=str(arguments)
    )


def checked_name(name: object, here: str) -> str:
    """The name of a tool.

    Raises:
        InvalidRequest: It is none.
    """
    if not isinstance(name, str) or not re.fullmatch(TOOL_NAME, name):
        raise InvalidRequest(
            f"{here}: found {name[:80]!r}" if isinstance(name, str) else f"{here}: found {kind_of(name)}",
            hint="use 1 to 128 letters, digits, '_', '-' or '.'",
        )
    return name


def rows_of(given: object, here: str, hint: str, most: int) -> Sequence[Any]:
    """A list of bounded length; none where nothing was given.

    Raises:
        InvalidRequest: It is no list, or too long.
    """
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InvalidRequest(f"{here}: found {kind_of(given)}", hint=hint)
    if len(given) > most:
        raise InvalidRequest(f"{here}: found {len(given)}", hint=f"send at most {most}")
    return given


def _call_id(given: object, here: str) -> str | None:
    if given is not None and not isinstance(given, str):
        raise InvalidRequest(f"{here}.tool_call_id: found {kind_of(given)}", hint="send the id of the call")
    return given


def parse_prompt(prompt: object, *, where: str = "prompt") -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """A prompt as turns: a string is one user turn.

    Raises:
        InvalidRequest: Neither text nor messages.
    """
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),), ()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InvalidRequest(f"{where}: found {kind_of(prompt)}", hint="send text, or a list of messages")
    return parse_messages(prompt, where=where)


def parse_weights(given: object, *, where: str = "weights") -> Weights | None:
    """Weights from a mixture name, or from shares per expert; None stays None.

    >>> parse_weights("hhh@0-8-4-4").helpful
    0.5

    Raises:
        InvalidRequest: They are no distribution over the experts.
    """
    try:
        match given:
            case None | Weights():
                return given
            case str():
                return Weights.from_mixture(given)
            case Mapping():
                return Weights.from_mapping({str(k): _share(v) for k, v in given.items()})
    except ValueError as error:
        raise InvalidRequest(
            f"{where}: {error}", hint="send shares that sum to 1, or a mixture name such as hhh@2-6-5-3"
        ) from error
    raise InvalidRequest(f"{where}: found {kind_of(given)}", hint="send shares per expert, or a mixture name")


def parse_stop(given: object) -> tuple[str, ...]:
    """Stop strings from none, one or several.

    Raises:
        InvalidRequest: Neither.
    """
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Sequence) and not isinstance(given, bytes | bytearray):
        return tuple(given)
    raise InvalidRequest(f"stop: found {kind_of(given)}", hint="send a string or a list of strings")


def _share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a share is {kind_of(value)}, not a number")
    try:
        return float(value)
    except OverflowError as error:  # whole numbers in JSON have any length
        raise ValueError("a share is larger than any number should be") from error


def inner(body: Mapping[str, Any], name: str, example: str) -> Mapping[str, Any]:
    """A field that holds fields; without any where it is not there, or null.

    Raises:
        InvalidRequest: It is something else.
    """
    value = body.get(name)
    if value is None or value == []:  # as PHP writes an empty object
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name}: no object, found {kind_of(value)}", hint=f"send an object, such as {example}")
    return value


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with its counts: ``stream_options.include_usage``.

    Raises:
        InvalidRequest: It is neither true nor false, or its options are no object.
    """
    value = inner(body, "stream_options", '{"include_usage": true}').get("include_usage")
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"stream_options.include_usage: found {kind_of(value)}", hint="send true or false")
    return bool(value)


def our_fields(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a body of somebody else's wire says to us, under ``hhh``.

    Raises:
        InvalidRequest: No object, or a field that is not known.
    """
    ours = inner(body, "hhh", '{"policy": "balanced"}')
    if unknown := sorted(set(ours) - {"policy", "weights"}):
        raise InvalidRequest(f"hhh.{unknown[0]}: unknown field", hint="use policy and weights")
    return ours


def check_supported(
    body: Mapping[str, Any], read: Collection[str], neutral: Mapping[str, Sequence[object]]
) -> tuple[str, ...]:
    """Refuse what would change the answer and cannot be done; returns the fields that are ignored.

    Args:
        body: As the client sent it.
        read: Fields that are acted on.
        neutral: Fields that are not supported, with the values that change nothing.

    Raises:
        InvalidRequest: One of the latter asks for something.
    """
    ignored = []
    for name, value in body.items():
        if name in neutral:
            if value is not None and not any(type(value) is type(n) and value == n for n in neutral[name]):
                raise InvalidRequest(f"{name}: not supported yet", hint="leave it out")
        elif name not in read and value is not None:
            ignored.append(name[:100])
    return tuple(ignored)


def one(name: str, first: Any, second: Any) -> Any:
    """What two places say of one thing.

    Raises:
        InvalidRequest: They differ.
    """
    if first is not None and second is not None and first != second:
        raise InvalidRequest(f"{name}: said twice, differently", hint="say it in one place")
    return second if first is None else first


def kind_of(value: object) -> str:
    """What was found, without repeating what someone wrote.

    >>> kind_of(None), kind_of([1]), kind_of(b"x")
    ('null', 'a list', 'bytes')
    """
    names = {type(None): "null", list: "a list", tuple: "a list", dict: "an object", str: "a string", bytes: "bytes"}
    names |= {bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
