"""Measure the server: ``python -m benchmarks.server [--only NAME ...] [--repeats N] [--quick] [--out FILE]``.

The server runs in a process of its own, as `hhh-router serve` starts it; clients run in this one, on the same cores.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter

from benchmarks.figures import Figure, Measured
from benchmarks.lab import QUICK, Lab
from benchmarks.present import present
from benchmarks.run import leave, parse, run
from benchmarks.serving import Address, Client, Heard, serve, started, stream_all
from benchmarks.timing import seconds
from hhh_router import HHHRouter
from hhh_router.errors import HHHRouterError

PROMPT = "What is the capital of France?"
CALLS = 100
"""Of each side in one round of the added latency; they take turns call by call."""
STREAMS = 200
WORDS = 60
PAUSE_S = 0.05
"""Between two words of the stand-in's streams."""
REPLY_TOKENS = 60
_SHADOW = """\
version: 1
name: bench
mode: shadow
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0.5
checkpoints: {input: [{then: allow}], output: [{then: allow}]}
on_error: open
stream: {window_tokens: 24}
"""


def added_latency(lab: Lab) -> Measured:
    """Milliseconds that the median guard call takes longer over HTTP than in the SDK."""
    calls = 3 if lab.sizes == QUICK else CALLS
    body = json.dumps({"prompt": PROMPT}).encode()
    threads = lab.settings.threads
    added, over_http, in_process = [], [], []
    with (
        started(serve(str(lab.bundle.root)), threads=threads) as address,
        HHHRouter(bundle=str(lab.bundle.root), threads=threads) as router,
        closing(Client(address)) as client,
    ):
        for number in range(-1, lab.repeats):  # the first round is thrown away
            sdk, server = [], []
            for _ in range(calls):
                sdk.append(seconds(lambda: router.guard(PROMPT)))
                server.append(seconds(lambda: client.post("/v1/guard", body)))
            lab.on_step()
            if number >= 0:
                in_process.append(1000 * statistics.median(sdk))
                over_http.append(1000 * statistics.median(server))
                added.append(over_http[-1] - in_process[-1])
    sides = {"server p50 (ms)": statistics.median(over_http), "SDK p50 (ms)": statistics.median(in_process)}
    return Measured(values=added, sides=sides, note=f"one prompt, {calls} calls of each side a round, by turns")


def door_gap(lab: Lab) -> Measured:
    """Seconds that 99 in 100 gaps between words stay within, where a stand-in says one every 50 ms to every stream."""
    streams, words = (5, 6) if lab.sizes == QUICK else (STREAMS, WORDS)
    body = {"model": "hhh-auto", "stream": True, "max_tokens": words, "messages": [{"role": "user", "content": PROMPT}]}
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "bench.yaml"
        policy.write_text(_SHADOW, encoding="utf-8")
        arguments = ["-m", "benchmarks.serving", str(PAUSE_S), str(words), str(policy)]
        with started(arguments, policy=policy) as address:
            return _streamed(lab, address, body, streams, f"{streams} streams of {words} words, one every {PAUSE_S} s")


def engine_gap(lab: Lab) -> Measured:
    """The same of the embedded model, all streams decoded together, under the default policy."""
    # of fewer tokens a tiny random model makes no two pieces of text: most of its bytes are no whole character
    streams, tokens = (3, 40) if lab.sizes == QUICK else (STREAMS, REPLY_TOKENS)
    body = {
        "model": "hhh@4-6-3-3",
        "stream": True,
        "max_tokens": tokens,
        "temperature": 1.0,
        "messages": [{"role": "user", "content": "Tell me about rivers."}],
    }
    rows = {"max_rows": streams, "max_waiting": streams, "request_timeout_s": 600, "threads": lab.settings.threads}
    with started(serve(str(lab.bundle.root)), **rows) as address:
        said = f"{streams} streams of up to {tokens} tokens, decoded together; text comes in windows of 24 tokens"
        return _streamed(lab, address, body, streams, said)


def _streamed(lab: Lab, address: Address, body: dict[str, object], streams: int, said: str) -> Measured:
    values, rounds = [], []
    for number in range(-1, min(lab.repeats, 3)):
        heard = asyncio.run(stream_all(address, body, streams))
        lab.on_step()
        if (broken := sum(not h.is_whole for h in heard)) > 0:
            raise RuntimeError(f"{broken} of {streams} streams did not come to their end")
        if number >= 0:
            values.append(quantile([gap for h in heard for gap in h.gaps_s], 0.99))
            rounds.append(heard)
    sides = {
        "p50 gap (s)": statistics.median(gap for heard in rounds for h in heard for gap in h.gaps_s),
        "longest gap (s)": max(gap for heard in rounds for h in heard for gap in h.gaps_s),
        "p99 to the first words (s)": quantile([h.first_s for heard in rounds for h in heard], 0.99),
        "slowest stream over the median": statistics.median(_slowest(heard) for heard in rounds),
    }
    return Measured(values=values, sides=sides, note=said)


def _slowest(heard: Sequence[Heard]) -> float:
    """How much longer the slowest stream took than the median one: 1 where all are served alike."""
    took = [h.first_s + sum(h.gaps_s) for h in heard]
    return max(took) / statistics.median(took)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so many stay within.

    >>> quantile([3.0, 1.0, 2.0, 4.0], 0.5), quantile([1.0, 9.0], 0.99)
    (2.0, 9.0)
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def start_to_ready(lab: Lab) -> Measured:
    """Seconds from the command until `/health/ready` says so, the files being in memory already."""
    values = []
    for number in range(-1, min(lab.repeats, 3)):
        begun = perf_counter()
        with started(serve(str(lab.bundle.root)), threads=lab.settings.threads) as address:
            with closing(Client(address)) as client:
                client.get("/health/ready")
            took = perf_counter() - begun
        lab.on_step()
        if number >= 0:
            values.append(took)
    return Measured(values=values, note="a first start is thrown away")


FIGURES = (
    Figure(
        name="guard-added-ms",
        title="Guard call over HTTP: added to the SDK's median",
        unit="ms",
        target=3.0,
        at="most",
        measure=added_latency,
    ),
    Figure(
        name="start-to-ready",
        title="Start of the server until it is ready, warm",
        unit="s",
        target=15.0,
        at="most",
        measure=start_to_ready,
    ),
    Figure(
        name="streams-200-door",
        title="200 streams: p99 gap between words of a stand-in that says one every 0.05 s",
        unit="s",
        target=None,
        measure=door_gap,
    ),
    Figure(
        name="streams-200-engine",
        title="200 streams of the embedded model: p99 gap between pieces of text",
        unit="s",
        target=None,
        measure=engine_gap,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; exit codes as of `benchmarks.engine`."""
    options = parse("benchmarks.server", "What the server adds.", FIGURES, argv)
    try:
        records, failed = run(options, FIGURES)
    except (HHHRouterError, ValueError) as error:
        return leave(error)
    present(records, options.out, chart=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
