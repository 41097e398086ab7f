"""Traffic as it was recorded: the rows of an audit, of traces or of receipts, with labels that were given later."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from hhh_router.errors import DataError
from hhh_router.pipeline.again import Again
from hhh_router.pipeline.basis import Texts
from hhh_router.policy import Policy
from hhh_router.tools import CallScanner
from hhh_router.trace.audit import check_place, default_audit, is_postgres, read_rows, shown_place
from hhh_router.trace.block import Metadata
from hhh_router.trace.feedback_store import read_labelled
from hhh_router.types import Action, Message, ToolCall

AUDIT: Final = "audit"
_SQLITE = b"SQLite format 3\0"
_MOST_LINE_BYTES = 8 << 20
_REDACTED = "[redacted:"

Kind = Literal["audit", "lines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One request as it was recorded."""

    where: str
    """Its row or line."""
    block: Metadata
    texts: Texts | None
    """None where none were kept, or where secrets in them were replaced, so that they are not what was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a file of records held."""

    path: Path | str
    """A file, or an audit's host and database."""
    rows: tuple[Recorded, ...]
    left_out: Mapping[str, int]
    """Why rows cannot be decided again → how many."""


class Agreement:
    """Whether a policy decides again what it decided then."""

    def __init__(self) -> None:
        self.n = self.same = self.unknown = 0
        """Requests that this very policy decided; of these: as they were, and not known."""
        self.differences: list[tuple[str, str]] = []
        """(request id, what was recorded and what comes out now)."""

    def add(self, row: Recorded, policy: Policy, again: Again) -> None:
        """Compare one request; nothing where another policy decided it."""
        block = row.block
        if policy.hash != block.receipt.policy_sha256:
            return
        self.n += 1
        then = [(d.checkpoint, d.action, d.rule) for d in block.decisions]
        now = [(d.checkpoint, str(d.action), d.rule) for d in again.decisions]
        if again.unknown and is_part(now, then):
            self.unknown += 1
        elif now == then:
            self.same += 1
        else:
            self.differences.append((block.request_id, f"recorded {_told(then)}; now {_told(now)}"))

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "n": self.n,
            "same": self.same,
            "unknown": self.unknown,
            "differences": [{"request_id": r, "found": found} for r, found in self.differences],
        }


def is_part(some: Sequence[object], whole: Sequence[object]) -> bool:
    """Whether all of some stand in the whole, in this order.

    >>> is_part("ac", "abc"), is_part("ca", "abc")
    (True, False)
    """
    rest = iter(whole)
    return all(x in rest for x in some)


def _told(decisions: list[tuple[str, str, str]]) -> str:
    return ", ".join(f"{action} at {checkpoint} by {rule}" for checkpoint, action, rule in decisions) or "nothing"


def recorded_source(given: str, *, audit_url: str | None = None) -> tuple[Path | str, Kind] | None:
    """What ``--from`` names, where it holds records; None where it is something else.

    Args:
        given: As it was written.
        audit_url: Where the settings say that the audit is.

    Returns:
        A file, or the URL of an audit, which may hold a password.

    Raises:
        DataError: It cannot be read.
        SettingsError: A URL with a password was written.
    """
    if given == AUDIT:
        return audit_url or default_audit(), "audit"
    if given.startswith(f"{AUDIT}:"):
        place = given.removeprefix(f"{AUDIT}:")
        check_place(place)
        return place if is_postgres(place) else Path(place), "audit"
    path = Path(given)
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.readline(_MOST_LINE_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="name an audit, traces or rows") from error
    if head.startswith(_SQLITE):
        return path, "audit"
    found = _object(head)
    return (path, "lines") if found is not None and isinstance(found.get("hhh"), dict) else None


def read_recorded(path: Path | str, kind: Kind, *, calibration_id: str) -> Source:
    """Every request that can be decided again.

    Args:
        path: From `recorded_source`.
        kind: Likewise.
        calibration_id: Of the calibrators at hand; raw readings of others mean something else.

    Raises:
        DataError, SettingsError: It cannot be read.
    """
    found: dict[str, Recorded] = {}
    left_out: dict[str, int] = {}
    for where, record in _audit(path) if kind == "audit" else _lines(Path(path)):
        told = _recorded(where, record, calibration_id)
        if isinstance(told, Recorded):
            found[told.block.request_id] = told  # of a request that was escalated, what came of it lastly
        else:
            left_out[told] = left_out.get(told, 0) + 1
    return Source(
        path=path if isinstance(path, Path) else shown_place(path), rows=tuple(found.values()), left_out=left_out
    )


