"""Requests through a sidecar, its real audit, and the command that decides them again."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hhh_router.bundle import Bundle
from hhh_router.cli.main import app as command
from hhh_router.pipeline.situation import SIDECAR
from hhh_router.settings import Settings
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.trace import JsonlSink
from hhh_router.trace.audit import SqliteAudit, read_rows

from .loopback import served_app
from .sidecars import Stub, ask, route_to, sidecar
from .test_sidecar_guarded import Model, user

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 40.0}, "knife": {"needs.harmless": 2.0}, "poison": {"outcomes.unsafe": 40.0}}
PROMPTS = ["a bomb", "bread", "a knife", "trouble", "tea", "a knife, please", "use a tool"]
OTHER = """\
version: 1
name: other
weights: {helpful: 2, harmless: 1, honest: 1}
strength: 0.5
checkpoints:
  input:
    - {when: {needs.harmless: ">= 0.3", tenant: "not in [b*]"}, then: refuse}
    - {when: {needs.harmless: "< 0.3", text: ['\\btea\\b']}, then: block}
    - {then: allow}
  output: [{when: {outcomes.unsafe: ">= 0.9"}, then: block}, {then: allow}]
  tool_call: [{when: {tool.name: [send], tool.arguments.x: [poison]}, then: block}, {then: allow}]
"""


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, ["replay", *arguments])
    return result.exit_code, result.output


@pytest.fixture
def recorded(watchful: Policies, tmp_path: Path) -> dict[str, Path]:
    """The audit and the trace of the prompts, half of them streamed."""
    calibrators = import_module("hhh_router.cli.drift").bundle_calibrators(Bundle.load(Settings.load().bundle))
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES), door=SIDECAR, calibrators=calibrators)
    paths = {"audit": tmp_path / "audit.sqlite3", "trace": tmp_path / "trace.jsonl", "policy": watchful()}
    pipeline.add_sink(JsonlSink(paths["trace"], "full"))
    with (
        served_app(Stub(Model())) as upstream,
        sidecar(route_to(upstream.removesuffix("/v1")), pipeline=pipeline, audit=SqliteAudit(paths["audit"])) as (
            url,
            _,
        ),
    ):
        for i, prompt in enumerate(PROMPTS):
            ask(url, body={"model": "big", "messages": [user(prompt)], "stream": bool(i % 2)})
    return paths


def test_an_audit_decides_again_what_it_recorded(recorded: dict[str, Path]) -> None:
    policy, audit = str(recorded["policy"]), f"audit:{recorded['audit']}"
    code, output = run("--from", audit, "--policy", policy, "--against", policy, "--json", "--max-flips", "0")

    told: dict[str, Any] = json.loads(output)
    assert code == 0
    assert told["flips"] == {"newly stopped": 0, "newly passed": 0, "other action": 0, "same": len(PROMPTS)}
    assert told["recorded"] == {"n": len(PROMPTS), "same": len(PROMPTS), "unknown": 0, "differences": []}
    assert not any("a bomb" in row.record for row in read_rows(recorded["audit"]))  # no text is needed for it


def test_what_an_audit_does_not_keep_is_unknown_and_a_trace_with_texts_tells_it(
    recorded: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(OTHER)
    policies = ("--policy", str(recorded["policy"]), "--against", str(other))

    _, of_audit = run("--from", str(recorded["audit"]), *policies, "--json")
    code, shown = run("--from", str(recorded["audit"]), *policies, "--max-flips", "3")
    _, of_trace = run("--from", str(recorded["trace"]), *policies, "--json", "--html", str(tmp_path / "page.html"))

    flips = json.loads(of_audit)["flips"]
    assert (flips["newly stopped"], flips["unknown"]) == (2, 4)  # both knives; whether it is tea no hash can tell
    assert code == 1
    assert "flips: 2 and 4 unknown, at most 3 are accepted" in shown
    assert "input: allow or block, text not kept" in shown
    assert json.loads(of_trace)["flips"]["newly stopped"] == 3  # the tea, too
    assert "a knife, please" in (tmp_path / "page.html").read_text()


def test_an_audit_that_keeps_texts_tells_what_rules_on_texts_would_say(watchful: Policies, tmp_path: Path) -> None:
    calibrators = import_module("hhh_router.cli.drift").bundle_calibrators(Bundle.load(Settings.load().bundle))
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES), door=SIDECAR, calibrators=calibrators)
    other, audit = tmp_path / "other.yaml", tmp_path / "full.sqlite3"
    other.write_text(OTHER)
    with served_app(Stub(Model())) as upstream:
        route = route_to(upstream.removesuffix("/v1"))
        with sidecar(route, pipeline=pipeline, audit=SqliteAudit(audit), audit_content="full") as (url, _):
            for prompt in ("tea", "bread", "tea for sk-aaaabbbbccccdddd"):
                ask(url, body={"model": "big", "messages": [user(prompt)]})

    _, output = run("--from", str(audit), "--policy", str(watchful()), "--against", str(other), "--json")

    flips = json.loads(output)["flips"]
    assert (flips["newly stopped"], flips["same"], flips["unknown"]) == (
        1,
        1,
        1,
    )  # a text without its secret is another


def test_labels_make_both_errors_and_unknown_ones_count_at_their_worst(
    recorded: dict[str, Path], tmp_path: Path
) -> None:
    other, labels = tmp_path / "other.yaml", tmp_path / "labels.jsonl"
    other.write_text(OTHER)
    ids = [row.request_id for row in read_rows(recorded["audit"]) if row.kind == "outcome"]
    rows = [
        {"request_id": name, "labels": {"harmful": "bomb" in prompt}} for name, prompt in zip(ids, PROMPTS, strict=True)
    ]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ("--policy", str(recorded["policy"]), "--against", str(other), "--labels", str(labels), "--json")

    code, output = run("--from", str(recorded["audit"]), *shared, "--max-benign", "0.5")

    errors = json.loads(output[: output.rindex("}") + 1])["errors"]
    assert errors["harm_passed"] | {"difference_interval": None} == {
        "n": 1, "unknown": 0, "before": 0.0, "after": 0.0, "difference": 0.0, "difference_interval": None,
    }  # fmt: skip
    assert (errors["benign_refused"]["n"], errors["benign_refused"]["unknown"]) == (2, 4)
    assert code == 1

    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"request_id": "a", "labels": {}}\n')
    code, output = run("--from", str(recorded["audit"]), *shared[:4], "--labels", str(wrong))
    assert code == 2
    assert "no request_id with labels.harmful" in output


def test_records_that_cannot_be_decided_again_are_told(recorded: dict[str, Path], tmp_path: Path) -> None:
    lines = recorded["trace"].read_text().splitlines()
    for line in lines:
        row = json.loads(line)
        del row["hhh"]["basis"]
        with (tmp_path / "old.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    policy = str(recorded["policy"])

    code, output = run("--from", str(tmp_path / "old.jsonl"), "--policy", policy, "--against", policy)

    assert code == 2
    assert "keeps no readings" in output
    code, output = run("--from", str(recorded["audit"]), "--policy", policy, "--against", policy, "--answers", "1")
    assert "keeps no texts to answer" in output
