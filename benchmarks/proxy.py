"""What the sidecar adds, on loopback: ``python -m benchmarks.proxy [--only NAME ...] [--repeats N] [--quick]``.

Every side is asked in turn with the same requests: the upstream directly, the sidecar before it, and LiteLLM's proxy
before it where ``HHH_ROUTER_BENCH_LITELLM`` names its ``litellm`` command (in an environment of its own).
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.figures import Figure, Measured, NotMeasured, Results, record, write_json
from benchmarks.loopback import Heard, connections, process, wait_for
from benchmarks.machine import load_average, versions
from benchmarks.present import present
from benchmarks.run import Options, leave, line, parse
from benchmarks.soak import resident_bytes
from benchmarks.timing import interleaved, ratios
from hhh_router.errors import HHHRouterError

LITELLM = "HHH_ROUTER_BENCH_LITELLM"
STREAMS, CHUNKS, PAUSE_MS = 200, 40, 50  # as many tokens a second as a large model has for each of its readers
CONCURRENT = 32
WINDOW_CHUNKS = 4  # of the stub's chunks, in a window of 24 tokens
_PROMPT_64 = "Tell me about the capital of France and its rivers and bridges. " * 5  # about 64 tokens, with a template
_BODY: dict[str, Any] = {"model": "stub", "messages": [{"role": "user", "content": "What is the capital of France?"}]}


@dataclass
class Bench:
    """The servers, started when they are first asked, and the sizes of a run."""

    bundle: str
    repeats: int
    quick: bool
    stack: ExitStack = field(default_factory=ExitStack)
    on_step: Callable[[], None] = lambda: None

    @cached_property
    def upstream(self) -> int:
        """Port of the stub."""
        return self.stack.enter_context(process("upstream"))[0]

    @cached_property
    def observing(self) -> tuple[int, int]:
        """Port and process of a sidecar without a model."""
        return self.stack.enter_context(process("sidecar", self.url, "observe"))

    @cached_property
    def keeping(self) -> int:
        """Port of a sidecar without a model that keeps an audit."""
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        audit = str(Path(folder) / "audit.sqlite3")
        return self.stack.enter_context(process("sidecar", self.url, "observe", "--audit", audit))[0]

    @cached_property
    def enforcing(self) -> int:
        """Port of a sidecar whose bundle reads."""
        return self.stack.enter_context(process("sidecar", self.url, "enforce", "--bundle", self.bundle))[0]

    @cached_property
    def litellm(self) -> int:
        """Port of LiteLLM's proxy.

        Raises:
            NotMeasured: Nobody says where it is.
        """
        command = os.environ.get(LITELLM)
        if not command:
            raise NotMeasured(f"{LITELLM} does not name LiteLLM's command")
        return self.stack.enter_context(_litellm(command, self.url))

    @property
    def url(self) -> str:
        """Of the stub."""
        return f"http://127.0.0.1:{self.upstream}/v1"

    def sized(self, full: int, quick: int) -> int:
        """How much of something."""
        return quick if self.quick else full


@contextmanager
def _litellm(command: str, url: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(
            "model_list:\n- model_name: stub\n  litellm_params: "
            f"{{model: openai/stub, api_base: '{url}', api_key: sk-bench}}\n"
        )
        environ = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
        with subprocess.Popen(
            [command, "--config", str(config), "--port", str(port), "--host", "127.0.0.1"],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as server:
            try:
                wait_for(port, 120)
                yield port
            finally:
                server.terminate()
                server.wait(30)


# -- sides ------------------------------------------------------------------------------------------------------------


def _alone(port: int, body: dict[str, Any], times: int) -> list[Heard]:
    """One request after the other on one connection."""

    async def work() -> list[Heard]:
        async with connections(port, 1) as [connection]:
            return [await connection.ask(body) for _ in range(times)]

    return asyncio.run(work())


def _per_second(port: int, seconds: float) -> float:
    """Answers a second on several connections."""

    async def work() -> float:
        async with connections(port, CONCURRENT) as made:
            await asyncio.gather(*(c.ask(_BODY) for c in made))
            ends = perf_counter() + seconds
            done = 0

            async def one(connection: Any) -> None:
                nonlocal done
                while perf_counter() < ends:
                    await connection.ask(_BODY)
                    done += 1

            started = perf_counter()
            await asyncio.gather(*(one(c) for c in made))
            return done / (perf_counter() - started)

    return asyncio.run(work())


def _streams_per_second(port: int, streams: int, chunks: int) -> float:
    async def work() -> float:
        async with connections(port, streams) as made:
            body = {**_BODY, "stream": True, "user": f"{chunks}:{PAUSE_MS}"}
            started = perf_counter()
            await asyncio.gather(*(c.ask(body) for c in made))
            return streams / (perf_counter() - started)

    return asyncio.run(work())


# -- figures ----------------------------------------------------------------------------------------------------------


def _added_latency(
    quantile: float, port: Callable[[Bench], int] = lambda bench: bench.observing[0], note: str = ""
) -> Callable[[Bench], Measured]:
    def measure(bench: Bench) -> Measured:
        times = bench.sized(2000, 20)

        def side(port: int) -> Callable[[], float]:
            return lambda: 1000 * _quantile([h.whole_s for h in _alone(port, _BODY, times)], quantile)

        sides = {"direct": side(bench.upstream), "sidecar": side(port(bench))}
        found = interleaved(sides, bench.repeats, on_step=bench.on_step)
        added = [b - a for a, b in zip(found["direct"], found["sidecar"], strict=True)]
        return Measured(values=added, sides={f"{k} (ms)": statistics.median(v) for k, v in found.items()}, note=note)

    return measure


def _over_litellm(bench: Bench) -> Measured:
    seconds = bench.sized(5, 1)
    ports = {"sidecar": bench.observing[0], "litellm": bench.litellm, "direct": bench.upstream}
    sides = {name: (lambda port=port: _per_second(port, seconds)) for name, port in ports.items()}
    found = interleaved(sides, bench.repeats, on_step=bench.on_step)
    medians = {f"{k} (answers/s)": statistics.median(v) for k, v in found.items()}
    return Measured(values=ratios(found, "sidecar", "litellm"), sides=medians)


def _streams(bench: Bench) -> Measured:
    streams, chunks = bench.sized(STREAMS, 5), bench.sized(CHUNKS, 4)
    ports = {"sidecar": bench.observing[0], "direct": bench.upstream}
    sides = {name: (lambda port=port: _streams_per_second(port, streams, chunks)) for name, port in ports.items()}
    found = interleaved(sides, bench.repeats, on_step=bench.on_step)
    medians = {f"{k} (streams/s)": statistics.median(v) for k, v in found.items()}
    note = f"{streams} streams of {chunks} chunks, one every {PAUSE_MS} ms each"
    return Measured(values=ratios(found, "sidecar", "direct"), sides=medians, note=note)


def _first_token(bench: Bench) -> Measured:
    body = {"model": "stub", "messages": [{"role": "user", "content": _PROMPT_64}], "stream": True}
    body["user"] = f"{WINDOW_CHUNKS}:0"
    times = bench.sized(20, 2)

    def side(port: int) -> Callable[[], float]:
        return lambda: 1000 * statistics.median(h.first_s for h in _alone(port, body, times))

    found = interleaved(
        {"direct": side(bench.upstream), "enforce": side(bench.enforcing)}, bench.repeats, on_step=bench.on_step
    )
    added = [b - a for a, b in zip(found["direct"], found["enforce"], strict=True)]
    note = "the prompt's reading and the first window's; an upstream of its own speed adds the time it takes to say one"
    return Measured(values=added, sides={f"{k} (ms)": statistics.median(v) for k, v in found.items()}, note=note)


def _window(bench: Bench) -> Measured:
    windows = bench.sized(16, 4)
    body = {"model": "stub", "messages": [{"role": "user", "content": _PROMPT_64}], "stream": True}
    body["user"] = f"{windows * WINDOW_CHUNKS}:0"
    times = bench.sized(5, 1)

    def side(port: int) -> Callable[[], float]:
        return lambda: 1000 * statistics.median(h.whole_s - h.first_s for h in _alone(port, body, times))

    found = interleaved(
        {"direct": side(bench.upstream), "enforce": side(bench.enforcing)}, bench.repeats, on_step=bench.on_step
    )
    added = [(b - a) / windows for a, b in zip(found["direct"], found["enforce"], strict=True)]
    note = f"mean over {windows} windows of 24 tokens, each of which reads the answer from its start"
    return Measured(values=added, sides={f"{k} (ms)": statistics.median(v) for k, v in found.items()}, note=note)


def _memory(bench: Bench) -> Measured:
    port, pid = bench.observing
    _per_second(port, 1)
    return Measured(values=[resident_bytes(pid) / 1e6], note="after a second at 32 connections")


def _quantile(values: Sequence[float], at: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(at * len(ordered)))]


_AUDITED = _added_latency(
    0.5,
    lambda bench: bench.keeping,
    "the stub answers at once, so all of the write to disk shows; an upstream that takes longer than it hides it",
)


def _figure(
    name: str, title: str, unit: str, target: float | None, at: Any, measure: Callable[[Bench], Measured]
) -> Figure:
    return Figure(name=name, title=title, unit=unit, target=target, at=at, measure=measure)  # type: ignore[arg-type]


FIGURES: tuple[Figure, ...] = (
    _figure("proxy-p50", "added latency, observe, median", "ms", 1.0, "most", _added_latency(0.5)),
    _figure("proxy-p99", "added latency, observe, 99th percentile", "ms", 5.0, "most", _added_latency(0.99)),
    _figure("proxy-p50-audit", "added latency, observe with an audit, median", "ms", None, "most", _AUDITED),
    _figure("proxy-over-litellm", "answers/s at 32 connections over LiteLLM's proxy", "x", 5.0, "least", _over_litellm),
    _figure("proxy-streams", "200 streams over direct", "x", 0.95, "least", _streams),
    _figure("proxy-first-token", "added time to first token, enforce", "ms", 60.0, "most", _first_token),
    _figure("proxy-window", "added per window, enforce", "ms", 25.0, "most", _window),
    _figure("proxy-memory", "resident memory of a worker without a model", "MB", 80.0, "most", _memory),
)


def measure(options: Options, figures: Sequence[Figure], kind: type[Bench] = Bench) -> tuple[list[dict[str, Any]], int]:
    """Measure what is asked for; returns all figures of the file, and how many failed."""
    results = Results(options.out, [f.name for f in figures])
    start, failed = load_average(), 0
    setting = ", ".join(f"{k} {v}" for k, v in versions("aiohttp", "uvicorn", "httptools").items())
    setting += f", cores {os.cpu_count()}"
    with ExitStack() as stack:
        bench = kind(bundle=options.bundle, repeats=options.repeats, quick=options.quick, stack=stack)
        for figure in figures:
            if figure.name not in options.only:
                continue
            found: Measured | NotMeasured
            try:
                found = figure.measure(bench)  # type: ignore[arg-type]
            except NotMeasured as reason:
                found = reason
            except (OSError, RuntimeError, TimeoutError) as error:
                print(f"{figure.name}: {type(error).__name__}: {error}", file=sys.stderr)
                failed += 1
                continue
            entry = record(figure, found, command=options.command(figure.name), setting=setting)
            results.add(entry)
            print(line(entry), file=sys.stderr)
    facts = {"cores": os.cpu_count(), "setting": setting, "load_at_start": start, "load_at_end": load_average()}
    write_json(options.out.with_name(f"{options.out.stem}-machine.json"), facts)
    return results.records, failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; 0, 1 where a figure failed, 2 where something asked for makes no sense."""
    options = parse("benchmarks.proxy", "What the sidecar adds.", FIGURES, argv)
    try:
        records, failed = measure(options, FIGURES)
    except (HHHRouterError, ValueError) as error:
        return leave(error)
    present(records, options.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
