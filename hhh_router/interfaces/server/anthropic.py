"""Anthropic's messages: their wire in, `ChatRequest`; `ChatEvent` in, their wire out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import check_supported, kind_of, one, our_fields, parse_messages, parse_weights
from hhh_router.interfaces.sampling import parse_sampling
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import Failure, JsonReply, dump, failure, read_json, until_client_leaves
from hhh_router.interfaces.server.models import parse_model
from hhh_router.interfaces.tools import parse_tools
from hhh_router.pipeline import ChatDelta, ChatFinished, Pipeline
from hhh_router.pipeline.validate import check_messages
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, Message, ReadRequest, ToolCall, Toolset

READ_FIELDS = frozenset(
    {"model", "messages", "system", "max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k", "hhh"}
    | {"tools", "tool_choice"}
)
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "output_config": ({},),
    "output_format": (),
}
"""Fields that change the answer and are not supported yet, with the values that change nothing. Others are refused."""
_UNSUPPORTED_BLOCKS = frozenset({"server_tool_use", "thinking", "redacted_thinking"})
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One message as the client wants it told."""

    request: ChatRequest
    model: str
    stream: bool

    def whole(self, done: ChatFinished) -> dict[str, Any]:
        """See `dialect.Dialect`."""
        return {
            **_head(self.model, done.metadata),
            "content": _content(done),
            **_stop(done),
            "usage": _usage(done),
            "hhh": done.metadata.as_json(),
        }

    def begin(self, first: Metadata) -> Writer:
        """See `dialect.Dialect`."""
        return Writer(self.model, first)

    def failure(self, error: Exception) -> Failure:
        """See `dialect.Dialect`."""
        return anthropic_failure(error)

    @property
    def ping(self) -> bytes:
        """See `dialect.Dialect`."""
        return _event("ping")

    def broken(self, body: Mapping[str, Any]) -> bytes:
        """See `dialect.Dialect`."""
        return event("error", dump(body))


class Writer:
    """The events of one streamed message. ``hhh`` is in ``message_start`` and in ``message_delta``."""

    def __init__(self, model: str, first: Metadata) -> None:
        self._model, self._first = model, first
        self._begun = False
        self._at = -1
        self._in_text = False

    def delta(self, piece: ChatDelta) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        frames = self._open()
        if piece.text or not piece.tool_calls:
            frames += self._text()
            frames.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.tool_calls:
            frames += [
                *self._next({**_tool_use(call), "input": {}}),
                self._delta({"type": "input_json_delta", "partial_json": call.arguments}),
            ]
        return frames

    def end(self, done: ChatFinished) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        frames = self._open()
        if self._at < 0:
            frames += self._text()  # a message without a word still has its block
        return [
            *frames,
            _event("content_block_stop", index=self._at),
            _event("message_delta", delta=_stop(done), usage=_usage(done), hhh=done.metadata.as_json()),
            _event("message_stop"),
        ]

    def _open(self) -> list[bytes]:
        if self._begun:
            return []
        self._begun = True
        message = {
            **_head(self._model, self._first),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},  # both are known, and told, at the end
            "hhh": self._first.as_json(),
        }
        return [_event("message_start", message=message)]

    def _text(self) -> list[bytes]:
        """Begin a block of text, unless one is under way."""
        if self._in_text:
            return []
        frames = self._next({"type": "text", "text": ""})
        self._in_text = True
        return frames

    def _next(self, block: Mapping[str, Any]) -> list[bytes]:
        """End the block under way, and begin another."""
        ended = [_event("content_block_stop", index=self._at)] if self._at >= 0 else []
        self._at += 1
        self._in_text = False
        return [*ended, _event("content_block_start", index=self._at, content_block=dict(block))]

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._at, delta=dict(delta))


