"""Token states of many texts, computed once by the bare lower layers and kept on disk.

The layers below l_r never change in training, so their states are read once per text and shared by every later step
and by every recipe that reads the same layers of the same backbone. A killed run reads on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hhh_router.bundle import BackboneSpec
from hhh_router.data.examples import Example
from hhh_router.errors import ContextTooLong
from hhh_router.model.encode import Encoded, Encoder
from hhh_router.model.heads import Heads, Ragged, Views, summary
from hhh_router.model.reader import HeadReader
from hhh_router.types import Mode, ReadRequest, Scores

CHUNK_ROWS = 2048  # texts that are sorted by length together; what a kill can cost
BATCH_TOKENS = 4096
_SCORED_ROWS = 256
_KEY_DIGITS = 32


def states_folder(runs: Path, spec: BackboneSpec) -> Path:
    """Where token states of one backbone are kept, shared by all recipes on it."""
    return runs / "states" / hashlib.sha256(f"{spec.source} {spec.sha256}".encode()).hexdigest()[:12]


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


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one text's states lie."""

    start: int
    """First token's place in the store."""
    prompt: int
    """Tokens of the prompt's side; 0 without one."""
    response: int
    """Tokens of the response's side, which follow; 0 without one."""
    tokens: int
    """Tokens of the whole text, template included."""

    @property
    def mode(self) -> Mode:
        """Which sides there are."""
        if not self.response:
            return "prompt"
        return "both" if self.prompt else "response"


