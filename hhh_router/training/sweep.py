"""Optimisers and learning rates compared on one expert: short runs on the same lessons, judged on pairs kept apart."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hhh_router.errors import DataError
from hhh_router.model.experts import load_expert
from hhh_router.training.blocks import Trial, search_blocks
from hhh_router.training.build import Workshop, scale_rows, told
from hhh_router.training.experts import TrainingDiverged, train_expert
from hhh_router.training.lessons import lessons
from hhh_router.training.processes import refuse_several

Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One short training, and what came of it."""

    optimizer: Optimizer
    learning_rate: float
    loss: float | None
    """Mean cross-entropy over the last quarter of the steps, nats per token; None where it diverged."""
    drift: float | None
    """Sum of ||s B A||_F^2 at the end."""
    trial: Trial | None
    """Reward, tax and objective of the expert as trained, on ``experts.blocks`` of the recipe."""

    @property
    def figures(self) -> dict[str, float | None]:
        """What is compared, by name; None where the run diverged."""
        trial = self.trial
        return {
            "loss": self.loss,
            "drift": self.drift,
            "reward": trial and trial.reward,
            "tax": trial and trial.tax,
            "objective": trial and trial.objective,
        }


def sweep(
    shop: Workshop, dimension: str, *, optimizers: Sequence[Optimizer], rates: Sequence[float], steps: int
) -> Iterator[Run]:
    """Train an expert shortly with every optimiser at every rate; all see the same lessons in the same order.

    Work goes to ``sweep`` in the work folder, where a killed run goes on; the bundle is left alone.

    Args:
        shop: Its recipe names the lessons, and the pairs and benign prompts that judge.
        dimension: Which expert.
        optimizers: As `ExpertsRecipe.optimizer`.
        rates: Peak learning rates.
        steps: Batches a run, with warm-up and decay over them as in a whole training.

    Raises:
        DataError: The recipe has no ``experts.blocks.pairs`` for this expert, or too few lessons for so many steps.
    """
    recipe, plan = shop.recipe, shop.recipe.experts
    refuse_several("train sweep")
    backbone = shop.backbone()
    pairs, benign = scale_rows(shop, dimension, backbone)
    every = lessons(
        plan.mixes[dimension], plan, backbone, shop.data, seed=recipe.seed, folder=shop.work / "experts",
        on_rows=told(shop, f"replies for {dimension}"),
    )  # fmt: skip
    if len(every) < steps * plan.batch_rows:
        raise DataError(
            f"{steps} steps of {plan.batch_rows} need {steps * plan.batch_rows} lessons, the mix has {len(every)}",
            hint="ask for fewer steps",
        )
    rows = random.Random(recipe.seed).sample(every, steps * plan.batch_rows)
    as_trained = recipe.experts.blocks.model_copy(update={"count": 1, "factors": ()})
    for optimizer in optimizers:
        for rate in rates:
            changed = {"optimizer": optimizer, "learning_rate": rate, "learning_rates": {}, "epochs": 1}
            tried = recipe.model_copy(update={"experts": plan.model_copy(update=changed)})
            folder = shop.work / "sweep" / f"{dimension}-{optimizer}-{rate:g}-{steps}"
            kept = folder / "steps.json"  # a run that goes on must not forget what it lost before
            seen: list[tuple[float, float]] = json.loads(kept.read_bytes()) if kept.is_file() else []
            try:
                for step in train_expert(dimension, rows, backbone, tried, folder):
                    seen = [*seen[: step.step - 1], (step.loss, step.drift)]
                    kept.write_text(json.dumps(seen), encoding="utf-8")
                    shop.on_progress(folder.name, step.step, step.steps, f"loss {step.loss:.3f}")
            except TrainingDiverged:
                yield Run(optimizer=optimizer, learning_rate=rate, loss=None, drift=None, trial=None)
                continue
            expert = load_expert(folder / "expert", dimension)
            found = search_blocks(
                expert, backbone, pairs, benign, as_trained, first=recipe.first_adapted_layer, beta=plan.beta
            )
            trial = list(found)[-1]
            last = [loss for loss, _ in seen[-max(1, steps // 4) :]]
            yield Run(
                optimizer=optimizer, learning_rate=rate, loss=sum(last) / len(last), drift=seen[-1][1], trial=trial
            )


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """One line a run, tab-separated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["optimizer\tlearning_rate\tloss\tdrift\treward\ttax\tobjective\n"]
    for run in runs:
        shown = ["diverged" if x is None else f"{x:.4f}" for x in run.figures.values()]
        lines.append("\t".join([run.optimizer, f"{run.learning_rate:g}", *shown]) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
