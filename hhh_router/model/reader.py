"""Read texts with the heads: run the bare layers up to l_r, pool, score. The layers above never run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from hhh_router.errors import ReaderError
from hhh_router.model.encode import Encoded
from hhh_router.model.heads import Heads, Pooled, Ragged, Views
from hhh_router.model.pooling import RunningPool
from hhh_router.model.stack import DecoderStack, Pass
from hhh_router.types import Mode, Scores

_PREFIXES = 4  # openings of conversations whose lower keys and values are kept
_PREFIX_TOKENS = 8  # a shorter opening is not worth the bookkeeping
_LONGEST_PREFIX = 512  # a longer one is shared as far as this: what is kept stays at some 10 MB an opening


class HeadReader:
    """Pools states at the read layers and scores them. Used by one thread, the model's own."""

    def __init__(self, stack: DecoderStack, heads: Heads, read_layers: Sequence[int], first_adapted_layer: int) -> None:
        self.stack = stack
        self.heads = heads
        self.read_layers = tuple(read_layers)
        self.first_adapted_layer = first_adapted_layer
        self._prefixes: OrderedDict[tuple[int, ...], Cache] = OrderedDict()

    @property
    def dtype(self) -> str:
        """Precision the backbone runs in, such as ``float32``."""
        return str(self.stack.text.embed_tokens.weight.dtype).removeprefix("torch.")

    def batches(self, texts: Sequence[Encoded], max_tokens: int) -> Iterator[list[int]]:
        """Indices of texts of similar length, each batch at most ``max_tokens`` with padding (or one text)."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
        batch: list[int] = []
        for i in order:
            if batch and len(texts[i].ids) * (len(batch) + 1) > max_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def score(self, texts: Sequence[Encoded]) -> list[Scores]:
        """Score one batch of texts in one padded pass that stops at l_r."""
        views = self.views(texts)
        return self.heads.scores(views, tokens=[len(t.ids) for t in texts], layers_run=max(self.read_layers))

    @torch.inference_mode()
    def views(self, texts: Sequence[Encoded]) -> Views:
        """Pooled sides of one batch, on the heads' device."""
        prompt, response = self.sides(texts)
        return Views(
            prompt=self.heads.pool(prompt, "prompt"),
            response=self.heads.pool(response, "response"),
            modes=[mode_of(t) for t in texts],
        )

    @torch.inference_mode()
    def sides(self, texts: Sequence[Encoded]) -> tuple[Ragged, Ragged]:
        """Token states of prompts (from the last turn's text on) and of responses, from one padded pass."""
        shared = _shared(texts) if self.stack.attends_to_all else ()
        ids, mask = self.stack.padded([t.ids for t in texts])
        padded = len({len(t.ids) for t in texts}) > 1
        state = self.stack.begin(
            ids[:, len(shared) :],
            attention_mask=mask if padded else None,
            cache=self._prefix(shared, len(texts)) if shared else None,
        )
        layers = list(self.states(state))
        prompts = [t.prompt_span if t.has_prompt else (0, 0) for t in texts]
        responses = [(t.prompt_tokens, len(t.ids)) if t.has_response else (0, 0) for t in texts]
        return _slices(layers, prompts, len(shared)), _slices(layers, responses, len(shared))

    def states(self, state: Pass) -> Iterator[Tensor]:
        """States entering each read layer, (B, T, D), as the pass goes on to them."""
        for layer in self.read_layers:
            yield self.stack.run(state, layer)

    def opening(self, text: Encoded) -> Cache | None:
        """Lower keys and values of the tokens that open a text, where they are kept for all that begin alike."""
        shared = _shared([text]) if self.stack.attends_to_all else ()
        return self._prefix(shared, 1) if shared else None

    def prompt(self, layers: Sequence[Tensor], text: Encoded, offset: int = 0) -> Pooled:
        """The prompt's side of one text whose pass, of batch size 1, has reached l_r without its first tokens."""
        return self.heads.pool(_slices(layers, [text.prompt_span], offset), "prompt")

    def _prefix(self, shared: tuple[int, ...], rows: int) -> Cache:
        """Keys and values of a shared opening, repeated for each row; below l_r they depend on its tokens alone."""
        kept = self._prefixes.pop(shared, None)
        if kept is None:
            kept = self.stack.new_cache()
            self.stack.run(
                self.stack.begin(torch.tensor([shared], device=self.stack.device), cache=kept), max(self.read_layers)
            )
        self._prefixes[shared] = kept
        while len(self._prefixes) > _PREFIXES:
            self._prefixes.popitem(last=False)
        copied = DynamicCache(config=self.stack.config)
        for index, layer in enumerate(kept.layers[: max(self.read_layers)]):
            copied.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
        return copied


class RunningReply:
    """Pools a reply while it is generated: states below l_r depend on tokens alone, so nothing is read twice."""

    def __init__(self, reader: HeadReader, prompt: Pooled, prompt_tokens: int) -> None:
        self._reader = reader
        self._prompt = prompt
        self._prompt_tokens = prompt_tokens
        self._response = RunningPool(reader.heads, "response")

    @property
    def tokens(self) -> int:
        """Tokens of the reply so far."""
        return self._response.tokens

    @torch.inference_mode()
    def add(self, states: Sequence[Tensor]) -> None:
        """Add one token's states, one (1, 1, D) per read layer."""
        flat = torch.stack([s[0, -1] for s in states])[None]  # (1, L, D)
        self.append(self._reader.heads.tokens(flat, "response"), flat[0, -1])

    def append(self, features: Tensor, topmost: Tensor) -> None:
        """Add one token that was read in a batch.

        Args:
            features: Of `Heads.tokens`, (1, W).
            topmost: State of the last read layer, (D,).
        """
        self._response.add(features, topmost[None])

    @torch.inference_mode()
    def scores(self) -> Scores:
        """Score prompt and reply so far, mode ``both``."""
        if not self.tokens:
            raise ReaderError("no reply token has been read yet")
        views = Views(prompt=self._prompt, response=self._response.pooled(), modes=["both"])
        total = self._prompt_tokens + self.tokens
        return self._reader.heads.scores(views, tokens=[total], layers_run=max(self._reader.read_layers))[0]


def _slices(layers: Sequence[Tensor], spans: Sequence[tuple[int, int]], offset: int) -> Ragged:
    """Each row's span of token states, of all layers; ``offset`` tokens were left out at the beginning."""
    rows = [
        torch.stack([states[row, start - offset : stop - offset] for states in layers], dim=1)
        for row, (start, stop) in enumerate(spans)
        if stop > start
    ]
    if len(rows) == 1:
        states = rows[0]
    else:
        states = torch.cat(rows) if rows else layers[0].new_zeros((0, len(layers), layers[0].shape[-1]))
    return Ragged(states, [stop - start for start, stop in spans])


def _shared(texts: Sequence[Encoded]) -> tuple[int, ...]:
    """Tokens that open every text and come before anything that is pooled, such as a template's system turn."""
    first = texts[0].ids
    length = min(_LONGEST_PREFIX, *(t.prompt_span[0] if t.has_prompt else t.prompt_tokens for t in texts))
    for text in texts[1:]:
        length = next((i for i in range(length) if text.ids[i] != first[i]), length)
    return tuple(first[:length]) if length >= _PREFIX_TOKENS else ()


def mode_of(text: Encoded) -> Mode:
    """Which views a text has."""
    if not text.has_response:
        return "prompt"
    return "both" if text.has_prompt else "response"
