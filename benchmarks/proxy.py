"""What the sidecar adds, on loopback: ``python -m benchmarks.proxy [--only NAME ...] [--repeats N] [--quick]``.

Every side is asked in turn with the same requests: the upstream directly, the sidecar before it, and LiteLLM's proxy
before it where ``HHH_ROUTER_BENCH_LITELLM`` names its ``litellm`` command (in an environment of its own).
"""

from __future__ import annotations

import asyncio
import os
import secrets
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
from benchmarks.loopback import WORDS_PER_CHUNK, Heard, connections, process, wait_for
from benchmarks.machine import load_average, versions
from benchmarks.present import present
from benchmarks.run import Options, leave, line, parse
from benchmarks.soak import resident_bytes
from benchmarks.timing import interleaved, ratios
from hhh_router.bundle import Bundle
from hhh_router.errors import HHHRouterError
from hhh_router.model.supervisor import open_supervised
from hhh_router.protocols import SessionReader
from hhh_router.settings import Settings
from hhh_router.types import Message, ReadRequest

LITELLM = "HHH_ROUTER_BENCH_LITELLM"
LITELLM_STARTS_WITHIN_S = 300.0  # it imports for tens of seconds on a busy machine
_LITELLM_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",  # no .env is read
    # it starts without a master key only so; the sidecar has none here either, and checking one would cost it time
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}
STREAMS, CHUNKS, PAUSE_MS = 200, 40, 50  # as many tokens a second as a large model has for each of its readers
CONCURRENT = 32
WINDOW_CHUNKS = 4  # of the stub's chunks, in a window of 24 tokens
ANSWER_TOKENS = 2000  # of the reader's, in the answer whose last window is read both ways
_PROMPT_64 = "Tell me about the capital of France and its rivers. " * 3  # about 64 tokens, with a template and a number
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
    def reader(self) -> SessionReader:
        """The bundle's, in a process of its own, as a sidecar has it."""
        model = open_supervised(Bundle.load(self.bundle), Settings.load(bundle=self.bundle))
        self.stack.callback(model.engine.close)
        return model.reader

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
        config, log = Path(folder) / "config.yaml", Path(folder) / "log.txt"
        config.write_text(
            "model_list:\n- model_name: stub\n  litellm_params: "
            f"{{model: openai/stub, api_base: '{url}', api_key: sk-bench}}\n"
        )
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | _LITELLM_ENVIRONMENT
        with (
            log.open("w") as written,
            subprocess.Popen(
                [command, "--config", str(config), "--port", str(port), "--host", "127.0.0.1", "--num_workers", "1"],
                env=environ,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
            ) as server,
        ):
            try:
                _await(server, port, log)
                yield port
            finally:
                server.terminate()
                server.wait(30)


def _await(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return when LiteLLM's proxy listens.

    Raises:
        NotMeasured: It ended, or does not listen in time; its last words are in the message.
    """
    until = perf_counter() + LITELLM_STARTS_WITHIN_S
    while server.poll() is None and perf_counter() < until:
        try:
            return wait_for(port, 1)
        except TimeoutError:
            continue
    ended = f"ended with {server.poll()}" if server.poll() is not None else "does not listen"
    last = " / ".join(log.read_text(errors="replace").split("\n")[-8:])
    raise NotMeasured(f"LiteLLM's proxy {ended}: {last[-600:]}")


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


def _streamed(port: int, chunks: int, times: int) -> list[Heard]:
    """Streams one after the other, each for a prompt of its own: the reader remembers what it has read."""

    async def work() -> list[Heard]:
        async with connections(port, 1) as [connection]:
            bodies = [
                {**_BODY, "messages": [_new_prompt()], "stream": True, "user": f"{chunks}:0"} for _ in range(times)
            ]
            return [await connection.ask(body) for body in bodies]

    return asyncio.run(work())


def _new_prompt() -> dict[str, str]:
    return {"role": "user", "content": f"{secrets.randbelow(10**6):06}: {_PROMPT_64}"}


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
    times = bench.sized(20, 2)

    def side(port: int) -> Callable[[], float]:
        return lambda: 1000 * statistics.median(h.first_s for h in _streamed(port, WINDOW_CHUNKS, times))

    found = interleaved(
        {"direct": side(bench.upstream), "enforce": side(bench.enforcing)}, bench.repeats, on_step=bench.on_step
    )
    added = [b - a for a, b in zip(found["direct"], found["enforce"], strict=True)]
    note = "the prompt's reading and the first window's; an upstream of its own speed adds the time it takes to say one"
    return Measured(values=added, sides={f"{k} (ms)": statistics.median(v) for k, v in found.items()}, note=note)


def _window(bench: Bench) -> Measured:
    windows, times = bench.sized(16, 4), bench.sized(5, 1)

    def side(port: int) -> Callable[[], float]:
        chunks = (1 + windows) * WINDOW_CHUNKS  # the first one's are heard first
        return lambda: 1000 * statistics.median(h.whole_s - h.first_s for h in _streamed(port, chunks, times))

    found = interleaved(
        {"direct": side(bench.upstream), "enforce": side(bench.enforcing)}, bench.repeats, on_step=bench.on_step
    )
    added = [(b - a) / windows for a, b in zip(found["direct"], found["enforce"], strict=True)]
    note = f"mean over {windows} windows of 24 tokens after the first"
    return Measured(values=added, sides={f"{k} (ms)": statistics.median(v) for k, v in found.items()}, note=note)


def _window_over_whole(bench: Bench) -> Measured:
    """The last window of a long answer, read on and read whole."""
    tokens = bench.sized(ANSWER_TOKENS, 200)
    answer = WORDS_PER_CHUNK * (tokens // len(WORDS_PER_CHUNK.split()))
    before = answer[: -WINDOW_CHUNKS * len(WORDS_PER_CHUNK)]

    def messages() -> tuple[Message, ...]:
        return (Message(role="user", content=_new_prompt()["content"]),)

    async def read_on() -> float:
        session = bench.reader.open(messages())
        await session.read(before)
        started = perf_counter()
        await session.read(answer)
        elapsed = perf_counter() - started
        session.close()
        return elapsed

    async def read_whole() -> float:
        request = ReadRequest(messages=messages(), response=answer)
        started = perf_counter()
        await bench.reader.read([request])
        return perf_counter() - started

    sides = {"read on": lambda: asyncio.run(read_on()), "whole": lambda: asyncio.run(read_whole())}
    found = interleaved(sides, bench.repeats, on_step=bench.on_step)
    medians = {f"{k} (ms)": 1000 * statistics.median(v) for k, v in found.items()}
    note = f"{tokens} tokens of answer behind a 64-token prompt, as the reader counts them"
    return Measured(values=ratios(found, "read on", "whole"), sides=medians, note=note)


def _memory(bench: Bench) -> Measured:
    with process("sidecar", bench.url, "observe") as (port, pid):  # one of its own: others have had other figures' load
        sides = {"at the start (MB)": resident_bytes(pid) / 1e6}
        _per_second(port, 1)
        value = resident_bytes(pid) / 1e6
        _streams_per_second(port, bench.sized(STREAMS, 5), bench.sized(CHUNKS, 4))
        sides["after 200 streams at once too (MB)"] = resident_bytes(pid) / 1e6
    return Measured(values=[value], sides=sides, note="after a second at 32 connections")


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
    _figure(
        "proxy-window-over-whole", "last window of a long answer over all of it", "x", 0.1, "most", _window_over_whole
    ),
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
