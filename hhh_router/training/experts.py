"""Train one expert: response-masked supervised fine-tuning of a LoRA on the layers the router has already passed.

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
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hhh_router.data.examples import Example
from hhh_router.errors import ConfigError, ContextTooLong, DataError, HHHRouterError
from hhh_router.model.base import Backbone
from hhh_router.training.recipe import ExpertsRecipe, Recipe
from hhh_router.types import ReadRequest

CHECKPOINT_STEPS = 25
_IGNORE = -100


class TrainingDiverged(HHHRouterError):
    """The loss became NaN or infinite."""

    code = "training_diverged"


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one training conversation; the loss counts from ``reply_start`` on."""

    ids: tuple[int, ...]
    reply_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One finished optimiser step."""

    step: int
    steps: int
    loss: float
    """Mean cross-entropy per reply token, nats."""
    drift: float
    """Sum of ||s B A||_F^2 over the adapted layers."""
    tokens: int


def tokenize(examples: Sequence[Example], backbone: Backbone, max_tokens: int) -> list[Row]:
    """Rows with a good reply, each cut to ``max_tokens``; rows whose prompt alone fills the window are left out."""
    rows = []
    for example in examples:
        if example.response is None or any(example.outcomes.values()) or not (example.needs or example.outcomes):
            continue
        try:
            prompt = backbone.encoder.encode(ReadRequest(messages=example.messages)).ids
        except ContextTooLong:
            continue
        reply = [*backbone.encoder.response_ids(example.response), backbone.encoder.end_id]
        if len(prompt) + 4 <= max_tokens:
            rows.append(Row((*prompt, *reply)[:max_tokens], len(prompt)))
    return rows


def train_expert(
    dimension: str, rows: Sequence[Row], backbone: Backbone, recipe: Recipe, folder: Path
) -> Iterator[Progress]:
    """Train the LoRA of one dimension and save it to ``folder/expert`` in PEFT format.

    Args:
        dimension: Which expert; part of the seed.
        rows: From `tokenize`.
        backbone: Its layers get the adapters and are bare again afterwards.
        recipe: Sizes, rates and seed.
        folder: Work folder; a checkpoint found there is continued.

    Yields:
        One `Progress` per optimiser step.

    Raises:
        DataError: Too few rows for one batch.
        TrainingDiverged: NaN or infinite loss; the last good checkpoint stays.
    """
    plan = recipe.experts
    if len(rows) < plan.batch_rows:
        raise DataError(f"expert {dimension!r}: {len(rows)} usable rows, one batch needs {plan.batch_rows}")
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
        optimiser = torch.optim.AdamW(masters, lr=plan.learning_rate, weight_decay=0.0)
        run = hashlib.sha256(f"{seed}{plan.model_dump_json(exclude={'mixes'})}{rows}".encode()).hexdigest()
        done = _resume(folder, run, masters, optimiser)
        for step in range(done, len(batches)):
            for (_, p), master in zip(parameters, masters, strict=True):
                p.data.copy_(master)
                p.grad = None
            loss, tokens = _reply_loss(stack, [rows[i] for i in batches[step]], first=recipe.first_adapted_layer)
            drift = _drift(model, config.lora_alpha / config.r)
            (loss + plan.drift * drift).backward()
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(
                    f"expert {dimension!r}: loss is {loss.item()} at step {step}", hint="lower experts.learning_rate"
                )
            for group in optimiser.param_groups:
                group["lr"] = plan.learning_rate * _schedule(step, len(batches), plan.warmup_steps)
            for (_, p), master in zip(parameters, masters, strict=True):
                master.grad = None if p.grad is None else p.grad.float()
            nn.utils.clip_grad_norm_(masters, 1.0)
            optimiser.step()
            if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == len(batches):
                _checkpoint(folder, run, step + 1, masters, optimiser)
            yield Progress(step=step + 1, steps=len(batches), loss=loss.item(), drift=drift.item(), tokens=tokens)
        for (_, p), master in zip(parameters, masters, strict=True):
            p.data.copy_(master)
        save_expert(model, config, folder / "expert")
    finally:
        model.unload()


def _batches(rows: Sequence[Row], plan: ExpertsRecipe, rng: random.Random) -> list[list[int]]:
    """Batches of rows of similar length, in random order."""
    batches: list[list[int]] = []
    for _ in range(plan.epochs):
        jittered = sorted(range(len(rows)), key=lambda i: len(rows[i].ids) + rng.uniform(-8, 8))
        epoch = [jittered[i : i + plan.batch_rows] for i in range(0, len(rows) - plan.batch_rows + 1, plan.batch_rows)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def _reply_loss(stack, rows: Sequence[Row], *, first: int) -> tuple[Tensor, int]:  # type: ignore[no-untyped-def]
    """Mean cross-entropy over reply tokens; logits are made for those positions only."""
    longest = max(len(r.ids) for r in rows)
    pad = stack.config.pad_token_id or 0
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, _IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        targets[i, row.reply_start - 1 : len(row.ids) - 1] = torch.tensor(row.ids[row.reply_start :])
    ids, mask, targets = (t.to(stack.device) for t in (ids, mask, targets))
    state = stack.begin(ids, attention_mask=mask)
    with torch.no_grad():  # nothing below the first adapted layer learns
        stack.run(state, first)
    hidden = stack.run(state, stack.depth)
    wanted = targets != _IGNORE
    loss = nn.functional.cross_entropy(stack.logits(hidden[wanted]).float(), targets[wanted])
    return loss, int(mask.sum())


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
        tensors |= {f"{k}.{i}": optimiser.state[master][k] for k in ("exp_avg", "exp_avg_sq")}
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
    tensors = load_file(path, device=str(masters[0].device))
    with torch.no_grad():
        for i, master in enumerate(masters):
            master.copy_(tensors[f"master.{i}"])
            optimiser.state[master] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{i}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{i}"],
            }
    return step


def save_expert(model: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Write an adapter in plain PEFT format: ``adapter_model.safetensors`` and ``adapter_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in get_peft_model_state_dict(model).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    saved = json.loads(json.dumps(config.to_dict(), default=lambda o: sorted(o) if isinstance(o, set) else str(o)))
    saved["base_model_name_or_path"] = None  # the manifest names the backbone; a path of this machine would mislead
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
