"""What stands in a policy file beside its rules: its examples, and, as `BudgetValues` reads them, budget and lock."""

from __future__ import annotations

import re
from typing import Any

from hhh_router.policy.check_budget import BudgetValues
from hhh_router.policy.schema import ACTIONS, MAX_EXAMPLE, MAX_EXAMPLES, Example
from hhh_router.policy.tree import Listing, Node, Scalar, Table, show
from hhh_router.policy.values import did_you_mean, either

_EXAMPLE_KEYS = ("prompt", "response", "tool", "tenant", "expect")
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,2})?")


class ExtraValues(BudgetValues):
    """Reads what decides nothing by itself."""

    def examples(self, node: Node | None) -> tuple[Example, ...]:
        """Requests with what is expected of them."""
        items = self.items(node, "examples", "{prompt: …, expect: …}")
        if node is not None and len(items) > MAX_EXAMPLES:
            self.wrong(node.place, "examples", f"{len(items)} examples; at most {MAX_EXAMPLES} are meant")
            return ()
        return tuple(e for i, item in enumerate(items) if (e := self._example(item, f"examples[{i}]")) is not None)

    def _example(self, node: Node, path: str) -> Example | None:
        count = len(self.mistakes)
        entries = self.table(node, path, _EXAMPLE_KEYS, required=("expect",))
        if entries is None:
            return None
        texts = {k: self.text(entries.get(k), f"{path}.{k}", MAX_EXAMPLE) for k in ("prompt", "response", "tenant")}
        tool = self.table(entries.get("tool"), f"{path}.tool", ("name", "arguments"), required=("name",)) or {}
        name = self.text(tool.get("name"), f"{path}.tool.name", 200)
        if len({"tool", "prompt", "response"} & set(entries)) == 0:
            self.wrong(node.place, path, "asks nothing; give it a prompt, a response or a tool")
        if "tool" in entries and "response" in entries:
            self.wrong(node.place, path, "has a tool and a response; write two examples")
        checkpoint = "tool_call" if "tool" in entries else "output" if "response" in entries else "input"
        expect = self._expected(entries.get("expect"), f"{path}.expect", checkpoint)
        if len(self.mistakes) > count:
            return None
        arguments = plain(tool["arguments"]) if "arguments" in tool else None
        return Example(**texts, tool=name, arguments=arguments, expect=expect, line=node.place.line)

    def _expected(self, node: Node | None, path: str, checkpoint: str) -> tuple[str, ...]:
        words = ("pass", "stop", *map(str, ACTIONS[checkpoint]))
        items = () if node is None else node.items if isinstance(node, Listing) else (node,)
        found = []
        for item in items:
            text = item.text if isinstance(item, Scalar) else None
            if text in words:
                found.append(str(text))
            else:
                hint = did_you_mean(text, words)
                self.wrong(
                    item.place, path, f"{show(item)} cannot be expected at {checkpoint}{hint}; use {either(words)}"
                )
        if node is not None and not items:
            self.wrong(node.place, path, f"expects nothing; use {either(words)}")
        return tuple(dict.fromkeys(found))


def plain(node: Node) -> Any:
    """A node as plain JSON data.

    >>> from hhh_router.policy.tree import read_tree
    >>> plain(read_tree(b"{a: [1, 2.5, yes, 'yes', null, true]}", "p", []))
    {'a': [1, 2.5, 'yes', 'yes', None, True]}
    """
    if isinstance(node, Table):
        return {key: plain(value) for key, value in node.entries.items()}
    if isinstance(node, Listing):
        return [plain(item) for item in node.items]
    if not node.is_plain:
        return node.text
    if node.text.lower() in ("true", "false"):
        return node.text.lower() == "true"
    if node.text in ("", "~", "null"):
        return None
    if _NUMBER.fullmatch(node.text):
        return float(node.text) if set(".eE") & set(node.text) else int(node.text)
    return node.text
