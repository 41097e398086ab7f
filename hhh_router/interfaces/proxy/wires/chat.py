"""OpenAI's chat completions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hhh_router.interfaces.proxy.wires.choices import ChoicesReply, sealed
from hhh_router.interfaces.proxy.wires.reading import (
    Asked,
    apart,
    call_of,
    described,
    flag,
    parts,
    readable,
    rows,
    short,
    turns,
)
from hhh_router.interfaces.server.openai import Call
from hhh_router.pipeline import ChatFinished
from hhh_router.types import ChatRequest, Message, ToolCall

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_SPOKEN = ("content", "refusal", "reasoning_content", "reasoning")
_KNOWN_TURN = frozenset({"role", "content", "refusal", "name", "tool_calls", "function_call", "tool_call_id"})
_KNOWN_FIELDS = frozenset({"role", "tool_calls", "function_call", *_SPOKEN})


class ChatWire:
    """See `reading.Wire`."""

    name = "chat"

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See `reading.Wire`."""
        unread: list[str] = []
        found: list[Message] = []
        for here, row in turns(body, "messages"):
            said = [parts(row.get("content"), f"{here}.content", unread, TEXT_PARTS)]
            said += [text for text in (row.get("refusal"), row.get("reasoning_content")) if isinstance(text, str)]
            given = row.get("tool_call_id")
            unread += [
                f"{here}.{short(k)}" for k, v in row.items() if v and k not in _KNOWN_TURN | {"reasoning_content"}
            ]
            found.append(
                Message(
                    role=str(row.get("role")),
                    content="\n".join(s for s in said if s),
                    tool_calls=tuple(_calls(row)),
                    tool_call_id=None if given is None else str(given),
                )
            )
        tools = described([*(body.get("tools") or ()), *(body.get("functions") or ())], unread)
        if tools:
            found.insert(0, Message(role="system", content=tools))
        unread += [name for name in ("response_format", "prediction", "audio", "web_search_options") if body.get(name)]
        options = body.get("stream_options")
        return Asked(
            messages=readable(found),
            not_inspected=tuple(unread),
            stream=flag(body, "stream"),
            model=str(body.get("model", "")),
            include_usage=bool(options.get("include_usage")) if isinstance(options, dict) else False,
            turns=apart(found),
            user=str(body.get("safety_identifier") or body.get("user") or ""),
        )

    def reply(self) -> ChatReply:
        """See `reading.Wire`."""
        return ChatReply()

    def call(self, request: ChatRequest, asked: Asked) -> Call:
        """See `reading.Wire`."""
        return Call(request=request, model=asked.model, stream=asked.stream, include_usage=asked.include_usage)


def _calls(row: Mapping[str, Any]) -> Iterator[ToolCall]:
    for call in row.get("tool_calls") or ():
        if isinstance(call, dict):
            told = call.get("function") or call.get("custom") or {}
            if isinstance(told, dict):
                yield call_of(call.get("id"), told.get("name"), told.get("arguments", told.get("input")))
    if isinstance(call := row.get("function_call"), dict):
        yield call_of(None, call.get("name"), call.get("arguments"))


@dataclass(slots=True)
class ChatReply(ChoicesReply):
    """See `reading.Reply`."""

    whole_part, event_part = "message", "delta"

    head: dict[str, Any] = field(default_factory=lambda: {"object": "chat.completion.chunk"})
    calling: dict[int, tuple[object, object, str]] = field(default_factory=dict)
    """Choice → place, id and name of the call under way in it."""

    def ending(self, message: str, done: ChatFinished) -> list[bytes]:
        """See `reading.Reply`."""
        self.head.setdefault("created", int(time.time()))
        chunks = [self._chunk(i, {"content": f"\n\n{message}", "refusal": message}, None) for i in self.still_open]
        chunks += [self._chunk(i, {}, "content_filter") for i in self.still_open]
        return sealed(chunks, done)

    def _chunk(self, index: int, delta: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": reason}
        return {**self.head, "choices": [choice]}

    def said(self, index: int, part: Any, where: str) -> str:
        """See `choices.ChoicesReply`."""
        [fields] = rows([part or {}])
        if fields.get("content"):
            self._called(index)
        new = "".join(self.add((index, name), fields.get(name)) for name in _SPOKEN)
        for j, call in enumerate(rows(fields.get("tool_calls"))):
            function = call.get("function") or call.get("custom") or {}
            at = call.get("index", j)
            if self.calling.get(index, (at,))[0] != at:
                self._called(index)
            _, given, named = self.calling.get(index, (at, None, ""))
            name = str(function.get("name") or "") if isinstance(function, dict) else ""
            self.calling[index] = at, given or call.get("id"), named + name
            new += self._call((index, "tool", at), function)
        if isinstance(function := fields.get("function_call"), dict):
            named = self.calling.get(index, (None, None, ""))[2] + str(function.get("name") or "")
            self.calling[index] = None, None, named
            new += self._call((index, "function"), function)
        if not self.open[index]:
            self._called(index)
        self.note(where, fields, _KNOWN_FIELDS)
        return new

    @property
    def is_calling(self) -> bool:
        """See `reading.Reply`."""
        return bool(self.calling)

    def _call(self, where: tuple[object, ...], function: object) -> str:
        [told] = rows([function])
        new = self.add((*where, "name"), told.get("name"))
        return new + self.add((*where, "arguments"), told.get("arguments", told.get("input")))

    def _called(self, index: int) -> None:
        """The call under way in a choice is whole."""
        if (begun := self.calling.pop(index, None)) is not None:
            at, given, name = begun
            where = (index, "function") if at is None else (index, "tool", at)
            self.call(given, name, "".join(self.texts.get((*where, "arguments"), ())))
