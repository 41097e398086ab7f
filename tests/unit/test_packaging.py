"""What is built is what is in the folders, and its metadata says so."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_matches_the_folders() -> None:
    inside = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hhh_router").rglob("__init__.py")}
    mapped = {"hhh_router.cli", "hhh_router.policies"}

    assert set(PROJECT["tool"]["setuptools"]["packages"]) == inside | mapped
    assert set(PROJECT["tool"]["setuptools"]["package-dir"]) == mapped
    for folder in PROJECT["tool"]["setuptools"]["package-dir"].values():
        assert (ROOT / folder / "__init__.py").is_file()


def test_every_folder_with_code_is_a_package() -> None:
    for path in (ROOT / "hhh_router").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path


def test_shipped_policies_and_the_typing_marker_are_package_data() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]

    assert "*.yaml" in data["hhh_router.policies"]
    assert list((ROOT / "policies").glob("*.yaml"))
    assert "py.typed" in data["hhh_router"]
    assert (ROOT / "hhh_router" / "py.typed").is_file()


def test_every_direct_dependency_is_pinned_in_the_constraints() -> None:
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    named = {re.match(r"[\w.-]+", line)[0] for group in groups for line in group} - {"hhh-router"}

    assert {re.sub(r"[-_.]+", "-", n).lower() for n in named} <= pinned


def test_a_pin_satisfies_the_range_of_its_dependency() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {re.sub(r"[-_.]+", "-", k).lower(): v for k, v in pins.items()}

    for group in [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]:
        for line in group:
            wanted = packaging.Requirement(line)
            name = re.sub(r"[-_.]+", "-", wanted.name).lower()
            assert name == "hhh-router" or wanted.specifier.contains(pins[name]), line


def test_constraints_pin_plain_releases_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.!]+", line), f"{line}: local builds and files differ between machines"


def test_litellms_environment_differs_from_ours_only_where_litellm_says_so() -> None:
    held_back = {"filelock", "huggingface-hub", "openai", "python-dateutil", "rich"}

    def pins(name: str) -> dict[str, str]:
        lines = [line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line]
        return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in lines}

    ours, theirs = pins("constraints.txt"), pins("tests/litellm/constraints.txt")

    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == held_back
    assert theirs["openai"].startswith("2.")


def test_the_changelog_names_the_version() -> None:
    assert f"[{PROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_points_at_its_entry() -> None:
    from hhh_router.cli.main import run

    assert PROJECT["project"]["scripts"] == {"hhh-router": f"{run.__module__}:{run.__name__}"}


def test_no_tracked_text_names_a_machine_or_a_registry_host() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    suspicious = re.compile(r"/(?:home|Users)/\w+/|/root/\w|file:///")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".json"} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {hit}" for hit in suspicious.findall(text) if path != Path(__file__)]

    assert not found
