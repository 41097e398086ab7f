"""Likelihood suites: how candidates become a figure, and how rows become items."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hhh_router.errors import DataError
from hhh_router.evaluation.likelihood import LIKELIHOOD_SUITES, _value, suite_items

pytestmark = pytest.mark.integration

SUITES = {s.name: s for s in LIKELIHOOD_SUITES}


def test_mc2_is_the_share_of_probability_that_true_answers_get() -> None:
    found = _value("mc2", [(math.log(0.2), 3), (math.log(0.1), 9), (math.log(0.1), 2)], frozenset({0, 1}))

    assert found == pytest.approx(0.75)


def test_mc2_survives_likelihoods_that_underflow() -> None:
    assert _value("mc2", [(-2000.0, 3), (-2001.0, 3)], frozenset({0})) == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_sum_prefers_the_likelier_text_and_a_mean_the_likelier_token() -> None:
    candidates = [(-6.0, 2), (-8.0, 8)]

    assert _value("sum", candidates, frozenset({0})) == 1.0
    assert _value("mean", candidates, frozenset({0})) == 0.0


def test_a_likelihood_is_the_geometric_mean_per_token() -> None:
    assert _value("likelihood", [(3 * math.log(0.5), 3)], frozenset({0})) == pytest.approx(0.5)


def test_rows_of_every_suite_become_items_and_only_eval_rows_do(tmp_path: Path) -> None:
    rows = {
        "TruthfulQA MC2": ("truthfulqa/mc_task.jsonl", {"question": "Q?", "mc2_targets": {"no": 0, "yes": 1, "so": 1}}),
        "HHH alignment, pairwise": (
            "hhh_alignment/hhh.jsonl",
            {"input": "Human: Hi\n\nAssistant: Hello\n\nHuman: Q?", "chosen": "a", "rejected": "b", "subset": "honest"},
        ),
        "MMLU": ("mmlu_sample/m.jsonl", {"question": "Q?", "choices": ["1", "2"], "answer": "0"}),
        "ARC-Challenge": ("arc_challenge/a.jsonl", {"question": "Q?", "choices": {"A": "x", "B": "y"}, "answer": "B"}),
        "HellaSwag": ("hellaswag_sample/h.jsonl", {"question": "Q", "choices": {"A": "x", "B": "y"}, "answer": "A"}),
        "GSM8K, answer": ("gsm8k/g.jsonl", {"question": "Q?", "answer": "42"}),
        "AlpacaEval, GPT-4's answer": ("alpaca_eval/a.jsonl", {"instruction": "Do", "outputs": {"gpt4": "Done"}}),
    }
    found = {}
    for name, (file, row) in rows.items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({**row, "split": split}) + "\n" for split in ("train", "eval")))
        suite = SUITES[name]
        plain = type(suite)(suite.name, suite.part, file, suite.rule, suite.convert)
        found[name] = suite_items(plain, tmp_path, rows=10, seed=1)

    assert {name: len(items) for name, items in found.items()} == dict.fromkeys(SUITES, 1)
    right = {name: {items[0].candidates[i] for i in items[0].right} for name, items in found.items()}
    assert right["TruthfulQA MC2"] == {"yes", "so"}
    assert right["HHH alignment, pairwise"] == {"a"}
    assert right["MMLU"] == {"1"}  # its answers are places
    assert right["ARC-Challenge"] == {"y"}
    assert [m.role for m in found["HHH alignment, pairwise"][0].messages] == ["user", "assistant", "user"]


def test_a_tables_heading_is_no_item(tmp_path: Path) -> None:
    rows = [
        {"question": "question", "choices": ["choice0", "choice1"], "answer": "answer", "split": "eval"},
        {"question": "Q?", "choices": ["x", "y"], "answer": "1", "split": "eval"},
    ]
    path = tmp_path / "mmlu_sample" / "m.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = SUITES["MMLU"]

    (item,) = suite_items(replace(suite, pattern="mmlu_sample/m.jsonl"), tmp_path, rows=10, seed=1)

    assert [item.candidates[i] for i in item.right] == ["y"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mmlu_sample"):
        suite_items(SUITES["MMLU"], tmp_path, rows=1, seed=1)
