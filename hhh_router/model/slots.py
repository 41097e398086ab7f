"""Keys and values of all replies under way, a slot each, so that rows join and leave without touching the others.

transformers' caches hold one batch whose rows begin and end together. Here every row has its own length: a decode step
writes each row's new token at that row's own place and attends to the first ``max(lengths)`` places of all of them,
under a mask. Slots in use are always the first ones, so a batch is a view and nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STEP = 128  # tokens: room grows by whole steps, so that it seldom grows
_GROWTH = 1.5


class Slots:
    """Room for the keys and values of several rows. Used by one thread, the model's own."""

    def __init__(self, max_tokens: int) -> None:
        """Room for ``max_tokens`` at most, or for what is reserved at once if that is more."""
        self._most = max_tokens
        self.lengths: list[int] = []
        """Tokens kept of each row, in slot order."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # (rows, heads, tokens, size) each
        self._room = (0, 0)

    @property
    def tokens(self) -> int:
        """Tokens there is room for, rows times length, whether used or not."""
        return self._room[0] * self._room[1]

    def reserve(self, rows: int, length: int) -> None:
        """Make room for so many rows, those kept included, of so many tokens; what is kept stays where it is."""
        length = math.ceil(length / _STEP) * _STEP
        if rows <= self._room[0] and length <= self._room[1]:
            return
        most_rows = self._room[0] if rows <= self._room[0] else max(rows, math.ceil(self._room[0] * _GROWTH))
        most_length = max(length, self._room[1])
        # where both together would be too much, what earlier rows needed is let go
        self._room = (most_rows, most_length) if most_rows * most_length <= self._most else (rows, length)
        kept, longest = len(self.lengths), max(self.lengths, default=0)
        for index, pair in self._layers.items():
            grown = tuple(_zeros(old, self._room) for old in pair)
            for new, old in zip(grown, pair, strict=True):
                new[:kept, :, :longest] = old[:kept, :, :longest]
            self._layers[index] = (grown[0], grown[1])

    def opening(self) -> Opening:
        """A cache for the pass that reads a new row's prompt, in room that was reserved; kept only by `keep`."""
        return Opening(self, len(self.lengths))

    def keep(self, opening: Opening) -> int:
        """Take a row whose prompt has been read into the batch; returns its slot."""
        self.lengths.append(opening.tokens)
        return opening.slot

    def copied(self, slot: int, place: slice, layers: range) -> Tensor:
        """Keys and values of some of a row's tokens, (layers, 2, heads, tokens, size)."""
        kept = [torch.stack([side[slot, :, place] for side in self._layers[i]]) for i in layers]
        return torch.stack(kept)

    def put(self, slot: int, place: slice, layers: range, blocks: Tensor) -> None:
        """Write what `copied` gave to another row."""
        for index, pair in zip(layers, blocks, strict=True):
            for store, new in zip(self.store(index, pair), pair, strict=True):
                store[slot, :, place] = new

    def step(self, rows: Sequence[int]) -> Step:
        """A cache for a pass over one new token of some rows; `advance` counts it."""
        return Step(self, rows)

    def advance(self) -> None:
        """Count the token that was written for every row."""
        self.lengths = [n + 1 for n in self.lengths]

    def release(self, slot: int) -> int:
        """Free a slot; the last row moves into it. Returns the slot that row came from.

        What a row leaves behind is overwritten with zeros: a NaN there would reach whoever gets the slot next, even
        behind a mask.
        """
        last = len(self.lengths) - 1
        moved, freed = self.lengths[last], self.lengths[slot]
        for pair in self._layers.values():
            for kept in pair:
                if slot != last:
                    kept[slot, :, :moved] = kept[last, :, :moved]
                    kept[slot, :, moved : freed + 1] = 0
                kept[last, :, : moved + 1] = 0
        self.lengths[slot] = moved
        self.lengths.pop()
        return last

    def forget(self, opening: Opening) -> None:
        """Wipe what a prompt that is not going to be answered has written."""
        for pair in self._layers.values():
            for kept in pair:
                kept[opening.slot, :, : opening.tokens] = 0

    def trim(self) -> None:
        """Let go of room that only long or many rows needed, once nothing is kept."""
        if not self.lengths and self.tokens > _STEP:
            self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self.lengths.clear()
        self._layers.clear()
        self._room = (0, 0)

    def store(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (rows, heads, tokens, size), made when first asked for."""
        if index not in self._layers:
            self._layers[index] = (_zeros(like, self._room), _zeros(like, self._room))
        return self._layers[index]


class Opening:
    """What the attention layers write a new row's prompt to."""

    def __init__(self, slots: Slots, slot: int) -> None:
        self._slots = slots
        self.slot = slot
        self.past = 0
        """Tokens that the coming layers have already, put there by `Slots.put`."""
        self.tokens = 0
        """Tokens written so far, those included."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol: take a layer's new keys and values, (1, H, T, d), and return all of them."""
        self.tokens = self.past + keys.shape[2]
        kept_keys, kept_values = self._slots.store(layer_idx, keys)
        kept_keys[self.slot, :, self.past : self.tokens] = keys[0]
        kept_values[self.slot, :, self.past : self.tokens] = values[0]
        if not self.past:
            return keys, values
        row = slice(self.slot, self.slot + 1)
        return kept_keys[row, :, : self.tokens], kept_values[row, :, : self.tokens]


class Step:
    """What the attention layers write one token of each row to."""

    def __init__(self, slots: Slots, rows: Sequence[int]) -> None:
        self._slots = slots
        self.lengths = [slots.lengths[i] for i in rows]
        """Tokens before the new one, of each row."""
        self._rows = torch.tensor(list(rows))
        self._places = torch.tensor(self.lengths)
        self._longest = max(self.lengths) + 1
        self._view = slice(len(rows)) if list(rows) == list(range(len(rows))) else self._rows  # a view where it can be

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol: take a layer's new keys and values, (B, H, 1, d), and return all of them."""
        kept = self._slots.store(layer_idx, keys)
        if self._rows.device != keys.device:  # once a step, not once a layer
            self._rows, self._places = self._rows.to(keys.device), self._places.to(keys.device)
        for store, new in zip(kept, (keys, values), strict=True):
            store[self._rows, :, self._places] = new[:, :, 0]
        return kept[0][self._view, :, : self._longest], kept[1][self._view, :, : self._longest]

    def visible(self, window: int | None, device: torch.device) -> Tensor | None:
        """Which places each row's new token attends to, (B, 1, 1, K); None where all rows see everything.

        Args:
            window: Of sliding attention, in tokens; None for full attention.
            device: Where the mask is wanted.
        """
        places = max(self.lengths) + 1
        if len(set(self.lengths)) == 1 and (window is None or places <= window):
            return None
        own = torch.tensor(self.lengths, device=device)[:, None]
        place = torch.arange(places, device=device)[None]
        seen = place <= own
        if window is not None:
            seen &= place > own - window
        return seen[:, None, None]


def _zeros(like: Tensor, room: Sequence[int]) -> Tensor:
    """Zeros of (rows, heads, tokens, size); on a CPU pages that nothing is written to take no memory."""
    shape = (room[0], like.shape[1], room[1], like.shape[3])
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(shape)
