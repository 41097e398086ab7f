"""How a response is told: its items, and the events that bring them on a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hhh_router.interfaces.server.openai import wire_token
from hhh_router.pipeline import ChatDelta, ChatFinished, TokenLogprob
from hhh_router.trace.block import Metadata
from hhh_router.types import ToolCall

if TYPE_CHECKING:
    from hhh_router.interfaces.server.responses import Call


class Writer:
    """The events of one streamed response. ``hhh`` is in ``response.created`` and in the last event's response."""

    def __init__(self, call: Call, first: Metadata) -> None:
        self._call, self._first = call, first
        self._begun = False
        self._parts: list[dict[str, Any]] = []
        """Of the message under way; the last may grow."""
        self._item: dict[str, Any] | None = None
        """The message under way."""
        self._at = -1
        """Its place in the output, or that of the last item."""

    def delta(self, piece: ChatDelta) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        frames = self._open()
        if piece.text or not piece.tool_calls:
            frames += self._say(piece)
        for call in piece.tool_calls:
            frames += [*self._end_message(), *self._called(call)]
        return frames

    def end(self, done: ChatFinished) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        frames = self._open()
        if self._at < 0:
            frames += self._say(ChatDelta(text=""))  # a reply without a word still has its message
        response = self._call.finished(done)
        frames += self._end_message(response["status"])
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        return [*frames, self._call.event(kind, response=response)]

    def _open(self) -> list[bytes]:
        if self._begun:
            return []
        self._begun = True
        started = self._call.body("in_progress", hhh=self._first.as_json())
        return [
            self._call.event("response.created", response=started),
            self._call.event("response.in_progress", response=started),
        ]

    def _say(self, piece: ChatDelta) -> list[bytes]:
        kind = "refusal" if piece.is_refusal else "output_text"
        key = "refusal" if piece.is_refusal else "text"
        frames = self._begin_message()
        if not self._parts or self._parts[-1]["type"] != kind:
            frames += self._close_part()
            self._parts.append(_part(kind))
            frames.append(self._event("response.content_part.added", part=dict(self._parts[-1])))
        part = self._parts[-1]
        text = piece.text.strip() if piece.is_refusal else piece.text
        told: dict[str, Any] = {}
        if kind == "output_text":
            tokens = [wire_token(t) for t in piece.logprobs]
            part["logprobs"] += tokens
            told = {"logprobs": tokens}
        part[key] += text
        return [*frames, self._event(f"response.{kind}.delta", delta=text, **told)] if text or told else frames

    def _begin_message(self) -> list[bytes]:
        if self._item is not None:
            return []
        self._at += 1
        self._parts = []
        self._item = self._call.message(self._at, [], "in_progress")
        return [self._call.event("response.output_item.added", output_index=self._at, item=self._item)]

    def _end_message(self, status: str = "completed") -> list[bytes]:
        if self._item is None:
            return []
        frames = self._close_part()
        item = self._call.message(self._at, self._parts, status)
        self._item = None
        return [*frames, self._call.event("response.output_item.done", output_index=self._at, item=item)]

    def _close_part(self) -> list[bytes]:
        if not self._parts:
            return []
        part = self._parts[-1]
        if part["type"] == "refusal":
            done = self._event("response.refusal.done", refusal=part["refusal"])
        else:
            done = self._event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        return [done, self._event("response.content_part.done", part=part)]

    def _called(self, call: ToolCall) -> list[bytes]:
        self._at += 1
        whole = function_call(call)
        here = {"item_id": whole["id"], "output_index": self._at}
        begun = {**whole, "arguments": "", "status": "in_progress"}
        kind = "response.function_call_arguments"
        return [
            self._call.event("response.output_item.added", output_index=self._at, item=begun),
            self._call.event(f"{kind}.delta", delta=call.arguments, **here),
            self._call.event(f"{kind}.done", arguments=call.arguments, name=call.name, **here),
            self._call.event("response.output_item.done", output_index=self._at, item=whole),
        ]

    def _event(self, kind: str, **fields: Any) -> bytes:
        assert self._item is not None
        place = {"item_id": self._item["id"], "output_index": self._at, "content_index": len(self._parts) - 1}
        return self._call.event(kind, **place, **fields)


def function_call(call: ToolCall) -> dict[str, Any]:
    """A call as an item of the output."""
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def parts_of(done: ChatFinished) -> list[dict[str, Any]]:
    """What was let through, and the policy's message, which ends the text, as a part of its own."""
    text = done.text.removesuffix(done.refusal).rstrip() if done.refusal else done.text
    parts = []
    if text or not done.refusal:
        parts.append(_part("output_text", text, done.logprobs or ()))
    if done.refusal:
        parts.append(_part("refusal", done.refusal))
    return parts


def _part(kind: str, text: str = "", logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
    if kind == "refusal":
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [wire_token(t) for t in logprobs]}
