"""Keys and values of texts that are read on piece by piece, each in room of its own, several texts a pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_STEP = 64  # tokens: room grows by whole steps,
_GROWTH = 1.25  # and by a share of itself, so that what is copied stays in proportion to what is read


class Kept:
    """Keys and values of one text's tokens in the layers that were run."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens whose keys and values hold."""
        self.room = 0
        """Tokens there is room for."""
        self._layers: dict[int, Tensor] = {}  # (2, heads, room, size): keys, then values

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all."""
        if tokens <= self.room:
            return
        self.room = math.ceil(max(tokens, self.tokens * _GROWTH) / _STEP) * _STEP
        for index, old in self._layers.items():
            new = old.new_zeros(2, old.shape[1], self.room, old.shape[3])
            new[:, :, : self.tokens] = old[:, :, : self.tokens]
            self._layers[index] = new

    def copy(self, cache: Cache, layers: int) -> None:
        """Begin with what another cache, of one row, has in the first so many layers."""
        self.tokens = int(cache.get_seq_length())
        self.reserve(self.tokens)
        for index, layer in enumerate(cache.layers[:layers]):
            self.write(index, 0, torch.stack([layer.keys[0], layer.values[0]]))

    def begun(self, tokens: int) -> Kept:
        """A copy of the first so many tokens."""
        copy = Kept()
        copy.reserve(tokens)
        copy.tokens = tokens
        for index, both in self._layers.items():
            copy.write(index, 0, both[:, :, :tokens])
        return copy

    def write(self, index: int, start: int, both: Tensor) -> Tensor:
        """Put a layer's keys and values, (2, H, N, d), behind ``start`` tokens; returns those and all before."""
        if index not in self._layers:
            self._layers[index] = both.new_zeros(2, both.shape[1], self.room, both.shape[3])
        stop = start + both.shape[2]
        self._layers[index][:, :, start:stop] = both
        return self._layers[index][:, :, :stop]


class Extension:
    """What the attention layers write some further tokens of several texts to; their room was reserved."""

    def __init__(self, kept: Sequence[Kept], lengths: Sequence[int]) -> None:
        """For a pass over so many new tokens of each; `advance` counts them."""
        self._kept = kept
        self.lengths = lengths
        self.past = [k.tokens for k in kept]
        """Tokens before the new ones, of each text."""
        self._padded: tuple[Tensor, Tensor] | None = (
            None  # the same for all layers: each is done with it before the next
        )

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol: take a layer's new keys and values, (B, H, T, d), and return all of them."""
        both = torch.stack([keys, values])  # (2, B, H, T, d)
        rows = [
            kept.write(layer_idx, past, both[:, i, :, :length])
            for i, (kept, past, length) in enumerate(zip(self._kept, self.past, self.lengths, strict=True))
        ]
        if len(rows) == 1:
            return rows[0][0][None], rows[0][1][None]
        if self._padded is None:
            self._padded = both.new_zeros(*both.shape[:3], self.places, both.shape[4])
        for i, row in enumerate(rows):
            self._padded[:, i, :, : row.shape[2]] = row
        return self._padded[0], self._padded[1]

    def advance(self) -> None:
        """Count the tokens that were written."""
        for kept, past, length in zip(self._kept, self.past, self.lengths, strict=True):
            kept.tokens = past + length

    @property
    def places(self) -> int:
        """Tokens of the longest text, new ones included."""
        return max(p + n for p, n in zip(self.past, self.lengths, strict=True))

    def visible(self, window: int | None, device: torch.device) -> Tensor:
        """Which places each new token attends to, (B, 1, T, K). What is padding sees what its place would.

        Args:
            window: Of sliding attention, in tokens; None for full attention.
            device: Where the mask is wanted.
        """
        own = self.positions(device)[:, :, None]  # (B, T, 1)
        place = torch.arange(self.places, device=device)[None, None]
        seen = place <= own
        if window is not None:
            seen &= place > own - window
        return seen[:, None]

    def positions(self, device: torch.device) -> Tensor:
        """Of each new token, (B, T). Padding has the last place that is one, so that it sees something finite."""
        new = torch.arange(max(self.lengths), device=device)[None]
        return (torch.tensor(self.past, device=device)[:, None] + new).clamp(max=self.places - 1)
