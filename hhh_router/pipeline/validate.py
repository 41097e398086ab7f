"""Checks on what callers send, before a tokenizer sees it: every message says what was found, where, and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from hhh_router.errors import InvalidRequest
from hhh_router.types import ChatRequest, GuardRequest, Message, Sampling, Toolset

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 4096  # a chat template is run over all of them
MAX_STOPS = 16  # every stop string is searched for at every token
MAX_TEMPERATURE = 2.0  # the range OpenAI's wire allows
MAX_SEED = 2**63 - 1  # what random generators take
MAX_TOP_LOGPROBS = 20  # as on OpenAI's wire, like the next two
MAX_BIASES = 300
MAX_BIAS = 100.0
MAX_SCHEMA_CHARS = 65_536  # a schema is compiled on the model's thread, in time that grows with it
MAX_SCHEMA_DEPTH = 64  # levels; whoever walks a schema may then do so by recursion
_SHOWN_ROLES = 12


def check_chat(request: ChatRequest, *, max_bytes: int, any_order: bool = False) -> None:
    """Accept a request that can be answered.

    Args:
        request: What the caller sent.
        max_bytes: Most UTF-8 bytes of text, all turns together.
        any_order: Leave role order and empty turns to an upstream, which has rules of its own.

    Raises:
        InvalidRequest: It cannot be answered as it stands.
    """
    if request.continues:
        _check_continued(request, max_bytes)
    else:
        check_messages(request.messages, max_bytes=max_bytes, any_order=any_order)
    check_sampling(request.sampling)
    if request.tools is not None:
        check_tools(request.tools, max_bytes=max_bytes)
    if (given := request.timeout_s) is not None and not (_is_finite(given) and given > 0):
        raise InvalidRequest(f"timeout_s: found {given!r}", hint="use seconds, more than 0")


def _check_continued(request: ChatRequest, max_bytes: int) -> None:
    [message] = request.messages
    ids = request.prompt_ids
    if not ids:
        _check_text(message.content, "prompt", max_bytes=max_bytes)
    elif len(ids) > max_bytes or not all(_is_int(i) and i >= 0 for i in ids):
        raise InvalidRequest("prompt: no list of token ids, or too many", hint="send whole numbers from 0")


def check_guard(request: GuardRequest, *, max_bytes: int, where: str = "") -> None:
    """Accept a text that can be judged.

    Args:
        request: Prompt and/or response.
        max_bytes: Most UTF-8 bytes of text, prompt and response together.
        where: What stands before field names in messages, such as ``items[3].``.

    Raises:
        InvalidRequest: There is nothing to judge, or it is no readable text.
    """
    read = request.read
    if not read.messages and read.response is None:
        raise InvalidRequest(
            f"{where or 'guard: '}neither prompt nor response", hint="give a prompt, a response, or both"
        )
    used = 0
    if read.messages:
        used = check_messages(read.messages, max_bytes=max_bytes, where=f"{where}prompt")
    if read.response is not None:
        _check_text(read.response, f"{where}response", max_bytes=max_bytes - used)


def check_messages(
    messages: Sequence[Message], *, max_bytes: int, any_order: bool = False, where: str = "messages"
) -> int:
    """Accept a conversation a model can read; returns its size in UTF-8 bytes.

    Raises:
        InvalidRequest: No turns, an empty or unreadable one, too much text, or roles in an order no model knows.
    """
    if not messages:
        raise InvalidRequest(f"{where}: no messages", hint="send at least one message with role 'user'")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"{where}: found {len(messages):,} messages", hint=f"send at most {MAX_MESSAGES:,}")
    used = 0
    for i, message in enumerate(messages):
        where_calls = f"{where}[{i}].tool_calls"
        for j, call in enumerate(message.tool_calls):
            if call.arguments:
                used += _check_text(call.arguments, f"{where_calls}[{j}].arguments", max_bytes=max_bytes - used)
        if not message.content and (any_order or message.tool_calls or message.role == "tool"):
            continue
        used += _check_text(message.content, f"{where}[{i}].content", max_bytes=max_bytes - used)
    if not any_order:
        _check_roles([m.role for m in messages], where)
        _check_results(messages, where)
    return used


def _check_results(messages: Sequence[Message], where: str) -> None:
    """Calls stand in an assistant's turn, and a result names one that came before it."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest(
                f"{where}[{i}].tool_calls: found in a turn of role {message.role}", hint="only an assistant calls tools"
            )
        called |= {call.id for call in message.tool_calls}
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise InvalidRequest(
                f"{where}[{i}].tool_call_id: no call {message.tool_call_id[:80]!r} comes before it",
                hint="send the assistant's turn with its tool_calls first",
            )


def check_tools(tools: Toolset, *, max_bytes: int) -> None:
    """Accept tools whose schemas can be followed.

    Raises:
        InvalidRequest: No tool may be called, or a schema is too large, too deep or no JSON.
    """
    if not tools.callable:
        raise InvalidRequest("tools: none of them may be called", hint="name some of them, or leave them out")
    used = 0
    for i, tool in enumerate(tools.tools):
        _check_schema(tool.parameters, f"tools[{i}].parameters")
        used += len(tool.parameters)
        if tool.description:
            max_bytes -= _check_text(tool.description, f"tools[{i}].description", max_bytes=max_bytes)
    if used > MAX_SCHEMA_CHARS:
        raise InvalidRequest(
            f"tools: schemas of {used:,} characters together", hint=f"use at most {MAX_SCHEMA_CHARS:,}"
        )


