"""The report: one page from figures, each with its provenance, misses first, nothing executed."""

import copy
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from hhh_router.bundle import BackboneSpec, ExpertSpec, Manifest
from hhh_router.errors import DataError
from hhh_router.evaluation import charts
from hhh_router.evaluation.report import render_markdown, render_report

HASH = "ab" * 32
STAMP = {"command": "hhh-router evaluate --seed 17", "seed": 17, "data_sha256": HASH}
CURVES = {
    "roc": [[0, 0], [0.2, 0.7], [1, 1]],
    "pr": [[0, 1], [0.5, 0.8], [1, 0.5]],
    "reliability": [[0.1, 0.15, 20], [0.8, 0.7, 20]],
}
VOID = {"meta", "br", "path", "use", "rect", "circle", "img", "hr", "link", "image", "line"}


def detection(task: str, system: str, auroc: float, **more: Any) -> dict[str, Any]:
    return {
        "suite": "guard", "task": task, "system": system, "sets": ["made"], "head": "needs.harmless", "mode": "prompt",
        "n": 40, "positives": 20, "target": None, "auroc": auroc, "auroc_interval": [auroc - 0.1, auroc + 0.05],
        "recall_at_fpr_01": 0.4, "f1": 0.7, "nll": 0.5, "brier": 0.2, "ece": 0.04, "ece_interval": [0.02, 0.08],
        **STAMP, **CURVES, **more,
    }  # fmt: skip


def evasion(name: str, flips: float | None) -> dict[str, Any]:
    return {
        "name": name, "n": 40, "detected_n": 30, "benign_n": 40, "detected": 0.75, "flips": flips,
        "flips_interval": None if flips is None else [0.0, 0.4], "new_false_alarms": 0.05,
        "new_false_alarms_interval": [0.0, 0.1], "mean_logit_shift": -0.4, "limit": 0.5, "perturbations": ["x"],
        **STAMP,
    }  # fmt: skip


