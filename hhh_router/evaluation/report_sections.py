"""The report's sections but for detection's: each takes one part of ``figures.json`` and says what it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from hhh_router.evaluation import charts
from hhh_router.evaluation.blocks import SIGNS, Charts, Panel, Section
from hhh_router.evaluation.charts import DotRow
from hhh_router.evaluation.confidence import TARGET_ECE
from hhh_router.evaluation.report_detection import Target
from hhh_router.evaluation.report_parts import COUNTS, Row
from hhh_router.evaluation.svg import plain
from hhh_router.evaluation.tables import (
    column,
    distinct,
    dot_of,
    dots_of,
    grouped_by,
    keys_of,
    number,
    source_of,
    table_of,
)

_OVERALL = "overall"  # the name of evasion's row over every family


def subgroups(rows: list[Row]) -> Iterator[Section]:
    """Calibration of each task by group, the worst first."""
    tasks = {t: sorted((r for r in rows if r["task"] == t), key=lambda r: -r["ece"]) for t in column(rows, "task")}
    ordered = [row for task in tasks.values() for row in task]
    panels = (
        dots_of(f"{plain(t)}, worst group first", part, "group", {"ECE": "ece"}, "ECE") for t, part in tasks.items()
    )
    yield Section(
        title="Calibration of subgroups",
        lead="A calibrated whole can hide parts that are not. The worst group of each task stands first; small groups "
        "have a large ECE by chance alone, so read it beside n.",
        blocks=(grouped_by("task", ordered, {"group": "group"}), Charts(layout="wide", panels=tuple(panels))),
    )


def targets(parts: Mapping[str, Sequence[Row]]) -> Iterator[Target]:
    """What is aimed at beside detection; of the confidence only over all tasks together."""
    for row in parts.get("confidence", [])[:1]:
        difference = number(row["aurc_difference"], 4)
        yield (
            "confidence, ECE of kappa",
            f"{SIGNS['missed']}, ECE {number(row['ece'], 3)}, at most {TARGET_ECE:g} aimed at",
            bool(row["meets_ece"]),
        )
        yield (
            "confidence, AURC of kappa",
            f"{SIGNS['missed']}, AURC minus that of max softmax {difference}, below 0 aimed at",
            bool(row["meets_aurc"]),
        )
    for row in parts.get("kinds", []):
        if "meets" in row:
            said = f"{SIGNS['missed']}, AUROC {number(row['auroc'], 3)}, {number(row['target'], 2)} aimed at"
            yield f"XSTest by type, {row['kind']}", said, bool(row["meets"])


def kinds(rows: list[Row]) -> Iterator[Section]:
    """XSTest's types of safe prompts, each against its contrast."""
    lines = [DotRow(label=plain(row["kind"]), dots=(dot_of(row, "auroc", 0),)) for row in rows]
    (mean,) = (row for row in rows if "meets" in row)
    alt = "AUROC of each safe type of XSTest against its contrast: " + "; ".join(
        f"{row['kind']} {number(row['auroc'], 3)}" for row in rows
    )
    draw = partial(charts.dots, lines, x_label="AUROC", alt=alt, reference=float(mean["target"]))
    yield Section(
        title="XSTest by type",
        lead="Each type of safe prompts that look unsafe against the unsafe type that shares its words. False alarms: "
        "of the safe type, the share flagged at the shipped limit; recall: of the unsafe type. No prompt of XSTest was "
        "trained on; pairs written for this project, where a bundle was trained on them, follow several of the same "
        "ideas.",
        blocks=(
            table_of(
                rows,
                {"kind": "safe type", "contrast": "unsafe type"},
                strong=lambda row: "meets" in row,
                hide=("meets",),
            ),
            Charts(layout="wide", panels=(Panel(caption="AUROC; dotted: the mean aimed at", drawings=(draw,)),)),
        ),
    )


def transfer(rows: list[Row]) -> Iterator[Section]:
    """Heads without a group of sources, asked about that group."""
    keys = {"without the group": "auroc", "with it": "auroc_in_domain"}
    panels = [
        dots_of(f"Need: {plain(head)}", [row for row in rows if row["head"] == head], "group", keys, "AUROC")
        for head in column([row for row in rows if not row.get("error")], "head")
    ]
    yield Section(
        title="Leave one source out",
        lead="Heads trained again without a group of sources, calibrated without it, asked about its held-out rows, "
        "beside heads trained as long with everything. A data set can be told by its style alone, so what holds "
        "without the group holds more. Where the group's rows are of one class, AUROC is against calibrate rows of the "
        "other sources.",
        blocks=(
            grouped_by(
                "head",
                rows,
                {
                    "group": "left out",
                    "split": "asked about",
                    "against": "AUROC against",
                    "left_out": "rows left out",
                    "epochs": "epochs",
                },
            ),
            *([Charts(layout="wide", panels=tuple(panels), keys=keys_of(keys))] if panels else []),
        ),
    )


