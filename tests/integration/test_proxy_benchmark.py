"""The sidecar's benchmark says what it measures, and measures. Timings are never judged."""

import json
from pathlib import Path

import pytest

from benchmarks import proxy
from hhh_router.testing.tiny import tiny_bundle

pytestmark = pytest.mark.integration
LENIENT = Path(__file__).resolve().parents[1] / "conformance" / "lenient.yaml"
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_documentation_names_every_figure_and_its_target() -> None:
    for figure in proxy.FIGURES:
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{figure.name}` |")]
        bound = "reported"  # a figure without a target
        if figure.target is not None:
            bound = f"{'≥' if figure.at == 'least' else '≤'} {f'{figure.target:g}'.lstrip('0')}"
        assert row.endswith(f" {bound} |")


def test_it_runs_without_a_model_and_says_what_it_could_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(proxy.LITELLM, raising=False)
    names = ["proxy-p50", "proxy-streams", "proxy-over-litellm", "proxy-memory"]

    status = proxy.main(["--quick", "--out", str(tmp_path / "proxy.json"), "--only", *names])

    found = {r["name"]: r for r in json.loads((tmp_path / "proxy.json").read_text())}
    assert status == 0
    assert set(found) == set(names)
    assert found["proxy-p50"]["sides"].keys() == {"direct (ms)", "sidecar (ms)"}
    assert 0 < found["proxy-streams"]["value"] < 1.5
    assert found["proxy-over-litellm"]["value"] is None
    assert proxy.LITELLM in found["proxy-over-litellm"]["note"]
    assert 20 < found["proxy-memory"]["value"] < 500


def test_a_command_of_litellm_that_ends_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "litellm"
    command.write_text("#!/bin/sh\necho no master key is set\nexit 3\n")
    command.chmod(0o755)
    monkeypatch.setenv(proxy.LITELLM, str(command))

    proxy.main(["--quick", "--out", str(tmp_path / "proxy.json"), "--only", "proxy-over-litellm"])

    [found] = json.loads((tmp_path / "proxy.json").read_text())
    assert found["value"] is None
    assert "LiteLLM's proxy ended with 3: no master key is set" in found["note"]


def test_the_figures_of_enforce_come_out_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle(tmp_path / "tiny", max_position_embeddings=4096)
    monkeypatch.setenv("HHH_ROUTER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HHH_ROUTER_POLICY", str(LENIENT))  # a tiny model's scores are noise
    names = ["proxy-first-token", "proxy-window", "proxy-window-over-whole"]

    status = proxy.main(
        ["--quick", "--out", str(tmp_path / "proxy.json"), "--bundle", str(bundle.root), "--only", *names]
    )

    found = {r["name"]: r for r in json.loads((tmp_path / "proxy.json").read_text())}
    assert status == 0
    assert {n: r["value"] > 0 for n, r in found.items()} == dict.fromkeys(names, True)
    assert found["proxy-window-over-whole"]["sides"].keys() == {"read on (ms)", "whole (ms)"}
