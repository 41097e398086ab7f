"""Asks a guard that runs elsewhere what it makes of texts, in this project's own wire or in OpenAI's for moderation."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from hhh_router.errors import BackendTimeout, SettingsError, UpstreamError
from hhh_router.tools import as_text
from hhh_router.types import Action, ReadRequest

Wire = Literal["native", "moderations"]
"""``native``: this project's ``/v1/guard``. ``moderations``: OpenAI's ``/v1/moderations``."""
WIRES: tuple[str, ...] = get_args(Wire)
BATCH_ITEMS = 16  # a server reads the items of one call together; more would only make its answer late
TRIES = 4
LONGEST_PAUSE_S = 30.0
MAX_ANSWER_BYTES = 16_000_000  # an answer to a batch is some 50 kB
CONNECT_TIMEOUT_S = 10.0
_PATHS: Mapping[Wire, str] = {"native": "/v1/guard", "moderations": "/v1/moderations"}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_REFUSALS = (400, 413, 422)  # this text cannot be judged; the next one may
_BUSY = (429, 502, 503, 504)
_SHOWN = 200  # characters of a server's own words in a hint

Progress = Callable[[int, int], None]
"""Told how many texts are done, of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a guard said of one text."""

    needs: Mapping[str, float] = field(default_factory=dict)
    """P(need) as it stated them, each in [0, 1]; empty where it stated none."""
    outcomes: Mapping[str, float] = field(default_factory=dict)
    """P(outcome), likewise."""
    stopped: bool
    """Its verdict: on the response where there is one, else on the prompt."""
    about: str
    """What judged: policy and bundle, or model."""


def guard_endpoint(url: str, wire: Wire) -> tuple[str, Wire]:
    """Where to send texts, and in which wire; a URL that ends in an endpoint's path says both itself.

    >>> guard_endpoint("http://127.0.0.1:8000", "native")
    ('http://127.0.0.1:8000/v1/guard', 'native')
    >>> guard_endpoint("https://example.org/v1/moderations/", "native")
    ('https://example.org/v1/moderations', 'moderations')

    Raises:
        SettingsError: No http(s) URL, or one that holds more than a place, such as a password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SettingsError("url: is no URL", hint="write url:http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError("url: is no http(s) URL", hint="write url:http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SettingsError(
            f"the URL of {parts.hostname} holds more than a place (a password, a query or a fragment)",
            hint="it would be written into the report; name the variable that holds the key with --api-key-env",
        )
    path = parts.path.rstrip("/")
    for known, end in _PATHS.items():
        if path.endswith(end):
            return f"{parts.scheme}://{parts.netloc}{path}", known
    return f"{parts.scheme}://{parts.netloc}{path.removesuffix('/v1')}{_PATHS[wire]}", wire


class GuardClient:
    """Sends texts in batches, several at a time, and repeats what a busy server turned away.

    Args:
        endpoint: From `guard_endpoint`.
        wire: Its wire.
        api_key: Sent as ``Authorization: Bearer``.
        timeout_s: Longest time for the answer to one batch.
        concurrency: Batches under way at a time.
        transport: What carries the requests; the network by default.
        pause: Waits before a repetition, in seconds.
    """

    def __init__(
        self,
        endpoint: str,
        wire: Wire,
        *,
        api_key: SecretStr | None = None,
        timeout_s: float = 120.0,
        concurrency: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._wire = wire
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._transport = transport
        self._pause = pause
        parts = urlsplit(endpoint)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._is_near = parts.hostname in _LOOPBACK

    async def judge(
        self, requests: Sequence[ReadRequest], on_progress: Progress = lambda *_: None
    ) -> list[Judged | None]:
        """Every text's verdict and numbers, in order; None for a text that the server would not judge.

        Raises:
            UpstreamError: Nobody answers, the key is wrong, it is another kind of server, or it failed.
            BackendTimeout: It took too long.
        """
        found: list[Judged | None] = [None] * len(requests)
        batches = iter([range(i, min(i + BATCH_ITEMS, len(requests))) for i in range(0, len(requests), BATCH_ITEMS)])
        done = 0

        async def work(client: httpx.AsyncClient, *, most: int | None = None) -> None:
            nonlocal done
            for batch in batches:
                await self._ask(client, batch, requests, found)
                done += len(batch)
                on_progress(done, len(requests))
                if most is not None:
                    return

        async with self._client() as client:
            await work(client, most=1)  # alone: what is wrong with the server shows here, before it gets everything
            if requests and all(judged is None for judged in found[:BATCH_ITEMS]):
                await self._explain(client, requests[0])
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._concurrency):
                        group.create_task(work(client))
            except BaseExceptionGroup as errors:
                first, *_ = errors.exceptions
                raise first from first.__cause__
        return found

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"accept": "application/json"}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key.get_secret_value()}"
        async with httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s)),
            transport=self._transport,
            follow_redirects=False,  # the key is for this place alone
            trust_env=not self._is_near,  # a proxy of the environment cannot reach this machine
        ) as client:
            yield client

    async def _ask(
        self, client: httpx.AsyncClient, batch: Sequence[int], requests: Sequence[ReadRequest],
        found: list[Judged | None],
    ) -> None:  # fmt: skip
        """Fill in one batch. One text a server refuses fails the whole call, so such a batch is halved."""
        try:
            answers = await self._answers(client, [requests[i] for i in batch])
        except _Refused:
            if len(batch) == 1:
                return
            half = len(batch) // 2
            for part in (batch[:half], batch[half:]):
                await self._ask(client, part, requests, found)
            return
        for i, answer in zip(batch, answers, strict=True):
            found[i] = answer

    async def _explain(self, client: httpx.AsyncClient, request: ReadRequest) -> None:
        """Fail with what the server says of one text, where it refused every text of the first batch."""
        try:
            await self._answers(client, [request])
        except _Refused as refusal:
            raise UpstreamError(
                f"{self._origin} refused each of the first rows with status {refusal.status}",
                status=refusal.status,
                hint=f"it said: {refusal.said or 'nothing'}",
            ) from refusal

    async def _answers(self, client: httpx.AsyncClient, requests: Sequence[ReadRequest]) -> list[Judged]:
        if self._wire == "native":
            body: dict[str, Any] = {"items": [_native_item(r) for r in requests]}
        else:
            texts = [_moderated(r) for r in requests]
            body = {"input": texts if len(texts) > 1 else texts[0]}
        answer = await self._post(client, body)
        try:
            return _read(answer, requests, self._wire)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._stranger("answered in another shape than its wire has") from error

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Any:
        """The server's JSON.

        Raises:
            _Refused: It will not judge these texts.
        """
        for again in range(TRIES - 1, -1, -1):
            status, headers, raw = await self._sent(client, body)
            if status not in _BUSY or not again or headers.get("x-should-retry") == "false":
                break
            await self._pause(_pause_s(headers.get("retry-after"), TRIES - 1 - again))
        if 200 <= status < 300:
            try:
                return json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise self._stranger("answered with something that is no JSON") from error
        said = self._said(raw)
        if status in _REFUSALS:
            raise _Refused(status, said)
        if status in (404, 405):
            raise self._stranger(f"answered {status}", status=status, said=said)
        raise UpstreamError(f"{self._origin} answered {status}", status=status, hint=self._advice(status, said))

    async def _sent(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        content = json.dumps(body).encode()  # ASCII: half a surrogate pair would be no UTF-8
        raw = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                client.stream(
                    "POST", self._endpoint, content=content, headers={"content-type": "application/json"}
                ) as response,
            ):
                async for piece in response.aiter_bytes():
                    raw += piece
                    if len(raw) > MAX_ANSWER_BYTES:
                        raise self._stranger(f"sent more than {MAX_ANSWER_BYTES:,} bytes")
        except (TimeoutError, httpx.TimeoutException) as error:
            raise BackendTimeout(
                f"{self._origin} did not answer within {self._timeout_s:g} s",
                hint="look at the server's log; give it longer with --timeout-s, or ask less with --concurrency 1",
            ) from error
        except httpx.HTTPError as error:
            raise UpstreamError(
                f"{self._origin} cannot be reached or broke off ({type(error).__name__})",
                hint="check host and port, http or https, and that it runs (hhh-router serve --port 8000)",
            ) from error
        return response.status_code, response.headers, bytes(raw)

    def _stranger(self, found: str, *, status: int | None = None, said: str = "") -> UpstreamError:
        path = _PATHS[self._wire]
        hint = (
            "hhh-router serve and hhh-router proxy have it; for an OpenAI-compatible moderation endpoint add "
            "--wire moderations; put hhh-router proxy --upstream URL before a model that has neither"
            if self._wire == "native"
            else "give the base URL of an OpenAI-compatible server; for hhh-router leave --wire out"
        )
        return UpstreamError(
            f"{self._origin} {found}: it does not speak {path}",
            status=status,
            hint=f"{hint}{f' (it said: {said})' if said else ''}",
        )

    def _advice(self, status: int, said: str) -> str:
        told = f" (it said: {said})" if said else ""
        if status in (401, 403):
            found = "another key than that" if self._api_key is not None else "a key; none was sent"
            return f"it wants {found}: name the variable that holds it with --api-key-env NAME{told}"
        if 300 <= status < 400:
            return "it sends requests elsewhere; give the final URL"
        if status in _BUSY:
            return f"it is busy, {TRIES} times in a row; try later, or with --concurrency 1{told}"
        return f"look at the server's log{told}"

    def _said(self, raw: bytes) -> str:
        """The server's own words, for the terminal alone: they may repeat what was sent."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return ""
        told = body.get("error", body.get("detail")) if isinstance(body, Mapping) else None
        told = told.get("message") if isinstance(told, Mapping) else told
        if not isinstance(told, str):
            return ""
        text = "".join(c if c.isprintable() else " " for c in told)
        if self._api_key is not None:
            text = text.replace(self._api_key.get_secret_value(), "[key]")
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


class _Refused(Exception):
    """The server will not judge these texts."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(status)
        self.status = status
        self.said = said


