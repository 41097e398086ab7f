"""``hhh-router guard``: judge a prompt and/or a response, or a whole JSONL file of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hhh_router.interfaces.sdk import HHHRouter
    from hhh_router.pipeline.results import GuardResult

    from .rows import Done, InputRow, Row

BATCH_ROWS = 256  # written and flushed together: what a kill can cost


def guard(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The prompt to judge.")] = None,
    response: Annotated[
        str | None, typer.Option("--response", help="The response to judge, alone or with its prompt.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--in", metavar="FILE.jsonl", help="Judge every row of this file (fields prompt and/or response)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.jsonl", help="Where to write the rows, each with its hhh block. Resumes."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Write rows that cannot be judged with an error field.")
    ] = False,
    policy: Annotated[str | None, typer.Option("--policy", metavar="NAME|FILE", help="The policy to apply.")] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="PATH|NAME", help="The bundle to read with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Judge a prompt and/or a response under a policy, without answering.

    Exit 0 when it is let through, 3 when a decision stops it. With --in and --out: 0 when every row is written.
    """
    texts, files = (prompt, response) != (None, None), (source, out) != (None, None)
    if texts == files:
        raise typer.BadParameter("give --prompt and/or --response, or --in and --out")
    if files:
        if source is None or out is None:
            raise typer.BadParameter("--in and --out go together")
        _guard_file(ctx, source, out, policy=policy, bundle=bundle, skip_bad=skip_bad, as_json=as_json)
        return
    from .session import opened

    with opened(ctx, policy=policy, bundle=bundle) as router:
        result = router.guard(prompt=prompt, response=response)
    _show(result, as_json=as_json)
    raise typer.Exit(_verdict(result))


def _verdict(result: GuardResult) -> int:
    """As for a chat, but a reply that should be made anew is not let through: nobody makes it anew here."""
    from hhh_router.errors import EXIT_BLOCKED
    from hhh_router.types import Action

    from .session import exit_status

    enforced = result.metadata.policy.mode == "enforce"
    anew = any(decision.action == Action.REGENERATE for decision in result.metadata.decisions)
    return EXIT_BLOCKED if enforced and anew else exit_status(result)


def _show(result: GuardResult, *, as_json: bool) -> None:
    import json

    from rich.console import Console

    from .render import panel

    if as_json:
        typer.echo(json.dumps({"action": result.action, "hhh": result.metadata.as_json()}))
    else:
        Console(highlight=False).print(panel(result.metadata))


def _guard_file(
    ctx: typer.Context,
    source: Path,
    out: Path,
    *,
    policy: str | None,
    bundle: str | None,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Judge the rows an earlier run has not written yet, batch by batch."""
    import json
    from collections import Counter

    from hhh_router.errors import DataError

    from .render import error_console, row_progress
    from .rows import dump_row, file_size, read_rows, resume
    from .session import opened

    if out.exists() and source.exists() and out.samefile(source):
        raise DataError(f"{out}: --in and --out are the same file", hint="write to another file")
    size = file_size(source)
    rows = read_rows(source)
    done = resume(rows, source, out)
    counts: Counter[str] = Counter()
    bad = done.bad
    with (
        row_progress(error_console(), source.name, size) as advance,
        opened(ctx, policy=policy, bundle=bundle) as router,
    ):
        while batch := list(islice(rows, BATCH_ROWS)):
            results, problems = _judge(router, batch)
            if problems and not skip_bad:
                line = min(problems)
                raise DataError(
                    f"{source}:{line}: {problems[line]}",
                    hint="correct the row, or --skip-bad to write it with an error field",
                )
            _check_same_run(done, results, out)
            with _appended(out) as file:
                file.write(b"".join(dump_row(_output_row(row, results, problems)) for row in batch))
            counts.update(str(result.action) for result in results.values())
            bad += len(problems)
            advance(batch[-1].end)
    written = done.rows + sum(counts.values()) + bad - done.bad
    report = {"rows": written, "resumed": done.rows, "bad": bad, "actions": dict(sorted(counts.items()))}
    if as_json:
        typer.echo(json.dumps(report))
    else:
        actions = ", ".join(f"{n} {action}" for action, n in sorted(counts.items())) or "none judged now"
        typer.echo(f"{written} rows in {out} ({done.rows} were there already, {bad} bad): {actions}", err=True)


def _judge(router: HHHRouter, batch: Sequence[InputRow]) -> tuple[dict[int, GuardResult], dict[int, str]]:
    """Line → verdict, and line → why the row cannot be judged."""
    problems = {row.line: row.problem for row in batch if row.problem is not None}
    return _guard(router, [row for row in batch if row.problem is None], problems), problems


def _output_row(row: InputRow, results: Mapping[int, GuardResult], problems: Mapping[int, str]) -> Row:
    if row.line in results:
        return {**row.content, "hhh": results[row.line].metadata.as_json()}
    return {**row.content, "error": problems[row.line]}


def _guard(router: HHHRouter, rows: Sequence[InputRow], problems: dict[int, str]) -> dict[int, GuardResult]:
    """Line → verdict, from one call; where that is refused, halves are tried until the rows at fault are alone.

    Lines of rows that cannot be judged are added to `problems`.
    """
    from hhh_router.errors import RequestError

    if not rows:
        return {}
    prompts, responses = ([row.content.get(key) for row in rows] for key in ("prompt", "response"))
    try:
        results = router.guard(prompt=prompts, response=responses)
    except RequestError as error:
        if len(rows) > 1:
            half = len(rows) // 2
            return _guard(router, rows[:half], problems) | _guard(router, rows[half:], problems)
        problems[rows[0].line] = error.message
        return {}
    return {row.line: result for row, result in zip(rows, results, strict=True)}


def _check_same_run(done: Done, results: Mapping[int, GuardResult], out: Path) -> None:
    """Refuse to mix judgements of two policies or bundles in one file."""
    from hhh_router.errors import DataError

    if done.last_block is None or not results:
        return
    block = next(iter(results.values())).metadata.as_json()
    for part in ("policy", "bundle"):
        before, now = done.last_block.get(part), block[part]
        if before != now:
            raise DataError(
                f"{out}: its rows were judged with {part} {_name(before)}, this run uses {_name(now)}",
                hint="give another --out file, or the same options as before",
            )


def _name(reference: Any) -> str:
    if not isinstance(reference, dict):
        return "unknown"
    return f"{reference.get('name')} ({reference.get('hash')})"


def _appended(out: Path) -> Any:
    from hhh_router.errors import DataError

    try:
        return out.open("ab")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})", hint="give another --out file") from error
