"""OpenAI's responses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hhh_router.errors import InvalidRequest, UpstreamError
from hhh_router.interfaces.parse import kind_of
from hhh_router.interfaces.proxy.wires.chat import TEXT_PARTS
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
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import dump
from hhh_router.interfaces.server.responses import Call
from hhh_router.pipeline import ChatFinished
from hhh_router.types import ChatRequest, Message

_PARTS = {**TEXT_PARTS, "summary_text": "text", "reasoning_text": "text"}
_UNREAD = ("previous_response_id", "conversation", "prompt")
_DELTAS = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "text",
    "response.reasoning_text.delta": "text",
    "response.reasoning_summary_text.delta": "summary",
    "response.function_call_arguments.delta": "arguments",
    "response.custom_tool_call_input.delta": "arguments",
    "response.mcp_call_arguments.delta": "arguments",
}
"""Events that bring text → what it is part of."""
_WHOLES = {
    "response.output_text.done": ("text", "text"),
    "response.refusal.done": ("text", "refusal"),
    "response.reasoning_text.done": ("text", "text"),
    "response.reasoning_summary_text.done": ("summary", "text"),
    "response.function_call_arguments.done": ("arguments", "arguments"),
    "response.custom_tool_call_input.done": ("arguments", "input"),
    "response.mcp_call_arguments.done": ("arguments", "arguments"),
}
"""Events that repeat what deltas brought → what it is part of, and the field that holds it."""
_PART_EVENTS = frozenset(
    {
        "response.content_part.added",
        "response.content_part.done",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_part.done",
    }
)
_QUIET = frozenset({"response.created", "response.queued", "response.in_progress"})
"""Events without a word of the answer."""
_LAST = frozenset({"response.completed", "response.incomplete"})
_CALLS = frozenset({"function_call", "custom_tool_call", "mcp_call"})


class ResponsesWire:
    """See `reading.Wire`."""

    name = "responses"

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See `reading.Wire`. Turns that the upstream remembers cannot be read."""
        unread = [name for name in _UNREAD if body.get(name)]
        instructions = body.get("instructions")
        if instructions is not None and not isinstance(instructions, str):
            unread.append("instructions")
            instructions = None
        tools = described(body.get("tools") or [], unread)
        found = [Message(role="system", content="\n".join(s for s in (instructions, tools) if s))]
        given = body.get("input")
        if isinstance(given, str):
            found.append(Message(role="user", content=given))
        elif given is not None:
            if not isinstance(given, list):
                raise InvalidRequest(f"input: found {kind_of(given)}", hint="send text, or a list of items")
            found += [_turn(row, here, unread) for here, row in turns(body, "input")]
        kept, earlier = body.get("conversation"), body.get("previous_response_id")
        named = kept.get("id") if isinstance(kept, dict) else kept
        return Asked(
            messages=readable(found),
            turns=apart(found),
            conversation=f"conversation {named}" if named else f"response {earlier}" if earlier else None,
            goes_on=bool(named or earlier),
            user=str(body.get("safety_identifier") or body.get("user") or ""),
            not_inspected=tuple(unread),
            stream=flag(body, "stream"),
            model=str(body.get("model", "")),
        )

    def reply(self) -> ResponsesReply:
        """See `reading.Wire`."""
        return ResponsesReply()

    def call(self, request: ChatRequest, asked: Asked) -> Call:
        """See `reading.Wire`."""
        return Call(
            request=request,
            model=asked.model,
            stream=asked.stream,
            asked={},
            conversations=None,
            owner="",
            turns=(),
        )


