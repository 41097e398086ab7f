"""LiteLLM's generic guardrail API: ``POST /beta/litellm_basic_guardrail_api``.

LiteLLM's proxy asks before the model's call (``input_type: request``) and after it (``response``), with one
``litellm_call_id`` for both. The second question carries no prompt, so the first one's is remembered for a while: then
prompt and reply are read together, as everywhere else. What is let through can be rewritten (`Wishes.redact`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import inner, kind_of, parse_calls, parse_messages
from hhh_router.interfaces.server.http import JsonReply, read_json, until_client_leaves
from hhh_router.interfaces.server.keys import called, check_policies, owner
from hhh_router.pipeline import GuardResult, Pipeline
from hhh_router.pipeline.kept import Kept
from hhh_router.pipeline.validate import check_messages
from hhh_router.tools import as_text, calls_as_text
from hhh_router.trace import redact_text
from hhh_router.types import GuardRequest, Message, ReadRequest

PATH = "/beta/litellm_basic_guardrail_api"
MOST_CALLS = 4096
"""Prompts that are remembered until their reply is asked about, the oldest dropped first."""
LONGEST_S = 600.0
"""A prompt is forgotten after so long."""
_UNREAD = ("images", "tools")
REDACTABLE = ("secrets", "emails")
MOST_HELD = 100_000
LONGEST_TENANT = 256
_LAST_LINE = 512  # what tells a secret from other text stands in one line, and within so many characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """``additional_provider_specific_params``, from LiteLLM's configuration or from a caller's ``extra_body``."""

    policy: str | None = None
    """Name of the policy; None takes the deployment's default."""
    redact: tuple[str, ...] = ()
    """What is replaced in texts that are let through, of ``secrets`` and ``emails``."""
    hold_chars: int = 0
    """Characters at the end of a streamed reply that LiteLLM is asked to keep until more of it has been read."""


class Prompts(Kept[str, tuple[Message, ...]]):
    """Prompts of calls under way, by LiteLLM's id. They stay: a stream is asked about repeatedly."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(most=MOST_CALLS, longest_s=LONGEST_S, clock=clock)

    def find(self, key: str) -> tuple[Message, ...]:
        """The prompt of a call; empty where it is not known any more."""
        return super().find(key) or ()


async def guardrail(request: Request, pipeline: Pipeline, prompts: Prompts) -> Response:
    """``{input_type, texts, structured_messages?, litellm_call_id?, …}`` → ``{action, blocked_reason?}``.

    A request whose texts are all empty has nothing that could be read, and passes.
    """
    body = await read_json(request, max_bytes=pipeline.settings.max_body_bytes)
    phase, call = body.get("input_type"), body.get("litellm_call_id")
    if phase not in ("request", "response"):
        raise InvalidRequest(f"input_type: found {str(phase)[:40]!r}", hint="use 'request' or 'response'")
    texts, wishes = _texts(body.get("texts")), _wishes(body)
    rows = body.get("structured_messages")
    if rows is not None and not isinstance(rows, list):
        raise InvalidRequest(f"structured_messages: found {kind_of(rows)}", hint="send a list of messages")
    if call is not None and not isinstance(call, str):
        raise InvalidRequest(f"litellm_call_id: found {kind_of(call)}", hint="send the id of the call as text")
    limit = pipeline.settings.max_body_bytes
    unread = tuple(name for name in _UNREAD if body.get(name))
    if phase == "request":
        messages, more = _prompt(rows or (), texts, limit)
        unread += more
        if body.get("tool_calls") and not rows:
            unread += ("tool_calls",)
        if call is not None and messages:
            prompts.keep(f"{owner(request)}/{call}", messages)
        read = ReadRequest(messages=messages)
    else:
        reply = _reply(texts, body.get("tool_calls"))
        read = (
            ReadRequest(messages=prompts.find(f"{owner(request)}/{call}"), response=reply)
            if reply.strip()
            else ReadRequest()
        )
    if not read.messages and read.response is None:
        return JsonReply({"action": "NONE"})
    asked = GuardRequest(read=read, policy=wishes.policy, not_inspected=unread)
    check_policies(request, pipeline, [asked])
    [asked] = called(request, [asked])
    if (tenant := _tenant(body, pipeline.settings.guardrail_tenant)) is not None:
        asked = replace(asked, caller=replace(asked.caller, tenant=tenant))
    [result] = await until_client_leaves(request.receive, pipeline.guard([asked]))
    told = _told(result) or _let_through(texts, wishes, streams=phase == "response")
    return JsonReply({**told, "hhh": result.metadata.as_json()}, headers=result.metadata.headers())


def _tenant(body: Mapping[str, Any], field: str) -> str | None:
    """Whose traffic it is, in LiteLLM's words about its caller; None where that is not asked for, or not known.

    Raises:
        InvalidRequest: It is no name.
    """
    if field == "key":
        return None
    name = "user_api_key_alias" if field == "key_alias" else f"user_api_key_{field}"
    given = inner(body, "request_data", f'{{"{name}": "…"}}').get(name)
    if given is None or given == "":
        return None
    if not isinstance(given, str) or len(given) > LONGEST_TENANT:
        raise InvalidRequest(f"request_data.{name}: no name", hint=f"send text of at most {LONGEST_TENANT} characters")
    return given


def _told(result: GuardResult) -> dict[str, Any]:
    """LiteLLM reads the action and the reason alone; the reason becomes the whole of its client's error message."""
    return {} if result.message is None else {"action": "BLOCKED", "blocked_reason": result.message}


