"""OpenAI's older completions, which many servers still speak."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hhh_router.errors import InvalidRequest, UpstreamError
from hhh_router.interfaces.parse import kind_of
from hhh_router.interfaces.proxy.wires.chat import FINISH_REASONS, told
from hhh_router.interfaces.proxy.wires.reading import Asked, Reply, count, flag, readable, rows
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import Failure, dump, failure
from hhh_router.pipeline import ChatDelta, ChatFinished
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, Message

_KNOWN_BODY = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint"})
_KNOWN_CHOICE = frozenset({"index", "text", "finish_reason"})


class CompletionsWire:
    """See `reading.Wire`."""

    name = "completions"

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See `reading.Wire`. Prompts of token numbers cannot be read."""
        prompt = body.get("prompt")
        unread: list[str] = []
        if isinstance(prompt, str):
            texts = [prompt]
        elif isinstance(prompt, list) and all(isinstance(p, str) for p in prompt):
            texts = list(prompt)
        elif prompt is None or isinstance(prompt, list):
            texts = []
            unread += ["prompt: tokens"] if prompt else []
        else:
            raise InvalidRequest(f"prompt: found {kind_of(prompt)}", hint="send text, or a list of texts")
        if isinstance(suffix := body.get("suffix"), str):
            texts.append(suffix)
        return Asked(
            messages=readable([Message(role="user", content=text) for text in texts]),
            not_inspected=tuple(unread),
            stream=flag(body, "stream"),
            model=str(body.get("model", "")),
        )

    def reply(self) -> CompletionsReply:
        """See `reading.Wire`."""
        return CompletionsReply()

    def call(self, request: ChatRequest, asked: Asked) -> Call:
        """See `reading.Wire`."""
        return Call(request=request, model=asked.model, stream=asked.stream)


@dataclass(slots=True)
class CompletionsReply(Reply):
    """See `reading.Reply`."""

    head: dict[str, Any] = field(default_factory=lambda: {"object": "text_completion"})
    open: dict[int, bool] = field(default_factory=dict)

    def whole(self, body: Mapping[str, Any]) -> str:
        """See `reading.Reply`."""
        return self._take(body)

    def event(self, body: Mapping[str, Any]) -> str:
        """See `reading.Reply`."""
        if "error" in body:
            raise UpstreamError(f"the upstream broke off: {told(body)}", body=body)
        self.head |= {k: body[k] for k in ("id", "created", "model") if k in body}
        return self._take(body)

    def ends(self, body: Mapping[str, Any]) -> bool:
        """See `reading.Reply`."""
        return all(choice.get("finish_reason") is not None for choice in rows(body.get("choices")))

    @property
    def is_over(self) -> bool:
        """See `reading.Reply`. Some servers leave the mark out."""
        return self.over or (bool(self.open) and not any(self.open.values()))

    def ending(self, message: str, done: ChatFinished) -> list[bytes]:
        """See `reading.Reply`."""
        still = [index for index, is_open in sorted(self.open.items()) if is_open] or [0]
        chunks = [_body(self.head, i, f"\n\n{message}", "content_filter") for i in still]
        chunks[-1] = {**chunks[-1], "hhh": done.metadata.as_json()}
        return [*(event(None, dump(chunk)) for chunk in chunks), event(None, b"[DONE]")]

    def _take(self, body: Mapping[str, Any]) -> str:
        if isinstance(usage := body.get("usage"), dict):
            self.usage = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
        self.note("", body, _KNOWN_BODY)
        new = ""
        for i, choice in enumerate(rows(body.get("choices"))):
            index = choice.get("index", i)
            if not isinstance(index, int):
                raise UpstreamError("the upstream's answer has a choice whose index is no number")
            if (reason := choice.get("finish_reason")) is not None:
                self.finish_reason = FINISH_REASONS.get(str(reason), self.finish_reason)
            self.open[index] = reason is None
            self.note(f"choices[{index}].", choice, _KNOWN_CHOICE)
            new += self.add((index,), choice.get("text"))
        return new


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Our own answers on this wire. See `dialect.Dialect`."""

    request: ChatRequest
    model: str
    stream: bool
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def head(self) -> dict[str, Any]:
        """What every body of this answer begins with."""
        return {
            "id": f"cmpl-{self.request.request_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def whole(self, done: ChatFinished, raw: Mapping[str, Any] | None) -> dict[str, Any]:
        """See `dialect.Dialect`."""
        usage = {"prompt_tokens": done.usage.prompt_tokens, "completion_tokens": done.usage.completion_tokens}
        usage["total_tokens"] = sum(usage.values())
        return {
            **_body(self.head, 0, done.text, done.finish_reason),
            "usage": usage,
            "hhh": done.metadata.as_json(),
        }

    def begin(self, first: Metadata) -> _Writer:
        """See `dialect.Dialect`."""
        return _Writer(self, first)

    def failure(self, error: Exception) -> Failure:
        """See `dialect.Dialect`."""
        return failure(error)

    @property
    def ping(self) -> bytes:
        """See `dialect.Dialect`."""
        return b": ping\n\n"

    def broken(self, body: Mapping[str, Any]) -> bytes:
        """See `dialect.Dialect`."""
        return event(None, dump(body))


class _Writer:
    def __init__(self, call: Call, first: Metadata) -> None:
        self._call, self._first = call, first

    def delta(self, piece: ChatDelta) -> Sequence[bytes]:
        """See `dialect.StreamWriter`."""
        chunk = {**_body(self._call.head, 0, piece.text, None), "hhh": self._first.as_json()}
        return [event(None, dump(chunk))]

    def end(self, done: ChatFinished) -> Sequence[bytes]:
        """See `dialect.StreamWriter`."""
        chunk = {**_body(self._call.head, 0, "", done.finish_reason), "hhh": done.metadata.as_json()}
        return [event(None, dump(chunk)), event(None, b"[DONE]")]


def _body(head: Mapping[str, Any], index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {**head, "choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": reason}]}
