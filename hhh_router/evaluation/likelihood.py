"""What a system finds likelier: true answers or misconceptions, better or worse replies, right or wrong choices.

Nothing is generated here. Every suite scores given texts, so hundreds of rows cost seconds and no judge is needed; what
a system would write by itself is another question (`behaviour`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hhh_router.calibration.metrics import bootstrap_interval
from hhh_router.data.examples import Example, ask, data_hash
from hhh_router.data.readers.rows import dialogue
from hhh_router.data.sets import read_jsonl
from hhh_router.errors import ContextTooLong, DataError
from hhh_router.model.base import Backbone
from hhh_router.model.runner import Reply, Runner, as_reply
from hhh_router.types import Message, Weights

Rule = Literal["mc2", "sum", "mean", "likelihood"]
"""How candidates become a figure. ``mc2``: share of the probability mass that true answers get; ``sum``, ``mean``:
whether the right one has the largest log-likelihood, as a sum or per token; ``likelihood``: exp of the log-likelihood
per token of the one reply given."""


_UNITS: Mapping[Rule, str] = {
    "mc2": "MC2",
    "sum": "accuracy",
    "mean": "accuracy, length-normalised",
    "likelihood": "probability per token",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with candidate replies."""

    messages: tuple[Message, ...]
    candidates: tuple[str, ...]
    right: frozenset[int]
    """Places of the right candidates."""
    group: str = ""


@dataclass(frozen=True, slots=True)
class LikelihoodSuite:
    """A set of items and how they are counted."""

    name: str
    part: str
    """The suite of ``hhh-router evaluate`` it belongs to: ``honesty``, ``hhh``, ``helpful`` or ``general``."""
    pattern: str
    """Its files, in the folder of data sets."""
    rule: Rule
    convert: Callable[[Mapping[str, Any]], Item | None]
    """None for a row that is no item, such as a table's heading among the rows."""
    max_tokens: int = 384
    """Longest prompt + reply; what is behind is cut, and an item whose prompt fills it is left out."""


def suite_items(suite: LikelihoodSuite, data: Path, *, rows: int, seed: int) -> list[Item]:
    """At most ``rows`` items of the suite's eval rows, drawn by seed.

    Raises:
        DataError: The files are not there.
    """
    files = sorted(data.glob(suite.pattern))
    if not files:
        raise DataError(f"{data / suite.pattern}: no such file", hint="--data names the folder of data sets")
    rows_read = (row for file in files for row in read_jsonl(file) if row.get("split") == "eval")
    items = [item for row in rows_read if (item := suite.convert(row)) is not None]
    random.Random(f"{seed}-{suite.name}").shuffle(items)
    return items[:rows]


