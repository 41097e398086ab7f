"""What says who somebody is, found by Presidio: make test-pii. The first tests need it not."""

import importlib.util
import socket
from typing import Any

import pytest

from hhh_router.assemble import open_redactor
from hhh_router.errors import MissingExtra, SettingsError
from hhh_router.interfaces.proxy.config import parse_proxy_file
from hhh_router.settings import Settings
from hhh_router.trace.pii import RECOGNISERS, find_pii

HERE = importlib.util.find_spec("presidio_analyzer") is not None
needed = pytest.mark.skipif(not HERE, reason="needs the extra pii: make test-pii")

SAID = {
    "CREDIT_CARD": "4111 1111 1111 1111",
    "CRYPTO": "16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ",
    "EMAIL_ADDRESS": "ann.lee@example.org",
    "IBAN_CODE": "DE89 3704 0044 0532 0130 00",
    "IP_ADDRESS": "192.168.17.23",
    "MAC_ADDRESS": "00:1B:44:11:3A:B7",
    "PHONE_NUMBER": "(212) 555-0143",
    "UK_NHS": "943 476 5919",
    "US_ITIN": "911-53-1234",
    "US_SSN": "536-22-8726",
}


def test_nothing_is_found_unless_it_is_asked_for() -> None:
    assert open_redactor(Settings()).also is None


@pytest.mark.skipif(HERE, reason="Presidio is here")
def test_without_presidio_the_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match="'pii' extra"):
        open_redactor(Settings.load(redact_pii=("EMAIL_ADDRESS",)))


def test_what_nobody_can_find_is_refused() -> None:
    with pytest.raises(SettingsError, match="'PERSON' cannot be found by a pattern"):
        find_pii(["EMAIL_ADDRESS", "PERSON"])
    file = b"version: 1\nupstreams: {a: {url: 'http://a'}}\nroutes: [{to: a}]\naudit: {pii: [EMAIL_ADRESS]}\n"
    with pytest.raises(
        SettingsError, match=r":4  audit.pii\[0\]: 'EMAIL_ADRESS' is not known, did you mean EMAIL_ADDRESS"
    ):
        parse_proxy_file(file)


def test_the_setting_is_a_list_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHH_ROUTER_REDACT_PII", "US_SSN, IBAN_CODE")

    assert Settings.load().redact_pii == ("US_SSN", "IBAN_CODE")


def test_every_recogniser_has_an_example() -> None:
    assert set(SAID) == set(RECOGNISERS)


@needed
@pytest.mark.parametrize("entity", SAID)
def test_it_is_replaced_where_it_is_asked_for_and_nowhere_else(entity: str) -> None:
    text = f"Please note {SAID[entity]} for later."

    assert find_pii([entity])(text) == f"Please note [redacted:{entity.lower().replace('_', '-')}] for later."
    alike = {entity, "PHONE_NUMBER", "UK_NHS", "US_ITIN", "US_SSN"}  # so many digits may be any of them
    others = [e for e in RECOGNISERS if e not in alike]
    assert SAID[entity] in find_pii(others)(text)


@needed
def test_ordinary_text_and_records_stay() -> None:
    redactor = open_redactor(Settings.load(redact_pii=tuple(RECOGNISERS)))
    record = {
        "path": "/v1/chat/completions",
        "status": 200,
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "hhh": {"request_id": "hhh-0123456789abcdef0123456789abcdef", "confidence": 0.912345},
        "text": "The capital of France is Paris, since 987, with 2,102,650 people.",
    }

    assert redactor.value(record) == record


@needed
def test_secrets_are_replaced_beside_it() -> None:
    redactor = open_redactor(Settings.load(redact_pii=("EMAIL_ADDRESS",)))

    told = redactor.text("ann.lee@example.org uses sk-canarycanarycanary1")

    assert told == "[redacted:email-address] uses [redacted:api-key]"


@needed
def test_nothing_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)

    assert "@" not in find_pii(list(RECOGNISERS))("write to bob@some-unheard-of.museum today")
