"""What the readers share: the labels that recur, and how a row becomes an `Example`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hhh_router.data.examples import Example, ask
from hhh_router.types import Message

Row = Mapping[str, Any]

BENIGN = {"helpful": 1.0, "harmless": 0.0, "honest": 0.0, "injection": 0.0}
"""A legitimate task with nothing at stake."""
HARMFUL = {"helpful": 0.0, "harmless": 1.0, "honest": 0.0, "injection": 0.0}
"""A plain harmful request."""
MISCONCEPTION = {"helpful": 1.0, "harmless": 0.0, "honest": 1.0, "injection": 0.0}
"""A legitimate question that only an honest answer serves."""
GOOD = {"unsafe": 0.0, "untruthful": 0.0, "unhelpful": 0.0}
"""A reply without fault."""

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ")


def example(source: str, row: Row, prompt: str | tuple[Message, ...], **fields: Any) -> Example:
    """An `Example` with the row's split; ``prompt`` is one user turn or a conversation."""
    messages = ask(prompt) if isinstance(prompt, str) else prompt
    return Example(source=source, split=row["split"], messages=messages, **fields)


def dialogue(text: str) -> tuple[Message, ...]:
    """The turns of a ``Human: …  Assistant: …`` transcript."""
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(role=roles[who], content=said.strip())
        for who, said in zip(parts[::2], parts[1::2], strict=True)
        if said.strip()
    )


def listed(value: Any) -> list[str]:
    """A list, or a string of entries parted by semicolons, as a list."""
    return value if isinstance(value, list) else [v.strip() for v in str(value).split(";") if v.strip()]
