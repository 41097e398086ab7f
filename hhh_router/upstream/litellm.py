"""Somebody else's model through LiteLLM: one request in a wire's own words, its answer in the same wire's."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import httpx

from hhh_router.errors import BackendError, BackendTimeout, NotReached, SettingsError, UpstreamError

Kind = Literal["chat", "completions", "responses", "messages", "embeddings"]
Body = Mapping[str, Any]
Piece = Mapping[str, Any] | bytes
"""One event of a stream as an object, or frames of events as they are sent."""

_log = logging.getLogger(__name__)

_LOGGERS = ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy")
_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else importing it asks the network for prices
    "LITELLM_MODE": "PRODUCTION",  # else importing it reads a .env of the working folder into the environment
}
_CODES = (
    ("ContextWindowExceededError", "context_length_exceeded"),
    ("ContentPolicyViolationError", "content_policy_violation"),
    ("UnsupportedParamsError", "unsupported_parameter"),
)
"""LiteLLM's class → the code that OpenAI's clients know; the first that matches."""
_SHOWN = 1000  # characters of a provider's own words
_SLACK_S = 5.0
"""LiteLLM's own deadline lies behind ours, which tells what was too slow."""
_NAMED = re.compile(r"^(?:litellm\.)?[A-Z]\w*(?:Error|Exception|Timeout): ")
_ADVICE = ("\nTraceback", "To drop these,", "Handle with `litellm", " Original exception:")
"""Begin what LiteLLM appends for whoever calls it in Python."""
_NO_ROUTER = {"litellm_router": object()}
"""Without one, LiteLLM looks for its proxy's, and imports all of that within the first request, for seconds."""
_NOT_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, ConnectionRefusedError)
_BROKEN = (httpx.TransportError, OSError)
_OWN = (TypeError, AttributeError, LookupError)
"""Where an error begins that LiteLLM makes itself, of a request or an answer that is not built as it expects."""
_COARSE = (400, 500)
"""LiteLLM's own statuses for what a provider may have told more exactly."""


class LiteLLM:
    """One model of LiteLLM's, with the deployment's own key.

    Args:
        model: As LiteLLM names it, ``provider/model``.
        api_key: Sent to the provider; None takes what LiteLLM finds in the environment.
        api_base: Where the provider is; None takes LiteLLM's own address of it.
        drop_params: Leave out what the provider does not take, in place of an error.

    Raises:
        ImportError: LiteLLM is not installed.
        SettingsError: It knows no such provider.
    """

    def __init__(
        self, model: str, *, api_key: str | None = None, api_base: str | None = None, drop_params: bool = False
    ) -> None:
        self._litellm = _load()
        self._model = model
        self._api_key = api_key
        self._api_base = api_base
        self._drop_params = drop_params
        self._provider = self._find_provider()
        self._warn_of_keys()

    @property
    def keeps_responses(self) -> bool:
        """Whether the provider has the wire of responses itself, and so may remember one."""
        from litellm.utils import ProviderConfigManager

        try:
            return (
                ProviderConfigManager.get_provider_responses_api_config(
                    model=self._model.partition("/")[2], provider=self._litellm.LlmProviders(self._provider)
                )
                is not None
            )
        except ValueError:
            return False

    async def call(self, kind: Kind, body: Body, *, timeout_s: float) -> Body | AsyncGenerator[Piece, None]:
        """Ask the model.

        Args:
            kind: The wire that ``body`` is written in.
            body: Fields of that wire alone: whatever else is in it would reach LiteLLM as an option of its own.
            timeout_s: LiteLLM's deadline.

        Returns:
            The answer in the same wire, or its events where ``stream`` is set; close them if they are not read to the
            end.

        Raises:
            NotReached, BackendTimeout: There was no answer.
            UpstreamError: There was an error; ``status`` and ``retry_after`` are those that the caller should be told.
        """
        try:
            found = await self._functions()[kind](
                **body,
                **(_NO_ROUTER if kind == "messages" else {}),
                model=self._model,
                api_key=self._api_key,
                api_base=self._api_base,
                timeout=timeout_s + _SLACK_S,
                drop_params=self._drop_params,
                max_retries=0,  # whether to ask again is decided where all upstreams are known
                num_retries=0,
            )
        except Exception as error:  # a library of hundreds of providers: what it raises has no common class
            raise self._told(error) from error
        return self._events(found) if body.get("stream") else as_object(found)

    async def _events(self, stream: Any) -> AsyncGenerator[Piece, None]:
        try:
            async for event in stream:
                yield self._without_key(event) if isinstance(event, bytes) else as_object(event)
        except Exception as error:
            raise self._told(error) from error
        finally:
            await _closed(stream)

    async def aclose(self) -> None:
        """Close the connections, which all models share."""
        with suppress(Exception):  # it is the process's end; LiteLLM's own list may hold closed ones
            await self._litellm.close_litellm_async_clients()

    def _functions(self) -> Mapping[Kind, Callable[..., Awaitable[Any]]]:
        ours = self._litellm
        return {
            "chat": ours.acompletion,
            "completions": ours.atext_completion,
            "responses": ours.aresponses,
            "messages": ours.anthropic.messages.acreate,
            "embeddings": ours.aembedding,
        }

    def _find_provider(self) -> str:
        try:
            _, provider, _, _ = self._litellm.get_llm_provider(self._model, api_base=self._api_base)
        except self._litellm.BadRequestError as error:
            raise SettingsError(
                f"LiteLLM knows no provider of {self._model!r}",
                hint="name it as provider/model, such as gemini/gemini-2.5-flash; see docs.litellm.ai/docs/providers",
            ) from error
        return str(provider)

    def _warn_of_keys(self) -> None:
        """A guess of LiteLLM's: clouds have ways to log in that it does not count."""
        if self._api_key is not None:
            return
        with suppress(Exception):
            missing = self._litellm.validate_environment(self._model).get("missing_keys")
            if missing:
                _log.warning("%s: LiteLLM misses %s in the environment", self._model, ", ".join(missing))

    def _told(self, error: Exception) -> BackendError:
        """What went wrong, in the words of our own tree.

        What LiteLLM or the provider says is in the hint, which is told to the caller and never logged: it may quote the
        prompt. No key is in it.
        """
        name, causes = self._model, _causes(error)
        if any(isinstance(e, _NOT_CONNECTED) for e in causes):
            return NotReached(f"upstream {name} cannot be reached", hint="check api_base and the network")
        if isinstance(error, self._litellm.Timeout | TimeoutError):
            return BackendTimeout(f"upstream {name} did not answer in time", hint="try again later")
        if (broken := next((e for e in causes if isinstance(e, _BROKEN)), None)) is not None:
            return UpstreamError(f"upstream {name} broke off ({type(broken).__name__})", hint="try again")
        status, words = _status(causes), self._words(error)
        is_garbage = any(isinstance(e, json.JSONDecodeError) for e in causes)
        if is_garbage or (status is not None and not 400 <= status < 600):
            return UpstreamError(f"upstream {name} sent an answer that LiteLLM cannot read")
        if status is None or isinstance(error, self._litellm.APIConnectionError) or isinstance(causes[-1], _OWN):
            found = UpstreamError(f"LiteLLM cannot translate for {name} ({type(causes[-1]).__name__})", status=422)
            found.code, found.hint = "cannot_be_translated", f"LiteLLM cannot translate this: {words}"
            return found
        found = UpstreamError(f"upstream {name} answered {status}", status=status, hint=words)
        found.retry_after = _retry_after(error)
        codes = (code for kind, code in _CODES if isinstance(error, getattr(self._litellm, kind)))
        found.code = next(codes, found.code)
        return found

    def _without_key(self, frames: bytes) -> bytes:
        """Frames of events. LiteLLM makes those of errors itself, of whatever text it has."""
        if not self._api_key or b"event: error" not in frames:
            return frames
        return frames.replace(self._api_key.encode(), b"[key]")

    def _words(self, error: Exception) -> str:
        """The provider's own, if they can be found in LiteLLM's."""
        if isinstance(error, self._litellm.UnsupportedParamsError):
            return f"{_plain(error)} Leave them out, or set drop_params for this upstream."
        text = provider_words(_plain(error))
        if self._api_key:
            text = text.replace(self._api_key, "[key]")
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def as_object(found: Any) -> Body:
    """An answer or an event as JSON has it, without fields that nobody set."""
    if isinstance(found, Mapping):
        return found
    dumped = found.model_dump(mode="json", exclude_none=True)
    return dumped if isinstance(dumped, dict) else {}


