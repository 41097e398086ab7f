"""Figures of decoding: tokens/s once the prompts have been read, and of whole chats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import baselines
from benchmarks.figures import Figure, Measured
from benchmarks.lab import BARE, MIXTURES, Lab, by_turns
from benchmarks.llamacpp import open_llamacpp
from benchmarks.machine import bandwidth_bytes_s
from benchmarks.timing import Side, leaves_no_team, medians, ratios
from hhh_router.model.base import load_backbone
from hhh_router.model.experts import load_experts
from hhh_router.types import DIMENSIONS, Weights

ROWS = 8  # batch size of the figures that compare mixtures
_SLOW_REPEATS = 3  # X-LoRA: minutes a turn on a small machine


def over(lab: Lab, name: str, ours: Side, other: Side, *, most: int | None = None, note: str = "") -> Measured:
    """Our tokens/s over another side's."""
    found = lab.compare({"ours": ours, name: other}, most=most)
    return Measured(values=ratios(found, "ours", name), sides=medians(found, "tokens/s"), note=note)


def mixtures_over_bare(lab: Lab) -> Measured:
    """Three mixtures by turns in the rows of one batch, over the same batch on the bare backbone, in our engine."""
    tokens = lab.sizes.decode_tokens
    return over(
        lab,
        "bare backbone",
        lambda: lab.decode_rate(by_turns(MIXTURES, ROWS), tokens),
        lambda: lab.decode_rate([BARE] * ROWS, tokens),
    )


def _over_loaded(
    load: Callable[[Lab], Any], name: str, rate: Callable[[Lab, Any, int], float], note: str, most: int | None = None
) -> Callable[[Lab], Measured]:
    """Three mixtures in one batch of ours over a baseline that is loaded for this figure alone."""

    def measure(lab: Lab) -> Measured:
        model = load(lab)
        tokens = lab.sizes.xlora_tokens if load is baselines.load_xlora else lab.sizes.decode_tokens
        return over(
            lab,
            name,
            lambda: lab.decode_rate(by_turns(MIXTURES, ROWS), tokens),
            lambda: rate(lab, model, tokens),
            most=most,
            note=note,
        )

    return measure


def _xlora_rate(lab: Lab, model: Any, tokens: int) -> float:
    return baselines.generate_rate(lab, model, [baselines.prompt_batch(lab, ROWS)], tokens)


def _three(lab: Lab) -> list[Any]:
    return [baselines.load_merged(lab, Weights.from_mapping({d: 1.0})) for d in DIMENSIONS]


def chats_over_sequential(lab: Lab) -> Measured:
    """Chats of mixed length asked at once, over ``generate`` on each in turn, all under one mixture.

    transformers has the mixture merged into its weights, which costs it nothing per token and ties it to that mixture.
    """
    count, tokens = lab.sizes.chats, lab.sizes.chat_tokens
    prompts = [lab.prompts(1, n)[0] for n in mixed_lengths(lab)]
    batches = [torch.tensor([ids], device=lab.device) for ids in lab.ids(prompts)]
    model = baselines.load_merged(lab, MIXTURES[0])
    return over(
        lab,
        "transformers, one by one",
        lambda: lab.chats_rate(prompts, [MIXTURES[0]] * count, tokens),
        lambda: baselines.generate_rate(lab, model, batches, tokens),
        note=f"{count} chats of {tokens} tokens each, prompts read too",
    )


