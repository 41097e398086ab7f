"""What says who somebody is, found by Presidio's recognisers that need no model. Needs the extra ``pii``.

They go by patterns and check digits; names and addresses, which take a language model to find, are not among them.

Source: https://microsoft.github.io/presidio/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from hhh_router.errors import MissingExtra, SettingsError

RECOGNISERS: Final = {
    "CREDIT_CARD": "CreditCardRecognizer",
    "CRYPTO": "CryptoRecognizer",
    "EMAIL_ADDRESS": "EmailRecognizer",
    "IBAN_CODE": "IbanRecognizer",
    "IP_ADDRESS": "IpRecognizer",
    "MAC_ADDRESS": "MacAddressRecognizer",
    "PHONE_NUMBER": "PhoneRecognizer",
    "UK_NHS": "NhsRecognizer",
    "US_ITIN": "UsItinRecognizer",
    "US_SSN": "UsSsnRecognizer",
}
"""Presidio's name of what is found → its recogniser."""
LEAST_SCORE: Final = 0.4
"""Weaker finds are left, which only words around them would make likely. A telephone number has just this score."""


def find_pii(entities: Sequence[str]) -> Callable[[str], str]:
    """Replaces what says who somebody is by ``[redacted:credit-card]`` and the like.

    Args:
        entities: Of `RECOGNISERS`.

    Raises:
        SettingsError: One of them is not known.
        MissingExtra: Presidio is not installed.
    """
    check_entities(entities)
    try:
        import presidio_analyzer.predefined_recognizers as predefined
        import tldextract
    except ImportError as error:
        raise MissingExtra("pii", needed_for="redacting what says who somebody is") from error
    offline = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)  # the list it brings: nothing is fetched
    recognisers: list[Any] = []
    for entity in entities:
        kind = getattr(predefined, RECOGNISERS[entity])
        if entity == "EMAIL_ADDRESS":
            kind = type(kind.__name__, (kind,), {"validate_result": lambda self, text: offline(text).fqdn != ""})
        recognisers.append(kind())

    def replaced(text: str) -> str:
        found = [
            (hit.start, hit.end, hit.entity_type)
            for recogniser in recognisers
            for hit in recogniser.analyze(text, [*recogniser.supported_entities]) or ()
            if hit.score >= LEAST_SCORE
        ]
        return _without(text, found)

    return replaced


def check_entities(entities: Iterable[str]) -> None:
    """Refuse what nobody here can find.

    Raises:
        SettingsError: One line for each.
    """
    wrong = [f"{e!r} cannot be found by a pattern" for e in entities if e not in RECOGNISERS]
    if wrong:
        raise SettingsError("\n".join(wrong), hint=f"use {', '.join(RECOGNISERS)}")


def _without(text: str, found: Iterable[tuple[int, int, str]]) -> str:
    """A text without its finds. Those that overlap become one, named as the longest of them.

    >>> _without("call 555 or ann@x.org", [(5, 8, "PHONE_NUMBER"), (12, 21, "EMAIL_ADDRESS"), (16, 21, "URL")])
    'call [redacted:phone-number] or [redacted:email-address]'
    """
    spans: list[tuple[int, int, str, int]] = []
    for start, end, kind in sorted(found):
        if spans and start < spans[-1][1]:
            first, last, known, longest = spans[-1]
            longer = end - start > longest
            spans[-1] = first, max(last, end), kind if longer else known, max(longest, end - start)
        else:
            spans.append((start, end, kind, end - start))
    pieces, done = [], 0
    for start, end, kind, _ in spans:
        pieces += [text[done:start], f"[redacted:{kind.lower().replace('_', '-')}]"]
        done = end
    return "".join([*pieces, text[done:]])
