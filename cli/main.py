"""The ``hhh-router`` command."""

import typer

app = typer.Typer(no_args_is_help=True, help="Guard, route and steer LLM requests with a calibrated mixture of experts.")


def run() -> None:
    """Entry point of the console script."""
    app()
