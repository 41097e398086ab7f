"""The public data sets this package can read, by name, and how their files are read.

A folder of data sets is given by ``--data`` or ``HHH_ROUTER_DATA``; each set is a folder of ``.jsonl`` or
``.jsonl.gz`` files whose rows have a field ``split``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hhh_router.data.examples import Example
from hhh_router.data.readers import harmless, helpful, honest, injection
from hhh_router.data.readers.rows import Row
from hhh_router.errors import DataError


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


_LISTED: tuple[DataSet, ...] = (
    DataSet("dolly", "dolly/*.jsonl.gz", "CC BY-SA 3.0", True, helpful.dolly),
    DataSet("self_instruct_seed", "self_instruct_seed/*.jsonl", "Apache-2.0", True, helpful.self_instruct),
    DataSet("alpaca", "alpaca/*.jsonl.gz", "CC BY-NC 4.0", False, helpful.alpaca),
    DataSet("alpaca_regen", "alpaca_regen/*.jsonl.gz", "derives from CC BY-NC 4.0", False, helpful.alpaca_regen),
    DataSet("lima", "lima/*.jsonl.gz", "CC BY-NC-SA 4.0", False, helpful.lima),
    DataSet("alpaca_eval", "alpaca_eval/*.jsonl.gz", "CC BY-NC 4.0", False, helpful.alpaca_eval),
    DataSet("wildchat_benign", "wildchat_benign/*.jsonl", "ODC-BY 1.0", True, helpful.wildchat),
    DataSet("cyberseceval_frr", "cyberseceval_frr/*.jsonl.gz", "MIT", True, helpful.cyberseceval_frr),
    DataSet("coconot_pref", "coconot_pref/*.jsonl.gz", "ODC-BY 1.0", True, harmless.coconot),
    DataSet("red_instruct", "red_instruct/harmfulqa.jsonl.gz", "Apache-2.0", True, harmless.red_instruct),
    DataSet("red_instruct/catqa", "red_instruct/catqa_english.jsonl", "Apache-2.0", True, harmless.catqa),
    DataSet("alert", "alert/*.jsonl.gz", "CC BY-NC-SA 4.0", False, harmless.alert),
    DataSet("safety_tuned_llamas", "safety_tuned_llamas/safety_only.jsonl.gz", "CC BY-NC 4.0", False,
            harmless.safety_only),
    DataSet("pku_saferlhf_mini", "pku_saferlhf_mini/*.jsonl.gz", "CC BY-NC 4.0", False, harmless.pku),
    DataSet("hh_rlhf_harmless", "hh_rlhf_harmless/*.jsonl.gz", "MIT", True, harmless.hh_harmless),
    DataSet("toxicchat_positives", "toxicchat_positives/*.jsonl.gz", "CC BY-NC 4.0", False, harmless.toxicchat),
    DataSet("gptfuzz_responses", "gptfuzz_responses/*.jsonl.gz", "MIT", True, harmless.gptfuzz),
    DataSet("jailjudge_mini", "jailjudge_mini/*.jsonl.gz", "MIT", True, harmless.jailjudge),
    DataSet("jailbreakbench/attack_artifacts", "jailbreakbench/attack_artifacts.jsonl.gz", "MIT", True,
            harmless.jbb_artifacts),
    DataSet("jailbreakbench", "jailbreakbench/behaviors.jsonl", "MIT", True, harmless.jbb_behaviors),
    DataSet("xstest", "xstest/xstest_prompts.jsonl", "CC BY 4.0", True, harmless.xstest),
    DataSet("xstest/completions", "xstest/xstest_completions.jsonl.gz", "CC BY 4.0", True,
            harmless.xstest_completions),
    DataSet("openai_moderation", "openai_moderation/*.jsonl.gz", "MIT", True, harmless.openai_moderation),
    DataSet("wildguardtest", "wildguardtest/*.jsonl.gz", "ODC-BY 1.0", True, harmless.wildguard),
    DataSet("advbench", "advbench/*.jsonl", "MIT", True, harmless.advbench),
    DataSet("malicious_instruct", "malicious_instruct/*.jsonl", "not stated", False, harmless.malicious_instruct),
    DataSet("harmbench", "harmbench/*.jsonl", "MIT", True, harmless.harmbench),
    DataSet("beavertails_eval", "beavertails_eval/*.jsonl", "CC BY-NC 4.0", False, harmless.beavertails_eval),
    DataSet("in_the_wild_jailbreaks", "in_the_wild_jailbreaks/*.jsonl.gz", "MIT", True, injection.in_the_wild),
    DataSet("deepset_prompt_injections", "deepset_prompt_injections/*.jsonl*", "Apache-2.0", True, injection.deepset),
    DataSet("qualifire_injections", "qualifire_injections/*.jsonl.gz", "CC BY-NC 4.0", False, injection.qualifire),
    DataSet("notinject", "notinject/*.jsonl", "MIT", True, injection.notinject),
    DataSet("bipia", "bipia/table_train.jsonl.gz", "MIT", True, injection.bipia),
    DataSet("cyberseceval_injection", "cyberseceval_injection/*.jsonl", "MIT", True,
            injection.cyberseceval_injection),
    DataSet("truthfulqa", "truthfulqa/questions.jsonl.gz", "Apache-2.0", True, honest.truthfulqa),
    DataSet("truthfulqa/judged", "truthfulqa/judged_answers.jsonl.gz", "Apache-2.0", True, honest.truthfulqa_judged),
    DataSet("halueval_general", "halueval_general/*.jsonl.gz", "MIT", True, honest.halueval),
    DataSet("bigbench_honesty/claims", "bigbench_honesty/[cfp]*.jsonl*", "Apache-2.0", True, honest.bigbench_claims),
    DataSet("bigbench_honesty/answered", "bigbench_honesty/[fs]*.jsonl*", "Apache-2.0", True,
            honest.bigbench_answered),
    DataSet("falseqa", "falseqa/*.jsonl*", "not stated", False, honest.falseqa),
    DataSet("unknownbench", "unknownbench/*.jsonl*", "not stated", False, honest.unknownbench),
    DataSet("alignment_for_honesty/nonambigqa", "alignment_for_honesty/nonambigqa.jsonl.gz", "not stated", False,
            honest.nonambigqa),
    DataSet("alignment_for_honesty/puqa", "alignment_for_honesty/puqa.jsonl.gz", "not stated", False, honest.puqa),
    DataSet("honeset/pairs", "honeset/dpo_pairs.jsonl.gz", "not stated", False, honest.honeset_pairs),
    DataSet("honeset", "honeset/honeset.jsonl", "not stated", False, honest.honeset),
)  # fmt: skip
SETS: Mapping[str, DataSet] = {s.name: s for s in _LISTED}
"""Every data set this package can read, by name."""
