"""Whether the router earns its place: ways to share a request out among the experts, by held-out likelihood.

The targets are no labels. For each row of the recipe's ``calibration.usefulness`` they are softmax(−NLL / T) over the
four experts, where NLL is nats per token of the reply that should be given under that expert alone, and T the recipe's.
So a gate does well when it foretells which expert makes that reply likelier, on this backbone and with these experts;
whether people prefer the reply is another question, and another T moves every figure, the floor too. The calibrators of
the needs, which feed our gates, were fitted to labels of some of the same rows; the targets they have not seen.

Every gate is judged on the same five folds, with whatever it fits (nothing, a temperature, a matrix, a mean) fitted to
the other four. Arrow and the published formulations never give base anything, so over four experts their likelihood is
zero; ``nll_experts`` compares all gates without base, targets and shares renormalised over the three experts. Ours and
the best fixed weighting are fitted over four all the same; Arrow's temperature is fitted over three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhh_router.calibration.arrow import arrow_shares, fit_temperature, prototypes
from hhh_router.calibration.fit import FOLDS, stratified_folds
from hhh_router.calibration.gates import fit_gate
from hhh_router.calibration.metrics import standard_error
from hhh_router.data.examples import Example, data_hash
from hhh_router.errors import DataError
from hhh_router.model.encode import Encoded, Encoder
from hhh_router.model.experts import load_expert
from hhh_router.model.heads import Heads
from hhh_router.model.reader import HeadReader
from hhh_router.model.runner import Runner
from hhh_router.routing import GATES, posterior
from hhh_router.training.build import FormulationHeads, read_formulation
from hhh_router.training.calibrate import gate_rows, prompt_needs
from hhh_router.training.features import BATCH_TOKENS, encode_cut
from hhh_router.training.formulations import formulation_posterior
from hhh_router.training.recipe import Recipe
from hhh_router.types import DIMENSIONS, EXPERTS, ReadRequest

if TYPE_CHECKING:
    from hhh_router.evaluation.measure import Bench

FORMULATIONS: tuple[str, ...] = ("trinityx", "h3fusion")
"""Published formulations that can be compared, see `training.formulations`."""
FLOOR = "floor"
"""The row with the mean entropy of the targets, which no gate can be below."""
# what reads the layer's states after its input norm, which are at hand without running the layer
_MODULES = ("q_proj", "k_proj", "v_proj")
_TINY = float(np.finfo(np.float64).tiny)  # a share that has underflowed: its logarithm stays finite

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """The prompts, and what reads them."""

    bench: Bench
    texts: Sequence[Encoded]

    @property
    def first(self) -> int:
        """The first adapted layer."""
        return self.bench.bundle.manifest.first_adapted_layer

    def reader(self, heads: Heads, layers: Sequence[int]) -> HeadReader:
        """The bench's backbone, read at other layers or by other heads."""
        return HeadReader(self.bench.detector.reader.stack, heads, layers, self.first)

    def batches(self, reader: HeadReader) -> Iterator[tuple[list[int], list[Encoded]]]:
        """Places and texts of like length."""
        for batch in reader.batches(self.texts, BATCH_TOKENS):
            yield batch, [self.texts[i] for i in batch]


