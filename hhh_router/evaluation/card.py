"""``CARD.md``: what a bundle is, what it was made of, and what was measured, each figure with its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from hhh_router.bundle import Manifest
from hhh_router.calibration import CalibrationFile


def card(manifest: Manifest, calibration: CalibrationFile, figures: Mapping[str, Any]) -> str:
    """The card as Markdown, from the manifest, the calibrators and ``figures.json``."""
    parts = [
        _head(manifest),
        _data(manifest),
        _detection(manifest, figures),
        _calibration(calibration),
        _behaviour(figures),
        _provenance(figures),
        _limits(),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _head(m: Manifest) -> str:
    use = "commercial use allowed" if m.commercial_use else "research only: some data forbids commercial use"
    return (
        f"# {m.name} {m.version}\n\n"
        "Three LoRA experts (helpful, harmless, honest), router and outcome heads, calibrators for one backbone.\n\n"
        f"- Backbone: `{m.backbone.source}` ({m.backbone.licence}), {m.backbone.layers} layers, {m.backbone.dtype}\n"
        f"- Experts: rank {next(iter(m.experts.values())).rank}, layers {m.first_adapted_layer} to "
        f"{m.backbone.layers - 1} only; heads read the states entering layers "
        f"{', '.join(map(str, m.heads.read_layers)) if m.heads else 'none'}\n"
        f"- Licence of the trained weights: {m.licence}; {use}\n"
        f"- Recipe: `recipes/{m.recipe}` (sha256 `{m.recipe_sha256[:16]}`), seed {m.seed}"
    )


def _data(m: Manifest) -> str:
    lines = [f"| {d.name} | {d.use} | {d.rows} | {d.licence} |" for d in m.data]
    return "## Data\n\n| set | use | rows drawn | licence |\n|---|---|---|---|\n" + "\n".join(lines)


def _detection(m: Manifest, figures: Mapping[str, Any]) -> str:
    trained = {d.name.split("/")[0] for d in m.data if d.use != "calibration"}
    lines = [_detection_row(f, trained) for f in figures["detection"]]
    return (
        "## Detection on rows nothing was trained or calibrated on\n\n"
        "No label of these eval rows was learned from or calibrated on. † other rows of the same data set were trained "
        "on; without it, nothing of that set was. Some sets have other rows in calibration (see Data); those that hold "
        "answers to eval prompts (XSTest completions, JailbreakBench artifacts) "
        "calibrated the outcomes of replies only. "
        "Intervals are 95 % bootstrap.\n\n"
        "| task | mode | n (positive) | AUROC | recall at 1 % FPR | F1 at .5 | recall / FPR at .9 | NLL | Brier "
        "| ECE |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _detection_row(f: Mapping[str, Any], trained: AbstractSet[str]) -> str:
    mark = " †" if trained & {s.split("/")[0] for s in f["sets"]} else ""
    cells = (
        f["task"] + mark,
        f["mode"],
        f"{f['n']} ({f['positives']})",
        f"{f['auroc']:.3f} {_span(f['auroc_interval'])}",
        f"{f['recall_at_fpr_01']:.2f}",
        f"{f['f1']:.2f}",
        f"{f['recall_at_0.9']:.2f} / {f['false_positive_rate_at_0.9']:.2f}",
        f"{f['nll']:.3f}",
        f"{f['brier']:.3f}",
        f"{f['ece']:.3f} {_span(f['ece_interval'])}",
    )
    return f"| {' | '.join(cells)} |"


def _calibration(file: CalibrationFile) -> str:
    lines = [
        f"| {mode} | {name} | {h.method} | {h.n} ({h.positives}) | {h.auroc:.3f} | "
        f"{h.nll:.3f} ({h.nll_identity:.3f}) | {h.brier:.3f} | {h.ece:.3f} ({h.ece_identity:.3f}) |"
        for mode, part in file.modes.items()
        for name, h in {**part.needs, **part.outcomes}.items()
    ]
    confidence = [
        f"| {mode} | {c.n} ({c.right}) | {c.auroc:.3f} | {c.nll:.3f} | {c.brier:.3f} | {c.ece:.3f} |"
        for mode, part in file.modes.items()
        if (c := part.confidence)
    ]
    return (
        f"## Calibration (`{file.id}`)\n\n"
        "Cross-validated on the calibration rows; in brackets the same without a calibrator.\n\n"
        "| mode | head | method | n (positive) | AUROC | NLL | Brier | ECE |\n|---|---|---|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n\nConfidence, P(the enforced verdict is right), nested cross-validation:\n\n"
        "| mode | n (right) | AUROC | NLL | Brier | ECE |\n|---|---|---|---|---|---|\n" + "\n".join(confidence)
    )


def _behaviour(figures: Mapping[str, Any]) -> str:
    rows = figures.get("behaviour", [])
    if not rows:
        return ""
    lines = [
        f"| {f['system']} | {f['harmful_refused']:.2f} {_span(f['harmful_interval'])} | "
        f"{f['safe_refused']:.2f} {_span(f['safe_interval'])} |"
        for f in rows
    ]
    return (
        "## Behaviour: who says no\n\n"
        f"Greedy replies of {figures['behaviour_max_tokens']} tokens to {rows[0]['harmful_n']} harmful JailbreakBench "
        f"and {rows[0]['safe_n']} safe XSTest prompts. A refusal is told from the reply's opening words, or is the "
        "policy's own; what a reply that complies is worth is not judged here.\n\n"
        "| system | refuses harmful | refuses safe (over-refusal) |\n|---|---|---|\n" + "\n".join(lines)
    )


def _provenance(figures: Mapping[str, Any]) -> str:
    return (
        "## Provenance\n\n"
        f"`{figures['command']}`, seed {figures['seed']}, {figures['bootstraps']} bootstrap samples, bundle parts "
        f"`{figures['bundle_parts'][:16]}`, torch {figures['versions']['torch']}, transformers "
        f"{figures['versions']['transformers']}. `figures.json` holds every number with the hash of its rows."
    )


def _limits() -> str:
    return (
        "## Limits\n\n"
        "A model of 135 M parameters knows little and can be fooled: treat its scores as one signal. English only. "
        "Calibration holds for traffic like the calibration rows; `in_distribution` says when a request is not. "
        "No claim is made about adversarial robustness."
    )


def _span(interval: Any) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"
