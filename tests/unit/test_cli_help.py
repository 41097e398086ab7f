"""Help texts are part of what users rely on: each is compared with its golden file.

After a deliberate change run it with ``HHH_ROUTER_UPDATE_GOLDEN=1``, and read the diff.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hhh_router.cli.main import COMMANDS, app

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "help"
UPDATE = "HHH_ROUTER_UPDATE_GOLDEN"


def commands() -> Iterator[tuple[str, ...]]:
    """The command, every command under it, and every command under those."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("hhh-router", ["schema"])
    yield ()
    for name in COMMANDS:
        yield (name,)
        command = group.get_command(context, name)
        for inner in getattr(command, "commands", {}):
            yield (name, inner)


ALL = list(commands())


@pytest.mark.parametrize("path", ALL, ids=[" ".join(("hhh-router", *path)) for path in ALL])
def test_help_says_what_it_said(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    result = CliRunner().invoke(app, [*path, "--help"], prog_name="hhh-router")

    golden = GOLDEN / f"{'-'.join(('hhh-router', *path))}.txt"
    if os.environ.get(UPDATE):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(result.output, encoding="utf-8")
    assert result.exit_code == 0
    assert result.output == golden.read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {"-".join(("hhh-router", *path)) for path in ALL}


@pytest.mark.parametrize("path", ALL, ids=[" ".join(("hhh-router", *path)) for path in ALL])
def test_help_fits_a_terminal_of_80_columns(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    result = CliRunner().invoke(app, [*path, "--help"], prog_name="hhh-router")

    assert max(map(len, result.output.splitlines())) <= 80