FIGURES: dict[str, Any] = {
    "command": STAMP["command"],
    "seed": 17,
    "bundle_parts": "cd" * 32,
    "versions": {"torch": "2"},
    "detection": [
        detection("easy task", "toy", 0.95, target=0.9, meets=True),
        detection("hard task", "toy", 0.71, target=0.9, meets=False),
        detection("hard task", "TF-IDF", 0.6),
        {"suite": "guard", "task": "hard task", "system": "absent", "n": 40, "error": "not available", **STAMP},
    ],
    "subgroups": [{"task": "hard task", "group": "length: long", "n": 50, "ece": 0.1, **STAMP}],
    "tradeoff": {
        "n": 40, "n_harmful": 20, "n_benign": 20, **STAMP,
        "policies": [{"policy": "balanced", "points": [[0.2, 0.5, 0.1], [0.8, 0.1, 0.5]], "shipped": [0.2, 0.3]}],
    },
    "simplex": {
        "n": 2, **STAMP,
        "points": [
            {"posterior": [0.1, 0.6, 0.2, 0.1], "group": "plain task"},
            {"posterior": [0.0, 0.1, 0.8, 0.1], "group": "harm at stake"},
        ],
    },
    "behaviour_max_tokens": 24,
    "behaviour": [
        {"system": "bare backbone", "harmful_n": 20, "safe_n": 20, "harmful_refused": 0.0, "harmful_interval": [0, 0],
         "safe_refused": 0.05, "safe_interval": [0, 0.15], **STAMP}
    ],
    "evasion": [evasion("case", 0.1), evasion("base64", None), evasion("overall", 0.2), evasion("homoglyphs", 0.3)],
    "kinds": [
        {"kind": "homonyms", "contrast": "contrast_homonyms", "n": 31, "positives": 16, "auroc": 0.9, "recall": 0.8,
         "auroc_interval": [0.8, 1.0], "false_alarms": 0.2, "limit": 0.7, **STAMP},
        {"kind": "mean over pairs", "contrast": "every contrast", "n": 279, "positives": 131, "auroc": 0.77,
         "recall": 0.8, "false_alarms": 0.3, "limit": 0.7, "target": 0.8, "meets": False, **STAMP},
    ],
    "transfer": [
        {"group": "one set", "head": "harmless", "split": "eval", "against": "own rows", "left_out": 300, "epochs": 4,
         "n": 90, "positives": 40, "auroc": 0.8125, "auroc_interval": [0.7, 0.9], "auroc_in_domain": 0.9375,
         "auroc_in_domain_interval": [0.9, 0.97], "auroc_lost": 0.125, "auroc_lost_interval": [0.05, 0.2],
         "ece": 0.05, "ece_in_domain": 0.03, **STAMP},
        {"group": "one set", "head": "honest", "split": "eval", "left_out": 300, "epochs": 4, "n": 91, "positives": 0,
         "error": "too few rows", **STAMP},
    ],
    "likelihood": [
        {"system": "bare backbone", "task": "true answers", "n": 70, "value": 0.31, "interval": [0.25, 0.37],
         "unit": "accuracy", **STAMP}
    ],
    "gates": [
        {"gate": "odds", "n": 60, "nll": 0.84, "nll_error": 0.012, "chosen": True, **STAMP},
        {"gate": "arrow", "n": 60, "nll": 1.2, "nll_error": 0.02, "chosen": False, **STAMP},
    ],
    "confidence": [
        {"task": "all guard tasks", "confidence": "kappa", "policy": "balanced", "limit": 0.7, "n": 55,
         "accuracy": 0.8, "ece": 0.051, "ece_interval": [0.03, 0.07], "brier": 0.1, "auroc": 0.75, "aurc": 0.08,
         "curve": [[0.1, 0.0], [1.0, 0.2]], "aurc_difference": -0.03, "aurc_difference_interval": [-0.04, -0.02],
         "meets_ece": False, "meets_aurc": True, "contributions": {"min_margin": 0.625}, **STAMP},
        {"task": "all guard tasks", "confidence": "max softmax", "policy": "balanced", "limit": 0.7, "n": 55,
         "accuracy": 0.8, "ece": 0.12, "brier": 0.2, "auroc": 0.7, "aurc": 0.11, "curve": [[0.1, 0.1], [1.0, 0.2]],
         **STAMP},
    ],
    "judge": [{"judge": "opening words", "replies": "held out", "n": 45, "accuracy": 0.875, **STAMP}],
    "latency": [{"system": "toy", "n": 35, "median_ms": 21.25, "p95_ms": 40.0, **STAMP}],
}  # fmt: skip
PARTS = sorted(key for key, part in FIGURES.items() if isinstance(part, list) or key in ("simplex", "tradeoff"))
HOSTILE = "<script>alert(1)</script>\"'&|x`y$\\frac$ \u4e2d\u202e\x00"


