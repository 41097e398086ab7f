"""Draw tokens and turn them into text that can be shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hhh_router.errors import GeneratorError, InvalidRequest
from hhh_router.model.grammar import Following
from hhh_router.types import Sampling


def check_biases(biases: Mapping[int, float], vocabulary: int) -> None:
    """Accept biases on tokens that there are.

    Raises:
        InvalidRequest: A token is none of the ``vocabulary``.
    """
    unknown = [token for token in biases if not 0 <= token < vocabulary]
    if unknown:
        raise InvalidRequest(
            f"logit_bias: found token {unknown[0]}", hint=f"this model's tokens are 0 to {vocabulary - 1}"
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token, and what the model thought of it."""

    token: int
    logprob: float
    """In nats, before temperature, bias and schema."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of as many as were asked for, the likeliest first."""


LEAST_TEMPERATURE = 1e-5  # logits over less overflow, and what is drawn then is noise; the likeliest token it is


class Sampler:
    """Draws one request's tokens with its own temperature, nucleus, bias, schema and seed."""

    def __init__(self, sampling: Sampling, device: torch.device, following: Following | None = None) -> None:
        """For one reply.

        Args:
            sampling: How to draw.
            device: Where logits are.
            following: Of ``sampling.json_schema``, if it has one.
        """
        self._greedy = sampling.temperature < LEAST_TEMPERATURE
        self._told = sampling.top_logprobs or 0
        self._following = following
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.long, device=device)
        self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, logits: Tensor) -> Drawn:
        """One token.

        Args:
            logits: (V,), any float dtype.

        Raises:
            GeneratorError: A logit is NaN, all are infinite, or the schema leaves nothing.
            InvalidRequest: The schema turned out too large to be followed further.
        """
        (found,) = draw_rows([self], logits[None])
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def shapes(self) -> bool:
        """True where bias or schema change the logits."""
        return bool(len(self._biased)) or self._following is not None

    def shape(self, logprobs: Tensor) -> Tensor:
        """With bias and schema, (V,)."""
        if len(self._biased):
            logprobs = logprobs.index_add(0, self._biased, self._bias)
        return logprobs if self._following is None else self._following.mask(logprobs)

    def pick(self, scores: Tensor, likeliest: Tensor) -> Tensor:
        """A token as a tensor of shape (), still on the device; ``likeliest`` is what greedy decoding takes."""
        if self._greedy:
            return likeliest
        shares = self._warpers(_NOTHING_BEFORE, scores[None])[0].softmax(-1)
        # a row of NaN is told apart afterwards; on a GPU drawing from it would take the whole process down
        shares = torch.where(shares.isnan().any(), torch.ones_like(shares), shares)
        return torch.multinomial(shares, 1, generator=self._random)[0]

    def finish(self, token: int, logprob: float, logprobs: Tensor) -> Drawn:
        """The token that was picked, with what is told of it."""
        if self._following is not None:
            self._following.take(token)
        best = logprobs.topk(self._told) if self._told else None
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
        return Drawn(token, logprob, likeliest)


def draw_rows(samplers: Sequence[Sampler], logits: Tensor) -> list[Drawn | Exception]:
    """A token for each row, with one transfer from the device for all of them.

    Args:
        samplers: Of each row.
        logits: (B, V), any float dtype.

    Returns:
        Per row what was drawn, or why nothing could be: a logit is NaN, all are infinite, the schema leaves nothing or
        cannot be followed further. One row's fault is no other's.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    errors: dict[int, Exception] = {}
    scores = logprobs
    if any(s.shapes for s in samplers):
        scores = torch.stack(
            [_shaped(s, row, errors, i) for i, (s, row) in enumerate(zip(samplers, logprobs, strict=True))]
        )
    best = scores.max(dim=-1)
    tokens = torch.stack([s.pick(row, top) for s, row, top in zip(samplers, scores, best.indices, strict=True)])
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    failed = best.values.isnan() | best.values.isneginf()
    found: list[Drawn | Exception] = []
    together = torch.stack([tokens.double(), chosen.double(), failed.double()]).tolist()
    for row, (sampler, token, logprob, nothing) in enumerate(zip(samplers, *together, strict=True)):
        if row in errors:
            found.append(errors[row])
            continue
        if nothing:
            said = "the model gave NaN logits" if math.isnan(logprob) else "no token is left that may come next"
            found.append(GeneratorError(said, hint="hhh-router bundle verify checks the weights"))
            continue
        try:
            found.append(sampler.finish(int(token), logprob, logprobs[row]))
        except Exception as error:  # a matcher's, say
            found.append(error)
    return found


def _shaped(sampler: Sampler, logprobs: Tensor, errors: dict[int, Exception], row: int) -> Tensor:
    if sampler.shapes:
        try:
            return sampler.shape(logprobs)
        except Exception as error:  # as above
            errors[row] = error
    return logprobs


_NOTHING_BEFORE = torch.empty((1, 0), dtype=torch.long)  # what warpers of repetition would look at


class TextStream:
    """Decodes tokens one by one, keeping back unfinished characters and whatever may become a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stop: str | None = None
        """The stop string that was found."""

    def push(self, token: int) -> str:
        """Add a token and return the text that is safe to show by now, perhaps none."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        found = [(at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            at, self.stop = min(found)
            text, self._held = self._held[:at], ""
            return text
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def flush(self) -> str:
        """The text still kept back, once no more tokens come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``.

    >>> _overlap("one two", "two three")
    3
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
