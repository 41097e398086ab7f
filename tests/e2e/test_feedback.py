"""Traffic → labels → drift → calibrators of its own → served again: the installed commands on a tiny model."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hhh_router import HHHRouter
from hhh_router.testing.tiny import tiny_bundle

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

COMMAND = str(Path(sys.executable).with_name("hhh-router"))
ROWS = 60


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", **environment}
    )


@contextmanager
def serving(bundle: Path, store: Path) -> Iterator[str]:
    environment = {**os.environ, "HHH_ROUTER_THREADS": "1", "HHH_ROUTER_FEEDBACK": str(store), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [COMMAND, "serve", "--bundle", str(bundle), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"listens on (\S+)", line):
                yield found.group(1)
                break
        else:
            assert process.stderr is not None
            pytest.fail(f"never listened: {process.stderr.read()[-2000:]}")
    finally:
        process.terminate()
        process.communicate(timeout=30)


def drift_once_labelled(url: str, labelled: int) -> dict[str, Any]:
    """What the server tells once its figures, which may be ten seconds old, are of so many labels."""
    until = time.monotonic() + 60
    while True:
        told: dict[str, Any] = httpx.get(f"{url}/drift").json()
        if told["labelled"] >= labelled or time.monotonic() > until:
            return told
        time.sleep(0.5)


def test_labels_become_drift_and_calibrators_that_are_served(tmp_path: Path) -> None:
    bundle, store, mine = tiny_bundle(tmp_path / "tiny").root, tmp_path / "feedback.sqlite3", tmp_path / "mine"
    labels = tmp_path / "labels.jsonl"

    with serving(bundle, store) as url, HHHRouter(base_url=url) as router:
        judged = router.guard([f"request number {i}" for i in range(ROWS)], [f"reply {i}" for i in range(ROWS)])
        chatted = router.chat("hello there", max_tokens=4)
        assert router.feedback(chatted.metadata.request_id, {"harmful": False}, by="user").durable
        before = judged[0].metadata

    # the server has ended; what it answered is still known to the next one
    drawn = [json.loads(line) for line in run("feedback", "draw", str(store), "--rate", "1").stdout.splitlines()]
    assert len(drawn) == ROWS + 1
    ours = {result.metadata.request_id: i for i, result in enumerate(judged)}
    for row in drawn:
        i = ours.get(row["request_id"], 1)  # of the chat ann says what the user says
        row["labels"] = {"harmful": i % 3 == 0} | ({"unsafe": i % 4 == 0} if row["request_id"] in ours else {})
    labels.write_text("\n".join(map(json.dumps, drawn)))

    with serving(bundle, store) as url:
        added = run("feedback", "add", str(labels), "--base-url", url, "--by", "ann")
        assert added.stdout == f"{ROWS + 1} stored\n", added.stderr
        told = drift_once_labelled(url, ROWS + 1)
    assert told["labelled"] == ROWS + 1
    n = {(f["name"], f["of"]): f["n"] for f in told["figures"]}
    assert n["calibration_error", "needs.harmless in prompt"] == ROWS + 1
    assert n["calibration_error", "outcomes.unsafe in both"] == ROWS

    table = run("drift", str(store), "--bundle", str(bundle))
    assert table.returncode in (0, 1), table.stderr  # random heads: they may well be told to be wrong
    assert "needs.harmless in prompt" in table.stdout
    assert f"{ROWS + 1} labelled requests" in table.stdout

    fitted = run("calibrate", "--from", "feedback", str(store), "--bundle", str(bundle), "--out", str(mine))
    assert fitted.returncode == 0, fitted.stderr
    assert "newly stopped" in fitted.stdout
    diff = json.loads((mine / "calibration-diff.json").read_text())
    assert diff["from"]["used"] == ROWS + 1
    assert {(h["mode"], h["head"]) for h in diff["heads"] if not h["kept"]} == {
        ("prompt", "harmless"), ("both", "harmless"), ("both", "unsafe"),
    }  # fmt: skip
    assert diff["decisions"]["n"] == ROWS + 1
    assert diff["before"] == before.calibration.id != diff["after"]

    with serving(mine, store) as url, HHHRouter(base_url=url) as router:
        after = router.guard("request number 1", "reply 1").metadata
        drift = httpx.get(f"{url}/drift").json()
    assert after.calibration.id == diff["after"]
    assert after.calibration.calibrated
    assert after.needs["harmless"] != judged[1].metadata.needs["harmless"]
    assert after.needs["honest"] == pytest.approx(judged[1].metadata.needs["honest"], abs=1e-4)
    # labels given under the old calibrators say nothing of the new ones, which were fitted to them
    assert {f["n"] for f in drift["figures"] if f["name"] == "calibration_error"} == {0}
