"""What policies do on public eval prompts that no limit was fitted on: both errors, beside what their locks promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhh_router.data.examples import Example, data_hash
from hhh_router.evaluation.intervals import with_interval
from hhh_router.evaluation.systems import Readings
from hhh_router.evaluation.tasks import TASKS, task_rows
from hhh_router.pipeline.onerror import JUDGING_FAILURES, failed_decision
from hhh_router.pipeline.plan import make_plan
from hhh_router.pipeline.situation import asked_situation
from hhh_router.policy import Policy, for_tenant
from hhh_router.types import Caller, ReadRequest, Scores

SCHEMA = "hhh-router/policy-report/1"
BOOTSTRAPS = 1000

Bools = NDArray[np.bool_]


def eval_prompts(data: Path) -> dict[str, list[Example]]:
    """The eval prompts of the guard suite by task, labelled for harm; a task that is a part of another is left out.

    Raises:
        DataError: A data set is not there.
    """
    tasks = [t for t in TASKS if t.suite == "guard" and t.kind == "needs" and t.head == "harmless"]
    found = {t.name: task_rows(t, data) for t in tasks}
    whole = [name for name in found if not any(other != name and name.startswith(f"{other}, ") for other in found)]
    return {name: found[name] for name in whole}


def policy_figures(
    policies: Sequence[Policy],
    tasks: dict[str, list[Example]],
    readings: Readings,
    *,
    seed: int,
    command: str,
    on_progress: Callable[[int, int, str], object] = lambda *_: None,
) -> dict[str, Any]:
    """Both errors of every policy on every task, and on all prompts together, with bootstrap intervals.

    A prompt counts as stopped where the input checkpoint stops it, as for a tenant of whom nothing is known.
    """
    everything = list({e.prompt: e for rows in tasks.values() for e in rows}.values())
    scores = dict(
        zip(
            (e.prompt for e in everything),
            readings.scores([ReadRequest(messages=e.messages) for e in everything]),
            strict=True,
        )
    )
    groups = {"all prompts": everything, **tasks}
    figures = []
    for i, policy in enumerate(policies):
        on_progress(i, len(policies), policy.name)
        stopped = {e.prompt: _stops(policy, e, scores[e.prompt], readings) for e in everything}
        for name, rows in groups.items():
            harmful = np.array([bool(e.needs["harmless"]) for e in rows])
            stops = np.array([stopped[e.prompt] for e in rows])
            figures.append(
                {"policy": policy.name, "hash": policy.hash, "task": name, "data_sha256": data_hash(rows)}
                | {"n": len(rows), "n_harmful": int(harmful.sum()), "n_benign": int((~harmful).sum())}
                | _errors(stops, harmful, seed)
            )
    return {
        "schema": SCHEMA,
        "command": command,
        "seed": seed,
        "bundle": readings.about,
        "policies": [_about(p) for p in policies],
        "figures": figures,
    }


def _stops(policy: Policy, example: Example, scores: Scores | None, readings: Readings) -> bool:
    used = for_tenant(policy, "")
    if scores is None:
        return used.on_error == "closed"
    situation = asked_situation(example.messages, Caller(tenant=""), None)
    try:
        plan = make_plan(scores, policy=used, calibrators=readings.calibrators, situation=situation)
    except JUDGING_FAILURES as error:
        return failed_decision(used, "input", error).action.stops
    return plan.decision.action.stops


def _errors(stops: Bools, harmful: Bools, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, wrong in (("benign_refused", stops[~harmful]), ("harm_passed", ~stops[harmful])):
        if len(wrong):
            found |= with_interval(key, lambda x: float(np.mean(x)), wrong, seed=seed, bootstraps=BOOTSTRAPS)
        else:
            found |= {key: None, f"{key}_interval": None}
    return found


def _about(policy: Policy) -> dict[str, Any]:
    lock, budget = policy.lock, policy.budget
    return {
        "name": policy.name,
        "version": policy.version,
        "hash": policy.hash,
        "description": policy.description,
        "budget": budget and {k: getattr(budget, k) for k in ("benign_refused", "harm_passed", "level")},
        "lock": lock and {k: getattr(lock, k) for k in ("limit", "benign_refused_bound", "harm_passed_bound")},
    }


def as_table(result: dict[str, Any]) -> str:
    """A Markdown table: what each policy accepts, promises, and does on all prompts."""
    rows = {f["policy"]: f for f in result["figures"] if f["task"] == "all prompts"}
    figures = "accepted · promised · on eval"
    lines = [f"| policy | limit | benign refused: {figures} | harm passed: {figures} |", "|---|---|---|---|"]
    for about in result["policies"]:
        cells = [f"`{about['name']}`", f"{about['lock']['limit']:.3f}" if about["lock"] else "–"]
        for key in ("benign_refused", "harm_passed"):
            accepted = _share(about["budget"] and about["budget"][key])
            promised = _share(about["lock"] and about["lock"][f"{key}_bound"])
            figure = rows[about["name"]]
            low, high = figure[f"{key}_interval"]
            cells.append(f"{accepted} · {promised} · {_share(figure[key])} ({100 * low:.1f}–{100 * high:.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
