"""The report: one page from figures, each with its provenance, misses first, nothing executed."""

import copy
from html.parser import HTMLParser
from typing import Any

import pytest

from hhh_router.bundle import BackboneSpec, ExpertSpec, Manifest
from hhh_router.errors import DataError
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
    "evasion": [evasion("case", 0.1), evasion("base64", None), evasion("overall", 0.2)],
}  # fmt: skip


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
    with_all, bare = (
        Outline(render_report(manifest, figures)).headings
        for figures in (FIGURES, {k: v for k, v in FIGURES.items() if k != "evasion"})
    )

    assert "Evasion" in with_all
    assert "Evasion" not in bare
    assert "Gates" not in with_all


@pytest.mark.parametrize("key", ["command", "seed", "n", "data_sha256"])
def test_a_figure_without_provenance_is_not_printed(manifest: Manifest, key: str) -> None:
    figures = copy.deepcopy(FIGURES)
    del figures["subgroups"][0][key]
    for shared in ("command", "seed"):
        if key == shared:
            del figures[shared]

    with pytest.raises(DataError, match=rf"subgroups\[0\].*{key}"):
        render_report(manifest, figures)


def test_figures_of_no_bundle_are_refused(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="bundle_parts"):
        render_report(manifest, {k: v for k, v in FIGURES.items() if k != "bundle_parts"})


def test_a_shape_that_cannot_be_drawn_is_named(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="tradeoff"):
        render_report(manifest, FIGURES | {"tradeoff": {"n_harmful": 1, "n_benign": 1, **STAMP}})


def test_hostile_names_stay_text(manifest: Manifest) -> None:
    hostile = "<script>alert(1)</script>|x`y"
    figures = copy.deepcopy(FIGURES)
    figures["detection"][0]["task"] = hostile

    page, text = render_report(manifest, figures), render_markdown(manifest, figures)

    assert "<script" not in page
    assert "\\<script\\>alert(1)\\</script\\>\\|x\\`y" in text


def test_markdown_has_the_same_numbers(manifest: Manifest) -> None:
    text = render_markdown(manifest, FIGURES)

    assert "0.710" in text
    assert "✗ missed" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