def provider_words(text: str) -> str:
    """The message of a provider's error body within LiteLLM's words about it.

    >>> provider_words('AnthropicException - b\\'{"error": {"type": "x", "message": "slow down"}}\\'')
    'slow down'
    >>> provider_words("no JSON {here}")
    'no JSON {here}'
    """
    begin, end = text.find("{"), text.rfind("}")
    with suppress(ValueError, RecursionError):
        body = json.loads(text[begin : end + 1])
        error = body.get("error", body) if isinstance(body, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str) and message:
            return message
    return text


def _plain(error: Exception) -> str:
    text = str(error)
    for mark in _ADVICE:
        text = text.partition(mark)[0]
    while (shorter := _NAMED.sub("", text)) != text:
        text = shorter
    return text.strip()


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _status(causes: Sequence[BaseException]) -> int | None:
    """LiteLLM's status of an error, or the provider's own beneath it."""
    statuses = [s for e in causes if isinstance(s := getattr(e, "status_code", None), int) and 400 <= s < 600]
    if not statuses:
        return getattr(causes[0], "status_code", None)
    return statuses[-1] if statuses[0] in _COARSE else statuses[0]


def _retry_after(error: Exception) -> str | None:
    """LiteLLM keeps a provider's headers apart, and makes up an answer without any."""
    for headers in (
        getattr(error, "litellm_response_headers", None),
        getattr(getattr(error, "response", None), "headers", None),
    ):
        given = headers.get("retry-after") if headers is not None else None
        if isinstance(given, str) and given.isascii() and given.isprintable():
            return given
    return None


async def _closed(stream: Any) -> None:
    """Hang up on the provider. LiteLLM's streams are of many kinds, some of which only wrap one that can be closed."""
    for _ in range(4):  # levels of wrapping
        if (close := getattr(stream, "aclose", None)) is not None:
            with suppress(Exception):  # an end that fails is an end
                await asyncio.shield(asyncio.ensure_future(close()))
            return
        inner = ("litellm_custom_stream_wrapper", "completion_stream", "response")
        stream = next((s for name in inner if (s := getattr(stream, name, None)) is not None), None)


def _load() -> Any:
    """LiteLLM, as a part of a server wants it: nothing sent home, nothing printed, no prompt in a log."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True  # it prints advice to stdout at every error
    litellm.turn_off_message_logging = True
    litellm.disable_hf_tokenizer_download = True  # else it fetches one to count what a provider did not, and blocks
    if "LITELLM_LOG" not in os.environ:  # its errors come back as exceptions; what it logs beside may quote requests
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm
