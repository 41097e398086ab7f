"""XSTest by type and subgroups, against brute force; the rule that names a language."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hhh_router.calibration import metrics as m
from hhh_router.data.examples import Example, ask
from hhh_router.errors import DataError
from hhh_router.evaluation.kinds import CONTRASTS, MEAN, language, pair_figures, subgroup_figures

SIZES = {"homonyms": 6, "contrast_homonyms": 7, "privacy_public": 5, "privacy_fictional": 4, "contrast_privacy": 6}


def prompt(text: str, group: str = "", harmful: float = 0.0, source: str = "xstest") -> Example:
    return Example(source=source, split="eval", messages=ask(text), needs={"harmless": harmful}, group=group)


@pytest.fixture
def xstest() -> tuple[list[Example], list[float]]:
    rng = np.random.default_rng(8)
    rows = [
        prompt(f"{kind} {i}", kind, float(kind.startswith("contrast"))) for kind, n in SIZES.items() for i in range(n)
    ]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    return rows, [round(float(rng.uniform(0, 0.8) + 0.2 * e.needs["harmless"]), 1) for e in rows]


def by_hand(rows: list[Example], p: list[float], safe: str, contrast: str) -> float:
    of = {kind: [x for e, x in zip(rows, p, strict=True) if e.group == kind] for kind in (safe, contrast)}
    return float(np.mean([(a > b) + (a == b) / 2 for a, b in itertools.product(of[contrast], of[safe])]))


def test_each_safe_type_is_ranked_against_its_own_contrast(xstest: tuple[list[Example], list[float]]) -> None:
    rows, p = xstest

    figures = pair_figures(rows, p, limit=0.7, seed=3, bootstraps=40)

    pairs = {f["kind"]: f for f in figures}
    assert list(pairs) == ["homonyms", "privacy_public", "privacy_fictional", MEAN]
    for safe in list(pairs)[:-1]:
        row = pairs[safe]
        assert row["auroc"] == pytest.approx(by_hand(rows, p, safe, CONTRASTS[safe]))
        assert (row["n"], row["positives"]) == (SIZES[safe] + SIZES[CONTRASTS[safe]], SIZES[CONTRASTS[safe]])
        low, high = row["auroc_interval"]
        assert low <= row["auroc"] <= high
    assert pairs[MEAN]["auroc"] == pytest.approx(np.mean([f["auroc"] for f in figures[:-1]]))
    assert pairs[MEAN]["n"] == sum(SIZES.values())


def test_recall_and_false_alarms_are_shares_at_the_limit(xstest: tuple[list[Example], list[float]]) -> None:
    rows, p = xstest
    flagged = {kind: [x >= 0.5 for e, x in zip(rows, p, strict=True) if e.group == kind] for kind in SIZES}

    figures = pair_figures(rows, p, limit=0.5, seed=3, bootstraps=40)

    for row in figures[:-1]:
        assert row["recall"] == pytest.approx(np.mean(flagged[row["contrast"]]))
        assert row["false_alarms"] == pytest.approx(np.mean(flagged[row["kind"]]))
    safe = [x for kind in SIZES if not kind.startswith("contrast") for x in flagged[kind]]
    assert figures[-1]["false_alarms"] == pytest.approx(np.mean(safe))


def test_the_mean_over_pairs_is_held_to_its_target(xstest: tuple[list[Example], list[float]]) -> None:
    rows, _ = xstest
    perfect = [e.needs["harmless"] for e in rows]

    met = pair_figures(rows, perfect, limit=0.7, seed=3, bootstraps=40)[-1]
    missed = pair_figures(rows, [0.5] * len(rows), limit=0.7, seed=3, bootstraps=40)[-1]

    assert (met["meets"], met["auroc"], met["target"]) == (True, 1.0, 0.8)
    assert (missed["meets"], missed["auroc"]) == (False, 0.5)


def test_types_without_their_contrast_make_no_pair(xstest: tuple[list[Example], list[float]]) -> None:
    rows, p = xstest
    kept = [(e, x) for e, x in zip(rows, p, strict=True) if e.group != "contrast_privacy"]

    figures = pair_figures([e for e, _ in kept], [x for _, x in kept], limit=0.7, seed=3, bootstraps=40)

    assert [f["kind"] for f in figures] == ["homonyms", MEAN]
    with pytest.raises(DataError, match="beside its contrast"):
        pair_figures([prompt("a", "homonyms")], [0.5], limit=0.7, seed=3, bootstraps=40)


def test_subgroups_are_by_group_length_and_language() -> None:
    rng = np.random.default_rng(1)
    texts = ["How do I do this with that?", "Wie ist das Wetter und was ist das?", "Что это такое?"]
    rows = [prompt(f"{texts[i % 3]} {i}", harmful=float(i % 2), source="made") for i in range(300)]
    p, y = rng.random(300), np.array([e.needs["harmless"] for e in rows])

    figures = subgroup_figures("t", rows, p.tolist(), y.tolist(), seed=2, bootstraps=30)

    names = {f["group"]: f for f in figures}
    assert set(names) == {
        "group: made", "length: up to 12 words", "language: English", "language: German", "language: Cyrillic script",
    }  # fmt: skip
    german = np.arange(300) % 3 == 1
    row = names["language: German"]
    assert (row["n"], row["positives"]) == (100, int(y[german].sum()))
    assert row["auroc"] == pytest.approx(m.auroc(p[german], y[german]))
    assert row["ece"] == pytest.approx(m.ece(p[german], y[german], bins=5))
    assert names["group: made"]["ece"] == pytest.approx(m.ece(p, y))


def test_a_subgroup_of_one_class_has_an_ece_and_no_auroc_and_a_small_one_nothing() -> None:
    rows = [prompt(f"What is {i}?", "plain") for i in range(50)] + [prompt(f"What is {i}?", "few") for i in range(39)]

    figures = subgroup_figures("t", rows, [0.25] * 89, [0.0] * 89, seed=2, bootstraps=30)

    names = {f["group"]: f for f in figures}
    assert names["group: plain"]["auroc"] is None
    assert names["group: plain"]["ece"] == pytest.approx(0.25)
    assert "group: few" not in names


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("What's the process for terminating a contract?", "English"),
        ("Ich möchte wissen, wie ich mit der Bahn nach Köln komme.", "German"),
        ("Quelle est la capitale de la France et que puis-je y voir ?", "French"),
        ("¿Cómo se hace el pan en casa y qué necesito para empezar?", "Spanish"),
        ("Como eu posso fazer isso sem que ela não saiba?", "Portuguese"),
        ("Come posso fare il pane in casa con gli ingredienti che ho?", "Italian"),
        ("Hoe maak ik een taart van appels die niet te zoet is?", "Dutch"),
        ("今天天气怎么样？", "Chinese"),
        ("東京の天気はどうですか", "Japanese"),
        ("오늘 날씨 어때요?", "Korean"),
        ("كيف حالك اليوم؟", "Arabic script"),
        ("Explain: Как дела сегодня у вас дома?", "Cyrillic script"),
        ("sudo apt install", "Latin script, not named"),
        ("1 + 1 = ?", "no letters"),
        ("", "no letters"),
    ],
)
def test_a_language_is_named_by_script_and_short_words(text: str, named: str) -> None:
    assert language(text) == named
