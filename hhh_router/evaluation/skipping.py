"""Fit which experts need not be run where: the highest thresholds whose KL divergence stays within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hhh_router.bundle import Bundle
from hhh_router.calibration import Calibrators
from hhh_router.data.examples import data_hash
from hhh_router.errors import BundleError
from hhh_router.evaluation.quantise import MAX_TOKENS, draw_prompts, read_whole, routed_weights
from hhh_router.model.base import Backbone, compute_dtype
from hhh_router.model.decoded import skipped_nats
from hhh_router.model.experts import load_experts
from hhh_router.model.mixture import Skip, install_mixture
from hhh_router.model.quantisation import measured_parts
from hhh_router.model.runner import Reply, Runner
from hhh_router.model.skipping import SkipRecord
from hhh_router.model.worker import open_reader
from hhh_router.settings import Settings
from hhh_router.training.features import encode_cut
from hhh_router.types import DIMENSIONS, ReadRequest, Weights

LEVELS: tuple[float, ...] = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Thresholds that are tried in each block."""
_TRIES = 12  # combinations that are measured, the best first, until one holds


def fit_skipping(
    bundle: Bundle,
    data: Path,
    *,
    settings: Settings,
    budget_nats: float,
    blocks: int,
    replies: int,
    max_tokens: int,
    seed: int,
    on_progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> SkipRecord:
    """Find the thresholds that leave most experts out and move the next token by ``budget_nats`` at most.

    Each block's thresholds are measured alone; combinations whose divergences add up to the budget are then measured
    together, the one that leaves most out first.

    Args:
        bundle: With heads and calibrators: prompts are weighted as its router weights them, without a policy.
        data: Folder of data sets; rows are those of split ``calibrate``.
        settings: Threads and precision.
        budget_nats: Mean KL divergence of a next token.
        blocks: Blocks of layers, each with a threshold.
        replies: Harmless prompts that are answered, and half as many others.
        max_tokens: Of each greedy reply.
        seed: Of the draw of rows.
        on_progress: Told stage, done, total, note.

    Raises:
        BundleError: No calibrators, or more blocks than adapted layers.
        DataError: No rows to draw.
    """
    manifest = bundle.manifest
    if manifest.heads is None or manifest.calibrators is None:
        raise BundleError(f"{bundle.root}: has no heads or no calibrators", hint="train and calibrate it first")
    first, depth = manifest.first_adapted_layer, manifest.backbone.layers
    if not 1 <= blocks <= depth - first:
        raise BundleError(f"{blocks} blocks: the bundle adapts {depth - first} layers", hint="give fewer blocks")
    dtype = compute_dtype(manifest.backbone, settings.device, settings.dtype)
    calibrators = Calibrators.load(
        bundle.root / manifest.calibrators.path, heads_sha256=manifest.heads.sha256, dtype=dtype
    )
    asked = draw_prompts(data, replies, seed)
    reader, encoder = open_reader(bundle, settings)
    backbone = Backbone(stack=reader.stack, encoder=encoder)
    gates = install_mixture(reader.stack.model, load_experts(bundle), Skip((0.0,) * blocks, first, depth))
    texts = [encode_cut(encoder, ReadRequest(messages=e.messages), MAX_TOKENS) for e in asked]
    weights = [routed_weights(calibrators, s) for s in read_whole(reader, texts)]
    said = Runner(backbone, gates, first).generate(
        [t.ids for t in texts], weights, max_tokens=max_tokens,
        on_rows=lambda done, total: on_progress("replies", done, total, ""),
    )  # fmt: skip
    rows = [
        (Reply((*t.ids, *encoder.response_ids(reply)), len(t.ids)), w)
        for t, reply, w in zip(texts, said, weights, strict=True)
        if reply
    ]
    tokens, weights = sum(r.tokens for r, _ in rows), [w for _, w in rows]
    if not tokens:
        raise BundleError(f"{bundle.root}: no prompt was answered with anything", hint="ask for longer replies")

    def measured(trials: Sequence[tuple[float, ...]], stage: str) -> np.ndarray:
        sums = np.zeros(len(trials))
        for number, (row, own) in enumerate(rows, start=1):
            sums += skipped_nats(backbone, gates, row, own, [Skip(t, first, depth) for t in trials])
            on_progress(stage, number, len(rows), f"{len(trials)} trials")
        return np.maximum(sums, 0.0) / tokens

    alone = [tuple(level if k == b else 0.0 for k in range(blocks)) for b in range(blocks) for level in LEVELS[1:]]
    nats = dict(zip(alone, measured(alone, "each block"), strict=True))
    chosen, found = _best(nats, weights, blocks, budget_nats, lambda trial: float(measured([trial], "together")[0]))
    skipped, idle = shares(chosen, weights)
    return SkipRecord(
        thresholds=chosen,
        parts=measured_parts(bundle),
        budget_nats=budget_nats,
        mean_nats=found,
        skipped=skipped,
        idle=idle,
        n=tokens,
        replies=len(rows),
        seed=seed,
        data_sha256=data_hash(asked),
        dtype=dtype,
    )


def _best(
    alone: dict[tuple[float, ...], float],
    weights: Sequence[Weights],
    blocks: int,
    budget: float,
    measured: Callable[[tuple[float, ...]], float],
) -> tuple[tuple[float, ...], float]:
    """The combination that leaves most out within the budget, and its divergence; none left out where nothing fits."""

    def expected(trial: tuple[float, ...]) -> float:
        single = (tuple(t if k == b else 0.0 for k in range(blocks)) for b, t in enumerate(trial))
        return sum(alone[one] for one in single if any(one))

    likely = [t for t in itertools.product(LEVELS, repeat=blocks) if any(t) and expected(t) <= budget]
    # what leaves out as much with less divergence first: a threshold that nobody is under is no gain
    likely.sort(key=lambda t: (*(-x for x in shares(t, weights)), expected(t)))
    for trial in likely[:_TRIES]:
        if (nats := measured(trial)) <= budget:
            return trial, nats
    return (0.0,) * blocks, 0.0


def shares(thresholds: Sequence[float], weights: Sequence[Weights]) -> tuple[float, float]:
    """Of experts with a weight, over rows and blocks, the share left out; of rows and blocks, those with none left.

    >>> shares((0.2, 0.5), [Weights(0.5, 0.4, 0.1, 0.0)])
    (0.75, 0.5)
    """
    g = np.array([[w[d] for d in DIMENSIONS] for w in weights])[:, None]  # (rows, 1, experts)
    on = np.broadcast_to(g > 0, (len(g), len(thresholds), g.shape[2]))
    kept = on & (g >= np.array(thresholds)[None, :, None])
    skipped = 1 - kept.sum() / on.sum() if on.any() else 0.0
    return float(skipped), float((~kept.any(axis=2)).mean())
