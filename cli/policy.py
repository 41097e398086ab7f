"""``hhh-router policy``: list, show, check and explain policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .policy_compare import compare
from .policy_fit import fit
from .policy_report import report
from .policy_tools import diff, graph, lint, run_examples

if TYPE_CHECKING:
    from rich.console import Console

    from hhh_router.pipeline import Pipeline
    from hhh_router.pipeline.explain import Step
    from hhh_router.policy import Policy
    from hhh_router.settings import Settings
    from hhh_router.types import ReadRequest, Weights

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Show, check, explain, test, fit, compare policies.")

app.command("test")(run_examples)
for command in (lint, diff, graph, fit, report, compare):
    app.command()(command)

_JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command("list")
def list_(
    library: bool = typer.Option(False, "--library", help="Those for one kind of use each."), as_json: bool = _JSON
) -> None:
    """List the shipped policies."""
    import json

    from rich.console import Console
    from rich.table import Table

    from hhh_router.policy import list_library, list_policies, load_policy

    policies = [load_policy(name) for name in (list_library() if library else list_policies())]
    if as_json:
        typer.echo(json.dumps([_summary(p) for p in policies], indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "version", "hash", "description"):
        table.add_column(heading, no_wrap=heading != "description")
    for policy in policies:
        table.add_row(policy.name, str(policy.version), policy.hash[:8], policy.description or "")
    Console(highlight=False).print(table)


@app.command()
def show(
    name: str = typer.Argument(..., metavar="NAME|FILE", help="A shipped policy's name, or the path of a YAML file."),
    as_json: bool = _JSON,
) -> None:
    """Show a policy in full: defaults written out, `extends` applied."""
    import json

    from hhh_router.policy import as_document, load_policy

    policy = load_policy(name)
    if as_json:
        typer.echo(json.dumps(_summary(policy) | {"policy": as_document(policy)}, indent=2))
        return
    typer.echo(f"# {policy.name}@{policy.version}  sha256 {policy.hash}\n{policy_yaml(policy)}", nl=False)


def policy_yaml(policy: Policy) -> str:
    """The policy in full as YAML."""
    import yaml

    from hhh_router.policy import as_document

    document = as_document(policy)
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="YAML files, or names of shipped policies.")],
    as_json: bool = _JSON,
) -> None:
    """Check policies; every mistake is listed with its file and line."""
    import json

    from hhh_router.errors import EXIT_USAGE, PolicyError
    from hhh_router.policy import load_policy

    found: list[dict[str, Any]] = []
    for file in files:
        try:
            found.append({"file": file, **_summary(load_policy(file)), "mistakes": []})
        except PolicyError as error:
            found.append({"file": file, "mistakes": error.message.splitlines()})
    wrong = sum(len(result["mistakes"]) for result in found)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for result in found:
            if not result["mistakes"]:
                typer.echo(f"{result['file']}: {result['name']}@{result['version']} is valid ({result['hash'][:8]})")
            for line in result["mistakes"]:
                typer.echo(line, err=True)
        if wrong:
            typer.echo(f"{wrong} mistake{'s' if wrong > 1 else ''}; docs/policies.md explains each key", err=True)
    if wrong:
        raise typer.Exit(EXIT_USAGE)


@app.command()
def explain(
    prompt: str = typer.Argument(..., help="The prompt to read."),
    policy: str | None = typer.Option(None, "--policy", "-p", metavar="NAME|FILE", help="Default: the deployment's."),
    bundle: str | None = typer.Option(None, "--bundle", "-b", metavar="PATH|NAME", help="Default: the deployment's."),
    weights: str | None = typer.Option(None, "--weights", "-w", help="Pin weights, such as hhh@2-6-5-3."),
    as_json: bool = _JSON,
) -> None:
    """Show step by step how a prompt's reading leads to its weights and decision: evidence → rule → weights."""
    import asyncio
    import json

    from rich.console import Console

    from hhh_router.settings import Settings

    from .render import parse_weights

    settings = Settings.load(policy=policy, bundle=bundle)
    pinned = parse_weights(weights) if weights is not None else None
    used, steps = asyncio.run(_explain(prompt, settings, pinned))
    if as_json:
        rows = [{"title": step.title, "detail": step.detail, "data": dict(step.data)} for step in steps]
        typer.echo(json.dumps({"policy": _summary(used), "prompt": prompt, "steps": rows}, indent=2))
        return
    print_steps(Console(highlight=False), used, steps)


@app.command()
def schema(as_json: bool = typer.Option(True, "--json/--no-json", hidden=True)) -> None:
    """Print the JSON schema of policy files, for editors."""
    import json

    from hhh_router.policy import policy_schema

    typer.echo(json.dumps(policy_schema(), indent=2))


async def _explain(prompt: str, settings: Settings, pinned: Weights | None) -> tuple[Policy, list[Step]]:
    from hhh_router.assemble import build_pipeline
    from hhh_router.pipeline.validate import check_guard
    from hhh_router.types import GuardRequest, Message, ReadRequest

    request = ReadRequest(messages=(Message(role="user", content=prompt),))
    check_guard(GuardRequest(read=request), max_bytes=settings.max_body_bytes)  # before seconds go into loading
    pipeline = build_pipeline(settings)
    try:
        return await explain_request(pipeline, request, pinned)
    finally:
        await pipeline.aclose()


async def explain_request(
    pipeline: Pipeline, request: ReadRequest, pinned: Weights | None
) -> tuple[Policy, list[Step]]:
    """The steps of one prompt under the pipeline's default policy, and that policy."""
    from hhh_router.pipeline.explain import explain
    from hhh_router.pipeline.situation import asked_situation, first_turn
    from hhh_router.policy import for_tenant
    from hhh_router.types import Caller

    parts = pipeline.parts
    [scores] = await parts.reader.read([request])
    policy = for_tenant(pipeline.policies.default, "")
    about = first_turn(asked_situation(request.messages, Caller(tenant=""), parts.now()))
    return policy, explain(scores, policy=policy, calibrators=parts.calibrators, pinned=pinned, situation=about)


def print_steps(console: Console, policy: Policy, steps: list[Step]) -> None:
    """Each step with its number, title and numbers."""
    from rich.text import Text

    console.print(Text(f"{policy.name}@{policy.version} ({policy.hash[:8]})", style="bold"))
    for i, step in enumerate(steps, 1):
        console.print(Text(f"\n{i:>2}. {step.title}", style="bold cyan"))
        for line in step.detail.splitlines():
            console.print(Text(f"    {line}"), soft_wrap=True)


def _summary(policy: Policy) -> dict[str, Any]:
    return {
        "name": policy.name,
        "version": policy.version,
        "hash": policy.hash,
        "description": policy.description,
        "source": policy.source,
    }
