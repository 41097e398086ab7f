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
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # (heads, room, size) each

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all."""
        if tokens <= self.room:
            return
        self.room = math.ceil(max(tokens, self.tokens * _GROWTH) / _STEP) * _STEP
        for index, pair in self._layers.items():
            grown = tuple(old.new_zeros(old.shape[0], self.room, old.shape[2]) for old in pair)
            for new, old in zip(grown, pair, strict=True):
                new[:, : self.tokens] = old[:, : self.tokens]
            self._layers[index] = (grown[0], grown[1])

    def copy(self, cache: Cache, layers: int) -> None:
        """Begin with what another cache, of one row, has in the first so many layers."""
        self.tokens = int(cache.get_seq_length())
        self.reserve(self.tokens)
        for index, layer in enumerate(cache.layers[:layers]):
            self.write(index, 0, layer.keys[0], layer.values[0])

    def begun(self, tokens: int) -> Kept:
        """A copy of the first so many tokens."""
        copy = Kept()
        copy.reserve(tokens)
        copy.tokens = tokens
        for index, (keys, values) in self._layers.items():
            copy.write(index, 0, keys[:, :tokens], values[:, :tokens])
        return copy

    def write(self, index: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's keys and values, (H, N, d), behind ``start`` tokens; returns those and all before."""
        if index not in self._layers:
            shape = (keys.shape[0], self.room, keys.shape[2])
            self._layers[index] = (keys.new_zeros(shape), values.new_zeros(shape))
        stop = start + keys.shape[1]
        kept = self._layers[index]
        for store, new in zip(kept, (keys, values), strict=True):
            store[:, start:stop] = new
        return kept[0][:, :stop], kept[1][:, :stop]


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
        rows = [
            kept.write(layer_idx, past, keys[i, :, :length], values[i, :, :length])
            for i, (kept, past, length) in enumerate(zip(self._kept, self.past, self.lengths, strict=True))
        ]
        if len(rows) == 1:
            return rows[0][0][None], rows[0][1][None]
        if self._padded is None:
            shape = (len(rows), keys.shape[1], self.places, keys.shape[3])
            self._padded = (keys.new_zeros(shape), values.new_zeros(shape))
        for i, row in enumerate(rows):
            for padded, found in zip(self._padded, row, strict=True):
                padded[i, :, : found.shape[1]] = found
        return self._padded

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
