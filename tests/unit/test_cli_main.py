"""The command's frame: help, version, errors and exit codes."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hhh_router import errors
from hhh_router.cli.main import COMMANDS, app
from hhh_router.types import Action, Decision

EAGER = ("torch", "transformers", "peft", "numpy", "httpx", "yaml")
"""What no help text needs. (typer itself loads pydantic for a command with options, not for the list of commands.)"""


def raising(error: BaseException) -> Callable[..., None]:
    """A way to open a router that fails."""

    def make(**options: object) -> None:
        raise error

    return make


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["guard", "--help"], ["--version"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from hhh_router.cli.main import app\n"
        "try:\n"
        f"    app({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print([m for m in {EAGER!r} if m in sys.modules], file=sys.stderr)"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stderr.strip() == "[]"


def test_help_takes_less_than_300_ms() -> None:
    command = Path(sys.executable).with_name("hhh-router")

    def once() -> float:
        began = time.perf_counter()
        shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
        assert "Commands:" in shown
        return time.perf_counter() - began

    assert min(once() for _ in range(5)) < 0.3  # the best of five: the machine may be busy with something else


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    result = CliRunner().invoke(app, ["--version"])

    assert result.output == f"hhh-router {version('hhh-router')}\n"
    assert result.exit_code == 0


def test_every_command_is_there_and_says_what_it_does() -> None:
    result = CliRunner().invoke(app, ["--help"])

    for name in COMMANDS:
        (line,) = [line for line in result.output.splitlines() if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3, line


def test_a_misspelt_command_gets_a_suggestion_and_exit_2() -> None:
    result = CliRunner().invoke(app, ["chatt"])

    assert result.exit_code == 2
    assert "'chat'" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BundleError("adapters/x: missing", hint="fetch it"), 2),
        (errors.PolicyNotAllowed("policy 'x'"), 2),
        (errors.MissingExtra("model", needed_for="chat"), 2),
        (errors.InvalidRequest("empty"), 2),
        (errors.GeneratorError("broke off"), 1),
        (errors.BackendTimeout("too slow"), 1),
        (
            errors.Blocked(Decision(checkpoint="input", action=Action.REFUSE, rule="checkpoints.input[0]", reason="x")),
            3,
        ),
    ],
)
def test_an_error_becomes_its_message_on_stderr_and_its_exit_code(error: errors.HHHRouterError, code: int) -> None:
    result = CliRunner().invoke(app, ["chat", "hello"], obj=raising(error))

    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == f"hhh-router: {error}\n"


def test_an_unexpected_error_is_one_line_and_says_how_to_see_more() -> None:
    result = CliRunner().invoke(app, ["chat", "hello"], obj=raising(ZeroDivisionError("division\nby zero")))

    assert result.exit_code == 1
    assert result.stderr == (
        "hhh-router: unexpected ZeroDivisionError: division by zero\n"
        "  → run with HHH_ROUTER_DEBUG=1 for the traceback\n"
    )


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHH_ROUTER_DEBUG", "1")

    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(app, ["chat", "hello"], obj=raising(ZeroDivisionError()), catch_exceptions=False)


def test_an_interrupt_ends_with_130_and_no_message() -> None:
    result = CliRunner().invoke(app, ["chat", "hello"], obj=raising(KeyboardInterrupt()))

    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_every_command_file_gives_a_command() -> None:
    group = typer.main.get_command(app)
    context = group.make_context("hhh-router", ["schema"])

    assert [group.get_command(context, name).name for name in COMMANDS] == list(COMMANDS)


def test_schema_prints_the_schema_of_the_metadata_block() -> None:
    import json

    from hhh_router.trace.block import metadata_schema

    result = CliRunner().invoke(app, ["schema"])

    assert json.loads(result.stdout) == metadata_schema()
