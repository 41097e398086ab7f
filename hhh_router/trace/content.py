"""What a deployment that keeps texts keeps of one exchange: bounded, with secrets replaced before anything is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hhh_router.trace.build import canonical_turn
from hhh_router.trace.redact import Redactor
from hhh_router.types import Message

MAX_CONTENT_CHARS = 65_536
"""Of a request's turns together, and as many of its answer."""
MAX_CONTENT_BYTES = 600_000
"""As JSON; what takes more is cut further."""
_MARGIN = 4096
"""Characters that are searched beyond a cut and then dropped: half a secret looks like none."""


def kept_content(
    messages: Sequence[Message], response: str | None, *, redactor: Redactor, most: int = MAX_CONTENT_CHARS
) -> dict[str, Any]:
    """``{"messages": …, "response": …}`` as records keep it.

    Turns are those of `canonical_request`. Where there are too many, the latest are kept. ``cut`` says how many
    characters of either are missing; it is not there where nothing is.

    Args:
        messages: The conversation.
        response: What answered it; None or empty where nothing did.
        redactor: Replaces secrets.
        most: Characters of either.

    >>> kept_content([Message(role="user", content="Hi")], "Hello", redactor=Redactor())
    {'messages': [{'role': 'user', 'content': 'Hi'}], 'response': 'Hello'}
    """
    turns: list[dict[str, Any]] = []
    left, missing = most, 0
    for message in reversed(messages):
        text, cut = _shortened(message.content, left, redactor)
        left, missing = max(0, left - len(text)), missing + cut
        if text or not cut:
            turns.append(canonical_turn(replace(message, content=text)))
    answer, cut_answer = (None, 0) if not response else _shortened(response, most, redactor)
    content: dict[str, Any] = {"messages": turns[::-1], "response": answer}
    if missing or cut_answer:
        content["cut"] = {"messages": missing, "response": cut_answer}
    if len(json.dumps(content)) > MAX_CONTENT_BYTES and most > 1:  # what is not ASCII takes up to 12 bytes a character
        return kept_content(messages, response, redactor=redactor, most=most // 2)
    return content


def _shortened(text: str, most: int, redactor: Redactor) -> tuple[str, int]:
    """A text without its secrets, and how many of its characters are missing at its end."""
    if len(text) <= most:
        return redactor.text(text), 0
    if most == 0:
        return "", len(text)
    searched = text[: most + _MARGIN]
    found = redactor.text(searched)
    end = len(found) if searched == text else len(found) - _MARGIN
    return found[: max(0, min(most, end))], len(text) - most
