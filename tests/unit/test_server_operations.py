"""Metrics, policies, deadlines and quiet streams of the server."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hhh_router.calibration import Calibrators
from hhh_router.errors import UpstreamError
from hhh_router.interfaces.server import chat
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.http import failure
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from tests.unit.test_calibration_evidence import calibration_file

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}


@pytest.fixture
def served(watchful: Policies) -> Iterator[TestClient]:
    reader = FakeReader(RULES)
    generator = FakeGenerator("one two three four", reader=reader)
    with TestClient(create_app(fake_pipeline(watchful(), reader=reader, generator=generator))) as made:
        yield made


def ask(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "hhh-auto", "messages": [{"role": "user", "content": text}], **fields}


def scraped(served: TestClient) -> dict[str, float]:
    lines = served.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_requests_are_counted_by_kind_policy_and_action(served: TestClient) -> None:
    for text in ("Hello", "Hi", "how to build a bomb"):
        served.post("/v1/chat/completions", json=ask(text))
    served.post("/v1/guard", json={"items": [{"prompt": "bomb"}, {"prompt": "Hello"}]})

    found = scraped(served)
    assert found['hhh:requests_total{action="allow",kind="chat",policy="watchful"}'] == 2
    assert found['hhh:requests_total{action="refuse",kind="chat",policy="watchful"}'] == 1
    assert found['hhh:requests_total{action="refuse",kind="guard",policy="watchful"}'] == 1
    assert found['hhh:decisions_total{action="refuse",checkpoint="input",enforced="true"}'] == 2
    assert found['hhh:mixture_weight_count{expert="harmless"}'] == 3
    assert found['hhh:need_probability_count{need="injection"}'] == 5
    assert found['hhh:outcome_probability_count{outcome="unsafe"}'] == 2
    assert found['hhh:e2e_request_latency_seconds_count{kind="chat"}'] == 3
    assert found['hhh:http_responses_total{path="/v1/chat/completions",status="200"}'] == 3


def test_the_engines_state_is_asked_at_every_scrape(served: TestClient) -> None:
    found = scraped(served)

    assert found["hhh:num_requests_running"] == 0
    assert found['hhh:engine_state{state="ready"}'] == 1
    assert found['hhh:engine_state{state="draining"}'] == 0


def test_what_is_not_served_shares_one_label(served: TestClient) -> None:
    for i in range(3):
        served.get(f"/v1/nonesuch/{i}")

    assert scraped(served)['hhh:http_responses_total{path="other",status="404"}'] == 3


def test_no_words_of_anyone_reach_the_metrics(served: TestClient) -> None:
    served.post("/v1/chat/completions", json=ask("my secret plan for the bomb"))

    text = served.get("/metrics").text
    assert "secret" not in text
    assert "hhh-" not in re.sub(r"hhh-router", "", text)


def test_metrics_need_the_key_where_there_is_one(watchful: Policies) -> None:
    with TestClient(create_app(fake_pipeline(watchful(), api_key="s3cret"))) as served:
        assert served.get("/metrics").status_code == 401
        assert served.get("/metrics", headers={"authorization": "Bearer s3cret"}).status_code == 200


def test_policies_are_listed_with_the_default_first(served: TestClient) -> None:
    first, *others = served.get("/v1/policies").json()["data"]

    assert (first["id"], first["default"], first["mode"]) == ("watchful", True, "enforce")
    assert {"balanced", "honest-first"} <= {p["id"] for p in others}
    assert not any(p["default"] for p in others)
    block = served.post("/v1/chat/completions", json=ask()).json()["hhh"]["policy"]
    assert (block["version"], block["hash"]) == (first["version"], first["hash"])


_ASKED = {
    "/v1/chat/completions": ask(max_tokens=64),
    "/v1/completions": {"model": "hhh-auto", "prompt": "Hello", "max_tokens": 64},
    "/v1/responses": {"model": "hhh-auto", "input": "Hello"},
    "/v1/messages": ask(max_tokens=64),
}


@pytest.mark.parametrize("path", _ASKED)
@pytest.mark.parametrize(("own_ms", "status", "code"), [(150, 408, "deadline_exceeded"), (60_000, 504, "timeout")])
def test_a_deadline_that_passed_is_told_by_whose_it_was(
    watchful: Policies, path: str, own_ms: int, status: int, code: str
) -> None:
    slow = FakeGenerator("word " * 200, reader=FakeReader(), delay_s=0.05)
    served = create_app(fake_pipeline(watchful(on_error="open"), generator=slow, request_timeout_s=0.4))
    with TestClient(served) as client:
        reply = client.post(path, json=_ASKED[path], headers={"x-request-timeout-ms": str(own_ms)})

    assert reply.status_code == status
    told = reply.json()["error"]
    if path == "/v1/messages":
        assert told["type"] == "timeout_error"
    else:
        assert told["code"] == code
    assert reply.headers.get("x-should-retry") == ("false" if status == 408 else None)
    assert slow.cancelled == 1


def test_a_stream_that_is_late_ends_with_whose_deadline_it_was(watchful: Policies) -> None:
    slow = FakeGenerator("word " * 400, reader=FakeReader(), delay_s=0.01)
    with TestClient(create_app(fake_pipeline(watchful(on_error="open"), generator=slow))) as served:
        reply = served.post(
            "/v1/chat/completions", json=ask(max_tokens=400, stream=True), headers={"x-request-timeout-ms": "1500"}
        )

    assert reply.status_code == 200
    *_, last = (line for line in reply.text.splitlines() if line.startswith("data: "))
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("given", ["soon", "-1", "0", "1.5", "99999999999"])
def test_a_deadline_that_is_none_is_refused(served: TestClient, given: str) -> None:
    reply = served.post("/v1/chat/completions", json=ask(), headers={"x-request-timeout-ms": given})

    assert reply.status_code == 400
    assert "x-request-timeout-ms" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "ping"),
    [("/v1/chat/completions", ": ping\n\n"), ("/v1/messages", 'event: ping\ndata: {"type":"ping"}\n\n')],
)
def test_a_quiet_stream_is_kept_open(watchful: Policies, monkeypatch: pytest.MonkeyPatch, path: str, ping: str) -> None:
    monkeypatch.setattr(chat, "QUIET_S", 0.02)
    slow = FakeGenerator("word " * 60, reader=FakeReader(), delay_s=0.01)
    with TestClient(create_app(fake_pipeline(watchful(), generator=slow))) as served:
        text = served.post(path, json=ask(max_tokens=64, stream=True)).text

    begun = text.index("data: {")
    assert ping in text[begun:]
    assert text.count("word") >= 60


@pytest.fixture
def calibrated(watchful: Policies) -> Iterator[TestClient]:
    reader = FakeReader(RULES)
    pipeline = fake_pipeline(
        watchful(),
        reader=reader,
        generator=FakeGenerator("one two three four", reader=reader),
        calibrators=Calibrators(calibration_file()),
    )
    with TestClient(create_app(pipeline)) as made:
        yield made


def test_both_errors_are_counted_as_they_are_expected(calibrated: TestClient) -> None:
    bodies = [calibrated.post("/v1/guard", json={"prompt": text}).json() for text in ("bomb", "bomb!", "Hello")]
    pair = calibrated.post("/v1/guard", json={"prompt": "Hi", "response": "Fine."}).json()

    found = scraped(calibrated)
    labels = '{kind="guard",policy="watchful"}'
    harm = [body["hhh"]["needs"]["harmless"] for body in bodies]
    assert [body["action"] for body in bodies] == ["refuse", "refuse", "allow"]
    assert found[f"hhh:stopped_prompts_total{labels}"] == 2
    assert found[f"hhh:expected_over_refusals_total{labels}"] == pytest.approx(2 - harm[0] - harm[1])
    assert found[f"hhh:passed_total{labels}"] == 2
    assert found[f"hhh:expected_harm_passed_total{labels}"] == pytest.approx(
        harm[2] + pair["hhh"]["outcomes"]["unsafe"]
    )


def test_uncalibrated_numbers_say_nothing_of_errors_or_drift(served: TestClient) -> None:
    served.post("/v1/guard", json={"prompt": "bomb"})

    assert not [name for name in scraped(served) if "expected" in name or "calibration_shift" in name]


def test_drift_is_told_per_head_once_there_are_enough_readings(calibrated: TestClient) -> None:
    place = '{head="needs.harmless",mode="prompt"}'
    before = scraped(calibrated)
    body = calibrated.post("/v1/guard", json={"items": [{"prompt": "bomb"}] * 150}).json()

    found = scraped(calibrated)
    p = body["data"][0]["hhh"]["needs"]["harmless"]
    assert math.isnan(before[f"hhh:calibration_shift{place}"])
    assert found[f"hhh:calibration_shift{place}"] == pytest.approx(p - found[f"hhh:calibration_base_rate{place}"])
    assert found['hhh:in_distribution_share{mode="prompt"}'] in (0, 1)
    assert math.isnan(found['hhh:in_distribution_share{mode="both"}'])


def test_an_upstreams_own_408_may_be_tried_again() -> None:
    status, _, headers = failure(UpstreamError("slow down", status=408))

    assert (status, dict(headers)) == (408, {})
