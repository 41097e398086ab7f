"""Turn a GGUF file into a transformers folder: dequantised once, kept as safetensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hhh_router.errors import BundleError, MissingExtra
from hhh_router.model.fetch import require_space

_MARGIN_BYTES = 16_000_000  # config and tokenizer beside the weights


def convert_gguf(gguf: Path, target: Path, dtype: str) -> None:
    """Write config, tokenizer and ``model.safetensors`` in `dtype` into `target`.

    Raises:
        BundleError: The disk has no room, or the file is no GGUF that transformers can read.
        MissingExtra: torch, transformers or gguf is not installed.
    """
    try:
        import torch
        from gguf import GGUFReader
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        from hhh_router.model.base import quiet_transformers
    except ImportError as error:
        raise MissingExtra("model", needed_for="converting a GGUF backbone") from error

    kind: torch.dtype = getattr(torch, dtype)
    try:
        elements = sum(int(t.n_elements) for t in GGUFReader(gguf).tensors)
        require_space(target, elements * kind.itemsize + _MARGIN_BYTES, what=f"{gguf.name} as {dtype}")
        with quiet_transformers(), _quiet_gguf(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller shows its own progress, and nothing here can be acted on
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=kind, quantization_config=GgufConfig(dequantize=True)
            )
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except SafetensorError as error:
        if "os error 28" in str(error):  # safetensors' Rust side wraps ENOSPC in its own class
            raise OSError(28, "No space left on device", str(target)) from error
        raise
    except (ValueError, KeyError, NotImplementedError) as error:
        raise BundleError(
            f"{gguf}: transformers cannot read this GGUF ({type(error).__name__}: {error})",
            hint="use a Llama, Qwen, Gemma or Mistral style model, or a path: source in safetensors",
        ) from error


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Silence the bar of transformers' GGUF reading: it takes tqdm's own, which knows no switch (transformers 5.23)."""
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    bar = reading.tqdm
    reading.tqdm = logging.tqdm
    try:
        yield
    finally:
        reading.tqdm = bar
