"""The SDK against a running server: stands where a `Pipeline` stands, with the same types and errors and no torch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import httpx
from pydantic import ValidationError

from hhh_router.errors import (
    BackendError,
    BackendTimeout,
    HHHRouterError,
    InvalidRequest,
    KeyRejected,
    Overloaded,
    SettingsError,
    Unavailable,
    UpstreamError,
)
from hhh_router.interfaces.parse import parse_calls
from hhh_router.pipeline import (
    ChatDelta,
    ChatEvent,
    ChatFinished,
    ChatStarted,
    FeedbackResult,
    GuardResult,
    RouteResult,
    TokenLogprob,
    Usage,
)
from hhh_router.settings import Settings
from hhh_router.tools import as_openai, call_as_openai
from hhh_router.trace.block import Metadata
from hhh_router.trace.feedback import Label
from hhh_router.types import ChatRequest, GuardRequest, Message, ToolCall, Toolset

RETRIES = 2
"""Further tries of a call that could not be made, or that the server turned away for now."""
LONGEST_PAUSE_S = 30.0
"""A server that asks to be left alone for longer is not asked again."""
_FIRST_PAUSE_S = 0.5
_CONNECT_S = 10.0
_DAY_S = 86_400.0
_AGAIN = (429, 503)


class RemotePipeline:
    """Answers by asking a server that `hhh-router serve` started.

    Args:
        base_url: Of the server, with or without ``/v1``.
        policy: Of calls that name none; None leaves it to the server.
        settings: The key (``api_key``) and the deadline of one request.
        retries: Further tries where a call was not begun.
        transport: Of httpx, for tests.

    Raises:
        SettingsError: ``base_url`` is no http address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        policy: str | None,
        settings: Settings,
        retries: int = RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise SettingsError(f"base_url {base_url[:200]!r} is no http address", hint="use http://host:port")
        self.settings = settings
        self.policies = _NoFiles()
        self._policy, self._retries = policy, retries
        key = settings.api_key
        if key is not None and not (key.get_secret_value().isascii() and key.get_secret_value().isprintable()):
            raise SettingsError(
                "api_key: it has characters that no header can carry", hint="give the key as it was made"
            )
        self._client = httpx.AsyncClient(
            base_url=base_url.rstrip("/").removesuffix("/v1") + "/v1/",
            headers={} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"},
            timeout=httpx.Timeout(settings.request_timeout_s, connect=_CONNECT_S),
            transport=transport,
        )

    async def chat(self, request: ChatRequest, *, stream: bool = True) -> AsyncGenerator[ChatEvent, None]:
        """As `Pipeline.chat`; closing the iterator closes the connection, which cancels the server's work."""
        body = _chat_body(request, request.policy or self._policy, stream=stream)
        async with self._sent("chat/completions", body, _deadline(request.timeout_s)) as response:
            if stream:
                async for event in _streamed(response, request):
                    yield event
                return
            found = _json(await response.aread())
        for event in _whole(found, request):
            yield event

    async def guard(self, requests: Sequence[GuardRequest]) -> list[GuardResult]:
        """As `Pipeline.guard`."""
        return [GuardResult(metadata=m) for m in await self._judged("guard", requests)]

    async def route(self, requests: Sequence[GuardRequest]) -> list[RouteResult]:
        """As `Pipeline.route`."""
        return [RouteResult(metadata=m) for m in await self._judged("route", requests)]

    async def feedback(self, label: Label, *, key: str = "") -> FeedbackResult:
        """As `Pipeline.feedback`; the key is the one of the settings."""
        body: dict[str, Any] = {"request_id": label.request_id, "labels": dict(label.labels), "by": label.by}
        if label.probability is not None:
            body |= {"sampled": True, "probability": label.probability}
        async with self._sent("feedback", body) as response:
            found = _json(await response.aread())
        try:
            told = {name: found[name] for name in ("request_id", "by", "labels", "status", "durable")}
        except KeyError as error:
            raise _foreign(error) from error
        return FeedbackResult(**told)

    async def drift(self) -> Mapping[str, Any]:
        """The reply of ``GET /v1/drift``."""
        async with self._sent("drift", None) as response:
            found = _json(await response.aread())
        if not isinstance(found.get("figures"), list):
            raise BackendError("the server's answer tells no figures", hint="is it hhh-router?")
        return found

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _judged(self, kind: str, requests: Sequence[GuardRequest]) -> list[Metadata]:
        if not requests:
            return []
        items = [_item(r, r.policy or self._policy, response=kind == "guard") for r in requests]
        async with self._sent(kind, {"items": items}) as response:
            found = _json(await response.aread())
        data = found.get("data")
        if not isinstance(data, list) or len(data) != len(requests):
            raise BackendError("the server's answer is no list of as many results", hint="is it hhh-router?")
        return [_metadata(row, request.not_inspected) for row, request in zip(data, requests, strict=True)]

    @asynccontextmanager
    async def _sent(
        self, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[httpx.Response, None]:
        """A reply whose status is good and whose body is still to be read.

        Raises:
            HHHRouterError: What the server says is wrong.
            BackendTimeout: It was silent for ``settings.request_timeout_s``.
            BackendError: There is no server, or the connection broke.
        """
        method = "GET" if body is None else "POST"
        for tried in range(self._retries + 1):
            try:
                async with self._client.stream(method, path, json=body, headers=headers) as response:
                    if response.is_success:
                        yield response
                        return
                    error = _error(await response.aread(), response)
                pause = _pause(response, tried)
            except httpx.ConnectError as broken:
                error = BackendError(
                    f"no server answers at {self._client.base_url} ({broken})", hint="start it: hhh-router serve"
                )
                pause = _FIRST_PAUSE_S * 2**tried
            except httpx.TimeoutException as silent:
                raise BackendTimeout(
                    f"the server was silent for {self.settings.request_timeout_s:g} s",
                    hint="ask for less, or raise HHH_ROUTER_REQUEST_TIMEOUT_S",
                ) from silent
            except httpx.HTTPError as broken:
                raise BackendError(f"the connection to the server broke ({broken})", hint="try again") from broken
            if pause is None or tried == self._retries:
                raise error
            await asyncio.sleep(pause)


class _NoFiles:
    """A server has policies of its own, and takes none from callers."""

    def add_file(self, path: object) -> NoReturn:
        """Refuse.

        Raises:
            InvalidRequest: Always.
        """
        raise InvalidRequest(
            f"policy {str(path)[:200]!r}: a file cannot be sent to a server", hint="name one of the server's policies"
        )


# -- what is asked ----------------------------------------------------------------------------------------------------


def _deadline(timeout_s: float | None) -> dict[str, str]:
    """How long the caller waits, for the server to know; whatever is longer than a day is no deadline."""
    return (
        {} if timeout_s is None or timeout_s > _DAY_S else {"x-request-timeout-ms": str(max(1, int(timeout_s * 1000)))}
    )


def _chat_body(request: ChatRequest, policy: str | None, *, stream: bool) -> dict[str, Any]:
    sampling = request.sampling
    ours: dict[str, Any] = {}
    if policy is not None:
        ours["policy"] = policy
    if request.weights is not None:
        ours["weights"] = request.weights.as_dict()
    body: dict[str, Any] = {
        "model": "hhh-auto",
        "messages": _turns(request.messages),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "hhh": ours,
    }
    if request.tools is not None:
        body |= _tools(request.tools)
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    if sampling.json_schema is not None:
        named = {"name": "reply", "schema": json.loads(sampling.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _tools(use: Toolset) -> dict[str, Any]:
    tools = [as_openai(tool) for tool in use.tools]
    for told, tool in zip(tools, use.tools, strict=True):
        told["function"]["strict"] = tool.strict
    mode = "required" if use.required else "auto"
    choice: object = mode
    if use.only:
        named = [{"type": "function", "function": {"name": name}} for name in use.only]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": use.parallel}


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    turns = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [call_as_openai(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        turns.append(turn)
    return turns


def _item(request: GuardRequest, policy: str | None, *, response: bool) -> dict[str, Any]:
    read, item = request.read, dict[str, Any]()
    if read.messages:
        item["prompt"] = _turns(read.messages)
    if response and read.response is not None:
        item["response"] = read.response
    return item if policy is None else item | {"policy": policy}


# -- what is answered -------------------------------------------------------------------------------------------------


def _whole(body: Mapping[str, Any], request: ChatRequest) -> Iterator[ChatEvent]:
    try:
        [choice], metadata = body["choices"], _metadata(body, request.not_inspected)
        message, told = choice["message"], _logprobs(choice.get("logprobs"))
        text, refusal = message["content"] or "", message.get("refusal")
        calls = parse_calls(message.get("tool_calls"), "tool_calls")
        usage, reason = _usage(body["usage"]), choice["finish_reason"]
    except (KeyError, TypeError, ValueError, InvalidRequest) as error:
        raise _foreign(error) from error
    yield ChatStarted(metadata=metadata)
    if text or calls:
        yield ChatDelta(text=text, is_refusal=refusal == text and bool(text), logprobs=told or (), tool_calls=calls)
    yield ChatFinished(
        text=text, finish_reason=reason, usage=usage, metadata=metadata, refusal=refusal, logprobs=told,
        tool_calls=calls,
    )  # fmt: skip


async def _streamed(response: httpx.Response, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
    texts: list[str] = []
    tokens: list[TokenLogprob] = []
    calls: list[ToolCall] = []
    metadata: Metadata | None = None
    refusal = reason = usage = None
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue  # blank lines between events, and comments that keep the connection open
        data = line[5:].strip()
        if data == "[DONE]":
            break
        chunk = _json(data.encode())
        if "error" in chunk:
            raise _told_error(chunk["error"], None)
        try:
            if "hhh" in chunk:
                begun, metadata = metadata is not None, _metadata(chunk, request.not_inspected)
                if not begun:
                    yield ChatStarted(metadata=metadata)
            if chunk.get("usage"):
                usage = _usage(chunk["usage"])
            for choice in chunk["choices"]:
                reason = choice.get("finish_reason") or reason
                delta = choice.get("delta") or {}
                found = parse_calls(delta.get("tool_calls"), "tool_calls")
                calls += found
                text = delta.get("content") or ""
                if text or found:
                    refusal = delta.get("refusal") or refusal
                    told = _logprobs(choice.get("logprobs")) or ()
                    texts.append(text)
                    tokens += told
                    yield ChatDelta(text=text, is_refusal="refusal" in delta, logprobs=told, tool_calls=found)
        except (KeyError, TypeError, ValueError, InvalidRequest) as error:
            raise _foreign(error) from error
    else:
        raise BackendError("the server's stream broke off", hint="try again; the server's log may say why")
    if metadata is None or reason is None or usage is None:
        raise _foreign(ValueError("a stream without a block, an end or a usage"))
    asked = request.sampling.top_logprobs is not None and (bool(tokens) or refusal is None)
    yield ChatFinished(
        text="".join(texts), finish_reason=reason, usage=usage, metadata=metadata, refusal=refusal,
        logprobs=tuple(tokens) if asked else None, tool_calls=tuple(calls),
    )  # fmt: skip


def _metadata(body: object, unread: Sequence[str]) -> Metadata:
    """The reply's block, with what this side has already left unread."""
    block = body.get("hhh") if isinstance(body, Mapping) else None
    try:
        found = Metadata.model_validate(block)
    except ValidationError as error:
        raise _foreign(error) from error
    return found.model_copy(update={"not_inspected": [*unread, *found.not_inspected]}) if unread else found


def _logprobs(told: Any) -> tuple[TokenLogprob, ...] | None:
    return None if told is None else tuple(_token(t) for t in told["content"])


def _token(told: Mapping[str, Any]) -> TokenLogprob:
    spelt = told.get("bytes")
    return TokenLogprob(
        token=told["token"],
        logprob=told["logprob"],
        bytes=None if spelt is None else tuple(spelt),
        top_logprobs=tuple(_token(t) for t in told.get("top_logprobs", ())),
    )


def _usage(told: Mapping[str, Any]) -> Usage:
    return Usage(prompt_tokens=told["prompt_tokens"], completion_tokens=told["completion_tokens"])


def _json(raw: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise _foreign(error) from error
    if not isinstance(found, Mapping):
        raise _foreign(ValueError("no object"))
    return found


def _foreign(error: Exception) -> BackendError:
    said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return BackendError(f"the server's answer cannot be understood ({said})", hint="is it hhh-router, as new as this?")


# -- what went wrong --------------------------------------------------------------------------------------------------


def _error(raw: bytes, response: httpx.Response) -> HHHRouterError:
    try:
        told = json.loads(raw)["error"]
    except (ValueError, KeyError, TypeError):
        told = {"message": f"HTTP {response.status_code} without a reason"}
    return _told_error(told, response)


def _told_error(told: object, response: httpx.Response | None) -> HHHRouterError:
    """The error of this package that the server raised, by its code; by the status where the code is not known."""
    fields = told if isinstance(told, Mapping) else {}
    message, code = str(fields.get("message") or "the server failed"), fields.get("code")
    status = response.status_code if response is not None else 500
    if status == 401:
        return KeyRejected(message, hint="give api_key=…, or set HHH_ROUTER_API_KEY")
    kind = _by_code().get(str(code))
    if kind is UpstreamError:
        return UpstreamError(message, status=status if status < 500 else None)
    if kind is not None and issubclass(kind, Overloaded | Unavailable):
        return kind(message, retry_after_s=None if response is None else _retry_after(response))
    if kind is not None:
        return kind(message)
    return InvalidRequest(message) if 400 <= status < 500 else BackendError(message)


def _by_code() -> dict[str, type[HHHRouterError]]:
    """Error classes that take a message alone, by code; the class that gives a code its name comes first."""
    found: dict[str, type[HHHRouterError]] = {}
    left: list[type[HHHRouterError]] = [HHHRouterError]
    while left:
        kind = left.pop(0)
        left += kind.__subclasses__()
        if kind.__name__ not in ("Blocked", "MissingExtra", "HHHRouterError"):
            found.setdefault(kind.code, kind)
    return found


def _retry_after(response: httpx.Response) -> float | None:
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return float(response.headers[name]) * unit
        except (KeyError, ValueError):
            continue
    return None


def _pause(response: httpx.Response, tried: int) -> float | None:
    """Seconds until the next try; None where there should be none."""
    if response.status_code not in _AGAIN or response.headers.get("x-should-retry") == "false":
        return None
    asked = _retry_after(response)
    wait = _FIRST_PAUSE_S * 2**tried if asked is None else asked
    return wait if wait <= LONGEST_PAUSE_S else None
