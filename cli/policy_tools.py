"""``hhh-router policy test``, ``lint``, ``diff`` and ``graph``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hhh_router.evaluation.policy_examples import Tested

_JSON = typer.Option("--json", help="Print JSON.")
_POLICY = typer.Argument(metavar="NAME|FILE", help="A shipped policy's name, or the path of a YAML file.")


def run_examples(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Policies with examples.")],
    bundle: Annotated[str | None, typer.Option("--bundle", "-b", help="Default: the deployment's.")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Run the examples of policies on a bundle; exit 1 where one is decided otherwise than expected."""
    import json

    from hhh_router.bundle import Bundle
    from hhh_router.errors import EXIT_FAILURE, MissingExtra, PolicyError
    from hhh_router.policy import load_policy
    from hhh_router.settings import Settings

    try:
        from hhh_router.evaluation import policy_examples
        from hhh_router.evaluation.systems import BundleReadings
    except ImportError as error:
        raise MissingExtra("train", needed_for="testing a policy") from error
    policies = [load_policy(file) for file in files]
    if bare := [f for f, p in zip(files, policies, strict=True) if not p.examples]:
        raise PolicyError(
            f"{bare[0]}: has no examples", hint="add some, such as examples: [{prompt: How do I bake?, expect: allow}]"
        )
    settings = Settings.load(bundle=bundle)
    readings = BundleReadings(Bundle.load(settings.bundle), settings)
    found = {file: policy_examples.run_examples(policy, readings) for file, policy in zip(files, policies, strict=True)}
    failed = sum(not t.passed for tested in found.values() for t in tested)
    if as_json:
        typer.echo(json.dumps({file: [_row(t) for t in tested] for file, tested in found.items()}, indent=2))
    else:
        for file, tested in found.items():
            for t in tested:
                if not t.passed:
                    typer.echo(f"{file}:{t.example.line}  {_told(t)}", err=True)
            typer.echo(f"{file}: {sum(t.passed for t in tested)} of {len(tested)} examples as expected")
    if failed:
        raise typer.Exit(EXIT_FAILURE)


def _row(tested: Tested) -> dict[str, Any]:
    example, decision = tested.example, tested.decision
    return {
        "line": example.line,
        "checkpoint": example.checkpoint,
        "expect": list(example.expect),
        "action": None if decision is None else str(decision.action),
        "rule": None if decision is None else decision.rule,
        "reason": None if decision is None else decision.reason,
        "passed": tested.passed,
    }


def _told(tested: Tested) -> str:
    expected = " or ".join(tested.example.expect)
    if tested.decision is None:
        return f"{expected} expected at {tested.example.checkpoint}, where the policy has no rules"
    d = tested.decision
    return f"{expected} expected at {tested.example.checkpoint}, found {d.action} by {d.rule}: {d.reason}"


def lint(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="YAML files, or names of shipped policies.")],
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 where there is anything to look at.")] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Tell what is no mistake in a policy, and most likely not meant."""
    import json
    from dataclasses import asdict

    from hhh_router.errors import EXIT_FAILURE
    from hhh_router.policy import load_policy
    from hhh_router.policy.lint import lint as hints_of

    found = {file: hints_of(load_policy(file)) for file in files}
    if as_json:
        typer.echo(json.dumps({file: [asdict(h) for h in hints] for file, hints in found.items()}, indent=2))
    else:
        for file, hints in found.items():
            for hint in hints:
                typer.echo(f"{file}: {hint}")
            if not hints:
                typer.echo(f"{file}: nothing to look at")
    if strict and any(found.values()):
        raise typer.Exit(EXIT_FAILURE)


def diff(
    one: Annotated[str, _POLICY],
    other: Annotated[str, _POLICY],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Show what differs between two policies, `extends` applied; exit 1 where anything does."""
    import json
    from dataclasses import asdict

    from hhh_router.errors import EXIT_FAILURE
    from hhh_router.policy import load_policy
    from hhh_router.policy.compare import changes

    found = changes(load_policy(one), load_policy(other))
    if as_json:
        typer.echo(json.dumps([asdict(c) for c in found], indent=2))
    else:
        for change in found:
            typer.echo(str(change))
        if not found:
            typer.echo("no difference")
    if found:
        raise typer.Exit(EXIT_FAILURE)


def graph(file: Annotated[str, _POLICY]) -> None:
    """Print a policy's rules as a Mermaid flowchart."""
    from hhh_router.policy import load_policy
    from hhh_router.policy.compare import graph as drawn

    typer.echo(drawn(load_policy(file)), nl=False)
