"""Measure one bundle, part by part, and write ``figures.json``, ``CARD.md`` and ``report.html`` into it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hhh_router.bundle import Bundle
from hhh_router.calibration import CalibrationFile, Calibrators
from hhh_router.calibration.metrics import subgroup_ece
from hhh_router.data.examples import Example, ask, data_hash
from hhh_router.errors import BundleError, DataError
from hhh_router.evaluation.behaviour import behaviour_figures
from hhh_router.evaluation.card import card
from hhh_router.evaluation.detection import (
    BOOTSTRAPS,
    BundleDetector,
    Detector,
    detection_figures,
    latency_ms,
)
from hhh_router.evaluation.evasion import evasion_figures
from hhh_router.evaluation.judge import RefusalJudge, agreement, labelled_replies
from hhh_router.evaluation.release import FIGURES, parts_hash
from hhh_router.evaluation.report import render_report
from hhh_router.evaluation.routing import simplex, tradeoff
from hhh_router.evaluation.tasks import SUITES, TASKS, Task, task_rows
from hhh_router.interfaces.sdk import AsyncHHHRouter
from hhh_router.model.worker import open_reader
from hhh_router.policy import list_policies, load_policy
from hhh_router.settings import Settings
from hhh_router.training.features import BATCH_TOKENS, encode_cut, states_folder
from hhh_router.types import ReadRequest

MAX_TOKENS = 384
"""Longer texts are cut to this many tokens, template included, in every detection task and for every detector."""
PARTS: tuple[str, ...] = (*SUITES, "calibration", "evasion", "behaviour")
"""What can be measured."""
_EVASION_PROMPTS = 120  # harmful and benign each
_EVASION_LIMIT = 0.5
# no bounds, no rules: fixed weights are applied exactly as they are given, and the router's own unchanged
_UNBOUND = """\
version: 1
name: unbound
weights: {helpful: 1.0, harmless: 1.0, honest: 1.0}
strength: 0.0
checkpoints:
  input: [{then: allow}]
  output: [{then: allow}]
on_error: closed
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every part needs."""

    bundle: Bundle
    data: Path
    settings: Settings
    seed: int
    detector: BundleDetector
    baselines: Sequence[Detector] = ()
    rows: int = 40
    max_tokens: int = 40
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
    return Bench(bundle=bundle, data=data, settings=settings, seed=seed, detector=detector, **more)


def measure(bench: Bench, parts: Sequence[str], command: str) -> list[Path]:
    """Run some parts, keep the others where the same bundle was measured before, and write everything; files written.

    ``figures.json`` is written after each part, so a run that is killed keeps what it had measured.

    Raises:
        DataError: No such part.
    """
    check_parts(parts)
    root, manifest = bench.bundle.root, bench.bundle.manifest
    digest = parts_hash(bench.bundle)
    figures = _earlier(root / FIGURES, digest) | {
        "command": command,
        "seed": bench.seed,
        "bootstraps": BOOTSTRAPS,
        "bundle_parts": digest,
        "dtype": bench.detector.reader.dtype,
        "max_tokens": MAX_TOKENS,
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "hhh-router")},
    }
    for part in PARTS:
        if part in parts:
            figures |= _part(bench, part, figures, command)
            (root / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    calibration = CalibrationFile.read(root / manifest.calibrators.path)  # type: ignore[union-attr]
    written = {"CARD.md": card(manifest, calibration, figures), "report.html": render_report(manifest, figures)}
    for name, text in written.items():
        (root / name).write_text(text, encoding="utf-8")
    return [root / name for name in (FIGURES, *written)]


def check_parts(parts: Sequence[str]) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        DataError: No such part.
    """
    if unknown := [p for p in parts if p not in PARTS]:
        raise DataError(f"no suite {unknown[0]!r}", hint=f"known: {', '.join(PARTS)}")


def _part(bench: Bench, part: str, figures: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The figures of one part, each row with the command that made it."""
    if part in SUITES:
        kept = [f for f in figures.get("detection", []) if f["suite"] != part]
        found: dict[str, Any] = {"detection": kept + _stamped(_detection(bench, part), command)}
        # timed once, with the suite that asks about prompts of every kind, so that no other run replaces the table
        return found | ({"latency": _stamped(_latency(bench), command)} if part == "guard" else {})
    if part == "calibration":
        return _calibration(bench, command)
    if part == "evasion":
        return {"evasion": _stamped(_evasion(bench), command)}
    return {
        "behaviour_max_tokens": bench.max_tokens,
        "judge": _stamped(agreement(bench.data, seed=bench.seed), command),
        "behaviour": _stamped(asyncio.run(_behaviour(bench)), command),
    }


def _earlier(path: Path, bundle_parts: str) -> dict[str, Any]:
    """Figures of the same bundle measured before; nothing of another."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(found) if found.get("bundle_parts") == bundle_parts else {}


def _stamped(rows: Sequence[Mapping[str, Any]], command: str) -> list[dict[str, Any]]:
    return [{**row, "command": command} for row in rows]


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
    """Subgroup ECE, both error sides of the policies, and the simplex, on the guard suite's eval prompts."""
    groups: list[dict[str, Any]] = []
    for task in (t for t in TASKS if t.target is not None):
        rows = task_rows(task, bench.data)
        p = bench.detector.probabilities([_asked(task, e) for e in rows], task.head)
        y = [getattr(e, task.kind)[task.head] for e in rows]
        for kind, names in (("group", [e.group or e.source for e in rows]), ("length", [_length(e) for e in rows])):
            for name, (n, ece) in subgroup_ece(p, y, names).items():
                groups.append(
                    {"task": task.name, "group": f"{kind}: {name}", "n": n, "ece": ece, "seed": bench.seed,
                     "data_sha256": data_hash(rows)}
                )  # fmt: skip
    harm = _once([e for t in TASKS if t.suite == "guard" for e in task_rows(t, bench.data)])
    more = _once([e for t in TASKS if t.suite == "honesty" for e in task_rows(t, bench.data)][::10])
    policies = [load_policy(name) for name in list_policies()]
    calibrators = bench.detector.calibrators
    every = [*harm, *more]
    scores = bench.detector.scores([ReadRequest(messages=e.messages) for e in every])
    stamp = {"command": command, "seed": bench.seed}
    return {
        "subgroups": _stamped(groups, command),
        "tradeoff": tradeoff(harm, scores[: len(harm)], policies, calibrators) | stamp,
        "simplex": simplex(every, scores, calibrators) | stamp,
    }


def _asked(task: Task, example: Example) -> ReadRequest:
    return ReadRequest(messages=example.messages, response=None if task.mode == "prompt" else example.response)


def _length(example: Example) -> str:
    words = len(example.prompt.split())
    return "up to 12 words" if words <= 12 else "13 to 50 words" if words <= 50 else "more than 50 words"


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


async def _behaviour(bench: Bench) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        unbound = Path(folder) / "unbound.yaml"
        unbound.write_text(_UNBOUND, encoding="utf-8")
        settings = bench.settings
        async with AsyncHHHRouter(
            bundle=str(bench.bundle.root), cache_dir=settings.cache_dir, threads=settings.threads
        ) as router:
            return await behaviour_figures(
                router,
                str(unbound),
                list_policies(),
                bench.data,
                rows=bench.rows,
                max_tokens=bench.max_tokens,
                seed=bench.seed,
                says_no=RefusalJudge.train(labelled_replies(bench.data, "calibrate")).refuses,
                on_step=bench.told("behaviour"),
            )
