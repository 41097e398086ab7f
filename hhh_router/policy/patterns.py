"""What a text is compared with: regular expressions whose work is bounded, and globs.

Python's matcher tries every way a pattern can go, so a careless pattern lets one message hold a server up for minutes.
Here each pattern's ways are counted when the policy is loaded, and one that has too many is refused.
"""

from __future__ import annotations

import importlib
import re
import warnings
from functools import lru_cache
from typing import Any

MAX_PATTERN = 500
MAX_WAYS = 500
"""Ways a pattern may go from one position of a text; the matcher's work is at most this times the text's length."""
MAX_TEXT = 100_000
"""Characters of a text that patterns are tried on. A longer one counts as not measured, and ``on_error`` decides."""
MAX_GLOB = 200

_parser: Any = importlib.import_module("re._parser")  # the standard library's own parser; it has no public name
_LEAVES = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "CATEGORY", "RANGE", "NEGATE"})
_GLOB = re.compile(r"[^\s\[\],<>=\x00-\x1f](?:[^\[\],\x00-\x1f]*[^\s\[\],\x00-\x1f])?")


class BadPattern(ValueError):
    """A pattern that cannot be used; the text says why and what to write."""


@lru_cache(maxsize=4096)
def compile_pattern(text: str) -> re.Pattern[str]:
    r"""A pattern that is matched without regard to case, anywhere in a text.

    >>> bool(compile_pattern(r"\bcredit\s{1,3}card\b").search("my Credit  Card"))
    True

    Raises:
        BadPattern: It is no regular expression, or its work has no bound.
    """
    if not text or len(text) > MAX_PATTERN:
        raise BadPattern(f"has {len(text)} characters; 1 to {MAX_PATTERN} are meant")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a pattern whose meaning Python wants to change says so now
            parsed = _parser.parse(text, re.IGNORECASE)
            ways = _ways(parsed)
            compiled = re.compile(text, re.IGNORECASE)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        raise BadPattern(f"is no regular expression ({error})") from error
    if ways > MAX_WAYS:
        raise BadPattern(
            f"can go {ways:,} ways from one position, at most {MAX_WAYS:,} are meant; lower the limits of its repeats"
        )
    return compiled


def _ways(parsed: Any) -> int:
    """How many ways the matcher can go through a parsed pattern; counting stops above what is allowed."""
    total = 1
    for op, argument in parsed:
        total = min(total * int(_ways_of(str(op), argument)), 10**9)
    return total


def _ways_of(op: str, argument: Any) -> int:
    if op in _LEAVES:
        return 1
    if op == "BRANCH":
        return sum(int(_ways(branch)) for branch in argument[1])
    if op == "SUBPATTERN":
        return _ways(argument[3])
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, inner = argument
        if most == _parser.MAXREPEAT:
            raise BadPattern("has a repeat without an end; write a limit, such as {1,20} in place of + or *")
        most, each = int(most), _ways(inner)
        if each == 1:
            return most - int(least) + 1
        return min(sum(int(min(each**i, 10**9)) for i in range(int(least), min(most, 64) + 1)), 10**9)
    raise BadPattern("refers back, looks around or sets flags; use literals, classes, groups, | and limited repeats")


@lru_cache(maxsize=4096)
def compile_glob(text: str) -> re.Pattern[str]:
    """A name in which ``*`` stands for any characters and ``?`` for one.

    >>> bool(compile_glob("delete_*").fullmatch("delete_user")), bool(compile_glob("a?c").fullmatch("abbc"))
    (True, False)

    Raises:
        BadPattern: It is empty, too long, or holds what separates globs from each other.
    """
    if len(text) > MAX_GLOB or not _GLOB.fullmatch(text):
        raise BadPattern(
            f"is no name; use 1 to {MAX_GLOB} characters, no comparison, without brackets, commas and line breaks"
        )
    # an atomic group takes the first place where the next part fits: one way to go, however many stars
    first, *rest = [_literal(part) for part in re.split(r"\*+", text)]
    if not rest:
        return re.compile(first, re.DOTALL)
    *middle, last = rest
    return re.compile(first + "".join(f"(?>.*?{part})" for part in middle if part) + f".*{last}", re.DOTALL)


def _literal(text: str) -> str:
    return "".join("." if c == "?" else re.escape(c) for c in text)


def covers(wide: str, narrow: str) -> bool:
    """Whether whatever fits ``narrow`` surely fits ``wide``; False where that cannot be told easily.

    >>> covers("delete_*", "delete_user"), covers("delete_user", "delete_*"), covers("*", "a*")
    (True, False, True)
    """
    if wide == narrow or set(wide) == {"*"}:
        return True
    return not set("*?") & set(narrow) and compile_glob(wide).fullmatch(narrow) is not None
