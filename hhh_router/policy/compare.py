"""Two policies side by side, and one as a picture."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hhh_router.policy.rules import Rule
from hhh_router.policy.schema import Policy, as_document

_WIDE = 60  # characters of a node's text


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference."""

    path: str
    """Such as ``checkpoints.input[0]``; of an item in a list, where it stands in the first policy, or in the second
    where only that has it."""
    before: Any
    """None where it was not there."""
    after: Any
    """None where it is no longer there."""

    def __str__(self) -> str:
        if self.before is None:
            return f"+ {self.path}: {_text(self.after)}"
        if self.after is None:
            return f"- {self.path}: {_text(self.before)}"
        return f"~ {self.path}: {_text(self.before)} → {_text(self.after)}"


def changes(one: Policy, other: Policy) -> list[Change]:
    """What differs, defaults written out and ``extends`` applied; rules are told apart by their content, not place."""
    return list(_changes("", as_document(one), as_document(other)))


def _changes(path: str, one: Any, other: Any) -> Iterator[Change]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys((*one, *other)):
            yield from _changes(f"{path}.{key}" if path else key, one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list):
        yield from _list_changes(path, one, other)
    elif one != other:
        yield Change(path=path, before=one, after=other)


def _list_changes(path: str, one: Sequence[Any], other: Sequence[Any]) -> Iterator[Change]:
    before, after = ([json.dumps(item, sort_keys=True) for item in items] for items in (one, other))
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        paired = min(i_end - i, j_end - j)
        for k in range(paired):
            yield from _changes(f"{path}[{i + k}]", one[i + k], other[j + k])
        for k in range(i + paired, i_end):
            yield Change(path=f"{path}[{k}]", before=one[k], after=None)
        for k in range(j + paired, j_end):
            yield Change(path=f"{path}[{k}]", before=None, after=other[k])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def graph(policy: Policy) -> str:
    """The policy's checkpoints as a Mermaid flowchart: rules from top to bottom, the first that matches decides."""
    lines = ["flowchart TD", f'  title["{policy.name}@{policy.version} ({policy.hash[:8]})"]']
    for c, (checkpoint, rules) in enumerate(policy.checkpoints.items()):
        lines += [f"  subgraph {checkpoint}", *_ladder(f"c{c}", rules), "  end", f"  title --> c{c}r0"]
    for o, overlay in enumerate(policy.overlays):
        how = "first" if overlay.may_loosen else "beside, the stricter holds"
        names = _node(", ".join(overlay.tenants))
        for checkpoint, rules in overlay.checkpoints.items():
            key = f"o{o}{checkpoint}"
            lines += [f'  subgraph {key}["{checkpoint} for {names}: {how}"]', *_ladder(key, rules), "  end"]
            lines.append(f"  title --> {key}r0")
    return "\n".join(lines) + "\n"


def _ladder(key: str, rules: Sequence[Rule]) -> Iterator[str]:
    for i, rule in enumerate(rules):
        asked = _node(" and ".join(map(str, rule.when)) or "otherwise")
        more = ", shadow" if rule.shadow else ""
        more += f", {rule.rollout:g} %" if rule.rollout is not None else ""
        yield f'    {key}r{i}{{"{asked}"}} -->|yes| {key}a{i}["{rule.then}{more}"]'
        if i + 1 < len(rules):
            yield f"    {key}r{i} -->|no| {key}r{i + 1}"


def _node(text: str) -> str:
    short = text if len(text) <= _WIDE else text[: _WIDE - 1] + "…"
    return short.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
