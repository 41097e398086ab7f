"""The language of a text, for policies that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from hhh_router.errors import MissingExtra
from hhh_router.policy import Policy
from hhh_router.policy.doors import facts_asked

UNKNOWN = "und"
"""ISO 639's code where nothing can be said, as of a text of one word."""

MOST_CHARACTERS = 1000
"""That are looked at, from the beginning: about a millisecond's work."""

_LEAST_CONFIDENCE = 0.2  # as its authors show it: at 0.5 a fifth of short sentences would not be told any more
_CLOSER: Mapping[str, str] = {"wuu": "zh", "yue": "zh", "ary": "ar", "arz": "ar", "hbo": "he"}
"""Varieties that the model tells apart, as the language whose policy they are meant by."""


def tell_language(text: str) -> str | None:
    """Code of the language that the beginning of a text is in; None where the extra is not installed.

    ISO 639-1 where the language has such a code, else 639-3; ``und`` where it cannot be told, ``zxx`` for what is no
    language, such as numbers or code.
    """
    try:
        identifier = _identifier()
    except ImportError:
        return None
    found = str(identifier.classify(text[:MOST_CHARACTERS])[0])
    return _CLOSER.get(found, found)


def ready_language(policy: Policy) -> None:
    """Load what tells languages, where a policy asks for them.

    Raises:
        MissingExtra: It is not installed.
    """
    if "language" not in facts_asked(policy):
        return
    try:
        _identifier()
    except ImportError as error:
        raise MissingExtra(
            "language", needed_for=f"{policy.source or policy.name}: the condition 'language'"
        ) from error


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=_LEAST_CONFIDENCE)
