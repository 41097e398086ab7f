"""The other side of each comparison: the same weights in transformers and PEFT, loaded as their users would.

Decode loops here are the leanest that transformers allows: a cache, an argmax, no sampler, no text, no heads. Where
that favours anybody, it is the baseline.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicCache

from benchmarks.lab import Lab
from benchmarks.timing import leaves_no_team
from hhh_router.bundle import Bundle
from hhh_router.model.base import quiet_transformers
from hhh_router.model.experts import load_experts
from hhh_router.types import DIMENSIONS, Weights


@leaves_no_team
def load(lab: Lab, dtype: str | None = None) -> Any:
    """The bare backbone in transformers, in the engine's precision unless another is named."""
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            lab.folder, dtype=getattr(torch, dtype or lab.dtype), local_files_only=True
        )
    return model.eval().requires_grad_(False).to(lab.device)


@leaves_no_team
def load_merged(lab: Lab, weights: Weights) -> Any:
    """The backbone with one mixture merged into its weights: transformers at its fastest, but for one mixture only."""
    model = load(lab)
    with torch.no_grad():
        for expert in load_experts(lab.bundle):
            share = expert.scale * weights[expert.dimension]
            if share == 0:
                continue
            for module, factor in expert.factors.items():
                weight = model.get_submodule(module).weight
                weight += (share * factor.up.float() @ factor.down.float()).to(weight)
    return model


@contextmanager
def peft_folders(bundle: Bundle) -> Iterator[dict[str, Path]]:
    """The experts as PEFT folders; their per-block scales are written into the factors, for PEFT has no such thing."""
    with TemporaryDirectory() as scratch:
        found = {}
        for expert in load_experts(bundle):
            folder = found[expert.dimension] = Path(scratch) / expert.dimension
            folder.mkdir()
            trained = bundle.expert_weights(expert.dimension).parent / "adapter_config.json"
            config = json.loads(trained.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
            (folder / trained.name).write_text(json.dumps(config), encoding="utf-8")
            tensors = {}
            for module, factor in expert.factors.items():
                tensors[f"base_model.model.{module}.lora_A.weight"] = factor.down.contiguous()
                tensors[f"base_model.model.{module}.lora_B.weight"] = factor.up.contiguous()
            save_file(tensors, folder / "adapter_model.safetensors")
        yield found


@leaves_no_team
def load_peft(lab: Lab) -> Any:
    """PEFT with all three adapters active at once: their sum on every row, for PEFT has no weights per row."""
    from peft import PeftModel

    model: Any
    with peft_folders(lab.bundle) as folders, _quiet_peft():
        first, *others = DIMENSIONS
        options: dict[str, Any] = {
            "autocast_adapter_dtype": False
        }  # adapters in the backbone's precision, which is the faster way
        model = PeftModel.from_pretrained(load(lab), folders[first], adapter_name=first, **options)
        for name in others:
            model.load_adapter(folders[name], adapter_name=name, **options)
    model.base_model.set_adapter(list(DIMENSIONS))
    return model.eval().requires_grad_(False)


@leaves_no_team
def load_xlora(lab: Lab) -> Any:
    """PEFT's X-LoRA over the three experts. Its classifier is untrained: what it says costs the same."""
    from peft import XLoraConfig, get_peft_model

    model = load(lab)
    model.config.use_cache = False  # X-LoRA refuses a cache
    with peft_folders(lab.bundle) as folders, _quiet_peft():
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            xlora_depth=1,
            # peft 0.21 loads them as "0", "1", "2" and activates them by the names given here
            adapters={str(i): str(folders[name]) for i, name in enumerate(DIMENSIONS)},
        )
        return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


@torch.inference_mode()
def decode_rate(lab: Lab, models: Sequence[Any], rows: int, tokens: int) -> float:
    """Tokens/s of a batch in transformers, prefill left out.

    Args:
        lab: Whose prompts are continued.
        models: Several are an ensemble: each reads every token, and their logits are averaged.
        rows: Batch size.
        tokens: Decoded per row.
    """
    ids = prompt_batch(lab, rows)
    caches = [DynamicCache(config=model.config) for model in models]
    token = _likeliest(models, caches, ids)
    lab.sync()
    started = perf_counter()
    for _ in range(tokens):
        token = _likeliest(models, caches, token)
    lab.sync()
    return rows * tokens / (perf_counter() - started)


def _likeliest(models: Sequence[Any], caches: Sequence[DynamicCache], ids: Tensor) -> Tensor:
    found = [
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        for model, cache in zip(models, caches, strict=True)
    ]
    logits = found[0] if len(found) == 1 else torch.stack(found).mean(0)
    return logits.argmax(-1, keepdim=True)  # (B, 1)


def prompt_batch(lab: Lab, rows: int, tokens: int | None = None) -> Tensor:
    """Prompts of one length, so that no baseline has to pad: (B, T). The longest lose a token or two in front."""
    rows_of_ids = lab.ids(lab.prompts(rows, tokens or lab.sizes.prompt_tokens))
    shortest = min(map(len, rows_of_ids))
    return torch.tensor([ids[-shortest:] for ids in rows_of_ids], device=lab.device)


def exactly(lab: Lab, tokens: int) -> GenerationConfig:
    """Greedy replies of exactly so many tokens."""
    end = lab.encoder.end_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=end, pad_token_id=end
    )


def generate_rate(lab: Lab, model: Any, batches: Sequence[Tensor], tokens: int) -> float:
    """Tokens/s of transformers' own ``generate`` over some batches, one after the other, prefill included."""
    config = exactly(lab, tokens)
    lab.sync()
    started = perf_counter()
    with torch.inference_mode(), quiet_transformers():
        for ids in batches:
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            assert out.shape[1] == ids.shape[1] + tokens
    lab.sync()
    return sum(len(ids) for ids in batches) * tokens / (perf_counter() - started)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without PEFT's advice to who trains."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
