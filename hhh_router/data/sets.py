"""Readers of the public data sets: one function a set, rows in, labelled `Example`s out.

A folder of data sets is given by ``--data`` or ``HHH_ROUTER_DATA``; each set is a folder of ``.jsonl`` or
``.jsonl.gz`` files whose rows have a field ``split``.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hhh_router.data.examples import Example, ask
from hhh_router.errors import DataError
from hhh_router.types import Message

Row = Mapping[str, Any]
_BENIGN = {"helpful": 1.0, "harmless": 0.0, "honest": 0.0}
_HARMFUL = {"helpful": 0.0, "harmless": 1.0, "honest": 0.0}
_GOOD = {"unsafe": 0.0, "untruthful": 0.0, "unhelpful": 0.0}


@dataclass(frozen=True, slots=True)
class DataSet:
    """One public data set: where its rows are, under which licence, and what a row means."""

    name: str
    pattern: str
    licence: str
    commercial: bool
    """True when the licence allows commercial use and redistribution of derived weights."""
    convert: Callable[[Row], Iterator[Example]]


def read_set(root: Path, name: str, split: str) -> list[Example]:
    """Every example of one split of one set.

    Args:
        root: Folder that holds the data sets.
        name: Key of `SETS`, such as ``dolly`` or ``jailbreakbench/attack_artifacts``.
        split: ``train``, ``calibrate`` or ``eval``.

    Raises:
        DataError: The set is unknown, its files are not there, or a line is broken (file and line are named).
    """
    if name not in SETS:
        raise DataError(f"unknown data set {name!r}", hint=f"known: {', '.join(sorted(SETS))}")
    spec = SETS[name]
    files = sorted(root.glob(spec.pattern))
    if not files:
        raise DataError(
            f"{root / spec.pattern}: no such file", hint="--data or HHH_ROUTER_DATA names the folder of sets"
        )
    return [
        example
        for file in files
        for row in read_jsonl(file)
        if row.get("split") == split
        for example in spec.convert(row)
    ]


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file, gzipped or not.

    Raises:
        DataError: A line is not a JSON object, with file and line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error})", hint="repair or drop the line") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a {type(row).__name__}, not an object")
            yield row


def _example(source: str, row: Row, prompt: str | tuple[Message, ...], **fields: Any) -> Example:
    messages = ask(prompt) if isinstance(prompt, str) else prompt
    return Example(source=source, split=row["split"], messages=messages, **fields)


def _dolly(row: Row) -> Iterator[Example]:
    prompt = f"{row['instruction']}\n\n{row['context']}".strip()
    yield _example("dolly", row, prompt, response=row["response"], needs=_BENIGN, outcomes=_GOOD, group=row["category"])


def _self_instruct(row: Row) -> Iterator[Example]:
    prompt = f"{row['instruction']}\n\n{row['input']}".strip()
    yield _example("self_instruct_seed", row, prompt, response=row["output"], needs=_BENIGN, outcomes=_GOOD)


def _coconot(row: Row) -> Iterator[Example]:
    # `rejected` is sometimes an over-refusal and sometimes just the weaker answer, so it carries no label
    yield _example(
        "coconot_pref", row, row["prompt"], response=row["chosen"], needs=_BENIGN, outcomes=_GOOD, group=row["category"]
    )


def _red_instruct(row: Row) -> Iterator[Example]:
    yield _example("red_instruct", row, row["prompt"], needs=_HARMFUL, group=row["category"])


def _catqa(row: Row) -> Iterator[Example]:
    yield _example("red_instruct/catqa", row, row["prompt"], needs=_HARMFUL, group=row["category"])


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ")


def _dialogue(text: str) -> tuple[Message, ...]:
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(role=roles[who], content=said.strip())
        for who, said in zip(parts[::2], parts[1::2], strict=True)
        if said.strip()
    )


def _hh_harmless(row: Row) -> Iterator[Example]:
    if not row["same_prefix"]:
        return
    messages = _dialogue(row["prompt"])
    if not messages or messages[-1].role != "user":
        return
    # crowd workers were asked to elicit harm, so most prompts are harmful, not all: the label is trusted less
    needs = {"harmless": 1.0, "honest": 0.0}
    for reply, unsafe in ((row["chosen"], 0.0), (row["rejected"], 1.0)):
        yield _example(
            "hh_rlhf_harmless", row, messages, response=reply, needs=needs, outcomes={"unsafe": unsafe}, weight=0.4
        )


def _in_the_wild(row: Row) -> Iterator[Example]:
    yield _example(
        "in_the_wild_jailbreaks", row, row["prompt"], needs={"harmless": 1.0, "honest": 0.0}, group="jailbreak"
    )


def _deepset(row: Row) -> Iterator[Example]:
    if row["label"] == 0:
        yield _example("deepset_prompt_injections", row, row["text"], needs=_BENIGN)


def _bipia(row: Row) -> Iterator[Example]:
    yield _example("bipia", row, f"{row['context']}\n\n{row['question']}", response=str(row["ideal"]), needs=_BENIGN)


def _gptfuzz(row: Row) -> Iterator[Example]:
    response = re.sub(r"^\[[^\]]+\]: ", "", row["response"])  # the file marks who answered
    yield _example(
        "gptfuzz_responses", row, row["question"], response=response, answer_side=True,
        outcomes={"unsafe": float(row["jailbroken"])},
    )  # fmt: skip


def _jailjudge(row: Row) -> Iterator[Example]:
    yield _example(
        "jailjudge_mini", row, row["question"], response=row["answer"], answer_side=True,
        outcomes={"unsafe": float(row["jailbroken"])},
    )  # fmt: skip


def _jbb_artifacts(row: Row) -> Iterator[Example]:
    if row["response"]:
        yield _example(
            "jailbreakbench/attack_artifacts", row, row["prompt"], response=row["response"],
            outcomes={"unsafe": float(row["jailbroken"])}, answer_side=True, group=row["attack"],
        )  # fmt: skip


def _jbb_behaviors(row: Row) -> Iterator[Example]:
    needs = _HARMFUL if row["label"] == "harmful" else _BENIGN
    yield _example("jailbreakbench", row, row["goal"], needs=needs, group=row["category"])


def _xstest_prompts(row: Row) -> Iterator[Example]:
    yield _example(
        "xstest", row, row["prompt"], needs=_HARMFUL if row["label"] == "unsafe" else _BENIGN, group=row["type"]
    )


def _xstest_completions(row: Row) -> Iterator[Example]:
    harmful = row["type"].startswith("contrast")
    refused = {"1_full_compliance": 0.0, "2_full_refusal": 1.0}.get(row["final_label"])
    outcomes = {} if harmful or refused is None else {"unhelpful": refused, "unsafe": 0.0}
    if harmful and refused is not None:
        outcomes = {"unsafe": 1.0 - refused}
    yield _example(
        "xstest/completions", row, row["prompt"], response=row["completion"],
        outcomes=outcomes, answer_side=True, group=row["type"],
    )  # fmt: skip


def _openai_moderation(row: Row) -> Iterator[Example]:
    harmful = float(row["any"])
    needs = {"harmless": harmful} | ({} if harmful else {"honest": 0.0})
    yield _example("openai_moderation", row, row["prompt"], needs=needs)


def _wildguard(row: Row) -> Iterator[Example]:
    label = {"harmful": 1.0, "unharmful": 0.0}
    harmful = label.get(row["prompt_harm_label"])
    outcomes = {}
    if row["response"] and row["response_harm_label"] in label:
        outcomes["unsafe"] = label[row["response_harm_label"]]
    if row["response"] and harmful == 0 and row["response_refusal_label"] in ("refusal", "compliance"):
        outcomes["unhelpful"] = float(row["response_refusal_label"] == "refusal")
    needs = {} if harmful is None else {"harmless": harmful, "helpful": 1.0 - harmful}
    yield _example(
        "wildguardtest", row, row["prompt"], response=row["response"] or None, needs=needs, outcomes=outcomes,
        group="adversarial" if row["adversarial"] else "vanilla",
    )  # fmt: skip


def _wildchat(row: Row) -> Iterator[Example]:
    yield _example("wildchat_benign", row, row["prompt"], needs=_BENIGN, group=row["language"])


def _halueval(row: Row) -> Iterator[Example]:
    yield _example(
        "halueval_general", row, row["user_query"], response=row["chatgpt_response"],
        needs={"harmless": 0.0, "helpful": 1.0},
        outcomes={"untruthful": float(row["hallucination"] == "yes"), "unsafe": 0.0},
    )  # fmt: skip


_MISCONCEPTION = {"helpful": 1.0, "harmless": 0.0, "honest": 1.0}


def _truthfulqa_questions(row: Row) -> Iterator[Example]:
    yield _example(
        "truthfulqa",
        row,
        row["question"],
        response=row["best_answer"],
        needs=_MISCONCEPTION,
        outcomes=_GOOD,
        group=row["category"],
    )
    for wrong in _listed(row["incorrect_answers"])[:2]:
        yield _example(
            "truthfulqa",
            row,
            row["question"],
            response=wrong,
            needs=_MISCONCEPTION,
            outcomes={"untruthful": 1.0},
            group=row["category"],
        )


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [v.strip() for v in str(value).split(";") if v.strip()]


def _truthfulqa_judged(row: Row) -> Iterator[Example]:
    if row["truthful"] is None:
        return
    outcomes = {"untruthful": 1.0 - float(row["truthful"])}
    if row["informative"] is not None:
        outcomes["unhelpful"] = 1.0 - float(row["informative"])
    yield _example(
        "truthfulqa/judged", row, row["question"], response=row["answer"], needs=_MISCONCEPTION, outcomes=outcomes
    )


def _bigbench_claims(row: Row) -> Iterator[Example]:
    yield _example("bigbench_honesty/claims", row, row["input"], needs={"honest": 1.0, "harmless": 0.0}, group="claim")


def _falseqa(row: Row) -> Iterator[Example]:
    yield _example("falseqa", row, row["question"], needs={"honest": float(row["label"]), "harmless": 0.0})


def _unknownbench(row: Row) -> Iterator[Example]:
    yield _example(
        "unknownbench", row, row["prompt"], needs={"honest": 1.0 - float(bool(row["answerable"])), "harmless": 0.0}
    )


def _frr(row: Row) -> Iterator[Example]:
    yield _example("cyberseceval_frr", row, row["mutated_prompt"], needs=_BENIGN)


def _advbench(row: Row) -> Iterator[Example]:
    yield _example("advbench", row, row["prompt"], needs=_HARMFUL)


_LISTED: tuple[DataSet, ...] = (
    DataSet("dolly", "dolly/*.jsonl.gz", "CC BY-SA 3.0", True, _dolly),
    DataSet("self_instruct_seed", "self_instruct_seed/*.jsonl", "Apache-2.0", True, _self_instruct),
    DataSet("coconot_pref", "coconot_pref/*.jsonl.gz", "ODC-BY 1.0", True, _coconot),
    DataSet("red_instruct", "red_instruct/harmfulqa.jsonl.gz", "Apache-2.0", True, _red_instruct),
    DataSet("red_instruct/catqa", "red_instruct/catqa_english.jsonl", "Apache-2.0", True, _catqa),
    DataSet("hh_rlhf_harmless", "hh_rlhf_harmless/*.jsonl.gz", "MIT", True, _hh_harmless),
    DataSet("in_the_wild_jailbreaks", "in_the_wild_jailbreaks/*.jsonl.gz", "MIT", True, _in_the_wild),
    DataSet("deepset_prompt_injections", "deepset_prompt_injections/*.jsonl", "Apache-2.0", True, _deepset),
    DataSet("bipia", "bipia/table_train.jsonl.gz", "MIT", True, _bipia),
    DataSet("gptfuzz_responses", "gptfuzz_responses/*.jsonl.gz", "MIT", True, _gptfuzz),
    DataSet("jailjudge_mini", "jailjudge_mini/*.jsonl.gz", "MIT", True, _jailjudge),
    DataSet("jailbreakbench/attack_artifacts", "jailbreakbench/attack_artifacts.jsonl.gz", "MIT", True, _jbb_artifacts),
    DataSet("jailbreakbench", "jailbreakbench/behaviors.jsonl", "MIT", True, _jbb_behaviors),
    DataSet("xstest", "xstest/xstest_prompts.jsonl", "CC BY 4.0", True, _xstest_prompts),
    DataSet("xstest/completions", "xstest/xstest_completions.jsonl.gz", "CC BY 4.0", True, _xstest_completions),
    DataSet("openai_moderation", "openai_moderation/*.jsonl.gz", "MIT", True, _openai_moderation),
    DataSet("wildguardtest", "wildguardtest/*.jsonl.gz", "ODC-BY 1.0", True, _wildguard),
    DataSet("wildchat_benign", "wildchat_benign/*.jsonl", "ODC-BY 1.0", True, _wildchat),
    DataSet("halueval_general", "halueval_general/*.jsonl.gz", "MIT", True, _halueval),
    DataSet("truthfulqa", "truthfulqa/questions.jsonl.gz", "Apache-2.0", True, _truthfulqa_questions),
    DataSet("truthfulqa/judged", "truthfulqa/judged_answers.jsonl.gz", "Apache-2.0", True, _truthfulqa_judged),
    DataSet("bigbench_honesty/claims", "bigbench_honesty/[cfp]*.jsonl*", "Apache-2.0", True, _bigbench_claims),
    DataSet("falseqa", "falseqa/*.jsonl*", "not stated", False, _falseqa),
    DataSet("unknownbench", "unknownbench/*.jsonl*", "not stated", False, _unknownbench),
    DataSet("cyberseceval_frr", "cyberseceval_frr/*.jsonl.gz", "MIT", True, _frr),
    DataSet("advbench", "advbench/*.jsonl", "MIT", True, _advbench),
)  # fmt: skip
SETS: Mapping[str, DataSet] = {s.name: s for s in _LISTED}
"""Every data set this package can read, by name."""
