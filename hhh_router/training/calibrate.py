"""Fit a bundle's calibrators: read the calibration rows with its heads, then fit each head in each mode."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hhh_router.bundle import Bundle, CalibratorsSpec, file_sha256
from hhh_router.calibration import CalibrationFile, Calibrators, HeadCalibration, ModeCalibration, confidence_features
from hhh_router.calibration.confidence import ConfidenceModel
from hhh_router.calibration.evidence import Gate, PrecisionCheck
from hhh_router.calibration.fit import FOLDS, MIN_ROWS, fit_confidence, fit_distance_limit, fit_head
from hhh_router.calibration.gates import chosen_gate, compare_gates
from hhh_router.calibration.kept import KEPT, KeptRow, write_kept
from hhh_router.data.examples import Example, data_hash, prompt_hash
from hhh_router.errors import DataError
from hhh_router.model.base import Backbone
from hhh_router.model.encode import Encoder
from hhh_router.model.experts import load_experts
from hhh_router.model.heads import Heads
from hhh_router.model.mixture import install_mixture
from hhh_router.model.reader import HeadReader
from hhh_router.model.runner import Runner
from hhh_router.routing import kl_nats, weigh
from hhh_router.training.build import HEADS, Workshop, calibration_examples, write_calibrated
from hhh_router.training.features import BATCH_TOKENS, TokenStates, encode_cut, response_only, scored, token_states
from hhh_router.training.mix import draw
from hhh_router.training.processes import refuse_several
from hhh_router.training.recipe import Recipe
from hhh_router.training.usefulness import usefulness
from hhh_router.types import DIMENSIONS, EXPERTS, NEEDS, OUTCOMES, Evidence, Mode, Posterior, ReadRequest, Scores

_log = logging.getLogger(__name__)
CALIBRATORS = "calibrators.json"
_PRECISION_ROWS = 50  # per mode, read again in another precision
MEAN_SHIFT = 0.01
"""Most that calibrated probabilities may move on average for another precision to count as calibrated too."""
WORST_SHIFT = 0.06
"""Most that the 99th percentile may move."""
# limits that policies put on these numbers; confidence learns how often a verdict at such a limit is right
_LIMITS: Mapping[str, tuple[float, ...]] = {"harmless": (0.5, 0.7, 0.8, 0.9, 0.95), "unsafe": (0.5, 0.7, 0.8, 0.9)}
_STRENGTH = 0.6  # of the default policy, whose weights stand behind the features


@dataclass(frozen=True, slots=True)
class Reading:
    """One calibration row as the heads saw it."""

    example: Example
    scores: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRows:
    """What gates are fitted to and compared on."""

    examples: tuple[Example, ...]
    """With the reply that should be given, of split ``calibrate``."""
    targets: NDArray[np.float64]
    """The share that each expert should have had, by how likely it makes that reply; (n, 4), columns as ``EXPERTS``."""


def calibrate(shop: Workshop) -> CalibrationFile:
    """Fit and write ``calibrators.json`` and the manifest that names it.

    Raises:
        DataError: Too few rows or one class only for a head (which one is said), or rows seen in training.
    """
    refuse_several("calibrate")
    examples = calibration_examples(shop)
    reader, encoder = _reader(shop)
    readings = read_all(shop, examples, reader, encoder)
    _keep(shop, readings)
    file = fit(
        readings,
        heads_sha256=file_sha256(shop.bundle / HEADS),
        dtype=reader.dtype,
        data_sha256=data_hash(examples),
        seed=shop.recipe.seed,
        choose_gate=partial(_choose_gate, shop, reader, encoder) if shop.recipe.calibration.usefulness else None,
        on_progress=shop.on_progress,
    )
    others = {"bfloat16", "float32", shop.recipe.backbone.dtype} - {reader.dtype}
    checks = {other: check for other in sorted(others) if (check := check_precision(shop, file, readings, other))}
    file = file.with_precisions(checks)
    path = shop.bundle / CALIBRATORS
    file.write(path)
    write_calibrated(shop, CalibratorsSpec(path=CALIBRATORS, sha256=file_sha256(path)))
    return file


def keep_scores(shop: Workshop) -> int:
    """Write the scores and labels of the calibration rows beside the bundle's calibrators; how many there are.

    Raises:
        DataError: Rows seen in training.
    """
    refuse_several("calibrate")
    reader, encoder = _reader(shop)
    return _keep(shop, read_all(shop, calibration_examples(shop), reader, encoder))


def _keep(shop: Workshop, readings: Mapping[Mode, Sequence[Reading]]) -> int:
    rows = [
        KeptRow(source=r.example.source, needs=r.example.needs, scores=r.scores)
        for r in _once_per_prompt(readings["prompt"])
        if r.example.needs
    ]
    replies: tuple[Mode, ...] = ("both", "response")
    rows += [
        KeptRow(source=r.example.source, needs={}, outcomes=r.example.outcomes, scores=r.scores)
        for mode in replies
        for r in readings[mode]
        if r.example.outcomes
    ]
    write_kept(shop.bundle / KEPT, rows, heads_sha256=file_sha256(shop.bundle / HEADS))
    return len(rows)


def check_precision(
    shop: Workshop, file: CalibrationFile, readings: Mapping[Mode, Sequence[Reading]], dtype: str
) -> PrecisionCheck | None:
    """Read some calibration rows in another precision; None where the calibrated numbers move too far to hold."""
    rng = random.Random(shop.recipe.seed)
    rows = [r for part in readings.values() for r in rng.sample(part, min(_PRECISION_ROWS, len(part)))]
    reader, encoder = _reader(shop, dtype)
    asked = [r.example.read() for r in rows]
    asked = [ReadRequest(messages=q.messages) if r.scores.mode == "prompt" else q for q, r in zip(asked, rows,
             strict=True)]  # fmt: skip
    texts = [encode_cut(encoder, q, shop.recipe.calibration.max_tokens) for q in asked]
    calibrators = Calibrators(file)
    shifts: list[float] = []
    for batch in reader.batches(texts, BATCH_TOKENS):
        for i, scores in zip(batch, reader.score([texts[i] for i in batch]), strict=True):
            one, other = calibrators.evidence(rows[i].scores), calibrators.evidence(scores)
            shifts += [abs(p - other.needs[n]) for n, p in one.needs.items()]
            shifts += [abs(p - other.outcomes[n]) for n, p in one.outcomes.items()]
        shop.on_progress(f"check {dtype}", len(shifts), len(shifts), "")
    mean = sum(shifts) / len(shifts)
    worst = sorted(shifts)[int(0.99 * (len(shifts) - 1))]
    if mean > MEAN_SHIFT or worst > WORST_SHIFT:
        _log.warning("in %s probabilities move by %.3f on average, %.3f at worst: not calibrated", dtype, mean, worst)
        return None
    return PrecisionCheck(n=len(rows), mean_shift=mean, worst_shift=worst)


def _choose_gate(shop: Workshop, reader: HeadReader, encoder: Encoder, calibrators: Calibrators) -> Gate:
    """The gate that gives each expert the share it should have had, by the reference answers of held-out rows.

    The reader's backbone gets the experts; what the heads read lies below them.
    """
    recipe = shop.recipe
    gates = install_mixture(reader.stack.model, load_experts(Bundle.load(shop.bundle)))
    runner = Runner(Backbone(stack=reader.stack, encoder=encoder), gates, recipe.first_adapted_layer)
    rows = gate_rows(recipe, shop.data, runner, on_rows=lambda done, n: shop.on_progress("usefulness", done, n, ""))
    needs = prompt_needs(rows.examples, reader, encoder, calibrators, recipe.calibration.max_tokens)
    fits = compare_gates(needs, rows.targets, recipe.seed)
    return chosen_gate(fits, data_sha256=data_hash(rows.examples), seed=recipe.seed)


def gate_rows(
    recipe: Recipe, data: Path, runner: Runner, *, on_rows: Callable[[int, int], None] = lambda done, total: None
) -> GateRows:
    """Draw the recipe's ``calibration.usefulness`` rows, and tell how each should have been shared.

    Args:
        recipe: Names the rows and the temperature of the targets, and its seed draws them.
        data: Folder of data sets.
        runner: Of the backbone with the bundle's experts.
        on_rows: Told how many rows are done, of how many.

    Raises:
        DataError: The recipe names no such rows, or none is left.
    """
    if (plan := recipe.calibration.usefulness) is None:
        raise DataError("the recipe has no calibration.usefulness", hint="recipes/smollm2-135m.yaml shows the form")
    drawn = draw(plan.mix, data, split="calibrate", seed=recipe.seed)
    rows = [e for e in drawn if not any(e.outcomes.values())]  # a faulty reply is no reference
    found = usefulness(rows, runner, max_tokens=plan.max_tokens, on_rows=on_rows)
    return GateRows(examples=tuple(rows[i] for i in found.rows), targets=found.shares(plan.temperature))


def prompt_needs(
    examples: Sequence[Example], reader: HeadReader, encoder: Encoder, calibrators: Calibrators, max_tokens: int
) -> NDArray[np.float64]:
    """Calibrated needs of every prompt read alone, shape (n, 3), columns as ``DIMENSIONS``."""
    texts = [encode_cut(encoder, ReadRequest(messages=e.messages), max_tokens) for e in examples]
    needs = np.zeros((len(texts), len(DIMENSIONS)))
    for batch in reader.batches(texts, BATCH_TOKENS):
        for i, scores in zip(batch, reader.score([texts[i] for i in batch]), strict=True):
            needs[i] = [calibrators.evidence(scores).needs[d] for d in DIMENSIONS]
    return needs


def _reader(shop: Workshop, dtype: str | None = None) -> tuple[HeadReader, Encoder]:
    """The recipe's backbone with the trained heads."""
    backbone = shop.backbone(dtype)
    layers = shop.recipe.router.read_layers
    heads = Heads.load(shop.bundle / HEADS, layers=len(layers), dim=shop.recipe.backbone.hidden_size)
    heads = heads.to(backbone.stack.device)
    return HeadReader(backbone.stack, heads, layers, shop.recipe.first_adapted_layer), backbone.encoder


