"""What leaves the model of each drawn token: its text, once that can be shown, and its log-probability for who asks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hhh_router.model.sampler import Drawn, TextStream
from hhh_router.model.stack import DecoderStack
from hhh_router.protocols import Delta, TokenLogprob
from hhh_router.types import Sampling

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_TOLD_TOGETHER = 128  # tokens: the logits of a whole window would take gigabytes
_LONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece vocabularies spell a byte


class Spelling:
    """The bytes that each token of a vocabulary stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._byte_level = b'"ByteLevel"' in self._tokenizer.decoder.__getstate__()

    def of(self, token: int) -> bytes | None:
        """Its bytes; None for a mark that shows no text, and for ids no word stands behind."""
        if added := self._added.get(token):
            return None if added.special else added.content.encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return None
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in piece)
        if found := _LONE_BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace("▁", " ").encode()

    def tell(self, token: int, logprob: float, likeliest: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        """A token as a caller is told of it."""
        spelt = self.of(token)
        name = self._tokenizer.id_to_token(token) or "" if spelt is None else spelt.decode(errors="backslashreplace")
        return TokenLogprob(
            token=name, logprob=logprob, bytes=None if spelt is None else tuple(spelt), top_logprobs=likeliest
        )


def told_of_prompt(
    stack: DecoderStack, hidden: Tensor, ids: Sequence[int], spelling: Spelling, sampling: Sampling
) -> tuple[TokenLogprob, ...] | None:
    """What a caller is told of each token of a prompt; None where nobody asks.

    Args:
        stack: Whose logits they are.
        hidden: Last states of every token, (T, D).
        ids: The prompt's tokens, T of them.
        spelling: Of its vocabulary.
        sampling: Says how many others are told with each.
    """
    if (top := sampling.prompt_logprobs) is None:
        return None
    told = [spelling.tell(ids[0], math.nan)]
    for start in range(0, len(ids) - 1, _TOLD_TOGETHER):
        states = hidden[start : min(start + _TOLD_TOGETHER, len(ids) - 1)]
        logprobs = torch.log_softmax(stack.logits(states).float(), dim=-1)
        targets = torch.tensor(ids[start + 1 : start + 1 + len(states)], device=hidden.device)
        own = logprobs.gather(1, targets[:, None])[:, 0].tolist()
        best = logprobs.topk(top) if top else None
        ranked = [[]] * len(states) if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for token, logprob, others in zip(targets.tolist(), own, ranked, strict=True):
            likeliest = tuple(spelling.tell(i, x) for i, x in zip(*others, strict=True)) if others else ()
            told.append(spelling.tell(token, logprob, likeliest))
    return tuple(told)


class Deltas:
    """The deltas of one reply, token by token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spelling: Spelling, sampling: Sampling) -> None:
        """Tells log-probabilities where ``sampling`` asks for them."""
        self._text = TextStream(tokenizer, sampling.stop)
        self._spelling = spelling
        self._tells = sampling.top_logprobs is not None
        self._untold: list[TokenLogprob] = []

    @property
    def stop(self) -> str | None:
        """The stop string that was found, once one was."""
        return self._text.stop

    @property
    def stopped(self) -> bool:
        """True once a stop string was found."""
        return self.stop is not None

    def push(self, drawn: Drawn) -> Delta:
        """The delta of one token. What is told of it waits for its text, which may come with a later one."""
        text = self._text.push(drawn.token)
        if self._tells:
            likeliest = tuple(self._spelling.tell(token, logprob) for token, logprob in drawn.likeliest)
            self._untold.append(self._spelling.tell(drawn.token, drawn.logprob, likeliest))
        return Delta(text=text, logprob=drawn.logprob, token=drawn.token, told=self._take() if text else ())

    def end(self) -> Delta | None:
        """What is still kept back once no more tokens come; tokens that only spell a stop string are not told."""
        text = self._text.flush()
        told = () if self.stopped else self._take()
        return Delta(text=text, tokens=0, told=told) if text or told else None

    def _take(self) -> tuple[TokenLogprob, ...]:
        told, self._untold = tuple(self._untold), []
        return told