def gate_figures(
    bench: Bench, runner: Runner, recipe: Recipe, *, formulations: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Rows of figures per gate: ours, Arrow, the formulations given, three that know nothing of a request, the floor.

    Args:
        bench: The bundle, its reader and calibrators, the data, and the seed of the folds; told the part ``gates``.
        runner: Of the bench's backbone with the bundle's experts.
        recipe: Names rows and temperature of the targets; draws them by its own seed, as ``hhh-router calibrate`` does.
        formulations: ``trinityx`` or ``h3fusion`` → heads trained so, with ``formulation.json`` beside them.

    Returns:
        Plain values for JSON. Keys of each row: ``gate``, ``nll`` (mean −Σ target · ln share over the four experts,
        nats; None for a gate that never gives base anything), ``nll_experts`` (the same over three, renormalised), each
        with the standard error of its mean as ``…_error``, ``n``, ``seed``, ``data_sha256``, and ``chosen`` for the
        gate that ``calibrators.json`` serves. Arrow's row has ``error`` instead of figures where the experts adapt
        nothing that reads the first adapted layer's states.

    Raises:
        BundleError: Heads of a formulation that cannot be read.
        DataError: A formulation that is not known, or of another backbone; a recipe without such rows, or too few.
    """
    described = check_formulations(formulations)
    for name, kept in described.items():
        if kept.backbone_sha256 != bench.bundle.manifest.backbone.sha256:
            raise DataError(
                f"{name}: heads of another backbone than the bundle's", hint=f"train them on {recipe.backbone.source}"
            )
    told = bench.told("gates")
    rows = gate_rows(recipe, bench.data, runner, on_rows=lambda done, total: told(done, total, ""))
    reader, encoder = bench.detector.reader, bench.detector.encoder
    cut = recipe.calibration.max_tokens
    needs = prompt_needs(rows.examples, reader, encoder, bench.detector.calibrators, cut)
    read = _Read(bench=bench, texts=_encoded(rows.examples, encoder, cut))
    fold = stratified_folds(rows.targets.argmax(axis=1), folds=FOLDS, seed=bench.seed)  # as `fit_gate` does
    judged = partial(_judged, rows.targets)
    stamp = {"n": len(needs), "seed": bench.seed, "data_sha256": data_hash(rows.examples)}

    found = [
        judged(name, _held_out(fold, partial(_ours, name, needs, rows.targets, bench.seed)))
        | ({"chosen": True} if name == bench.detector.calibrators.gate else {})
        for name in GATES
    ]
    try:
        found.append(judged("arrow", _held_out(fold, _arrow(read, rows.targets))))
    except DataError as error:
        found.append({"gate": "arrow", "error": error.message})
    found += [judged(name, _formulation(read, formulations[name], kept)) for name, kept in described.items()]
    even, thirds = np.full(4, 1 / 4), np.array([0, 1 / 3, 1 / 3, 1 / 3])
    found += [judged(name, np.tile(p, (len(needs), 1))) for name, p in (("uniform", even), ("uniform thirds", thirds))]
    mean = _held_out(fold, lambda train, held: np.tile(rows.targets[train].mean(axis=0), (len(held), 1)))
    found += [judged("best fixed weighting", mean), judged(FLOOR, rows.targets)]
    return [row | stamp for row in found]


def check_formulations(formulations: Mapping[str, Path]) -> dict[str, FormulationHeads]:
    """What stands beside each heads file, before anything is loaded.

    Raises:
        BundleError: See `read_formulation`.
        DataError: No such formulation, or heads of another.
    """
    if unknown := [name for name in formulations if name not in FORMULATIONS]:
        raise DataError(f"no formulation {unknown[0]!r}", hint=f"known: {', '.join(FORMULATIONS)}")
    described = {name: read_formulation(path) for name, path in formulations.items()}
    for name, kept in described.items():
        if kept.formulation.name != name:
            raise DataError(
                f"{formulations[name]}: heads of {kept.formulation.name}, given as {name}", hint="name them as trained"
            )
    return described


def _encoded(examples: Sequence[Example], encoder: Encoder, max_tokens: int) -> list[Encoded]:
    return [encode_cut(encoder, ReadRequest(messages=e.messages), max_tokens) for e in examples]


def _held_out(fold: Rows, shares: Callable[[Rows, Rows], Floats]) -> Floats:
    """Each fold's shares from what was fitted to the others, (n, 4); ``shares`` gets places to fit to and to tell."""
    found = np.empty((len(fold), len(EXPERTS)))
    for k in range(FOLDS):
        held = np.flatnonzero(fold == k)
        found[held] = shares(np.flatnonzero(fold != k), held)
    return found


def _ours(name: str, needs: Floats, targets: Floats, seed: int, train: Rows, held: Rows) -> Floats:
    params = fit_gate(name, needs[train], targets[train], seed).params
    told = [posterior(dict(zip(DIMENSIONS, row, strict=True)), name, params) for row in needs[held].tolist()]
    return np.array([[p[e] for e in EXPERTS] for p in told])


def _arrow(read: _Read, targets: Floats) -> Callable[[Rows, Rows], Floats]:
    """Arrow with prototypes of one module of the first adapted layer, its temperature fitted to the training rows."""
    directions = prototypes(_factors(read))
    states = _module_inputs(read)
    among = np.column_stack([np.zeros(len(targets)), _among(targets)])  # every row counts alike, as it is judged

    def shares(train: Rows, held: Rows) -> Floats:
        return arrow_shares(states[held], directions, fit_temperature(states[train], directions, among[train]))

    return shares


def _factors(read: _Read) -> list[tuple[Floats, Floats]]:
    """A and B per expert of one module that reads the first adapted layer's states.

    As trained: a block's scale moves no direction, unless it is 0, and then there would be none.
    """
    bundle = read.bench.bundle
    experts = [load_expert(bundle.expert_weights(d).parent, d) for d in DIMENSIONS]
    for module in (f"model.layers.{read.first}.self_attn.{name}" for name in _MODULES):
        if all(module in e.factors for e in experts):
            pairs = [e.factors[module] for e in experts]
            return [(p.down.double().cpu().numpy(), p.up.double().cpu().numpy()) for p in pairs]
    raise DataError(
        f"layer {read.first}: no {', '.join(_MODULES)} that all experts adapt", hint="train experts that adapt one"
    )


def _module_inputs(read: _Read) -> Floats:
    """What the first adapted layer's attention reads, mean over the prompt's tokens that our heads read too, (n, D)."""
    bare = read.reader(read.bench.detector.reader.heads, (read.first,))  # its heads are not asked
    norm = bare.stack.layers[read.first].input_layernorm
    found = np.empty((len(read.texts), bare.stack.config.hidden_size))
    for batch, texts in read.batches(bare):
        prompts, _ = bare.sides(texts)
        parts = norm(prompts.states[:, 0]).double().cpu().split(list(prompts.lengths))
        found[batch] = [part.mean(0).numpy() for part in parts]
    return found


def _formulation(read: _Read, path: Path, kept: FormulationHeads) -> Floats:
    """The shares that a formulation's heads give every prompt, (n, 4); nothing is fitted to the rows."""
    stack = read.bench.detector.reader.stack
    heads = Heads.load(path, layers=len(kept.read_layers), dim=stack.config.hidden_size).to(stack.device)
    reader = read.reader(heads, kept.read_layers)
    columns = [heads.needs.index(d) for d in DIMENSIONS]
    shares = np.empty((len(read.texts), len(EXPERTS)))
    for batch, texts in read.batches(reader):
        logits = heads(reader.views(texts))[:, columns].cpu()
        shares[batch] = formulation_posterior(kept.formulation.name, logits, kept.formulation).numpy()
    return shares


def _judged(targets: Floats, name: str, shares: Floats) -> dict[str, Any]:
    """Both figures of one gate with their standard errors."""
    over_four = _cross_entropy(targets, shares) if shares[:, 0].all() else None
    over_three = _cross_entropy(_among(targets), _among(shares))
    return {
        "gate": name,
        "nll": None if over_four is None else float(over_four.mean()),
        "nll_error": None if over_four is None else standard_error(over_four),
        "nll_experts": float(over_three.mean()),
        "nll_experts_error": standard_error(over_three),
    }


def _among(shares: Floats) -> Floats:
    """Shares among the three experts, without base, (n, 4) → (n, 3)."""
    return np.asarray(shares[:, 1:] / shares[:, 1:].sum(axis=1, keepdims=True))


def _cross_entropy(targets: Floats, shares: Floats) -> Floats:
    """−Σ target · ln share per row, nats, (n,)."""
    return np.asarray(-(targets * np.log(np.maximum(shares, _TINY))).sum(axis=1))