def read_all(
    shop: Workshop, examples: Sequence[Example], reader: HeadReader, encoder: Encoder
) -> dict[Mode, list[Reading]]:
    """Every row as prompt, and, where it has a response, as both; some responses alone."""
    recipe = shop.recipe
    answered = [e for e in examples if e.response is not None and e.outcomes]
    alone = random.Random(recipe.seed).sample(answered, min(recipe.calibration.response_rows, len(answered)))
    rows = [*examples, *response_only(alone)]
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        shop.on_progress("reading", done, len(rows), f"{len(rows)} texts")

    states = token_states(
        [e.read() for e in rows], reader, encoder,
        max_tokens=recipe.calibration.max_tokens, folder=shop.states, on_rows=count,
    )  # fmt: skip
    return split_modes(rows, states, reader.heads)


def split_modes(rows: Sequence[Example], states: TokenStates, heads: Heads) -> dict[Mode, list[Reading]]:
    """Score each row in every mode its sides allow: a prompt's states do not depend on the response behind it."""
    readings: dict[Mode, list[Reading]] = {"prompt": [], "response": [], "both": []}
    for row, (as_given, as_prompt) in zip(rows, scored(heads, states), strict=True):
        readings[as_given.mode].append(Reading(row, as_given))
        if as_given.mode == "both" and not row.answer_side:
            readings["prompt"].append(Reading(row, as_prompt))
    return readings


