"""Anthropic's messages: their wire in, `ChatRequest`; `ChatEvent` in, their wire out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import check_supported, kind_of, one, our_fields, parse_messages, parse_weights
from hhh_router.interfaces.sampling import parse_sampling
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import Failure, dump, failure, read_json, until_client_leaves
from hhh_router.interfaces.server.models import parse_model
from hhh_router.pipeline import ChatDelta, ChatFinished, Pipeline
from hhh_router.pipeline.validate import check_messages
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, Message, ReadRequest

_READ = frozenset(
    {"model", "messages", "system", "max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k", "hhh"}
)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "output_config": ({},),
    "output_format": (),
}
"""Fields that change the answer and are not supported yet, with the values that change nothing. Others are refused."""
_UNSUPPORTED_BLOCKS = frozenset({"tool_use", "tool_result", "server_tool_use", "thinking", "redacted_thinking"})
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
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

    def whole(self, done: ChatFinished, raw: Mapping[str, Any] | None) -> dict[str, Any]:
        """See `dialect.Dialect`."""
        return {
            **_head(self.model, done.metadata),
            "content": [{"type": "text", "text": done.text}],
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

    def delta(self, piece: ChatDelta) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        delta = {"type": "text_delta", "text": piece.text}
        return [*self._open(), _event("content_block_delta", index=0, delta=delta)]

    def end(self, done: ChatFinished) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        return [
            *self._open(),
            _event("content_block_stop", index=0),
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
        return [
            _event("message_start", message=message),
            _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        ]


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
        request_id=request_id,
        not_inspected=unread + check_supported(body, _READ, _NEUTRAL),
    )  # fmt: skip
    return Call(request=request, model=str(body.get("model", "")), stream=bool(stream))


async def count_tokens(request: Request, pipeline: Pipeline) -> Response:
    """``{model, messages, system?}`` → how many tokens the prompt has with the model's template around it.

    The prompt is read to l_r for it, so that the number is the engine's own.
    """
    body = await read_json(request, max_bytes=pipeline.settings.max_body_bytes)
    parse_model(body.get("model"))
    messages, _ = parse_turns(body)
    check_messages(messages, max_bytes=pipeline.settings.max_body_bytes)
    [scores] = await until_client_leaves(request.receive, pipeline.parts.reader.read([ReadRequest(messages=messages)]))
    return JSONResponse({"input_tokens": scores.tokens})


def parse_turns(body: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation, ``system`` first, and what of it nobody will read.

    Raises:
        InvalidRequest: No list of messages, or turns that call tools.
    """
    rows = body.get("messages", ())
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise InvalidRequest(f"messages: found {kind_of(rows)}", hint="send a list of messages")
    for i, row in enumerate(rows):
        content = row.get("content") if isinstance(row, Mapping) else None
        for j, block in enumerate(content if isinstance(content, list) else ()):
            if isinstance(block, Mapping) and block.get("type") in _UNSUPPORTED_BLOCKS:
                raise InvalidRequest(
                    f"messages[{i}].content[{j}]: {block['type']} is not supported yet",
                    hint="send turns with text only",
                )
    messages, unread = parse_messages(rows)
    if (system := body.get("system")) in (None, "", []):
        return messages, unread
    [first], more = parse_messages([{"role": "system", "content": system}], where="system")
    return (first, *messages), tuple(u.replace("system[0].content", "system") for u in more) + unread


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
    return {"stop_reason": _STOP_REASONS[done.finish_reason], "stop_sequence": None}


def _usage(done: ChatFinished) -> dict[str, int]:
    return {"input_tokens": done.usage.prompt_tokens, "output_tokens": done.usage.completion_tokens}


def _event(kind: str, **fields: Any) -> bytes:
    return event(kind, dump({"type": kind, **fields}))
