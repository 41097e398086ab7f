"""Train the need and outcome heads on token states of the frozen lower layers."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hhh_router.data.examples import Example, data_hash
from hhh_router.errors import DataError
from hhh_router.model.heads import SIDES, Heads, Pooled, Ragged, Side, Views
from hhh_router.training.experts import TrainingDiverged
from hhh_router.training.features import TokenStates
from hhh_router.training.formulations import GateLoss, origins
from hhh_router.training.recipe import RouterRecipe
from hhh_router.types import DIMENSIONS, NEEDS, OUTCOMES

_GATED = len(DIMENSIONS)  # the first needs, see `NEEDS`
_SCALE_ROWS = 4000  # rows behind the mean and deviation of each coordinate


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One pass over the rows."""

    number: int
    epochs: int
    loss: float
    """Mean masked cross-entropy plus Brier term, and under another formulation the gate's loss."""


def labels(examples: Sequence[Example], balance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Targets and their weights, both (rows, needs + outcomes); weight 0 where a label is unknown.

    Args:
        examples: Rows.
        balance: A row of a source with n rows counts n to the power of minus this: 0 counts rows, 1 counts sources.
    """
    targets = torch.zeros(len(examples), len(NEEDS) + len(OUTCOMES))
    weights = torch.zeros_like(targets)
    rows = Counter(e.source for e in examples)
    for row, example in enumerate(examples):
        known = {**example.needs, **example.outcomes}
        for column, name in enumerate((*NEEDS, *OUTCOMES)):
            if name in known:
                targets[row, column] = known[name]
                weights[row, column] = example.weight * rows[example.source] ** -balance
    return targets, weights


def train_heads(
    examples: Sequence[Example],
    given: TokenStates,
    plan: RouterRecipe,
    seed: int,
    *,
    folder: Path | None = None,
    device: str = "cpu",
) -> Iterator[Epoch | Heads]:
    """Train heads; yields an `Epoch` after each pass and the trained `Heads` last.

    Args:
        examples: Labelled rows, aligned with ``given``; rows of all three modes.
        given: Their token states, from `features.token_states`.
        plan: Sizes and rates, and the formulation of the needs.
        seed: Of initial weights, order and dropout.
        folder: Where a checkpoint is kept after each epoch; a killed run goes on from it to the same result.
        device: Where the heads are trained, and stay.

    Raises:
        DataError: A head has labels of one class only, or a formulation lacks rows of an origin.
        TrainingDiverged: NaN loss.
    """
    targets, weights = labels(examples, plan.balance)
    for column, name in enumerate((*NEEDS, *OUTCOMES)):
        known = targets[weights[:, column] > 0, column]
        if len(set(known.tolist())) < 2:
            raise DataError(
                f"head {name!r}: every one of its {len(known)} labels is the same", hint="add rows of the other class"
            )
    weights = weights / weights[weights > 0].mean()
    modes = given.modes
    # every row as it is for its outcomes, and every prompt alone (modality dropout) for needs and outlook
    as_given = weights * torch.tensor([0.0] * len(NEEDS) + [1.0] * len(OUTCOMES))
    read_alone = [m != "response" and not e.answer_side for m, e in zip(modes, examples, strict=True)]
    alone = weights * torch.tensor(read_alone)[:, None]
    gated = not plan.formulation.is_ours  # the dimensions' needs share one softmax; all else is as in ours
    if gated:
        origin, counts = origins(targets[:, :_GATED], alone[:, :_GATED])
        alone[:, :_GATED] = 0
        origin, counts = origin.to(device), counts.to(device)
    targets, as_given, alone = targets.to(device), as_given.to(device), alone.to(device)
    heads = _new_heads(given, plan, seed).to(device)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    steps = math.ceil(len(examples) / plan.batch_rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=plan.learning_rate, total_steps=steps * plan.epochs, pct_start=0.1
    )
    run = hashlib.sha256(f"{seed}{plan.model_dump_json(exclude={'mix'})}{data_hash(examples)}".encode()).hexdigest()
    done = _resume(folder, run, heads, optimiser) if folder else 0
    if done:
        optimiser.step()  # without gradients it changes nothing; torch warns of a schedule that goes on before any step
    for _ in range(done * steps):
        schedule.step()
    for epoch in range(done, plan.epochs):
        heads.train()
        torch.manual_seed(seed * 1000 + epoch)
        order = list(range(len(examples)))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        gate_loss = GateLoss(plan.formulation)
        total = 0.0
        for start in range(0, len(order), plan.batch_rows):
            rows = order[start : start + plan.batch_rows]
            prompt, response = given.sides(rows, device)
            sides = (_features_only(heads, prompt, "prompt"), _features_only(heads, response, "response"))
            views = Views(*sides, [modes[i] for i in rows])
            loss = _loss(heads(views), targets[rows], as_given[rows], plan.brier)
            scores = heads(views.alone())
            loss = loss + _loss(scores, targets[rows], alone[rows], plan.brier)
            if gated:
                loss = loss + gate_loss(scores[:, :_GATED], origin[rows], counts[rows])
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
        if folder:
            _checkpoint(folder, run, epoch + 1, heads, optimiser)
        yield Epoch(number=epoch + 1, epochs=plan.epochs, loss=total / len(order))
    yield heads.eval()


def _features_only(heads: Heads, given: Ragged, side: Side) -> Pooled:
    features = heads.features(given, side)
    return Pooled(features=features, summary=features.new_zeros(len(features), 0))  # no distance is asked for here


def _loss(logits: Tensor, targets: Tensor, weights: Tensor, brier: float) -> Tensor:
    """Cross-entropy and Brier term per head, each averaged over its own labelled rows, so that rare labels count."""
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    squared = (logits.sigmoid() - targets) ** 2
    per_head = ((entropy + brier * squared) * weights).sum(0) / weights.sum(0).clamp(min=1.0)
    return per_head.sum()


@torch.no_grad()
def _new_heads(given: TokenStates, plan: RouterRecipe, seed: int) -> Heads:
    """Heads with random weights that know the scale of the states and the support of the rows."""
    torch.manual_seed(seed)
    _, layers, dim = given.states.shape
    heads = Heads(
        layers=layers, dim=dim, width=plan.width, queries=plan.queries, needs=NEEDS, outcomes=OUTCOMES,
        dropout=plan.dropout,
    )  # fmt: skip
    rows = random.Random(seed).sample(range(len(given.entries)), min(_SCALE_ROWS, len(given.entries)))
    for side, part in zip(SIDES, given.sides(rows), strict=True):
        states = part.states.float()
        getattr(heads, f"{side}_mean").copy_(states.mean(0))
        getattr(heads, f"{side}_scale").copy_(states.std(0).clamp(min=1e-4))
    heads.fit_support(*given.summaries(), given.modes)
    return heads


def _checkpoint(folder: Path, run: str, epochs: int, heads: Heads, optimiser: torch.optim.Optimizer) -> None:
    tensors = {f"heads.{name}": t for name, t in heads.state_dict().items()}
    for i, parameter in enumerate(heads.parameters()):
        tensors |= {f"{k}.{i}": optimiser.state[parameter][k] for k in ("exp_avg", "exp_avg_sq", "step")}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "heads.partial"
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, {"run": run, "epochs": str(epochs)})
    partial.replace(folder / "heads.safetensors")


def _resume(folder: Path, run: str, heads: Heads, optimiser: torch.optim.Optimizer) -> int:
    """Load a checkpoint of the same rows, sizes and seed; epochs done, 0 without one."""
    path = folder / "heads.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        written = file.metadata()
    if written.get("run") != run:
        return 0  # of an earlier recipe: heads cost minutes and their states are kept, so they are simply made anew
    tensors = load_file(path)
    heads.load_state_dict({n.removeprefix("heads."): t for n, t in tensors.items() if n.startswith("heads.")})
    for i, parameter in enumerate(heads.parameters()):
        moments = {k: tensors[f"{k}.{i}"].to(parameter.device) for k in ("exp_avg", "exp_avg_sq")}
        optimiser.state[parameter] = {**moments, "step": tensors[f"step.{i}"]}  # which AdamW keeps on the CPU
    return int(written["epochs"])
