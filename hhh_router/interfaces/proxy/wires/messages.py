"""Anthropic's messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hhh_router.errors import UpstreamError
from hhh_router.interfaces.proxy.wires.reading import (
    Asked,
    Reply,
    apart,
    call_of,
    count,
    described,
    flag,
    parts,
    readable,
    rows,
    short,
    told,
    turns,
)
from hhh_router.interfaces.server.anthropic import Call
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import dump
from hhh_router.pipeline import ChatFinished
from hhh_router.protocols import FinishReason
from hhh_router.types import ChatRequest, Message

_TEXT_BLOCKS = {"text": "text", "thinking": "thinking"}
_KNOWN_TURN = frozenset({"role", "content"})
_KNOWN_BODY = frozenset({"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"})
_STOP_REASONS: Mapping[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


class MessagesWire:
    """See `reading.Wire`."""

    name = "messages"

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See `reading.Wire`."""
        unread: list[str] = []
        system = parts(body.get("system"), "system", unread, _TEXT_BLOCKS)
        tools = described(body.get("tools") or [], unread)
        found = [Message(role="system", content="\n".join(s for s in (system, tools) if s))]
        for here, row in turns(body, "messages"):
            role = str(row.get("role"))
            content = row.get("content")
            if not isinstance(content, list):
                found.append(Message(role=role, content=parts(content, f"{here}.content", unread, {})))
            else:
                found += [_turn(block, role, f"{here}.content[{j}]", unread) for j, block in enumerate(content)]
            unread += [f"{here}.{short(k)}" for k, v in row.items() if v and k not in _KNOWN_TURN]
        unread += [name for name in ("mcp_servers", "container", "output_format") if body.get(name)]
        about = body.get("metadata")
        return Asked(
            messages=readable(found),
            turns=apart(found),
            not_inspected=tuple(unread),
            stream=flag(body, "stream"),
            model=str(body.get("model", "")),
            user=str(about.get("user_id") or "") if isinstance(about, dict) else "",
        )

    def reply(self) -> MessagesReply:
        """See `reading.Wire`."""
        return MessagesReply()

    def call(self, request: ChatRequest, asked: Asked) -> Call:
        """See `reading.Wire`."""
        return Call(request=request, model=asked.model, stream=asked.stream)


def _turn(block: object, role: str, here: str, unread: list[str]) -> Message:
    """A block as a turn of its own. A tool's result stands in the user's turn, and is not the user's."""
    kind = str(block.get("type")) if isinstance(block, dict) else ""
    if isinstance(block, dict) and kind in ("tool_use", "server_tool_use", "mcp_tool_use"):
        call = call_of(block.get("id"), block.get("name"), block.get("input"))
        return Message(role=role, content="", tool_calls=(call,))
    text = _spoken(block, here, unread)
    if isinstance(block, dict) and kind.endswith("tool_result"):
        return Message(role="tool", content=text, tool_call_id=str(block.get("tool_use_id")))
    return Message(role=role, content=text)


def _spoken(block: object, here: str, unread: list[str]) -> str:
    if not isinstance(block, dict):
        return parts([block], here, unread, {})
    match block.get("type"):
        case "tool_result" | "mcp_tool_result":
            return parts(block.get("content"), f"{here}.content", unread, _TEXT_BLOCKS)
        case "search_result":
            return parts(block.get("content"), f"{here}.content", unread, _TEXT_BLOCKS)
        case "document" if isinstance(source := block.get("source"), dict) and source.get("type") == "text":
            return str(source.get("data", ""))
        case str() as kind if kind in _TEXT_BLOCKS and isinstance(text := block.get(_TEXT_BLOCKS[kind]), str):
            return text
        case kind:
            unread.append(f"{here}: {short(kind)}")
            return ""


