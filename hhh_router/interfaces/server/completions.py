"""OpenAI's old completions: text that is gone on with as it stands, and its own log-probabilities (``echo``).

What evaluation harnesses speak: they score answers by the log-probabilities of a prompt that ends with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import check_supported, kind_of, one, our_fields, parse_weights, wants_usage
from hhh_router.interfaces.sampling import parse_sampling
from hhh_router.interfaces.server.choices import parse_count, strictest, total, variants
from hhh_router.interfaces.server.dialect import event
from hhh_router.interfaces.server.http import Failure, dump, failure
from hhh_router.interfaces.server.models import parse_model
from hhh_router.interfaces.server.openai import DONE, LEAST_LOGPROB
from hhh_router.pipeline import ChatDelta, ChatFinished, TokenLogprob
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest, Message

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "seed", "stop", "logit_bias")
READ_FIELDS = frozenset(
    {"model", "prompt", "echo", "logprobs", "max_tokens", "n", "stream", "stream_options", "hhh", *_SAMPLING_FIELDS}
)
"""Fields of the body that are acted on."""
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
}
"""Fields that change the answer and are not supported yet, with the values that change nothing. Others are refused."""
MOST_PROMPTS = 128
"""Of one call."""
MOST_REPLIES = 256
"""Of one call: prompts times ``n``."""
MAX_TOKENS = 16
"""Where the caller names no limit, as on OpenAI's wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call for completions as the client wants them told."""

    request: ChatRequest
    """All that the prompts share."""
    prompts: tuple[str | tuple[int, ...], ...]
    """Each as text or as tokens."""
    count: int
    """Completions of each."""
    model: str
    stream: bool
    echo: bool
    """Whether the prompt comes before its completion."""
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    @property
    def requests(self) -> tuple[ChatRequest, ...]:
        """See `choices.ManyDialect`."""
        found: list[ChatRequest] = []
        for at, prompt in enumerate(self.prompts):
            asked = replace(
                self.request,
                request_id=f"{self.request.request_id}.p{at}" if at else self.request.request_id,
                messages=(Message(role="user", content=prompt if isinstance(prompt, str) else ""),),
                prompt_ids=() if isinstance(prompt, str) else prompt,
            )
            found += variants(asked, self.count)
        return tuple(found)

    def whole_of(self, done: Sequence[ChatFinished]) -> dict[str, Any]:
        """See `choices.ManyDialect`."""
        return {**self._head, "choices": [self.choice(at, d) for at, d in enumerate(done)], **self._end(done)}

    def begin_choice(self, at: int, first: Metadata) -> Writer:
        """See `choices.ManyDialect`."""
        return Writer(self, at, first)

    def end_of(self, done: Sequence[ChatFinished]) -> list[bytes]:
        """See `choices.ManyDialect`."""
        last = {**self._head, "choices": [], **self._end(done)}
        return [*([event(None, dump(last))] if self.include_usage else []), *DONE]

    def whole(self, done: ChatFinished) -> dict[str, Any]:
        """See `dialect.Dialect`."""
        return self.whole_of([done])

    def begin(self, first: Metadata) -> Writer:
        """See `dialect.Dialect`."""
        return self.begin_choice(0, first)

    def failure(self, error: Exception) -> Failure:
        """See `dialect.Dialect`."""
        return failure(error)

    @property
    def ping(self) -> bytes:
        """See `dialect.Dialect`."""
        return b": ping\n\n"

    def broken(self, body: Mapping[str, Any]) -> bytes:
        """See `dialect.Dialect`."""
        return event(None, dump(body))

    def choice(self, at: int, done: ChatFinished) -> dict[str, Any]:
        """One completion, with its prompt before it where that is wanted."""
        asked = self.request.sampling.top_logprobs is not None
        told = [*(done.prompt_logprobs or ()), *(done.logprobs or ())] if asked else None
        before = self._told_prompt(at, done) if self.echo else ""
        text = before + done.text
        return {**self._choice(at, text, told, done.finish_reason), "hhh": done.metadata.as_json()}

    def piece(
        self, at: int, text: str, told: Sequence[TokenLogprob] | None, reason: str | None, block: Metadata | None
    ) -> bytes:
        """One chunk."""
        more = {} if block is None else {"hhh": block.as_json()}
        return event(None, dump({**self._head, "choices": [self._choice(at, text, told, reason)], **more}))

    def _choice(self, at: int, text: str, told: Sequence[TokenLogprob] | None, reason: str | None) -> dict[str, Any]:
        logprobs = None if told is None else _logprobs(told)
        return {"text": text, "index": at, "logprobs": logprobs, "finish_reason": reason}

    def _told_prompt(self, at: int, done: ChatFinished) -> str:
        prompt = self.prompts[at // self.count]
        return prompt if isinstance(prompt, str) else "".join(_texts(done.prompt_logprobs or ()))

    @property
    def _head(self) -> dict[str, Any]:
        name = f"cmpl-{self.request.request_id}"
        return {"id": name, "object": "text_completion", "created": self.created, "model": self.model}

    def _end(self, done: Sequence[ChatFinished]) -> dict[str, Any]:
        return {"usage": total(done, prompts=len(self.prompts)), "hhh": strictest(done).as_json()}


class Writer:
    """Chunks of one completion. ``hhh`` is in the first and in the last."""

    def __init__(self, call: Call, at: int, first: Metadata) -> None:
        self._call, self._at = call, at
        self._first: Metadata | None = first

    def delta(self, piece: ChatDelta) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        first, self._first = self._first, None
        return [self._call.piece(self._at, piece.text, piece.logprobs or None, None, first)]

    def end(self, done: ChatFinished) -> list[bytes]:
        """See `dialect.StreamWriter`."""
        return [self._call.piece(self._at, "", None, done.finish_reason, done.metadata)]


def parse_completion(body: Mapping[str, Any], *, request_id: str = "") -> Call:
    """OpenAI's body as our requests.

    Raises:
        InvalidRequest: A field is wrong, or asks for what is not supported yet.
        WireError: 404, no such model.
    """
    ours, unread = our_fields(body), check_supported(body, READ_FIELDS, NEUTRAL_VALUES)
    choice = parse_model(body.get("model"))
    policy = one("policy", choice.policy, ours.get("policy"))
    if policy is not None and not isinstance(policy, str):
        raise InvalidRequest("hhh.policy: no string", hint="send a policy's name")
    flags = {name: body.get(name) for name in ("stream", "echo")}
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(f"{name}: found {kind_of(value)}", hint="send true or false")
    if flags["echo"] and flags["stream"]:
        raise InvalidRequest("echo: not supported on streams", hint="leave out one of them")
    include_usage = wants_usage(body)
    prompts, count = _prompts(body.get("prompt")), parse_count(body.get("n"))
    if len(prompts) * count > MOST_REPLIES:
        raise InvalidRequest(
            f"n: {count} completions of {len(prompts)} prompts", hint=f"ask for at most {MOST_REPLIES} together"
        )
    told = body.get("logprobs")
    if told is not None and (isinstance(told, bool) or not isinstance(told, int)):
        raise InvalidRequest(f"logprobs: found {kind_of(told)}", hint="send how many tokens to tell with each")
    limit = body.get("max_tokens")
    sampling = parse_sampling(
        max_tokens=MAX_TOKENS if limit is None else limit,
        top_logprobs=told,
        **{name: body.get(name) for name in _SAMPLING_FIELDS},
    )
    if flags["echo"]:
        sampling = replace(sampling, prompt_logprobs=told or 0)
    request = ChatRequest(
        messages=(Message(role="user", content=""),),
        continues=True,
        policy=policy,
        weights=one("weights", choice.weights, parse_weights(ours.get("weights"), where="hhh.weights")),
        sampling=sampling,
        request_id=request_id,
        not_inspected=unread,
    )
    return Call(
        request=request,
        prompts=prompts,
        count=count,
        model=str(body.get("model", "")),
        stream=bool(flags["stream"]),
        echo=bool(flags["echo"]),
        include_usage=include_usage,
    )


def _prompts(given: object) -> tuple[str | tuple[int, ...], ...]:
    """A text, some texts, the tokens of one prompt, or those of some."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Sequence) or isinstance(given, bytes) or not given:
        raise InvalidRequest(f"prompt: found {kind_of(given)}", hint="send text, tokens, or a list of either")
    if _is_tokens(given):
        return (tuple(given),)
    if len(given) > MOST_PROMPTS:
        raise InvalidRequest(f"prompt: found {len(given)} prompts", hint=f"send at most {MOST_PROMPTS}")
    prompts: list[str | tuple[int, ...]] = []
    for i, prompt in enumerate(given):
        if isinstance(prompt, str):
            prompts.append(prompt)
        elif isinstance(prompt, list) and prompt and _is_tokens(prompt):
            prompts.append(tuple(prompt))
        else:
            raise InvalidRequest(f"prompt[{i}]: found {kind_of(prompt)}", hint="send text, or a list of token ids")
    return tuple(prompts)


def _is_tokens(given: Sequence[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in given)


def _logprobs(told: Sequence[TokenLogprob]) -> dict[str, Any]:
    """In the old form: lists of equal length, and what was likeliest by its text."""
    texts, at, offsets = list(_texts(told)), 0, []
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": [t.token for t in told],
        "token_logprobs": [_number(t.logprob) for t in told],
        "top_logprobs": [_likeliest(t) for t in told],
        "text_offset": offsets,
    }


def _likeliest(told: TokenLogprob) -> dict[str, float | None] | None:
    """By text; of tokens with the same text, the likeliest."""
    found: dict[str, float | None] = {}
    for other in told.top_logprobs:
        found.setdefault(other.token, _number(other.logprob))
    return found or None


def _number(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, LEAST_LOGPROB)


def _texts(told: Sequence[TokenLogprob]) -> Iterator[str]:
    """The text that each token adds; characters that several tokens spell come with the last of them."""
    held = b""
    for token in told:
        held += token.token.encode() if token.bytes is None else bytes(token.bytes)
        try:
            text = held.decode()
        except UnicodeDecodeError as error:
            # the end of a character may still come; what can be none is told as it is
            text = "" if error.reason == "unexpected end of data" else held.decode(errors="replace")
        held = held if not text else b""
        yield text