def item_values(
    suite: LikelihoodSuite,
    items: Sequence[Item],
    systems: Mapping[str, Sequence[Weights]],
    runner: Runner,
    *,
    on_rows: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[str, list[float]]:
    """What each system gets for each item whose candidates fit, in [0, 1].

    Args:
        suite: How the items are counted.
        items: From `suite_items`.
        systems: Name → weights of each item.
        runner: With the bundle's experts.
        on_rows: Progress: replies scored, of how many, the suite's name.
    """
    kept, replies, owners = _replies(items, runner.backbone, suite.max_tokens)
    scores = runner.log_likelihoods(
        replies, {n: [w[o] for o in owners] for n, w in systems.items()},
        on_rows=lambda done, total: on_rows(done, total, suite.name),
    )  # fmt: skip
    return {name: _values(suite, items, kept, replies, owners, found) for name, found in scores.items()}


def likelihood_figures(
    suite: LikelihoodSuite,
    items: Sequence[Item],
    systems: Mapping[str, Sequence[Weights]],
    runner: Runner,
    *,
    seed: int,
    on_rows: Callable[[int, int, str], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """One row per system: ``value`` in [0, 1] with a 95 % bootstrap interval over items, and ``gain``, its difference
    from the first system on the same items. Arguments are those of `item_values`.
    """
    values = item_values(suite, items, systems, runner, on_rows=on_rows)
    first = next(iter(values.values()))
    digest = data_hash(
        Example(source=suite.name, split="eval", messages=i.messages, response="\x1e".join(i.candidates)) for i in items
    )
    common = {"suite": suite.part, "task": suite.name, "unit": _UNITS[suite.rule], "n": len(first), "seed": seed,
              "data_sha256": digest}  # fmt: skip
    figures = []
    for name, found in values.items():
        gain = [a - b for a, b in zip(found, first, strict=True)]
        figures.append(
            common
            | {"system": name, "value": _mean(found), "interval": list(bootstrap_interval(_mean, found, seed=seed))}
            | {"gain": _mean(gain), "gain_interval": list(bootstrap_interval(_mean, gain, seed=seed))}
        )
    return figures


def _replies(items: Sequence[Item], backbone: Backbone, max_tokens: int) -> tuple[list[int], list[Reply], list[int]]:
    """Places of the items that fit, the tokens of their candidates, and whose each candidate is."""
    kept, replies, owners = [], [], []
    for place, item in enumerate(items):
        try:
            found = [as_reply(backbone, item.messages, c, max_tokens, end=False) for c in item.candidates]
        except ContextTooLong:
            continue
        if all(r.tokens for r in found):
            kept.append(place)
            replies += found
            owners += [place] * len(found)
    return kept, replies, owners


def _values(
    suite: LikelihoodSuite,
    items: Sequence[Item],
    kept: Sequence[int],
    replies: Sequence[Reply],
    owners: Sequence[int],
    scores: Sequence[float],
) -> list[float]:
    of: dict[int, list[tuple[float, int]]] = {place: [] for place in kept}
    for owner, reply, score in zip(owners, replies, scores, strict=True):
        of[owner].append((score, reply.tokens))
    return [_value(suite.rule, found, items[place].right) for place, found in of.items()]


def _value(rule: Rule, candidates: Sequence[tuple[float, int]], right: frozenset[int]) -> float:
    sums = np.array([score for score, _ in candidates])
    means = np.array([score / tokens for score, tokens in candidates])
    if rule == "likelihood":
        return float(np.exp(means[0]))
    if rule == "mc2":
        shares = np.exp(sums - sums.max())
        return float(shares[list(right)].sum() / shares.sum())
    return float(int((sums if rule == "sum" else means).argmax()) in right)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mc2(row: Mapping[str, Any]) -> Item:
    targets = row["mc2_targets"]
    right = frozenset(i for i, truth in enumerate(targets.values()) if truth)
    return Item(ask(row["question"]), tuple(targets), right)


def _hhh(row: Mapping[str, Any]) -> Item:
    messages = dialogue(row["input"]) or ask(row["input"])
    return Item(messages, (row["chosen"], row["rejected"]), frozenset({0}), group=row["subset"])


def _choices(row: Mapping[str, Any]) -> Item:
    choices = row["choices"]  # by letter
    right = frozenset({list(choices).index(row["answer"])})
    return Item(ask(row["question"]), tuple(map(str, choices.values())), right)


def _mmlu(row: Mapping[str, Any]) -> Item | None:
    if not str(row["answer"]).isdecimal():  # the heading of a source's table
        return None
    return Item(ask(row["question"]), tuple(str(c) for c in row["choices"]), frozenset({int(row["answer"])}))


def _hellaswag(row: Mapping[str, Any]) -> Item:
    item = _choices(row)
    asked = f"Continue this text:\n\n{row['question']}"
    return Item(ask(asked), item.candidates, item.right)


def _gsm8k(row: Mapping[str, Any]) -> Item:
    return Item(ask(row["question"]), (row["answer"],), frozenset({0}))


def _alpaca_eval(row: Mapping[str, Any]) -> Item:
    return Item(ask(row["instruction"]), (row["outputs"]["gpt4"],), frozenset({0}))


LIKELIHOOD_SUITES: tuple[LikelihoodSuite, ...] = (
    LikelihoodSuite("TruthfulQA MC2", "honesty", "truthfulqa/mc_task.jsonl.gz", "mc2", _mc2),
    LikelihoodSuite("HHH alignment, pairwise", "hhh", "hhh_alignment/*.jsonl", "mean", _hhh, max_tokens=768),
    LikelihoodSuite("AlpacaEval, GPT-4's answer", "helpful", "alpaca_eval/*.jsonl.gz", "likelihood", _alpaca_eval),
    LikelihoodSuite("MMLU", "general", "mmlu_sample/*.jsonl.gz", "sum", _mmlu),
    LikelihoodSuite("ARC-Challenge", "general", "arc_challenge/*.jsonl", "mean", _choices),
    LikelihoodSuite("HellaSwag", "general", "hellaswag_sample/*.jsonl.gz", "mean", _hellaswag),
    LikelihoodSuite("GSM8K, answer", "general", "gsm8k/*.jsonl.gz", "likelihood", _gsm8k),
)
"""Suites that score given texts."""


def likelihood_suites(part: str) -> Iterator[LikelihoodSuite]:
    """Those of one suite of ``hhh-router evaluate``."""
    return (s for s in LIKELIHOOD_SUITES if s.part == part)
