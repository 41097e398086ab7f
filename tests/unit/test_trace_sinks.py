"""Where records go: what is stored, what never is, and what happens when storing fails."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading

import pytest
from test_trace_build import block

from hhh_router.errors import SettingsError
from hhh_router.trace import JsonlSink, LogSink, Metadata, NullSink, Sink
from hhh_router.types import ChatRequest, GuardRequest, Message, ReadRequest

PROMPT = "tell me a CANARY-PROMPT"
REPLY = "here is a CANARY-REPLY"
ASKED = ChatRequest(
    messages=(Message(role="user", content=f"{PROMPT} with sk-canarycanarycanary1"),),
    passthrough={"extra_headers": {"Authorization": "Bearer canarycanary"}},
)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_time_and_block_and_by_default_no_text(tmp_path):
    JsonlSink(tmp_path / "trace.jsonl", clock=lambda: 0.0).write(block(), ASKED, REPLY)

    [record] = lines(tmp_path / "trace.jsonl")
    assert record["time"] == "1970-01-01T00:00:00.000+00:00"
    assert Metadata.model_validate(record["hhh"]) == block()
    assert set(record) == {"time", "hhh"}
    assert "CANARY" not in (tmp_path / "trace.jsonl").read_text()


def test_full_content_holds_the_texts_without_their_secrets(tmp_path):
    JsonlSink(tmp_path / "trace.jsonl", "full").write(block(), ASKED, REPLY)

    text = (tmp_path / "trace.jsonl").read_text()
    [record] = lines(tmp_path / "trace.jsonl")
    assert record["request"]["messages"][0]["content"] == f"{PROMPT} with [redacted:api-key]"
    assert record["reply"] == REPLY
    assert "canary" not in text  # the planted secrets are lower case, the texts upper case


def test_full_content_of_a_guard_request_holds_the_response(tmp_path):
    asked = GuardRequest(read=ReadRequest(response="judge this"))
    JsonlSink(tmp_path / "trace.jsonl", "full").write(block(), asked, None)

    [record] = lines(tmp_path / "trace.jsonl")
    assert record["request"] == {"messages": [], "response": "judge this"}
    assert record["reply"] is None


def test_a_line_that_is_too_long_keeps_the_block_and_says_what_is_missing(tmp_path):
    sink = JsonlSink(tmp_path / "trace.jsonl", "full", max_line_bytes=10_000)
    sink.write(block(), ASKED, "x" * 10_000)

    [record] = lines(tmp_path / "trace.jsonl")
    assert "request" not in record
    assert "the line would take" in record["content_left_out"]
    assert Metadata.model_validate(record["hhh"]) == block()


def test_newlines_and_broken_characters_stay_within_one_line(tmp_path):
    JsonlSink(tmp_path / "trace.jsonl", "full").write(block(), ASKED, "a\nb\u2028c\ud800")

    [record] = lines(tmp_path / "trace.jsonl")
    assert record["reply"] == "a\nb\u2028c\ud800"


def test_the_file_is_for_its_owner_alone(tmp_path):
    JsonlSink(tmp_path / "trace.jsonl")

    assert stat.S_IMODE((tmp_path / "trace.jsonl").stat().st_mode) == 0o600


def test_writers_in_parallel_lose_and_mix_no_line(tmp_path):
    sinks = [JsonlSink(tmp_path / "trace.jsonl") for _ in range(4)]

    def write(sink):
        for _ in range(50):
            sink.write(block(), ASKED, REPLY)

    threads = [threading.Thread(target=write, args=(sink,)) for sink in sinks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(lines(tmp_path / "trace.jsonl")) == 200


def test_a_rotated_file_is_begun_anew(tmp_path):
    sink = JsonlSink(tmp_path / "trace.jsonl")
    sink.write(block(), ASKED, REPLY)
    (tmp_path / "trace.jsonl").rename(tmp_path / "old.jsonl")
    sink.write(block(), ASKED, REPLY)

    assert len(lines(tmp_path / "old.jsonl")) == len(lines(tmp_path / "trace.jsonl")) == 1


@pytest.mark.parametrize("where", ["missing/trace.jsonl", "."])
def test_a_file_that_cannot_be_written_stops_the_start_by_name(tmp_path, where):
    with pytest.raises(SettingsError, match="the trace cannot be written") as error:
        JsonlSink(tmp_path / where)

    assert str(tmp_path) in error.value.message


def test_an_unknown_content_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="'everything' is not known"):
        JsonlSink(tmp_path / "trace.jsonl", "everything")  # type: ignore[arg-type]


def test_a_sink_that_fails_later_logs_and_counts_and_raises_nothing(tmp_path, caplog):
    sink = JsonlSink(tmp_path / "trace.jsonl", "full")
    (tmp_path / "trace.jsonl").unlink()
    (tmp_path / "trace.jsonl").mkdir()

    sink.write(block(), ASKED, REPLY)
    sink.write(block(), ASKED, REPLY)

    assert sink.failures == 2
    assert "record of request hhh-1 not stored (Is a directory); 2 lost since start" in caplog.text
    assert "canary" not in caplog.text.lower()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")  # noqa: PTH110
def test_a_full_disk_loses_the_record_and_not_the_request(caplog):
    sink = JsonlSink("/dev/full")

    sink.write(block(), ASKED, REPLY)

    assert sink.failures == 1
    assert "No space left on device" in caplog.text


def test_a_passthrough_nested_beyond_reason_loses_the_record_and_not_the_request(tmp_path, caplog):
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep}
    sink = JsonlSink(tmp_path / "trace.jsonl", "full")
    sink.write(block(), ChatRequest(messages=ASKED.messages, passthrough=deep), REPLY)

    assert sink.failures == 1
    assert "no JSON can be made of it: RecursionError" in caplog.text
    assert (tmp_path / "trace.jsonl").read_text() == ""


def test_half_a_line_spoils_itself_alone(tmp_path, monkeypatch):
    sink = JsonlSink(tmp_path / "trace.jsonl")
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100]))
    sink.write(block(), ASKED, REPLY)
    monkeypatch.undo()
    sink.write(block(), ASKED, REPLY)

    half, whole = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert sink.failures == 1
    assert len(half) == 100
    assert Metadata.model_validate(json.loads(whole)["hhh"]) == block()


def test_the_log_has_one_line_a_request_and_no_text(caplog):
    with caplog.at_level(logging.INFO):
        LogSink().write(block(), ASKED, REPLY)

    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == ("request id=hhh-1 policy=balanced@3 action=refuse rule=on_error latency_ms=99.0")


def test_an_id_that_a_client_chose_cannot_forge_a_line_or_leak_a_secret(caplog):
    forged = block(request_id="x\nrequest id=y action=allow sk-canarycanarycanary1")
    with caplog.at_level(logging.INFO):
        LogSink().write(forged, ASKED, REPLY)

    [record] = caplog.records
    assert "\n" not in record.getMessage()
    assert "id=x_request_id=y_action=allow_[redacted:api-key] " in record.getMessage()


def test_every_sink_takes_the_same_call(tmp_path):
    sinks: list[Sink] = [NullSink(), LogSink(), JsonlSink(tmp_path / "trace.jsonl")]

    assert [sink.write(block(), ASKED, None) for sink in sinks] == [None, None, None]
