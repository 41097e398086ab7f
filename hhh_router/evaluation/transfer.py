"""Leave one source out: what the heads know of a kind of data that nothing like it was trained on.

A data set can be told by its style alone, so a figure within a source flatters. Here the heads are trained again
without a group of sources, their needs are calibrated on the other sources' calibrate rows, and the group's own rows
that are held out are asked about; beside it the same with the group included, after the same number of epochs. Fewer
epochs than a release keep this affordable, so compare the two columns with each other, not with the bundle's figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hhh_router.calibration import HeadCalibration
from hhh_router.calibration import metrics as m
from hhh_router.calibration.fit import FOLDS, MIN_ROWS, fit_head, stratified_folds
from hhh_router.calibration.metrics import Floats
from hhh_router.data.examples import Example, data_hash, drop_overlap, prompt_hash
from hhh_router.data.sets import SETS, read_set
from hhh_router.errors import DataError
from hhh_router.evaluation.intervals import with_interval
from hhh_router.model.encode import Encoder
from hhh_router.model.heads import Heads
from hhh_router.model.reader import HeadReader
from hhh_router.training.build import Workshop, calibration_examples, router_examples
from hhh_router.training.calibrate import Reading, split_modes
from hhh_router.training.features import TokenStates, token_states
from hhh_router.training.router import Epoch, train_heads
from hhh_router.types import NEEDS, ReadRequest

EPOCHS = 4
"""Passes over the rows with and without a group; enough for the heads to be near their best."""
LEAST_ROWS = 200
"""A source that labels a need in fewer training rows hardly teaches it, so leaving it out says little."""
_MOST_HELD_ROWS = 1000  # of a group that is measured on rows its recipe does not calibrate on: they must be read first
_EVERYTHING = "everything"  # the folder of the heads that were trained with every group


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sources that are left out together, and the rows they are asked about."""

    name: str
    sources: frozenset[str]
    rows: tuple[Example, ...]
    """Held out: neither trained on with the group nor without it."""
    split: str
    """``calibrate`` or ``eval``."""
    calibrated: bool
    """Whether the recipe calibrates on ``rows`` when the group is included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What every group is trained and measured with."""

    shop: Workshop
    reader: HeadReader
    encoder: Encoder
    seed: int
    bootstraps: int
    epochs: int
    least: int
    folder: Path
    examples: Sequence[Example]
    calibration: Sequence[Example]
    data_sha256: str
    """Of the rows that are trained and calibrated on."""


def transfer_figures(
    shop: Workshop,
    reader: HeadReader,
    encoder: Encoder,
    *,
    seed: int,
    bootstraps: int,
    groups: Mapping[str, Sequence[str]] | None = None,
    only: Sequence[str] = (),
    epochs: int = EPOCHS,
    least: int = LEAST_ROWS,
) -> list[dict[str, Any]]:
    """Rows of figures per group of sources and need, each with 95 % bootstrap intervals.

    Every group's figures are kept in ``shop.work``, under the recipe's hash, seed and epochs, as soon as they are
    there, and the heads after every epoch: a killed run goes on where it stopped.

    Args:
        shop: Recipe, data and folders; told the progress of the stages ``reading`` and ``transfer``.
        reader: Of the recipe's backbone and read layers; its heads are not used.
        encoder: The backbone's.
        seed: Of training, folds and bootstraps. Rows are drawn by the recipe's own seed.
        bootstraps: Resamples an interval.
        groups: Name → sources left out together; None takes `default_groups`.
        only: Names of those to measure; empty measures all.
        epochs: Of every training.
        least: Training rows of a group that must label a need for the need to be reported.

    Returns:
        Plain values for JSON. Keys of each row: ``group``, ``head``, ``split`` of the rows asked about, ``against``
        (``own rows``, or ``other sources`` where the group's rows are of one class, so that AUROC needs the others'
        calibrate rows of the opposite class), ``left_out`` (training rows left out), ``n`` and ``positives`` (of the
        group's rows), ``epochs``, ``seed``, ``data_sha256``, and with an ``…_interval`` each: ``auroc`` and ``ece``
        of heads that never saw the group, ``auroc_in_domain`` and ``ece_in_domain`` of heads that did, and
        ``auroc_lost``, the second AUROC minus the first on the same resamples. In domain, a group that the recipe
        calibrates on is cross-fitted in five folds. A figure without a value is None: an ECE where the other sources
        hold too few rows of a class to calibrate a need. A row whose heads could not be trained has ``error`` instead
        of figures. A group without held-out rows has none.

    Raises:
        DataError: The reader is not the recipe's, a group is not known or names no source of the recipe, or nothing can
            be measured.
    """
    if reader.read_layers != shop.recipe.router.read_layers:
        raise DataError(
            f"the bundle reads layers {reader.read_layers}, recipe {shop.recipe_file} {shop.recipe.router.read_layers}",
            hint="give the recipe that the bundle was made with",
        )
    examples = router_examples(shop)
    calibration = [e for e in calibration_examples(shop) if e.messages]
    named = {name: tuple(s) for name, s in groups.items()} if groups else default_groups(examples, least)
    _check_sources(named, examples)
    if unknown := [name for name in only if name not in named]:
        raise DataError(
            f"no group {unknown[0]!r} can be left out of recipe {shop.recipe_file}", hint=f"known: {', '.join(named)}"
        )
    named = {name: sources for name, sources in named.items() if not only or name in only}
    folder = shop.work / "transfer" / f"{shop.recipe_sha256[:12]}-seed-{seed}-epochs-{epochs}"
    run = _Run(
        shop=shop, reader=reader, encoder=encoder, seed=seed, bootstraps=bootstraps, epochs=epochs, least=least,
        folder=folder, examples=examples, calibration=calibration, data_sha256=data_hash([*examples, *calibration]),
    )  # fmt: skip
    seen = {prompt_hash(e) for e in examples if e.messages}
    chosen = [g for name, sources in named.items() if (g := held_out(name, sources, calibration, seen, shop.data))]
    if not chosen:
        raise DataError(
            f"none of the groups {', '.join(named)} has rows to be asked about", hint="name others, or add their sets"
        )
    done = {g.name: rows for g in chosen if (rows := _kept(run, g)) is not None}
    missing = [g for g in chosen if g.name not in done]
    for group, rows in _measured(run, missing) if missing else ():
        done[group.name] = rows
    return [row for g in chosen for row in done[g.name]]


