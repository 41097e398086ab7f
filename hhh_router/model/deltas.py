"""What leaves the model of each drawn token: its text, once that can be shown, and its log-probability for who asks."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hhh_router.model.sampler import Drawn, TextStream
from hhh_router.protocols import Delta, TokenLogprob
from hhh_router.types import Sampling

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
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


class Deltas:
    """The deltas of one reply, token by token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spelling: Spelling, sampling: Sampling) -> None:
        """Tells log-probabilities where ``sampling`` asks for them."""
        self._text = TextStream(tokenizer, sampling.stop)
        self._spelling = spelling
        self._tells = sampling.top_logprobs is not None
        self._untold: list[TokenLogprob] = []

    @property
    def stopped(self) -> bool:
        """True once a stop string was found."""
        return self._text.stopped

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