def _pause_s(retry_after: str | None, tries: int) -> float:
    """Seconds until the next try: what the server asks for, else 1, 2, 4.

    >>> _pause_s("3", 0), _pause_s("Wed, 21 Oct 2015 07:28:00 GMT", 1), _pause_s("9999", 0)
    (3.0, 2.0, 30.0)
    """
    try:
        asked = float(retry_after or "nan")
    except ValueError:
        asked = math.nan
    return min(asked, LONGEST_PAUSE_S) if asked >= 0 else 2.0**tries


def _native_item(request: ReadRequest) -> dict[str, Any]:
    item: dict[str, Any] = {"prompt": [{"role": m.role, "content": m.content} for m in as_text(request.messages, ())]}
    return item if request.response is None else item | {"response": request.response}


def _moderated(request: ReadRequest) -> str:
    """The one text a moderation endpoint takes: the response, else the last turn."""
    return request.messages[-1].content if request.response is None else request.response


def _read(answer: Any, requests: Sequence[ReadRequest], wire: Wire) -> list[Judged]:
    """What an answer says.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: It is no answer of this wire.
    """
    if wire == "native":
        return [_native(entry["hhh"], r) for entry, r in zip(answer["data"], requests, strict=True)]
    model = str(answer.get("model", ""))
    about = f"model {model}" if model else ""
    return [_moderation(entry, r, about) for entry, r in zip(answer["results"], requests, strict=True)]


