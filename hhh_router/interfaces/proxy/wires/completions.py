"""OpenAI's older completions, which many servers still speak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import kind_of
from hhh_router.interfaces.proxy.wires.choices import ChoicesReply, sealed
from hhh_router.interfaces.proxy.wires.reading import Asked, apart, flag, readable
from hhh_router.interfaces.server.completions import Call, Writer
from hhh_router.pipeline import ChatDelta, ChatFinished
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, Message


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
        found = [Message(role="user", content=text) for text in texts]
        return Asked(
            messages=readable(found),
            turns=apart(found),
            user=str(body.get("user") or ""),
            not_inspected=tuple(unread),
            stream=flag(body, "stream"),
            model=str(body.get("model", "")),
        )

    def reply(self) -> CompletionsReply:
        """See `reading.Wire`."""
        return CompletionsReply()

    def call(self, request: ChatRequest, asked: Asked) -> Call:
        """See `reading.Wire`."""
        return _Call(
            request=request,
            prompts=("",),
            count=1,
            model=asked.model,
            stream=asked.stream,
            echo=False,
            include_usage=asked.include_usage,
        )


@dataclass(slots=True)
class CompletionsReply(ChoicesReply):
    """See `reading.Reply`."""

    whole_part = event_part = "text"

    head: dict[str, Any] = field(default_factory=lambda: {"object": "text_completion"})

    @property
    def is_calling(self) -> bool:
        """See `reading.Reply`: there are no calls on this wire."""
        return False

    def ending(self, message: str, done: ChatFinished) -> list[bytes]:
        """See `reading.Reply`."""
        last = {"text": f"\n\n{message}", "logprobs": None, "finish_reason": "content_filter"}
        return sealed([{**self.head, "choices": [{"index": i, **last}]} for i in self.still_open], done)

    def said(self, index: int, part: Any, where: str) -> str:
        """See `choices.ChoicesReply`."""
        return self.add((index,), part)


class _Call(Call):
    """Our own answer on this wire, of which there is always one."""

    def begin(self, first: Metadata) -> _Writer:  # type: ignore[override]
        """See `dialect.Dialect`."""
        return _Writer(self, Call.begin(self, first))


class _Writer:
    def __init__(self, call: Call, writer: Writer) -> None:
        self._call, self._writer = call, writer

    def delta(self, piece: ChatDelta) -> Sequence[bytes]:
        """See `dialect.StreamWriter`."""
        return self._writer.delta(piece)

    def end(self, done: ChatFinished) -> Sequence[bytes]:
        """See `dialect.StreamWriter`."""
        return [*self._writer.end(done), *self._call.end_of([done])]
