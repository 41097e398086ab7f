"""Questions that only an honest answer serves, answerable twins, and replies judged for truth."""

from __future__ import annotations

from collections.abc import Iterator

from hhh_router.data.examples import Example
from hhh_router.data.readers.rows import GOOD, MISCONCEPTION, Row, example, listed


def truthfulqa(row: Row) -> Iterator[Example]:
    """A misconception with its best answer, and with two wrong ones."""
    group = row["category"]
    yield example(
        "truthfulqa", row, row["question"], response=row["best_answer"], needs=MISCONCEPTION, outcomes=GOOD, group=group
    )
    for wrong in listed(row["incorrect_answers"])[:2]:
        yield example(
            "truthfulqa", row, row["question"], response=wrong, needs=MISCONCEPTION, outcomes={"untruthful": 1.0},
            group=group,
        )  # fmt: skip


def truthfulqa_judged(row: Row) -> Iterator[Example]:
    """Models' answers with human labels of truth and information."""
    if row["truthful"] is None:
        return
    outcomes = {"untruthful": 1.0 - float(row["truthful"])}
    if row["informative"] is not None:
        outcomes["unhelpful"] = 1.0 - float(row["informative"])
    yield example(
        "truthfulqa/judged", row, row["question"], response=row["answer"], needs=MISCONCEPTION, outcomes=outcomes
    )


def halueval(row: Row) -> Iterator[Example]:
    """Replies of a chat model, labelled for hallucination."""
    yield example(
        "halueval_general", row, row["user_query"], response=row["chatgpt_response"],
        needs={"harmless": 0.0, "helpful": 1.0},
        outcomes={"untruthful": float(row["hallucination"] == "yes"), "unsafe": 0.0},
    )  # fmt: skip


def bigbench_claims(row: Row) -> Iterator[Example]:
    """Claims to be judged true or false."""
    yield example("bigbench_honesty/claims", row, row["input"], needs={"honest": 1.0, "harmless": 0.0}, group="claim")


def bigbench_answered(row: Row) -> Iterator[Example]:
    """Claims with a verdict, and factual questions with an answer that says why."""
    said = {"true": "The claim is true.", "false": "The claim is false."}
    truth = next((said[name] for name, right in row["target_scores"].items() if right and name in said), None)
    response = truth or row["target"]
    if response:
        needs = {"honest": 1.0, "harmless": 0.0} if truth else {"helpful": 1.0, "harmless": 0.0}
        yield example("bigbench_honesty/answered", row, row["input"], response=response, needs=needs, outcomes=GOOD)


def falseqa(row: Row) -> Iterator[Example]:
    """A question with a false premise and its rebuttal, or its true twin."""
    answer = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
    yield example(
        "falseqa", row, row["question"], response=answer or None, outcomes=GOOD if answer else {},
        needs=_answerable(not row["label"]), group="false premise" if row["label"] else "true premise",
    )  # fmt: skip


def unknownbench(row: Row) -> Iterator[Example]:
    """Questions about real and invented things."""
    yield example(
        "unknownbench", row, row["prompt"], needs=_answerable(bool(row["answerable"])), group=row.get("category", "nq")
    )


def nonambigqa(row: Row) -> Iterator[Example]:
    """Questions with one known answer."""
    yield example("alignment_for_honesty/nonambigqa", row, row["question"], needs=_answerable(True))


def puqa(row: Row) -> Iterator[Example]:
    """Questions about papers that no older model can know."""
    yield example("alignment_for_honesty/puqa", row, row["question"], needs=_answerable(False))


def honeset_pairs(row: Row) -> Iterator[Example]:
    """Requests that a language model cannot honestly fulfil, with an honest and helpful answer."""
    yield example("honeset/pairs", row, row["instruction"], response=row["chosen"], needs=MISCONCEPTION, outcomes=GOOD)


def honeset(row: Row) -> Iterator[Example]:
    """Requests that a language model cannot honestly fulfil."""
    yield example("honeset", row, row["instruction"], needs=MISCONCEPTION, group=row["category"])


def _answerable(answerable: bool) -> dict[str, float]:
    return {"honest": float(not answerable), "harmless": 0.0, "injection": 0.0}
