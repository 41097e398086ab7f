"""Experts: three LoRA adapters in plain PEFT format, read from safetensors and checked before they are used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError
from hhh_router.types import DIMENSIONS

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# PEFT options that make an adapter more than scale * B A, so that a sum of experts would silently be wrong
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "use_qalora",
    "arrow_config",
)


@dataclass(frozen=True, slots=True)
class Factor:
    """The low-rank update of one linear layer: ``scale * up @ down``."""

    down: Tensor
    """A, shape (r, in)."""
    up: Tensor
    """B, shape (out, r)."""


@dataclass(frozen=True, slots=True)
class Expert:
    """One LoRA."""

    dimension: str
    scale: float
    """lora_alpha / r, or lora_alpha / sqrt(r) for rslora adapters."""
    factors: Mapping[str, Factor]
    """Module name inside the model, such as ``model.layers.16.mlp.up_proj`` → its factors."""


def load_experts(bundle: Bundle) -> list[Expert]:
    """Read the three experts of a bundle, in ``DIMENSIONS`` order.

    Raises:
        BundleError: A file is missing, unreadable, not a plain LoRA, holds NaN or infinity, or acts below l_r.
    """
    experts = [load_expert(bundle.expert_weights(d).parent, d) for d in DIMENSIONS]
    first, depth = bundle.manifest.first_adapted_layer, bundle.manifest.backbone.layers
    for expert in experts:
        for module in expert.factors:
            found = _LAYER.search(f".{module}.")
            if found is None or int(found.group(1)) < first:
                raise BundleError(
                    f"{bundle.root}: expert {expert.dimension!r} adapts {module}, below first_adapted_layer {first}",
                    hint="experts may act only in layers the router has read by then; train with layers_to_transform",
                )
    blocks = (bundle.manifest.experts[d].blocks for d in DIMENSIONS)
    return [scaled(e, factors, first, depth) for e, factors in zip(experts, blocks, strict=True)]


def scaled(expert: Expert, blocks: Sequence[float], first: int, depth: int) -> Expert:
    """The expert with its updates multiplied by one factor per block of the layers ``first`` to ``depth`` - 1.

    Source: heterogeneous model averaging, Lin et al. 2023, for adapters: 0 is the backbone, 1 the trained expert.
    """
    if not blocks:
        return expert
    factors = {
        module: Factor(down=f.down, up=f.up * blocks[block_of(module, len(blocks), first, depth)])
        for module, f in expert.factors.items()
    }
    return replace(expert, factors=factors)


def block_of(module: str, blocks: int, first: int, depth: int) -> int:
    """The block a module's layer belongs to, when the adapted layers are parted evenly.

    >>> [block_of(f"model.layers.{i}.mlp.up_proj", 3, 16, 30) for i in (16, 20, 21, 25, 29)]
    [0, 0, 1, 1, 2]
    """
    found = _LAYER.search(f".{module}.")
    if found is None:
        raise BundleError(f"{module} is in no layer, so it has no block", hint="train with layers_to_transform")
    return (int(found.group(1)) - first) * blocks // (depth - first)


def load_expert(folder: Path, dimension: str) -> Expert:
    """Read one PEFT LoRA folder."""
    config = _read_config(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: missing", hint="restore the file, or train the expert again") from error
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: not readable as safetensors ({error})", hint="restore the file") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise BundleError(f"{path}: unexpected tensor {key!r}", hint="only plain LoRA factors can be mixed")
        if not torch.isfinite(tensor).all():
            raise BundleError(
                f"{path}: {key} holds NaN or infinity", hint="the training diverged; train the expert again"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    factors = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise BundleError(f"{path}: {module} has no matching A and B", hint="restore the file")
        factors[module] = Factor(down=pair["A"], up=pair["B"])
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Expert(dimension=dimension, scale=scale, factors=factors)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path}: cannot be read ({error})", hint="an expert is a PEFT folder; restore the file"
        ) from error
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise BundleError(
            f"{path}: not a plain LoRA (peft_type {config.get('peft_type')!r}, bias {config.get('bias')!r})"
        )
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise BundleError(f"{path}: {', '.join(used)} cannot be mixed exactly", hint="train a plain LoRA")
    return config
