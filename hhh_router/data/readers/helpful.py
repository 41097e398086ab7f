"""Ordinary tasks, most with a good reply."""

from __future__ import annotations

from collections.abc import Iterator

from hhh_router.data.examples import Example
from hhh_router.data.readers.rows import BENIGN, GOOD, Row, example


def _task(source: str, row: Row, prompt: str, response: str, group: str = "") -> Iterator[Example]:
    yield example(source, row, prompt.strip(), response=response, needs=BENIGN, outcomes=GOOD, group=group)


def dolly(row: Row) -> Iterator[Example]:
    """Instruction, perhaps with a context, and its reply."""
    return _task("dolly", row, f"{row['instruction']}\n\n{row['context']}", row["response"], row["category"])


def self_instruct(row: Row) -> Iterator[Example]:
    """Seed tasks."""
    return _task("self_instruct_seed", row, f"{row['instruction']}\n\n{row['input']}", row["output"])


def alpaca(row: Row) -> Iterator[Example]:
    """Instructions with a model's replies."""
    return _task("alpaca", row, f"{row['instruction']}\n\n{row['input']}", row["output"])


def alpaca_regen(row: Row) -> Iterator[Example]:
    """Alpaca instructions answered by a newer model."""
    return _task("alpaca_regen", row, f"{row['instruction']}\n\n{row['input']}", row["output"])


def lima(row: Row) -> Iterator[Example]:
    """Questions of community sites with long, curated replies."""
    return _task("lima", row, row["instruction"], row["output"])


def alpaca_eval(row: Row) -> Iterator[Example]:
    """Instructions to compare systems on; replies of others are left out."""
    yield example("alpaca_eval", row, row["instruction"], needs=BENIGN, group=row["dataset"])


def wildchat(row: Row) -> Iterator[Example]:
    """Real prompts, found harmless by people."""
    yield example("wildchat_benign", row, row["prompt"], needs=BENIGN, group=row["language"])


def cyberseceval_frr(row: Row) -> Iterator[Example]:
    """Harmless requests about security that models tend to refuse."""
    yield example("cyberseceval_frr", row, row["mutated_prompt"], needs=BENIGN)