def hostile(value: Any) -> Any:
    """The same figures with every name made hostile; keys, numbers and what is compared with a constant stay."""
    if isinstance(value, dict):
        return {key: part if key == "suite" else hostile(part) for key, part in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest(
        name="toy", version="1.0", licence="Apache-2.0", commercial_use=True, first_adapted_layer=2,
        backbone=BackboneSpec(source="path:x", architecture="llama", layers=4, hidden_size=8, licence="MIT"),
        experts={"helpful": ExpertSpec(path="e", rank=1, scale=1.0, sha256=HASH)},
        recipe="toy.yaml", recipe_sha256=HASH, seed=1,
    )  # fmt: skip


class Outline(HTMLParser):
    """Tags that open and close, headings, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


def test_the_page_is_whole_and_runs_nothing(manifest: Manifest) -> None:
    page = render_report(manifest, FIGURES)
    outline = Outline(page)

    assert outline.open == []
    assert "svg" in outline.tags
    assert not outline.tags & {"script", "iframe", "img", "link"}
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page == render_report(manifest, copy.deepcopy(FIGURES))


def test_misses_come_before_what_was_met(manifest: Manifest) -> None:
    page = render_report(manifest, FIGURES)

    table = page[page.index("<h3>guard</h3>") :]
    assert table.index("hard task") < table.index("easy task")
    assert "misses these" in page
    assert "not available" in page


def test_parts_that_were_not_measured_leave_no_heading(manifest: Manifest) -> None:
    whole = Outline(render_report(manifest, FIGURES)).headings
    less = {}
    for part in PARTS:
        text = render_markdown(manifest, {key: value for key, value in FIGURES.items() if key != part})
        less[part] = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        assert render_markdown(manifest, FIGURES | {part: []}) == text

    gone = {part: [title for title in whole[1:] if title not in less[part]] for part in PARTS}
    assert gone.pop("detection") == ["Detection", "guard"]
    assert gone.pop("confidence") == ["Confidence", "What confidence is made of"]
    assert all(len(titles) == 1 for titles in gone.values()), gone
    nothing = {key: value for key, value in FIGURES.items() if key not in PARTS}
    assert Outline(render_report(manifest, nothing)).headings == ["toy 1.0", "Provenance"]


@pytest.mark.parametrize("key", ["command", "seed", "n", "data_sha256"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("render", [render_report, render_markdown])
def test_a_figure_without_provenance_is_not_printed(manifest: Manifest, render: Any, part: str, key: str) -> None:
    figures = copy.deepcopy(FIGURES)
    figures.pop(key, None)
    rows = figures[part] if isinstance(figures[part], list) else [figures[part]]
    counts = {"behaviour": "safe_n", "tradeoff": "n_benign"}
    stated = counts.get(part, "n") if key == "n" else key
    del rows[-1][stated]

    with pytest.raises(DataError, match=rf"{part}\[{len(rows) - 1}\].*: no .*{stated}"):
        render(manifest, figures)


@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_an_empty_hash_is_no_hash(manifest: Manifest, nothing: Any) -> None:
    figures = copy.deepcopy(FIGURES)
    figures["gates"][1]["data_sha256"] = nothing

    with pytest.raises(DataError, match=r"gates\[1\] \(arrow\): no data_sha256"):
        render_report(manifest, figures)


def test_every_figure_without_provenance_is_named_at_once(manifest: Manifest) -> None:
    figures = copy.deepcopy(FIGURES)
    del figures["gates"][0]["n"], figures["evasion"][1]["data_sha256"], figures["versions"]

    with pytest.raises(DataError) as error:
        render_report(manifest, figures)

    assert [line.split(":")[1].strip() for line in error.value.message.splitlines()] == [
        "no versions",
        "evasion[1] (base64)",
        "gates[0] (odds)",
    ]


def test_a_part_may_state_its_provenance_once_for_all_rows(manifest: Manifest) -> None:
    rows = [{"gate": "odds", "n": 60, "nll": 0.84}]
    figures = {key: FIGURES[key] for key in ("bundle_parts", "versions")}
    part = {"command": "hhh-router calibrate", "seed": 5, "data_sha256": "ef" * 32, "rows": rows}

    text = render_markdown(manifest, {**figures, "gates": part})

    assert "Made by `hhh-router calibrate`, seed 5; n 60." in text
    assert "ef" * 32 in text


def test_likelihood_may_stand_beside_behaviour_but_not_without_provenance(manifest: Manifest) -> None:
    figures = copy.deepcopy(FIGURES)
    score = {"task": "kind answers", "n": 12, "value": 0.4375, "unit": "nats", "data_sha256": HASH}
    figures["behaviour"][0]["likelihood"] = [score]

    text = render_markdown(manifest, figures)

    assert "| kind answers | bare backbone | nats | 12 | 0.438 |" in text
    del score["data_sha256"]
    with pytest.raises(DataError, match=r"behaviour\[0\].*likelihood\[0\]"):
        render_report(manifest, figures)


def test_figures_of_no_bundle_are_refused(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="bundle_parts"):
        render_report(manifest, {k: v for k, v in FIGURES.items() if k != "bundle_parts"})


def test_a_shape_that_cannot_be_drawn_is_named(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="tradeoff"):
        render_report(manifest, FIGURES | {"tradeoff": {"n_harmful": 1, "n_benign": 1, **STAMP}})
    with pytest.raises(DataError, match="not a list of rows"):
        render_report(manifest, FIGURES | {"gates": ["odds"]})
    with pytest.raises(DataError, match=r"hard task.*cannot be drawn"):
        render_report(manifest, FIGURES | {"detection": [detection("hard task", "toy", 0.7, roc=[["a", "b"]])]})


def test_hostile_names_stay_text(manifest: Manifest) -> None:
    figures = hostile(FIGURES)

    page, text = render_report(manifest, figures), render_markdown(manifest, figures)

    outline = Outline(page)
    assert outline.open == []
    assert "<script" not in page
    assert not outline.tags & {"script", "iframe", "img", "link"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;|x`y$\\frac$ \u4e2d" in page
    # what would turn the direction of reading, or end a string, is shown as what it is: not text
    assert not set("\u202e\x00") & set(page + text)
    assert r"""\<script\>alert(1)\</script\>"'\&\|x\`y\$\\frac\$""" in text
    assert "<script" not in re.sub(r"\\.|(`+).*?\1", "", text)


def test_a_hostile_suite_is_only_a_title(manifest: Manifest) -> None:
    rows = [detection("a", "toy", 0.7, suite=HOSTILE), detection("b", "toy", 0.7, suite=HOSTILE.lower() + "!")]

    page = render_report(manifest, FIGURES | {"detection": rows})

    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r' href="#([^"]*)"', page)) <= set(ids)
    assert "<script" not in page