def _let_through(texts: Sequence[str], wishes: Wishes, *, streams: bool) -> dict[str, Any]:
    """The texts as they may go on, and how much of each has to wait for more of the stream."""
    told: dict[str, Any] = {"action": "NONE"}
    if wishes.redact:
        rewritten = [_redacted(t, wishes) for t in texts]
        if rewritten != texts:
            told = {"action": "GUARDRAIL_INTERVENED", "texts": rewritten}
        texts = rewritten
    if streams and (wishes.redact or wishes.hold_chars):
        told["stream_holdback_chars"] = [held_chars(t, wishes) for t in texts]
    return told


def _redacted(text: str, wishes: Wishes) -> str:
    return redact_text(text, emails="emails" in wishes.redact)


def held_chars(text: str, wishes: Wishes) -> int:
    """Characters at the end of a stream so far that more of it may turn into a secret, or that are to wait.

    >>> held_chars("done.\\nMy key is sk-aaaa", Wishes(redact=("secrets",)))
    17
    >>> held_chars("a b c d", Wishes(hold_chars=3))
    3
    """
    held = wishes.hold_chars
    if wishes.redact and text:
        line = len(text) - (text.rfind("\n") + 1)
        last_word = text.rsplit(maxsplit=1)[-1:]
        word = len(text) - len(text.rstrip()) + sum(map(len, last_word))
        held = max(held, word, min(line, _LAST_LINE))
    return min(held, len(text))


def _wishes(body: Mapping[str, Any]) -> Wishes:
    """
    Raises:
        InvalidRequest: A wish is not built as it should be.
    """
    where = "additional_provider_specific_params"
    given = inner(body, where, '{"policy": "balanced"}')
    policy, redact, hold = given.get("policy"), given.get("redact") or (), given.get("hold_chars") or 0
    if policy is not None and not isinstance(policy, str):
        raise InvalidRequest(f"{where}.policy: no string", hint="send a policy's name")
    if not isinstance(redact, list | tuple) or not all(r in REDACTABLE for r in redact):
        raise InvalidRequest(f"{where}.redact: no list of {' and '.join(REDACTABLE)}", hint='send ["secrets"]')
    if type(hold) is not int or not 0 <= hold <= MOST_HELD:
        raise InvalidRequest(f"{where}.hold_chars: no count", hint=f"send 0 to {MOST_HELD:,} characters")
    return Wishes(policy=policy, redact=tuple(redact), hold_chars=hold)


def _texts(given: object) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not all(isinstance(t, str) for t in given):
        raise InvalidRequest(f"texts: found {kind_of(given)}", hint="send a list of texts")
    return list(given)


def _reply(texts: Sequence[str], calls: object) -> str:
    """What a model said and what it wants called, as it is read everywhere else; calls of another form as they came."""
    try:
        told = calls_as_text(parse_calls(calls, "tool_calls"))
    except InvalidRequest:
        told = json.dumps(calls, ensure_ascii=False)
    return "\n".join(filter(None, (*texts, told)))


def _prompt(rows: Sequence[Any], texts: Sequence[str], max_bytes: int) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation with its roles, or the texts where it comes without; one turn where its order is no model's."""
    if rows:
        messages, unread = parse_messages(rows, where="structured_messages", any_calls=True)
        messages = tuple(m for m in as_text(messages, ()) if m.content.strip())
    else:
        messages, unread = tuple(Message(role="user", content=t) for t in texts if t.strip()), ()
    try:
        if messages:
            check_messages(messages, max_bytes=max_bytes, where="structured_messages")
    except InvalidRequest:
        together = "\n".join(f"{m.role}: {m.content}" for m in messages)
        messages = (Message(role="user", content=together),)
    return messages, unread
