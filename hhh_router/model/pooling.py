"""One side of one text, pooled by the heads' attention while its tokens come; the last of them may change."""

from __future__ import annotations

import torch
from torch import Tensor

from hhh_router.model.heads import Heads, Pooled, Side

_TAIL = 64  # tokens that can be taken back: a text's last tokens may change when more of it comes


class RunningPool:
    """Gives what `Heads.pool` gives of all tokens so far, at a cost that does not grow with them.

    A softmax over tokens needs no token twice: its maximum, its sum and the sum of values it weighs go on (Milakov &
    Gimelshein 2018, algorithm 3).
    """

    def __init__(self, heads: Heads, side: Side) -> None:
        self._heads = heads
        self._side: Side = side
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        heads, device = self._heads, self._heads.mix.weight.device
        self.tokens = 0
        """Tokens so far."""
        self._most = torch.full((heads.queries,), -torch.inf, device=device)
        self._weight = torch.zeros(heads.queries, device=device)
        self._found = torch.zeros(heads.queries, heads.value[self._side].out_features, device=device)
        self._sum = torch.zeros(heads.dim, device=device)
        self._tail = torch.zeros(0, heads.width, device=device)
        self._states = torch.zeros(0, heads.dim, device=device)

    def add(self, features: Tensor, topmost: Tensor) -> None:
        """Take further tokens.

        Args:
            features: Of `Heads.tokens`, (N, W).
            topmost: Their states of the last read layer, (N, D), any float dtype.
        """
        self.tokens += len(features)
        self._tail = torch.cat([self._tail, features])
        self._states = torch.cat([self._states, topmost.float()])
        if (settled := len(self._tail) - _TAIL) >= _TAIL:  # not one by one: each time is a few small operations
            self._most, self._weight, self._found = self._with(self._tail[:settled])
            self._sum = self._sum + self._states[:settled].sum(0)
            self._tail, self._states = self._tail[settled:].clone(), self._states[settled:].clone()

    def cut(self, tokens: int) -> bool:
        """Take back all tokens but the first so many; False, and nothing changes, where they are too many for that."""
        left = tokens - (self.tokens - len(self._tail))
        if left < 0 or (left == 0 and tokens):  # the last token has to be at hand
            return False
        self._tail, self._states = self._tail[:left], self._states[:left]
        self.tokens = tokens
        return True

    def pooled(self) -> Pooled:
        """What the heads score, one row; there has to be a token."""
        _, weight, found = self._with(self._tail)
        found = (found / weight[:, None]).flatten()
        features = self._heads.gather[self._side](torch.cat([found, self._tail[-1]]))[None]
        mean = (self._sum + self._states.sum(0)) / self.tokens
        return Pooled(features=features, summary=torch.cat([mean, self._states[-1]])[None])

    def nothing(self) -> Pooled:
        """What stands for a side that is not there: one row of zeros."""
        zeros = self._sum.new_zeros
        return Pooled(features=zeros(1, self._heads.width), summary=zeros(1, 2 * self._heads.dim))

    def _with(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum, sum and weighed values with further tokens."""
        scores, values = self._heads.query[self._side](tokens), self._heads.value[self._side](tokens)
        most = torch.maximum(self._most, scores.amax(0))
        before, weights = (self._most - most).exp(), (scores - most).exp()  # (Q,), (N, Q)
        found = self._found * before[:, None] + weights.T @ values
        return most, self._weight * before + weights.sum(0), found