def _native(block: Mapping[str, Any], request: ReadRequest) -> Judged:
    checkpoint = "input" if request.response is None else "output"
    [action] = [Action(d["action"]) for d in block["decisions"] if d["checkpoint"] == checkpoint]
    policy, bundle = block["policy"], block["bundle"]
    about = (
        f"policy {policy['name']}@{policy['version']} ({policy['hash']}), bundle {bundle['name']} ({bundle['hash']})"
    )
    about += ", in shadow mode: what it would stop" if policy["mode"] == "shadow" else ""
    about += "" if block["calibration"]["calibrated"] else ", not calibrated"
    return Judged(
        needs={name: _probability(p) for name, p in block["needs"].items()},
        outcomes={name: _probability(p) for name, p in block["outcomes"].items()},
        # nobody makes a reply anew here, so one that should be made anew is not let through
        stopped=action.stops or action is Action.REGENERATE,
        about=about,
    )


def _moderation(result: Mapping[str, Any], request: ReadRequest, about: str) -> Judged:
    flagged, scores = result["flagged"], result.get("category_scores") or {}
    if not isinstance(flagged, bool):
        raise TypeError("flagged is no boolean")
    highest = max((_probability(p) for p in scores.values() if p is not None), default=None)
    found = {} if highest is None else {"harmless" if request.response is None else "unsafe": highest}
    is_prompt = request.response is None
    return Judged(needs=found if is_prompt else {}, outcomes={} if is_prompt else found, stopped=flagged, about=about)


def _probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("no probability")
    return float(value)