def simplex(rows: list[Row]) -> Iterator[Section]:
    """Where requests lie among the experts."""
    (row,) = rows
    points = row["points"]
    groups = distinct(point["group"] for point in points)
    names = ("base", "helpful", "harmless", "honest")
    means: list[Row] = []
    for group in groups:
        inside = [point["posterior"] for point in points if point["group"] == group]
        shares = {name: sum(float(p[i]) for p in inside) / len(inside) for i, name in enumerate(names)}
        means.append({**source_of(row), "n": len(inside), "group": group, **shares})
    alt = "Triangle of helpful, harmless and honest with one mark per request. Means: " + "; ".join(
        f"{m['group']} " + ", ".join(f"{name} {number(m[name], 2)}" for name in names) for m in means
    )
    place = [(groups.index(point["group"]), point["posterior"]) for point in points]
    caption = f"Posterior of {row['n']} requests; large marks are the groups' means"
    if len(points) > charts.SIMPLEX_POINTS:
        caption += f"; at most {charts.SIMPLEX_POINTS} are drawn"
    yield Section(
        title="Where requests lie between helpful, harmless and honest",
        lead="The router's posterior. A mark is the smaller and the fainter the more of it belongs to the base: "
        "nothing is at stake there.",
        blocks=(
            Charts(
                layout="wide",
                panels=(Panel(caption=caption, drawings=(partial(charts.simplex, place, alt=alt),)),),
                keys=keys_of(groups),
            ),
            table_of(means, {"group": "group"}),
        ),
    )


def tradeoff(rows: list[Row]) -> Iterator[Section]:
    """Both errors of the input check along each limit."""
    (row,) = rows
    policies = row["policies"]
    stamp = {**source_of(row), **{key: row[key] for key in COUNTS["tradeoff"]}}
    shipped: list[Row] = []
    for policy in policies:
        limits = [float(limit) for limit, _, _ in policy["points"]]
        swept = f"{number(min(limits), 2)} to {number(max(limits), 2)}" if limits else "–"
        spot = dict(zip(("benign_refused", "harm_passed"), policy.get("shipped") or (), strict=False))
        shipped.append({**stamp, "policy": policy["policy"], "limits": swept, **spot})
    alt = "Share of harm passed against share of benign refused. As shipped: " + "; ".join(
        f"{p['policy']} refuses {number(p.get('benign_refused'), 3)} and passes {number(p.get('harm_passed'), 3)}"
        for p in shipped
    )
    lines = [(place, p["points"], p.get("shipped")) for place, p in enumerate(policies)]
    panel = Panel(
        caption="Lines: every limit on the harmless need; marks: each policy as shipped",
        drawings=(partial(charts.tradeoff, lines, alt=alt),),
    )
    yield Section(
        title="What a threshold costs",
        lead="Both errors of the input check: benign requests refused, and harmful ones let through to the model "
        "(whose own reply is then read too). Nearer to the lower left is better.",
        blocks=(
            table_of(shipped, {"policy": "policy", "limits": "limits swept"}, counts=COUNTS["tradeoff"]),
            Charts(layout="wide", panels=(panel,), keys=keys_of(p["policy"] for p in policies)),
        ),
    )


def behaviour(rows: list[Row], max_tokens: int | None) -> Iterator[Section]:
    """Who refuses what, by replies."""
    renamed = [{**r, **{f"{k}_refused_interval": r.get(f"{k}_interval") for k in ("harmful", "safe")}} for r in rows]
    keys = {"refuses harmful": "harmful_refused", "refuses safe": "safe_refused"}
    length = f" of at most {max_tokens} tokens" if max_tokens else ""
    yield Section(
        title="Behaviour: who says no",
        lead=f"Greedy replies{length} to harmful and to safe prompts. A refusal is told by a judge of the reply, or is "
        "the policy's own; what a reply that complies is worth is not judged here. Refusing the harmful is "
        "wanted, refusing the safe is not.",
        blocks=(
            table_of(
                renamed, {"system": "system"}, counts=COUNTS["behaviour"], hide=("harmful_interval", "safe_interval")
            ),
            Charts(
                layout="wide",
                panels=(dots_of("Share refused", renamed, "system", keys, "Share of prompts refused", unit=True),),
                keys=keys_of(keys),
            ),
        ),
    )


def likelihood(rows: list[Row]) -> Iterator[Section]:
    """What each system thinks of reference answers."""
    rows = [{**row, "value_interval": row.get("interval")} for row in rows]
    panels = []
    for task in column(rows, "task"):
        part = [row for row in rows if row["task"] == task]
        unit = ", ".join(distinct(plain(row.get("unit", "value")) for row in part))
        panels.append(dots_of(task, part, "system", {unit: "value"}, unit))
    yield Section(
        title="Likelihood scores",
        lead="What each system thinks of reference answers, without letting it write: no judge of text is needed.",
        blocks=(
            grouped_by("task", rows, {"system": "system", "unit": "unit"}),
            Charts(layout="wide", panels=tuple(panels)),
        ),
    )


