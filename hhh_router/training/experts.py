"""Train one expert: a LoRA on the layers the router has already passed, on good replies and, where a lesson has a worse
one, on the preference between the two (direct preference optimisation with the bare backbone as its reference, plus
the good reply's cross-entropy).

The adapters are bf16 like the backbone (autocast is several times slower on a CPU), but the optimiser steps fp32
copies: at our learning rates a bf16 step would often round to nothing. State is saved every few steps, and a killed
run goes on to the same result, since batches and their order follow from the seed alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hhh_router.errors import ConfigError, DataError, HHHRouterError
from hhh_router.model.base import Backbone
from hhh_router.model.runner import Reply, log_likelihood
from hhh_router.model.stack import DecoderStack
from hhh_router.training.lessons import Lesson
from hhh_router.training.processes import ALONE, Processes
from hhh_router.training.recipe import ExpertsRecipe, Recipe

CHECKPOINT_STEPS = 25


class TrainingDiverged(HHHRouterError):
    """The loss became NaN or infinite."""

    code = "training_diverged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One finished optimiser step."""

    step: int
    steps: int
    loss: float
    """Mean cross-entropy per token of the good replies, nats."""
    margin: float | None
    """Mean of beta times how much further than the backbone the expert prefers the good reply, where there are two."""
    drift: float
    """Sum of ||s B A||_F^2 over the adapted layers."""
    tokens: int


def train_expert(
    dimension: str,
    rows: Sequence[Lesson],
    backbone: Backbone,
    recipe: Recipe,
    folder: Path,
    *,
    together: Processes = ALONE,
) -> Iterator[Progress]:
    """Train the LoRA of one dimension and save it to ``folder/expert`` in PEFT format.

    Args:
        dimension: Which expert; part of the seed.
        rows: From `lessons.lessons`.
        backbone: Its layers get the adapters and are bare again afterwards.
        recipe: Sizes, rates and seed.
        folder: Work folder; a checkpoint found there is continued.
        together: Processes that share each batch; the main one writes.

    Yields:
        One `Progress` per optimiser step.

    Raises:
        DataError: Too few rows for one batch.
        ConfigError: More processes than rows of a batch, or a checkpoint of another recipe.
        TrainingDiverged: NaN or infinite loss; the last good checkpoint stays.
    """
    plan = recipe.experts
    if len(rows) < plan.batch_rows:
        raise DataError(f"expert {dimension!r}: {len(rows)} usable rows, one batch needs {plan.batch_rows}")
    if together.count > plan.batch_rows:
        raise ConfigError(
            f"experts.batch_rows: {plan.batch_rows} rows cannot be shared by {together.count} processes",
            hint="raise experts.batch_rows, or launch fewer processes",
        )
    folder.mkdir(parents=True, exist_ok=True)
    seed = f"{recipe.seed}-{dimension}"
    batches = _batches(rows, plan, random.Random(seed))
    torch.manual_seed(int.from_bytes(seed.encode()[-6:], "big"))
    stack = backbone.stack
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=list(plan.target_modules),
        layers_to_transform=list(range(recipe.first_adapted_layer, stack.depth)),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a deprecated alias; nothing a user could change
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        model = get_peft_model(stack.model, config)
    try:
        parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        for _, parameter in parameters:
            parameter.data = parameter.data.to(next(stack.text.parameters()).dtype)
        masters = [p.detach().float().clone().requires_grad_() for _, p in parameters]
        rate = plan.rate(dimension)
        optimiser = _optimiser(masters, plan.optimizer, rate)
        sizes = plan.model_dump_json(exclude={"mixes", "blocks", "learning_rates"})
        run = hashlib.sha256(f"{seed}{sizes}{rate}{rows}".encode()).hexdigest()
        done = _resume(folder, run, masters, optimiser)
        for step in range(done, len(batches)):
            for (_, p), master in zip(parameters, masters, strict=True):
                p.data.copy_(master)
                p.grad = None
            batch = [rows[i] for i in batches[step]]
            own = together.share(batch)
            figures = _losses(model, stack, own, plan, whole=batch, first=recipe.first_adapted_layer)
            drift = _drift(model, config.lora_alpha / config.r)
            (figures[0] + plan.preference * figures[1] + plan.drift / together.count * drift).backward()
            figures, *gradients = together.sums([figures.detach(), *(p.grad.float() for _, p in parameters)])
            loss, preference, margin = figures.tolist()
            if not math.isfinite(loss + preference):
                raise TrainingDiverged(
                    f"expert {dimension!r}: loss is {loss} at step {step}", hint="lower experts.learning_rate"
                )
            for group in optimiser.param_groups:
                group["lr"] = rate * _schedule(step, len(batches), plan.warmup_steps)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            nn.utils.clip_grad_norm_(masters, 1.0)
            optimiser.step()
            if together.is_main and ((step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == len(batches)):
                _checkpoint(folder, run, step + 1, masters, optimiser)
            yield Progress(
                step=step + 1, steps=len(batches), loss=loss, margin=margin if _pairs(batch) else None,
                drift=drift.item(), tokens=sum(len(r.ids) for lesson in batch for r in _replies(lesson)),
            )  # fmt: skip
        for (_, p), master in zip(parameters, masters, strict=True):
            p.data.copy_(master)
        if together.is_main:
            save_expert(model, config, folder / "expert", getattr(torch, recipe.backbone.dtype))
    finally:
        model.unload()


def _optimiser(masters: Sequence[Tensor], name: str, rate: float) -> torch.optim.Optimizer:
    if name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"experts.optimizer: torch {torch.__version__} has no Muon",
                hint="install torch 2.9 or newer, or use adamw",
            )
        # steps as large as AdamW's, so that learning rates mean the same: Liu et al. 2025, section 2.2
        return torch.optim.Muon(masters, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)


