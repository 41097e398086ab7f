"""Per-block scales of an expert, searched on what it is for against what it costs.

Source: heterogeneous model averaging, Lin et al. 2023 (arXiv 2309.06256): how far each group of layers moves from the
backbone is chosen by itself. Coordinate search: one block after the other, each over a short list of factors, until a
round changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hhh_router.errors import BundleError, DataError
from hhh_router.model.base import Backbone
from hhh_router.model.experts import Expert, block_of
from hhh_router.model.mixture import MixtureLinear, install_mixture
from hhh_router.model.runner import Reply, Runner
from hhh_router.training.lessons import Lesson
from hhh_router.training.recipe import BlocksRecipe
from hhh_router.types import DIMENSIONS, Weights

_ROUNDS = 2
_BARE = Weights(1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting of the scales, and what it gave."""

    blocks: tuple[float, ...]
    reward: float
    """Share of pairs whose good reply has gained on the worse one against the backbone, each counted by the logistic
    of beta times that gain, in [0, 1]; 0.5 is the backbone."""
    tax: float
    """How much less likely the backbone's own replies to benign prompts have become, nats per token."""
    objective: float
    """reward - the recipe's tax weight times tax."""


def search_blocks(
    expert: Expert,
    backbone: Backbone,
    pairs: Sequence[Lesson],
    benign: Sequence[Reply],
    plan: BlocksRecipe,
    *,
    first: int,
    beta: float,
) -> Iterator[Trial]:
    """Try scales of one expert; yields each setting as it is measured, and the best of them once more as the last.

    Args:
        expert: As trained.
        backbone: Bare; it is bare again afterwards.
        pairs: Prompts with a good and a worse reply, of rows that no expert was trained on.
        benign: Prompts with the bare backbone's own replies.
        plan: Number of blocks, factors to try, weight of the tax.
        first: l_r.
        beta: As in training.

    Raises:
        DataError: No pairs or no benign replies.
    """
    usable = [p for p in pairs if p.worse is not None]
    if not usable or not benign:
        raise DataError(
            f"blocks of {expert.dimension!r}: {len(usable)} pairs and {len(benign)} benign replies",
            hint="blocks.pairs and blocks.benign of the recipe name the rows; both are needed",
        )
    with _Scalable(backbone, expert, first, plan.count) as scalable:
        runner = Runner(backbone, scalable.gates, first)
        measure = _measure(runner, expert.dimension, usable, benign, plan, beta)
        best = measure(scalable, (1.0,) * plan.count)
        yield best
        for _ in range(_ROUNDS):
            before = best
            for block in range(plan.count):
                for factor in plan.factors:
                    blocks = (*best.blocks[:block], factor, *best.blocks[block + 1 :])
                    if blocks != best.blocks:
                        trial = measure(scalable, blocks)
                        yield trial
                        best = max(best, trial, key=lambda t: t.objective)
            if best is before:
                break
        yield best


def _measure(
    runner: Runner,
    dimension: str,
    pairs: Sequence[Lesson],
    benign: Sequence[Reply],
    plan: BlocksRecipe,
    beta: float,
) -> Callable[[_Scalable, tuple[float, ...]], Trial]:
    replies = [r for p in pairs for r in (p.good, p.worse) if r is not None]
    alone = Weights.from_mapping({"base": 0.0} | {d: float(d == dimension) for d in DIMENSIONS})
    every = [*replies, *benign]
    bare = np.array(runner.log_likelihoods(every, {"bare": [_BARE] * len(every)})["bare"])
    tokens = sum(r.tokens for r in benign)
    known: dict[tuple[float, ...], Trial] = {}

    def measured(scalable: _Scalable, blocks: tuple[float, ...]) -> Trial:
        if blocks not in known:
            scalable.set(blocks)
            found = np.array(runner.log_likelihoods(every, {"it": [alone] * len(every)})["it"])
            gain = (found - bare)[: len(replies)]
            reward = float((1 / (1 + np.exp(-beta * (gain[::2] - gain[1::2])))).mean())
            tax = float((bare - found)[len(replies) :].sum() / tokens)
            known[blocks] = Trial(blocks=blocks, reward=reward, tax=tax, objective=reward - plan.tax * tax)
        return known[blocks]

    return measured


class _Scalable:
    """One expert on the backbone, its blocks scaled in place; the backbone is bare again after the block."""

    def __init__(self, backbone: Backbone, expert: Expert, first: int, blocks: int) -> None:
        self._stack = backbone.stack
        others = [Expert(dimension=d, scale=1.0, factors={}) for d in DIMENSIONS]
        mixed = [expert if e.dimension == expert.dimension else e for e in others]
        self.gates = install_mixture(self._stack.model, mixed)
        self._layers: list[tuple[str, MixtureLinear, Tensor, int]] = [
            (name, module, module.up.clone(), block_of(name, blocks, first, self._stack.depth))
            for name, module in self._stack.model.named_modules()
            if isinstance(module, MixtureLinear)
        ]

    def set(self, blocks: Sequence[float]) -> None:
        with torch.no_grad():
            for _, module, up, block in self._layers:
                module.up.copy_(up * blocks[block])

    def __enter__(self) -> _Scalable:
        return self

    def __exit__(self, *_: object) -> None:
        self.gates.set(None)
        for name, module, _, _ in self._layers:
            parent, _, leaf = name.rpartition(".")
            setattr(self._stack.model.get_submodule(parent), leaf, module.base)


def write_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Keep what was tried, one line each."""
    lines = [
        f"{','.join(f'{b:g}' for b in t.blocks)}\t{t.reward:.4f}\t{t.tax:.4f}\t{t.objective:.4f}\n" for t in trials
    ]
    path.write_text("blocks\treward\ttax\tobjective\n" + "".join(lines), encoding="utf-8")


def read_blocks(path: Path) -> tuple[float, ...]:
    """The chosen scales, the last line that `write_trials` wrote.

    Raises:
        BundleError: The file is not one of these.
    """
    try:
        last = path.read_text(encoding="utf-8").splitlines()[-1]
        return tuple(float(b) for b in last.split("\t")[0].split(","))
    except (OSError, ValueError, IndexError) as error:
        raise BundleError(f"{path}: cannot be read as scales ({error})", hint="remove it and search again") from error
