"""Finds what a policy wants taken out of a text (``redact``), in a whole text or in one that is still coming.

Both find the same: a piece of a text is final once nothing that may follow could change what is found in it. Found is
what looks like it, and is checked where a check exists (card numbers, IBANs, addresses); not more.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from hhh_router.trace.redact import EMAIL, SECRETS

_CONTEXT = 64  # characters before a place that a pattern may look back at
_RESCAN = 4096  # from here on a held text is only searched again when it has grown by an eighth
_ASCII = "".join(map(chr, range(33, 127)))
_CARD_DIGITS = range(13, 20)
_CARD_GROUPS = 7  # as numbers are written: 4-4-4-4-3, 4-6-5, …
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip
"""Country → characters of its account numbers, as ISO 13616's registry has them."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text that is to be taken out."""

    start: int
    end: int
    label: str
    """What it looks like, such as ``api-key``."""
    kind: str
    """What a policy calls it, such as ``secrets``."""

    @property
    def mark(self) -> str:
        """What stands in its place."""
        return f"[redacted:{self.label}]"


Check = Callable[[str], Iterator[tuple[int, int]]]
"""Finds in what a pattern matched the parts that are meant."""


@dataclass(frozen=True, slots=True)
class _Finder:
    kind: str
    label: str
    pattern: re.Pattern[str]
    check: Check | None = None

    def find(self, text: str, begin: int) -> Iterator[tuple[int, Span]]:
        """Each span, with where its match begins: what the pattern has to see before the span is part of it."""
        for match in self.pattern.finditer(text, begin):
            if self.check is not None:
                for start, end in self.check(match.group()):
                    yield match.start(), Span(match.start() + start, match.start() + end, self.label, self.kind)
            else:
                start = match.end(1) if self.pattern.groups else match.start()
                yield match.start(), Span(start, match.end(), self.label, self.kind)


def _cards(run: str) -> Iterator[tuple[int, int]]:
    """The groups of digits in a run that are a card number: its length, first digit and check digit (Luhn)."""
    groups = [m.span() for m in re.finditer(r"\d+", run)]
    taken = 0
    for i, (start, _) in enumerate(groups):
        if start < taken or run[start] not in "23456":
            continue
        for _, end in reversed(groups[i : i + _CARD_GROUPS]):
            if end - start >= _CARD_DIGITS.start:
                digits = run[start:end].replace(" ", "").replace("-", "")
                if len(digits) in _CARD_DIGITS and _luhn(digits):
                    yield start, end
                    taken = end
                    break


def _luhn(digits: str) -> bool:
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _ibans(run: str) -> Iterator[tuple[int, int]]:
    """An account number at the start of a run: the length of its country, and the remainder by 97."""
    length = _IBAN_LENGTHS.get(run[:2])
    at = [i for i, c in enumerate(run) if c != " "]
    if length is None or len(at) < length:
        return
    end = at[length - 1] + 1
    plain = run[:end].replace(" ", "")
    if end == len(run) or run[end] == " ":
        digits = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
        if int(digits) % 97 == 1:
            yield 0, end


def _phones(run: str) -> Iterator[tuple[int, int]]:
    if 8 <= sum(c.isdigit() for c in run) <= 15:
        yield 0, len(run.rstrip(" .-/("))


def _ips(run: str) -> Iterator[tuple[int, int]]:
    plain = run if run.endswith("::") else run.rstrip(":")
    if any(c.isdigit() for c in plain):
        try:
            ip_address(plain)
        except ValueError:
            return
        yield 0, len(plain)


