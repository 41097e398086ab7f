"""A user's own labelled prompts and replies: one JSON object a line, read strictly and reported row by row.

```
{"prompt": "How do I kill a process?", "labels": {"harmful": false, "helpful": true}}
{"prompt": [{"role": "user", "content": "…"}], "response": "…", "labels": {"unsafe": true}, "group": "billing"}
```
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hhh_router.data.examples import Example, normalise
from hhh_router.errors import DataError
from hhh_router.policy.values import closest, did_you_mean, either
from hhh_router.types import NEED_LABELS, OUTCOMES, Message

MAX_ROWS = 200_000  # about ten times what a recipe trains on: a file past it is most likely the wrong file
MAX_LINE_BYTES = 1_000_000  # several hundred times what a reader takes in; a longer line is no prompt
OUTCOME_LABELS: tuple[str, ...] = OUTCOMES
"""Labels that are about the response."""

SOURCE = "own"  # not the file's name: a renamed file is the same data and keeps its hash
_KEYS = ("prompt", "response", "labels", "group", "language")
_LABELS = (*NEED_LABELS, *OUTCOME_LABELS)
_OPPOSITES: Mapping[str, str] = {
    "harmless": "harmful",
    "unharmful": "harmful",
    "safe": "unsafe",
    "truthful": "untruthful",
}
"""What people write → the label that says the opposite."""
_TURN_KEYS = ("role", "content")
_ROLES = ("system", "user", "assistant", "tool")
_LAST_ROLES = ("user", "tool")
_LISTED = 10  # broken rows that an error names; more would hide the count
_SHOWN = 40  # characters of a found value in a message
_CHUNK_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"  # what spreadsheets put before UTF-8


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnData:
    """What a file held."""

    examples: list[Example]
    """The sound rows, in the file's order."""
    broken: list[str]
    """One entry for each row that was left out: ``file:line``, what was found and what is expected."""


def read_own(
    path: Path, *, skip_broken: bool, split: str = "eval", max_rows: int = MAX_ROWS, labelled: bool = True
) -> OwnData:
    """Read a user's JSON Lines file, plain or gzipped (``.gz``), a line at a time. Blank lines are passed over.

    Args:
        path: Of the file. Keys of a row: ``prompt`` (a text, or turns with ``role`` and ``content``), ``labels`` (at
            least one), and, where wanted, ``response``, ``group``, ``language``.
        skip_broken: Leave broken rows out and report them, instead of failing on them.
        split: Of every example; ``eval`` keeps rows out of training and calibration until the caller says otherwise.
        max_rows: Most rows the file may have, broken ones included.
        labelled: Every row has to have labels; else a row may be without.

    Returns:
        The examples, with source ``own``; their ``group`` is the row's group and language, joined by " · ".

    Raises:
        DataError: The file cannot be read, has no sound row or more than ``max_rows``; a row is broken and
            ``skip_broken`` is false (the first ten are named, and how many there are); or, in either case, two rows
            ask the same and are labelled differently, which no row alone can be blamed for.
    """
    examples: list[Example] = []
    broken: list[str] = []
    seen = _Labelled()
    for number, line in _numbered(path, max_rows):
        try:
            example = _example(line, split, labelled)
        except _BrokenRow as error:
            broken.append(f"{path}:{number}: {error}")
            continue
        seen.add(example, number)
        examples.append(example)
    if broken and not skip_broken:
        raise _listing(f"{path}: {_rows(len(broken))} broken", broken, "repair the rows, or leave them out as broken")
    if seen.contradictions:
        found = [f"{path}:{c}" for c in seen.contradictions]
        raise _listing(f"{path}: {_rows(len(found))} at odds with an earlier one", found, "keep one of the two labels")
    if not examples:
        raise _listing(f"{path}: no sound row among {len(broken)}", broken, "one JSON object a line is expected")
    return OwnData(examples=examples, broken=broken)


class _BrokenRow(Exception):
    """What is wrong with one row."""