def check_sampling(sampling: Sampling) -> None:
    """Accept sampling settings a generator can follow.

    Raises:
        InvalidRequest: A number is out of range or not finite.
    """
    least = 1 if sampling.prompt_logprobs is None else 0
    if not _is_int(sampling.max_tokens) or sampling.max_tokens < least:
        raise InvalidRequest(f"max_tokens: found {sampling.max_tokens!r}", hint=f"use a whole number, {least} or more")
    if not _is_finite(sampling.temperature) or not 0 <= sampling.temperature <= MAX_TEMPERATURE:
        raise InvalidRequest(
            f"temperature: found {sampling.temperature!r}", hint=f"use a number from 0 (greedy) to {MAX_TEMPERATURE:g}"
        )
    if not _is_finite(sampling.top_p) or not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"top_p: found {sampling.top_p!r}", hint="use a number above 0, up to 1")
    if sampling.seed is not None and not (_is_int(sampling.seed) and abs(sampling.seed) <= MAX_SEED):
        raise InvalidRequest(f"seed: found {sampling.seed!r}", hint="use a whole number of at most 63 bits, or none")
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidRequest(f"stop: found {len(sampling.stop)} strings", hint=f"use at most {MAX_STOPS}")
    if not all(isinstance(s, str) and s for s in sampling.stop):
        raise InvalidRequest(f"stop: found {list(sampling.stop)!r}", hint="use strings that are not empty")
    if not _is_int(sampling.top_k) or sampling.top_k < 0:
        raise InvalidRequest(f"top_k: found {sampling.top_k!r}", hint="use a whole number, 1 or more; 0 is no limit")
    for name, top in (("top_logprobs", sampling.top_logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if top is not None and not (_is_int(top) and 0 <= top <= MAX_TOP_LOGPROBS):
            raise InvalidRequest(f"{name}: found {top!r}", hint=f"use a whole number from 0 to {MAX_TOP_LOGPROBS}")
    _check_biases(sampling.logit_bias)
    if sampling.json_schema is not None:
        _check_schema(sampling.json_schema, "response_format")


def _check_biases(biases: Mapping[int, float]) -> None:
    if len(biases) > MAX_BIASES:
        raise InvalidRequest(f"logit_bias: found {len(biases)} entries", hint=f"use at most {MAX_BIASES}")
    for token, bias in biases.items():
        if not _is_int(token) or token < 0:
            raise InvalidRequest(f"logit_bias: found token {token!r}", hint="use token ids, whole numbers from 0")
        if not _is_finite(bias) or abs(bias) > MAX_BIAS:
            raise InvalidRequest(
                f"logit_bias[{token}]: found {bias!r}", hint=f"use a number from {-MAX_BIAS:g} to {MAX_BIAS:g}"
            )


def _check_schema(text: str, where: str) -> None:
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}: the schema is {type(text).__name__}", hint="give it as JSON text")
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(f"{where}: a schema of {len(text):,} characters", hint=f"use at most {MAX_SCHEMA_CHARS:,}")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"{where}: the schema is no JSON: {said}", hint="send a JSON schema") from error
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{where}: the schema is no object", hint='send an object, such as {"type": …}')
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise InvalidRequest(
            f"{where}: the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep",
            hint="flatten it, or name its parts under $defs",
        )


def is_deeper(value: object, levels: int) -> bool:
    """Whether a JSON value is nested more levels deep; without recursion.

    >>> is_deeper([[1]], 2), is_deeper([[[]]], 2)
    (False, True)
    """
    level = [value]
    for _ in range(levels):
        level = [inner for outer in level for inner in _inside(outer)]
    return any(isinstance(value, dict | list) for value in level)


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold: whole numbers in JSON have any length."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_text(text: str, where: str, *, max_bytes: int) -> int:
    if not text.strip():
        raise InvalidRequest(f"{where}: empty", hint="send some text")
    if (at := text.find("\x00")) >= 0:
        raise InvalidRequest(f"{where}: NUL character at position {at}", hint="send text, not binary data")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where}: lone surrogate at position {error.start}", hint="send valid Unicode text, not binary data"
        ) from error
    if size > max_bytes:
        raise InvalidRequest(
            f"{where}: {size:,} bytes of text, {max(max_bytes, 0):,} are left of what one request may hold",
            hint="send less text, or raise HHH_ROUTER_MAX_BODY_BYTES",
        )
    return size


def _check_roles(roles: Sequence[str], where: str) -> None:
    shown = " → ".join(roles[:_SHOWN_ROLES])
    for i, role in enumerate(roles):
        before = roles[i - 1] if i else None
        if role not in ROLES:
            raise InvalidRequest(f"{where}[{i}].role: found {role!r}", hint=f"use one of {', '.join(ROLES)}")
        if role == "system" and i:
            raise InvalidRequest(
                f"{where}[{i}].role: system after {before} ({shown})", hint="put the system message first"
            )
        if role == "assistant" and before in (None, "system", "assistant"):
            raise InvalidRequest(
                f"{where}[{i}].role: assistant {f'after {before}' if before else 'as the first message'} ({shown})",
                hint="an assistant message answers a user or tool message",
            )
        if role == "tool" and before not in ("assistant", "tool"):
            raise InvalidRequest(
                f"{where}[{i}].role: tool {f'after {before}' if before else 'as the first message'} ({shown})",
                hint="a tool message follows the assistant message that called the tool",
            )
    if roles[-1] not in ("user", "tool"):
        raise InvalidRequest(
            f"{where}[{len(roles) - 1}].role: the last message is from {roles[-1]} ({shown})",
            hint="end with a user message (or a tool result)",
        )
