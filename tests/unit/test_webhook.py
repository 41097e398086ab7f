"""Webhooks: signed, tried again, and never in the way."""

import asyncio
import hashlib
import hmac
import json
import re

import httpx
from pydantic import SecretStr

from hhh_router.interfaces.webhook import SIGNATURE, TRIES, Webhook
from hhh_router.trace.redact import Redactor


def hook(answers: list[object], secret: str | None = "hush") -> tuple[Webhook, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return httpx.Response(found)

    transport = httpx.MockTransport(answer)
    made = Webhook(
        None if secret is None else SecretStr(secret), clock=lambda: 12.9, transport=transport, pause_s=0.001
    )
    return made, seen


async def test_the_body_is_signed_with_its_time() -> None:
    webhook, seen = hook([204])

    webhook.tell("https://h.example/x", {"event": "held"})
    await webhook.aclose()

    [request] = seen
    assert json.loads(request.content) == {"event": "held"}
    expected = hmac.new(b"hush", b"12." + request.content, hashlib.sha256).hexdigest()
    assert request.headers[SIGNATURE] == f"t=12,v1={expected}"


async def test_without_a_secret_nothing_is_signed() -> None:
    webhook, seen = hook([200], secret=None)

    webhook.tell("https://h.example/x", {})
    await webhook.aclose()

    assert SIGNATURE not in seen[0].headers


async def test_what_may_pass_is_tried_again_and_what_will_not_is_left() -> None:
    webhook, seen = hook([503, httpx.ConnectError("no"), 200])
    webhook.tell("https://h.example/x", {})
    await webhook.aclose()
    refused, asked = hook([404])
    refused.tell("https://h.example/x", {})
    await refused.aclose()
    dead, tried = hook([httpx.ConnectError("no")] * TRIES)
    dead.tell("https://h.example/x", {})
    await dead.aclose()

    assert (len(seen), webhook.failures) == (3, 0)
    assert (len(asked), refused.failures) == (1, 1)
    assert (len(tried), dead.failures) == (TRIES, 1)


async def test_nobody_waits_for_a_url_that_does_not_answer() -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    webhook = Webhook(None, transport=httpx.MockTransport(never))
    webhook.tell("https://h.example/x", {})

    async with asyncio.timeout(5):
        await webhook.aclose(0.05)


async def test_secrets_and_the_deployments_own_patterns_are_not_told() -> None:
    seen: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.content)
        return httpx.Response(204)

    redactor = Redactor(patterns=[re.compile(r"CASE-\d+")])
    webhook = Webhook(None, transport=httpx.MockTransport(answer), redactor=redactor)

    webhook.tell("https://h.example/x", {"reason": "CASE-4711", "arguments": {"api_key": "hunter2hunter2"}})
    await webhook.aclose()

    assert [json.loads(body) for body in seen] == [
        {"reason": "[redacted:own]", "arguments": {"api_key": "[redacted:key]"}}
    ]