def read_labels(path: Path) -> dict[str, bool]:
    """Request id → whether it is harmful, from JSON lines ``{"request_id": …, "labels": {"harmful": true}}``.

    Raises:
        DataError: It cannot be read, or a line is none of these.
    """
    found: dict[str, bool] = {}
    for where, row in _lines(path):
        labels = row.get("labels")
        harmful = labels.get("harmful") if isinstance(labels, dict) else None
        if not isinstance(row.get("request_id"), str) or not isinstance(harmful, bool):
            raise DataError(
                f"{path}:{where}: no request_id with labels.harmful",
                hint='write {"request_id": "hhh-…", "labels": {"harmful": true}}, one a line',
            )
        found[row["request_id"]] = harmful
    return found


def feedback_labels(path: Path) -> dict[str, bool]:
    """The same from a feedback store: what most labellers say should have been done.

    Raises:
        SettingsError: It cannot be read.
    """
    return {row.request.request_id: stop for row in read_labelled(path) if (stop := row.should_stop) is not None}


def _recorded(where: str, record: Mapping[str, Any], calibration_id: str) -> Recorded | str:
    """A request, or why it is none."""
    raw = record.get("hhh")
    if not isinstance(raw, dict):
        return "nothing was decided"
    try:
        block = Metadata.model_validate(raw)
    except ValidationError:
        return "the record is of another version"
    if block.basis is None:
        return "the record keeps no readings: it was written by an earlier version"
    if block.receipt.calibration_id != calibration_id:
        return f"read with other calibrators ({block.receipt.calibration_id})"
    return Recorded(where=where, block=block, texts=_texts(record, block.basis.calls, block.request_id))


def calls_in(text: str | None, names: Sequence[str], request_id: str) -> tuple[ToolCall, ...]:
    """The calls of these tools that stand in a reply's text, as records have it."""
    if text is None or not names:
        return ()
    _, calls = CallScanner(names, prefix=f"call_{request_id}").push(text)
    return calls


def _texts(record: Mapping[str, Any], calls: Sequence[str], request_id: str) -> Texts | None:
    """Of the audit's ``content``, or of a trace's ``request`` and ``reply``."""
    content = record.get("content")
    if isinstance(content, dict):
        if "cut" in content:
            return None
        messages, response = content.get("messages"), content.get("response")
    elif isinstance(request := record.get("request"), dict):
        messages, response = request.get("messages"), request.get("response") or _reply(record)
    else:
        return None
    if not isinstance(messages, list) or _REDACTED in json.dumps([messages, response]):
        return None
    try:
        turns = tuple(canonical_message(turn) for turn in messages)
    except (KeyError, TypeError):
        return None
    said = response if isinstance(response, str) else None
    return Texts(messages=turns, response=said, calls=calls_in(said, calls, request_id))


def _reply(record: Mapping[str, Any]) -> Any:
    """What a trace says reached the caller, where that is what was judged."""
    decisions = record["hhh"]["decisions"]
    changed = any(Action(d["action"]).stops or d["action"] == Action.REGENERATE for d in decisions)
    return None if changed else record.get("reply")


def canonical_message(turn: Mapping[str, Any]) -> Message:
    """A turn as `trace.build.canonical_request` has it.

    Raises:
        KeyError, TypeError: It is none.
    """
    return Message(
        role=str(turn["role"]),
        content=str(turn["content"] or ""),
        tool_calls=tuple(
            ToolCall(id=str(c["id"]), name=str(c["name"]), arguments=str(c["arguments"]))
            for c in turn.get("tool_calls") or ()
        ),
        tool_call_id=turn.get("tool_call_id"),
    )


def _audit(path: Path | str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Outcomes and verdicts. An outcome says nothing of what a verdict is about, and the other way round."""
    for row in read_rows(path):
        if row.kind in ("outcome", "verdict"):
            record = json.loads(row.record)
            if row.kind == "verdict" or "hhh" in record:
                yield f"row {row.seq}", record


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and (found := _object(line)) is not None:
                    yield str(number), found
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="name a file of JSON lines") from error


def _object(line: bytes) -> Mapping[str, Any] | None:
    """A line as an object; None where it is none, such as one that a crash tore."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
