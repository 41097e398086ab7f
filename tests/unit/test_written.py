"""The prompts written for this project, and the near-duplicates that are kept away from eval prompts."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from hhh_router.calibration.fit import MIN_ROWS
from hhh_router.data.examples import normalise
from hhh_router.data.near import NEAR, nearest
from hhh_router.data.written import WRITTEN, written
from hhh_router.errors import DataError


@pytest.mark.parametrize("name", WRITTEN)
def test_every_set_has_both_labels_in_both_splits(name: str) -> None:
    for split in ("train", "calibrate"):
        rows = written(name, split)
        positive = {"written/honest": "honest", "written/tasks": "honest", "written/injection": "injection"}.get(
            name, "harmless"
        )
        share = sum(e.needs.get(positive, 0.0) for e in rows) / len(rows)

        assert len(rows) >= MIN_ROWS  # fewer could not be calibrated on
        assert 0.3 < share < 0.7


def test_prompts_are_unique_and_pairs_are_not_torn_apart() -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for name in WRITTEN:
        for split in ("train", "calibrate"):
            for example in written(name, split):
                splits[normalise(example.prompt)].add(split)

    assert all(len(found) == 1 for found in splits.values())


def test_an_injection_says_nothing_about_harm() -> None:
    attempts = [e for e in written("written/injection", "train") if e.needs["injection"]]

    assert attempts
    assert all(set(e.needs) == {"injection"} for e in attempts)


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(DataError, match="written/harm"):
        written("written/poems", "train")


def test_near_duplicates_are_found_and_others_are_not() -> None:
    references = ["How can I sharpen a kitchen knife safely?", "What is the tallest mountain in Peru?"]
    texts = [
        "how can i sharpen a kitchen knife safely ?",
        "How can I sharpen a bread knife safely?",
        "Name the longest river in Chile.",
        "",
    ]

    found = nearest(texts, references)

    assert found[0] >= 0.85
    assert found[1] >= NEAR
    assert found[2] < 0.2
    assert found[3] == 0
    assert nearest(texts, []).tolist() == [0, 0, 0, 0]


def test_similarity_is_jaccard_of_shingles_counted_by_hand() -> None:
    # "abcdef" has shingles abcde bcdef; "abcdeg" has abcde bcdeg: one shared of three
    assert nearest(["abcdef"], ["abcdeg"]).tolist() == pytest.approx([1 / 3])


def test_written_prompts_near_an_eval_prompt_are_not_trained_on(tmp_path: Path) -> None:
    from hhh_router.training.mix import draw
    from hhh_router.training.recipe import Share

    copied = written("written/harm", "train")[0].prompt
    folder = tmp_path / "advbench"
    folder.mkdir()
    row = {"prompt": copied.upper() + "!", "split": "eval"}
    (folder / "advbench.jsonl").write_text(json.dumps(row) + "\n")

    drawn = {e.prompt for e in draw([Share(set="written/harm")], tmp_path, seed=1)}

    assert len(drawn) == len(written("written/harm", "train")) - 1
    assert copied not in drawn
