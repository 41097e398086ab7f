"""Requests and answers of a translated upstream, in the client's wire: which fields pass, and how events are framed."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import WireError, dump
from hhh_router.interfaces.server.openai import DONE

if TYPE_CHECKING:
    from hhh_router.upstream.litellm import Kind, Piece

Body = Mapping[str, Any]

_SHOWN = 80
_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stream", "user"})
_OPENAI = _SAMPLING | frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "max_tokens",
        "n",
        "presence_penalty",
        "seed",
        "stop",
        "stream_options",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    needed: tuple[str, ...]
    taken: frozenset[str]
    """Further ones. Anything else would reach LiteLLM as an option of its own: another address, another key."""
    inert: frozenset[str] = frozenset()
    """Labels for the dashboard of the wire's own provider: they change no answer, and others have no place for them."""
    remembered: tuple[str, ...] = ()
    """What a provider has to remember from earlier; without it the question would be another one."""


_FIELDS: Mapping[Kind, _Fields] = {
    "chat": _Fields(
        needed=("messages",),
        taken=_OPENAI
        | {
            "audio",
            "function_call",
            "functions",
            "logprobs",
            "max_completion_tokens",
            "modalities",
            "parallel_tool_calls",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_retention",
            "reasoning_effort",
            "response_format",
            "safety_identifier",
            "service_tier",
            "thinking",
            "tool_choice",
            "tools",
            "top_logprobs",
            "verbosity",
            "web_search_options",
        },
        inert=frozenset({"metadata", "store"}),
    ),
    "completions": _Fields(needed=("prompt",), taken=_OPENAI | {"best_of", "echo", "logprobs", "suffix"}),
    "responses": _Fields(
        needed=("input",),
        taken=_SAMPLING
        | {
            "include",
            "instructions",
            "max_output_tokens",
            "max_tool_calls",
            "parallel_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "reasoning",
            "safety_identifier",
            "service_tier",
            "store",
            "stream_options",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "truncation",
        },
        inert=frozenset({"metadata"}),
        remembered=("background", "previous_response_id", "prompt"),
    ),
    "messages": _Fields(
        needed=("max_tokens", "messages"),
        taken=(_SAMPLING - {"user"})
        | {
            "cache_control",
            "container",
            "context_management",
            "mcp_servers",
            "metadata",
            "output_config",
            "output_format",
            "service_tier",
            "stop_sequences",
            "system",
            "thinking",
            "tool_choice",
            "tools",
        },
    ),
    "embeddings": _Fields(
        needed=("input",), taken=frozenset({"dimensions", "user"}), inert=frozenset({"encoding_format"})
    ),
}
_OURS = ("hhh", "model")  # the policy that was asked for, and what the upstream replaces


def fields_of(kind: Kind, body: Body, *, drop_params: bool, keeps_responses: bool) -> dict[str, Any]:
    """What of a body is sent on.

    Args:
        kind: Its wire.
        body: As the client sent it.
        drop_params: Leave out what nobody translates, in place of an error.
        keeps_responses: Whether the provider remembers responses.

    Raises:
        WireError: A field is missing, or cannot be translated.
    """
    known = _FIELDS[kind]
    given = {k: v for k, v in body.items() if v is not None and k not in _OURS and k not in known.inert}
    for name in known.needed:
        if name not in given:
            raise WireError(400, f"{name}: missing", code="missing_required_parameter", param=name)
    remembered = set(known.remembered) & {k for k, v in given.items() if v}
    if remembered and not keeps_responses:
        name = min(remembered)
        raise WireError(
            400,
            f"{name}: this upstream's provider remembers nothing; send the whole conversation as input",
            code="unsupported_parameter",
            param=name,
        )
    strange = sorted(k for k in given if k not in (*known.needed, *known.taken, *known.remembered))
    if strange and not drop_params:
        raise WireError(
            400,
            f"{', '.join(k[:_SHOWN] for k in strange[:5])}: not translated to other providers;"
            " leave it out, or set drop_params for this upstream",
            code="unsupported_parameter",
            param=strange[0][:_SHOWN],
        )
    if given.get("stream") and given.get("n", 1) != 1:  # LiteLLM 1.106 to 1.110 tell the end of one of them alone
        raise WireError(
            400, "n: several replies cannot be translated as a stream; leave n or stream out",
            code="unsupported_parameter", param="n",
        )  # fmt: skip
    _check_tools(given.get("tools"))
    return {k: v for k, v in given.items() if k not in strange}


