"""OpenAI's chat completions: their wire in, `ChatRequest`; `ChatEvent` in, their wire out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import check_supported, one, our_fields, parse_messages, parse_weights, wants_usage
from hhh_router.interfaces.sampling import parse_sampling
from hhh_router.interfaces.server.choices import parse_count, strictest, total, variants
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import Failure, dump, failure
from hhh_router.interfaces.server.models import parse_model
from hhh_router.interfaces.server.moderations import moderated, parse_moderation
from hhh_router.interfaces.tools import parse_tools
from hhh_router.pipeline import ChatDelta, ChatFinished, TokenLogprob
from hhh_router.tools import call_as_openai
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, Sampling

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "seed", "stop", "logit_bias", "top_logprobs", "response_format")
READ_FIELDS = frozenset(
    {"messages", "model", "hhh", "stream", "stream_options", "max_tokens", "max_completion_tokens", "logprobs", "n"}
    | {"moderation", "tools", "tool_choice", "parallel_tool_calls", *_SAMPLING_FIELDS}
)
"""Fields of the body that are acted on."""
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
"""Fields that change the answer and are not supported yet, with the values that change nothing. Others are refused."""
DONE = (event(None, b"[DONE]"),)
LEAST_LOGPROB = -9999.0  # what this wire says in place of minus infinity, which JSON cannot


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One chat completion as the client wants it told."""

    request: ChatRequest
    model: str
    stream: bool
    include_usage: bool
    moderation: bool = False
    """Whether scores of input and output are wanted."""
    count: int = 1
    """Choices that are wanted."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    def whole(self, done: ChatFinished) -> dict[str, Any]:
        """See `dialect.Dialect`."""
        return completion(self, done)

    @property
    def requests(self) -> tuple[ChatRequest, ...]:
        """See `choices.ManyDialect`."""
        return variants(self.request, self.count)

    def whole_of(self, done: Sequence[ChatFinished]) -> dict[str, Any]:
        """See `choices.ManyDialect`. The block at the top is the strictest one; each choice has its own too."""
        choices = [
            {**_choice(d), "index": at, **_moderation(self, d), "hhh": d.metadata.as_json()}
            for at, d in enumerate(done)
        ]
        return {**_head(self), "choices": choices, "usage": total(done), "hhh": strictest(done).as_json()}

    def begin_choice(self, at: int, first: Metadata) -> ChoiceFrames:
        """See `choices.ManyDialect`."""
        return ChoiceFrames(ChunkWriter(self, first, at=at))

    def end_of(self, done: Sequence[ChatFinished]) -> list[bytes]:
        """See `choices.ManyDialect`."""
        block = strictest(done).as_json()
        last = {**_head(self, "chat.completion.chunk"), "choices": [], "usage": total(done), "hhh": block}
        return [*([event(None, dump(last))] if self.include_usage else []), *DONE]

    def begin(self, first: Metadata) -> Frames:
        """See `dialect.Dialect`."""
        return Frames(self, ChunkWriter(self, first))

    def failure(self, error: Exception) -> Failure:
        """See `dialect.Dialect`."""
        return failure(error)

    @property
    def ping(self) -> bytes:
        """See `dialect.Dialect`: a comment, which every client skips."""
        return b": ping\n\n"

    def broken(self, body: Mapping[str, Any]) -> bytes:
        """See `dialect.Dialect`."""
        return event(None, dump(body))


class ChoiceFrames:
    """Chunks of one choice as server-sent events."""

    def __init__(self, writer: ChunkWriter) -> None:
        self._writer = writer

    def delta(self, piece: ChatDelta) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        return [event(None, dump(chunk)) for chunk in self._writer.delta(piece)]

    def end(self, done: ChatFinished) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        return [event(None, dump(chunk)) for chunk in self._writer.end(done)]


class Frames(ChoiceFrames):
    """Chunks of the only choice, and what ends the stream: usage, where it is asked for, and a mark."""

    def __init__(self, call: Call, writer: ChunkWriter) -> None:
        super().__init__(writer)
        self._call = call

    def end(self, done: ChatFinished) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        return [*super().end(done), *self._call.end_of([done])]


def parse_chat(body: Mapping[str, Any], *, request_id: str = "") -> Call:
    """OpenAI's body as our request.

    Args:
        body: As the client sent it.
        request_id: Names the request in every trace.

    Raises:
        InvalidRequest: A field is wrong, or asks for what is not supported yet.
        WireError: 404, no such model.
    """
    ours = our_fields(body)
    stream = _boolean(body, "stream")
    include_usage = wants_usage(body)
    messages, unread = parse_messages(body.get("messages", ()))
    unread += check_supported(body, READ_FIELDS, NEUTRAL_VALUES)
    choice = parse_model(body.get("model"))
    policy = one("policy", choice.policy, ours.get("policy"))
    if policy is not None and not isinstance(policy, str):
        raise InvalidRequest("hhh.policy: no string", hint="send a policy's name")
    return Call(
        request=ChatRequest(
            messages=messages,
            policy=policy,
            weights=one("weights", choice.weights, parse_weights(ours.get("weights"), where="hhh.weights")),
            sampling=_sampling(body),
            tools=parse_tools(body.get("tools"), body.get("tool_choice"), body.get("parallel_tool_calls")),
            request_id=request_id,
            not_inspected=unread,
        ),
        model=str(body.get("model", "")),
        stream=stream,
        include_usage=include_usage,
        moderation=parse_moderation(body.get("moderation")),
        count=parse_count(body.get("n")),
    )


def _sampling(body: Mapping[str, Any]) -> Sampling:
    limit = one("max_tokens", body.get("max_tokens"), body.get("max_completion_tokens"))
    asked = body.get("logprobs")
    return parse_sampling(
        max_tokens=limit,
        logprobs=False if asked is None else asked,  # on this wire alternatives have to be asked for with it
        **{name: body.get(name) for name in _SAMPLING_FIELDS},
    )


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name}: found {value!r}", hint="send true or false")
    return bool(value)


# -- their wire out ---------------------------------------------------------------------------------------------------


def completion(call: Call, done: ChatFinished) -> dict[str, Any]:
    """A whole reply."""
    block = {"hhh": done.metadata.as_json()}
    return {**_head(call), "choices": [_choice(done)], "usage": total([done]), **_moderation(call, done), **block}


def _head(call: Call, kind: str = "chat.completion") -> dict[str, Any]:
    name = f"chatcmpl-{call.request.request_id}"
    return {"id": name, "object": kind, "created": call.created, "model": call.model}


def _choice(done: ChatFinished) -> dict[str, Any]:
    return {
        "index": 0,
        "message": _message(done),
        "logprobs": _logprobs(done.logprobs),
        "finish_reason": done.finish_reason,
    }


def _message(done: ChatFinished) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": done.refusal}
    if done.tool_calls:
        message |= {"content": done.text or None, "tool_calls": [call_as_openai(c) for c in done.tool_calls]}
    return message


class ChunkWriter:
    """Turns the events of one chat into OpenAI's chunks. ``hhh`` is in the first chunk and in the last."""

    def __init__(self, call: Call, first: Metadata, *, at: int = 0) -> None:
        self._call = call
        self._at = at
        self._head = _head(call, "chat.completion.chunk")
        self._first: Metadata | None = first
        self._calls = 0

    def delta(self, event: ChatDelta) -> list[dict[str, Any]]:
        """The chunks for one piece of the reply."""
        fields: dict[str, Any] = {"content": event.text} if event.text or not event.tool_calls else {}
        if event.is_refusal:
            fields["refusal"] = event.text.strip()
        if event.tool_calls:  # each whole in one piece: a call that is not cleared to its end is none
            fields["tool_calls"] = [
                {"index": self._calls + i, **call_as_openai(call)} for i, call in enumerate(event.tool_calls)
            ]
            self._calls += len(event.tool_calls)
        return [*self._open(), self._chunk(fields, logprobs=_logprobs(event.logprobs or None))]

    def end(self, done: ChatFinished) -> list[dict[str, Any]]:
        """The chunks that end the reply."""
        block = {"hhh": done.metadata.as_json()}
        last = self._chunk({}, finish_reason=done.finish_reason, **_moderation(self._call, done), **block)
        return [*self._open(), last]

    def _open(self) -> list[dict[str, Any]]:
        """The first chunk, which tells the role, once."""
        if self._first is None:
            return []
        block, self._first = self._first.as_json(), None
        return [self._chunk({"role": "assistant", "content": ""}, hhh=block)]

    def _chunk(
        self,
        delta: Mapping[str, Any],
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        choice = {"index": self._at, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._call.include_usage else {}
        return {**self._head, "choices": [choice], **usage, **more}


def _logprobs(told: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    return None if told is None else {"content": [wire_token(t) for t in told], "refusal": None}


def wire_token(told: TokenLogprob) -> dict[str, Any]:
    """A token as OpenAI's wires tell it, with those that were likeliest in its place."""
    return {**_token(told), "top_logprobs": [_token(other) for other in told.top_logprobs]}


def _token(told: TokenLogprob) -> dict[str, Any]:
    return {
        "token": told.token,
        "logprob": max(told.logprob, LEAST_LOGPROB),
        "bytes": None if told.bytes is None else list(told.bytes),
    }


def _moderation(call: Call, done: ChatFinished) -> dict[str, Any]:
    return {"moderation": moderated(done.metadata, call.model)} if call.moderation else {}
