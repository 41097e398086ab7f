"""Measure one bundle, part by part, and write ``figures.json``, ``CARD.md`` and ``report.html`` into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hhh_router.bundle import Bundle
from hhh_router.calibration import CalibrationFile, Calibrators
from hhh_router.data.examples import Example, ask, data_hash
from hhh_router.errors import BundleError, DataError
from hhh_router.evaluation.card import card
from hhh_router.evaluation.confidence import confidence_figures, judge, refusal_limit
from hhh_router.evaluation.detection import (
    BOOTSTRAPS,
    BundleDetector,
    Detector,
    detection_figures,
    latency_ms,
)
from hhh_router.evaluation.evasion import evasion_figures
from hhh_router.evaluation.gates import check_formulations, gate_figures
from hhh_router.evaluation.kinds import pair_figures, subgroup_figures
from hhh_router.evaluation.release import FIGURES, parts_hash, reader_hash
from hhh_router.evaluation.report import render_report
from hhh_router.evaluation.routing import simplex, tradeoff
from hhh_router.evaluation.steering import STEERING, Steering
from hhh_router.evaluation.tasks import SUITES, TASKS, Task, task_rows
from hhh_router.evaluation.transfer import EPOCHS, transfer_figures
from hhh_router.model.worker import open_reader
from hhh_router.policy import list_policies, load_policy
from hhh_router.settings import Settings
from hhh_router.training.build import Workshop
from hhh_router.training.features import BATCH_TOKENS, encode_cut, states_folder
from hhh_router.training.recipe import Recipe, load_recipe
from hhh_router.types import ReadRequest, Scores

MAX_TOKENS = 384
"""Longer texts are cut to this many tokens, template included, in every detection task and for every detector."""
DEFAULT_PARTS: tuple[str, ...] = tuple(dict.fromkeys((*SUITES, *STEERING, "calibration", "evasion")))
"""What is measured when nothing is named."""
PARTS: tuple[str, ...] = (*DEFAULT_PARTS, "gates", "transfer")
"""What can be measured; the last two need a recipe, and ``transfer`` trains heads again, which takes an hour."""
_OF_RECIPE: Mapping[str, str] = {"transfer": "trains a recipe's heads again", "gates": "draws a recipe's rows"}
_POLICY = "balanced"  # the shipped policy whose refusals confidence and kinds are judged at
_ALL_GUARD = "all guard tasks"
_EVASION_PROMPTS = 120  # harmful and benign each
_EVASION_LIMIT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every part needs."""

    bundle: Bundle
    data: Path
    settings: Settings
    seed: int
    detector: BundleDetector
    work: Path
    """Folder for token states and checkpoints that are kept between runs."""
    recipe: Path | None = None
    """The recipe whose heads are trained again for the part ``transfer``, and whose rows ``gates`` are compared on."""
    formulations: Mapping[str, Path] = field(default_factory=dict)
    """Name → heads trained under that formulation, for the part ``gates``."""
    baselines: Sequence[Detector] = ()
    rows: int = 40
    """Prompts per set of the behaviour suite, and of IFEval."""
    items: int = 200
    """Items of each likelihood suite."""
    max_tokens: int = 40
    """Of each reply of the behaviour suite."""
    without: Sequence[str] = ()
    """Groups of sources that the part ``transfer`` leaves out, each by itself; empty: every one."""
    epochs: int = EPOCHS
    """Of every training of the part ``transfer``."""
    on_progress: Callable[[str, int, int, str], None] = field(default=lambda *_: None)

    def told(self, part: str) -> Callable[[int, int, str], None]:
        """Progress of one part."""
        return lambda done, total, note: self.on_progress(part, done, total, note)


