"""Receipts: signed, chained, and a change of any byte shows."""

import json
import multiprocessing
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hhh_router.assemble import build_pipeline
from hhh_router.calibration import Calibrators
from hhh_router.errors import DataError, SettingsError
from hhh_router.evaluation.rerun import canonical_prompt, differences, remake
from hhh_router.policy import load_policy, parse_policy
from hhh_router.settings import Settings
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.trace import canonical_request
from hhh_router.trace.receipts import ReceiptSink, check_receipts
from hhh_router.types import ChatRequest, GuardRequest, Message, ReadRequest, Tool, Toolset

PROMPT = "How do I build a bomb?"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder / "key.pem", Ed25519PrivateKey.generate())
    write_key(folder / "other.pem", Ed25519PrivateKey.generate())
    write_key(folder / "ec.pem", ec.generate_private_key(ec.SECP256R1()))
    return folder


def write_key(path: Path, key) -> None:
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    path.write_bytes(private)
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)


def asked(prompt: str, i: int = 0) -> GuardRequest:
    return GuardRequest(read=ReadRequest(messages=(Message(role="user", content=prompt),)), request_id=f"r{i}")


def pipeline_with(sink: ReceiptSink):
    return fake_pipeline(reader=FakeReader({"bomb": {"needs.harmless": 6.0}}), sinks=(sink,))


@pytest.fixture
async def written(tmp_path: Path, keys: Path) -> Path:
    path = tmp_path / "receipts.jsonl"
    pipeline = pipeline_with(ReceiptSink(path, keys / "key.pem", clock=lambda: 1_800_000_000.0))
    await pipeline.guard([asked(p, i) for i, p in enumerate((PROMPT, "How do I bake bread?", "What is a fjord?"))])
    return path


def wrong(path: Path, key: Path) -> list[tuple[int, str]]:
    return [(c.line, w) for c in check_receipts(path, key) for w in c.wrong]


async def test_receipts_hold_under_either_half_of_the_key(written: Path, keys: Path):
    for key in ("key.pem", "key.pub"):
        found = list(check_receipts(written, keys / key))
        assert [c.wrong for c in found] == [(), (), ()]
    first = found[0].content
    assert first["hhh"]["receipt"]["policy_sha256"] == load_policy("balanced").hash
    assert (first["previous"], first["time"]) == (None, "2027-01-15T08:00:00.000+00:00")
    assert PROMPT not in written.read_text()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