def mixed_lengths(lab: Lab) -> list[int]:
    """Prompt lengths of the concurrent chats, in tokens: from one prompt's length to twice that."""
    base = lab.sizes.prompt_tokens
    return [base + (i * 7 % lab.sizes.chats) * base // lab.sizes.chats for i in range(lab.sizes.chats)]


def one_row_over_bf16(lab: Lab) -> Measured:
    """One chat under a mixture, over the bare backbone in transformers in bfloat16."""
    model = baselines.load(lab, "bfloat16")
    tokens = lab.sizes.decode_tokens
    note = f"ours in {lab.dtype}"
    if lab.device.type == "cpu" and lab.dtype != "bfloat16":
        note += "; this CPU emulates bfloat16, which slows transformers down"
    return over(
        lab,
        "transformers bfloat16",
        lambda: lab.decode_rate(MIXTURES[:1], tokens),
        lambda: baselines.decode_rate(lab, [model], 1, tokens),
        note=note,
    )


def one_row_over_llamacpp(lab: Lab) -> Measured:
    """One chat under a mixture, over llama.cpp on the bare backbone in its own quantisation."""
    tokens = lab.sizes.decode_tokens
    ids = lab.ids(lab.prompts(1, lab.sizes.prompt_tokens))[0]
    with open_llamacpp(lab, len(ids) + tokens + 8) as (llama, size):
        found = lab.compare(
            {
                "ours": lambda: lab.decode_rate(MIXTURES[:1], tokens),
                "llama.cpp": lambda: llama.decode_rate(ids, tokens),
            }
        )
        note = f"llama.cpp reads {size / 1e6:.0f} MB a token; {llama.built_for}"
    return Measured(values=ratios(found, "ours", "llama.cpp"), sides=medians(found, "tokens/s"), note=note)


def one_row_of_bandwidth(lab: Lab) -> Measured:
    """Bytes of weights that one chat reads a second, as a share of what memory delivers: 1 is the limit."""
    size = weight_bytes(lab)
    found = lab.compare(
        {
            "ours": lambda: size * lab.decode_rate(MIXTURES[:1], lab.sizes.decode_tokens),
            "memory": lambda: bandwidth_bytes_s(lab.sizes.probe_bytes),
        }
    )
    return Measured(
        values=ratios(found, "ours", "memory"),
        sides=medians(found, "bytes/s"),
        note=f"{size / 1e6:.0f} MB of weights are read for a token; the limit is memory's bytes/s over that",
    )


@leaves_no_team
def weight_bytes(lab: Lab) -> int:
    """Weights that a token of one row touches: every backbone weight once (a tied head is one), and the experts."""
    model = load_backbone(lab.folder, lab.bundle.manifest.backbone, device=str(lab.device), dtype=lab.dtype).stack.model
    backbone = {p.data_ptr(): p.nbytes for p in model.parameters()}
    width = next(model.parameters()).element_size()
    factors = [f for e in load_experts(lab.bundle) for f in e.factors.values()]
    return sum(backbone.values()) + width * sum(f.up.numel() + f.down.numel() for f in factors)


FIGURES = (
    Figure(
        name="decode-8-over-bare",
        title="8 rows, three mixtures, over the bare backbone",
        unit="x",
        target=0.85,
        measure=mixtures_over_bare,
    ),
    Figure(
        name="decode-8-over-peft",
        title="8 rows, three mixtures, over PEFT with three active adapters",
        unit="x",
        target=1.8,
        measure=_over_loaded(
            baselines.load_peft,
            "PEFT",
            lambda lab, model, tokens: baselines.decode_rate(lab, [model], ROWS, tokens),
            "PEFT adds all three adapters to every row; it has no weights per row",
        ),
    ),
    Figure(
        name="decode-8-over-xlora",
        title="8 rows, three mixtures, over PEFT X-LoRA",
        unit="x",
        target=8.0,
        measure=_over_loaded(
            baselines.load_xlora,
            "X-LoRA",
            _xlora_rate,
            "X-LoRA allows no cache: two passes over the whole text a token",
            most=_SLOW_REPEATS,
        ),
    ),
    Figure(
        name="decode-8-over-three-models",
        title="8 rows, three mixtures, over three separate models",
        unit="x",
        target=2.5,
        measure=_over_loaded(
            _three,
            "three models",
            lambda lab, models, tokens: baselines.decode_rate(lab, models, ROWS, tokens),
            "one merged expert each; all three read every row and their logits are averaged",
        ),
    ),
    Figure(
        name="chats-16-over-sequential",
        title="16 concurrent chats over transformers one by one",
        unit="x",
        target=3.5,
        measure=chats_over_sequential,
    ),
    Figure(
        name="decode-1-over-bf16",
        title="1 row, a mixture, over bare transformers in bfloat16",
        unit="x",
        target=2.0,
        measure=one_row_over_bf16,
    ),
    Figure(
        name="decode-1-over-llamacpp",
        title="1 row, a mixture, over llama.cpp on the bare backbone",
        unit="x",
        target=0.5,
        measure=one_row_over_llamacpp,
    ),
    Figure(
        name="decode-1-of-bandwidth",
        title="1 row, share of the memory bandwidth limit",
        unit="share",
        target=None,
        measure=one_row_of_bandwidth,
    ),
)
