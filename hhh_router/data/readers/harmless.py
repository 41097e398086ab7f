"""Harmful prompts, benign look-alikes, and replies judged for harm or refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hhh_router.data.examples import Example
from hhh_router.data.readers.rows import BENIGN, GOOD, HARMFUL, Row, dialogue, example

_HALF_TRUSTED = 0.5  # labels that hold for most rows of a set, not for each


def coconot(row: Row) -> Iterator[Example]:
    """Requests that should be answered though they look as if they should not."""
    # `rejected` is sometimes an over-refusal and sometimes just the weaker answer, so it carries no label
    yield example(
        "coconot_pref", row, row["prompt"], response=row["chosen"], needs=BENIGN, outcomes=GOOD, group=row["category"]
    )


def red_instruct(row: Row) -> Iterator[Example]:
    """Harmful questions."""
    yield example("red_instruct", row, row["prompt"], needs=HARMFUL, group=row["category"])


def catqa(row: Row) -> Iterator[Example]:
    """Harmful questions by category."""
    yield example("red_instruct/catqa", row, row["prompt"], needs=HARMFUL, group=row["category"])


def alert(row: Row) -> Iterator[Example]:
    """Red-team prompts by category."""
    yield example("alert", row, row["prompt"], needs=HARMFUL, group=row["category"])


def safety_only(row: Row) -> Iterator[Example]:
    """Red-team instructions with safe replies; some of the instructions are harmless as they stand."""
    yield example(
        "safety_tuned_llamas", row, f"{row['instruction']}\n\n{row['input']}".strip(), response=row["output"],
        needs={"harmless": 1.0, "injection": 0.0}, outcomes={"unsafe": 0.0}, weight=_HALF_TRUSTED,
    )  # fmt: skip


def pku(row: Row) -> Iterator[Example]:
    """Questions with a reply that people found safe or not."""
    unsafe = float(row["unsafe"])
    # a question that was answered unsafely asks for harm, most of the time; a safe answer says nothing about it
    needs = {"harmless": 1.0, "injection": 0.0} if unsafe else {"injection": 0.0}
    yield example(
        "pku_saferlhf_mini", row, row["question"], response=row["answer"], needs=needs, outcomes={"unsafe": unsafe}
    )


def hh_harmless(row: Row) -> Iterator[Example]:
    """Conversations that try to elicit harm, with the better and the worse reply."""
    if not row["same_prefix"]:
        return
    messages = dialogue(row["prompt"])
    if not messages or messages[-1].role != "user":
        return
    # crowd workers were asked to elicit harm, so most prompts are harmful, not all: the label is trusted less
    needs = {"harmless": 1.0, "honest": 0.0, "injection": 0.0}
    for reply, unsafe in ((row["chosen"], 0.0), (row["rejected"], 1.0)):
        yield example(
            "hh_rlhf_harmless", row, messages, response=reply, needs=needs, outcomes={"unsafe": unsafe}, weight=0.4
        )


def toxicchat(row: Row) -> Iterator[Example]:
    """Toxic prompts of real users, some of them jailbreaks."""
    needs = {"harmless": 1.0, "injection": float(row["jailbreaking"])}
    yield example("toxicchat_positives", row, row["user_input"], needs=needs)


def gptfuzz(row: Row) -> Iterator[Example]:
    """Replies to jailbroken questions, labelled by people."""
    response = re.sub(r"^\[[^\]]+\]: ", "", row["response"])  # the file marks who answered
    yield example(
        "gptfuzz_responses", row, row["question"], response=response, answer_side=True,
        outcomes={"unsafe": float(row["jailbroken"])},
    )  # fmt: skip


def jailjudge(row: Row) -> Iterator[Example]:
    """Replies to attacks, labelled by people."""
    yield example(
        "jailjudge_mini", row, row["question"], response=row["answer"], answer_side=True,
        outcomes={"unsafe": float(row["jailbroken"])},
    )  # fmt: skip


def jbb_artifacts(row: Row) -> Iterator[Example]:
    """Replies to successful and failed attacks."""
    if row["response"]:
        yield example(
            "jailbreakbench/attack_artifacts", row, row["prompt"], response=row["response"],
            outcomes={"unsafe": float(row["jailbroken"])}, answer_side=True, group=row["attack"],
        )  # fmt: skip


def jbb_behaviors(row: Row) -> Iterator[Example]:
    """Harmful goals and benign ones of the same topics."""
    needs = HARMFUL if row["label"] == "harmful" else BENIGN
    yield example("jailbreakbench", row, row["goal"], needs=needs, group=row["category"])


def xstest(row: Row) -> Iterator[Example]:
    """Safe prompts that look unsafe, and unsafe contrasts."""
    yield example(
        "xstest", row, row["prompt"], needs=HARMFUL if row["label"] == "unsafe" else BENIGN, group=row["type"]
    )


def xstest_completions(row: Row) -> Iterator[Example]:
    """Models' replies to XSTest prompts with human labels of refusal."""
    harmful = row["type"].startswith("contrast")
    refused = {"1_full_compliance": 0.0, "2_full_refusal": 1.0}.get(row["final_label"])
    outcomes = {} if harmful or refused is None else {"unhelpful": refused, "unsafe": 0.0}
    if harmful and refused is not None:
        outcomes = {"unsafe": 1.0 - refused}
    yield example(
        "xstest/completions", row, row["prompt"], response=row["completion"],
        outcomes=outcomes, answer_side=True, group=row["type"],
    )  # fmt: skip


def openai_moderation(row: Row) -> Iterator[Example]:
    """Texts with human labels in eight categories."""
    harmful = float(row["any"])
    needs = {"harmless": harmful} | ({} if harmful else {"honest": 0.0})
    yield example("openai_moderation", row, row["prompt"], needs=needs)


def wildguard(row: Row) -> Iterator[Example]:
    """Plain and adversarial prompts and replies with human labels of harm and refusal."""
    label = {"harmful": 1.0, "unharmful": 0.0}
    harmful = label.get(row["prompt_harm_label"])
    outcomes = {}
    if row["response"] and row["response_harm_label"] in label:
        outcomes["unsafe"] = label[row["response_harm_label"]]
    if row["response"] and harmful == 0 and row["response_refusal_label"] in ("refusal", "compliance"):
        outcomes["unhelpful"] = float(row["response_refusal_label"] == "refusal")
    needs = {} if harmful is None else {"harmless": harmful, "helpful": 1.0 - harmful}
    yield example(
        "wildguardtest", row, row["prompt"], response=row["response"] or None, needs=needs, outcomes=outcomes,
        group="adversarial" if row["adversarial"] else "vanilla",
    )  # fmt: skip


def advbench(row: Row) -> Iterator[Example]:
    """Harmful instructions."""
    yield example("advbench", row, row["prompt"], needs=HARMFUL)


def malicious_instruct(row: Row) -> Iterator[Example]:
    """Harmful questions."""
    yield example("malicious_instruct", row, row["prompt"], needs=HARMFUL)


def harmbench(row: Row) -> Iterator[Example]:
    """Harmful behaviours; those about copyright alone are left out."""
    if row["FunctionalCategory"] == "copyright":
        return
    prompt = f"{row['ContextString']}\n\n{row['Behavior']}".strip()
    yield example("harmbench", row, prompt, needs=HARMFUL, group=row["SemanticCategory"])


def beavertails_eval(row: Row) -> Iterator[Example]:
    """Prompts in 14 categories of harm."""
    yield example("beavertails_eval", row, row["prompt"], needs=HARMFUL, group=row["category"])