class _Labelled:
    """Remembers how each text was labelled, to notice when another row says otherwise."""

    def __init__(self) -> None:
        self.contradictions: list[str] = []
        self._seen: dict[bytes, tuple[int, float]] = {}
        self._last = 0

    def add(self, example: Example, number: int) -> None:
        prompt = [(m.role, normalise(m.content)) for m in example.messages]
        reply = normalise(example.response) if example.response is not None else None
        known = [("needs", name, value, None) for name, value in example.needs.items()]
        known += [("outcomes", name, value, reply) for name, value in example.outcomes.items()]
        for kind, name, value, answer in known:
            key = hashlib.sha256(repr((kind, name, prompt, answer)).encode()).digest()
            line, earlier = self._seen.setdefault(key, (number, value))
            if earlier != value and self._last != number:
                self._last = number  # a row is named once, whatever else of it is at odds
                label = next((k for k, need in NEED_LABELS.items() if (kind, need) == ("needs", name)), name)
                said, before = (json.dumps(bool(v)) for v in (value, earlier))
                self.contradictions.append(
                    f"{number}: labels.{label} is {said}, but {before} for the same in line {line}"
                )


def _listing(head: str, entries: list[str], hint: str) -> DataError:
    shown = [f"  {entry}" for entry in entries[:_LISTED]]
    more = [f"  … and {len(entries) - _LISTED} more"] if len(entries) > _LISTED else []
    return DataError("\n".join([head, *shown, *more]), hint=hint)


def _rows(count: int) -> str:
    return "1 row is" if count == 1 else f"{count} rows are"


def _numbered(path: Path, max_rows: int) -> Iterator[tuple[int, bytes | None]]:
    """Line number and line of every row that is not blank; None in place of one that is too long."""
    rows = number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                if line is not None and not line.strip():
                    continue
                rows += 1
                if rows > max_rows:
                    raise DataError(
                        f"{path}:{number}: more than {max_rows} rows", hint="split the file, or allow more rows"
                    )
                yield number, line
    except (OSError, EOFError, zlib.error) as error:  # EOFError: a gzip file that ends too soon
        place = f" after line {number}" if number else ""
        raise DataError(
            f"{path}: cannot be read{place} ({getattr(error, 'strerror', None) or error})",
            hint="a .jsonl or .jsonl.gz file is expected",
        ) from error


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    # iterating the file would hold a line of any length in memory
    first = True
    while line := file.readline(MAX_LINE_BYTES + len(_BOM + b"\r\n")):
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        if first:
            content = content.removeprefix(_BOM)
            first = False
        ended = line.endswith(b"\n")
        yield content if len(content) <= MAX_LINE_BYTES else None
        while not ended and (rest := file.readline(_CHUNK_BYTES)):
            ended = rest.endswith(b"\n")


def _example(line: bytes | None, split: str, labelled: bool) -> Example:
    row = _object(line)
    wrong: list[str] = []
    for key in row:
        if key not in _KEYS:
            wrong.append(f"{_show(key)} is no key of a row{did_you_mean(key, _KEYS)}; use {either(_KEYS)}")
    messages = _messages(row, wrong)
    response = _text(row, "response", wrong, "the reply")
    needs, outcomes = _labels(row, wrong) if labelled or "labels" in row else ({}, {})
    groups = [g for name in ("group", "language") if (g := _text(row, name, wrong, f"the {name}"))]
    if outcomes and "response" not in row:
        wrong.append(f"labels.{next(iter(outcomes))} is about a reply, but there is no response; add it")
    if wrong:
        raise _BrokenRow("; ".join(wrong))
    return Example(
        source=SOURCE, split=split, messages=messages, response=response, needs=needs, outcomes=outcomes,
        group=" · ".join(groups),
    )  # fmt: skip