def _batches(rows: Sequence[Lesson], plan: ExpertsRecipe, rng: random.Random) -> list[list[int]]:
    """Batches of rows of similar length, in random order.

    Of two replies the longer one counts: lessons that teach a reply meet those that teach to avoid its like.
    """
    batches: list[list[int]] = []
    for _ in range(plan.epochs):
        jittered = sorted(
            range(len(rows)), key=lambda i: max(len(r.ids) for r in _replies(rows[i])) + rng.uniform(-8, 8)
        )
        epoch = [jittered[i : i + plan.batch_rows] for i in range(0, len(rows) - plan.batch_rows + 1, plan.batch_rows)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def _replies(lesson: Lesson) -> list[Reply]:
    return [lesson.good] if lesson.worse is None else [lesson.good, lesson.worse]


def _pairs(batch: Sequence[Lesson]) -> int:
    return sum(lesson.worse is not None for lesson in batch)


def _losses(
    model: PeftModel,
    stack: DecoderStack,
    batch: Sequence[Lesson],
    plan: ExpertsRecipe,
    *,
    whole: Sequence[Lesson],
    first: int,
) -> Tensor:
    """Cross-entropy per token of the good replies, preference loss (0 where no lesson has two replies), mean margin.

    Args:
        model: With its adapter.
        stack: Of the same model.
        batch: The lessons to run.
        plan: Of the recipe.
        whole: The batch these are a share of. Means are taken over it, so the figures of all shares add up to its own.
        first: l_r.

    Returns:
        Shape (3,), float32.

    Source of the preference loss: Rafailov et al. 2023, equation 7.
    """
    rows = [r for lesson in batch for r in _replies(lesson)]
    ids, mask = stack.padded([r.ids for r in rows])
    state = stack.begin(ids, attention_mask=mask)
    paired = [i for i, lesson in enumerate(batch) if lesson.worse is not None]
    with torch.no_grad():  # nothing below the first adapted layer learns
        stack.run(state, first)
        if paired:
            with model.disable_adapter():
                hidden = stack.run(replace(state), stack.depth)
                reference = torch.stack([log_likelihood(stack, hidden[i], r) for i, r in enumerate(rows)])
    hidden = stack.run(state, stack.depth)
    found = torch.stack([log_likelihood(stack, hidden[i], r) for i, r in enumerate(rows)])
    places = list(accumulate((len(_replies(lesson)) for lesson in batch), initial=0))[:-1]
    loss = -found[places].sum() / sum(lesson.good.tokens for lesson in whole)
    if not paired:
        return torch.stack([loss, loss.new_zeros(()), loss.new_zeros(())])
    gain = found - reference
    good = torch.tensor([places[i] for i in paired], device=gain.device)
    margins = plan.beta * (gain[good] - gain[good + 1])
    preference = -nn.functional.logsigmoid(margins).sum() / _pairs(whole)
    return torch.stack([loss, preference, margins.detach().sum() / _pairs(whole)])


def _drift(model: nn.Module, scale: float) -> Tensor:
    """Sum over adapted layers of ||s B A||_F^2, by the trace identity tr((A A^T)(B^T B))."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
            a = module.lora_A["default"].weight.float()
            b = module.lora_B["default"].weight.float()
            total = total + ((a @ a.T) * (b.T @ b)).sum()
    return total * scale**2


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def _checkpoint(folder: Path, run: str, step: int, masters: Sequence[Tensor], optimiser: torch.optim.Optimizer) -> None:
    tensors = {f"master.{i}": m.detach() for i, m in enumerate(masters)}
    for i, master in enumerate(masters):
        tensors |= {f"state.{i}.{k}": v for k, v in optimiser.state[master].items() if isinstance(v, Tensor)}
    temporary = folder / "checkpoint.partial"
    save_file(tensors, temporary, metadata={"step": str(step), "run": run})
    temporary.replace(folder / "checkpoint.safetensors")


def _resume(folder: Path, run: str, masters: Sequence[Tensor], optimiser: torch.optim.Optimizer) -> int:
    """Load a checkpoint of the same rows, sizes and seed; the step to go on from, 0 without one."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        written = file.metadata()
    if written.get("run") != run:
        raise ConfigError(
            f"{path}: a checkpoint of other rows, sizes or another seed",
            hint="remove the folder to train anew, or use the recipe it was made with",
        )
    step = int(written["step"])
    tensors = {  # AdamW counts its steps on the CPU, wherever the factors are
        n: t if n.endswith(".step") else t.to(masters[0].device) for n, t in load_file(path).items()
    }
    with torch.no_grad():
        for i, master in enumerate(masters):
            master.copy_(tensors[f"master.{i}"])
            prefix = f"state.{i}."
            optimiser.state[master] = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return step


def save_expert(model: nn.Module, config: LoraConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write an adapter in plain PEFT format: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        model: With the adapter.
        config: Of the adapter.
        folder: Written into.
        dtype: The backbone's as the bundle states it, whatever precision this machine trained in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(dtype).contiguous() for k, v in get_peft_model_state_dict(model).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    saved = json.loads(json.dumps(config.to_dict(), default=lambda o: sorted(o) if isinstance(o, set) else str(o)))
    saved["base_model_name_or_path"] = None  # the manifest names the backbone; a path of this machine would mislead
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
