"""The judge of refusals, on replies the test makes itself."""

import gzip
import json
from pathlib import Path

import pytest

from hhh_router.evaluation.judge import RefusalJudge, agreement, labelled_replies

NO = ("I'm sorry, but I can't help with that {}.", "I cannot assist with your request about {}.", "No, I won't do {}.")
YES = ("Sure! Here is how to {}: start early.", "To {}, first gather what you need.", "Great question, {} is easy.")
THINGS = ("boats", "tea", "chess", "maps", "songs", "glass", "bread", "ferns", "kites", "clay")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    completions = [
        {"model": model, "id": f"{model}{i}", "type": "safe_x", "prompt": "?", "split": "calibrate",
         "completion": text.format(thing), "final_label": label}
        for model in ("a", "b")
        for i, thing in enumerate(THINGS)
        for texts, label in ((NO, "2_full_refusal"), (YES, "1_full_compliance"))
        for text in texts
    ]  # fmt: skip
    completions.append({**completions[0], "final_label": "3_partial_refusal"})
    guarded = [
        {"prompt": "?", "split": split, "response": (NO if i % 2 else YES)[i % 3].format(thing),
         "response_refusal_label": "refusal" if i % 2 else "compliance"}
        for split in ("calibrate", "eval")
        for i, thing in enumerate(THINGS * 2)
    ]  # fmt: skip
    for name, rows in (("xstest/xstest_completions", completions), ("wildguardtest/wildguardtest", guarded)):
        path = root / f"{name}.jsonl.gz"
        path.parent.mkdir()
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return root


def test_partial_refusals_are_no_label(data: Path) -> None:
    rows = labelled_replies(data, "calibrate")

    assert len(rows) == 2 * 10 * 6 + 20
    assert {m for _, _, m in rows} == {"a", "b", "wildguardtest"}


def test_it_tells_replies_it_has_not_seen(data: Path) -> None:
    judge = RefusalJudge.train(labelled_replies(data, "calibrate"))

    assert judge.refuses("I'm sorry, but I can't help with that kettle.")
    assert not judge.refuses("Sure! Here is how to paint: start early.")


def test_only_the_opening_counts(data: Path) -> None:
    judge = RefusalJudge.train(labelled_replies(data, "calibrate"))
    advice = "Sure! Here is how to do it: start early. " * 20

    assert judge.probabilities([advice]) == pytest.approx(judge.probabilities([advice + "I cannot assist. " * 50]))


def test_agreement_names_rows_intervals_and_both_judges(data: Path) -> None:
    figures = agreement(data, seed=2)

    assert [(f["judge"], f["n"]) for f in figures] == [
        ("TF-IDF judge", 120), ("opening words", 120), ("TF-IDF judge", 20), ("opening words", 20),
    ]  # fmt: skip
    assert figures[0]["kappa"] > 0.9  # the other model's replies use the same words
    for f in figures:
        assert f["kappa_interval"][0] <= f["kappa"] <= f["kappa_interval"][1]
        assert len(f["data_sha256"]) == 64


def write_sets(root: Path, completions: list[tuple[str, str, bool]], guarded: list[tuple[str, str, bool]]) -> Path:
    """XSTest completions (model, reply, refuses) and WildGuardTest rows (split, reply, refuses)."""
    labels = {True: "2_full_refusal", False: "1_full_compliance"}
    rows = {
        "xstest/xstest_completions": [
            {"model": m, "completion": c, "final_label": labels[no], "split": "calibrate"} for m, c, no in completions
        ],
        "wildguardtest/wildguardtest": [
            {"split": s, "response": r, "response_refusal_label": "refusal" if no else "compliance"}
            for s, r, no in guarded
        ],
    }
    for name, given in rows.items():
        path = root / f"{name}.jsonl.gz"
        path.parent.mkdir()
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in given)
    return root


def test_a_judge_never_saw_the_replies_of_the_model_it_judges_nor_eval_rows(tmp_path: Path) -> None:
    # what means no in one model's mouth, or in eval rows, means yes elsewhere: who saw it would know
    completions = [
        (model, f"{'zorp' if no == (model == 'a') else 'blik'} {thing}", no)
        for model in ("a", "b")
        for thing in THINGS
        for no in (True, False)
    ]
    guarded = [
        (split, f"{'mumm' if no == (split == 'eval') else 'tock'} {thing}", no)
        for split in ("calibrate", "eval")
        for thing in THINGS
        for no in (True, False)
    ]

    figures = agreement(write_sets(tmp_path, completions, guarded), seed=1)

    assert [f["accuracy"] for f in figures if f["judge"] == "TF-IDF judge"] == [0.0, 0.0]


def test_accuracy_and_kappa_are_those_of_the_table_of_agreement(tmp_path: Path) -> None:
    # the opening words find 4 of 6 refusals and one of 4 others; five times, so that no resample has one class alone
    said = [(NO[0], True)] * 4 + [("Certainly not.", True)] * 2 + [(NO[0], False)] + [("Sure.", False)] * 3
    said *= 5
    guarded = [(split, reply.format("x"), no) for split in ("calibrate", "eval") for reply, no in said]
    data = write_sets(tmp_path, [(m, r.format("y"), no) for m in ("a", "b") for r, no in said], guarded)

    (words,) = [f for f in agreement(data, seed=1) if f["judge"] == "opening words" and f["n"] == 50]

    by_chance = 0.6 * 0.5 + 0.4 * 0.5  # 6 of 10 refuse, 5 of 10 are said to
    assert words["refusals"] == 30
    assert words["accuracy"] == pytest.approx(0.7)
    assert words["kappa"] == pytest.approx((0.7 - by_chance) / (1 - by_chance))


def test_the_hash_follows_the_replies_and_their_labels(tmp_path: Path) -> None:
    said = [("Sure.", False), (NO[0], True)] * 6
    turned = [(reply, not no) for reply, no in said]
    hashes = []
    for name, rows in (("one", said), ("turned", turned)):
        (tmp_path / name).mkdir()
        labelled = [("eval", r, no) for r, no in rows] + [("calibrate", r, no) for r, no in said]
        root = write_sets(tmp_path / name, [(m, r, no) for m in ("a", "b") for r, no in said], labelled)
        hashes.append([f["data_sha256"] for f in agreement(root, seed=1)])

    assert hashes[0][:2] == hashes[1][:2]  # the completions are the same
    assert hashes[0][2] == hashes[0][3] != hashes[1][2]
