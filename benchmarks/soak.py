"""Twice as many chats as fit, for a long time, with callers who leave at random: nothing may pile up.

``python -m benchmarks.soak --minutes 20`` drives the supervised engine, as a server does, and writes
``benchmarks/results/soak.json`` and a chart of memory, rows and keys over time. It fails where something leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.lab import plan_for
from hhh_router.bundle import Bundle
from hhh_router.errors import HHHRouterError
from hhh_router.model.engine import EmbeddedModel
from hhh_router.model.supervisor import Supervisor, open_supervised
from hhh_router.protocols import Finished
from hhh_router.settings import Settings
from hhh_router.types import Action, ChatRequest, Message, ReadRequest, Sampling, Weights

SAMPLES = 240  # over the whole run
MOST_GROWTH = 0.05  # of memory, from the second quarter's median to the last one's
_SUBJECTS = ("rivers", "bread", "the moon", "old clocks", "bees", "tax law", "a small village", "chess")


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine at one moment."""

    at_s: float
    memory_bytes: int
    rows: int
    waiting: int
    slot_tokens: int


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"process {pid} has no memory")


class Callers:
    """Callers who ask, leave at random, or wait for the end."""

    def __init__(self, model: EmbeddedModel, rng: random.Random, most_tokens: int) -> None:
        self._model = model
        self._rng = rng
        self._most_tokens = most_tokens
        self.outcomes: Counter[str] = Counter()

    async def run(self, until: float) -> None:
        """One caller after the other, to the end of the soak."""
        while time.monotonic() < until:
            try:
                await (self._read() if self._rng.random() < 0.15 else self._chat())
            except HHHRouterError as error:
                self.outcomes[error.code] += 1
                await asyncio.sleep(0.2 * self._rng.random())

    async def _read(self) -> None:
        texts = [ReadRequest(messages=self._messages()) for _ in range(self._rng.randint(1, 24))]
        found = await self._model.reader.read(texts)
        self.outcomes["read" if len(found) == len(texts) else "lost"] += 1

    async def _chat(self) -> None:
        rng = self._rng
        shares = np.array([rng.random() for _ in range(4)])
        weights = Weights(*(float(x) for x in shares / shares.sum()))
        action = Action.REFUSE if rng.random() < 0.1 else Action.ALLOW
        tokens = rng.randint(1, self._most_tokens)
        request = ChatRequest(
            messages=self._messages(), sampling=Sampling(max_tokens=tokens, temperature=rng.choice((0.0, 1.0)))
        )
        leaves_after = rng.randint(0, tokens) if rng.random() < 0.4 else None
        seen = 0
        events = self._model.generator.generate(request, plan_for(weights, action), window_tokens=8)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Finished):
                    self.outcomes[event.reason] += 1
                    return
                seen += 1
                if leaves_after is not None and seen > leaves_after:
                    self.outcomes["left"] += 1
                    return
        self.outcomes["lost"] += 1

    def _messages(self) -> tuple[Message, ...]:
        subject = self._rng.choice(_SUBJECTS)
        asked = Message(role="user", content=f"Tell me about {subject}. " * self._rng.randint(1, 12))
        shared = Message(role="system", content="You are a patient assistant of a public library. " * 4)
        return (shared, asked) if self._rng.random() < 0.5 else (asked,)


async def soak(model: EmbeddedModel, *, minutes: float, callers: int, seed: int, most_tokens: int) -> dict[str, Any]:
    """Run it; samples, outcomes, and what was left at the end."""
    supervisor = model.engine
    assert isinstance(supervisor, Supervisor)
    first_pid = supervisor.pid
    begun = time.monotonic()
    end = begun + 60 * minutes
    crowd = [Callers(model, random.Random(seed * 1000 + i), most_tokens) for i in range(callers)]
    tasks = [asyncio.create_task(c.run(end)) for c in crowd]
    samples: list[Sample] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("soaking", total=60 * minutes)
        while time.monotonic() < end:
            await asyncio.sleep(60 * minutes / SAMPLES)
            samples.append(_sample(supervisor, begun))
            progress.update(bar, completed=time.monotonic() - begun, description=f"{samples[-1].rows} rows")
    await asyncio.gather(*tasks)
    await asyncio.sleep(3)  # the last sign of life from the engine is a second old
    outcomes: Counter[str] = sum((c.outcomes for c in crowd), Counter())
    return {
        "samples": [asdict(s) for s in samples],
        "outcomes": dict(sorted(outcomes.items())),
        "left": asdict(_sample(supervisor, begun)),
        "restarts": int(supervisor.pid != first_pid),
    }


def _sample(supervisor: Supervisor, begun: float) -> Sample:
    load, pid = supervisor.load, supervisor.pid
    memory = resident_bytes(pid) if pid else 0
    return Sample(time.monotonic() - begun, memory, load.rows, load.waiting, load.slot_tokens)


def faults(found: dict[str, Any]) -> list[str]:
    """What leaked or got lost; nothing when all is well."""
    memory = [s["memory_bytes"] for s in found["samples"]]
    quarter = max(1, len(memory) // 4)
    before, after = (float(np.median(part)) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    said = []
    if after > before * (1 + MOST_GROWTH):
        said.append(f"memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    for what in ("rows", "waiting", "slot_tokens"):
        if found["left"][what]:
            said.append(f"{found['left'][what]} {what} are left")
    if found["outcomes"].get("lost"):
        said.append(f"{found['outcomes']['lost']} replies ended without saying so")
    if found["restarts"]:
        said.append("the engine's process died")
    return said


def chart(found: dict[str, Any], path: Path) -> None:
    """Memory and rows over time."""
    from matplotlib.figure import Figure

    samples = found["samples"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    at = [s["at_s"] / 60 for s in samples]
    above.plot(at, [s["memory_bytes"] / 2**20 for s in samples])
    above.set_ylabel("memory, MiB")
    above.set_ylim(bottom=0)
    below.plot(at, [s["rows"] for s in samples], label="rows decoding")
    below.plot(at, [s["waiting"] for s in samples], label="chats waiting")
    below.set_xlabel("minutes")
    below.legend(loc="upper right")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0 when nothing leaked, 1 when something did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--bundle", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8, help="replies decoded together; twice as many callers ask")
    parser.add_argument("--most-tokens", type=int, default=64, help="longest reply")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    given = parser.parse_args(argv)
    settings = Settings.load(max_rows=given.rows, max_waiting=given.rows, request_timeout_s=600)
    model = open_supervised(Bundle.load(given.bundle), settings)
    try:
        running = soak(
            model, minutes=given.minutes, callers=2 * given.rows, seed=given.seed, most_tokens=given.most_tokens
        )
        found = asyncio.run(running)
    finally:
        model.engine.close()
    wrong = faults(found)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.soak --minutes {given.minutes:g} --rows {given.rows} --seed {given.seed}"
    given.out.write_text(json.dumps({"command": command, "faults": wrong, **found}, indent=1) + "\n", encoding="utf-8")
    chart(found, given.out.with_suffix(".svg"))
    print(f"{given.minutes:g} minutes, {2 * given.rows} callers on {given.rows} rows: {found['outcomes']}")
    print("nothing leaked" if not wrong else "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