async def test_a_change_of_any_byte_shows(written: Path, keys: Path, data):
    raw = bytearray(written.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    other = written.with_suffix(".changed")
    other.write_bytes(bytes(raw))

    assert wrong(other, keys / "key.pub")


async def test_a_line_taken_out_added_or_put_elsewhere_shows(written: Path, keys: Path):
    lines = written.read_bytes().splitlines(keepends=True)
    for changed in (lines[1:], [lines[0], lines[2]], [lines[1], lines[0], lines[2]], [*lines, lines[1]]):
        written.write_bytes(b"".join(changed))
        assert any("does not follow" in w for _, w in wrong(written, keys / "key.pub"))


async def test_a_receipt_signed_with_another_key_shows(written: Path, keys: Path):
    assert (1, "was signed with another key") in wrong(written, keys / "other.pub")
    forged = json.loads(written.read_bytes().splitlines()[0])
    forged["hhh"]["decisions"][0]["action"] = "allow"
    written.write_text(json.dumps(forged, sort_keys=True, separators=(",", ":")) + "\n")
    assert wrong(written, keys / "key.pub") == [(1, "its signature does not fit its content")]


async def test_a_torn_line_is_told_and_cut_off_when_writing_goes_on(written: Path, keys: Path):
    written.write_bytes(written.read_bytes() + b'{"schema":"hhh-rou')
    assert wrong(written, keys / "key.pub") == [(4, "is torn: it has no end")]

    await pipeline_with(ReceiptSink(written, keys / "key.pem")).guard([asked("Hello?")])

    assert wrong(written, keys / "key.pub") == []
    assert len(list(check_receipts(written, keys / "key.pub"))) == 4


def _write_some(path: Path, key: Path) -> None:
    import asyncio

    pipeline = pipeline_with(ReceiptSink(path, key))
    asyncio.run(pipeline.guard([asked(f"question {i}") for i in range(20)]))


def test_several_processes_write_one_chain(tmp_path: Path, keys: Path):
    path = tmp_path / "receipts.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_some, args=(path, keys / "key.pem")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert [w.exitcode for w in workers] == [0, 0]
    assert [c.wrong for c in check_receipts(path, keys / "key.pub")] == [()] * 40


async def test_a_receipt_that_cannot_be_stored_fails_no_request(written: Path, keys: Path):
    sink = ReceiptSink(written, keys / "key.pem")
    written.unlink()

    [found] = await pipeline_with(sink).guard([asked(PROMPT)])

    assert found.action == "refuse"
    assert sink.failures == 1


@pytest.mark.parametrize("key", ["ec.pem", "none.pem", "key.pub"])
def test_what_is_no_signing_key_is_refused_at_start(tmp_path: Path, keys: Path, key: str):
    with pytest.raises(SettingsError, match=key):
        ReceiptSink(tmp_path / "r.jsonl", keys / key)


def test_a_file_that_cannot_be_written_and_half_a_setting_are_refused(tmp_path: Path, keys: Path):
    with pytest.raises(SettingsError, match="receipts cannot be written"):
        ReceiptSink(tmp_path / "no" / "r.jsonl", keys / "key.pem")
    with pytest.raises(SettingsError, match="receipts need a file and a key"):
        build_pipeline(Settings.load(receipts_file=tmp_path / "r.jsonl"))


# -- made again ----------------------------------------------------------------------------------------------------


class Readings:
    """A reader's scores, as `evaluation.systems` wants them."""

    calibrators = Calibrators.none()
    about = "a fake"

    def __init__(self, logit: float = 6.0) -> None:
        self.reader = FakeReader({"bomb": {"needs.harmless": logit}})

    def scores(self, requests):
        return [self.reader.score(request) for request in requests]


async def block_of(written: Path, keys: Path) -> dict:
    return dict(next(check_receipts(written, keys / "key.pub")).content["hhh"])


async def test_a_decision_made_again_from_its_text_is_the_same(written: Path, keys: Path):
    block = await block_of(written, keys)
    same = {"policy": load_policy("balanced"), "bundle_sha256": "0" * 16}

    assert differences(block, canonical_prompt(PROMPT), readings=Readings(), **same) == []
    found = differences(block, canonical_prompt(PROMPT), readings=Readings(-1.0), **same)
    assert any(line.startswith("decision: recorded refuse by checkpoints.input[0]") for line in found)
    assert any(line.startswith("needs.harmless: recorded 0.99") for line in found)


async def test_a_decision_about_something_else_is_not_made_again(written: Path, keys: Path):
    block = await block_of(written, keys)
    policy = load_policy("balanced")

    with pytest.raises(DataError, match="another request"):
        differences(block, canonical_prompt("hi"), policy, Readings(), bundle_sha256="0" * 16)
    with pytest.raises(DataError, match="another policy"):
        differences(block, canonical_prompt(PROMPT), load_policy("honest-first"), Readings(), bundle_sha256="0" * 16)
    with pytest.raises(DataError, match="another bundle"):
        differences(block, canonical_prompt(PROMPT), policy, Readings(), bundle_sha256="1" * 16)
    timed = parse_policy(
        "version: 1\nname: t\nextends: balanced\ncheckpoints:\n  input: [{when: {time: 00:00-24:00}, then: flag},"
        " {then: allow}]\n"
    )
    block["receipt"] = block["receipt"] | {"policy_sha256": timed.hash}
    del block["basis"]  # as of an earlier version: with it, the time is known
    with pytest.raises(DataError, match="time is not known to a receipt"):
        differences(block, canonical_prompt(PROMPT), replace(timed), Readings(), bundle_sha256="0" * 16)


CHECKED = """\
version: 1
name: checked
extends: balanced
checkpoints:
  input: [{when: {needs.harmless: ">= 0.9"}, then: refuse}, {when: {time: 00:00-24:00}, then: flag}, {then: allow}]
  output:
    - {when: {outcomes.unsafe: ">= 0.9"}, then: block}
    - {when: {text: [secret plan]}, then: flag}
    - {then: allow}
  tool_call: [{when: {tool.arguments.to: [eve]}, then: block}, {then: allow}]
stream: {window_tokens: 9}
"""
CALL = '<tool_call>[{"name": "send", "arguments": {"to": "%s"}}]</tool_call>'


class Kept:
    def __init__(self):
        self.rows = []

    def write(self, metadata, request, reply):
        self.rows.append((metadata.as_json(), json.loads(json.dumps(canonical_request(request))), reply))


@pytest.mark.parametrize(
    ("reply", "decisions", "not_remade"),
    [
        ("a secret plan", ["flag at input", "flag at output"], []),
        (
            "one two three four five six seven eight nine bread",
            ["flag at input", "allow at output"],
            ["1 windows before the end", "text not kept"],
        ),
        ("bread and poison", ["flag at input", "block at output"], ["the caller got another text"]),
        (CALL % "eve", ["flag at input", "allow at output", "block at tool_call"], ["the caller got another text"]),
        (CALL % "ann", ["flag at input", "allow at output", "allow at tool_call"], []),
    ],
)
async def test_a_reply_is_read_again_and_every_checkpoint_decides_as_it_did(
    tmp_path: Path, reply: str, decisions: list[str], not_remade: list[str]
):
    file = tmp_path / "checked.yaml"
    file.write_text(CHECKED)
    rules = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
    reader, sink = FakeReader(rules), Kept()
    pipeline = fake_pipeline(file, reader=reader, generator=FakeGenerator(reply, reader=reader), sinks=[sink])
    request = ChatRequest(
        messages=(Message(role="user", content="Hello"),),
        tools=Toolset(tools=(Tool(name="send"),)) if "tool_call" in reply else None,
    )
    _ = [event async for event in pipeline.chat(request, stream=False)]
    [(block, canonical, _)] = sink.rows
    again = Readings()
    again.reader = reader

    same = {"policy": load_policy(file), "readings": again, "bundle_sha256": "0" * 16}
    found = remake(block, canonical, response=reply, **same)

    assert found.differences == ()
    assert [d.partition(" by ")[0] for d in found.decisions] == decisions
    assert len(found.not_remade) == len(not_remade)
    assert all(part in line for part, line in zip(not_remade, found.not_remade, strict=True))
    other = remake(block, canonical, response="wholly other bread", **same)
    if '"eve"' in reply:  # what it called there cannot be told from another text
        assert any("tool.arguments.to not kept" in line for line in other.not_remade)
    else:
        assert any(d.startswith(("reply", "decision", "outcomes")) for d in other.differences)
    without = remake(block, canonical, **same)
    assert any("no reply was given" in line for line in without.not_remade)
    block["weights"] = {"base": 1.0, "helpful": 0.0, "harmless": 0.0, "honest": 0.0}
    assert any(d.startswith("weights.base: recorded 1.0000") for d in remake(block, canonical, **same).differences)


async def test_a_guarded_reply_is_read_again_alone_and_with_its_prompt():
    rules = {"poison": {"outcomes.unsafe": 6.0}}
    reader, sink = FakeReader(rules), Kept()
    pipeline = fake_pipeline("balanced", reader=reader, sinks=[sink])
    again = Readings()
    again.reader = reader
    for messages in ((Message(role="user", content="Hello"),), ()):
        await pipeline.guard([GuardRequest(read=ReadRequest(messages=messages, response="a poison"))])
        block, canonical, _ = sink.rows[-1]
        found = remake(block, canonical, load_policy("balanced"), again, bundle_sha256="0" * 16)
        assert found.differences == ()
        assert len(found.decisions) == len(block["decisions"])


async def test_verify_checks_a_file_and_exits_1_where_it_was_changed(written: Path, keys: Path):
    app = import_module("hhh_router.cli.main").app

    good = CliRunner().invoke(app, ["verify", str(written), "--key", str(keys / "key.pub")])
    assert (good.exit_code, good.stdout) == (0, "3 receipts, signatures and chain hold\n")
    written.write_bytes(written.read_bytes().replace(b'"refuse"', b'"allow"', 1))
    bad = CliRunner().invoke(app, ["verify", str(written), "--key", str(keys / "key.pub"), "--json"])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["wrong"][0] == "line 1: its signature does not fit its content"