def open_bench(name: str | Path, data: Path, *, settings: Settings, seed: int, work: Path, **more: Any) -> Bench:
    """Load a bundle's reader and calibrators for measuring.

    Args:
        name: Bundle name or folder.
        data: Folder of data sets.
        settings: Threads, device, precision.
        seed: Of every bootstrap and draw.
        work: Folder for token states that are kept between runs.
        more: Further fields of `Bench`.

    Raises:
        BundleError: The bundle is not complete.
    """
    bundle = Bundle.load(name)
    bundle.verify()
    manifest = bundle.manifest
    if manifest.heads is None or manifest.calibrators is None:
        raise BundleError(f"{bundle.root}: has no heads or no calibrators", hint="train and calibrate it first")
    reader, encoder = open_reader(bundle, settings)
    calibrators = Calibrators.load(
        bundle.root / manifest.calibrators.path, heads_sha256=manifest.heads.sha256, dtype=reader.dtype
    )
    folder = states_folder(work, manifest.backbone)
    detector = BundleDetector(manifest.name, reader, encoder, calibrators, max_tokens=MAX_TOKENS, folder=folder)
    return Bench(bundle=bundle, data=data, settings=settings, seed=seed, detector=detector, work=work, **more)


def measure(bench: Bench, parts: Sequence[str], command: str) -> list[Path]:
    """Run some parts, keep the others where the same bundle was measured before, and write everything; files written.

    ``figures.json`` is written after each part, so a run that is killed keeps what it had measured.

    Raises:
        DataError: No such part.
    """
    check_parts(parts, bench.recipe, bench.formulations)
    root, manifest = bench.bundle.root, bench.bundle.manifest
    digest = parts_hash(bench.bundle)
    reader = reader_hash(bench.bundle)
    figures = _earlier(root / FIGURES, digest, reader, manifest.name) | {
        "command": command,
        "seed": bench.seed,
        "bootstraps": BOOTSTRAPS,
        "bundle_parts": digest,
        "bundle_reader": reader,
        "dtype": bench.detector.reader.dtype,
        "max_tokens": MAX_TOKENS,
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "hhh-router")},
    }
    steering = cache(partial(Steering, bench))  # puts the experts on the backbone, so at most once
    for part in PARTS:
        if part in parts:
            figures |= _part(bench, part, figures, command, steering)
            (root / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    calibration = CalibrationFile.read(root / manifest.calibrators.path)  # type: ignore[union-attr]
    written = {"CARD.md": card(manifest, calibration, figures), "report.html": render_report(manifest, figures)}
    for name, text in written.items():
        (root / name).write_text(text, encoding="utf-8")
    return [root / name for name in (FIGURES, *written)]


def check_parts(
    parts: Sequence[str], recipe: Path | None = None, formulations: Mapping[str, Path] | None = None
) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        BundleError: Heads of a formulation that cannot be read.
        DataError: No such part, one that needs a recipe without any, or formulations that no part would compare.
    """
    if unknown := [p for p in parts if p not in PARTS]:
        raise DataError(f"no suite {unknown[0]!r}", hint=f"known: {', '.join(PARTS)}")
    if recipe is None and (wanting := [p for p in parts if p in _OF_RECIPE]):
        raise DataError(
            f"suite {wanting[0]!r} {_OF_RECIPE[wanting[0]]}, and no recipe was given",
            hint="add --recipe FILE, the recipe that the bundle was made with",
        )
    if formulations and "gates" not in parts:
        raise DataError("formulations are compared by suite 'gates' alone", hint="add --suite gates")
    check_formulations(formulations or {})


def _part(
    bench: Bench, part: str, figures: Mapping[str, Any], command: str, steering: Callable[[], Steering]
) -> dict[str, Any]:
    """The figures of one part, each row with the command that made it."""
    found: dict[str, Any] = {}
    if part in SUITES:
        made = _stamped(bench, _detection(bench, part), command)
        found["detection"] = _still_true(figures.get("detection", []), made, part) + made
    if part == "guard":
        # timed once, with the suite that asks about prompts of every kind, so that no other run replaces the table
        found["latency"] = _stamped(bench, _latency(bench), command)
    if part in STEERING:
        steered = steering().part(part)
        found |= {k: _stamped(bench, v, command) if isinstance(v, list) else v for k, v in steered.items()}
    if "likelihood" in found:
        found["likelihood"] = [f for f in figures.get("likelihood", []) if f["suite"] != part] + found["likelihood"]
    if found:
        return found
    if part == "calibration":
        return _calibration(bench, command)
    if part == "evasion":
        return {"evasion": _stamped(bench, _evasion(bench), command)}
    if part == "gates":
        return {"gates": _stamped(bench, _gates(bench, steering()), command)}
    return {"transfer": _stamped(bench, _transfer(bench), command)}


def _still_true(earlier: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    """Rows of other suites, and rows of this one whose system was not measured now, on the very same prompts."""
    measured, now = {f["system"] for f in made}, {(f["task"], f["data_sha256"]) for f in made if "error" not in f}
    return [
        f
        for f in earlier
        if f["suite"] != suite or (f["system"] not in measured and (f["task"], f.get("data_sha256")) in now)
    ]


_OF_READER = ("detection", "latency", "evasion", "subgroups", "kinds", "tradeoff")
"""Parts of the figures that experts, gate and confidence have no part in."""


def _earlier(path: Path, parts: str, reader: str, bundle: str) -> dict[str, Any]:
    """Figures measured before that still hold: all of the same bundle, those of readings where heads and calibrators
    are the same, and of any other bundle what baselines gave, which does not depend on it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if found.get("bundle_parts") == parts:
        return dict(found)
    if found.get("bundle_reader") == reader:
        return {part: found[part] for part in _OF_READER if part in found}
    return {"detection": [f for f in found.get("detection") or [] if f["system"] != bundle]}


def _stamped(bench: Bench, rows: Sequence[Mapping[str, Any]], command: str) -> list[dict[str, Any]]:
    """Rows with how they were made, since later runs may keep them and be of another precision."""
    return [{**row, "command": command, "dtype": bench.detector.reader.dtype} for row in rows]


def _detection(bench: Bench, suite: str) -> list[dict[str, Any]]:
    tasks = [t for t in TASKS if t.suite == suite]
    return detection_figures(
        [bench.detector, *bench.baselines], tasks, bench.data, seed=bench.seed, on_task=bench.told(suite)
    )


def _latency(bench: Bench) -> list[dict[str, Any]]:
    rows = task_rows(_task("prompt harm · XSTest"), bench.data)
    texts = [ReadRequest(messages=e.messages) for e in rows]
    found = [{"system": bench.detector.name, **latency_ms(bench.detector.read_one, texts)}]
    for baseline in bench.baselines:
        head = "harmless" if "harmless" in baseline.heads else min(baseline.heads)
        found.append(
            {"system": baseline.name, **latency_ms(lambda t, b=baseline, h=head: b.probabilities([t], h), texts)}  # type: ignore[misc]
        )
    return [{**row, "seed": bench.seed, "data_sha256": data_hash(rows)} for row in found]


def _calibration(bench: Bench, command: str) -> dict[str, Any]:
    """Subgroups of every task with a target; on the guard suite's eval prompts the confidence, XSTest by kind, both
    error sides of the policies, and the simplex."""
    groups: list[dict[str, Any]] = []
    aimed_at = [t for t in TASKS if t.target is not None]
    told = bench.told("calibration")
    for number, task in enumerate(aimed_at, start=1):
        told(number, len(aimed_at), task.name)
        rows = task_rows(task, bench.data)
        p = bench.detector.probabilities([_asked(task, e) for e in rows], task.head)
        y = [getattr(e, task.kind)[task.head] for e in rows]
        groups += subgroup_figures(task.name, rows, p, y, seed=bench.seed, bootstraps=BOOTSTRAPS)
    harm = _once([e for t in TASKS if t.suite == "guard" for e in task_rows(t, bench.data)])
    more = _once([e for t in TASKS if t.suite == "honesty" for e in task_rows(t, bench.data)][::10])
    policies = [load_policy(name) for name in list_policies()]
    calibrators = bench.detector.calibrators
    every = [*harm, *more]
    scores = bench.detector.scores([ReadRequest(messages=e.messages) for e in every])
    stamp = {"command": command, "seed": bench.seed}
    return {
        "subgroups": _stamped(bench, groups, command),
        "confidence": _stamped(bench, _confidence(bench, harm, scores[: len(harm)]), command),
        "kinds": _stamped(bench, _kinds(bench), command),
        "tradeoff": tradeoff(harm, scores[: len(harm)], policies, calibrators) | stamp,
        "simplex": simplex(every, scores, calibrators) | stamp,
    }


def _confidence(bench: Bench, harm: Sequence[Example], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """How good the served confidence is on all prompts of the guard suite, and on each of its tasks with a target."""
    policy = load_policy(_POLICY)
    score_of = {e.prompt: s for e, s in zip(harm, scores, strict=True)}
    tasks = {_ALL_GUARD: harm}
    tasks |= {t.name: task_rows(t, bench.data) for t in TASKS if t.suite == "guard" and t.target is not None}
    figures: list[dict[str, Any]] = []
    for name, rows in tasks.items():
        judged = judge(rows, [score_of[e.prompt] for e in rows], policy, bench.detector.calibrators)
        figures += confidence_figures(name, rows, judged, policy=policy.name, seed=bench.seed, bootstraps=BOOTSTRAPS)
    return figures


def _kinds(bench: Bench) -> list[dict[str, Any]]:
    """XSTest's safe types against their contrasts; nothing where its task is not measured."""
    figures: list[dict[str, Any]] = []
    for task in (t for t in TASKS if t.sets == ("xstest",)):
        rows = task_rows(task, bench.data)
        p = bench.detector.probabilities([_asked(task, e) for e in rows], task.head)
        figures += pair_figures(
            rows, p, limit=refusal_limit(load_policy(_POLICY)), seed=bench.seed, bootstraps=BOOTSTRAPS
        )
    return figures


def _gates(bench: Bench, steering: Steering) -> list[dict[str, Any]]:
    """Gates compared on the recipe's usefulness rows; the experts are on the backbone already."""
    return gate_figures(bench, steering.runner, _recipe(bench)[1], formulations=bench.formulations)


def _recipe(bench: Bench) -> tuple[Path, Recipe, str]:
    """The bundle's recipe, its file and its hash."""
    if bench.recipe is None:
        raise DataError("no recipe was given", hint="add --recipe FILE")
    recipe, sha256 = load_recipe(bench.recipe)
    if states_folder(bench.work, recipe.backbone) != bench.detector.folder:
        raise DataError(
            f"{bench.recipe}: names another backbone than the bundle", hint="give the recipe the bundle was made with"
        )
    return bench.recipe, recipe, sha256


def _transfer(bench: Bench) -> list[dict[str, Any]]:
    """Heads trained again without a group of sources each; the backbone and its kept states are the bench's."""
    path, recipe, sha256 = _recipe(bench)
    shop = Workshop(
        recipe=recipe, recipe_file=path.name, recipe_sha256=sha256, data=bench.data, bundle=bench.bundle.root,
        work=bench.work / recipe.name, cache_dir=bench.settings.cache_dir, threads=bench.settings.threads,
        device=bench.settings.device, on_progress=bench.on_progress,
    )  # fmt: skip
    reader, encoder = bench.detector.reader, bench.detector.encoder
    return transfer_figures(
        shop, reader, encoder, seed=bench.seed, bootstraps=BOOTSTRAPS, only=bench.without, epochs=bench.epochs
    )


def _asked(task: Task, example: Example) -> ReadRequest:
    return ReadRequest(messages=example.messages, response=None if task.mode == "prompt" else example.response)


def _once(rows: Sequence[Example]) -> list[Example]:
    return list({e.prompt: e for e in rows}.values())


def _task(name: str) -> Task:
    return next(t for t in TASKS if t.name == name)


def _evasion(bench: Bench) -> list[dict[str, Any]]:
    """Rewritten prompts of JailbreakBench and XSTest; every text is read anew, as a request would be."""
    rows = [e for name in ("JailbreakBench", "XSTest") for e in task_rows(_task(f"prompt harm · {name}"), bench.data)]
    harmful = [e.prompt for e in rows if e.needs["harmless"]][:_EVASION_PROMPTS]
    benign = [e.prompt for e in rows if not e.needs["harmless"]][:_EVASION_PROMPTS]
    reader, encoder, calibrators = bench.detector.reader, bench.detector.encoder, bench.detector.calibrators

    def score(texts: Sequence[str]) -> list[float]:
        encoded = [encode_cut(encoder, ReadRequest(messages=ask(t)), MAX_TOKENS) for t in texts]
        found = [0.0] * len(texts)
        for batch in reader.batches(encoded, BATCH_TOKENS):
            for i, s in zip(batch, reader.score([encoded[i] for i in batch]), strict=True):
                found[i] = calibrators.evidence(s).needs["harmless"]
        return found

    return evasion_figures(
        score, harmful, benign, limit=_EVASION_LIMIT, seed=bench.seed, on_family=bench.told("evasion")
    )
