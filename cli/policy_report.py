"""``hhh-router policy report``: what policies do on public eval prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    data: Annotated[Path, typer.Option("--data", envvar="HHH_ROUTER_DATA", help="Folder of data sets.")],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", metavar="NAME|FILE", help="Default: all that are shipped.")
    ] = None,
    bundle: Annotated[str | None, typer.Option("--bundle", "-b", help="Default: the deployment's.")] = None,
    out: Annotated[Path, typer.Option("--out", help="JSON file; the table goes beside it.")] = Path("policies.json"),
    seed: Annotated[int, typer.Option(help="Of the bootstraps.")] = 17,
) -> None:
    """Measure the errors of policies on eval rows that no limit was fitted on; writes JSON and a table."""
    import json

    from hhh_router.bundle import Bundle
    from hhh_router.calibration.kept import KEPT, read_kept
    from hhh_router.errors import MissingExtra
    from hhh_router.policy import list_library, list_policies, load_policy
    from hhh_router.settings import Settings

    from .train import stage_bars

    try:
        from hhh_router.evaluation.policy_report import as_table, eval_prompts, eval_replies, policy_figures
        from hhh_router.evaluation.systems import BundleReadings
    except ImportError as error:
        raise MissingExtra("train", needed_for="measuring policies") from error
    names = policy or [*list_policies(), *list_library()]
    policies = [load_policy(name) for name in names]
    settings = Settings.load(bundle=bundle)
    used = Bundle.load(settings.bundle)
    tasks, replies = eval_prompts(data), eval_replies(data)
    kept = None
    if used.manifest.heads is not None and (used.root / KEPT).exists():
        kept = read_kept(used.root, heads_sha256=used.manifest.heads.sha256)
    with stage_bars() as told:
        command = " ".join(["hhh-router policy report", *(f"--policy {p.name}" for p in policies if policy)])
        result = policy_figures(
            policies, tasks, BundleReadings(used, settings, told), seed=seed, command=command, replies=replies,
            kept=kept,
            on_progress=lambda done, n, name: told("policies", done, n, name),
        )  # fmt: skip
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table = out.with_suffix(".md")
    table.write_text(as_table(result), encoding="utf-8")
    typer.echo(as_table(result))
    for path in (out, table):
        typer.echo(str(path))
