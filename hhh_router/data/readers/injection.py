"""Prompt injections and jailbreaks, and benign prompts that look like them."""

from __future__ import annotations

from collections.abc import Iterator

from hhh_router.data.examples import Example
from hhh_router.data.readers.rows import BENIGN, Row, example


def in_the_wild(row: Row) -> Iterator[Example]:
    """Jailbreak prompts collected from forums, all positive."""
    needs = {"harmless": 1.0, "honest": 0.0, "injection": 1.0}
    yield example("in_the_wild_jailbreaks", row, row["prompt"], needs=needs, group="jailbreak")


def deepset(row: Row) -> Iterator[Example]:
    """Injections and questions, English and German."""
    yield example("deepset_prompt_injections", row, row["text"], needs=_needs(row))


def qualifire(row: Row) -> Iterator[Example]:
    """Injections and jailbreaks beside long, adversarial-looking benign prompts."""
    yield example("qualifire_injections", row, row["text"], needs=_needs(row))


def _needs(row: Row) -> dict[str, float]:
    # whether harm is at stake in an injection is not labelled: many only try to change the task
    return {"injection": 1.0} if int(row["label"]) else dict(BENIGN)


def notinject(row: Row) -> Iterator[Example]:
    """Benign prompts with trigger words."""
    yield example("notinject", row, row["prompt"], needs=BENIGN, group=row["level"])


def bipia(row: Row) -> Iterator[Example]:
    """Questions about tables, without any injection."""
    text = f"{row['context']}\n\n{row['question']}"
    yield example("bipia", row, text, response=str(row["ideal"]), needs=BENIGN)


def cyberseceval_injection(row: Row) -> Iterator[Example]:
    """User turns that attack a system prompt, all positive."""
    yield example(
        "cyberseceval_injection", row, row["user_input"], needs={"injection": 1.0}, group=row["injection_variant"]
    )
