"""Scrub secrets from what is about to be stored: by the name of a key, and by the look of a value.

It catches the obvious, not everything: text that must not be stored should not be (``content="hash"``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hhh_router.errors import SettingsError

MAX_PATTERN_BYTES = 100_000
"""Of a file of patterns."""
_PATTERNS_HINT = "write one regular expression a line; lines that begin with # are comments"
_SECRET_NAMES = (
    "authorization",
    "cookie",
    "apikey",
    "accesskey",
    "accesskeyid",
    "privatekey",
    "secretkey",
    "secret",
    "password",
    "passwd",
    "passphrase",
    "credential",
    "credentials",
    "token",
)
"""Endings of a key's name, without case, dashes and underscores. ``max_tokens`` ends in none of them."""

# name → pattern. Each is linear: no part can match the same characters in two ways. The first match wins.
SECRETS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "private-key",
        re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,20000}(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?"),
    ),
    ("authorization", re.compile(r"(?i)(?<=authorization:)[ \t]*(?:(?:bearer|basic|token)[ \t]+)?[^\s\"',;]+")),
    ("bearer", re.compile(r"(?i)(?<=\bbearer )[ \t]*[A-Za-z0-9._~+/=-]{8,}")),
    ("api-key", re.compile(r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}")),  # OpenAI, Anthropic, Stripe and their imitators
    ("api-key", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,})")),
    ("api-key", re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,})")),
    ("aws-key", re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b")),
    ("jwt", re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*")),
    ("url-password", re.compile(r"(?<=://)[^\s/:@]{1,200}:[^\s/@]{1,200}(?=@)")),
    (
        "secret",
        re.compile(
            r"(?i)(?<![a-z0-9])((?:[a-z0-9]{1,30}[_-]){0,4}(?:api[_-]?key|access[_-]?key|secret|password|passwd|token)"
            r"[\"']?[ \t]{0,4}[:=][ \t]{0,4})(?!\[redacted:)(?:\"[^\"\n]{4,}\"|'[^'\n]{4,}'|[^\s\"',;]{6,})"
        ),
    ),
)
EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}\b")


Patterns = Sequence[re.Pattern[str]]
"""Further secrets of a deployment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redactor:
    """What one deployment replaces before anything is stored, logged or told."""

    patterns: Patterns = ()
    """Replaced too, as ``[redacted:own]``."""
    emails: bool = False
    """Replace e-mail addresses too."""
    also: Callable[[str], str] | None = None
    """Replaces what no pattern finds, such as what says who somebody is."""

    def text(self, text: str) -> str:
        """A copy of the text with whatever looks like a secret replaced.

        >>> Redactor(patterns=[re.compile("CASE-[0-9]+")]).text("CASE-12: use sk-aaaabbbbccccdddd")
        '[redacted:own]: use [redacted:api-key]'
        """
        for kind, pattern in SECRETS:
            keep = r"\g<1>" if pattern.groups else ""
            text = pattern.sub(f"{keep}[redacted:{kind}]", text)
        for pattern in self.patterns:
            text = pattern.sub("[redacted:own]", text)
        if self.also is not None:
            text = self.also(text)
        return EMAIL.sub("[redacted:email]", text) if self.emails else text

    def value(self, value: Any) -> Any:
        """A copy of a JSON-like value: strings under a secret's name are replaced whole, all others as in `text`."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.text(str(k)): "[redacted:key]" if v and _is_secret(str(k)) else self.value(v)
                for k, v in value.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            return [self.value(v) for v in value]
        return value


def read_patterns(path: Path) -> tuple[re.Pattern[str], ...]:
    """Further secrets from a file: one regular expression a line; empty ones and those after a ``#`` are skipped.

    Raises:
        SettingsError: It cannot be read, or a line is no regular expression; the message names each.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_PATTERN_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no UTF-8"
        raise SettingsError(f"{path}: patterns cannot be read ({why})", hint=_PATTERNS_HINT) from error
    if len(text) > MAX_PATTERN_BYTES:
        raise SettingsError(f"{path}: more than {MAX_PATTERN_BYTES:,} characters of patterns", hint=_PATTERNS_HINT)
    patterns, wrong = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            pattern = re.compile(line)
        except re.error as error:
            wrong.append(f"{path}:{number}  no regular expression: {error}")
            continue
        if pattern.match(""):
            wrong.append(f"{path}:{number}  it matches nothing at all, so it would be found everywhere")
        patterns.append(pattern)
    if wrong:
        raise SettingsError("\n".join(wrong), hint=_PATTERNS_HINT)
    return tuple(patterns)


def redact(value: Any, *, emails: bool = False, patterns: Patterns = ()) -> Any:
    """A copy of a JSON-like value with every secret replaced by ``[redacted:kind]``.

    Strings under a secret's name are replaced whole, all others are searched, for ``patterns`` too. Numbers stay as
    they are.

    >>> redact({"max_tokens": 5, "api_key": "abc", "text": "use sk-aaaabbbbccccdddd"})
    {'max_tokens': 5, 'api_key': '[redacted:key]', 'text': 'use [redacted:api-key]'}
    """
    return Redactor(patterns=patterns, emails=emails).value(value)


def redact_text(text: str, *, emails: bool = False, patterns: Patterns = ()) -> str:
    """A copy of the text with whatever looks like a secret replaced.

    Args:
        text: Any text.
        emails: Replace e-mail addresses too.
        patterns: Replace what these find too.

    >>> redact_text("Authorization: Bearer abc.def-123, then AKIAABCDEFGHIJKLMNOP")
    'Authorization:[redacted:authorization], then [redacted:aws-key]'
    """
    return Redactor(patterns=patterns, emails=emails).text(text)


def _is_secret(name: str) -> bool:
    plain = re.sub(r"[-_ ]", "", name).lower()
    return plain.endswith(_SECRET_NAMES)
