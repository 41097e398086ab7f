"""What an answer with choices is on both of OpenAI's wires that have them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hhh_router.errors import UpstreamError
from hhh_router.interfaces.proxy.wires.reading import Reply, count, rows, told
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import dump
from hhh_router.interfaces.server.openai import DONE
from hhh_router.pipeline import ChatFinished
from hhh_router.protocols import FinishReason

_KNOWN_BODY = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"})
_KNOWN_CHOICE = frozenset({"index", "finish_reason"})
_FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


@dataclass(slots=True)
class ChoicesReply(Reply):
    """See `reading.Reply`."""

    whole_part: ClassVar[str]
    """Where the text of a choice stands in a whole answer."""
    event_part: ClassVar[str]
    """And in an event. Clients look nowhere else, so nothing else may be read in its place."""

    head: dict[str, Any] = field(default_factory=dict)
    """What every chunk says of the whole answer."""
    open: dict[int, bool] = field(default_factory=dict)
    """Choices that came up → whether they have not ended yet."""

    def whole(self, body: Mapping[str, Any]) -> str:
        """See `reading.Reply`."""
        return self._take(body, self.whole_part)

    def _take(self, body: Mapping[str, Any], part: str) -> str:
        if isinstance(usage := body.get("usage"), dict):
            self.usage = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
        self.note("", body, _KNOWN_BODY)
        new = ""
        for i, choice in enumerate(rows(body.get("choices"))):
            index = choice.get("index", i)
            if not isinstance(index, int):
                raise UpstreamError("the upstream's answer has a choice whose index is no number")
            if (reason := choice.get("finish_reason")) is not None:
                self.finish_reason = _FINISH_REASONS.get(str(reason), self.finish_reason)
            self.open[index] = reason is None
            self.note(f"choices[{index}].", choice, _KNOWN_CHOICE | {part})
            new += self.said(index, choice.get(part), f"choices[{index}].{part}.")
        return new

    def event(self, body: Mapping[str, Any]) -> str:
        """See `reading.Reply`."""
        if "error" in body:
            raise UpstreamError(f"the upstream broke off: {told(body)}", body=body)
        self.head |= {k: body[k] for k in ("id", "created", "model") if k in body}
        return self._take(body, self.event_part)

    def ends(self, body: Mapping[str, Any]) -> bool:
        """See `reading.Reply`."""
        return all(choice.get("finish_reason") is not None for choice in rows(body.get("choices")))

    @property
    def is_over(self) -> bool:
        """See `reading.Reply`. Some servers leave the mark out."""
        return self.over or (bool(self.open) and not any(self.open.values()))

    @abstractmethod
    def said(self, index: int, part: Any, where: str) -> str:
        """Take what a choice says; returns the text that is new. ``where`` names it, with a dot behind."""

    @property
    def still_open(self) -> list[int]:
        """The choices that a refusal ends."""
        return [index for index, is_open in sorted(self.open.items()) if is_open] or [0]


def sealed(chunks: Sequence[Mapping[str, Any]], done: ChatFinished) -> list[bytes]:
    """Frames of the chunks that end a stream; the last carries the block."""
    *most, last = chunks
    return [*(event(None, dump(chunk)) for chunk in (*most, {**last, "hhh": done.metadata.as_json()})), *DONE]
