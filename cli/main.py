"""The ``hhh-router`` command: finds the file of each command, and turns errors into messages and exit codes.

A command's file holds either ``app`` (a typer.Typer) or a function named like the command; it imports typer and nothing
heavier at its top, so that ``--help`` stays quick.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

COMMANDS = (
    "chat",
    "guard",
    "serve",
    "proxy",
    "mcp-proxy",
    "queue",
    "audit",
    "policy",
    "replay",
    "verify",
    "bundle",
    "train",
    "calibrate",
    "feedback",
    "drift",
    "evaluate",
    "schema",
    "openapi",
    "key",
    "doctor",
)
"""Every command, in the order of ``--help``; ``cli/<name>.py`` holds it, with ``_`` for ``-``."""

DEBUG = "HHH_ROUTER_DEBUG"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Commands(TyperGroup):
    """Loads a command's file when it is asked for, and reports errors the way people can act on."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, without loading anything."""
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands with the first sentence of each; building them all would take most of a second."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in COMMANDS])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load one command; None when there is no such."""
        if cmd_name not in COMMANDS:
            self.commands.update(dict.fromkeys(COMMANDS))  # so that a misspelt name gets suggestions
            return None
        found = _load(cmd_name)
        app = found
        if not isinstance(found, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command()(found)
        app.rich_markup_mode = None
        command = typer.main.get_command(app)
        command.name = cmd_name
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; every error becomes a message on stderr and an exit code."""
        try:
            return super().main(*args, **kwargs)
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)
        except Exception as error:  # the outermost door: nothing above could handle it better
            if _interrupts:  # an interrupt while a library is imported comes out as any error, of a missing one say
                sys.exit(EXIT_INTERRUPTED)
            _fail(error)


def _load(name: str) -> Any:
    file = name.replace("-", "_")
    module = import_module(f".{file}", package=__package__)
    return getattr(module, "app", None) or getattr(module, file)


def _summary(name: str) -> str:
    found = _load(name)
    text = found.info.help if isinstance(found, typer.Typer) else found.__doc__
    return str(text or "").strip().split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def _fail(error: Exception) -> NoReturn:
    from hhh_router.errors import EXIT_FAILURE, HHHRouterError, exit_code

    if os.environ.get(DEBUG):
        raise error
    if isinstance(error, HHHRouterError):
        typer.echo(f"hhh-router: {error}", err=True)
        sys.exit(exit_code(error))
    text = " ".join(str(error).split()) or "no further detail"
    typer.echo(
        f"hhh-router: unexpected {type(error).__name__}: {text}\n  → run with {DEBUG}=1 for the traceback", err=True
    )
    sys.exit(EXIT_FAILURE)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hhh-router {version('hhh-router')}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Guard, route and steer LLM requests with a calibrated mixture of helpful, harmless and honest experts."""


_interrupts: list[int] = []


def _interrupt(number: int, frame: object) -> NoReturn:
    _interrupts.append(number)
    raise KeyboardInterrupt


def run() -> None:
    """Entry point of the console script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    app()
