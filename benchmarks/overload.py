"""More than a sidecar can take, offered at a fixed rate whatever becomes of it: what is answered, refused and lost."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from benchmarks.loopback import PATH, connections
from benchmarks.soak import resident_bytes

PATIENCE_S = 120.0
"""Longest that a client waits; who waits longer counts as lost."""
SAMPLED_S = 0.25
CLOSED_LOOP = 8  # connections that measure how much it can take
ALONE = 20  # requests one after the other, before and after

Outcome = Literal["judged", "on_error", "refused", "lost"]
"""``judged``: answered after its readings; ``on_error``: the reader was overloaded, and the policy's ``on_error``
decided, as the metadata says; ``refused``: 429 or 503 with ``Retry-After``; ``lost``: anything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What became of one request."""

    outcome: Outcome
    took_s: float
    told: str
    """Status and the rule that decided, or what broke."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident, in bytes."""

    sidecar: int
    model: int
    """Of the process that the sidecar has started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """What was seen."""

    capacity_per_s: float
    """Requests a second that it answered when each caller waited for its answer."""
    offered_per_s: float
    counts: dict[Outcome, int]
    examples: dict[str, int]
    """How often what was told; for those lost it says why."""
    alone_before_ms: float
    """Median of requests one after the other."""
    alone_after_ms: float
    settled_s: float
    """From the last request until all were answered."""
    memory_before: Memory
    memory_peak: Memory


def overload(port: int, pid: int, *, times: float, seconds: float, measured_s: float) -> Overload:
    """Measure what the sidecar on a port can take, then offer it so many times as much for so long."""
    return asyncio.run(_overload(port, pid, times, seconds, measured_s))


async def _overload(port: int, pid: int, times: float, seconds: float, measured_s: float) -> Overload:
    before = await _alone(port, 1_000_000)
    capacity = await _capacity(port, measured_s)
    memory = [_memory(pid)]
    sampler = asyncio.create_task(_sample(pid, memory))
    begun = perf_counter()
    asked: list[asyncio.Task[Reply]] = []
    total = max(1, int(capacity * times * seconds))
    for i in range(total):  # an open loop: the next one does not wait for the last one's answer
        await asyncio.sleep(begun + i * seconds / total - perf_counter())
        asked.append(asyncio.create_task(_ask(port, i)))
    offered = total / (perf_counter() - begun)
    last = perf_counter()
    replies = await asyncio.gather(*asked)
    settled = perf_counter() - last
    sampler.cancel()
    after = await _alone(port, 2_000_000)
    return Overload(
        capacity_per_s=capacity,
        offered_per_s=offered,
        counts=dict(Counter(r.outcome for r in replies)),
        examples=dict(Counter(f"{r.outcome}: {r.told}" for r in replies)),
        alone_before_ms=before,
        alone_after_ms=after,
        settled_s=settled,
        memory_before=memory[0],
        memory_peak=Memory(max(m.sidecar for m in memory), max(m.model for m in memory)),
    )


def body(number: int) -> dict[str, Any]:
    """A chat that was not asked before."""
    said = f"Question {number}: what is the capital of France, and which river runs through it?"
    return {"model": "stub", "messages": [{"role": "user", "content": said}]}


async def _alone(port: int, first: int) -> float:
    async with connections(port, 1) as [connection]:
        await connection.ask(body(first))
        heard = [await connection.ask(body(first + i)) for i in range(1, ALONE + 1)]
        return 1000 * statistics.median(h.whole_s for h in heard)


async def _capacity(port: int, seconds: float) -> float:
    async with connections(port, CLOSED_LOOP) as made:
        ends, begun, done = perf_counter() + seconds, perf_counter(), 0

        async def one(connection: Any) -> None:
            nonlocal done
            while perf_counter() < ends:
                number, done = done, done + 1
                await connection.ask(body(3_000_000 + number))

        await asyncio.gather(*(one(c) for c in made))
        return done / (perf_counter() - begun)


async def _ask(port: int, number: int) -> Reply:
    """One request on a connection of its own."""
    begun = perf_counter()
    try:
        async with asyncio.timeout(PATIENCE_S):
            status, headers, said = await _exchange(port, json.dumps(body(number)).encode())
    except (OSError, EOFError, LookupError, ValueError) as error:
        return Reply(outcome="lost", took_s=perf_counter() - begun, told=type(error).__name__)
    took_s = perf_counter() - begun
    if status == 200:
        rules = [d["rule"] for d in json.loads(said)["hhh"]["decisions"]]
        outcome: Outcome = "on_error" if "on_error" in rules else "judged"
        return Reply(outcome=outcome, took_s=took_s, told=f"{status} {outcome}")
    told = status in (429, 503) and headers.get("retry-after", "").isdecimal()
    code = json.loads(said)["error"]["code"]
    return Reply(outcome="refused" if told else "lost", took_s=took_s, told=f"{status} {code}")


async def _exchange(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        fields = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        writer.write(f"{fields}\r\nConnection: close\r\n\r\n".encode() + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.lower().splitlines()
        headers = dict(line.split(": ", 1) for line in lines if line)
        said = await reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, said
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _sample(pid: int, memory: list[Memory]) -> None:
    while True:
        await asyncio.sleep(SAMPLED_S)
        memory.append(_memory(pid))


def _memory(pid: int) -> Memory:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in task.joinpath("children").read_text().split()
    ]
    return Memory(resident_bytes(pid), sum(resident_bytes(child) for child in children))
