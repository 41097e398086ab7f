"""Draw tokens and turn them into text that can be shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from hhh_router.errors import GeneratorError
from hhh_router.types import Sampling


class Sampler:
    """Draws one request's tokens with its own temperature, nucleus and seed."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._greedy = sampling.temperature == 0
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, logits: Tensor) -> tuple[int, float]:
        """One token and its log-probability (nats) under the unwarped distribution.

        Args:
            logits: (V,), any float dtype.

        Raises:
            GeneratorError: A logit is NaN, or all are infinite.
        """
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        if torch.isnan(logprobs).any():
            raise GeneratorError("the model gave NaN logits", hint="hhh-router bundle verify checks the weights")
        if self._greedy:
            token = int(logprobs.argmax())
        else:
            warped = self._warpers(torch.empty((1, 0), dtype=torch.long), logprobs[None])
            token = int(torch.multinomial(warped[0].softmax(-1), 1, generator=self._random))
        return token, float(logprobs[token])


class TextStream:
    """Decodes tokens one by one, keeping back unfinished characters and whatever may become a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is safe to show by now, perhaps none."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
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
