"""The JSONL files of ``hhh-router guard --in … --out …``: read with line numbers, written so that a run can resume.

Each row that is not blank gives exactly one row of the output, in order, so what is already there tells where to go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hhh_router.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRow:
    """One line of the input."""

    line: int
    """Counted from 1, blank lines included."""
    end: int
    """Bytes of the file up to the end of this line."""
    content: Row
    """The parsed row; ``{"raw": text}`` where the line is no JSON object."""
    problem: str | None
    """Why the row cannot be judged; None when it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What an earlier run has written."""

    rows: int
    bad: int
    """Rows among them that carry an ``error``."""
    last_block: Row | None
    """The ``hhh`` block of the last judged row."""


def file_size(path: Path) -> int:
    """Bytes of an input file.

    Raises:
        DataError: No such file.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="give a JSONL file with --in") from error


def read_rows(path: Path) -> Iterator[InputRow]:
    """The rows of a JSONL file, one by one; blank lines are passed over.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    content, problem = _parse(raw)
                    yield InputRow(line=line, end=file.tell(), content=content, problem=problem)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", hint="give a JSONL file with --in") from error


def resume(rows: Iterable[InputRow], source: Path, out: Path) -> Done:
    """Check what `out` holds against the first rows of `rows`, which are consumed; a torn last line is cut off.

    Raises:
        DataError: `out` is not the beginning of this input's output, or cannot be read.
    """
    count = bad = 0
    last_block = None
    keep = 0
    other = f"{out} was made from another input than {source}"
    incoming = iter(rows)
    try:
        with out.open("r+b") as file:
            for number, raw in enumerate(file, start=1):
                written = _object(raw)
                if not raw.endswith(b"\n"):
                    break  # torn by a kill
                if written is None:
                    raise DataError(f"{out}:{number}: not a JSON object", hint="give another --out file")
                row = next(incoming, None)
                judged = row is not None and _is_judged(written, row.content)
                if row is None or not (judged or _is_reported(written, row.content)):
                    place = f"line {row.line}" if row else "its end"
                    raise DataError(f"{other} (differs at {place}, {out}:{number})", hint="give another --out file")
                count, bad = count + 1, bad + (not judged)
                last_block = written["hhh"] if judged else last_block
                keep = keep + len(raw)
            file.truncate(keep)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(
            f"{out}: cannot be read and written ({error.strerror})", hint="give another --out file"
        ) from error
    return Done(rows=count, bad=bad, last_block=last_block)


def dump_row(row: Row) -> bytes:
    """One output line.

    >>> dump_row({"prompt": "héllo"})
    b'{"prompt": "h\\xc3\\xa9llo"}\\n'
    """
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return json.dumps(row).encode() + b"\n"


def _parse(raw: bytes) -> tuple[Row, str | None]:
    try:
        content = json.loads(raw)
    except UnicodeDecodeError as error:
        return {"raw": raw.decode("utf-8", "replace").rstrip("\r\n")}, f"not UTF-8 (byte {error.start + 1})"
    except (ValueError, RecursionError) as error:
        return {"raw": raw.decode("utf-8", "replace").rstrip("\r\n")}, f"not JSON ({error})"
    if not isinstance(content, dict):
        return {"raw": raw.decode("utf-8", "replace").rstrip("\r\n")}, "not a JSON object"
    return content, _row_problem(content)


def _row_problem(row: Row) -> str | None:
    for key in ("prompt", "response"):
        if row.get(key) is not None and not isinstance(row[key], str):
            return f"{key} is {type(row[key]).__name__}, not text"
    if row.get("prompt") is None and row.get("response") is None:
        return "neither prompt nor response"
    return "already has an 'hhh' block" if "hhh" in row else None


def _object(raw: bytes) -> Row | None:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_judged(written: Row, row: Row) -> bool:
    return "hhh" in written and _same({k: v for k, v in written.items() if k != "hhh"}, row)


def _is_reported(written: Row, row: Row) -> bool:
    return "error" in written and _same(written, {**row, "error": written["error"]})


def _same(one: Row, other: Row) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)  # a NaN equals itself here
