"""A tiny bundle with random weights: every part is real but small, so tests of wiring and exactness take seconds.

Its numbers mean nothing. It needs the ``model`` extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hhh_router.bundle import (
    BackboneSpec,
    Bundle,
    CalibratorsSpec,
    ExpertSpec,
    HeadsSpec,
    Manifest,
    file_sha256,
    write_manifest,
)
from hhh_router.calibration import CalibrationFile, HeadCalibration, ModeCalibration
from hhh_router.errors import MissingExtra
from hhh_router.types import DIMENSIONS, EXPERTS, NEEDS, OUTCOMES, Mode, Posterior

TINY_LAYERS = 4
TINY_FIRST_ADAPTED = 2
TINY_RANK = 3
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_bundle(root: Path, *, family: str = "llama", seed: int = 0, **config: Any) -> Bundle:
    """Write a random backbone of any supported family, with experts, heads and identity calibrators, and load it.

    Args:
        root: Folder to write; the backbone goes to ``root/backbone``.
        family: transformers ``model_type``.
        seed: Of all weights.
        config: Overrides of the model's config.

    Raises:
        MissingExtra: torch is not installed.
    """
    try:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("model", needed_for="tiny_bundle") from error
    from hhh_router.model.heads import Heads
    from hhh_router.training.experts import save_expert

    torch.manual_seed(seed)
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": TINY_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,  # large, so that different weights give different text
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | config)))
    backbone = root / "backbone"
    model.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    experts = {}
    for number, dimension in enumerate(DIMENSIONS):
        lora = LoraConfig(
            r=TINY_RANK,
            lora_alpha=2 * (number + 1),
            target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
            layers_to_transform=list(range(TINY_FIRST_ADAPTED, depth)),
            init_lora_weights=False,
        )
        adapted = get_peft_model(model, lora)
        save_expert(adapted, lora, root / "experts" / dimension, torch.float32)
        model = adapted.unload()
        weights = root / "experts" / dimension / "adapter_model.safetensors"
        experts[dimension] = ExpertSpec(
            path=f"experts/{dimension}", rank=TINY_RANK, scale=lora.lora_alpha / TINY_RANK, sha256=file_sha256(weights)
        )
    heads = Heads(layers=1, dim=width, width=9, queries=2, needs=NEEDS, outcomes=OUTCOMES)
    for side in ("prompt", "response"):  # support axes are zeros until fitted; any orthogonal rows do here
        axes = getattr(heads, f"support_{side}_axes")
        axes.copy_(torch.nn.functional.pad(torch.eye(min(axes.shape)), (0, 0, 0, max(0, len(axes) - min(axes.shape)))))
    heads.save(root / "heads.safetensors")
    heads_sha256 = file_sha256(root / "heads.safetensors")
    _identity_calibrators(heads_sha256).write(root / "calibrators.json")
    write_manifest(
        root,
        Manifest(
            name=f"tiny-{family}",
            version="0.0.0",
            licence="Apache-2.0",
            commercial_use=True,
            backbone=BackboneSpec(
                source="path:backbone",
                sha256=file_sha256(backbone / "model.safetensors"),
                dtype="float32",
                architecture=family,
                layers=depth,
                hidden_size=width,
                licence="Apache-2.0",
            ),
            first_adapted_layer=TINY_FIRST_ADAPTED,
            experts=experts,
            heads=HeadsSpec(sha256=heads_sha256, read_layers=(TINY_FIRST_ADAPTED,), needs=NEEDS, outcomes=OUTCOMES),
            calibrators=CalibratorsSpec(sha256=file_sha256(root / "calibrators.json")),
            recipe="random",
            recipe_sha256="0" * 64,
            seed=seed,
        ),
    )
    return Bundle.load(root)


def _tokenizer() -> Any:
    """A byte-level tokenizer without merges: every byte is a token, so any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary: Mapping[str, int] = {c: i for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", additional_special_tokens=specials
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _identity_calibrators(heads_sha256: str) -> CalibrationFile:
    same = HeadCalibration(
        method="temperature",
        params={"temperature": 1.0},
        n=30,
        positives=15,
        nll=0.69,
        brier=0.25,
        ece=0.0,
        nll_identity=0.69,
        brier_identity=0.25,
        ece_identity=0.0,
        auroc=0.5,
        candidates={"temperature": 0.69},
    )
    modes: dict[Mode, ModeCalibration] = {
        mode: ModeCalibration(
            n=30,
            distance_limit=1e6,
            needs={} if mode == "response" else dict.fromkeys(NEEDS, same),
            outcomes=dict.fromkeys(OUTCOMES, same),
        )
        for mode in ("prompt", "response", "both")
    }
    return CalibrationFile.create(
        heads_sha256=heads_sha256,
        dtype="float32",
        data_sha256="0" * 64,
        seed=0,
        train_prior=Posterior(*(1 / len(EXPERTS) for _ in EXPERTS)),
        modes=modes,
    )
