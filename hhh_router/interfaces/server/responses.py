"""OpenAI's responses: their wire in, `ChatRequest`; `ChatEvent` in, their wire out.

Stateless but for ``previous_response_id``: conversations are kept in memory, the oldest dropped first, where the caller
does not set ``store`` to false.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import (
    check_supported,
    inner,
    kind_of,
    one,
    our_fields,
    parse_messages,
    parse_weights,
    wants_usage,
)
from hhh_router.interfaces.sampling import parse_sampling
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import Failure, WireError, dump, failure
from hhh_router.interfaces.server.models import parse_model
from hhh_router.interfaces.server.responses_events import Writer, function_call, parts_of
from hhh_router.interfaces.tools import parse_tools
from hhh_router.pipeline import ChatFinished
from hhh_router.pipeline.kept import Kept
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, Message, Sampling

MOST_KEPT = 1024
"""Responses that ``previous_response_id`` may name."""
MOST_CHARS = 16_000_000
"""Of their conversations together."""
_LOGPROBS = "message.output_text.logprobs"
READ_FIELDS = frozenset(
    {
        "model",
        "input",
        "instructions",
        "max_output_tokens",
        "temperature",
        "top_p",
        "stream",
        "text",
        "include",
        "store",
    }
    | {"previous_response_id", "top_logprobs", "metadata", "hhh", "stream_options"}
    | {"tools", "tool_choice", "parallel_tool_calls"}
)
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "background": (False,),
    "truncation": ("disabled",),
    "conversation": (),
    "prompt": (),
    "max_tool_calls": (),
    "moderation": (),
}
"""Fields that change the answer and are not supported yet, with the values that change nothing. Others are refused."""


class Conversations:
    """What ``previous_response_id`` goes on from. For one event loop."""

    def __init__(self, *, most: int = MOST_KEPT, most_chars: int = MOST_CHARS) -> None:
        self._kept = Kept[tuple[str, str], tuple[Message, ...]](most=most, most_size=most_chars)

    def keep(self, owner: str, response_id: str, messages: tuple[Message, ...]) -> None:
        """Remember a conversation up to and with a response, for its caller alone."""
        self._kept.keep((owner, response_id), messages, size=_chars(messages))

    def find(self, owner: str, response_id: str) -> tuple[Message, ...]:
        """The conversation up to and with a response.

        Raises:
            WireError: 404, it is not known, or not any more.
        """
        if (found := self._kept.find((owner, response_id))) is None:
            raise WireError(
                404,
                f"previous_response_id: {response_id[:80]!r} is not known here (any more); send the whole conversation",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        return found


def _chars(messages: Sequence[Message]) -> int:
    return sum(len(m.content) + sum(len(c.arguments) for c in m.tool_calls) for m in messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One response as the client wants it told."""

    request: ChatRequest
    model: str
    stream: bool
    asked: Mapping[str, Any]
    """Fields of the body that the response repeats."""
    conversations: Conversations | None
    """Where the conversation is kept; None where the caller does not want it to be."""
    owner: str
    """Whose conversation it is."""
    turns: tuple[Message, ...]
    """Of the conversation, without instructions, which do not carry over."""
    created: int = field(default_factory=lambda: int(time.time()))
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def id(self) -> str:
        """Of the response."""
        return f"resp_{self.request.request_id}"

    def whole(self, done: ChatFinished) -> dict[str, Any]:
        """See `dialect.Dialect`."""
        return self.finished(done)

    def begin(self, first: Metadata) -> Writer:
        """See `dialect.Dialect`."""
        return Writer(self, first)

    def failure(self, error: Exception) -> Failure:
        """See `dialect.Dialect`."""
        return failure(error)

    @property
    def ping(self) -> bytes:
        """See `dialect.Dialect`."""
        return b": ping\n\n"

    def broken(self, body: Mapping[str, Any]) -> bytes:
        """See `dialect.Dialect`."""
        told = body.get("error") or {}
        error = {"code": "server_error", "message": told.get("message", "the response failed")}
        return self.event("response.failed", response=self.body("failed", error=error))

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event, numbered."""
        return event(kind, dump({"type": kind, "sequence_number": next(self._numbers), **fields}))

    def body(self, status: str, *, output: Sequence[Mapping[str, Any]] = (), **more: Any) -> dict[str, Any]:
        """The response as it stands."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": list(output),
            **self.asked,
            **more,
        }

    def finished(self, done: ChatFinished) -> dict[str, Any]:
        """The whole response; its conversation is kept from here on."""
        if self.conversations is not None:
            reply = Message(role="assistant", content=done.text, tool_calls=done.tool_calls)
            self.conversations.keep(self.owner, self.id, (*self.turns, reply))
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(done.finish_reason)
        usage = {
            "input_tokens": done.usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": done.usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": done.usage.prompt_tokens + done.usage.completion_tokens,
        }
        status = "completed" if reason is None else "incomplete"
        calls = [function_call(call) for call in done.tool_calls]
        said = [self.message(0, parts_of(done), status)] if done.text or not calls else []
        return self.body(
            status,
            output=[*said, *calls],
            incomplete_details=None if reason is None else {"reason": reason},
            usage=usage,
            hhh=done.metadata.as_json(),
        )

    def message(self, at: int, parts: Sequence[Mapping[str, Any]], status: str) -> dict[str, Any]:
        """The message at a place of the output."""
        return {
            "id": f"msg_{self.request.request_id}" + (f"_{at}" if at else ""),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": list(parts),
        }


