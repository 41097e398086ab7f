"""Train the need and outcome heads on pooled states of the frozen lower layers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hhh_router.data.examples import Example
from hhh_router.errors import DataError
from hhh_router.model.heads import Heads, Views
from hhh_router.training.experts import TrainingDiverged
from hhh_router.training.recipe import RouterRecipe
from hhh_router.types import DIMENSIONS, OUTCOMES


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One pass over the rows."""

    number: int
    epochs: int
    loss: float
    """Mean masked cross-entropy plus Brier term."""


def labels(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Targets and their weights, both (rows, needs + outcomes); weight 0 where a label is unknown."""
    targets = torch.zeros(len(examples), len(DIMENSIONS) + len(OUTCOMES))
    weights = torch.zeros_like(targets)
    for row, example in enumerate(examples):
        known = {**example.needs, **example.outcomes}
        for column, name in enumerate((*DIMENSIONS, *OUTCOMES)):
            if name in known:
                targets[row, column] = known[name]
                weights[row, column] = example.weight
    return targets, weights


def train_heads(examples: Sequence[Example], views: Views, plan: RouterRecipe, seed: int) -> Iterator[Epoch | Heads]:
    """Train heads; yields an `Epoch` after each pass and the trained `Heads` last.

    Args:
        examples: Labelled rows, aligned with ``views``; rows of all three modes.
        views: Pooled states from `features.pooled`.
        plan: Sizes and rates.
        seed: Of initial weights, order and modality dropout.

    Raises:
        DataError: A head has labels of one class only.
        TrainingDiverged: NaN loss.
    """
    targets, weights = labels(examples)
    for column, name in enumerate((*DIMENSIONS, *OUTCOMES)):
        known = targets[weights[:, column] > 0, column]
        if len(set(known.tolist())) < 2:
            raise DataError(
                f"head {name!r}: every one of its {len(known)} labels is the same", hint="add rows of the other class"
            )
    torch.manual_seed(seed)
    rng = random.Random(seed)
    heads = Heads(
        view=views.prompt.shape[1], width=plan.width, needs=DIMENSIONS, outcomes=OUTCOMES, dropout=plan.dropout
    )
    _fit_scale(heads, views)
    heads.fit_support(views)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    outcomes_only = torch.tensor([0.0] * len(DIMENSIONS) + [1.0] * len(OUTCOMES))
    steps_per_epoch = math.ceil(len(examples) / plan.batch_rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=plan.learning_rate, total_steps=steps_per_epoch * plan.epochs, pct_start=0.1
    )
    for epoch in range(plan.epochs):
        heads.train()
        order = list(range(len(examples)))
        rng.shuffle(order)
        total = 0.0
        for start in range(0, len(order), plan.batch_rows):
            rows = order[start : start + plan.batch_rows]
            given = Views(views.prompt[rows], views.response[rows], [views.modes[i] for i in rows])
            asked = [i for i, r in enumerate(rows) if given.modes[i] != "response" and not examples[r].answer_side]
            alone = Views(given.prompt[asked], given.response[asked], ["prompt"] * len(asked))
            # every row as it is for its outcomes, and every prompt alone (modality dropout) for needs and outlook
            loss = _loss(heads(given), targets[rows], weights[rows] * outcomes_only, plan.brier)
            loss = loss + _loss(heads(alone), targets[rows][asked], weights[rows][asked], plan.brier)
            if not torch.isfinite(loss):
                raise TrainingDiverged(
                    f"router: loss is {loss.item()} in epoch {epoch + 1}", hint="lower router.learning_rate"
                )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        yield Epoch(number=epoch + 1, epochs=plan.epochs, loss=total / len(order))
    yield heads.eval()


def _loss(logits: Tensor, targets: Tensor, weights: Tensor, brier: float) -> Tensor:
    """Cross-entropy and Brier term per head, each averaged over its own labelled rows, so that rare labels count."""
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    squared = (logits.sigmoid() - targets) ** 2
    per_head = ((entropy + brier * squared) * weights).sum(0) / weights.sum(0).clamp(min=1.0)
    return per_head.sum()


@torch.no_grad()
def _fit_scale(heads: Heads, views: Views) -> None:
    for side in ("prompt", "response"):
        rows = [i for i, m in enumerate(views.modes) if m in (side, "both")]
        data = getattr(views, side)[rows]
        getattr(heads, f"{side}_mean").copy_(data.mean(0))
        getattr(heads, f"{side}_scale").copy_(data.std(0).clamp(min=1e-4))