def fit(
    readings: Mapping[Mode, Sequence[Reading]],
    *,
    heads_sha256: str,
    dtype: str,
    data_sha256: str,
    seed: int,
    choose_gate: Callable[[Calibrators], Gate] | None = None,
    on_progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> CalibrationFile:
    """Fit every head in every mode, the gate (None: odds), the train prior, and the confidence models."""
    needs = {d: _fit(_once_per_prompt(readings["prompt"]), "needs", d, seed) for d in NEEDS}
    modes: dict[Mode, ModeCalibration] = {}
    for mode, rows in readings.items():
        on_progress("fitting", len(modes) + 1, len(readings), mode)
        modes[mode] = ModeCalibration(
            n=len(rows),
            distance_limit=fit_distance_limit([r.scores.distance for r in rows]),
            needs={} if mode == "response" else needs,
            outcomes={o: _fit(rows, "outcomes", o, seed) for o in OUTCOMES if mode != "prompt" or _labelled(rows, o)},
        )
    uniform = Posterior(*(1 / len(EXPERTS) for _ in EXPERTS))
    create = partial(
        CalibrationFile.create, heads_sha256=heads_sha256, dtype=dtype, data_sha256=data_sha256, seed=seed, modes=modes
    )
    gate: Gate = choose_gate(Calibrators(create(train_prior=uniform))) if choose_gate else "odds"
    under_gate = Calibrators(create(train_prior=uniform, gate=gate))
    prior = _mean_posterior(under_gate, _once_per_prompt(readings["prompt"]))
    with_prior = Calibrators(create(train_prior=prior, gate=gate))
    for mode in modes:
        model = _fit_confidence(with_prior, readings[mode], mode, seed)
        modes[mode] = modes[mode].model_copy(update={"confidence": model})
    return create(train_prior=prior, gate=gate)


def _labelled(rows: Sequence[Reading], outcome: str) -> bool:
    """True where a prompt's outlook on a fault of its reply can be calibrated at all."""
    labels = [r.example.outcomes[outcome] for r in rows if outcome in r.example.outcomes]
    return len(labels) >= MIN_ROWS and min(sum(labels), len(labels) - sum(labels)) >= FOLDS


def _fit(rows: Sequence[Reading], kind: str, head: str, seed: int) -> HeadCalibration:
    labelled = [
        (getattr(r.scores, kind)[head], getattr(r.example, kind)[head])
        for r in rows
        if head in getattr(r.example, kind)
    ]
    try:
        return fit_head([x for x, _ in labelled], [int(y) for _, y in labelled], seed=seed)
    except DataError as error:
        raise DataError(f"{kind}.{head}, mode {rows[0].scores.mode}: {error.message}", hint=error.hint) from error


def _once_per_prompt(rows: Sequence[Reading]) -> list[Reading]:
    """One reading per prompt: sets that answer one prompt several times must not count it several times."""
    return list({prompt_hash(r.example): r for r in rows}.values())


def _mean_posterior(calibrators: Calibrators, rows: Sequence[Reading]) -> Posterior:
    shares = [calibrators.evidence(r.scores).posterior for r in rows]
    mean = {e: sum(p[e] for p in shares) / len(shares) for e in EXPERTS}
    total = sum(mean.values())
    return Posterior.from_mapping({e: v / total for e, v in mean.items()})


def _fit_confidence(calibrators: Calibrators, rows: Sequence[Reading], mode: Mode, seed: int) -> ConfidenceModel:
    """Fit P(verdict right) at limits such as policies set: on needs.harmless for prompts, else on outcomes.unsafe."""
    kind, head = ("needs", "harmless") if mode == "prompt" else ("outcomes", "unsafe")
    rng = random.Random(seed)
    features, right = [], []
    for row in _once_per_prompt(rows) if mode == "prompt" else rows:
        truth = getattr(row.example, kind).get(head)
        if truth is None:
            continue
        evidence = calibrators.evidence(row.scores)
        limit = rng.choice(_LIMITS[head])
        found = getattr(evidence, kind)[head]
        features.append(_features(calibrators, evidence, found, limit))
        right.append((found >= limit) == bool(truth))
    return fit_confidence(features, right, seed=seed)


def _features(calibrators: Calibrators, evidence: Evidence, found: float, limit: float) -> dict[str, float]:
    even = dict.fromkeys(EXPERTS, 1.0)
    weights = weigh(
        evidence.posterior, prior=even, train_prior=calibrators.train_prior, strength=_STRENGTH,
        lower=dict.fromkeys(EXPERTS, 0.0), upper=even,
    )  # fmt: skip
    shift = kl_nats(weights, evidence.posterior)
    return confidence_features(evidence, weights=weights, policy_shift_nats=shift, limits=[(found, limit)])