def test_a_glance_counts_the_targets_of_every_part(manifest: Manifest) -> None:
    text = render_markdown(manifest, FIGURES)

    glance = text[text.index("## At a glance") : text.index("## Detection")]
    assert "toy meets 2 of 5 targets; it misses these:" in glance
    assert "**guard, hard task**" in glance
    assert "ECE 0.051, at most 0.04 aimed at" in glance
    assert "**XSTest by type, mean over pairs**" in glance
    assert "AURC" not in glance  # that one is met


def test_risk_and_coverage_are_drawn_with_every_confidence(manifest: Manifest) -> None:
    page = render_report(manifest, FIGURES)

    assert "Risk against coverage on all guard tasks. AURC: kappa 0.0800, max softmax 0.1100." in page
    assert "coverage (share kept)" in page


def test_heads_with_and_without_a_source_stand_side_by_side(manifest: Manifest) -> None:
    text = render_markdown(manifest, FIGURES)

    assert (
        "one set | eval | own rows | 300 | 4 | 90 (40) | 0.812 \\[0.700, 0.900\\] | 0.938 \\[0.900, 0.970\\] | "
        "0.125 \\[0.050, 0.200\\] | 0.050 | 0.030 |"
    ) in text
    assert "not measured: too few rows" in text


def test_markdown_has_the_same_numbers(manifest: Manifest) -> None:
    text = render_markdown(manifest, FIGURES)

    assert "0.710" in text
    assert "✗ missed" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_every_table_says_where_it_comes_from(manifest: Manifest) -> None:
    page, text = render_report(manifest, FIGURES), render_markdown(manifest, FIGURES)

    tables = page.split("<table>")[1:]
    assert len(tables) == len(PARTS) + 2  # the features of the confidence, and the hashes
    for table in tables:
        assert f"<code>{STAMP['command']}</code>, seed 17" in table
    assert text.count(f"`{STAMP['command']}`, seed 17") == len(tables)
    assert FIGURES["bundle_parts"] in page
    assert HASH in page


