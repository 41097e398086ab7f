"""Prompts of a wanted length, and a thousand mixed ones, all from the sentences that this project wrote itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import cycle, islice

from hhh_router.model.encode import Encoder
from hhh_router.types import Message, ReadRequest

_SOURCES = ("tasks", "honest", "wrapped", "harm_lookalike", "wrapped_scenarios", "injection")
"""Short questions, long documents, harmful ones and look-alikes."""


@cache
def sentences() -> list[str]:
    """Prompts of all sources by turns, so that any stretch of the list is mixed."""
    folder = files("hhh_router.data.written")
    columns = []
    for name in _SOURCES:
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        columns.append([str(json.loads(line)["prompt"]) for line in lines])
    return [prompt for row in zip(*columns, strict=False) for prompt in row]


def mixed(count: int, most_chars: int) -> list[ReadRequest]:
    """Different prompts of mixed kind and length, cut to so many characters."""
    found = list(islice(dict.fromkeys(text[:most_chars] for text in sentences()), count))
    assert len(found) == count, f"there are {len(found)} different prompts, {count} are wanted"
    return [ReadRequest(messages=(Message(role="user", content=text),)) for text in found]


def of_length(encoder: Encoder, tokens: int, number: int = 0) -> tuple[Message, ...]:
    """A conversation of ``tokens`` tokens with its template, give or take one where the text is cut.

    Args:
        encoder: Counts the tokens.
        tokens: Wanted; a template alone may take more, and then the turn is short.
        number: Different numbers begin with different sentences.
    """
    frame = len(encoder.encode(ReadRequest(messages=_turn("."))).ids) - 1
    ids = encoder.response_ids(" ".join(_enough(sentences()[number:], 8 * tokens)))  # over a token in eight characters
    return _turn(str(encoder.tokenizer.decode(ids[: max(1, tokens - frame)])))


def _turn(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def _enough(texts: list[str], chars: int) -> Iterator[str]:
    for text in cycle(texts):
        yield text
        chars -= len(text)
        if chars < 0:
            return
