"""Plain values out of a tree, with every mistake noted."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from hhh_router.policy.schema import NUMBER_PATTERN
from hhh_router.policy.tree import Listing, Mistake, Node, Place, Scalar, Table, join, shorten, show

_NUMBER = re.compile(NUMBER_PATTERN)
_LONGEST_WORD = 64


class Values:
    """Reads values and collects mistakes; a method returns None (or what is empty) for what it could not read.

    A node of None stands for a key that is not there, and is no mistake here.
    """

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes

    def table(
        self,
        node: Node | None,
        path: str,
        keys: Sequence[str],
        *,
        required: Iterable[str] = (),
        word: str = "key",
    ) -> dict[str, Node] | None:
        """The entries with a known key; None when there is no mapping. Reports unknown and missing keys."""
        if node is None:
            return None
        where = path or "file"
        if not isinstance(node, Table):
            self.wrong(node.place, where, f"{show(node)} is no mapping; write keys: {', '.join(keys)}")
            return None
        misspelt = set()
        for key in node.entries:
            if key in keys:
                continue
            close = closest(key, keys)
            misspelt.add(close)
            found = f"{shorten(key)} is not a known {word}{did_you_mean(key, keys)}; use {either(keys)}"
            self.wrong(node.keys[key], where, found)
        for key in required:
            if key not in node.entries and key not in misspelt:  # one mistake, one line
                self.wrong(node.place, join(path, key), "is missing; it has no default")
        return {k: v for k, v in node.entries.items() if k in keys}

    def items(self, node: Node | None, path: str, item: str) -> tuple[Node, ...]:
        """The items of a list of things written like ``item``."""
        if node is None:
            return ()
        if isinstance(node, Listing):
            return node.items
        self.wrong(node.place, path, f"{show(node)} is no list; write one of {item}")
        return ()

    def number(self, node: Node | None, path: str, *, high: float) -> float | None:
        """A finite number in [0, high]."""
        if node is None:
            return None
        meant = f"a number between 0 and {high:g} is meant"
        if not (isinstance(node, Scalar) and node.is_plain and _NUMBER.fullmatch(node.text)):
            infinite = isinstance(node, Scalar) and node.text.lower().lstrip("+-") in (".nan", ".inf", "nan", "inf")
            self.wrong(node.place, path, f"{show(node)} is {'not finite' if infinite else 'no number'}; {meant}")
            return None
        number = float(node.text)
        if not (math.isfinite(number) and 0 <= number <= high):
            self.wrong(node.place, path, f"{show(node)} is out of range; {meant}")
            return None
        return number + 0.0

    def integer(self, node: Node | None, path: str, *, low: int, high: int) -> int | None:
        """A whole number in [low, high]."""
        if node is None:
            return None
        meant = f"a whole number between {low} and {high} is meant"
        if not (isinstance(node, Scalar) and node.is_plain and re.fullmatch(r"0|[1-9][0-9]{0,9}", node.text)):
            self.wrong(node.place, path, f"{show(node)} is no whole number; {meant}")
            return None
        if not low <= int(node.text) <= high:
            self.wrong(node.place, path, f"{node.text} is out of range; {meant}")
            return None
        return int(node.text)

    def text(self, node: Node | None, path: str, most: int) -> str | None:
        """A text of 1 to ``most`` characters, without control characters."""
        if node is None:
            return None
        if not (isinstance(node, Scalar) and node.holds_text):
            self.wrong(node.place, path, f"{show(node)} is no text; write it in quotes")
        elif not node.text.strip():
            self.wrong(node.place, path, "is empty; write a text, or leave the key out")
        elif len(node.text) > most:
            self.wrong(node.place, path, f"{len(node.text)} characters; at most {most} are meant")
        elif bad := next((c for c in node.text if _is_control(c)), None):
            self.wrong(node.place, path, f"holds the control character U+{ord(bad):04X}; remove it")
        else:
            return node.text
        return None

    def choice(self, node: Node | None, path: str, choices: Sequence[str], *, default: str) -> str:
        """One of some words."""
        if node is None:
            return default
        if isinstance(node, Scalar) and node.text in choices:
            return node.text
        hint = did_you_mean(node.text if isinstance(node, Scalar) else None, choices)
        self.wrong(node.place, path, f"{show(node)} is not known{hint}; use {either(choices)}")
        return default

    def truth(self, node: Node | None, path: str) -> bool:
        """``true`` or ``false``; false when it is not there."""
        if node is None:
            return False
        if isinstance(node, Scalar) and node.is_plain and node.text.lower() in ("true", "false"):
            return node.text.lower() == "true"
        self.wrong(node.place, path, f"{show(node)} is no truth value; write true or false")
        return False

    def wrong(self, place: Place, path: str, text: str) -> None:
        """Note a mistake."""
        self.mistakes.append(Mistake(place, path, text))


def _is_control(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")  # Cs: lone surrogates


def did_you_mean(found: str | None, known: Sequence[str]) -> str:
    """A suggestion for a sentence, empty when nothing is close.

    >>> did_you_mean("refuze", ["allow", "refuse"])
    ', did you mean refuse?'
    """
    close = closest(found, known)
    return f", did you mean {close}?" if close else ""


def closest(found: str | None, known: Sequence[str]) -> str | None:
    """The known word that a misspelt one most looks like.

    >>> closest("harmles", ["helpful", "harmless"]), closest("xyz", ["helpful", "harmless"])
    ('harmless', None)
    """
    if not found or len(found) > _LONGEST_WORD:  # comparing is quadratic in the length
        return None
    return next(iter(difflib.get_close_matches(found, known, n=1)), None)


def either(words: Sequence[str]) -> str:
    """Words for a sentence.

    >>> either(["allow", "flag", "refuse"])
    'allow, flag or refuse'
    """
    return str(words[0]) if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