def parse_response(
    body: Mapping[str, Any], conversations: Conversations, *, owner: str = "", request_id: str = ""
) -> Call:
    """OpenAI's body as our request.

    Args:
        body: As the client sent it.
        conversations: Those that may be gone on from, and where this one will be kept.
        owner: Whose conversations may be named.
        request_id: Names the request in every trace.

    Raises:
        InvalidRequest: A field is wrong, or asks for what is not supported yet.
        WireError: 404, no such model, or no such earlier response.
    """
    ours, unread = our_fields(body), check_supported(body, READ_FIELDS, NEUTRAL_VALUES)
    given, more = _turns(body.get("input"))
    earlier = body.get("previous_response_id")
    if earlier is not None and not isinstance(earlier, str):
        raise InvalidRequest(f"previous_response_id: found {kind_of(earlier)}", hint="send the id of a response")
    turns = (*(conversations.find(owner, earlier) if earlier else ()), *given)
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise InvalidRequest(f"instructions: found {kind_of(instructions)}", hint="send text")
    opening = (Message(role="system", content=instructions),) if instructions else ()
    choice = parse_model(body.get("model"))
    policy = one("policy", choice.policy, ours.get("policy"))
    if policy is not None and not isinstance(policy, str):
        raise InvalidRequest("hhh.policy: no string", hint="send a policy's name")
    flags = {name: body.get(name) for name in ("stream", "store")}
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(f"{name}: found {kind_of(value)}", hint="send true or false")
    wants_usage(body)  # it is always told on this wire: what stands there must be right all the same
    sampling = _sampling(body)
    request = ChatRequest(
        messages=(*opening, *turns),
        policy=policy,
        weights=one("weights", choice.weights, parse_weights(ours.get("weights"), where="hhh.weights")),
        sampling=sampling,
        tools=parse_tools(body.get("tools"), body.get("tool_choice"), body.get("parallel_tool_calls")),
        request_id=request_id,
        not_inspected=more + unread,
    )
    kept = flags["store"] is not False
    asked = {
        "instructions": instructions,
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": inner(body, "metadata", '{"project": "mine"}'),
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": earlier,
        "store": kept,
        "temperature": sampling.temperature,
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "text": body.get("text") or {"format": {"type": "text"}},
        "top_p": sampling.top_p,
        "truncation": "disabled",
    }
    return Call(
        request=request,
        model=str(body.get("model", "")),
        stream=bool(flags["stream"]),
        asked=asked,
        conversations=conversations if kept else None,
        owner=owner,
        turns=turns,
    )


def _turns(given: object) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    if isinstance(given, str):
        return (Message(role="user", content=given),), ()
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise InvalidRequest(f"input: found {kind_of(given)}", hint="send text, or a list of messages")
    rows: list[Any] = []
    names: list[str] = []
    for i, row in enumerate(given):
        kind = row.get("type", "message") if isinstance(row, Mapping) else "message"
        turn = row
        if kind == "function_call":
            call = {"id": row.get("call_id"), "function": {k: row.get(k) for k in ("name", "arguments")}}
            if rows and isinstance(rows[-1], Mapping) and rows[-1].get("role") == "assistant":
                rows[-1] = {**rows[-1], "tool_calls": [*rows[-1].get("tool_calls", ()), call]}
                continue
            turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        elif kind == "function_call_output":
            turn = {"role": "tool", "content": row.get("output"), "tool_call_id": row.get("call_id")}
        elif kind != "message":
            raise InvalidRequest(
                f"input[{i}]: {str(kind)[:40]} is not supported yet", hint="send messages, and calls of functions"
            )
        elif isinstance(row, Mapping):
            turn = {k: v for k, v in row.items() if k not in ("type", "id", "status")}
        rows.append(turn)
        names.append(f"input[{i}]")
    return parse_messages(rows, where="input", names=names)


def _sampling(body: Mapping[str, Any]) -> Sampling:
    text = {} if body.get("text") is None else body["text"]
    if not isinstance(text, Mapping):
        raise InvalidRequest(
            f"text: found {kind_of(text)}", hint='send an object, such as {"format": {"type": "text"}}'
        )
    form = text.get("format")
    if isinstance(form, Mapping) and form.get("type") == "json_schema":  # flat here, nested on chat completions' wire
        form = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
    include = [] if body.get("include") is None else body["include"]
    if not isinstance(include, Sequence) or isinstance(include, str):
        raise InvalidRequest(f"include: found {kind_of(include)}", hint="send a list of names")
    wanted = True if _LOGPROBS in include else None
    return parse_sampling(
        max_tokens=body.get("max_output_tokens"), temperature=body.get("temperature"), top_p=body.get("top_p"),
        logprobs=wanted, top_logprobs=body.get("top_logprobs") if wanted else None, response_format=form,
    )  # fmt: skip
