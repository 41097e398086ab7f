"""Where in a ``proxy.yaml`` something stands, for messages about it."""

from __future__ import annotations

from typing import Any

import yaml

from hhh_router.policy.tree import Listing, Node, Place, Table, join


def plain(node: Node) -> Any:
    """A part of the file as Python has it."""
    if isinstance(node, Table):
        return {key: plain(inner) for key, inner in node.entries.items()}
    if isinstance(node, Listing):
        return [plain(item) for item in node.items]
    return node.text if node.holds_text else yaml.safe_load(node.text)


def within(root: Node, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The part of a location that stands in the file; pydantic names branches of unions too."""
    found: list[str | int] = []
    node = root
    for step in loc:
        if isinstance(node, Table) and step in node.entries:
            node = node.entries[str(step)]
        elif isinstance(node, Listing) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            continue
        found.append(step)
    return tuple(found)


def node_at(root: Node, loc: tuple[str | int, ...]) -> Node:
    """What stands at a location; see `within`."""
    node = root
    for step in loc:
        node = node.entries[str(step)] if isinstance(node, Table) else node.items[int(step)]  # type: ignore[union-attr]
    return node


def place_of(root: Node, loc: tuple[str | int, ...]) -> Place:
    """The line of a location, or of the nearest thing around it."""
    node, place = root, root.place
    for step in loc:
        if isinstance(node, Table) and step in node.entries:
            place = node.keys[str(step)]
            node = node.entries[str(step)]
        elif isinstance(node, Listing) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
            place = node.place
        else:
            break
    return place


def path_of(loc: tuple[str | int, ...]) -> str:
    """A location as messages name it.

    >>> path_of(("routes", 0, "to"))
    'routes[0].to'
    """
    path = ""
    for step in loc:
        path = f"{path}[{step}]" if isinstance(step, int) else join(path, str(step))
    return path
