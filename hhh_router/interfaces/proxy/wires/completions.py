"""OpenAI's older completions, which many servers still speak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hhh_router.errors import InvalidRequest, UpstreamError
from hhh_router.interfaces.parse import kind_of
from hhh_router.interfaces.proxy.wires.chat import FINISH_REASONS, told
from hhh_router.interfaces.proxy.wires.reading import Asked, Reply, count, flag, readable, rows
from hhh_router.interfaces.server.completions import Call, Writer
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import dump
from hhh_router.interfaces.server.openai import DONE
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
    def is_calling(self) -> bool:
        """See `reading.Reply`: there are no calls on this wire."""
        return False

    @property
    def is_over(self) -> bool:
        """See `reading.Reply`. Some servers leave the mark out."""
        return self.over or (bool(self.open) and not any(self.open.values()))

    def ending(self, message: str, done: ChatFinished) -> list[bytes]:
        """See `reading.Reply`."""
        still = [index for index, is_open in sorted(self.open.items()) if is_open] or [0]
        chunks: list[dict[str, Any]] = [
            {
                **self.head,
                "choices": [
                    {"index": i, "text": f"\n\n{message}", "logprobs": None, "finish_reason": "content_filter"}
                ],
            }
            for i in still
        ]
        chunks[-1] = {**chunks[-1], "hhh": done.metadata.as_json()}
        return [*(event(None, dump(chunk)) for chunk in chunks), *DONE]

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
