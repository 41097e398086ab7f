"""Measure what quantised weights change, before a bundle may be served with them; see `model.quantisation`.

Prompts are read with the base weights and replies as decode steps read and write them, which alone are quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from hhh_router.bundle import Bundle
from hhh_router.calibration import Calibrators
from hhh_router.calibration.metrics import ece
from hhh_router.data.examples import Example, data_hash
from hhh_router.data.sets import SETS
from hhh_router.errors import BundleError, DataError
from hhh_router.evaluation.behaviour import refuses
from hhh_router.model.base import Backbone, compute_dtype
from hhh_router.model.decoded import next_token_nats, read_decoded
from hhh_router.model.encode import Encoded
from hhh_router.model.experts import load_experts
from hhh_router.model.int8 import Phase, check_int8
from hhh_router.model.mixture import Gates
from hhh_router.model.quantisation import Divergence, Drift, Record, Refusals, measured_parts
from hhh_router.model.reader import HeadReader
from hhh_router.model.runner import Reply, Runner
from hhh_router.model.serving import install_serving
from hhh_router.model.worker import open_reader
from hhh_router.routing import weigh
from hhh_router.settings import Settings
from hhh_router.training.features import BATCH_TOKENS, encode_cut, response_only
from hhh_router.training.mix import draw
from hhh_router.training.recipe import Share
from hhh_router.types import EXPERTS, OUTCOMES, ReadRequest, Scores, Weights

HARMLESS_SET = "wildchat_benign"
"""Whose prompts must not be refused more often."""
OTHER_SETS: tuple[str, ...] = ("written/harm", "written/honest")
"""Prompts that call for the other experts, so that the divergence is measured under their weights too."""
ANSWERED_SETS: tuple[str, ...] = (
    "jailjudge_mini",
    "xstest/completions",
    "jailbreakbench/attack_artifacts",
    "halueval_general",
)
"""Labelled replies, of licences that allow any use; those whose files are not there are left out."""
MAX_TOKENS = 224
"""Of a text that is read, as in the shipped recipes' calibration."""

_DECIMALS = 3
"""Of the probabilities whose ECE is compared. Where a calibrator makes nearly the same of every reading, further digits
put rows into bins at random: a mean shift of 1e-6 moved an ECE of 0.11 by 0.017."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    replies: int = 40
    """Harmless prompts that are answered, and half as many others for the divergence."""
    items: int = 200
    """Labelled replies that are read."""
    max_tokens: int = 40
    """Of each greedy reply."""


@dataclass(slots=True, kw_only=True)
class _Bench:
    """A bundle's model with quantised weights, and how to read with it."""

    reader: HeadReader
    backbone: Backbone
    gates: Gates
    phase: Phase
    first_adapted_layer: int
    calibrators: Calibrators
    told: Callable[[str, int, int, str], None] = field(default=lambda *_: None)


