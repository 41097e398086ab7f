"""``hhh-router replay``: what another policy would change about traffic."""

from __future__ import annotations

from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hhh_router.data.examples import Example
    from hhh_router.evaluation.replay import Pair, Replay
    from hhh_router.settings import Settings

SAMPLE = "sample"
"""Stands for the traffic that is shipped."""
MAX_TOKENS = 96


def replay(
    source: Annotated[
        str, typer.Option("--from", metavar="FILE|sample", help="JSONL of prompts, with labels where there are any.")
    ],
    policy: Annotated[str, typer.Option("--policy", "-p", metavar="NAME|FILE", help="What is in force.")],
    against: Annotated[str, typer.Option("--against", "-a", metavar="NAME|FILE", help="What may replace it.")],
    bundle: Annotated[str | None, typer.Option("--bundle", "-b", help="Default: the deployment's.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Page of flips to write; it holds the prompts.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="Answer so many of the most changed requests under both.")] = 0,
    max_benign: Annotated[float | None, typer.Option(help="Exit 1 where benign refused may rise by more.")] = None,
    max_harm: Annotated[float | None, typer.Option(help="Exit 1 where harm passed may rise by more.")] = None,
    max_flips: Annotated[int | None, typer.Option(help="Exit 1 where more requests flip.")] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals, and of the answers.")] = 17,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put traffic to two policies: which requests flip, what that does to both errors, and a gate for CI."""
    import json

    from hhh_router.bundle import Bundle
    from hhh_router.data.own import read_own
    from hhh_router.errors import EXIT_FAILURE, MissingExtra
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings

    from .train import stage_bars

    try:
        from hhh_router.evaluation.replay import Gate, most_changed
        from hhh_router.evaluation.replay import replay as replayed
        from hhh_router.evaluation.replay_page import replay_html
        from hhh_router.evaluation.systems import BundleReadings
    except ImportError as error:
        raise MissingExtra("train", needed_for="replaying traffic") from error
    before, after = load_policy(policy), load_policy(against)
    path = sample_path() if source == SAMPLE else Path(source)
    examples = read_own(path, skip_broken=False, labelled=False).examples
    settings = Settings.load(bundle=bundle)
    command = f"hhh-router replay --from {path.name} --policy {before.name} --against {after.name} --seed {seed}"
    with stage_bars() as told:
        found = replayed(
            before, after, examples, BundleReadings(Bundle.load(settings.bundle), settings, told), seed=seed,
            gate=Gate(benign_refused=max_benign, harm_passed=max_harm, flips=max_flips), command=command,
        )  # fmt: skip
    if answers:
        found = _answered(found, most_changed(found.pairs, answers), settings, (policy, against), seed)
    if html is not None:
        html.write_text(replay_html(found), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(dict(found.figures) | {"failed": list(found.failed)}, indent=2))
    else:
        _show(found)
        if html is not None:
            typer.echo(str(html))
    for line in found.failed:
        typer.echo(f"hhh-router: {line}", err=True)
    if found.failed:
        raise typer.Exit(EXIT_FAILURE)


def sample_path() -> Path:
    """The traffic that is shipped: written for this project, labelled by hand."""
    from importlib import resources

    return Path(str(resources.files("hhh_router.policies").joinpath("sample-traffic.jsonl")))


def _answered(found: Replay, pairs: Sequence[Pair], settings: Settings, policies: tuple[str, str], seed: int) -> Replay:
    import asyncio

    told = asyncio.run(_answer_all([p.example for p in pairs], settings, policies, seed))
    answers = {p.row: a for p, a in zip(pairs, told, strict=True)}
    kept = tuple(replaced(p, answers=answers.get(p.row)) for p in found.pairs)
    return replaced(found, pairs=kept)


async def _answer_all(
    examples: Sequence[Example], settings: Settings, policies: tuple[str, str], seed: int
) -> list[tuple[str, str]]:
    from hhh_router.assemble import build_pipeline
    from hhh_router.types import ChatRequest, Sampling

    pipeline = build_pipeline(settings)
    names = [pipeline.policies.add_file(policy) for policy in policies]
    sampling = Sampling(max_tokens=MAX_TOKENS, seed=seed)

    async def answer(example: Example, name: str) -> str:
        request = ChatRequest(messages=example.messages, policy=name, sampling=sampling)
        *_, last = [event async for event in pipeline.chat(request, stream=False)]
        return str(getattr(last, "text", ""))

    try:
        return [(await answer(e, names[0]), await answer(e, names[1])) for e in examples]
    finally:
        await pipeline.aclose()


def _show(found: Replay) -> None:
    from rich.console import Console
    from rich.table import Table

    figures: dict[str, Any] = dict(found.figures)
    table = Table(title=f"{found.before.name}@{found.before.version} → {found.after.name}@{found.after.version}")
    for heading in ("error", "requests", "before", "after", "difference (95 %)"):
        table.add_column(heading)
    for side, e in figures["errors"].items():
        interval = e["difference_interval"]
        span = f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else ""
        cells = (f"{e['before']:.3f}", f"{e['after']:.3f}", f"{e['difference']:+.3f}{span}")
        table.add_row(side.replace("_", " "), str(e["n"]), *cells)
    Console().print(table)
    typer.echo(f"{figures['n']} requests: " + ", ".join(f"{n} {kind}" for kind, n in figures["flips"].items()))
    for p in found.pairs:
        if p.flip in ("newly passed", "newly stopped"):
            typer.echo(f"  row {p.row}: {p.flip}, {p.before.decision.action} → {p.after.decision.action}")