def test_every_chart_has_words_for_who_cannot_see_it(manifest: Manifest) -> None:
    page = render_report(manifest, FIGURES)

    figures = re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL)
    charts = [svg for figure in figures for svg in re.findall(r"<svg[^>]*>", figure)]
    # a ROC, a PR and a reliability chart for each of two tasks; one chart for each other part that is drawn
    assert len(charts) == 2 * 3 + len({*PARTS} - {"detection", "judge", "latency"})
    assert all(re.search(r'role="img" aria-label="[^"]{20,}"', svg) for svg in charts)
    assert "ROC curves on hard task. AUROC: toy 0.710, TF-IDF 0.600." in page


def test_charts_in_one_page_share_no_id_and_point_only_to_their_own(manifest: Manifest) -> None:
    page = render_report(manifest, FIGURES)

    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        tree = ElementTree.fromstring(svg)
        ids = {element.get("id") for element in tree.iter()} - {None}
        used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg))
        assert used == ids
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_names_nothing_outside_itself_and_no_day(manifest: Manifest) -> None:
    page = render_report(manifest, FIGURES)

    assert not re.findall(r"(?:src|href)=\"(?!#)", page)
    assert not re.findall(r"url\((?!#)|@import|@font-face|https?:", page)
    assert not re.findall(r"\b20\d\d-\d\d", page)
    assert "default-src 'none'" in page


def test_evasion_shows_all_families_together_and_then_the_worst(manifest: Manifest) -> None:
    text = render_markdown(manifest, FIGURES)

    rows = [line.split("|")[1].strip() for line in text[text.index("## Evasion") :].splitlines() if line[:1] == "|"]
    assert rows[2:6] == ["overall", "homoglyphs", "case", "base64"]


def test_evasion_of_the_plain_contract_is_drawn_too(manifest: Manifest) -> None:
    row = {
        "family": "case", "n": 10, "detected_before": 8, "flips": 0.25, "flips_interval": [0.1, 0.4],
        "new_false_alarms": 0.0, "new_false_alarms_interval": [0.0, 0.1], "logit_shift": -0.5, **STAMP,
    }  # fmt: skip

    text = render_markdown(manifest, FIGURES | {"evasion": [row]})

    assert "| case | 10 | 8 | 0.250 \\[0.100, 0.400\\] | 0.000 \\[0.000, 0.100\\] | −0.50 |" in text


def test_a_narrow_miss_is_not_rounded_away(manifest: Manifest) -> None:
    row = detection("hard task", "toy", 0.84971, target=0.85, meets=False)

    assert "AUROC 0.84971, 0.85 aimed at" in render_markdown(manifest, FIGURES | {"detection": [row]})


def test_points_at_the_corners_lie_in_the_corners() -> None:
    corners = [charts.simplex([(0, [0, *(float(i == k) for i in range(3))])], alt="one mark") for k in range(3)]

    # the marks of scatter are drawn with <use>; the first in each chart is the only request
    helpful, harmless, honest = (
        tuple(float(re.search(rf'<use [^>]*\b{axis}="([\d.]+)"', svg)[1]) for axis in "xy") for svg in corners
    )
    assert helpful[1] == pytest.approx(harmless[1], abs=0.01)
    assert honest[1] < helpful[1]  # downwards is positive
    assert honest[0] == pytest.approx((helpful[0] + harmless[0]) / 2, abs=0.01)
    side = harmless[0] - helpful[0]
    assert helpful[1] - honest[1] == pytest.approx(side * 3**0.5 / 2, rel=1e-3)


def test_the_interval_of_a_share_is_the_published_one() -> None:
    # Newcombe 1998, table I: 81 of 263, and 15 of 148, Wilson's score interval
    assert charts.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert charts.wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert charts.wilson(0.0, 20)[0] == pytest.approx(0.0, abs=1e-12)


def test_reports_need_neither_torch_nor_the_state_of_pyplot() -> None:
    code = (
        "import sys; from hhh_router.evaluation import charts, report; before = 'matplotlib' in sys.modules\n"
        "charts.roc([(0, [[0, 0], [1, 1]])], alt='a line')\n"
        "print(before, 'torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "False", "False"]
