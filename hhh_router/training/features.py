"""Pooled states of many texts, computed once by the bare lower layers and kept on disk.

The layers below l_r never change in training, so their states are read once per text and shared by every later step.
Chunks are saved as they are done: a killed run reads on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hhh_router.data.examples import Example
from hhh_router.errors import ContextTooLong
from hhh_router.model.encode import Encoded, Encoder
from hhh_router.model.heads import Views
from hhh_router.model.reader import HeadReader, mode_of
from hhh_router.types import ReadRequest

CHUNK_ROWS = 512
BATCH_TOKENS = 4096


def encode_cut(encoder: Encoder, request: ReadRequest, max_tokens: int) -> Encoded:
    """Encode a text, cutting the last turn and the response to their beginnings until it fits."""
    for _ in range(6):  # each round cuts in proportion; tokens are not evenly long, so one round may not do
        try:
            text = encoder.encode(request)
            length = len(text.ids)
        except ContextTooLong:
            length = encoder.context_tokens * 4
        if length <= max_tokens:
            return text
        keep = 0.9 * max_tokens / length
        turns = request.messages
        if turns:
            last = replace(turns[-1], content=turns[-1].content[: int(len(turns[-1].content) * keep)])
            turns = (last,) if len(turns) > 1 else (*turns[:-1], last)
        response = request.response[: int(len(request.response) * keep)] if request.response is not None else None
        request = ReadRequest(messages=turns, response=response)
    return encoder.encode(request)


def pooled(
    requests: Sequence[ReadRequest],
    reader: HeadReader,
    encoder: Encoder,
    *,
    max_tokens: int,
    folder: Path,
    on_rows: Callable[[int], None] = lambda n: None,
) -> tuple[Views, list[Encoded]]:
    """Pooled states of every text, and its tokens, in order.

    Args:
        requests: What to read.
        reader: Of the backbone; its heads are not used.
        encoder: The backbone's.
        max_tokens: Longer texts are cut.
        folder: Where chunks are kept; their names hold the hash of their texts and of what was read.
        on_rows: Told how many rows have become ready, for a progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Views] = []
    encoded: list[Encoded] = []
    for start in range(0, len(requests), CHUNK_ROWS):
        chunk = requests[start : start + CHUNK_ROWS]
        path = folder / f"{_name(chunk, reader, max_tokens)}.safetensors"
        texts = [encode_cut(encoder, r, max_tokens) for r in chunk]
        if path.is_file():
            tensors = load_file(path)
        else:
            tensors = _read(texts, reader)
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(path)
        parts.append(Views(tensors["prompt"].float(), tensors["response"].float(), [mode_of(t) for t in texts]))
        encoded += texts
        on_rows(len(chunk))
    views = Views(
        prompt=torch.cat([p.prompt for p in parts]),
        response=torch.cat([p.response for p in parts]),
        modes=[m for p in parts for m in p.modes],
    )
    return views, encoded


def _read(texts: Sequence[Encoded], reader: HeadReader) -> dict[str, torch.Tensor]:
    rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for batch in reader.batches(texts, BATCH_TOKENS):
        views = reader.views([texts[i] for i in batch])
        for place, i in enumerate(batch):
            rows[i] = (views.prompt[place].cpu(), views.response[place].cpu())
    ordered = [rows[i] for i in range(len(texts))]
    # bf16 holds what a bf16 backbone gave; the means lose nothing that matters
    return {
        "prompt": torch.stack([p for p, _ in ordered]).bfloat16(),
        "response": torch.stack([r for _, r in ordered]).bfloat16(),
    }


def _name(requests: Sequence[ReadRequest], reader: HeadReader, max_tokens: int) -> str:
    digest = hashlib.sha256(f"{reader.read_layers}-{max_tokens}-{reader.stack.config.hidden_size}".encode())
    for r in requests:
        digest.update(repr((r.messages, r.response)).encode("utf-8", "replace"))
    return digest.hexdigest()[:24]


def response_only(examples: Sequence[Example]) -> list[Example]:
    """The examples without their prompts; labels stay, since they are about the response."""
    return [replace(e, messages=()) for e in examples if e.response is not None]
