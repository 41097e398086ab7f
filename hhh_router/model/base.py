"""Load a backbone that `fetch` has put in the cache: weights, tokenizer, and the layer loop around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hhh_router.bundle import BackboneSpec
from hhh_router.errors import BundleError
from hhh_router.model.encode import Encoder
from hhh_router.model.stack import DecoderStack


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded backbone."""

    stack: DecoderStack
    encoder: Encoder


def load_backbone(folder: Path, spec: BackboneSpec, *, device: str = "cpu", dtype: str | None = None) -> Backbone:
    """Load weights and tokenizer from a local folder; nothing is fetched and no remote code runs.

    Args:
        folder: As returned by ``fetch_backbone``.
        spec: What the bundle was trained on; family, depth and width are compared with it.
        device: torch device.
        dtype: Other precision than the bundle's, e.g. ``float32`` for a reference.

    Raises:
        BundleError: Unreadable, or another model than the bundle was trained on.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype or spec.dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(
            f"{folder}: the backbone cannot be loaded ({error})",
            hint="hhh-router doctor --deep checks the files; remove the folder to fetch it again",
        ) from error
    config = model.config
    found = (config.model_type, config.num_hidden_layers, config.hidden_size)
    wanted = (spec.architecture, spec.layers, spec.hidden_size)
    if found != wanted:
        raise BundleError(
            f"{folder}: the backbone is {found[0]} with {found[1]} layers of width {found[2]}; "
            f"the bundle was trained on {wanted[0]} with {wanted[1]} layers of width {wanted[2]}",
            hint="use the bundle's own backbone, or train a bundle for this one",
        )
    model.eval().requires_grad_(False).to(device)
    return Backbone(stack=DecoderStack(model), encoder=Encoder(tokenizer, config.max_position_embeddings))


def compute_dtype(spec: BackboneSpec, device: str = "cpu", wanted: str = "auto") -> str:
    """The precision to run in: ``wanted``, or for ``auto`` the bundle's, unless this CPU has to emulate it.

    CPUs without bfloat16 instructions emulate its matrix products: reading a text took seven times as long as in
    float32 on one with AVX2 alone.
    """
    if wanted != "auto":
        return wanted
    if device == "cpu" and spec.dtype != "float32" and not _multiplies_bfloat16():
        return "float32"
    return spec.dtype


def _multiplies_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class quiet_transformers:  # a context manager reads like a function
    """Silence transformers' progress bars and warnings while the block runs."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        if self._bars:
            transformers_logging.enable_progress_bar()
