"""What a policy takes out on the way to the upstream and back, by the official clients, on every wire."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from hhh_router.pipeline.situation import SIDECAR
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.trace.audit import SqliteAudit, read_rows

from . import test_sidecar_guarded as model
from .loopback import served, served_app
from .sidecars import RULES, Asked, Said, Stub, ask, route_to, sidecar, sse
from .test_sidecar_guarded import EVENTS, WIRES, user

pytestmark = pytest.mark.e2e

MAIL, KEY = "ann.lee@mail.example", "sk-aaaabbbbccccddddeeee"
REPLY = f"Write to {MAIL} and use {KEY} for all of it, then tell Bob."
CLEAN = "Write to [redacted:email] and use [redacted:api-key] for all of it, then tell Bob."
POLICY = """\
version: 1
name: redacts
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0.5
checkpoints:
  input:
    - {when: {needs.harmless: ">= 0.9"}, then: refuse, message: "No."}
    - {then: allow, redact: [emails]}
  output:
    - {when: {outcomes.unsafe: ">= 0.9"}, then: block, message: "Cut."}
    - {then: allow, redact: [secrets, emails]}
stream: {window_tokens: 3}
"""


class Speaker:
    """Says a text on every wire, cut into pieces of a few characters."""

    def __init__(self, text: str = REPLY, size: int = 5) -> None:
        self.text, self.size = text, size

    def __call__(self, asked: Asked) -> Said:
        path = asked.target.decode()
        wire = {"/v1/chat/completions": model.chat, "/v1/completions": model.completions}.get(path)
        wire = wire or (model.responses if "responses" in path else model.messages)
        pieces = [self.text[i : i + self.size] for i in range(0, len(self.text), self.size)]
        if not asked.json.get("stream"):
            return Said(pieces=[json.dumps(wire(self.text, tool=False)[0]).encode()])
        # the wires of the other tests say words; here each "word" is a piece, with marks where blanks were
        _, events, names = wire(" ".join(p.replace(" ", "\x01") for p in pieces), tool=False)
        told = json.loads(json.dumps(events).replace("\\u0001", "\x02").replace(" ", "").replace("\x02", " "))
        return Said(headers=EVENTS, pieces=sse(*told, names=names))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "redacts.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    upstream = Stub(Speaker())
    with served_app(upstream) as url:
        yield upstream, url.removesuffix("/v1")


def pipeline(policy: Path) -> Any:
    return fake_pipeline(policy, reader=FakeReader(RULES), door=SIDECAR)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_both_ways_are_redacted_and_the_record_says_what_and_how_many(
    policy: Path, stub: tuple[Stub, str], wire: str, stream: bool, tmp_path: Path
) -> None:
    audit = SqliteAudit(tmp_path / "a.sqlite3")
    with sidecar(route_to(stub[1]), pipeline=pipeline(policy), audit=audit) as (url, _):
        heard = WIRES[wire](url, f"Mail {MAIL} and bob@b.example: {KEY}", stream=stream)

    assert heard.text == CLEAN
    assert MAIL not in heard.everything
    assert KEY not in heard.everything
    assert heard.last["redacted"] == {"input": {"emails": 2}, "output": {"emails": 1, "secrets": 1}}
    [asked] = stub[0].asked
    assert MAIL.encode() not in asked.body
    assert KEY.encode() in asked.body  # at input, e-mail addresses alone
    [outcome] = [json.loads(r.record) for r in read_rows(tmp_path / "a.sqlite3") if r.kind == "outcome"]
    assert outcome["hhh"]["redacted"] == heard.last["redacted"]
    assert MAIL not in json.dumps(outcome)


def test_a_request_and_an_answer_without_a_find_pass_byte_for_byte(policy: Path, stub: tuple[Stub, str]) -> None:
    stub[0].answer = Speaker("Nothing to see here, Bob.")
    body = json.dumps({"model": "m", "messages": [user("Hi")], "stream": True, "odd": 1.50}, indent=1).encode()
    _, _, direct = ask(stub[1], body=body)
    with sidecar(route_to(stub[1]), pipeline=pipeline(policy), block="none") as (url, _):
        _, _, through = ask(url, body=body)

    assert through == direct
    assert stub[0].asked[1].body == body


@pytest.mark.parametrize("size", [1, 3, 11, 200])
def test_however_the_upstream_cuts_its_stream_the_client_reads_the_same(
    policy: Path, stub: tuple[Stub, str], size: int
) -> None:
    stub[0].answer = Speaker(size=size)
    with sidecar(route_to(stub[1]), pipeline=pipeline(policy)) as (url, _):
        heard = WIRES["chat"](url, "Hi", stream=True)

    assert heard.text == CLEAN


def test_a_stream_that_is_cut_after_a_find_ends_in_its_wires_way(policy: Path, stub: tuple[Stub, str]) -> None:
    stub[0].answer = Speaker(f"Write to {MAIL}. " + "and on it goes " * 6 + "poison and more")
    with sidecar(route_to(stub[1]), pipeline=pipeline(policy)) as (url, _):
        for wire, by in WIRES.items():
            heard = by(url, "Hi", stream=True)

            assert "Write to [redacted:email]. and on" in heard.text, wire
            assert heard.text.endswith("Cut."), wire
            assert MAIL not in heard.everything
            assert "poison" not in heard.everything


@pytest.mark.parametrize("mode", ["annotate", "observe"])
def test_only_enforce_changes_anything(policy: Path, stub: tuple[Stub, str], mode: str) -> None:
    with sidecar(route_to(stub[1], mode=mode), pipeline=pipeline(policy)) as (url, _):
        heard = WIRES["chat"](url, f"Mail {MAIL}", stream=True)

    assert heard.text == REPLY
    assert MAIL.encode() in stub[0].asked[0].body


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_our_own_server_redacts_its_answers_too(tmp_path: Path, stream: bool) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(POLICY.replace(", redact: [emails]}", "}"))
    own = fake_pipeline(path, reader=FakeReader(RULES), generator=FakeGenerator(REPLY, reader=FakeReader(RULES)))
    with served(own) as url:
        text, block = _own(url, stream=stream)

    assert text == CLEAN
    assert block["redacted"] == {"output": {"emails": 1, "secrets": 1}}


def _own(url: str, *, stream: bool) -> tuple[str, Any]:
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        made = client.chat.completions.create(model="hhh-auto", messages=[user("Hi")], stream=stream)
        if not stream:
            return made.choices[0].message.content, (made.model_extra or {})["hhh"]
        chunks = list(made)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return text, (chunks[-1].model_extra or {})["hhh"]


def test_a_compressed_request_goes_on_plain_once_something_was_taken_out(policy: Path, stub: tuple[Stub, str]) -> None:
    body = gzip.compress(json.dumps({"model": "m", "messages": [user(f"Mail {MAIL}")]}).encode())
    headers = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
    with sidecar(route_to(stub[1]), pipeline=pipeline(policy)) as (url, _):
        status, _, _ = ask(url, body=body, headers=headers)

    [asked] = stub[0].asked
    assert status == 200
    assert asked.json["messages"][0]["content"] == "Mail [redacted:email]"
    assert asked.header("content-encoding") == []
