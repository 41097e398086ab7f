"""YAML text → a tree of plain data in which every node knows its file and line.

No YAML feature beyond plain data gets through: no anchors, aliases, tags, merge keys, duplicate keys, nor a second
document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

MAX_BYTES = 256 * 1024  # a policy of 50 rules has about 10 kB
MAX_DEPTH = 16  # a rule's condition stands at depth 5

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands."""

    file: str
    line: int
    """Counts from 1."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value, not yet interpreted."""

    place: Place
    text: str
    is_plain: bool
    """True when it is not quoted."""
    is_text: bool
    """True when YAML reads it as a string although it is not quoted."""

    @property
    def holds_text(self) -> bool:
        """True when it is a string, not a number, a truth value, a date or nothing."""
        return self.is_text or not self.is_plain


@dataclass(frozen=True, slots=True)
class Listing:
    """A list."""

    place: Place
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping with text keys."""

    place: Place
    entries: dict[str, Node]
    keys: dict[str, Place]
    """Where each key stands."""


Node = Scalar | Listing | Table


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong with a policy file."""

    place: Place
    path: str
    """Where in the document, such as ``checkpoints.input[2].then``."""
    text: str
    """What was found; what was meant."""

    def __str__(self) -> str:
        return f"{self.place.file}:{self.place.line}  {self.path}: {self.text}"


def show(node: Node) -> str:
    """A node as an error message shows it, on one line."""
    if isinstance(node, Listing):
        return "a list"
    if isinstance(node, Table):
        return "a mapping"
    if node.is_plain and node.text in ("", "~", "null", "Null", "NULL"):
        return "nothing"
    return shorten(node.text) if node.holds_text else shorten(node.text)[1:-1]


def shorten(text: str) -> str:
    """Quoted, escaped and cut to one short line.

    >>> shorten("a" * 70) == repr("a" * 59 + "…")
    True
    """
    return ascii_safe(text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…")


def ascii_safe(text: str) -> str:
    """``repr``, with lone surrogates escaped too, so that it can always be printed."""
    return repr(text).encode("utf-8", "backslashreplace").decode("utf-8")


def join(path: str, key: str) -> str:
    """The path of a key below another path.

    >>> join("bounds", "base"), join("", "name")
    ('bounds.base', 'name')
    """
    return f"{path}.{key}" if path else key


def read_tree(raw: bytes, file: str, mistakes: list[Mistake]) -> Node | None:
    """Parse one policy file.

    Args:
        raw: The file's bytes.
        file: Its name in messages.
        mistakes: Gets everything that is no plain data. Nothing is raised.

    Returns:
        The tree, without the parts that are wrong; None when the text is no YAML at all.
    """
    if len(raw) > MAX_BYTES:
        found = f"{len(raw):,} bytes; a policy has at most {MAX_BYTES:,}"
        mistakes.append(Mistake(Place(file, 1), "file", found))
        return None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        mistakes.append(Mistake(Place(file, line), "file", found))
        return None
    return _parse(text, file, mistakes)


def _parse(text: str, file: str, mistakes: list[Mistake]) -> Node | None:
    def wrong(line: int, what: str) -> None:
        mistakes.append(Mistake(Place(file, line), "file", what))

    loader: _PlainLoader | None = None
    try:
        loader = _PlainLoader(text, file, mistakes)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        tabs = [i for i, line in enumerate(text.splitlines(), 1) if "\t" in line[: len(line) - len(line.lstrip())]]
        for i in tabs:
            wrong(i, "a tab in the indentation; indent with spaces")
        if mark is None or mark.line + 1 not in tabs:
            wrong(mark.line + 1 if mark else 1, _syntax(error))
        return None
    except yaml.reader.ReaderError as error:
        found = f"character U+{ord(text[error.position]):04X}"
        wrong(text.count("\n", 0, error.position) + 1, f"{found} is not allowed in YAML; remove it")
        return None
    except (ValueError, OverflowError):  # an escape such as "\U00110000" is no character, PyYAML lets chr() fail
        wrong(loader.line + 1 if loader else 1, "an escape that is no character; write the character itself")
        return None
    if root is None:
        wrong(1, "the file is empty; a policy starts with version, name, weights")
        return None
    return _convert(root, file, "", mistakes)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    parts = [" ".join(part.split()) for part in (error.context, error.problem) if part]
    # '>' begins a block of text in YAML, so this is what an unquoted ">= 0.9" looks like to a parser
    meant = "put comparisons in quotes" if "while scanning a block scalar" in parts else "correct the syntax"
    return f"no YAML: {ascii_safe(', '.join(parts))[1:-1]}; {meant}"


class _PlainLoader(yaml.SafeLoader):
    """Composes nodes, and reports whatever is more than plain data."""

    def __init__(self, text: str, file: str, mistakes: list[Mistake]) -> None:
        super().__init__(text)
        self._file = file
        self._mistakes = mistakes
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self._wrong(mark.line, f"alias *{event.anchor}; write the value out, or use extends")
            return yaml.ScalarNode("tag:yaml.org,2002:null", "", mark)
        if event.anchor is not None:
            self._wrong(mark.line, f"anchor &{event.anchor}; write values out, policies have no anchors")
            event.anchor = None
        if event.tag is not None:
            self._wrong(mark.line, f"tag {shorten(event.tag)}; write the plain value")
            event.tag = None
        if self._depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def _wrong(self, line: int, what: str) -> None:
        self._mistakes.append(Mistake(Place(self._file, line + 1), "file", what))


def _convert(node: yaml.Node, file: str, path: str, mistakes: list[Mistake]) -> Node:
    place = Place(file, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        items = tuple(_convert(item, file, f"{path}[{i}]", mistakes) for i, item in enumerate(node.value))
        return Listing(place, items)
    if isinstance(node, yaml.ScalarNode):
        return Scalar(place, node.value, node.style is None, node.tag == "tag:yaml.org,2002:str")
    table = Table(place, {}, {})
    for key_node, value_node in node.value:
        key_place = Place(file, key_node.start_mark.line + 1)
        where = path or "file"
        if not isinstance(key_node, yaml.ScalarNode):
            mistakes.append(Mistake(key_place, where, "a key that is a list or mapping; keys are words"))
            continue
        key = key_node.value
        shown = shorten(key)
        if key_node.tag == "tag:yaml.org,2002:merge":
            mistakes.append(Mistake(key_place, where, "merge key '<<'; write the values out, or use extends"))
        elif key in table.entries:
            first = table.keys[key].line
            mistakes.append(Mistake(key_place, where, f"{shown} is here twice (first in line {first}); keep one"))
        else:
            table.entries[key] = _convert(value_node, file, join(path, key if key.isprintable() else shown), mistakes)
            table.keys[key] = key_place
    return table


def merge(parent: Node, child: Node) -> Node:
    """A child laid over what it extends: mappings key by key, all else replaced whole.

    Every node keeps the place it came from, so that a mistake is reported in the file that has it.
    """
    if not (isinstance(parent, Table) and isinstance(child, Table)):
        return child
    entries = dict(parent.entries)
    for key, node in child.entries.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    return Table(child.place, entries, parent.keys | child.keys)