def measure_quantisation(
    bundle: Bundle,
    data: Path,
    *,
    settings: Settings,
    sizes: Sizes,
    seed: int,
    on_progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> Record:
    """Compare int8 weights with the base weights on rows of split ``calibrate``.

    Args:
        bundle: With heads and calibrators.
        data: Folder of data sets.
        settings: Threads and precision; device must be a CPU.
        sizes: How much is measured.
        seed: Of the draws of rows.
        on_progress: Told stage, done, total, note.

    Raises:
        BundleError: The bundle has no calibrators, or they hold for another precision.
        DataError: No labelled replies, or no harmless prompts.
        SettingsError: This machine cannot use int8 weights.
    """
    manifest = bundle.manifest
    if manifest.heads is None or manifest.calibrators is None:
        raise BundleError(f"{bundle.root}: has no heads or no calibrators", hint="train and calibrate it first")
    dtype = compute_dtype(manifest.backbone, settings.device, settings.dtype)
    check_int8(settings.device, dtype)
    path = bundle.root / manifest.calibrators.path
    calibrators = Calibrators.load(path, heads_sha256=manifest.heads.sha256, dtype=dtype)
    answered, asked = _answered(data, sizes.items, seed), draw_prompts(data, sizes.replies, seed)
    reader, encoder = open_reader(bundle, settings)
    gates, phase = install_serving(reader.stack.model, load_experts(bundle), "int8")
    bench = _Bench(
        reader=reader,
        backbone=Backbone(stack=reader.stack, encoder=encoder),
        gates=gates,
        phase=phase,
        first_adapted_layer=manifest.first_adapted_layer,
        calibrators=calibrators,
        told=on_progress,
    )
    readings = _drifts(bench, answered)
    divergence, refusals = _replies(bench, asked, sizes)
    found = Record(
        scheme="int8",
        dtype=dtype,
        parts=measured_parts(bundle),
        seed=seed,
        data_sha256=data_hash([*answered, *asked]),
        max_tokens=sizes.max_tokens,
        torch=version("torch"),
        divergence=divergence,
        readings=tuple(readings),
        refusals=refusals,
        passes=False,
    )
    return found.model_copy(update={"passes": not found.broken()})


def _answered(data: Path, items: int, seed: int) -> list[Example]:
    """Labelled replies, as many of each set; with their prompts, and the same ones alone."""
    there = [name for name in ANSWERED_SETS if any(data.glob(SETS[name].pattern))]
    if not there:
        raise DataError(
            f"{data}: none of {', '.join(ANSWERED_SETS)} is there", hint="--data names the folder of data sets"
        )
    shares = [Share(set=name, split="calibrate") for name in there]
    rows = [[e for e in draw([s], data, seed=seed) if e.response and e.outcomes] for s in shares]
    rows = [part[: -(-items // len(there))] for part in rows]
    return [e for part in rows for e in (*part, *response_only(part))]


def draw_prompts(data: Path, replies: int, seed: int) -> list[Example]:
    """Harmless prompts, then others that call for the experts; each once."""
    wanted = [(HARMLESS_SET, replies), *((name, max(1, replies // (2 * len(OTHER_SETS)))) for name in OTHER_SETS)]
    return draw([Share(set=n, rows=k, split="calibrate", view="prompt") for n, k in wanted], data, seed=seed)


# -- readings ---------------------------------------------------------------------------------------------------------


def _drifts(bench: _Bench, rows: Sequence[Example]) -> list[Drift]:
    """How calibrated outcomes of replies move when their states come out of decode steps."""
    texts = [encode_cut(bench.backbone.encoder, e.read(), MAX_TOKENS) for e in rows]
    before = read_whole(bench.reader, texts)
    after = []
    for text in texts:
        after.append(read_decoded(bench.reader, text, bench.phase))
        bench.told("readings", len(after), len(texts), f"{len(texts)} texts")
    found = []
    for mode in ("both", "response"):
        for outcome in OUTCOMES:
            of = [i for i, e in enumerate(rows) if before[i].mode == mode and outcome in e.outcomes]
            if not of:
                continue
            p = [bench.calibrators.evidence(before[i]).outcomes[outcome] for i in of]
            q = [bench.calibrators.evidence(after[i]).outcomes[outcome] for i in of]
            labels = [int(rows[i].outcomes[outcome]) for i in of]
            shift = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / len(of)
            found.append(
                Drift(
                    mode=mode,
                    outcome=outcome,
                    n=len(of),
                    positives=sum(labels),
                    ece_before=_ece(p, labels),
                    ece_after=_ece(q, labels),
                    mean_shift=shift,
                )
            )
    return found


def _ece(probabilities: Sequence[float], labels: Sequence[int]) -> float:
    """ECE that does not depend on how readings are ordered which a calibrator makes the same of.

    >>> round(ece([0.4999999, 0.5000001], [0, 1]), 3), _ece([0.4999999, 0.5000001], [0, 1])
    (0.5, 0.0)
    """
    return ece([round(p, _DECIMALS) for p in probabilities], labels)


def read_whole(reader: HeadReader, texts: Sequence[Encoded]) -> list[Scores]:
    """Scores of given texts through the base weights, in order."""
    found: dict[int, Scores] = {}
    for batch in reader.batches(texts, BATCH_TOKENS):
        found |= dict(zip(batch, reader.score([texts[i] for i in batch]), strict=True))
    return [found[i] for i in range(len(texts))]


# -- replies ----------------------------------------------------------------------------------------------------------


def _replies(bench: _Bench, asked: Sequence[Example], sizes: Sizes) -> tuple[Divergence, Refusals]:
    """How far the next token moves, and who is refused, under the weights that the router gives each prompt."""
    harmless = [i for i, e in enumerate(asked) if e.source == HARMLESS_SET]
    if not harmless:
        raise DataError(f"{HARMLESS_SET}: no row with split 'calibrate'", hint="the data set's README names its splits")
    requests = [ReadRequest(messages=e.messages) for e in asked]
    texts = [encode_cut(bench.backbone.encoder, q, MAX_TOKENS) for q in requests]
    weights = [routed_weights(bench.calibrators, s) for s in read_whole(bench.reader, texts)]
    said: list[list[str]] = []
    for phase, chosen in ((None, range(len(asked))), (bench.phase, harmless)):
        runner = Runner(bench.backbone, bench.gates, bench.first_adapted_layer, phase)
        stage = "replies" if phase is None else "quantised replies"
        said.append(
            runner.generate(
                [texts[i].ids for i in chosen], [weights[i] for i in chosen], max_tokens=sizes.max_tokens,
                on_rows=lambda done, total, stage=stage: bench.told(stage, done, total, ""),  # type: ignore[misc]
            )
        )  # fmt: skip
    total, tokens = 0.0, 0
    for i, (text, reply) in enumerate(zip(texts, said[0], strict=True)):
        row = Reply((*text.ids, *bench.backbone.encoder.response_ids(reply)), len(text.ids))
        nats = next_token_nats(bench.backbone, bench.gates, bench.phase, row, weights[i])
        total, tokens = total + float(nats.sum()), tokens + len(nats)
        bench.told("next tokens", i + 1, len(texts), f"{total / tokens:.4f} nats")
    before, after = (sum(map(refuses, r)) / len(harmless) for r in ([said[0][i] for i in harmless], said[1]))
    return (
        Divergence(mean_nats=max(0.0, total / tokens), n=tokens, replies=len(texts)),
        Refusals(n=len(harmless), before=before, after=after),
    )


def routed_weights(calibrators: Calibrators, scores: Scores) -> Weights:
    """The router's own weights for a prompt, without a policy."""
    free = dict.fromkeys(EXPERTS, 1.0)
    return weigh(
        calibrators.evidence(scores).posterior, prior=free, train_prior=calibrators.train_prior, strength=0.0,
        lower=dict.fromkeys(EXPERTS, 0.0), upper=free,
    )  # fmt: skip