def default_groups(examples: Sequence[Example], least: int = LEAST_ROWS) -> dict[str, tuple[str, ...]]:
    """The groups of training sources that label some need in at least ``least`` rows; name → sources.

    Sources of one data set, such as ``truthfulqa`` and ``truthfulqa/judged``, go together; each of the project's own
    ``written/…`` is a group by itself, since they have nothing but their maker in common.
    """
    sources: dict[str, dict[str, None]] = {}
    rows: dict[tuple[str, str], int] = {}
    for example in examples:
        name = group_of(example.source)
        sources.setdefault(name, {})[example.source] = None
        for need in example.needs:
            rows[name, need] = rows.get((name, need), 0) + 1
    return {name: tuple(of) for name, of in sources.items() if max(rows.get((name, n), 0) for n in NEEDS) >= least}


def group_of(source: str) -> str:
    """The group a source belongs to by its name.

    >>> group_of("truthfulqa/judged"), group_of("written/harm"), group_of("dolly")
    ('truthfulqa', 'written/harm', 'dolly')
    """
    return source if source.startswith("written/") else source.split("/")[0]


def held_out(
    name: str, sources: Sequence[str], calibration: Sequence[Example], seen: set[str], data: Path
) -> Group | None:
    """The group with the rows it is asked about, None where there are none.

    The recipe's calibrate rows of the group; where it has none, the sets' calibrate rows, and where they have none
    either (or they were moved into training), their eval rows. Of the latter two at most 1,000, evenly spaced, and
    none whose prompt was trained on. A data set's further parts count as the group's: ``red_instruct/catqa`` is asked
    about where ``red_instruct`` is left out.
    """
    families = {group_of(source) for source in sources}

    def usable(rows: Sequence[Example]) -> list[Example]:
        wanted = [e for e in rows if e.needs and e.messages and not e.answer_side]
        return list({prompt_hash(e): e for e in wanted}.values())

    if own := usable([e for e in calibration if e.source in sources]):
        return Group(name=name, sources=frozenset(sources), rows=tuple(own), split="calibrate", calibrated=True)
    for split in ("calibrate", "eval"):
        found = [
            e for part in SETS if group_of(part) in families and _there(data, part) for e in read_set(data, part, split)
        ]
        if rows := usable(drop_overlap([e for e in found if e.messages], seen)):
            spaced = rows[:: max(1, -(-len(rows) // _MOST_HELD_ROWS))]
            return Group(name=name, sources=frozenset(sources), rows=tuple(spaced), split=split, calibrated=False)
    return None


def _there(data: Path, name: str) -> bool:
    return any(data.glob(SETS[name].pattern))


# --- training and reading


def _measured(run: _Run, groups: Sequence[Group]) -> Iterator[tuple[Group, list[dict[str, Any]]]]:
    """Train with everything, then without each group; figures are written as they come."""
    states = _states(run, "training", [e.read() for e in run.examples], run.shop.recipe.router.max_tokens)
    # calibration rows are read as they are calibrated, so that their states are those kept already
    extra = [e for g in groups if not g.calibrated for e in g.rows]
    asked = [*run.calibration, *extra]
    requests = [e.read() for e in run.calibration] + [ReadRequest(messages=e.messages) for e in extra]
    held = _states(run, "held-out", requests, run.shop.recipe.calibration.max_tokens)
    total, done = (len(groups) + 1) * run.epochs, 0

    def trained(name: str, left_out: frozenset[str]) -> Heads:
        nonlocal done
        kept = [i for i, e in enumerate(run.examples) if e.source not in left_out]
        part = TokenStates(states.states, [states.entries[i] for i in kept])
        plan = run.shop.recipe.router.model_copy(update={"epochs": run.epochs})
        heads = None
        for event in train_heads(
            [run.examples[i] for i in kept], part, plan, run.seed, folder=run.folder / _slug(name)
        ):
            if isinstance(event, Epoch):
                where = "with everything" if name == _EVERYTHING else f"without {name}"
                run.shop.on_progress(
                    "transfer", done + event.number, total, f"{where}: epoch {event.number}, loss {event.loss:.4f}"
                )
            else:
                heads = event
        done += run.epochs
        run.shop.on_progress("transfer", done, total, "")
        assert heads is not None  # train_heads yields them last
        return heads

    everything = _read(trained(_EVERYTHING, frozenset()), asked, held)
    for group in groups:
        try:
            without = _read(trained(group.name, group.sources), asked, held)
        except DataError as error:  # without the group a head has labels of one class only
            done += run.epochs
            yield group, [_unmeasured(run, group, need, error) for need in _needs_of(run, group)]
            continue
        rows = [_compared(run, group, need, without, everything) for need in _needs_of(run, group)]
        _keep(run, group, rows)
        shutil.rmtree(run.folder / _slug(group.name), ignore_errors=True)
        yield group, rows


def _states(run: _Run, what: str, requests: Sequence[ReadRequest], max_tokens: int) -> TokenStates:
    ready = 0

    def count(rows: int) -> None:
        nonlocal ready
        ready += rows
        run.shop.on_progress(f"reading {what}", ready, len(requests), f"{len(requests)} texts")

    return token_states(requests, run.reader, run.encoder, max_tokens=max_tokens, folder=run.shop.states, on_rows=count)


def _read(heads: Heads, rows: Sequence[Example], states: TokenStates) -> dict[tuple[str, str], Reading]:
    """The reading of every prompt with a label, once; by source and prompt, in the rows' order."""
    readings = split_modes(rows, states, heads)["prompt"]
    return {_key(r.example): r for r in readings if r.example.needs}


def _key(example: Example) -> tuple[str, str]:
    return example.source, prompt_hash(example)


# --- figures


def _needs_of(run: _Run, group: Group) -> list[str]:
    """The needs that the group teaches, and that enough of its held-out rows are labelled with."""
    taught = {n: _left_out(run, group, n) for n in NEEDS}
    return [
        n for n in NEEDS if taught[n] >= run.least and sum(n in e.needs for e in group.rows) >= MIN_ROWS
    ]  # fmt: skip


def _left_out(run: _Run, group: Group, need: str) -> int:
    return sum(e.source in group.sources and need in e.needs for e in run.examples)


def _compared(
    run: _Run,
    group: Group,
    need: str,
    without: Mapping[tuple[str, str], Reading],
    everything: Mapping[tuple[str, str], Reading],
) -> dict[str, Any]:
    """One need of one group: heads without the group beside heads with it."""
    labelled = [k for k, r in without.items() if need in r.example.needs]
    asked, fitted = {_key(e) for e in group.rows}, {_key(e) for e in run.calibration}
    own = [k for k in labelled if k in asked]
    families = {group_of(source) for source in group.sources}
    others = [k for k in labelled if k in fitted and k[0] not in group.sources and group_of(k[0]) not in families]
    y, other_y = _labels(without, own, need), _labels(without, others, need)
    one_class = len(set(y.tolist())) < 2
    ranked = own + ([k for k, label in zip(others, other_y, strict=True) if label != y[0]] if one_class else [])
    # calibrators keep the order, so ranks are those of the logits; folds have calibrators of their own
    x, x_in, labels = _logits(without, ranked, need), _logits(everything, ranked, need), _labels(without, ranked, need)
    row = _stub(run, group, need) | {
        "against": "other sources" if one_class else "own rows",
        "n": len(own),
        "positives": int(y.sum()),
        "data_sha256": data_hash([without[k].example for k in ranked]),
    }
    made = {"seed": run.seed, "bootstraps": run.bootstraps}
    row |= with_interval("auroc", m.auroc, x, labels, **made)
    row |= with_interval("auroc_in_domain", m.auroc, x_in, labels, **made)
    row |= with_interval("auroc_lost", lambda a, b, t: m.auroc(b, t) - m.auroc(a, t), x, x_in, labels, **made)
    own_x, other_x = _logits(without, own, need), _logits(without, others, need)
    row |= _ece("ece", lambda: _out_of_domain(own_x, other_x, other_y, run.seed), y, **made)
    own_x_in, other_x_in = _logits(everything, own, need), _logits(everything, others, need)
    return row | _ece(
        "ece_in_domain",
        lambda: _in_domain(own_x_in, y, other_x_in, other_y, run.seed, crossed=group.calibrated),
        y,
        **made,
    )


def _ece(key: str, calibrated: Callable[[], Floats], labels: Floats, *, seed: int, bootstraps: int) -> dict[str, Any]:
    """ECE of rows under calibrators that are fitted now; None where there is too little to fit them to."""
    try:
        p = calibrated()
    except DataError:
        return {key: None, f"{key}_interval": None}
    return with_interval(key, m.ece, p, labels, seed=seed, bootstraps=bootstraps)


def _unmeasured(run: _Run, group: Group, need: str, error: DataError) -> dict[str, Any]:
    return _stub(run, group, need) | {"error": error.message}


def _stub(run: _Run, group: Group, need: str) -> dict[str, Any]:
    """A row without figures."""
    own = [e for e in group.rows if need in e.needs]
    return {
        "group": group.name, "head": need, "split": group.split, "left_out": _left_out(run, group, need),
        "n": len(own), "positives": int(sum(e.needs[need] for e in own)), "epochs": run.epochs, "seed": run.seed,
        "data_sha256": data_hash(own),
    }  # fmt: skip


def _logits(readings: Mapping[tuple[str, str], Reading], keys: Sequence[tuple[str, str]], need: str) -> Floats:
    return np.array([readings[k].scores.needs[need] for k in keys], dtype=np.float64)


def _labels(readings: Mapping[tuple[str, str], Reading], keys: Sequence[tuple[str, str]], need: str) -> Floats:
    return np.array([readings[k].example.needs[need] for k in keys], dtype=np.float64)


def _calibrated(head: HeadCalibration, logits: Floats) -> Floats:
    return np.array([head.apply(float(x)) for x in logits])


def _out_of_domain(x: Floats, other_x: Floats, other_y: Floats, seed: int) -> Floats:
    """Probabilities of the group's rows under a calibrator of the other sources alone."""
    return _calibrated(fit_head(other_x, other_y, seed=seed), x)


def _in_domain(x: Floats, y: Floats, other_x: Floats, other_y: Floats, seed: int, *, crossed: bool) -> Floats:
    """The same where the group takes part in calibration, if the recipe calibrates on it."""
    if not crossed:
        return _out_of_domain(x, other_x, other_y, seed)
    p = np.empty_like(x)
    fold = stratified_folds(y, folds=FOLDS, seed=seed)
    for k in range(FOLDS):
        inside = fold != k
        p[~inside] = _out_of_domain(x[~inside], np.r_[other_x, x[inside]], np.r_[other_y, y[inside]], seed)
    return p


# --- what is kept


def _kept(run: _Run, group: Group) -> list[dict[str, Any]] | None:
    """Figures of the same rows, recipe, seed and sizes; None where they are not there."""
    try:
        found = json.loads(_path(run, group).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return list(found["rows"]) if isinstance(found, dict) and found.get("key") == _digest(run, group) else None


def _keep(run: _Run, group: Group, rows: Sequence[Mapping[str, Any]]) -> None:
    path = _path(run, group)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"key": _digest(run, group), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _path(run: _Run, group: Group) -> Path:
    return run.folder / f"{_slug(group.name)}.json"


def _digest(run: _Run, group: Group) -> str:
    """Names everything that the group's figures depend on, besides the code."""
    parts = (
        run.shop.recipe_sha256, run.seed, run.bootstraps, run.epochs, run.least, sorted(group.sources),
        run.data_sha256, data_hash(group.rows),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _slug(name: str) -> str:
    """A file name that no other group's name leads to.

    >>> _slug("written/harm")
    'written-harm-65948f'
    """
    readable = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _check_sources(groups: Mapping[str, Sequence[str]], examples: Sequence[Example]) -> None:
    known = {e.source for e in examples}
    for name, sources in groups.items():
        if unknown := [s for s in sources if s not in known]:
            raise DataError(
                f"group {name!r}: the recipe trains on no source {unknown[0]!r}",
                hint=f"known: {', '.join(sorted(known))}",
            )
