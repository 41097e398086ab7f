"""Tokens of a text that grows: only its end is encoded again, for the rest cannot have changed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from hhh_router.model.encode import Encoder

_MARGIN = 16  # tokens at the end that further text may change
_REACH = 512  # tokens in which a place to begin again is looked for
_AGREE = 4  # tokens that have to come out as before, after as many that need not


class GrowingIds:
    """A reply's tokens, as `Encoder.response_ids` has them."""

    def __init__(self, encoder: Encoder) -> None:
        """Of an empty text."""
        self._encoder = encoder
        self.text = ""
        self.ids = encoder.response_ids("")
        self._ends = [0] * len(self.ids)  # of each token, in characters of the text

    def become(self, kept: int, added: str) -> int:
        """Take the first ``kept`` characters with others behind them; returns how many tokens are still the same."""
        self.text = self.text[:kept] + added
        first = self._place(kept)
        ids, ends = self._from(first)
        if first and (met := self._meet(first, ids, ends)) is None:
            first = 0
            ids, ends = self._from(first)
        elif first:
            first, skipped = met
            ids, ends = ids[skipped:], ends[skipped:]
        same = first + _same(self.ids[first:], ids)
        self.ids[first:], self._ends[first:] = ids, ends
        return same

    def _meet(self, first: int, ids: Sequence[int], ends: Sequence[int]) -> tuple[int, int] | None:
        """Where tokens encoded from one place on begin to come out as before: which old token, and which new one.

        That is the first of them, unless the tokenizer puts something before every text, as Llama 2's does.
        """
        old = {end: first + i for i, end in enumerate(self._ends[first - 1 : first + _MARGIN])}  # end → the next one
        for skipped in range(_AGREE):
            end = ends[skipped - 1] if skipped else self._ends[first - 1]
            place = old.get(end)
            if place is not None and ids[skipped : skipped + _AGREE] == self.ids[place : place + _AGREE]:
                return place, skipped
        return None

    def _from(self, first: int) -> tuple[list[int], list[int]]:
        """The text's tokens from one of them on, and their ends."""
        start = self._ends[first - 1] if first else 0
        ids, ends = self._encoder.plain(self.text[start:])
        if not self.text:
            return self._encoder.response_ids(""), [0]
        return ids, [start + end for end in ends]

    def _place(self, kept: int) -> int:
        """A token from which one may begin anew; 0 where none is known.

        The tokenizers' rules for splitting text into words all split between a letter or a digit and a space or
        punctuation, whatever follows; where a tokenizer has no such rule, the margin has to do.
        """
        last = len(self._ends)
        while last and self._ends[last - 1] > kept:
            last -= 1
        for place in range(last - _MARGIN, max(0, last - _MARGIN - _REACH), -1):
            end = self._ends[place - 1]
            # a character may be several tokens, which then all end with it
            if end < self._ends[place] and self.text[end - 1].isalnum() and _parts(self.text[end]):
                return place
        return 0


def _parts(character: str) -> bool:
    return character.isspace() or unicodedata.category(character)[0] == "P"


def _same(old: Sequence[int], new: Sequence[int]) -> int:
    """Length of the beginning that two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