def _check_tools(tools: object) -> None:
    """LiteLLM takes one kind of tool for its own proxy's business, and would run it here."""
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        url = tool.get("server_url") if isinstance(tool, dict) else None
        if isinstance(url, str) and url.startswith("litellm_proxy"):
            raise WireError(
                400, f"tools[{i}].server_url: no such server here", code="unsupported_parameter", param="tools"
            )


# -- answers ----------------------------------------------------------------------------------------------------------


def whole(kind: Kind, body: Body, *, as_base64: bool = False) -> bytes:
    """An answer that is not streamed. ``as_base64``: how vectors were asked for."""
    match kind:
        case "chat":
            body = {**body, "choices": [_chat_choice(c) for c in body.get("choices", ())]}
        case "completions":
            body = _completion(body)
        case "responses":
            body = _response(body)
        case "embeddings" if as_base64:
            body = {**body, "data": [{**d, "embedding": _packed(d["embedding"])} for d in body.get("data", ())]}
    return dump(body)


async def framed(kind: Kind, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
    """The events of a stream as the wire sends them."""
    put = {"chat": _chat_frame, "completions": _completion_frame, "responses": _Numbered().frame}.get(kind, _named)
    async with aclosing(pieces) as events:
        async for piece in events:
            yield piece if isinstance(piece, bytes) else put(piece)
    if kind in ("chat", "completions"):
        yield b"".join(DONE)


def _chat_frame(body: Body) -> bytes:
    choices = [
        {
            **{k: v for k, v in c.items() if v not in ({}, None)},
            "index": c.get("index", 0),
            "delta": _without_empty(c.get("delta") or {}),
            "logprobs": c.get("logprobs"),
            "finish_reason": c.get("finish_reason"),
        }
        for c in body.get("choices", ())
    ]
    return event(None, dump({**_without_empty(body), "choices": choices}))


def _chat_choice(choice: Body) -> Body:
    message = {"role": "assistant", "content": None, **choice.get("message", {})}
    refusal = (message.get("provider_specific_fields") or {}).pop("refusal", None)  # where LiteLLM puts it
    if isinstance(refusal, str):
        message["refusal"] = refusal
    return {"logprobs": None, "finish_reason": None, **_without_empty(choice), "message": _without_empty(message)}


def _completion_frame(body: Body) -> bytes:
    return event(None, dump(_completion(body)))


def _completion(body: Body) -> Body:
    choices = [{"logprobs": None, "finish_reason": None, **c, "text": c.get("text") or ""} for c in body["choices"]]
    usage = body.get("usage") or {}
    told = {} if usage.get("total_tokens") else {"usage"}  # LiteLLM puts zeros into every chunk
    return {k: v for k, v in body.items() if k not in told} | {"choices": choices}


class _Numbered:
    """Events of a response. LiteLLM numbers a few of them."""

    def __init__(self) -> None:
        self._number = -1

    def frame(self, body: Body) -> bytes:
        self._number += 1
        told = {**body, "sequence_number": self._number}
        if isinstance(response := body.get("response"), dict):
            told["response"] = _response(response)
        if body.get("type") in ("response.output_text.delta", "response.output_text.done"):
            told.setdefault("logprobs", [])
        return event(str(body.get("type")), dump(told))


def _response(body: Body) -> Body:
    return {"error": None, "incomplete_details": None, "instructions": None, **body}


def _named(body: Body) -> bytes:
    return event(str(body.get("type")), dump(body))


def _without_empty(body: Body) -> dict[str, Any]:
    """Without what LiteLLM puts beside a wire's own fields when it holds nothing."""
    own = {k: v for k, v in (body.get("provider_specific_fields") or {}).items() if v is not None}
    kept = {k: v for k, v in body.items() if k != "provider_specific_fields"}
    return {**kept, "provider_specific_fields": own} if own else kept


def _packed(vector: object) -> object:
    """As OpenAI's clients ask for vectors: 32-bit floats, little-endian, in base64."""
    if not isinstance(vector, list):
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
