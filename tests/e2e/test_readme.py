"""The README's snippets are run, and what they print is compared with what the README says they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = r"<!-- {mark}: {name} -->\n```\w*\n(.*?)```"


def block(mark: str, name: str) -> str:
    """The code block below ``<!-- mark: name -->``."""
    (content,) = re.findall(BLOCK.format(mark=mark, name=name), README, flags=re.DOTALL)
    return content


def labels(output: str) -> list[str]:
    """The first word of each line: what stays when a figure moves in its last digit."""
    return [line.split()[0] for line in output.splitlines() if line.strip()]


def test_the_python_example_prints_what_the_readme_says() -> None:
    done = subprocess.run(
        [sys.executable, "-c", block("run", "readme")], capture_output=True, text=True, cwd=ROOT, timeout=300
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    claimed = block("output", "readme")
    assert labels(done.stdout) == labels(claimed)
    for output in (done.stdout, claimed):
        shown = {line.split()[0]: line for line in output.splitlines() if line.strip()}
        assert "Paris" in shown["reply"]
        assert shown["action"].split()[1] in ("allow", "flag")
        assert re.search(r"hhh@\d+-\d+-\d+-\d+", shown["weights"])
        assert shown["guard"].split()[1] == "refuse"


def test_the_python_example_is_about_ten_lines() -> None:
    assert len([line for line in block("run", "readme").splitlines() if line.strip()]) <= 10


def test_the_shell_commands_work() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    for command in block("run", "shell").splitlines():
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout.strip()


def test_every_command_the_readme_names_exists() -> None:
    from hhh_router.cli.main import COMMANDS

    named = set(re.findall(r"hhh-router ([a-z]+(?:-[a-z]+)*)", README))

    assert named
    assert named <= set(COMMANDS)


def test_every_link_to_a_file_leads_somewhere() -> None:
    for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / target).exists(), f"{name}: {target}"


def test_every_file_the_documents_name_exists() -> None:
    for name in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:hhh_router|tests|cli|docs|adapters|recipes)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_make_names_its_targets() -> None:
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True)

    assert {line.split("\t")[0] for line in done.stdout.splitlines()} >= {"chat", "install", "test", "check", "format"}