_KINDS: dict[str, tuple[_Finder, ...]] = {
    "secrets": tuple(_Finder("secrets", label, pattern) for label, pattern in SECRETS),
    "emails": (_Finder("emails", "email", EMAIL),),
    "cards": (_Finder("cards", "card", re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,}(?!\w)"), _cards),),
    "ibans": (_Finder("ibans", "iban", re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,40}(?!\w)"), _ibans),),
    "ips": (
        _Finder("ips", "ip", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w)(?!\.\w)"), _ips),
        _Finder("ips", "ip", re.compile(r"(?<![\w.:])[0-9A-Fa-f:]{2,45}(?![\w:])(?!\.\w)"), _ips),
    ),
    "phones": tuple(
        _Finder("phones", "phone", re.compile(pattern), _phones)
        for pattern in (
            r"(?<![\w+])\+\d{1,3}(?:[ ./-]?\(?\d{1,4}\)?){2,6}(?!\w)",
            r"(?<![\w+-])(?:\(\d{3}\)[ .-]?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])",
            r"(?<![\w+.-])\(?0\d{1,5}\)?[ /-]\d{3,8}(?:[ -]\d{2,6}){0,3}(?![\w-])",
        )
    ),
}
"""What `redact` may name → what finds it."""

_TAILS: dict[str, tuple[re.Pattern[str], ...]] = {
    "secrets": (
        re.compile(
            r"-----BEGIN [A-Z ]{0,45}(?:-{1,5}|-----[^-]{0,20000}(?:-{1,5}(?:E|EN|END|END [A-Z ]{0,45}-{0,5})?)?)?\Z"
        ),
        re.compile(r"(?i)authorization:[ \t]*(?:(?:bearer|basic|token)[ \t]*)?[^\s\"',;]*\Z"),
        re.compile(r"(?i)\bbearer [ \t]*[A-Za-z0-9._~+/=-]*\Z"),
        re.compile(r"://[^\s/:@]{0,200}(?::[^\s/@]{0,200})?\Z"),
        re.compile(
            r"(?i)(?<![a-z0-9])(?:[a-z0-9]{1,30}[_-]){0,4}(?:api[_-]?key|access[_-]?key|secret|password|passwd|token)"
            r"[\"']?[ \t]{0,4}(?:[:=][ \t]{0,4}(?:\"[^\"\n]*|'[^'\n]*|[^\s\"',;]*))?\Z"
        ),
    ),
    "ibans": (re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){0,40} ?\Z"),),
}
"""Beginnings of what may still be found, with a space inside; what has none is in the last word."""
_NUMBERS = "0123456789 .-/()+"


class Spans:
    """What is found in a text that comes in pieces.

    >>> spans = Spans(["emails"])
    >>> for piece in ("Ask ann", "@mail.exam", "ple now"):
    ...     spans.feed(piece)
    >>> spans.final, [(s.start, s.end, s.mark) for s in spans.found]
    (21, [(4, 20, '[redacted:email]')])

    Args:
        kinds: Of ``secrets``, ``emails``, ``phones``, ``cards``, ``ibans`` and ``ips``.
    """

    def __init__(self, kinds: Sequence[str] = ()) -> None:
        self._kinds: dict[str, None] = dict.fromkeys(kinds)
        self._text = ""  # what is not final yet, with a little of what stands before it
        self._offset = 0  # of that in the whole text
        self._searched = 0  # its length when it was searched last
        self.final = 0
        """Up to here nothing can change any more."""
        self.found: list[Span] = []
        """What is to be taken out of the part that is final, in order."""
        self.counts: Counter[str] = Counter()
        """How much of each kind was found in it."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is looked for."""
        return tuple(self._kinds)

    def look_for(self, kinds: Sequence[str]) -> None:
        """Look for more from here on."""
        self._kinds |= dict.fromkeys(kinds)

    def feed(self, piece: str) -> None:
        """Take what comes next."""
        self._text += piece
        held = len(self._text) - (self.final - self._offset)
        if held > _RESCAN and len(self._text) - self._searched < held // 8:
            return  # so that a long word costs no more than its length; holding is always safe
        self._search(is_over=False)

    def end(self) -> None:
        """Nothing more comes."""
        self._search(is_over=True)

    def forget(self, before: int) -> None:
        """Drop what was found before a place that has left."""
        while self.found and self.found[0].end <= before:
            del self.found[0]

    def _search(self, *, is_over: bool) -> None:
        text, begin = self._text, self.final - self._offset
        self._searched = len(text)
        matches = _matches(text, begin, self.kinds)
        limit = len(text)
        if not is_over:
            ends_here = [at for at, span in matches if span.end >= len(text)]
            limit = min([self._tail(text, begin), *ends_here])
            while cut := [at for at, span in matches if at < limit < span.end]:
                limit = min(cut)
        found = _joined([span for _, span in matches if span.end <= limit])
        self.found += [replace(span, start=span.start + self._offset, end=span.end + self._offset) for span in found]
        self.counts.update(span.kind for span in found)
        self.final = self._offset + limit
        dropped = max(0, limit - _CONTEXT)
        self._text, self._offset, self._searched = text[dropped:], self._offset + dropped, self._searched - dropped

    def _tail(self, text: str, begin: int) -> int:
        """Where something may begin that more text makes a find, or a longer one."""
        pending = text[begin:]
        starts = [len(text)]
        if self._kinds:
            starts.append(begin + len(pending.rstrip(_ASCII)))
        if {"cards", "phones", "ips"} & self._kinds.keys():
            starts.append(begin + len(pending.rstrip(_NUMBERS)))
        for kind in self._kinds:
            for tail in _TAILS.get(kind, ()):
                if (match := tail.search(text, begin)) is not None:
                    starts.append(match.start())
        return min(starts)


def _matches(text: str, begin: int, kinds: Sequence[str]) -> list[tuple[int, Span]]:
    """Spans in order, each with where its match begins."""
    found = [match for kind in kinds for finder in _KINDS[kind] for match in finder.find(text, begin)]
    return sorted(found, key=lambda match: (match[1].start, -match[1].end))


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans that overlap as one, under the name of the first."""
    found: list[Span] = []
    for span in spans:
        if not found or span.start >= found[-1].end:
            found.append(span)
        elif span.end > found[-1].end:
            found[-1] = replace(found[-1], end=span.end)
    return found


def find_spans(text: str, kinds: Sequence[str]) -> list[Span]:
    """What is to be taken out of a whole text, in order; no two overlap."""
    return _joined([span for _, span in _matches(text, 0, kinds)])


def without(text: str, spans: Sequence[Span], offset: int = 0) -> str:
    """A part of a text, which begins at ``offset`` of it, with marks in place of spans.

    A span's mark stands where it begins; what of it lies in other parts is left out there.

    >>> spans = [Span(2, 6, "email", "emails")]
    >>> without("abcd", spans), without("efgh", spans, 4)
    ('ab[redacted:email]', 'gh')
    """
    told, at, end = [], offset, offset + len(text)
    for span in spans:
        if span.end <= offset or span.start >= end:
            continue
        if span.start >= offset:
            told += [text[at - offset : span.start - offset], span.mark]
        at = min(span.end, end)
    return "".join([*told, text[at - offset :]])


def redacted(text: str, kinds: Sequence[str], counts: Counter[str] | None = None) -> str:
    """A whole text with marks in place of what is found.

    >>> redacted("ann@mail.example, +49 30 1234567", ["emails", "phones"])
    '[redacted:email], [redacted:phone]'

    Args:
        text: Any text.
        kinds: What is taken out.
        counts: Gets how many of each kind were.
    """
    spans = find_spans(text, kinds)
    if counts is not None:
        counts.update(span.kind for span in spans)
    return without(text, spans) if spans else text