def parse_message(body: Mapping[str, Any], *, request_id: str = "") -> Call:
    """Anthropic's body as our request.

    Raises:
        InvalidRequest: A field is wrong, or asks for what is not supported yet.
        WireError: 404, no such model.
    """
    ours = our_fields(body)
    messages, unread = parse_turns(body)
    choice = parse_model(body.get("model"))
    policy = one("policy", choice.policy, ours.get("policy"))
    if policy is not None and not isinstance(policy, str):
        raise InvalidRequest("hhh.policy: no string", hint="send a policy's name")
    limit = body.get("max_tokens")
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise InvalidRequest(f"max_tokens: found {kind_of(limit)}", hint="send the most tokens to generate")
    stop = body.get("stop_sequences")
    if stop is not None and (not isinstance(stop, Sequence) or isinstance(stop, str | bytes)):
        raise InvalidRequest(f"stop_sequences: found {kind_of(stop)}", hint="send a list of strings")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest(f"stream: found {kind_of(stream)}", hint="send true or false")
    request = ChatRequest(
        messages=messages,
        policy=policy,
        weights=one("weights", choice.weights, parse_weights(ours.get("weights"), where="hhh.weights")),
        sampling=parse_sampling(
            max_tokens=limit, temperature=body.get("temperature"), top_p=body.get("top_p"), top_k=body.get("top_k"),
            stop=stop or None,
        ),
        tools=_tools(body),
        request_id=request_id,
        not_inspected=unread + check_supported(body, READ_FIELDS, NEUTRAL_VALUES),
    )  # fmt: skip
    return Call(request=request, model=str(body.get("model", "")), stream=bool(stream))


async def count_tokens(request: Request, pipeline: Pipeline) -> Response:
    """``{model, messages, system?, tools?}`` → how many tokens the prompt has with the model's template around it.

    The prompt is read to l_r for it, so that the number is the engine's own.
    """
    body = await read_json(request, max_bytes=pipeline.settings.max_body_bytes)
    parse_model(body.get("model"))
    messages, _ = parse_turns(body)
    check_messages(messages, max_bytes=pipeline.settings.max_body_bytes)
    use = _tools(body)
    read = ReadRequest(messages=messages, tools=use.tools if use else ())
    [scores] = await until_client_leaves(request.receive, pipeline.parts.reader.read([read]))
    return JsonReply({"input_tokens": scores.tokens})