def _object(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise _BrokenRow(f"longer than {MAX_LINE_BYTES} bytes; one prompt a line is expected")
    if b"\0" in line:
        raise _BrokenRow(f"a NUL byte at byte {line.index(0)}; text in UTF-8 is expected")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BrokenRow(
            f"byte {error.start} ({line[error.start]:#04x}) is not UTF-8; save the file as UTF-8"
        ) from error
    try:
        row = json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise _BrokenRow("nested too deeply; a JSON object is expected") from error
    except json.JSONDecodeError as error:  # its own text says "line 1", which is not the file's
        raise _BrokenRow(f"not JSON ({error.msg} at character {error.pos}); a JSON object is expected") from error
    except ValueError as error:  # a number of thousands of digits
        raise _BrokenRow(f"not JSON ({error}); a JSON object is expected") from error
    if not isinstance(row, dict):
        raise _BrokenRow(f"{_kind(row)}; a JSON object is expected")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:  # JSON allows it and keeps the last, so a label would change unseen
            raise _BrokenRow(f"the key {_show(key)} stands twice in one object; keep one")
        found[key] = value
    return found


def _messages(row: Mapping[str, Any], wrong: list[str]) -> tuple[Message, ...]:
    if "prompt" not in row:
        wrong.append("no prompt; a text or a list of turns is expected")
        return ()
    prompt = row["prompt"]
    if isinstance(prompt, str):
        _check_text(prompt, "prompt", wrong)
        return (Message(role="user", content=prompt),)
    if not isinstance(prompt, list):
        wrong.append(f"prompt is {_kind(prompt)}; a text or a list of turns is expected")
        return ()
    if not prompt:
        wrong.append("prompt has no turns; at least one is expected")
        return ()
    messages = tuple(_turn(turn, f"prompt[{i}]", i == len(prompt) - 1, wrong) for i, turn in enumerate(prompt))
    last = messages[-1].role
    if last in _ROLES and last not in _LAST_ROLES:
        wrong.append(
            f"the last turn of prompt is the {last}'s; {either(_LAST_ROLES)} is expected, its reply is response"
        )
    return messages


def _turn(turn: Any, place: str, is_last: bool, wrong: list[str]) -> Message:
    if not isinstance(turn, dict):
        wrong.append(f"{place} is {_kind(turn)}; an object with role and content is expected")
        return Message(role="", content="")
    for key in turn:
        if key not in _TURN_KEYS:
            wrong.append(f"{_show(key)} is no key of {place}{did_you_mean(key, _TURN_KEYS)}; use {either(_TURN_KEYS)}")
    role, content = turn.get("role"), turn.get("content")
    if role not in _ROLES:
        suggestion = did_you_mean(role, _ROLES) if isinstance(role, str) else ""
        wrong.append(f"{place}.role is {_show(role)}{suggestion}; use {either(_ROLES)}")
    if not isinstance(content, str):
        wrong.append(f"{place}.content is {_kind(content)}; a text is expected")
        return Message(role="", content="")
    # an earlier turn may be empty: assistants that called a tool said nothing
    _check_text(content, f"{place}.content", wrong, may_be_empty=not is_last)
    return Message(role=role if isinstance(role, str) else "", content=content)


def _text(row: Mapping[str, Any], name: str, wrong: list[str], what: str) -> str | None:
    if name not in row:
        return None
    value = row[name]
    if not isinstance(value, str):
        wrong.append(f"{name} is {_kind(value)}; {what} as a text is expected, or no such key")
        return None
    _check_text(value, name, wrong)
    return value


def _check_text(text: str, place: str, wrong: list[str], *, may_be_empty: bool = False) -> None:
    if not may_be_empty and not text.strip():
        wrong.append(f"{place} is empty; a text is expected")
    if "\0" in text:
        wrong.append(f"{place} has a NUL at character {text.index(chr(0))}; a text without it is expected")
    surrogate = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if surrogate is not None:  # half of a pair: it cannot be written as UTF-8, so no tokenizer takes it
        wrong.append(f"{place} has half a surrogate pair at character {surrogate}; whole characters are expected")


def _labels(row: Mapping[str, Any], wrong: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    needs: dict[str, float] = {}
    outcomes: dict[str, float] = {}
    labels = row.get("labels")
    if not isinstance(labels, dict) or not labels:
        found = f"labels is {'empty' if labels == {} else _kind(labels)}" if "labels" in row else "no labels"
        wrong.append(f"{found}; an object with at least one of {either(_LABELS)} is expected")
        return needs, outcomes
    for name, value in labels.items():
        if name in _OPPOSITES:  # the nearest label says the opposite: suggested as it is, it would turn the data over
            wrong.append(f"{_show(name)} is no label; write {_show(_OPPOSITES[name])} with the opposite value")
        elif name not in _LABELS:
            wrong.append(f"{_show(name)} is no label{_meant(name)}; use {either(_LABELS)}")
        elif not isinstance(value, bool):
            wrong.append(f"labels.{name} is {_show(value)}; true or false is expected")
        elif name in NEED_LABELS:
            needs[NEED_LABELS[name]] = float(value)
        else:
            outcomes[name] = float(value)
    return needs, outcomes


def _meant(name: str) -> str:
    close = closest(name, _LABELS)
    # "dishonest" is near "honest", "not_harmful" near "harmful": what stands before it may be a negation
    return "" if close is None or name.endswith(close) or close.endswith(name) else f", did you mean {close}?"


def _show(value: Any) -> str:
    if isinstance(value, list | dict):
        return _kind(value)
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]
