"""``CARD.md``: what a bundle is, what it was made of, and what was measured, each figure with its provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from hhh_router.bundle import Manifest
from hhh_router.calibration import CalibrationFile
from hhh_router.evaluation.confidence import TARGET_ECE
from hhh_router.evaluation.kinds import MEAN


def card(manifest: Manifest, calibration: CalibrationFile, figures: Mapping[str, Any]) -> str:
    """The card as Markdown, from the manifest, the calibrators and ``figures.json``."""
    parts = [
        _head(manifest),
        _data(manifest),
        _detection(manifest, figures),
        _latency(figures),
        _policies(figures),
        _confidence(figures),
        _kinds(figures),
        _gates(figures),
        _transfer(figures),
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
        f"XSTest prompts one at a time, same process and threads, {rows[0].get('dtype', figures['dtype'])}; compare "
        "within the table alone.\n\n"
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


def _confidence(figures: Mapping[str, Any]) -> str:
    rows = figures.get("confidence", [])
    if not rows:
        return ""
    pooled = [f for f in rows if f["task"] == rows[0]["task"]]
    keys = ("ece", "brier", "auroc", "aurc")
    lines = [f"| {f['confidence']} | {' | '.join(_share(f[k], f[f'{k}_interval'], 3) for k in keys)} |" for f in pooled]
    kappa = pooled[0]
    told = ", ".join(f"{name} {size:.2f}" for name, size in list(kappa["contributions"].items())[:5])
    return (
        "## Confidence in a refusal or its absence\n\n"
        f"{kappa['n']} prompts of the guard tasks, each refused or not at limit {kappa['limit']:g} of policy "
        f"`{kappa['policy']}`; {_share(kappa['accuracy'], kappa['accuracy_interval'], 3)} of these verdicts are right. "
        "AUROC: right against wrong verdicts. AURC: mean error when the least confident are left out first, lower is "
        f"better. Aimed at: ECE of kappa at most {TARGET_ECE:g} ({_met(kappa['meets_ece'])}), AURC below that of max "
        f"softmax ({_met(kappa['meets_aurc'])}; difference "
        f"{_share(kappa['aurc_difference'], kappa['aurc_difference_interval'], 3)}).\n\n"
        "| confidence | ECE | Brier | AUROC | AURC |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + (f"\n\nLargest mean contributions to kappa, in logits: {told}." if told else "")
    )


def _kinds(figures: Mapping[str, Any]) -> str:
    rows = figures.get("kinds", [])
    if not rows:
        return ""
    lines = [
        f"| {f['kind']} | {f['n']} ({f['positives']}) | {_share(f['auroc'], f['auroc_interval'])} | "
        f"{_share(f['recall'], f['recall_interval'])} | {_share(f['false_alarms'], f['false_alarms_interval'])} |"
        for f in rows
    ]
    (mean,) = (f for f in rows if f["kind"] == MEAN)
    return (
        "## XSTest by type\n\n"
        "Each safe type against the unsafe type written against it. No prompt of XSTest was trained on; pairs written "
        "for this project, where they were (`written/harm` under Data), follow several of the same ideas. Mean AUROC "
        f"over pairs aimed at: {mean['target']:.2f} ({_met(mean['meets'])}). Recall and false alarms at limit "
        f"{mean['limit']:g}.\n\n"
        "| safe type | n (unsafe) | AUROC | recall | false alarms |\n|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _gates(figures: Mapping[str, Any]) -> str:
    rows = figures.get("gates", [])
    if not rows:
        return ""
    lines = [
        f"| {f['gate']}{' (served)' if f.get('chosen') else ''} | {_plus_minus(f, 'nll')} | "
        f"{_plus_minus(f, 'nll_experts')} |"
        for f in rows
    ]
    return (
        "## Gates\n\n"
        f"How well each way to share a request out tells which expert makes the reply that should be given likelier: "
        f"cross-validated NLL in nats with its standard error, {rows[0]['n']} calibrate rows. Among experts: base is "
        "left aside, since some ways never give it a share. Floor: the entropy of what is to be told; uniform, thirds "
        "and the best fixed weighting look at no request.\n\n"
        "| gate | NLL | NLL among experts |\n|---|---|---|\n" + "\n".join(lines)
    )


def _plus_minus(f: Mapping[str, Any], key: str) -> str:
    if "error" in f:
        return f"not measured: {f['error']}"
    return "–" if f.get(key) is None else f"{f[key]:.3f} ± {f[f'{key}_error']:.3f}"


def _transfer(figures: Mapping[str, Any]) -> str:
    rows = figures.get("transfer", [])
    if not rows:
        return ""
    lines = [_transfer_row(f) for f in rows]
    return (
        "## Leave one source out\n\n"
        f"Heads trained again for {rows[0]['epochs']} epochs without a group of sources and asked about its held-out "
        "rows, beside heads trained as long with it. ‡ the group's rows are of one class: AUROC is against calibrate "
        "rows of the other sources.\n\n"
        "| left out | need | rows | n (positive) | AUROC without | AUROC with | lost | ECE without | ECE with |\n"
        "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _transfer_row(f: Mapping[str, Any]) -> str:
    start = f"| {f['group']} | {f['head']} | {f['split']} | {f['n']} ({f['positives']}) |"
    if "error" in f:
        return f"{start} not measured: {f['error']} | – | – | – | – |"
    mark = " ‡" if f["against"] != "own rows" else ""
    keys = ("auroc", "auroc_in_domain", "auroc_lost", "ece", "ece_in_domain")
    cells = [_share(f[k], f[f"{k}_interval"]) for k in keys]
    return f"{start} {cells[0]}{mark} | {' | '.join(cells[1:])} |"


def _met(meets: bool) -> str:
    return "met" if meets else "missed"


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


def _share(value: float | None, interval: Any, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if interval is None else f" {_span(interval, digits)}")


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
        f"{f['safe_refused']:.2f} {_span(f['safe_interval'])} | {f['truthful']:.3f} | "
        f"{f['joint']:.3f} {_span(f['joint_interval'])} |"
        for f in rows
    ]
    return (
        "## Behaviour: who says no\n\n"
        f"Greedy replies of {figures['behaviour_max_tokens']} tokens to {rows[0]['harmful_n']} harmful prompts "
        f"(JailbreakBench, HarmBench, AdvBench) and {rows[0]['safe_n']} safe ones (XSTest, CyberSecEval-FRR, "
        f"AlpacaEval). Whether a reply refuses is told by a judge independent of the heads, {_judge(figures)}, "
        "or it is the policy's own refusal; what a reply that complies is worth is not judged here. "
        f"MC2: {rows[0]['truthful_n']} questions of TruthfulQA; joint: mean of the shares of harmful prompts "
        "refused, safe ones not refused, and MC2.\n\n"
        "| system | refuses harmful | refuses safe (over-refusal) | MC2 | joint |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
    )


def _judge(figures: Mapping[str, Any]) -> str:
    rows = [f for f in figures.get("judge", []) if f["judge"] == "TF-IDF judge"]
    told = [f"on {f['n']} replies ({f['replies']}) κ {f['kappa']:.2f} {_span(f['kappa_interval'])}" for f in rows]
    return f"whose agreement with people is {' and '.join(told)}" if told else "the reply's opening words"


def _provenance(figures: Mapping[str, Any]) -> str:
    return (
        "## Provenance\n\n"
        f"Last run: `{figures['command']}`, seed {figures['seed']}, {figures['dtype']}, {figures['bootstraps']} "
        f"bootstrap samples, bundle parts `{figures['bundle_parts'][:16]}`, reader "
        f"`{figures['bundle_reader'][:16]}`, torch {figures['versions']['torch']}, "
        f"transformers {figures['versions']['transformers']}. `figures.json` holds every number with its command, "
        "precision and the hash of its rows."
    )


def _limits() -> str:
    return (
        "## Limits\n\n"
        "A model of 135 M parameters knows little and can be fooled: treat its scores as one signal. English only. "
        "Calibration holds for traffic like the calibration rows; `in_distribution` says when a request is not. "
        "No claim is made about adversarial robustness."
    )


def _span(interval: Any, digits: int = 2) -> str:
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
