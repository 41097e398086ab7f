"""``hhh-router replay``: what another policy would change about traffic."""

from __future__ import annotations

from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hhh_router.data.examples import Example
    from hhh_router.evaluation.recorded import Kind
    from hhh_router.evaluation.replay import Gate, Pair, Replay
    from hhh_router.policy import Policy
    from hhh_router.settings import Settings

SAMPLE = "sample"
"""Stands for the traffic that is shipped."""
MAX_TOKENS = 96
_LISTED = 20  # requests that the terminal is told of; the page has all


def replay(
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="FILE|audit|sample",
            help="Rows of prompts; or records: audit, audit:FILE, or a file of traces or receipts.",
        ),
    ],
    policy: Annotated[str, typer.Option("--policy", "-p", metavar="NAME|FILE", help="What is in force.")],
    against: Annotated[str, typer.Option("--against", "-a", metavar="NAME|FILE", help="What may replace it.")],
    bundle: Annotated[str | None, typer.Option("--bundle", "-b", help="Default: the deployment's.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Page of flips to write; it holds the prompts.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="Answer so many of the most changed requests under both.")] = 0,
    max_benign: Annotated[float | None, typer.Option(help="Exit 1 where benign refused may rise by more.")] = None,
    max_harm: Annotated[float | None, typer.Option(help="Exit 1 where harm passed may rise by more.")] = None,
    max_flips: Annotated[int | None, typer.Option(help="Exit 1 where more requests flip.")] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Labels of recorded requests: JSONL of request_id and labels.")
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Likewise, from the file that HHH_ROUTER_FEEDBACK named.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals, and of the answers.")] = 17,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put traffic to two policies: which requests flip, what that does to both errors, and a gate for CI.

    Records are decided again from the readings that they keep, without the model; what was not kept is unknown.
    """
    import json

    from hhh_router.bundle import Bundle
    from hhh_router.data.own import read_own
    from hhh_router.errors import EXIT_FAILURE, DataError, MissingExtra
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings

    from .train import stage_bars

    try:
        from hhh_router.evaluation.recorded import recorded_source
        from hhh_router.evaluation.replay import Gate, most_changed
        from hhh_router.evaluation.replay import replay as replayed
        from hhh_router.evaluation.replay_page import replay_html
        from hhh_router.evaluation.systems import BundleReadings
    except ImportError as error:
        raise MissingExtra("train", needed_for="replaying traffic") from error
    before, after = load_policy(policy), load_policy(against)
    settings = Settings.load(bundle=bundle)
    gate = Gate(benign_refused=max_benign, harm_passed=max_harm, flips=max_flips)
    url = None if settings.audit_url is None else settings.audit_url.get_secret_value()
    recorded = None if source == SAMPLE else recorded_source(source, audit_url=url)
    if recorded is not None:
        found = _recorded(recorded, (before, after), settings, (labels, feedback), gate, seed)
    elif labels is not None or feedback is not None:
        raise DataError(f"{source}: is no file of records", hint="--labels and --feedback name requests of records")
    else:
        path = sample_path() if source == SAMPLE else Path(source)
        examples = read_own(path, skip_broken=False, labelled=False).examples
        command = _command(source if source == SAMPLE else path.name, (before, after), seed)
        with stage_bars() as told:
            readings = BundleReadings(Bundle.load(settings.bundle), settings, told)
            found = replayed(before, after, examples, readings, seed=seed, gate=gate, command=command)
    if answers:
        if recorded is not None and not any(p.example.messages for p in found.pairs):
            raise DataError(
                f"{source}: keeps no texts to answer", hint="keep them: audit: {content: full} in proxy.yaml"
            )
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


def _command(source: str, policies: tuple[Policy, Policy], seed: int) -> str:
    before, after = policies
    return f"hhh-router replay --from {source} --policy {before.name} --against {after.name} --seed {seed}"


def _recorded(
    source: tuple[Path | str, Kind],
    policies: tuple[Policy, Policy],
    settings: Settings,
    labels: tuple[Path | None, Path | None],
    gate: Gate,
    seed: int,
) -> Replay:
    """From records: their own readings, so that the bundle's calibrators suffice."""
    from hhh_router.bundle import Bundle
    from hhh_router.errors import DataError
    from hhh_router.evaluation.recorded import feedback_labels, read_labels, read_recorded
    from hhh_router.evaluation.replay import replay_recorded
    from hhh_router.trace.audit import shown_place

    from .drift import bundle_calibrators

    used = Bundle.load(settings.bundle)
    calibrators = bundle_calibrators(used)
    path, kind = source
    rows = read_recorded(path, kind, calibration_id=calibrators.id)
    if not rows.rows:
        why = "; ".join(f"{n}: {reason}" for reason, n in rows.left_out.items()) or "it holds no request"
        raise DataError(
            f"{shown_place(path)}: nothing can be decided again ({why})", hint="name the bundle it was read with"
        )
    said, fed = labels
    known = ({} if fed is None else feedback_labels(fed)) | ({} if said is None else read_labels(said))
    shown = path.name if isinstance(path, Path) else shown_place(path)
    name = f"audit:{shown}" if kind == "audit" else shown
    about = f"bundle {used.manifest.name} ({used.sha256[:16]}), by the readings that were recorded"
    return replay_recorded(
        *policies, rows, calibrators, about=about, labels=known, seed=seed, gate=gate,
        command=_command(name, policies, seed),
    )  # fmt: skip


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
    from collections import Counter

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
    for why, n in figures.get("left_out", {}).items():
        typer.echo(f"  {n} left out: {why}")
    if (recorded := figures.get("recorded")) is not None and recorded["n"]:
        typer.echo(
            f"  {recorded['n']} were decided by {found.before.name} ({found.before.hash[:16]}): "
            f"{recorded['same']} come out as recorded, {recorded['unknown']} unknown, "
            f"{len(recorded['differences'])} otherwise"
        )
        for d in recorded["differences"][:_LISTED]:
            typer.echo(f"    {d['request_id']}: {d['found']}")
    flips = [p for p in found.pairs if p.flip in ("newly passed", "newly stopped")]
    for p in flips[:_LISTED]:
        assert p.before.decision is not None
        assert p.after.decision is not None
        actions = f"{p.before.decision.action} → {p.after.decision.action}"
        typer.echo(f"  row {p.row}{f' {p.request_id}' if p.request_id else ''}: {p.flip}, {actions}")
    if len(flips) > _LISTED:
        typer.echo(f"  and {len(flips) - _LISTED} more; --html FILE has them all")
    for why, n in Counter(line for p in found.pairs for line in {*p.before.unknown, *p.after.unknown}).most_common(5):
        typer.echo(f"  unknown in {n}: {why}")
