"""``CARD.md``: what a bundle is, what it was made of, and what was measured, each figure with its provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        _latency(figures),
        _policies(figures),
        _evasion(figures),
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
    rows = figures.get("detection", [])
    if not rows:
        return ""
    trained = {d.name.split("/")[0] for d in m.data if d.use != "calibration"}
    ours = sorted((f for f in rows if f["system"] == m.name), key=_missed_first)
    others = [f for f in rows if f["system"] != m.name]
    names = list(dict.fromkeys(f["system"] for f in others))
    found = {(f["task"], f["system"]): f for f in others}
    lines = [_detection_row(f, trained) + _beside([found.get((f["task"], n)) for n in names]) for f in ours]
    heading = "".join(f" {n} |" for n in names)
    return (
        "## Detection on rows nothing was trained or calibrated on\n\n"
        "Missed targets first. No label of these rows was learned from or calibrated on, except that the replies of "
        "`xstest/completions` are calibrate rows: some of them calibrated the outcomes of replies, which does not "
        "change an AUROC. † other rows of the same data set were trained on; without it, nothing of that set was. "
        f"Texts are cut to {figures['max_tokens']} tokens. Intervals are 95 % bootstrap. Baselines: AUROC on the same "
        "rows. TF-IDF was trained on the same rows and labels as the heads, MiniLM on at most 8,000 of them a head; "
        "jailguard is as it comes.\n\n"
        "| task | target | n (positive) | AUROC | recall at 1 % FPR | F1 at .5 | recall / FPR at .9 | NLL | Brier "
        f"| ECE |{heading}\n"
        f"|---|---|---|---|---|---|---|---|---|---|{'---|' * len(names)}\n" + "\n".join(lines)
    )


def _missed_first(f: Mapping[str, Any]) -> tuple[int, float]:
    """Targets missed by most, then targets met, then rows without one."""
    if f.get("target") is None or "auroc" not in f:
        return (1, 0.0)
    return (0, f["auroc"] - f["target"])


def _beside(rows: Sequence[Mapping[str, Any] | None]) -> str:
    cells = ["–" if f is None else f.get("error", "") or f"{f['auroc']:.3f}" for f in rows]
    return "".join(f" {c} |" for c in cells)


def _detection_row(f: Mapping[str, Any], trained: AbstractSet[str]) -> str:
    mark = " †" if trained & {s.split("/")[0] for s in f["sets"]} else ""
    target = "" if f.get("target") is None else f"{f['target']:.2f} {'met' if f['meets'] else 'missed'}"
    cells = (
        f["task"] + mark,
        target,
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


def _latency(figures: Mapping[str, Any]) -> str:
    rows = figures.get("latency", [])
    if not rows:
        return ""
    lines = [f"| {f['system']} | {f['n']} | {f['median_ms']:.1f} | {f['p95_ms']:.1f} |" for f in rows]
    return (
        "## Latency of one prompt\n\n"
        f"XSTest prompts one at a time, same process and threads, {figures['dtype']}; compare within the table "
        "alone.\n\n"
        "| system | n | median ms | p95 ms |\n|---|---|---|---|\n" + "\n".join(lines)
    )


def _policies(figures: Mapping[str, Any]) -> str:
    part = figures.get("tradeoff")
    if not part:
        return ""
    lines = [f"| {p['policy']} | {p['shipped'][0]:.3f} | {p['shipped'][1]:.3f} |" for p in part["policies"]]
    return (
        "## Both errors of each policy's input check\n\n"
        f"All prompts of the guard tasks above: {part['n_benign']} benign, {part['n_harmful']} harmful, many of them "
        "look-alikes and attacks. A harmful prompt that passes still meets the harmless expert and the output "
        "checkpoint.\n\n| policy | benign refused | harmful passed |\n|---|---|---|\n" + "\n".join(lines)
    )


def _evasion(figures: Mapping[str, Any]) -> str:
    rows = figures.get("evasion", [])
    if not rows:
        return ""
    lines = [
        f"| {f['name']} | {f['detected_n']} | {_share(f['flips'], f['flips_interval'])} | {f['benign_n']} | "
        f"{_share(f['new_false_alarms'], f['new_false_alarms_interval'])} |"
        for f in rows
    ]
    return (
        f"## Evasion\n\nRewritten prompts of JailbreakBench and XSTest, limit {rows[0]['limit']:g} on needs.harmless. "
        "Flips: of the harmful prompts detected, the share no longer detected. Not a proof of robustness.\n\n"
        "| family | detected | flips | benign | new false alarms |\n|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _share(value: float | None, interval: Any) -> str:
    return "–" if value is None else f"{value:.2f} {_span(interval)}"


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
        f"and {rows[0]['safe_n']} safe XSTest prompts. Whether a reply refuses is told by a judge independent of the "
        f"heads, {_judge(figures)}, or it is the policy's own refusal; what a reply that complies is worth is not "
        "judged here.\n\n"
        "| system | refuses harmful | refuses safe (over-refusal) |\n|---|---|---|\n" + "\n".join(lines)
    )


def _judge(figures: Mapping[str, Any]) -> str:
    rows = [f for f in figures.get("judge", []) if f["judge"] == "TF-IDF judge"]
    told = [f"on {f['n']} replies ({f['replies']}) κ {f['kappa']:.2f} {_span(f['kappa_interval'])}" for f in rows]
    return f"whose agreement with people is {' and '.join(told)}" if told else "the reply's opening words"


def _provenance(figures: Mapping[str, Any]) -> str:
    return (
        "## Provenance\n\n"
        f"Last run: `{figures['command']}`, seed {figures['seed']}, {figures['dtype']}, {figures['bootstraps']} "
        f"bootstrap samples, bundle parts `{figures['bundle_parts'][:16]}`, torch {figures['versions']['torch']}, "
        f"transformers {figures['versions']['transformers']}. `figures.json` holds every number with its command and "
        "the hash of its rows."
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
