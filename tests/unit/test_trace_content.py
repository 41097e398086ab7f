"""What records keep of texts: bounded, and without a secret even where they are cut."""

import json
import re

import pytest

from hhh_router.trace.content import MAX_CONTENT_BYTES, MAX_CONTENT_CHARS, kept_content
from hhh_router.trace.redact import Redactor
from hhh_router.types import Message

KEY = "sk-canary0123456789abcdef"
PLAIN = Redactor()


def user(text: str) -> Message:
    return Message(role="user", content=text)


def test_the_turns_are_those_that_the_receipts_hash_is_about() -> None:
    messages = [Message(role="system", content="Be kind"), user("Hi")]

    kept = kept_content(messages, None, redactor=PLAIN)

    assert kept == {
        "messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}],
        "response": None,
    }


def test_secrets_and_the_deployments_patterns_are_replaced() -> None:
    redactor = Redactor(patterns=[re.compile(r"CASE-\d+")])

    kept = kept_content([user(f"use {KEY}")], "about CASE-4711", redactor=redactor)

    assert kept["messages"][0]["content"] == "use [redacted:api-key]"
    assert kept["response"] == "about [redacted:own]"


def test_of_too_many_turns_the_latest_are_kept_and_the_cut_is_told() -> None:
    messages = [user("a" * 50), Message(role="assistant", content="b" * 50), user("c" * 80)]

    kept = kept_content(messages, "d" * 120, redactor=PLAIN, most=100)

    assert [m["content"] for m in kept["messages"]] == ["b" * 20, "c" * 80]
    assert kept["response"] == "d" * 100
    assert kept["cut"] == {"messages": 80, "response": 20}


@pytest.mark.parametrize("offset", range(0, len(KEY) + 2, 3))
def test_no_part_of_a_secret_is_left_where_a_text_is_cut(offset: int) -> None:
    start = MAX_CONTENT_CHARS - len(KEY) + offset
    text = ("x " * MAX_CONTENT_CHARS)[: start - 1] + " " + KEY + " y" * 9000

    kept = kept_content([user(text)], text, redactor=PLAIN)

    assert "canary" not in json.dumps(kept)
    assert "sk-c" not in json.dumps(kept)


def test_what_takes_many_bytes_a_character_keeps_within_the_bound() -> None:
    kept = kept_content([user("\N{GRINNING FACE}" * 70_000)], "\x01" * 70_000, redactor=PLAIN)

    assert len(json.dumps(kept)) <= MAX_CONTENT_BYTES
    assert kept["response"]
    assert kept["cut"]["messages"] + len(kept["messages"][0]["content"]) == 70_000
