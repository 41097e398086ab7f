"""Manifests and the files they hash, with the commands that list and describe bundles. No torch."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hhh_router.bundle import MANIFEST, Bundle, Manifest, file_sha256, find_bundle, list_bundles, write_manifest
from hhh_router.cli.main import app
from hhh_router.errors import BundleError
from hhh_router.types import DIMENSIONS


def write_bundle(root: Path, **changes: Any) -> Path:
    """A bundle whose files hold no weights; enough for everything but loading it."""
    root.mkdir(parents=True)
    experts = {}
    for dimension in DIMENSIONS:
        weights = root / "experts" / dimension / "adapter_model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(dimension.encode())
        experts[dimension] = {"path": f"experts/{dimension}", "rank": 4, "scale": 2.0, "sha256": file_sha256(weights)}
    (root / "heads.safetensors").write_bytes(b"heads")
    manifest = {
        "name": root.name,
        "version": "1.0",
        "licence": "Apache-2.0",
        "commercial_use": True,
        "backbone": {
            "source": "path:backbone",
            "architecture": "llama",
            "layers": 4,
            "hidden_size": 8,
            "licence": "MIT",
        },
        "first_adapted_layer": 2,
        "experts": experts,
        "heads": {
            "sha256": file_sha256(root / "heads.safetensors"),
            "read_layers": [2],
            "needs": ["harmless"],
            "outcomes": ["unsafe"],
        },
        "recipe": "r.yaml",
        "recipe_sha256": "0" * 64,
        "seed": 1,
    }
    write_manifest(root, Manifest.model_validate(manifest | changes))
    return root


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``adapters/mine`` below the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_bundle(tmp_path / "adapters" / "mine")


def bundle(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bundle", *map(str, arguments)])


def test_a_bundle_is_found_by_path_and_by_name(root: Path) -> None:
    assert find_bundle("mine") == find_bundle(root) == root.resolve()
    assert root in list_bundles()


def test_a_manifest_survives_being_written_and_read(root: Path) -> None:
    loaded = Bundle.load(root)

    assert loaded.manifest.name == "mine"
    assert loaded.sha256 == file_sha256(root / MANIFEST)
    assert set(loaded.files()) == {
        *(root.resolve() / "experts" / d / "adapter_model.safetensors" for d in DIMENSIONS),
        root.resolve() / "heads.safetensors",
    }
    loaded.verify()


def test_an_unknown_name_says_where_was_looked(root: Path) -> None:
    with pytest.raises(BundleError, match="not found") as caught:
        Bundle.load("yours")

    assert str(root.parent) in str(caught.value)
    assert "bundle list" in str(caught.value)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.load(tmp_path)


def test_every_mistake_of_a_manifest_is_told_at_once(root: Path) -> None:
    def spoil(manifest: dict[str, Any]) -> None:
        manifest["seed"] = "many"
        manifest["colour"] = "blue"
        del manifest["licence"]

    rewrite(root, spoil)

    with pytest.raises(BundleError) as caught:
        Bundle.load(root)

    for field in ("seed", "colour", "licence"):
        assert f": {field}: " in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json_object_is_an_error_and_no_traceback(root: Path, content: bytes) -> None:
    (root / MANIFEST).write_bytes(content)

    result = bundle("card", root)

    assert result.exit_code == 2
    assert result.stderr.startswith("hhh-router: ")
    assert MANIFEST in result.stderr


def test_a_missing_expert_is_named(root: Path) -> None:
    rewrite(root, lambda manifest: manifest["experts"].pop("honest"))

    with pytest.raises(BundleError, match="no honest"):
        Bundle.load(root)


def test_adapters_need_a_layer_to_act_in(root: Path) -> None:
    rewrite(root, lambda manifest: manifest.update(first_adapted_layer=4))

    with pytest.raises(BundleError, match="not below the backbone's 4 layers"):
        Bundle.load(root)


def test_every_file_that_is_missing_or_differs_is_listed(root: Path) -> None:
    (root / "heads.safetensors").unlink()
    (root / "experts" / "honest" / "adapter_model.safetensors").write_bytes(b"changed")

    with pytest.raises(BundleError) as caught:
        Bundle.load(root).verify()

    assert re.search(r"heads\.safetensors: missing", str(caught.value))
    assert re.search(r"honest/adapter_model\.safetensors: sha256 \w{12}…, the manifest says", str(caught.value))


def test_bundles_are_listed_broken_ones_with_their_problem(root: Path) -> None:
    broken = write_bundle(root.parent / "broken")
    (broken / MANIFEST).write_text("{")

    shown = bundle("list")
    rows = {row["name"]: row for row in json.loads(bundle("list", "--json").stdout)}

    assert shown.exit_code == 0
    assert f"mine  1.0  {root}  (Apache-2.0)" in shown.stdout
    assert rows["mine"]["commercial_use"] is True
    assert MANIFEST in rows["broken"]["problem"]


def test_a_bundle_for_research_only_says_so(root: Path) -> None:
    write_bundle(root.parent / "bigger", commercial_use=False)

    assert "research only" in bundle("list").stdout


def test_the_card_is_shown_alone_or_with_the_manifest(root: Path) -> None:
    (root / "CARD.md").write_text("# mine\nAUROC 0.9\n")

    shown = bundle("card", "mine")
    found = json.loads(bundle("card", "mine", "--json").stdout)

    assert shown.stdout.strip() == "# mine\nAUROC 0.9"
    assert found["manifest"]["name"] == "mine"
    assert found["card"] == "# mine\nAUROC 0.9\n"


def test_a_bundle_without_a_card_is_told_and_exits_2(root: Path) -> None:
    result = bundle("card", "mine")

    assert result.exit_code == 2
    assert "CARD.md: cannot be read" in result.stderr
