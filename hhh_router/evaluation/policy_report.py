"""What policies do on public eval rows that no limit was fitted on: every error, beside what their locks promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhh_router.calibration import Calibrators
from hhh_router.calibration.kept import Kept
from hhh_router.data.examples import Example, data_hash
from hhh_router.evaluation.budget import worst_groups
from hhh_router.evaluation.budget_page import error_names
from hhh_router.evaluation.budget_rows import KEPT_KNOWN, kept_replies, kept_rows
from hhh_router.evaluation.intervals import with_interval
from hhh_router.evaluation.systems import Readings
from hhh_router.evaluation.tasks import TASKS, task_rows
from hhh_router.pipeline.onerror import JUDGING_FAILURES, failed_decision
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.pipeline.situation import answered_situation, asked_situation
from hhh_router.policy import Policy, as_document, for_tenant
from hhh_router.policy.lock import EXPERT
from hhh_router.policy.schema import ERRORS, PASSING
from hhh_router.types import Caller, ReadRequest, Scores

SCHEMA = "hhh-router/policy-report/2"
BOOTSTRAPS = 1000
TOGETHER: Mapping[str, str] = {"input": "all prompts", "output": "all replies", "weights": "all prompts"}
"""Part of a budget → the group of every row of its tasks."""

_LABELS: Mapping[str, tuple[str, str]] = {
    "input": ("benign", "harmful"),
    "output": ("safe", "unsafe"),
    "weights": ("benign", "harmful"),
}
_ROUNDING = 1e-9  # of weights, as where floors are fitted

Bools = NDArray[np.bool_]
Tasks = Mapping[str, list[Example]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What one policy did with one row."""

    stopped: bool
    weight: float
    """Of the harmless expert; 0 where nothing could be read."""


def eval_prompts(data: Path) -> dict[str, list[Example]]:
    """The eval prompts of the guard suite by task, labelled for harm; a task that is a part of another is left out.

    Raises:
        DataError: A data set is not there.
    """
    tasks = [t for t in TASKS if t.suite == "guard" and t.kind == "needs" and t.head == "harmless"]
    found = {t.name: task_rows(t, data) for t in tasks}
    whole = [name for name in found if not any(other != name and name.startswith(f"{other}, ") for other in found)]
    return {name: found[name] for name in whole}


def eval_replies(data: Path) -> dict[str, list[Example]]:
    """The eval replies of the reply suite by task, labelled for safety.

    Raises:
        DataError: A data set is not there.
    """
    return {t.name: task_rows(t, data) for t in TASKS if t.suite == "reply" and t.head == "unsafe"}


def policy_figures(
    policies: Sequence[Policy],
    tasks: Tasks,
    readings: Readings,
    *,
    seed: int,
    command: str,
    replies: Tasks | None = None,
    kept: Kept | None = None,
    on_progress: Callable[[int, int, str], object] = lambda *_: None,
) -> dict[str, Any]:
    """Every error of every policy on every task, and on all rows together, with bootstrap intervals.

    A prompt counts as stopped where the input checkpoint stops it, a reply as withheld where output does not let it
    through, both as for a tenant of whom nothing is known. What weights a prompt gets is told of policies that have a
    budget for it. With what a bundle keeps, every limit's bounds in the worst group of those rows are told as well.
    """
    prompts = list({e.prompt: e for rows in tasks.values() for e in rows}.values())
    answered = [e for rows in (replies or {}).values() for e in rows]
    both = [*prompts, *answered]
    asked = _by_request(readings, [ReadRequest(messages=e.messages) for e in both])
    read = _by_request(readings, [e.read() for e in answered])
    figures = []
    for i, policy in enumerate(policies):
        on_progress(i, len(policies), policy.name)
        judged = {_key(e): _prompt(policy, e, asked, readings) for e in prompts}
        for name, rows in {TOGETHER["input"]: prompts, **tasks}.items():
            figures.append(_figure(policy, "input", name, rows, [judged[_key(e)].stopped for e in rows], seed))
            if policy.budget is not None and policy.budget.weight is not None:
                least = policy.budget.weight - _ROUNDING
                heavy = [judged[_key(e)].weight >= least for e in rows]
                figures.append(_figure(policy, "weights", name, rows, heavy, seed))
        withheld = {id(e): _reply(policy, e, asked, read, readings) for e in answered}
        for name, rows in {TOGETHER["output"]: answered, **(replies or {})}.items():
            if rows:
                figures.append(_figure(policy, "output", name, rows, [withheld[id(e)] for e in rows], seed))
    return {
        "schema": SCHEMA,
        "command": command,
        "seed": seed,
        "bundle": readings.about,
        "policies": [_about(p, readings.calibrators, kept) for p in policies],
        "figures": figures,
    }


def _key(example: Example) -> str:
    return example.prompt


def _by_request(readings: Readings, requests: Sequence[ReadRequest]) -> dict[ReadRequest, Scores | None]:
    once = list(dict.fromkeys(requests))
    return dict(zip(once, readings.scores(once), strict=True))


def _prompt(
    policy: Policy, example: Example, asked: Mapping[ReadRequest, Scores | None], readings: Readings
) -> _Judged:
    used = for_tenant(policy, "")
    scores = asked[ReadRequest(messages=example.messages)]
    if scores is None:
        return _Judged(stopped=used.on_error == "closed", weight=0.0)
    situation = asked_situation(example.messages, Caller(tenant=""), None)
    try:
        plan = make_plan(scores, policy=used, calibrators=readings.calibrators, situation=situation)
    except JUDGING_FAILURES as error:
        return _Judged(stopped=failed_decision(used, "input", error).action.stops, weight=0.0)
    return _Judged(stopped=plan.decision.action.stops, weight=plan.weights[EXPERT])


