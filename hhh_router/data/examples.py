"""One labelled text, whatever data set it came from, and its split by content hash."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hhh_router.types import Message, ReadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt, perhaps with a response, and what is known about them."""

    source: str
    """Data set, or ``made`` for prompts this project writes itself."""
    split: str
    """``train``, ``calibrate`` or ``eval``, as the data set says."""
    messages: tuple[Message, ...]
    response: str | None = None
    needs: Mapping[str, float] = field(default_factory=dict)
    """Need → 1 when the prompt needs it, 0 when not; a need that is not named is unknown."""
    outcomes: Mapping[str, float] = field(default_factory=dict)
    """Outcome → 1 when the response has that fault, 0 when not; unknown when not named."""
    weight: float = 1.0
    """How far the labels are trusted, in (0, 1]."""
    answer_side: bool = False
    """True where only the response may be learned from or calibrated on: the prompt may recur among eval prompts."""
    group: str = ""
    """Subgroup for reports, such as a prompt type."""

    @property
    def prompt(self) -> str:
        """The last turn's text."""
        return self.messages[-1].content

    def read(self) -> ReadRequest:
        """The text as a reader takes it."""
        return ReadRequest(messages=self.messages, response=self.response)


def ask(text: str) -> tuple[Message, ...]:
    """A conversation of one user turn."""
    return (Message(role="user", content=text),)


def normalise(text: str) -> str:
    """The form in which two prompts count as the same: NFKC, lower case, single spaces.

    >>> normalise("  What's  UP? ")
    "what's up?"
    """
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def prompt_hash(example: Example) -> str:
    """sha256 of the normalised last turn: what splits are kept apart by."""
    return hashlib.sha256(normalise(example.prompt).encode()).hexdigest()


def data_hash(examples: Iterable[Example]) -> str:
    """sha256 over every row's text and labels, in order: names the data a figure came from."""
    digest = hashlib.sha256()
    for e in examples:
        turns = "\x1e".join(f"{m.role}\x1f{m.content}" for m in e.messages)
        labels = sorted(e.needs.items()) + sorted(e.outcomes.items())
        digest.update(f"{e.source}\x1d{turns}\x1d{e.response}\x1d{labels}\x1c".encode("utf-8", "replace"))
    return digest.hexdigest()


def drop_overlap(examples: Iterable[Example], seen: Iterable[str]) -> list[Example]:
    """The examples whose prompt hash is not in ``seen``."""
    known = set(seen)
    return [e for e in examples if prompt_hash(e) not in known]
