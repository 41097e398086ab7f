"""What a wire has to tell: the text of a request, the text of its answer as it comes, and what of them nobody read."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from hhh_router.errors import InvalidRequest, UpstreamError
from hhh_router.interfaces.parse import kind_of
from hhh_router.interfaces.server.dialect import Dialect
from hhh_router.pipeline import ChatFinished
from hhh_router.protocols import FinishReason
from hhh_router.types import Caller, ChatRequest, Message, ToolCall

TOOLS_HEADING = "Tools:"
"""Begins the system turn in which definitions of tools are read."""
_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request says, as far as it is text."""

    messages: tuple[Message, ...]
    """The conversation as the reader takes it, see `readable`; empty where there is no text at all."""
    turns: tuple[Message, ...] = ()
    """The same turn by turn, with calls and results apart, see `apart`."""
    not_inspected: tuple[str, ...] = ()
    stream: bool = False
    model: str = ""
    include_usage: bool = False
    conversation: str | None = None
    """The id that the body tells of the conversation, or of a turn of it."""
    goes_on: bool = False
    """Earlier turns are with the upstream and were not sent."""
    user: str = ""
    """Whose conversation it is, where the body tells."""


@dataclass(slots=True)
class Reply(ABC):
    """The upstream's answer so far. Each wire has its own, made anew for every answer."""

    finish_reason: FinishReason = "stop"
    answer_id: str | None = None
    """By which a later request may name this turn, on wires that have such an id."""
    usage: tuple[int | None, int | None] = (None, None)
    """Tokens of prompt and reply, where the upstream told them."""
    texts: dict[tuple[object, ...], list[str]] = field(default_factory=dict)
    """Where a text stands → its pieces, in the order in which they came up."""
    unread: dict[str, None] = field(default_factory=dict)
    """What passed and was not read, each once."""
    over: bool = False
    """Whether the stream said that it has come to its end."""
    called: list[ToolCall] = field(default_factory=list)
    """Calls of tools that are whole and that nobody has taken yet."""

    @property
    def text(self) -> str:
        """Everything that was said, as it is read."""
        return "\n".join(text for pieces in self.texts.values() if (text := "".join(pieces)))

    @abstractmethod
    def whole(self, body: Mapping[str, Any]) -> str:
        """Take a body that is not streamed; returns the text that is new.

        Raises:
            UpstreamError: It is not built as this wire has it.
        """

    @abstractmethod
    def event(self, body: Mapping[str, Any]) -> str:
        """Take an event of a stream; returns the text that is new.

        Raises:
            UpstreamError: It is not built as this wire has it, or tells that the answer failed.
        """

    @abstractmethod
    def ends(self, body: Mapping[str, Any]) -> bool:
        """Whether an event belongs to the end of the stream, which waits for the final metadata."""

    def carries(self, body: Mapping[str, Any]) -> bool:
        """Whether clients look for metadata in an event of the end."""
        return self.ends(body)

    @property
    @abstractmethod
    def is_calling(self) -> bool:
        """Whether a call has begun and is not whole yet."""

    def take_calls(self) -> tuple[ToolCall, ...]:
        """Calls that have become whole since this was asked last."""
        calls, self.called = tuple(self.called), []
        return calls

    def call(self, given: object, name: object, arguments: object) -> None:
        """A call is whole. Arguments that come as an object are told as its JSON."""
        told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.called.append(ToolCall(id=str(given or ""), name=str(name or ""), arguments=clean(told)))

    @property
    def is_over(self) -> bool:
        """Whether the stream has come to its proper end."""
        return self.over

    def with_block(self, body: Mapping[str, Any], block: Mapping[str, Any]) -> Mapping[str, Any]:
        """An event with the metadata block where clients of this wire find it."""
        return {**body, "hhh": block}

    @abstractmethod
    def ending(self, message: str, done: ChatFinished) -> list[bytes]:
        """Frames that end a stream of the upstream's with the policy's message.

        This reply has to hold exactly what the client has got of it.
        """

    def add(self, where: tuple[object, ...], text: object) -> str:
        """Take a piece of text; returns it."""
        if text is None or text == "":
            return ""
        plain = clean(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False))
        self.texts.setdefault(where, []).append(plain)
        return plain

    def put(self, where: tuple[object, ...], text: object) -> str:
        """Take a whole text that may have come in pieces before; returns what is new about it."""
        if text is None or text == "":
            return ""
        plain = clean(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False))
        before = "".join(self.texts.get(where, ()))
        if plain == before:
            return ""
        self.texts[where] = [plain]
        return plain[len(before) :] if plain.startswith(before) else plain

    def note(self, where: str, fields: Mapping[str, Any], known: frozenset[str]) -> None:
        """Remember fields that hold something and that nobody reads."""
        self.unread |= {f"{where}{short(name)}": None for name, value in fields.items() if value and name not in known}


class Wire(Protocol):
    """One protocol between an app and its model."""

    @property
    def name(self) -> str:
        """As records name it."""
        ...

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """Read a request.

        Raises:
            InvalidRequest: It is not built as this wire has it, so nobody can tell what it says.
        """
        ...

    def reply(self) -> Reply:
        """An answer of which nothing has come yet."""
        ...

    def call(self, request: ChatRequest, asked: Asked) -> Dialect:
        """How our own answers are put: refusals and failures."""
        ...


def conversing(caller: Caller, asked: Asked) -> Caller:
    """With what the body tells of model, user and conversation."""
    return replace(
        caller,
        model=asked.model,
        account=f"{caller.account or ''} {asked.user}".strip() or None,
        conversation=caller.conversation or asked.conversation,
    )


