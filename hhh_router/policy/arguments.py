"""Where in a tool's arguments a condition looks: a closed part of JSONPath (RFC 9535).

``tool.arguments`` stands for ``$``. What follows are names (``.amount``), positions (``[0]``), all members (``[*]`` or
``.*``) and names at any depth (``..path``). No filters, slices or functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

ROOT = "tool.arguments"
MAX_FOUND = 10_000
"""Values a path may select; where there are more, nothing is concluded, and ``on_error`` decides."""

_PART = re.compile(r"(\.\.)([A-Za-z_][A-Za-z0-9_-]*)|\.([A-Za-z_][A-Za-z0-9_-]*)|(\.\*|\[\*\])|\[(0|[1-9][0-9]{0,5})\]")

Part = tuple[str, Any]
"""(``name``, text), (``deep``, text), (``all``, None) or (``item``, position)."""


@lru_cache(maxsize=4096)
def parse_path(condition: str) -> tuple[Part, ...] | None:
    """The parts of a condition's name after ``tool.arguments``; None where it is no such path.

    >>> parse_path("tool.arguments.to[*]..domain")
    (('name', 'to'), ('all', None), ('deep', 'domain'))
    >>> parse_path("tool.arguments[?@.a]") is None
    True
    """
    if not condition.startswith(ROOT) or condition == ROOT:
        return None
    at, parts = len(ROOT), []
    while at < len(condition):
        match = _PART.match(condition, at)
        if match is None:
            return None
        if match[1]:
            parts.append(("deep", match[2]))
        elif match[3]:
            parts.append(("name", match[3]))
        elif match[4]:
            parts.append(("all", None))
        else:
            parts.append(("item", int(match[5])))
        at = match.end()
    return tuple(parts)


def select(value: Any, path: Sequence[Part]) -> tuple[Any, ...] | None:
    """Every value that a path leads to, in order; None where there are more than ``MAX_FOUND``.

    >>> select({"to": [{"domain": "a.org"}, {"domain": "b.org"}]}, parse_path("tool.arguments.to[*].domain"))
    ('a.org', 'b.org')
    """
    found = [value]
    for kind, name in path:
        following: list[Any] = []
        for one in found:
            for inner in _step(one, kind, name):
                following.append(inner)
                if len(following) > MAX_FOUND:
                    return None
        found = following
    return tuple(found)


def _step(value: Any, kind: str, name: Any) -> Iterator[Any]:
    if kind == "name":
        if isinstance(value, Mapping) and name in value:
            yield value[name]
    elif kind == "item":
        if isinstance(value, list | tuple) and name < len(value):
            yield value[name]
    elif kind == "all":
        yield from _members(value)
    else:
        waiting = [value]
        while waiting:  # no recursion: how deep the arguments go is up to whoever writes them
            one = waiting.pop()
            if isinstance(one, Mapping) and name in one:
                yield one[name]
            waiting.extend(reversed(list(_members(one))))


def _members(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
