"""What policies cost: a decision over 50 rules, taking changed files over, fitting limits, asking a candidate, replay.

``python -m benchmarks.policies`` writes ``benchmarks/results/policies.json``; run it on an idle machine. No model is
needed. ``--quick`` shows that all of it runs; its timings are void.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.figures import Record, meets, quartiles, write_json
from hhh_router.calibration import Calibrators
from hhh_router.evaluation.budget import fit_policy
from hhh_router.evaluation.budget_rows import FitRow
from hhh_router.pipeline import PolicyStore
from hhh_router.pipeline.again import decide_again
from hhh_router.policy import Door, Facts, Policy, decide, parse_policy
from hhh_router.policy.doors import SITUATIONS
from hhh_router.testing import fake_pipeline, make_scores
from hhh_router.trace.block import Metadata
from hhh_router.types import Caller, Conversation, GuardRequest, Message, ReadRequest, Situation, Weights

_DOOR = Door(name="the bench", supplies=SITUATIONS)
RULES = 50
ROWS = 10_000
SEED = 17
RESULTS = Path(__file__).resolve().parent / "results" / "policies.json"

_HEAD = "version: 1\nname: bench\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.6\n"
_KINDS = (
    'needs.harmless: ">= 0.{n:02d}", needs.honest: "< 0.0{d}"',
    'needs.injection: ">= 0.{n:02d}", outcomes.unsafe: ">= 0.9", in_distribution: false',
    "role: tool, needs.harmless: '>= 0.{n:02d}', tenant: team-{n}",
    'conversation.turns: ">= {n}00", needs.helpful: ">= 0.{n:02d}"',
    "model: 'model-{n}-*', route: /v1/chat/*",
)
"""Rules of two or three conditions that the facts do not satisfy, so that a decision asks every one of them."""


def policy_text(rules: int) -> str:
    """A policy with so many rules at input, the default rule among them."""
    lines = []
    for i in range(rules - 1):
        when = _KINDS[i % len(_KINDS)].format(n=99 - i, d=1 + i % 9)
        lines.append(f"    - {{when: {{{when}}}, then: refuse}}")
    body = "\n".join([*lines, "    - {then: allow}"])
    return f"{_HEAD}checkpoints:\n  input:\n{body}\n  output: [{{then: allow}}]\n"


def facts() -> Facts:
    """A plain request, which no rule stops."""
    return Facts(
        needs={"helpful": 0.1, "harmless": 0.2, "honest": 0.3, "injection": 0.05},
        outcomes={"unsafe": 0.1, "untruthful": 0.2, "unhelpful": 0.1},
        weights=Weights(0.25, 0.25, 0.25, 0.25),
        confidence=0.9,
        in_distribution=True,
        mode="prompt",
        situation=Situation(
            text="How do I bake bread?",
            role="user",
            caller=Caller(model="hhh", route="/v1/messages", tenant="team-0"),
            conversation=Conversation(turns=3),
        ),
    )


def decide_us(policy: Policy, found: Facts, times: int) -> float:
    """Median microseconds of one decision."""
    taken = []
    for _ in range(times):
        begun = perf_counter()
        decide(policy, "input", found)
        taken.append(perf_counter() - begun)
    return statistics.median(taken) * 1e6


def reload_ms(folder: Path, text: str) -> float:
    """Milliseconds from a changed file to the moment it is in force, the looking left out."""
    file = folder / "bench.yaml"
    file.write_text(text, encoding="utf-8")
    store = PolicyStore(file, allowed=(), door=_DOOR)
    file.write_text(text.replace("version: 1", "version: 2", 1), encoding="utf-8")
    begun = perf_counter()
    taken_over = store.reload()
    took = (perf_counter() - begun) * 1000
    if not taken_over or store.default.version != 2:
        raise RuntimeError(f"not reloaded: {store.status.error}")
    return took


def fit_rows(n: int, head: str = "needs.harmless") -> list[FitRow]:
    """Labelled rows with overlapping scores, in ten groups."""
    rng = random.Random(SEED)
    return [
        FitRow(
            scores=make_scores({head: rng.gauss(2.0 if i % 4 == 0 else -2.0, 1.5)}),
            harmful=i % 4 == 0,
            situation=Situation(),
            group=f"group {i // 4 % 10}",
        )
        for i in range(n)
    ]


_SHORT_BUDGET = "{benign_refused: 0.2, harm_passed: 0.3, level: 0.9}"
_WHOLE_BUDGET = (
    "{input: {benign_refused: 0.9, harm_passed: 0.9}, output: {safe_withheld: 0.9, unsafe_passed: 0.9}, "
    "weights: {benign_above: 0.9, harmful_below: 0.9, weight: 0.5, strengths: [0, 0.3, 0.6, 1]}, "
    "level: 0.9, per_group: true}"
)


def fit_s(rows: Sequence[FitRow], replies: Sequence[FitRow] = (), budget: str = _SHORT_BUDGET) -> float:
    """Seconds to fit a policy to these rows."""
    stops = '{when: {needs.injection: ">= 0.9"}, then: block}, {when: {needs.harmless: ">= 0.7"}, then: refuse}'
    policy = parse_policy(
        f"{_HEAD}floors: [{{when: {{needs.harmless: '>= 0.4'}}, raise: {{harmless: 0.6}}}}]\n"
        f"checkpoints:\n  input: [{stops}, {{then: allow}}]\n"
        f"  output: [{{when: {{outcomes.unsafe: '>= 0.7'}}, then: regenerate}}, {{then: allow}}]\nbudget: {budget}\n"
    )
    begun = perf_counter()
    fit_policy(
        policy, rows, Calibrators.none(), bundle_sha256="0" * 64, data="bench", data_sha256="0" * 64, replies=replies
    )
    return perf_counter() - begun


class _Kept:
    """Holds the latest record."""

    block: Metadata

    def write(self, metadata: Metadata, request: object, reply: str | None) -> None:
        """See `hhh_router.trace.Sink`."""
        self.block = metadata


def guarded_us(folder: Path, text: str, times: int, *, candidate: bool) -> tuple[float, Metadata]:
    """Median microseconds of one guarded prompt that a stand-in reads, and its record."""
    ours, theirs = folder / "ours.yaml", folder / "theirs.yaml"
    ours.write_text(text, encoding="utf-8")
    theirs.write_text(text.replace("name: bench", "name: next"), encoding="utf-8")
    kept = _Kept()
    beside: dict[str, Any] = {"candidate": str(theirs)} if candidate else {}
    pipeline = fake_pipeline(ours, sinks=[kept], door=_DOOR, allowed_policies=(), **beside)
    read = ReadRequest(messages=(Message(role="user", content="How do I bake bread?"),))
    asked = GuardRequest(read=read, caller=Caller(model="hhh", route="/v1/messages", tenant="team-0"))

    async def run() -> list[float]:
        taken = []
        for _ in range(times):
            begun = perf_counter()
            await pipeline.guard([asked])
            taken.append(perf_counter() - begun)
        return taken

    return statistics.median(asyncio.run(run())) * 1e6, kept.block


def candidate_us(folder: Path, text: str, times: int) -> float:
    """What a candidate adds to it."""
    return guarded_us(folder, text, times, candidate=True)[0] - guarded_us(folder, text, times, candidate=False)[0]


def again_us(block: Metadata, policy: Policy, times: int) -> float:
    """Median microseconds to put one recorded request to one policy."""
    taken = []
    for _ in range(times):
        begun = perf_counter()
        decide_again(block, policy, Calibrators.none())
        taken.append(perf_counter() - begun)
    return statistics.median(taken) * 1e6


def measure(name: str, unit: str, target: float, values: Sequence[float], command: str, note: str) -> Record:
    """One figure, as the other benchmarks write theirs."""
    low, value, high = quartiles(values)
    return {
        "name": name, "value": value, "unit": unit, "target": target, "at": "most",
        "meets": meets(value, target, "most"), "n": len(values), "low": low, "high": high, "command": command,
        "note": note, "setting": f"python {platform.python_version()}",
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all of it and write it down; 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--quick", action="store_true", help="one tiny round: shows that it runs, its timings are void")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    given = parser.parse_args(argv)
    repeats = 1 if given.quick else max(1, given.repeats)
    command = f"python -m benchmarks.policies{' --quick' if given.quick else f' --repeats {repeats}'}"
    text = policy_text(RULES)
    policy, found = parse_policy(text), facts()
    n = 400 if given.quick else ROWS
    rows, replies = fit_rows(n), fit_rows(n, "outcomes.unsafe")

    def rounds(one: Callable[[], float]) -> list[float]:
        one()  # the first one fills caches
        return [one() for _ in range(repeats)]

    times = 50 if given.quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        _, block = guarded_us(Path(folder), text, 1, candidate=False)
        records = [
            measure("policy-decide", "µs", 50.0, rounds(lambda: decide_us(policy, found, 50 if given.quick else 5000)),
                    command, f"median of one decision; {RULES} rules of 2 to 3 conditions, none but the last matches"),
            measure("policy-reload", "ms", 100.0, rounds(lambda: reload_ms(Path(folder), text)), command,
                    f"read, check and take over a file of {RULES} rules"),
            measure("policy-fit", "s", 30.0, rounds(lambda: fit_s(rows)), command,
                    f"{len(rows):,} scored rows, every decision made twice"),
            measure("policy-fit-whole", "s", 30.0, rounds(lambda: fit_s(rows, replies, _WHOLE_BUDGET)), command,
                    f"{len(rows):,} prompts and as many replies: input, output and weights, in 10 groups"),
            measure("policy-candidate", "µs", 1000.0, rounds(lambda: candidate_us(Path(folder), text, times)), command,
                    f"what asking a candidate of {RULES} rules adds to one guarded prompt, its record included"),
            measure("policy-again", "µs", 1000.0, rounds(lambda: again_us(block, policy, times)), command,
                    f"one recorded prompt put to a policy of {RULES} rules, as `replay --from audit` does"),
        ]  # fmt: skip
    write_json(given.out, records)
    for r in records:
        print(
            f"{r['name']:16} {r['value']:9.3f} {r['unit']:3} (at most {r['target']:g}) {'' if r['meets'] else 'MISSED'}"
        )
    return 0 if given.quick or all(r["meets"] for r in records) else 1


if __name__ == "__main__":
    sys.exit(main())
