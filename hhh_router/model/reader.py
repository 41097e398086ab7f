"""Read texts with the heads: run the bare layers up to l_r, pool, score. The layers above never run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hhh_router.errors import ReaderError
from hhh_router.model.encode import Encoded
from hhh_router.model.heads import Heads, Views
from hhh_router.model.stack import DecoderStack, Pass
from hhh_router.types import Mode, Scores


class HeadReader:
    """Pools states at the read layers and scores them. Used by one thread, the model's own."""

    def __init__(self, stack: DecoderStack, heads: Heads, read_layers: Sequence[int], first_adapted_layer: int) -> None:
        self.stack = stack
        self.heads = heads
        self.read_layers = tuple(read_layers)
        self.first_adapted_layer = first_adapted_layer

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
        """Pooled states of one batch, on the heads' device."""
        longest = max(len(t.ids) for t in texts)
        ids = torch.zeros((len(texts), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
        padded = bool((mask == 0).any())
        state = self.stack.begin(
            ids.to(self.stack.device), attention_mask=mask.to(self.stack.device) if padded else None
        )
        pooled = [self.pool(states, texts) for states in self.states(state)]
        return Views(
            prompt=torch.cat([p for p, _ in pooled], dim=1),
            response=torch.cat([r for _, r in pooled], dim=1),
            modes=[mode_of(t) for t in texts],
        )

    def states(self, state: Pass) -> Iterator[Tensor]:
        """States entering each read layer, (B, T, D), as the pass goes on to them."""
        for layer in self.read_layers:
            yield self.stack.run(state, layer)

    @staticmethod
    def pool(states: Tensor, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Mean and last state of prompt and response: two (B, 2 D), float32; zeros where a view is missing."""
        batch, _, width = states.shape
        prompt = torch.zeros((batch, 2 * width), device=states.device)
        response = torch.zeros_like(prompt)
        for row, text in enumerate(texts):
            if text.has_prompt:
                start, stop = text.focus
                prompt[row] = torch.cat(
                    [states[row, start:stop].float().mean(0), states[row, text.prompt_tokens - 1].float()]
                )
            if text.has_response:
                said = states[row, text.prompt_tokens : len(text.ids)].float()
                response[row] = torch.cat([said.mean(0), said[-1]])
        return prompt, response


class RunningReply:
    """Pools a reply while it is generated: states below l_r depend on tokens alone, so nothing is read twice."""

    def __init__(self, reader: HeadReader, prompt: Tensor, prompt_tokens: int) -> None:
        self._reader = reader
        self._prompt = prompt
        self._prompt_tokens = prompt_tokens
        self._sums: list[Tensor] = []
        self._last: list[Tensor] = []
        self.tokens = 0

    def add(self, states: Sequence[Tensor]) -> None:
        """Add one token's states, one (1, 1, D) per read layer."""
        flat = [s[0, -1].float() for s in states]
        self._sums = [a + b for a, b in zip(self._sums, flat, strict=True)] if self._sums else flat
        self._last = flat
        self.tokens += 1

    @torch.inference_mode()
    def scores(self) -> Scores:
        """Score prompt and reply so far, mode ``both``."""
        if not self.tokens:
            raise ReaderError("no reply token has been read yet")
        pooled = [torch.cat([s / self.tokens, last]) for s, last in zip(self._sums, self._last, strict=True)]
        views = Views(prompt=self._prompt, response=torch.cat(pooled)[None], modes=["both"])
        total = self._prompt_tokens + self.tokens
        return self._reader.heads.scores(views, tokens=[total], layers_run=max(self._reader.read_layers))[0]


def mode_of(text: Encoded) -> Mode:
    """Which views a text has."""
    if not text.has_response:
        return "prompt"
    return "both" if text.has_prompt else "response"