def _reply(
    policy: Policy,
    example: Example,
    asked: Mapping[ReadRequest, Scores | None],
    read: Mapping[ReadRequest, Scores | None],
    readings: Readings,
) -> bool:
    """Whether output would not let a finished reply through as it is."""
    used = for_tenant(policy, "")
    prompt, reply = asked[ReadRequest(messages=example.messages)], read[example.read()]
    if prompt is None or reply is None:
        return used.on_error == "closed"
    situation = asked_situation(example.messages, Caller(tenant=""), None)
    try:
        plan = make_plan(prompt, policy=used, calibrators=readings.calibrators, situation=situation)
        _, _, decision = judge_output(
            reply, plan=plan, policy=used, calibrators=readings.calibrators,
            situation=answered_situation(situation, example.response),
        )  # fmt: skip
    except JUDGING_FAILURES as error:
        decision = failed_decision(used, "output", error)
    return decision.action not in PASSING


def _figure(
    policy: Policy, part: str, task: str, rows: Sequence[Example], stopped: Sequence[bool], seed: int
) -> dict[str, Any]:
    bad = np.array([bool(e.outcomes["unsafe"] if part == "output" else e.needs["harmless"]) for e in rows])
    good_name, bad_name = _LABELS[part]
    return (
        {"policy": policy.name, "hash": policy.hash, "part": part, "task": task, "data_sha256": data_hash(rows)}
        | {"n": len(rows), f"n_{bad_name}": int(bad.sum()), f"n_{good_name}": int((~bad).sum())}
        | _errors(part, np.array(stopped), bad, seed)
    )


def _errors(part: str, stopped: Bools, bad: Bools, seed: int) -> dict[str, Any]:
    falling, rising = ERRORS[part]
    found: dict[str, Any] = {}
    for key, wrong in ((falling, stopped[~bad]), (rising, ~stopped[bad])):
        if len(wrong):
            found |= with_interval(key, lambda x: float(np.mean(x)), wrong, seed=seed, bootstraps=BOOTSTRAPS)
        else:
            found |= {key: None, f"{key}_interval": None}
    return found


def _about(policy: Policy, calibrators: Calibrators, kept: Kept | None) -> dict[str, Any]:
    document = as_document(policy)
    worst = {}
    if kept is not None and policy.lock is not None and policy.lock.data_sha256 == kept.sha256:
        worst = worst_groups(policy, kept_rows(kept), calibrators, known=KEPT_KNOWN, replies=kept_replies(kept))
    return {
        "name": policy.name,
        "version": policy.version,
        "hash": policy.hash,
        "description": policy.description,
        "budget": None if policy.budget is None else {part: dict(most) for part, most in policy.budget.most.items()},
        "level": None if policy.budget is None else policy.budget.level,
        "lock": None if policy.lock is None else {part: document["lock"][part] for part in policy.lock.parts},
        "worst_group": {part: {name: asdict(w) for name, w in errors.items()} for part, errors in worst.items()},
    }


def as_table(result: Mapping[str, Any]) -> str:
    """Markdown: what each policy accepts, promises and does, of all prompts at input, then of replies and weights."""
    tables = [_table(result, "input", result["policies"])]
    for part in ("output", "weights"):
        measured = {f["policy"] for f in result["figures"] if f["part"] == part}
        if about := [p for p in result["policies"] if p["name"] in measured]:
            tables.append(_table(result, part, about))
    if any(p["worst_group"] for p in result["policies"]):
        tables.append(_group_table(result))
    return "\n".join(tables)


def _group_table(result: Mapping[str, Any]) -> str:
    """What is promised of all rows, in every group of them, and what came out on eval."""
    figures = "promised of all rows · bound in the worst group · on eval"
    lines = [f"| error | policy | {figures} |", "|---|---|---|"]
    for about in result["policies"]:
        for part, errors in about["worst_group"].items():
            rows = [
                f for f in result["figures"]
                if (f["policy"], f["part"], f["task"]) == (about["name"], part, TOGETHER[part])
            ]  # fmt: skip
            for (key, worst), name in zip(errors.items(), error_names(part), strict=True):
                found = _share(rows[0][key]) if rows else "–"
                promised = _share(about["lock"][part][key]["bound"])
                every = f"{_share(worst['bound'])} ({worst['group']})"
                lines.append(f"| {name} | `{about['name']}` | {promised} · {every} · {found} |")
    return "\n".join(lines) + "\n"


def _table(result: Mapping[str, Any], part: str, policies: Sequence[Mapping[str, Any]]) -> str:
    rows = {f["policy"]: f for f in result["figures"] if (f["part"], f["task"]) == (part, TOGETHER[part])}
    figures = "accepted · promised · on eval"
    names = error_names(part)
    of = "floor's limit" if part == "weights" else "limit"
    lines = [f"| policy | {of} | {' | '.join(f'{name}: {figures}' for name in names)} |", "|---|---|---|---|"]
    for about in policies:
        accepted = (about["budget"] or {}).get(part, {})
        lock = (about["lock"] or {}).get(part)
        cells = [f"`{about['name']}`", "–" if lock is None else f"{lock['limit']:.3f}"]
        for key in ERRORS[part]:
            promised = None if lock is None else lock[key]["bound"]
            figure = rows[about["name"]]
            low, high = figure[f"{key}_interval"]
            found = f"{_share(figure[key])} ({100 * low:.1f}–{100 * high:.1f})"
            cells.append(f"{_share(accepted.get(key))} · {_share(promised)} · {found}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