def parse_turns(body: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation, ``system`` first, and what of it nobody will read.

    Raises:
        InvalidRequest: No list of messages, or blocks that cannot be read.
    """
    rows = body.get("messages", ())
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise InvalidRequest(f"messages: found {kind_of(rows)}", hint="send a list of messages")
    for i, row in enumerate(rows):
        content = row.get("content") if isinstance(row, Mapping) else None
        for j, block in enumerate(content if isinstance(content, list) else ()):
            if isinstance(block, Mapping) and str(block.get("type")) in _UNSUPPORTED_BLOCKS:
                raise InvalidRequest(
                    f"messages[{i}].content[{j}]: {block['type']} is not supported yet",
                    hint="send turns with text only",
                )
    turns = [turn for i, row in enumerate(rows) for turn in _turns(row, f"messages[{i}]")]
    messages, unread = parse_messages([row for row, _ in turns], names=[name for _, name in turns])
    if (system := body.get("system")) in (None, "", []):
        return messages, unread
    [first], more = parse_messages([{"role": "system", "content": system}], where="system")
    return (first, *messages), tuple(u.replace("system[0].content", "system") for u in more) + unread


def _turns(row: object, here: str) -> list[tuple[Any, str]]:
    """A row as OpenAI has it, with its name in messages: results of tools are turns of their own there, and come first.

    Raises:
        InvalidRequest: A block of a tool that says neither which nor what.
    """
    content = row.get("content") if isinstance(row, Mapping) else None
    if not isinstance(row, Mapping) or not isinstance(content, list):
        return [(row, here)]
    turns: list[tuple[Any, str]] = []
    calls: list[dict[str, Any]] = []
    rest: list[Any] = []
    for j, block in enumerate(content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        at = f"{here}.content[{j}]"
        if kind == "tool_result":
            if not isinstance(block.get("tool_use_id"), str):
                raise InvalidRequest(f"{at}.tool_use_id: found {kind_of(block.get('tool_use_id'))}", hint="send its id")
            told = {"role": "tool", "tool_call_id": block["tool_use_id"], "content": block.get("content") or ""}
            turns.append((told | ({"is_error": True} if block.get("is_error") else {}), at))
        elif kind == "tool_use":
            if not isinstance(block.get("input"), Mapping):
                raise InvalidRequest(f"{at}.input: found {kind_of(block.get('input'))}", hint="send an object")
            arguments = json.dumps(block["input"], ensure_ascii=False)
            calls.append({"id": block.get("id"), "function": {"name": block.get("name"), "arguments": arguments}})
        else:
            rest.append(block)
    if rest or calls or not turns:
        turns.append(({**row, "content": rest, **({"tool_calls": calls} if calls else {})}, here))
    return turns


def _tools(body: Mapping[str, Any]) -> Toolset | None:
    """Anthropic's tools and choice, by way of OpenAI's.

    Raises:
        InvalidRequest: A tool of Anthropic's own, or no tool.
    """
    rows = body.get("tools")
    if rows is not None and (not isinstance(rows, Sequence) or isinstance(rows, str | bytes)):
        raise InvalidRequest(f"tools: found {kind_of(rows)}", hint="send a list of tools")
    tools: list[Any] = []
    for i, row in enumerate(rows or ()):
        if not isinstance(row, Mapping):
            raise InvalidRequest(f"tools[{i}]: found {kind_of(row)}", hint="send a tool with a name and input_schema")
        if row.get("type") not in (None, "custom"):
            raise InvalidRequest(
                f"tools[{i}].type: found {str(row['type'])[:40]!r}, not supported", hint="send tools with input_schema"
            )
        named = {key: row.get(key) for key in ("name", "description", "strict")}
        tools.append({"type": "function", **named, "parameters": row.get("input_schema")})
    choice = body.get("tool_choice") or {}
    kind = choice.get("type", "auto") if isinstance(choice, Mapping) else None
    if kind == "tool":
        chosen: object = {"type": "function", "name": choice.get("name")}
    elif isinstance(kind, str) and kind in _CHOICES:
        chosen = _CHOICES[kind]
    else:
        raise InvalidRequest("tool_choice.type: not known", hint="use 'auto', 'any', 'tool' or 'none'")
    alone = choice.get("disable_parallel_tool_use")
    if alone is not None and not isinstance(alone, bool):
        raise InvalidRequest("tool_choice.disable_parallel_tool_use: no boolean", hint="send true or false")
    return parse_tools(tools, chosen, not alone)


def _content(done: ChatFinished) -> list[dict[str, Any]]:
    calls = [_tool_use(call) for call in done.tool_calls]
    return [{"type": "text", "text": done.text}, *calls] if done.text or not calls else calls


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}


def anthropic_failure(error: Exception) -> Failure:
    """Status, body and headers for any error, in Anthropic's shape. A server that cannot take more is 529 here."""
    status, body, headers = failure(error)
    status = 529 if status == 503 else status
    told = body.get("error")
    message = told.get("message") if isinstance(told, Mapping) else None
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, {"type": "error", "error": {"type": kind, "message": message or str(error)}}, headers


def _head(model: str, metadata: Metadata) -> dict[str, Any]:
    return {"id": f"msg_{metadata.request_id}", "type": "message", "role": "assistant", "model": model}


def _stop(done: ChatFinished) -> dict[str, Any]:
    reason = _STOP_REASONS[done.finish_reason] if done.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": done.stop}


def _usage(done: ChatFinished) -> dict[str, int]:
    return {"input_tokens": done.usage.prompt_tokens, "output_tokens": done.usage.completion_tokens}


def _event(kind: str, **fields: Any) -> bytes:
    return event(kind, dump({"type": kind, **fields}))