class StateStore:
    """An append-only file of bf16 token states, (tokens, L, D), and an index of texts beside it."""

    def __init__(self, folder: Path, layers: int, dim: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._states, self._index = folder / "states.bf16", folder / "index.jsonl"
        self._shape = (layers, dim)
        self._entries: dict[str, Entry] = {}
        self._tokens = 0
        self._load()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def add(self, rows: Sequence[tuple[str, Tensor, Tensor, int]]) -> None:
        """Append texts: key, prompt states (n, L, D), response states (m, L, D), tokens of the whole text."""
        with self._states.open("ab") as states:
            for _, prompt, response, _ in rows:
                for side in (prompt, response):
                    states.write(side.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        with self._index.open("a", encoding="utf-8") as index:  # after the states: a kill in between loses only rows
            for key, prompt, response, tokens in rows:
                entry = Entry(self._tokens, len(prompt), len(response), tokens)
                self._entries[key] = entry
                self._tokens += entry.prompt + entry.response
                index.write(json.dumps([key, entry.start, entry.prompt, entry.response, entry.tokens]) + "\n")

    def open(self) -> Tensor:
        """All states, mapped from disk: (tokens, L, D) bf16."""
        layers, dim = self._shape
        size = self._tokens * layers * dim
        flat = torch.from_file(str(self._states), shared=False, size=size, dtype=torch.bfloat16)
        return flat.view(self._tokens, layers, dim)

    def _load(self) -> None:
        if not self._index.is_file():
            self._states.write_bytes(b"")
            return
        whole = 0
        with self._index.open("rb") as index:
            for line in index:
                if not line.endswith(b"\n"):
                    break  # cut off by a kill
                key, *place = json.loads(line)
                entry = Entry(*place)
                self._entries[key] = entry
                self._tokens = entry.start + entry.prompt + entry.response
                whole += len(line)
        for path, size in ((self._index, whole), (self._states, self._tokens * self._shape[0] * self._shape[1] * 2)):
            with path.open("r+b") as file:
                file.truncate(size)


@dataclass(slots=True)
class TokenStates:
    """Token states of the rows of one task, mapped from a store."""

    states: Tensor
    """(tokens, L, D) bf16, of the whole store."""
    entries: list[Entry]
    """One per row."""

    @property
    def modes(self) -> list[Mode]:
        """Of each row."""
        return [e.mode for e in self.entries]

    def sides(self, rows: Sequence[int], device: torch.device | str = "cpu") -> tuple[Ragged, Ragged]:
        """Prompt and response sides of some rows, on the device of the heads that read them."""
        entries = [self.entries[i] for i in rows]
        prompt = [self.states[e.start : e.start + e.prompt] for e in entries]
        response = [self.states[e.start + e.prompt : e.start + e.prompt + e.response] for e in entries]
        return (
            Ragged(torch.cat(prompt).to(device), [e.prompt for e in entries]),
            Ragged(torch.cat(response).to(device), [e.response for e in entries]),
        )

    def summaries(self, batch: int = 256) -> tuple[Tensor, Tensor]:
        """Mean and last state of the topmost layer, of prompts and of responses: two (rows, 2 D)."""
        top = TokenStates(self.states[:, -1:], self.entries)
        spans = [range(i, min(i + batch, len(self.entries))) for i in range(0, len(self.entries), batch)]
        parts = [tuple(summary(side) for side in top.sides(span)) for span in spans]
        return torch.cat([p for p, _ in parts]), torch.cat([r for _, r in parts])


def token_states(
    requests: Sequence[ReadRequest],
    reader: HeadReader,
    encoder: Encoder,
    *,
    max_tokens: int,
    folder: Path,
    on_rows: Callable[[int], None] = lambda n: None,
) -> TokenStates:
    """Token states of every text, in order; those not yet in the store are read first.

    Args:
        requests: What to read.
        reader: Of the backbone; its heads are not used.
        encoder: The backbone's.
        max_tokens: Longer texts are cut.
        folder: Of the store, which belongs to one backbone; layers and cut are part of its name.
        on_rows: Told how many rows have become ready, for a progress bar.
    """
    name = f"layers-{'-'.join(map(str, reader.read_layers))}-tokens-{max_tokens}"
    store = StateStore(folder / name, len(reader.read_layers), reader.stack.config.hidden_size)
    keys = [_key(r) for r in requests]
    missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in store}
    on_rows(len(requests) - len(missing))
    for chunk in _chunks(list(missing.items())):
        texts = [encode_cut(encoder, r, max_tokens) for _, r in chunk]
        for batch in reader.batches(texts, BATCH_TOKENS):
            prompt, response = reader.sides([texts[i] for i in batch])
            sides = zip(prompt.states.cpu().split(prompt.lengths), response.states.cpu().split(response.lengths),
                        strict=True)  # fmt: skip
            store.add([(chunk[i][0], p, r, len(texts[i].ids)) for i, (p, r) in zip(batch, sides, strict=True)])
            on_rows(len(batch))
    return TokenStates(store.open(), [store[k] for k in keys])


def scored(heads: Heads, states: TokenStates, *, layers_run: int = 0) -> list[tuple[Scores, Scores]]:
    """Raw scores of texts whose states are known: as they are, and with their prompt alone in view."""
    found: list[tuple[Scores, Scores]] = []
    for start in range(0, len(states.entries), _SCORED_ROWS):
        part = range(start, min(start + _SCORED_ROWS, len(states.entries)))
        entries = [states.entries[i] for i in part]
        prompt, response = states.sides(part, heads.out.weight.device)
        with torch.no_grad():
            views = Views(heads.pool(prompt, "prompt"), heads.pool(response, "response"), [e.mode for e in entries])
        given = heads.scores(views, tokens=[e.tokens for e in entries], layers_run=layers_run)
        alone = heads.scores(views.alone(), tokens=[e.tokens - e.response for e in entries], layers_run=layers_run)
        found += zip(given, alone, strict=True)
    return found


def _chunks(rows: Sequence[tuple[str, ReadRequest]]) -> Iterator[Sequence[tuple[str, ReadRequest]]]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]


def _key(request: ReadRequest) -> str:
    turns = [(m.role, m.content) for m in request.messages]
    return hashlib.sha256(repr((turns, request.response)).encode("utf-8", "replace")).hexdigest()[:_KEY_DIGITS]


def response_only(examples: Sequence[Example]) -> list[Example]:
    """The examples without their prompts; labels stay, since they are about the response."""
    return [replace(e, messages=()) for e in examples if e.response is not None]