@dataclass(slots=True)
class MessagesReply(Reply):
    """See `reading.Reply`."""

    blocks: int = 0
    """Blocks of content that have begun."""
    opened: int | None = None
    """The one that has not ended."""
    output_tokens: int = 0
    calling: tuple[object, object, object] | None = None
    """Place, id and name of the call under way."""

    def whole(self, body: Mapping[str, Any]) -> str:
        """See `reading.Reply`."""
        self.note("", body, _KNOWN_BODY)
        self._stopped(body.get("stop_reason"), body.get("usage"))
        new = ""
        for i, block in enumerate(rows(body.get("content"))):
            new += self._block(i, block)
            self._called(block.get("input"))
        return new

    def event(self, body: Mapping[str, Any]) -> str:
        """See `reading.Reply`."""
        kind, index = body.get("type"), body.get("index")
        if kind == "error":
            raise UpstreamError(f"the upstream broke off: {told(body)}", body=body)
        if kind == "message_start":
            [message] = rows([body.get("message") or {}])
            self._stopped(None, message.get("usage"))
        elif kind == "content_block_start":
            self.blocks += 1
            self.opened = index if isinstance(index, int) else self.blocks - 1
            [block] = rows([body.get("content_block") or {}])
            return self._block(index, block)
        elif kind == "content_block_delta":
            [delta] = rows([body.get("delta") or {}])
            name = _DELTAS.get(str(delta.get("type")))
            if name is not None:
                return self.add((index, name), delta.get(name))
            if delta.get("type") != "signature_delta":
                self.unread[f"content[{short(index)}]: {short(delta.get('type'))}"] = None
        elif kind == "content_block_stop":
            self.opened = None
            self._called(None)
        elif kind == "message_delta":
            [delta] = rows([body.get("delta") or {}])
            self._stopped(delta.get("stop_reason"), body.get("usage"))
        elif kind == "message_stop":
            self.over = True
        return ""

    @property
    def is_calling(self) -> bool:
        """See `reading.Reply`."""
        return self.calling is not None

    def ends(self, body: Mapping[str, Any]) -> bool:
        """See `reading.Reply`."""
        return body.get("type") in ("message_delta", "message_stop")

    def carries(self, body: Mapping[str, Any]) -> bool:
        """See `reading.Reply`."""
        return body.get("type") == "message_delta"

    def with_block(self, body: Mapping[str, Any], block: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `reading.Reply`."""
        if body.get("type") == "message_start" and isinstance(message := body.get("message"), dict):
            return {**body, "message": {**message, "hhh": block}}
        return {**body, "hhh": block}

    def ending(self, message: str, done: ChatFinished) -> list[bytes]:
        """See `reading.Reply`. The block that is open is closed; the message is a block of its own."""
        frames = [] if self.opened is None else [_event("content_block_stop", index=self.opened)]
        at, usage = self.blocks, {"output_tokens": max(self.output_tokens, done.usage.completion_tokens)}
        return [
            *frames,
            _event("content_block_start", index=at, content_block={"type": "text", "text": ""}),
            _event("content_block_delta", index=at, delta={"type": "text_delta", "text": f"\n\n{message}"}),
            _event("content_block_stop", index=at),
            _event(
                "message_delta",
                delta={"stop_reason": "refusal", "stop_sequence": None},
                usage=usage,
                hhh=done.metadata.as_json(),
            ),
            _event("message_stop"),
        ]

    def _block(self, index: object, block: Mapping[str, Any]) -> str:
        match block.get("type"):
            case "text":
                return self.add((index, "text"), block.get("text"))
            case "thinking":
                return self.add((index, "thinking"), block.get("thinking"))
            case "tool_use" | "server_tool_use" | "mcp_tool_use":
                given = block.get("input")
                self.calling = index, block.get("id"), block.get("name")
                new = self.add((index, "name"), block.get("name"))
                return new + (self.add((index, "partial_json"), given) if given else "")
            case kind:
                self.unread[f"content[{short(index)}]: {short(kind)}"] = None
                return ""

    def _called(self, given: object) -> None:
        """The call under way is whole; its arguments came in pieces, or are given."""
        if self.calling is not None:
            (index, name_of_call, name), self.calling = self.calling, None
            said = "".join(self.texts.get((index, "partial_json"), ()))
            self.call(name_of_call, name, said or json.dumps(given or {}, ensure_ascii=False))

    def _stopped(self, reason: object, usage: object) -> None:
        if reason is not None:
            self.finish_reason = _STOP_REASONS.get(str(reason), self.finish_reason)
        if isinstance(usage, dict):
            prompt, said = count(usage.get("input_tokens")), count(usage.get("output_tokens"))
            self.usage = (prompt if prompt is not None else self.usage[0], said if said is not None else self.usage[1])
            self.output_tokens = said or self.output_tokens


def _event(kind: str, **fields: Any) -> bytes:
    return event(kind, dump({"type": kind, **fields}))
