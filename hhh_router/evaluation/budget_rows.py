"""Labelled rows that a policy's limits are fitted on: those that a bundle keeps, or a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hhh_router.calibration.kept import Kept
from hhh_router.data.examples import Example
from hhh_router.evaluation.systems import Readings
from hhh_router.pipeline.situation import answered_situation, asked_situation
from hhh_router.types import Caller, ReadRequest, Scores, Situation

NEED = "harmless"
"""The need that a prompt's label is about."""
FAULT = "unsafe"
"""The fault that a reply's label is about."""

KEPT_KNOWN = frozenset({"length.tokens"})
"""What is known of the rows that a bundle keeps, beside their readings."""
OWN_KNOWN = KEPT_KNOWN | {"role", "text", "length.characters", "conversation.turns"}
"""What is known of prompts and replies in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """One labelled prompt, or prompt with its reply."""

    scores: Scores
    harmful: bool
    """Of a reply: that it is unsafe."""
    situation: Situation
    """What surrounds it; ``Situation()`` where nothing is known."""
    group: str = ""
    """Its data set, or the group that its row names."""


def kept_rows(kept: Kept) -> list[FitRow]:
    """The prompts that a bundle keeps, as far as their harm is known; nothing but their scores surrounds them."""
    return [
        FitRow(scores=row.scores, harmful=bool(row.needs[NEED]), situation=Situation(), group=row.source)
        for row in kept.rows
        if row.scores.mode == "prompt" and NEED in row.needs
    ]


def kept_replies(kept: Kept) -> list[FitRow]:
    """The replies that a bundle keeps, read with their prompts, as far as their safety is known."""
    return [
        FitRow(scores=row.scores, harmful=bool(row.outcomes[FAULT]), situation=Situation(), group=row.source)
        for row in kept.rows
        if row.scores.mode == "both" and FAULT in row.outcomes
    ]


def own_rows(examples: Sequence[Example], readings: Readings) -> list[FitRow]:
    """A user's labelled prompts, read by the bundle; what its template does not take is left out."""
    asked = [e for e in examples if NEED in e.needs]
    scores = readings.scores([ReadRequest(messages=e.messages) for e in asked])
    return [
        FitRow(
            scores=found,
            harmful=bool(example.needs[NEED]),
            situation=asked_situation(example.messages, Caller(), None),
            group=example.group,
        )
        for example, found in zip(asked, scores, strict=True)
        if found is not None
    ]


def own_replies(examples: Sequence[Example], readings: Readings) -> list[FitRow]:
    """A user's labelled replies, read with their prompts; what the bundle's template does not take is left out."""
    answered = [e for e in examples if FAULT in e.outcomes and e.response is not None]
    scores = readings.scores([e.read() for e in answered])
    return [
        FitRow(
            scores=found,
            harmful=bool(example.outcomes[FAULT]),
            situation=answered_situation(asked_situation(example.messages, Caller(), None), example.response),
            group=example.group,
        )
        for example, found in zip(answered, scores, strict=True)
        if found is not None
    ]
