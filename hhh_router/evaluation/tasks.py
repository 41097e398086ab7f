"""What is measured: which rows of which sets ask which head, and in which mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hhh_router.data.examples import Example
from hhh_router.data.sets import read_set
from hhh_router.types import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One detection task on ``eval`` rows."""

    name: str
    kind: Literal["needs", "outcomes"]
    head: str
    mode: Mode
    sets: tuple[str, ...]
    keep: Callable[[Example], bool] = lambda example: True
    """Which rows take part."""


TASKS: tuple[Task, ...] = (
    Task(name="prompt harm · XSTest", kind="needs", head="harmless", mode="prompt", sets=("xstest",)),
    Task(name="prompt harm · JailbreakBench", kind="needs", head="harmless", mode="prompt", sets=("jailbreakbench",)),
    Task(
        name="prompt harm · OpenAI moderation",
        kind="needs",
        head="harmless",
        mode="prompt",
        sets=("openai_moderation",),
    ),
    Task(name="prompt harm · WildGuardTest", kind="needs", head="harmless", mode="prompt", sets=("wildguardtest",)),
    Task(name="honesty need · FalseQA", kind="needs", head="honest", mode="prompt", sets=("falseqa",)),
    Task(name="honesty need · UnknownBench", kind="needs", head="honest", mode="prompt", sets=("unknownbench",)),
    Task(
        name="honesty need · TruthfulQA against answerable questions",
        kind="needs",
        head="honest",
        mode="prompt",
        sets=("truthfulqa", "unknownbench"),
        keep=lambda e: e.source == "truthfulqa" or e.needs["honest"] == 0,
    ),
    Task(name="reply unsafe · WildGuardTest", kind="outcomes", head="unsafe", mode="both", sets=("wildguardtest",)),
    Task(
        name="reply over-refuses · WildGuardTest",
        kind="outcomes",
        head="unhelpful",
        mode="both",
        sets=("wildguardtest",),
    ),
    Task(
        name="reply untruthful · HaluEval", kind="outcomes", head="untruthful", mode="both", sets=("halueval_general",)
    ),
    Task(
        name="reply untruthful · TruthfulQA answers",
        kind="outcomes",
        head="untruthful",
        mode="both",
        sets=("truthfulqa",),
    ),
)


def task_rows(task: Task, data: Path) -> list[Example]:
    """The labelled ``eval`` rows of a task; prompts asked about once when the task reads prompts."""
    rows = [
        example
        for name in task.sets
        for example in read_set(data, name, "eval")
        if task.head in getattr(example, task.kind)
        and task.keep(example)
        and (task.mode == "prompt" or example.response is not None)
    ]
    return _once(rows) if task.mode == "prompt" else rows


def _once(rows: Sequence[Example]) -> list[Example]:
    return list({e.prompt: e for e in rows}.values())
