"""``hhh-router evaluate``: measure a bundle and write its card."""

from __future__ import annotations

from typing import Annotated

import typer

from .train import Data, stage_bars


def evaluate(
    data: Data,
    bundle: Annotated[str, typer.Option("--bundle", help="Bundle name or folder.")] = "smollm2-135m",
    rows: Annotated[int, typer.Option(help="Prompts per side of the behaviour part; 0 leaves it out.", min=0)] = 40,
    max_tokens: Annotated[int, typer.Option(help="Length of each reply of the behaviour part.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 17,
) -> None:
    """Measure detection, calibration and refusals on eval rows; writes figures.json and CARD.md into the bundle."""
    from hhh_router.evaluation.measure import measure
    from hhh_router.settings import Settings

    with stage_bars() as told:
        written = measure(
            bundle, data, settings=Settings.load(), rows=rows, max_tokens=max_tokens, seed=seed, on_progress=told
        )
    for path in written:
        typer.echo(str(path))
