"""What the router's weights say in words, for upstreams that no mixture can be applied to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hhh_router.types import Weights

LEAST = 0.25
"""Share from which on a behaviour is asked for."""
_WORDS = {
    "harmless": "Avoid what could harm people; where part of the request is harmful, decline that part briefly and "
    "help with the rest.",
    "honest": "Say what you do not know, correct false premises, and do not state as fact what is unsupported.",
    "helpful": "Answer the legitimate task fully and concretely.",
}


def instruction(weights: Weights) -> str | None:
    """An instruction for the behaviours that the weights ask for, the heaviest first; None where none stands out.

    >>> instruction(Weights(1.0, 0.0, 0.0, 0.0)) is None
    True
    >>> instruction(Weights(0.2, 0.1, 0.1, 0.6)).split(",")[0]
    'Say what you do not know'
    """
    asked = sorted((d for d in _WORDS if weights[d] >= LEAST), key=lambda d: -weights[d])
    return " ".join(_WORDS[d] for d in asked) or None


def instructed(wire: str, body: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The request with a further instruction after the app's own; everything else stays.

    >>> instructed("chat", {"messages": [{"role": "user", "content": "Hi"}]}, "Be brief.")["messages"][0]
    {'role': 'system', 'content': 'Be brief.'}
    """
    if wire == "chat":
        rows = list(body.get("messages") or ())
        own = next((i for i, r in enumerate(rows) if r.get("role") not in ("system", "developer")), len(rows))
        role = rows[own - 1]["role"] if own else "system"
        return {**body, "messages": [*rows[:own], {"role": role, "content": text}, *rows[own:]]}
    if wire == "messages":
        system = body.get("system")
        if isinstance(system, list):
            return {**body, "system": [*system, {"type": "text", "text": text}]}
        return {**body, "system": f"{system}\n\n{text}" if system else text}
    if wire == "responses":
        own_words = body.get("instructions")
        return {**body, "instructions": f"{own_words}\n\n{text}" if own_words else text}
    prompt = body.get("prompt")  # completions have no place for instructions but before the text itself
    if isinstance(prompt, list):
        return {**body, "prompt": [f"{text}\n\n{p}" if isinstance(p, str) else p for p in prompt]}
    return {**body, "prompt": f"{text}\n\n{prompt}"} if isinstance(prompt, str) else dict(body)