def rows(value: object, *, where: str = "the upstream's answer") -> Sequence[Mapping[str, Any]]:
    """A list of objects, empty where there is none.

    Raises:
        UpstreamError: Something else, which nobody can read.
    """
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return value
    raise UpstreamError(f"{where} is not built as its wire has it")


def turns(body: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a request with where each stands.

    Raises:
        InvalidRequest: No list of objects.
    """
    value = body.get(name)
    if not isinstance(value, list):
        raise InvalidRequest(f"{name}: found {kind_of(value)}", hint="send a list of messages")
    for i, row in enumerate(value):
        if not isinstance(row, dict):
            raise InvalidRequest(f"{name}[{i}]: found {kind_of(row)}", hint="send objects")
        yield f"{name}[{i}]", row


def flag(body: Mapping[str, Any], name: str) -> bool:
    """A field that switches something.

    Raises:
        InvalidRequest: Neither true nor false, so an upstream may take it otherwise than we would.
    """
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name}: found {kind_of(value)}", hint="send true or false")
    return bool(value)


def parts(content: object, here: str, unread: list[str], fields: Mapping[str, str], *, also: Sequence[str] = ()) -> str:
    """The text of a turn's content: a string, or the parts that hold text.

    Args:
        content: As it came.
        here: Where it stands, for what is not read.
        unread: Gets the parts that hold something else.
        fields: Kind of part → the field that holds its text.
        also: Further fields of a part that are no loss when they are not read.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        unread.append(f"{here}: {kind_of(content)}")
        return ""
    texts = []
    for j, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(fields.get(str(kind), "")) if isinstance(part, dict) else None
        if isinstance(text, str):
            texts.append(text)
        else:
            unread.append(f"{here}[{j}]: {short(kind)}")
    return "\n".join(texts)


def called(name: object, arguments: object) -> str:
    """A call of a tool as it is read.

    >>> called("send", {"to": "Ann"}), called("look", "{}"), called(None, "")
    ('send {"to": "Ann"}', 'look {}', '')
    """
    told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return " ".join(part for part in (name if isinstance(name, str) else "", "" if arguments is None else told) if part)


def described(tools: object, unread: list[str], *, where: str = "tools") -> str:
    """What definitions of tools say in words: names and every description, parameters' too."""
    if not isinstance(tools, list):
        if tools:
            unread.append(where)
        return ""
    lines = []
    for i, tool in enumerate(tools):
        if isinstance(tool, dict):
            inner = tool.get("function")
            told = inner if isinstance(inner, dict) else tool
            words = [str(told.get("name") or told.get("type") or ""), *_descriptions(told)]
            lines.append(": ".join(w for w in words if w))
        else:
            unread.append(f"{where}[{i}]: {kind_of(tool)}")
    return "\n".join([TOOLS_HEADING, *lines]) if lines else ""


def _descriptions(value: object, *, depth: int = 0) -> Iterator[str]:
    if depth > 32:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "description" and isinstance(inner, str):
                yield inner
            else:
                yield from _descriptions(inner, depth=depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _descriptions(inner, depth=depth + 1)


def call_of(given: object, name: object, arguments: object) -> ToolCall:
    """A call of a tool in a request. Arguments that come as an object are told as its JSON."""
    told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(
        id=str(given or ""),
        name=name if isinstance(name, str) else "",
        arguments="" if arguments is None else clean(told),
    )


def apart(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation turn by turn: every turn has one of four roles, and none is joined with another."""
    found: list[Message] = []
    for message in messages:
        role = "system" if message.role == "developer" else "tool" if message.role == "function" else message.role
        if role not in ("user", "assistant", "tool") and not (role == "system" and not (found and _talks(found))):
            role = "user"
        if message.content.strip() or message.tool_calls or role == "tool":
            found.append(replace(message, role=role, content=clean(message.content)))
    return tuple(found)


def _talks(found: Sequence[Message]) -> bool:
    return any(message.role != "system" for message in found)


def readable(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation as the router's chat template takes it, whatever order an upstream's clients send.

    Calls are read where they were made. Turns without text are left out, later system turns and unknown roles are read
    as the user's, and turns of the same side that follow each other become one.

    >>> [m.role for m in readable([Message(role="assistant", content="Hi"), Message(role="system", content="Be kind")])]
    ['assistant', 'user']
    """
    joined: list[Message] = []
    for message in messages:
        calls = [called(call.name, call.arguments or None) for call in message.tool_calls]
        text = clean("\n".join(part for part in (message.content, *calls) if part))
        if not text.strip():
            continue
        role = "system" if message.role == "developer" else message.role
        if role not in ("user", "assistant", "tool") and not (role == "system" and not joined):
            role = "system" if role == "system" and joined[-1].role == "system" else "user"
        if joined and joined[-1].role == role:
            joined[-1] = replace(joined[-1], content=f"{joined[-1].content}\n{text}")
        else:
            joined.append(Message(role=role, content=text))
    return tuple(joined)


def clean(text: str) -> str:
    """Text that can be read: what is no character (NUL, half a surrogate pair) becomes the mark for one.

    >>> clean("a\\x00b\\ud800")
    'a\\ufffdb\\ufffd'
    """
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def short(name: object) -> str:
    """A name that somebody else chose, for a record."""
    text = "unknown" if name is None else str(name)
    return "".join(c if c.isprintable() else "_" for c in text)[:_SHOWN]


def count(value: object) -> int | None:
    """A number of tokens, where it is one."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def told(body: Mapping[str, Any]) -> str:
    """The words of an error body."""
    error = body.get("error")
    said = error.get("message") if isinstance(error, Mapping) else error
    return str(said)[:500] if said else "no message"
