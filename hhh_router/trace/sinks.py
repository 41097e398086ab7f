"""Where the record of a request goes. A sink never fails a request and never changes its outcome."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from hhh_router.errors import SettingsError
from hhh_router.trace.block import Metadata
from hhh_router.trace.build import canonical_request
from hhh_router.trace.redact import Redactor
from hhh_router.types import ChatRequest, GuardRequest, ReadRequest

_log = logging.getLogger(__name__)

Request = ChatRequest | GuardRequest | ReadRequest

MAX_LINE_BYTES = 1 << 20  # one request may not fill a disk; the block alone takes about 2 kB
_PRIVATE = 0o600  # a trace may hold what people wrote


@runtime_checkable
class Redacting(Protocol):
    """A place that secrets may reach, and that the deployment tells what to replace."""

    redactor: Redactor
    """Replaces secrets before anything is stored."""


class Sink(Protocol):
    """Takes the record of a finished request."""

    def write(self, metadata: Metadata, request: Request, reply: str | None) -> None:
        """Store it. Must not raise: what cannot be stored is logged and counted.

        Args:
            metadata: The block as the caller got it.
            request: What was asked.
            reply: What reached the caller; None where there is no reply.
        """
        ...


class NullSink:
    """Keeps nothing."""

    def write(self, metadata: Metadata, request: Request, reply: str | None) -> None:
        """Do nothing."""


class LogSink:
    """One INFO line a request: id, policy, action, rule, latency. Never a word of prompt or reply."""

    def __init__(self, logger: logging.Logger = _log) -> None:
        self.redactor = Redactor()
        """Replaces secrets; a deployment that has more than the usual ones puts its own here."""
        self._logger = logger

    def write(self, metadata: Metadata, request: Request, reply: str | None) -> None:
        """Log the line; ``latency_ms`` is ``timing_ms["total"]``, ``-`` where nobody measured it."""
        last = metadata.decisions[-1] if metadata.decisions else None
        latency = metadata.timing_ms.get("total")
        self._logger.info(
            "request id=%s policy=%s@%d action=%s rule=%s latency_ms=%s",
            _one_line(metadata.request_id, self.redactor),
            metadata.policy.name,
            metadata.policy.version,
            metadata.action,
            last.rule if last else "-",
            "-" if latency is None else f"{latency:.1f}",
        )


class JsonlSink:
    """Appends one JSON line a request to a file.

    Several processes may share the file: a line is one ``write`` to a descriptor opened with ``O_APPEND``. The file is
    opened anew for each line, so it can be rotated away.
    """

    def __init__(
        self,
        path: str | Path,
        content: Literal["hash", "full"] = "hash",
        *,
        clock: Callable[[], float] = time.time,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        """Check that the file can be written; it is made, readable by its owner alone, where there is none.

        Args:
            path: The file.
            content: ``hash`` stores the block alone, whose receipt has the hashes of request and reply; ``full`` adds
                the texts, with obvious secrets scrubbed.
            clock: Seconds since the epoch.
            max_line_bytes: A longer line is stored without its texts.

        Raises:
            SettingsError: The path cannot be appended to, or ``content`` is neither.
        """
        if content not in ("hash", "full"):
            raise SettingsError(f"trace content {content!r} is not known", hint="use 'hash' or 'full'")
        self.path = Path(path)
        self.redactor = Redactor()
        """Replaces secrets; a deployment that has more than the usual ones puts its own here."""
        self.failures = 0
        """Records that could not be stored, or only in part, since the start."""
        self._content = content
        self._clock = clock
        self._max_line_bytes = max_line_bytes
        self._is_torn = False
        try:
            os.close(self._open())
        except OSError as error:
            raise SettingsError(
                f"{self.path}: the trace cannot be written ({error.strerror})",
                hint="name a file in an existing folder that this user may write to",
            ) from error

    def write(self, metadata: Metadata, request: Request, reply: str | None) -> None:
        """Append the record; what cannot be stored (a full disk, say) is logged and counted in ``failures``."""
        try:
            self._append(self._line(metadata, request, reply))
        except OSError as error:
            self._count(metadata, str(error.strerror))
        except (TypeError, ValueError, RecursionError) as error:  # a client's passthrough nested beyond reason
            self._count(metadata, f"no JSON can be made of it: {type(error).__name__}")

    def _count(self, metadata: Metadata, reason: str) -> None:
        self.failures += 1
        _log.error(
            "%s: record of request %s not stored (%s); %d lost since start",
            self.path,
            _one_line(metadata.request_id, self.redactor),
            reason,
            self.failures,
        )

    def _line(self, metadata: Metadata, request: Request, reply: str | None) -> bytes:
        record: dict[str, Any] = {
            "time": datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
            "hhh": self.redactor.value(metadata.as_json()),
        }
        if self._content == "hash":
            return _encoded(record)
        texts = self.redactor.value({"request": canonical_request(request), "reply": reply})
        line = _encoded(record | texts)
        if len(line) <= self._max_line_bytes:
            return line
        return _encoded(record | {"content_left_out": f"the line would take {len(line)} bytes"})

    def _append(self, line: bytes) -> None:
        descriptor = self._open()
        try:
            data = b"\n" + line if self._is_torn else line  # so that half a line spoils itself alone
            written = os.write(descriptor, data)
            self._is_torn = written < len(data)
            if self._is_torn:
                raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes fitted")
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _PRIVATE)


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"


def _one_line(text: str, redactor: Redactor) -> str:
    """An id that a client may have chosen, made safe for one line of a log."""
    return "".join(c if c.isprintable() and c != " " else "_" for c in redactor.text(text))[:128]
