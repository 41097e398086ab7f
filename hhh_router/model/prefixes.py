"""What earlier prompts have in common with a new one, kept so that it need not be read again.

Below the router's layer states depend on tokens alone, so keys, values and the states that enter that layer are shared
by all requests. Above it they depend on the mixture as well: there they are kept per weights, and a request finds only
those of its own. A prompt's tokens are cut into blocks; a block's name is a hash of all tokens up to its end.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hhh_router.model.slots import Slots
from hhh_router.types import Weights

BLOCK = 32
"""Tokens: small enough that a short system prompt is worth keeping, large enough that names are few."""
_MIXTURES = 4  # a block's upper halves, of the latest weights


@dataclass(slots=True, eq=False)
class Block:
    """Keys and values of ``BLOCK`` tokens."""

    lower: Tensor
    """(layers below the boundary, 2, heads, BLOCK, size)"""
    hidden: Tensor
    """States that enter the boundary layer, (BLOCK, D)."""
    upper: OrderedDict[Weights, Tensor] = field(default_factory=OrderedDict)
    """The same as ``lower`` for the layers above, per weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is known of a prompt: its first tokens, as whole blocks."""

    lower: Sequence[Block] = ()
    upper: Sequence[Tensor] = ()
    """Of the first so many blocks."""

    @property
    def tokens(self) -> int:
        """That need not be read below the boundary."""
        return BLOCK * len(self.lower)

    @property
    def upper_tokens(self) -> int:
        """That need not be read above it either."""
        return BLOCK * len(self.upper)

    @property
    def between(self) -> Tensor | None:
        """States that enter the boundary layer, of the tokens known below and not above: (tokens, D)."""
        blocks = self.lower[len(self.upper) :]
        return torch.cat([b.hidden for b in blocks]) if blocks else None


class Prefixes:
    """Blocks of the latest prompts and replies. Used by one thread, the model's own."""

    def __init__(self, boundary: int, depth: int, max_tokens: int) -> None:
        """For one model.

        Args:
            boundary: The first layer whose states depend on the mixture, or an earlier one.
            depth: Layers, L.
            max_tokens: Tokens to keep, each with the states of all layers once; 0 keeps none. Those above the
                boundary under further weights count half a token more.
        """
        self.boundary = boundary
        self.max_tokens = max_tokens
        self._depth = depth
        self._halves = 0  # of blocks: what is below the boundary is one, what is above it one per weights
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens kept."""
        return BLOCK * len(self._blocks)

    def below(self, ids: Sequence[int], limit: int) -> Found:
        """The longest known beginning of ``ids``, at most ``limit`` tokens of it."""
        found = []
        for name in _names(ids[:limit]):
            if (block := self._blocks.get(name)) is None:
                break
            self._blocks.move_to_end(name)
            found.append(block)
        return Found(lower=found)

    def above(self, found: Found, weights: Weights) -> Found:
        """The same with what is known above the boundary, under exactly these weights."""
        upper: list[Tensor] = []
        for block in found.lower:
            if (kept := block.upper.get(self._salt(weights))) is None:
                break
            upper.append(kept)
        return Found(lower=found.lower, upper=upper)

    def keep(self, ids: Sequence[int], slots: Slots, slot: int, hidden: Tensor, start: int, weights: Weights) -> None:
        """Keep the whole blocks of a row.

        Args:
            ids: The row's tokens.
            slots: Holds its keys and values.
            slot: Where.
            hidden: States that enter the boundary layer, of the tokens from ``start`` on, (T, D).
            start: Tokens before; a whole number of blocks, all of which were found.
            weights: What the row was read under, all of it.
        """
        if not self.max_tokens:
            return
        for number, name in enumerate(_names(ids)):
            place = slice(number * BLOCK, (number + 1) * BLOCK)
            block = self._blocks.get(name)
            if block is None:
                if place.start < start:
                    return  # it was dropped in the meantime, and its states are not at hand
                block = Block(
                    lower=slots.copied(slot, place, range(self.boundary)),
                    hidden=hidden[place.start - start : place.stop - start].clone(),
                )
                self._blocks[name] = block
                self._halves += 1
            self._blocks.move_to_end(name)
            salt = self._salt(weights)
            if salt not in block.upper:
                block.upper[salt] = slots.copied(slot, place, range(self.boundary, self._depth))
                self._halves += 1
                if len(block.upper) > _MIXTURES:
                    block.upper.popitem(last=False)
                    self._halves -= 1
        while self._halves * BLOCK > 2 * self.max_tokens:
            _, dropped = self._blocks.popitem(last=False)
            self._halves -= 1 + len(dropped.upper)

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._halves = 0

    @staticmethod
    def _salt(weights: Weights) -> Weights:
        """What sets states above the boundary apart: the weights themselves, to the last bit."""
        return weights


def whole_tokens(tokens: int) -> int:
    """Tokens of whole blocks.

    >>> whole_tokens(70)
    64
    """
    return tokens // BLOCK * BLOCK


def _names(ids: Sequence[int]) -> list[bytes]:
    """A name per whole block, which depends on all tokens before it too."""
    names, name = [], b""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        name = hashlib.blake2b(name + array("q", ids[start : start + BLOCK]).tobytes(), digest_size=16).digest()
        names.append(name)
    return names
