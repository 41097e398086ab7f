"""How a metadata block and a long wait look on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from hhh_router.interfaces.sdk import ChatStream
    from hhh_router.model.sources import Progress
    from hhh_router.pipeline.results import ChatResult
    from hhh_router.trace.block import Metadata
    from hhh_router.types import Weights

BAR_CELLS = 20
_EIGHTHS = " ▏▎▍▌▋▊▉"
_VISIBLE = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_COLOURS = {
    "allow": "green",
    "flag": "yellow",
    "regenerate": "yellow",
    "refuse": "red",
    "escalate": "magenta",
    "hold": "magenta",
    "block": "red",
}


def bar(share: float, cells: int = BAR_CELLS) -> str:
    """A share in [0, 1] as a bar of `cells` characters, to an eighth of a cell.

    >>> bar(0.5, cells=4)
    '██  '
    >>> bar(0.03, cells=4), len(bar(1.0, cells=4))
    ('▏   ', 4)
    """
    eighths = max(0, min(round(share * cells * 8), cells * 8))
    if share > 0:
        eighths = max(eighths, 1)  # something is never drawn as nothing
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(cells)


def panel(block: Metadata) -> RenderableType:
    """The four weights and what led to them, for people."""
    from rich.panel import Panel
    from rich.table import Table

    shares = Table.grid(padding=(0, 2))
    shares.add_row("", "[dim]weight[/]", "", "[dim]need[/]", "")
    for expert, weight in block.weights.items():
        need = block.needs.get(expert)
        shown = ("", "") if need is None else (f"{need:.2f}", f"[blue]{bar(need)}[/]")
        shares.add_row(expert, f"{weight:.2f}", f"[cyan]{bar(weight)}[/]", *shown)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("confidence", f"{block.confidence:.2f}{_reservations(block)}")
    if block.outcomes:
        facts.add_row("outcomes", "  ".join(f"{name} {p:.2f}" for name, p in block.outcomes.items()))
    for decision in block.decisions:
        colour = _COLOURS.get(decision.action, "white")
        facts.add_row(
            f"decision ({decision.checkpoint})", f"[bold {colour}]{decision.action}[/]  [dim]{_why(decision)}[/]"
        )
    if block.not_inspected:
        facts.add_row("not inspected", ", ".join(block.not_inspected))
    facts.add_row("time", _timing(block))
    body = Table.grid()
    body.add_row(shares)
    body.add_row("")
    body.add_row(facts)
    policy = f"{block.policy.name}@{block.policy.version}{' (shadow)' if block.policy.mode == 'shadow' else ''}"
    title = f"{policy} · {block.mixture or 'no mixture'} · {block.bundle.name}"
    return Panel(body, title=title, title_align="left", border_style="dim", expand=False)


def explain_lines(block: Metadata) -> list[str]:
    """The last decision step by step: what was measured, what the policy allowed, what was applied."""
    needs = ", ".join(f"{d} {p:.2f}" for d, p in block.needs.items()) or "nothing could be read"
    lines = [
        f"1. measured   needs: {needs}",
        f"2. router     posterior: {_shares(block.posterior)}",
        f"3. policy     {block.policy.name}@{block.policy.version} moved it by {block.policy_shift_nats:.3f} nats",
        f"4. applied    weights: {_shares(block.weights)} = {block.mixture or 'no mixture'}",
    ]
    if block.policy.mode == "shadow":
        lines.append("   shadow     the decisions below are recorded and stopped nothing")
    lines += [
        f"{n}. {d.checkpoint:<10} {d.action} by {d.rule}: {d.reason}" for n, d in enumerate(block.decisions, start=5)
    ]
    lines.append(f"   confidence {block.confidence:.2f}{_reservations(block)}")
    return lines


def parse_weights(text: str) -> Weights:
    """Weights from ``hhh@2-6-5-3`` or ``base=0.1,helpful=0.9``.

    >>> parse_weights("helpful=0.75,honest=0.25").honest
    0.25

    Raises:
        InvalidRequest: Neither form, or no distribution.
    """
    from hhh_router.errors import InvalidRequest
    from hhh_router.types import Weights

    try:
        if "=" not in text:
            return Weights.from_mixture(text)
        pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
        return Weights.from_mapping({name.strip(): float(value) for name, value in pairs})
    except ValueError as error:
        raise InvalidRequest(
            f"weights {text!r}: {error}",
            hint="write hhh@base-helpful-harmless-honest in sixteenths, or base=0.1,helpful=0.9",
        ) from error


def say(text: str) -> None:
    """Write a piece of the reply to standard output, at once.

    On a terminal, control characters are shown as such: a reply must not move the cursor or recolour the screen.
    """
    import typer

    typer.echo(text.translate(_VISIBLE) if sys.stdout.isatty() else text, nl=False)
    sys.stdout.flush()


def show_reply(reply: ChatStream, console: Console) -> ChatResult:
    """Write a reply as it is cleared: on a terminal its weights first, then the text, and the panel at its end."""
    is_first = True
    for piece in reply:
        if is_first and console.is_terminal and reply.metadata is not None:
            console.print(f"{reply.metadata.mixture or 'no mixture'}  {_shares(reply.metadata.weights)}", style="dim")
        is_first = False
        say(piece.text)
    say("\n")
    console.print(panel(reply.result.metadata))
    return reply.result


def error_console() -> Console:
    """Where everything goes that is not the answer itself."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


@contextmanager
def fetch_progress(console: Console, what: str) -> Iterator[Progress]:
    """A progress bar for `fetch_backbone`; without a terminal one line when the work starts."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        told: list[str] = []

        def tell(stage: str, done: int, total: int | None) -> None:
            if not told:
                console.print(f"fetching {what} (once)", markup=False)
                told.append(stage)

        yield tell
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[size]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:  # a task of its own: one task cannot go back from a known total to an unknown one
                for old in tasks.values():
                    bars.update(old, visible=False)
                tasks[stage] = bars.add_task(f"{what}: {stage}", total=total, size="")
            size = f"{done / 1e6:.0f}{f' of {total / 1e6:.0f}' if total else ''} MB" if done > 1 else ""
            bars.update(tasks[stage], completed=done, total=total, size=size)

        yield show


@contextmanager
def row_progress(console: Console, name: str, size: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over a file's bytes; silent without a terminal. The block calls it with the bytes done so far."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task(name, total=size)
        yield lambda done: bars.update(task, completed=done)


def _reservations(block: Metadata) -> str:
    notes = []
    if not block.calibration.calibrated:
        notes.append("uncalibrated")
    if not block.calibration.in_distribution:
        notes.append("outside the calibration data")
    return f"  [yellow]{', '.join(notes)}[/]" if notes else ""


def _why(decision: Any) -> str:
    from rich.markup import escape

    return escape(f"{decision.rule}: {decision.reason}")


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in shares.items())


def _timing(block: Metadata) -> str:
    stages = "  ".join(f"{stage} {ms:.0f} ms" for stage, ms in block.timing_ms.items())
    return f"{stages}  ({block.layers_run} layers run for the prompt)"