def _turn(row: Mapping[str, Any], here: str, unread: list[str]) -> Message:
    match row.get("type", "message"):
        case "message":
            text = parts(row.get("content"), f"{here}.content", unread, _PARTS)
            return Message(role=str(row.get("role")), content=text)
        case "function_call" | "custom_tool_call" | "mcp_call":
            given = row.get("call_id") or row.get("id")
            call = call_of(given, row.get("name"), row.get("arguments", row.get("input")))
            return Message(role="assistant", content="", tool_calls=(call,))
        case "function_call_output" | "custom_tool_call_output":
            text = parts(row.get("output"), f"{here}.output", unread, _PARTS)
            return Message(role="tool", content=text, tool_call_id=str(row.get("call_id")))
        case "reasoning":
            texts = [parts(row.get(k), f"{here}.{k}", unread, _PARTS) for k in ("summary", "content")]
            if row.get("encrypted_content"):
                unread.append(f"{here}.encrypted_content")
            return Message(role="assistant", content="\n".join(t for t in texts if t))
        case kind:
            unread.append(f"{here}: {short(kind)}")
            return Message(role="user", content="")


@dataclass(slots=True)
class ResponsesReply(Reply):
    """See `reading.Reply`."""

    response: dict[str, Any] = field(default_factory=dict)
    """The upstream's own, as its first event told it."""
    items: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Items of the output that have begun, by their place."""
    part: tuple[int, int] | None = None
    """Item and part that are open."""
    number: int = -1
    """Of the last event."""
    calling: set[object] = field(default_factory=set)
    """Places of calls under way."""
    told: set[object] = field(default_factory=set)
    """Places of calls that are whole."""

    def whole(self, body: Mapping[str, Any]) -> str:
        """See `reading.Reply`."""
        self._finished(body)
        return "".join(self._item(i, item, is_whole=True) for i, item in enumerate(rows(body.get("output"))))

    def event(self, body: Mapping[str, Any]) -> str:
        """See `reading.Reply`."""
        kind, at = str(body.get("type")), body.get("output_index")
        if isinstance(number := body.get("sequence_number"), int):
            self.number = number
        if kind in ("error", "response.failed"):
            response = body.get("response")
            raise UpstreamError(
                f"the upstream broke off: {told(response if isinstance(response, dict) else body)}", body=body
            )
        if kind == "response.created" and isinstance(body.get("response"), dict):
            self.response = dict(body["response"])
            self._named(self.response)
        if kind in _DELTAS:
            where = (at, body.get("content_index", body.get("summary_index", 0)), _DELTAS[kind])
            if kind == "response.output_text.delta" and isinstance(at, int):
                self.part = at, int(body.get("content_index") or 0)
            return self.add(where, body.get("delta"))
        if kind in _LAST:
            self.over = True
            [response] = rows([body.get("response") or {}])
            self._finished(response)
            return "".join(self._item(i, item, is_whole=True) for i, item in enumerate(rows(response.get("output"))))
        if kind in ("response.output_item.added", "response.output_item.done"):
            [item] = rows([body.get("item") or {}])
            if isinstance(at, int):
                self.items[at] = dict(item)
                self.part = None
            return self._item(at, item, is_whole=kind == "response.output_item.done")
        index = body.get("content_index", body.get("summary_index", 0))
        if kind in _WHOLES:
            part, name = _WHOLES[kind]
            return self.put((at, index, part), body.get(name))
        if kind in _PART_EVENTS:
            self.part = None if kind == "response.content_part.done" else self.part
            [part_body] = rows([body.get("part") or {}])
            return self._part((at, index, "summary" if "summary" in kind else "text"), part_body)
        if kind not in _QUIET:
            self.unread[short(kind)] = None
        return ""

    def ends(self, body: Mapping[str, Any]) -> bool:
        """See `reading.Reply`."""
        return body.get("type") in _LAST

    def with_block(self, body: Mapping[str, Any], block: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `reading.Reply`."""
        if isinstance(response := body.get("response"), dict):
            return {**body, "response": {**response, "hhh": block}}
        return {**body, "hhh": block}

    def ending(self, message: str, done: ChatFinished) -> list[bytes]:
        """See `reading.Reply`. What is open is closed as it stands; the message is an item of its own."""
        frames: list[bytes] = []
        if self.part is not None:
            at, index = self.part
            text = "".join(self.texts.get((at, index, "text"), ()))
            where = {"item_id": self.items.get(at, {}).get("id", ""), "output_index": at, "content_index": index}
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            frames.append(self._event("response.output_text.done", **where, text=text, logprobs=[]))
            frames.append(self._event("response.content_part.done", **where, part=part))
            self.items.setdefault(at, {})["content"] = [part]
        last = max(self.items, default=-1)
        if last >= 0 and self.items[last].get("status") == "in_progress":
            self.items[last]["status"] = "incomplete"
            frames.append(self._event("response.output_item.done", output_index=last, item=self.items[last]))
        at = last + 1
        item = {"id": f"msg_{done.metadata.request_id}", "type": "message", "role": "assistant"}
        part = {"type": "refusal", "refusal": message}
        where = {"item_id": item["id"], "output_index": at, "content_index": 0}
        whole = {**item, "status": "incomplete", "content": [part]}
        begun = {**item, "status": "in_progress", "content": []}
        response = {
            "object": "response",
            "created_at": int(time.time()),
            **self.response,
            "status": "incomplete",
            "incomplete_details": {"reason": "content_filter"},
            "output": [*(self.items[i] for i in sorted(self.items)), whole],
            "hhh": done.metadata.as_json(),
        }
        return [
            *frames,
            self._event("response.output_item.added", output_index=at, item=begun),
            self._event("response.content_part.added", **where, part={"type": "refusal", "refusal": ""}),
            self._event("response.refusal.delta", **where, delta=message),
            self._event("response.refusal.done", **where, refusal=message),
            self._event("response.content_part.done", **where, part=part),
            self._event("response.output_item.done", output_index=at, item=whole),
            self._event("response.incomplete", response=response),
        ]

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return event(kind, dump({"type": kind, "sequence_number": self.number, **fields}))

    @property
    def is_calling(self) -> bool:
        """See `reading.Reply`."""
        return bool(self.calling)

    def _item(self, at: object, item: Mapping[str, Any], *, is_whole: bool) -> str:
        """An item as a whole; what its deltas have said already is not new."""
        new = ""
        match item.get("type"):
            case "message":
                for j, part in enumerate(rows(item.get("content"))):
                    new += self._part((at, j, "text"), part)
            case "reasoning":
                for name, kind in (("content", "text"), ("summary", "summary")):
                    for j, part in enumerate(rows(item.get(name))):
                        new += self._part((at, j, kind), part)
                if item.get("encrypted_content"):
                    self.unread[f"output[{short(at)}].encrypted_content"] = None
            case str() as kind if kind in _CALLS:
                new += self.put((at, "name"), item.get("name"))
                new += self.put((at, 0, "arguments"), item.get("arguments", item.get("input")))
                self.calling.add(at)
                if is_whole:
                    self.calling.discard(at)
                    if at not in self.told:
                        self.told.add(at)
                        said = "".join(self.texts.get((at, 0, "arguments"), ()))
                        self.call(item.get("call_id") or item.get("id"), item.get("name"), said)
                if item.get("output"):
                    new += self.put((at, "output"), item.get("output"))
            case kind:
                self.unread[f"output[{short(at)}]: {short(kind)}"] = None
        return new

    def _part(self, where: tuple[object, ...], part: Mapping[str, Any]) -> str:
        name = _PARTS.get(str(part.get("type")))
        if name is None:
            self.unread[f"output[{short(where[0])}].content[{short(where[1])}]: {short(part.get('type'))}"] = None
            return ""
        return self.put(where, part.get(name))

    def _finished(self, response: Mapping[str, Any]) -> None:
        self._named(response)
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        if reason in ("max_output_tokens", "content_filter"):
            self.finish_reason = "length" if reason == "max_output_tokens" else "content_filter"
        if isinstance(usage := response.get("usage"), dict):
            self.usage = count(usage.get("input_tokens")), count(usage.get("output_tokens"))

    def _named(self, response: Mapping[str, Any]) -> None:
        if isinstance(given := response.get("id"), str):
            self.answer_id = f"response {given}"
