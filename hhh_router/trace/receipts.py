"""Signed receipts: what was decided, on what and why, in a file whose lines prove each other.

Each line is a JSON object with the metadata block of one request, the sha256 of the line before it, and an Ed25519
signature (RFC 8032) over all the rest. Who has the public key can tell later that no line was changed, added, put
elsewhere or taken out, except from the end.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hhh_router.errors import MissingExtra, SettingsError
from hhh_router.trace.block import Metadata
from hhh_router.trace.redact import Redactor
from hhh_router.trace.sinks import Request

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_log = logging.getLogger(__name__)

SCHEMA: Final = "hhh-router/receipt/1"
_PRIVATE = 0o600
_TAIL_BYTES = 1 << 16  # a line takes about 3 kB


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One line of a file of receipts."""

    line: int
    """Counted from 1."""
    content: Mapping[str, Any]
    """Empty where it is no receipt."""
    wrong: tuple[str, ...]
    """What does not hold; empty where all does."""


class ReceiptSink:
    """Appends a signed receipt of each request. Several processes may share the file."""

    def __init__(self, path: str | Path, key: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open the file; it is made, readable by its owner alone, where there is none.

        Args:
            path: The file of receipts. A line torn by a crash is cut off.
            key: PEM file of an Ed25519 private key.
            clock: Seconds since the epoch.

        Raises:
            SettingsError: The key is none, or the file cannot be written.
            MissingExtra: `cryptography` is not installed.
        """
        self.path = Path(path)
        self.redactor = Redactor()
        """Replaces secrets; a deployment that has more than the usual ones puts its own here."""
        self.failures = 0
        """Receipts that could not be stored since the start."""
        self._key = _private_key(Path(key))
        self._key_id = key_id(self._key.public_key())
        self._clock = clock
        self._lock = threading.Lock()
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, _PRIVATE))
        except OSError as error:
            raise SettingsError(
                f"{self.path}: receipts cannot be written ({error.strerror})",
                hint="name a file in an existing folder that this user may write to",
            ) from error

    def write(self, metadata: Metadata, request: Request, reply: str | None) -> None:
        """Append the receipt; what cannot be stored is logged and counted in ``failures``."""
        try:
            with self._lock:
                self._append(self.redactor.value(metadata.as_json()))
        except (OSError, TypeError, ValueError, RecursionError) as error:
            self.failures += 1
            _log.error("%s: receipt not stored (%s); %d lost since start", self.path, error, self.failures)

    def _append(self, block: Mapping[str, Any]) -> None:
        with self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, also by a crash
            previous, end = _last_line(file)
            content = {
                "schema": SCHEMA,
                "time": datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
                "previous": None if previous is None else hashlib.sha256(previous).hexdigest(),
                "key": self._key_id,
                "hhh": block,
            }
            signature = base64.b64encode(self._key.sign(_canonical(content))).decode()
            file.seek(end)
            file.truncate()
            file.write(_canonical(content | {"signature": signature}) + b"\n")
            file.flush()


def check_receipts(path: Path, key: str | Path) -> Iterator[Checked]:
    """Every line of a file of receipts, with what does not hold about it.

    Args:
        path: The file.
        key: PEM file of the public key (the private one does too).

    Raises:
        SettingsError: The key is none, or the file cannot be read.
        MissingExtra: `cryptography` is not installed.
    """
    public = _public_key(Path(key))
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})", hint="name a file of receipts") from error
    previous: bytes | None = None
    for number, line in enumerate(lines, start=1):
        if number == len(lines):
            if line:
                yield Checked(line=number, content={}, wrong=("is torn: it has no end",))
            return
        content, wrong = _check(line, previous, public)
        yield Checked(line=number, content=content, wrong=tuple(wrong))
        previous = line


def _check(line: bytes, previous: bytes | None, public: Ed25519PublicKey) -> tuple[Mapping[str, Any], list[str]]:
    from cryptography.exceptions import InvalidSignature

    try:
        content = json.loads(line)
        signature = base64.b64decode(content.pop("signature"), validate=True)
        before = content["previous"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}, ["is no receipt"]
    wrong = []
    expected = None if previous is None else hashlib.sha256(previous).hexdigest()
    if before != expected:
        wrong.append("does not follow the line before it: one was changed, put elsewhere or taken out")
    if content.get("key") != key_id(public):
        wrong.append("was signed with another key")
    try:
        public.verify(signature, _canonical(content))
    except (InvalidSignature, ValueError):
        wrong.append("its signature does not fit its content")
    return content, wrong


def key_id(public: Ed25519PublicKey) -> str:
    """Names a key: the first 16 hex digits of the sha256 of its 32 bytes."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


def _last_line(file: Any) -> tuple[bytes | None, int]:
    """The last whole line without its end, and where it ends; whatever follows is torn."""
    size = file.seek(0, os.SEEK_END)
    reach = min(size, _TAIL_BYTES)
    while True:
        file.seek(size - reach)
        tail = file.read(reach)
        end = tail.rfind(b"\n")
        begin = tail.rfind(b"\n", 0, end) if end >= 0 else -1
        if begin >= 0 or reach == size:
            break
        reach = min(size, reach * 2)
    if end < 0:
        return None, 0
    return tail[begin + 1 : end], size - reach + end + 1


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def _private_key(path: Path) -> Ed25519PrivateKey:
    found = _load(path, private=True)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not isinstance(found, Ed25519PrivateKey):
        raise _no_key(path, "Ed25519 private key")
    return found


def _public_key(path: Path) -> Ed25519PublicKey:
    found = _load(path, private=False)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    if isinstance(found, Ed25519PrivateKey):
        return found.public_key()
    if not isinstance(found, Ed25519PublicKey):
        raise _no_key(path, "Ed25519 key")
    return found


def _load(path: Path, *, private: bool) -> object:
    try:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise MissingExtra("serve", needed_for="receipts") from error
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: the key cannot be read ({error.strerror})", hint=_HOW) from error
    try:
        return load_pem_private_key(raw, None) if private or b"PRIVATE" in raw else load_pem_public_key(raw)
    except (ValueError, TypeError) as error:
        raise _no_key(path, "PEM file of an unencrypted key") from error


_HOW = "make one: openssl genpkey -algorithm ed25519 -out receipts.pem; openssl pkey -in receipts.pem -pubout"


def _no_key(path: Path, what: str) -> SettingsError:
    return SettingsError(f"{path}: is no {what}", hint=_HOW)
