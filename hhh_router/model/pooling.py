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
        self._tail: list[tuple[Tensor, Tensor]] = []  # what came last, as it came
        self._loose = 0  # tokens of it
        self._pooled: Pooled | None = None

    def add(self, features: Tensor, topmost: Tensor) -> None:
        """Take further tokens.

        Args:
            features: Of `Heads.tokens`, (N, W).
            topmost: Their states of the last read layer, (N, D), any float dtype.
        """
        self._pooled = None
        self.tokens += len(features)
        self._loose += len(features)
        self._tail.append((features, topmost.float()))
        if self._loose >= 2 * _TAIL:  # not one by one: each time is a few small operations
            tail, states = self._joined()
            settled = self._loose - _TAIL
            self._most, self._weight, self._found = self._with(tail[:settled])
            self._sum = self._sum + states[:settled].sum(0)
            self._tail, self._loose = [(tail[settled:].clone(), states[settled:].clone())], _TAIL

    def cut(self, tokens: int) -> bool:
        """Take back all tokens but the first so many; False, and nothing changes, where they are too many for that."""
        left = tokens - (self.tokens - self._loose)
        if left < 0 or (left == 0 and tokens):  # the last token has to be at hand
            return False
        self._pooled = None
        tail, states = self._joined()
        self._tail, self._loose, self.tokens = [(tail[:left], states[:left])], left, tokens
        return True

    def pooled(self) -> Pooled:
        """What the heads score, one row; there has to be a token."""
        if self._pooled is not None:  # a prompt's, at every window
            return self._pooled
        tail, states = self._joined()
        _, weight, found = self._with(tail)
        found = (found / weight[:, None]).flatten()
        features = self._heads.gather[self._side](torch.cat([found, tail[-1]]))[None]
        mean = (self._sum + states.sum(0)) / self.tokens
        self._pooled = Pooled(features=features, summary=torch.cat([mean, states[-1]])[None])
        return self._pooled

    def nothing(self) -> Pooled:
        """What stands for a side that is not there: one row of zeros."""
        zeros = self._sum.new_zeros
        return Pooled(features=zeros(1, self._heads.width), summary=zeros(1, 2 * self._heads.dim))

    def _joined(self) -> tuple[Tensor, Tensor]:
        """The tail in one piece: features and states."""
        if len(self._tail) != 1:
            nothing = (self._found.new_zeros(0, self._heads.width), self._found.new_zeros(0, self._heads.dim))
            features, states = zip(nothing, *self._tail, strict=True)
            self._tail = [(torch.cat(features), torch.cat(states))]
        return self._tail[0]

    def _with(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum, sum and weighed values with further tokens."""
        scores, values = self._heads.query[self._side](tokens), self._heads.value[self._side](tokens)
        most = torch.maximum(self._most, scores.amax(0))
        before, weights = (self._most - most).exp(), (scores - most).exp()  # (Q,), (N, Q)
        found = self._found * before[:, None] + weights.T @ values
        return most, self._weight * before + weights.sum(0), found
