"""Planted secrets must not survive; ordinary text and the block must."""

from __future__ import annotations

import io
import logging
import re
import time
from pathlib import Path

import pytest

from hhh_router.errors import SettingsError
from hhh_router.trace import redact, redact_text
from hhh_router.trace.logs import RedactingFormatter
from hhh_router.trace.redact import Redactor, read_patterns

CANARIES = {
    "openai": "sk-proj-Zx81canaryZx81canaryZx81",
    "anthropic": "sk-ant-api03-canary_canary-canary",
    "stripe": "sk_" + "live_canarycanarycanary1",
    "bearer": "Bearer canary.canary-canary~1",
    "authorization": "Authorization: Basic Y2FuYXJ5OmNhbmFyeQ==",
    "lower case header": "authorization: token canarycanary",
    "aws": "AKIACANARYCANARYCANA",
    "github": "ghp_canarycanarycanarycanary12",
    "hugging face": "hf_canarycanarycanarycanary",
    "slack": "xoxb-1234-canarycanary",
    "google": "AIzaCanaryCanaryCanaryCanaryCanary12345",
    "jwt": "eyJhbGciOiJIUzI1.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJlY2FuYXJ5",
    "url": "postgres://root:canarycanary@db/x",
    "environment": "AWS_SECRET_ACCESS_KEY=canary/canary/canary",
    "json": '{"api_key": "canary canary"}',
    "prose": "the password: canarycanary",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nMIIcanarycanary\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("secret", CANARIES.values(), ids=CANARIES)
@pytest.mark.parametrize("frame", ["{}", "Please use {} for me.", "line one\n{}\nline three"])
def test_no_planted_secret_survives(secret, frame):
    found = redact_text(frame.format(secret))

    assert "[redacted:" in found
    assert "canary" not in found.lower()
    assert "Y2FuYXJ5" not in found
    assert "c2lnbmF0" not in found


def test_text_around_a_secret_stays():
    assert redact_text("use sk-canarycanarycanary1 now") == "use [redacted:api-key] now"


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "max_tokens: 512, temperature = 0.7",
        "A bearer of good news; the token ring; secret: no",
        "I love risk-taking and task-oriented work.",
        "https://example.org/path?x=1 and 10:30@noon",
        "sk-learn is scikit-learn",
        "f37bdf3a1c 0123456789abcdef0123456789abcdef",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert redact_text(text) == text


def test_values_under_a_secrets_name_go_whatever_they_look_like():
    found = redact(
        {
            "headers": {"Authorization": "canary", "X-API-Key": "canary", "Set-Cookie": ["canary"], "Accept": "json"},
            "tools": [{"client_secret": "canary", "session_token": "canary", "password": {"deep": "canary"}}],
            "max_tokens": 7,
            "total_tokens": 9,
            "api_key": None,
        }
    )

    assert "canary" not in str(found)
    assert found["headers"]["Accept"] == "json"
    assert (found["max_tokens"], found["total_tokens"], found["api_key"]) == (7, 9, None)


def test_a_secret_used_as_a_key_goes_too():
    assert redact({"sk-canarycanarycanary1": 1}) == {"[redacted:api-key]": 1}


def test_emails_go_only_when_asked():
    text = "write to jane.doe@example.org"

    assert redact_text(text) == text
    assert redact_text(text, emails=True) == "write to [redacted:email]"


def test_redacting_twice_changes_nothing_more():
    once = redact_text("\n".join(CANARIES.values()))

    assert redact_text(once) == once


@pytest.mark.parametrize(
    "unit",
    ["a", "a_", "-----BEGIN PRIVATE KEY-----", "eyJ", "token ", "authorization:", "://a:", "bearer ", "a@a.", '="'],
)
def test_a_hostile_text_takes_no_unreasonable_time(unit):
    text = unit * (200_000 // len(unit))
    begun = time.perf_counter()

    redact_text(text, emails=True)

    assert time.perf_counter() - begun < 5.0  # quadratic behaviour would take minutes


def test_patterns_of_a_file_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("# our cases\n\nCASE-\\d+\n\\bEMP[0-9]{4}\\b\n")

    redactor = Redactor(patterns=read_patterns(tmp_path / "p"))

    assert redactor.value({"a": ["CASE-12 of EMP0007"], "EMP0007": 1}) == {
        "a": ["[redacted:own] of [redacted:own]"],
        "[redacted:own]": 1,
    }


def test_every_mistake_of_a_file_of_patterns_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("CASE-\\d+\n(\nx*\n")

    with pytest.raises(SettingsError) as raised:
        read_patterns(tmp_path / "p")

    first, second = raised.value.message.splitlines()
    assert first.startswith(f"{tmp_path / 'p'}:2  no regular expression:")
    assert second.startswith(f"{tmp_path / 'p'}:3  it matches nothing at all")


@pytest.mark.parametrize(
    ("content", "told"), [(None, "cannot be read"), (b"\xff\xfe", "no UTF-8"), (b"x\n" * 60_000, "more")]
)
def test_a_file_of_patterns_that_cannot_be_read_is_told(tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "p").write_bytes(content)

    with pytest.raises(SettingsError, match=told):
        read_patterns(tmp_path / "p")


def test_logs_of_a_command_hold_no_secret_of_message_arguments_or_traceback() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(
        RedactingFormatter(Redactor(patterns=[re.compile(r"CASE-\d+")]), logging.Formatter("%(message)s"))
    )
    logger = logging.Logger("x")
    logger.addHandler(handler)
    try:
        raise ValueError("of CASE-4711 with sk-canarycanarycanary1")
    except ValueError:
        logger.exception("about %s: password=%s", "CASE-12", "canarycanary")

    assert written.getvalue().startswith("about [redacted:own]: password=[redacted:secret]\nTraceback")
    assert "ValueError: of [redacted:own] with [redacted:api-key]" in written.getvalue()
    assert "canary" not in written.getvalue()