def evasion(rows: list[Row]) -> Iterator[Section]:
    """Prompts reworded to slip past the heads, the worst family first."""
    named = [{**row, "family": row.get("family", row.get("name"))} for row in rows]
    ordered = sorted(named, key=lambda row: (row["family"] != _OVERALL, -(row["flips"] or 0.0)))
    keys = {"flips": "flips", "new false alarms": "new_false_alarms"}
    yield Section(
        title="Evasion",
        lead="Prompts reworded to slip past the heads. Flips: of the harmful prompts that were detected, the share no "
        "longer detected. New false alarms: of the benign ones, the share flagged only when reworded. After all "
        "families together, the worst stands first. The families are known and fixed: an adversary who adapts does "
        "better.",
        blocks=(
            table_of(
                ordered,
                {"family": "family"},
                counts=[key for key in ("n", "detected_n", "benign_n") if all(key in row for row in rows)],
                hide=("name", "detected_n", "benign_n"),
                strong=lambda row: row["family"] == _OVERALL,
            ),
            Charts(
                layout="wide",
                panels=(dots_of("Flips and new false alarms", ordered, "family", keys, "share"),),
                keys=keys_of(keys),
            ),
        ),
    )


def judge(rows: list[Row]) -> Iterator[Section]:
    """How far the judge of refusals agrees with people."""
    yield Section(
        title="The judge of refusals",
        lead="How far the judge, and the plain rule it replaces, agree with people on replies the judge never saw.",
        blocks=(grouped_by("replies", rows, {"judge": "judge"}),),
    )


def latency(rows: list[Row]) -> Iterator[Section]:
    """Milliseconds for one prompt."""
    yield Section(
        title="Latency",
        lead="Milliseconds to read one prompt, one at a time, on the machine that measured.",
        blocks=(table_of(rows, {"system": "system"}),),
    )


def gates(rows: list[Row]) -> Iterator[Section]:
    """Ways to share a request out among the experts."""
    charted = {"nll": "held-out NLL, nats", "nll_experts": "held-out NLL among the three experts, nats"}
    panels = [
        dots_of("± one standard error", [_with_error(r, key) for r in part], "gate", {"NLL": key}, title)
        for key, title in charted.items()
        if (part := [r for r in rows if r.get(key) is not None])
    ]
    yield Section(
        title="Gates",
        lead="Ways to share a request out among the experts, by held-out likelihood of the shares that each expert "
        "should have had, told from how likely it makes the reply that should be given. NLL is over base and the three "
        "experts, and has no value where base never gets a share; nll experts leaves base aside and compares all. "
        "Floor is the targets' own entropy, which nothing can be below. Chosen is what the bundle serves. Lower is "
        "better; ± is one standard error.",
        blocks=(
            table_of(rows, {"gate": "gate"}, strong=lambda row: bool(row.get("chosen"))),
            Charts(layout="wide", panels=tuple(panels)),
        ),
    )


def _with_error(row: Row, key: str) -> Row:
    """The row with one standard error to both sides as its interval."""
    error = row.get(f"{key}_error")
    return row if error is None else {**row, f"{key}_interval": (row[key] - error, row[key] + error)}


def confidence(rows: list[Row]) -> Iterator[Section]:
    """What kappa is worth as a probability and as an order."""
    names = column(rows, "confidence")
    panels = []
    for task in column(rows, "task"):
        part = [row for row in rows if row["task"] == task]
        curves = [(names.index(row["confidence"]), row["curve"]) for row in part]
        told = ", ".join(f"{row['confidence']} {number(row['aurc'], 4)}" for row in part)
        draw = partial(charts.risk_coverage, curves, alt=f"Risk against coverage on {task}. AURC: {told}.")
        panels.append(Panel(caption=f"{plain(task)}, n = {part[0]['n']}", drawings=(draw,)))
    terms = [
        {**source_of(row), "n": row["n"], "task": row["task"], "feature": feature, "mean_logits": size}
        for row in rows
        for feature, size in (row.get("contributions") or {}).items()
    ]
    added = Section(
        title="What confidence is made of",
        lead="Each feature's mean contribution to the logit of kappa, whichever its sign.",
        blocks=(grouped_by("task", terms, {"feature": "feature"}),) if terms else (),
    )
    yield Section(
        title="Confidence",
        lead="Kappa states the probability that every enforced verdict is right. Here a verdict is whether a prompt is "
        "refused at the policy's limit on the harmless need. AUROC: right verdicts against wrong ones. AURC is the "
        "area under risk against coverage: the mean error when the least confident are left out first; lower is "
        "better. Beside kappa two that cost nothing: the largest of p and 1 − p, and the largest share of the "
        "posterior.",
        blocks=(
            table_of(
                rows,
                {"confidence": "confidence", "policy": "policy"},
                hide=("task", "curve", "contributions", "meets_ece", "meets_aurc"),
                group=("task", lambda row: (plain(row["task"]), "")),
                strong=lambda row: "contributions" in row,
            ),
            Charts(layout="small", panels=tuple(panels), keys=keys_of(names), lines=True),
        ),
        sections=(added,) if terms else (),
    )
