"""Many texts at once, each under its own weights, for training and measuring: greedy replies and log-likelihoods.

Serving reads needs in the same pass and lets requests come and go; here all weights are known before, so rows of like
length go together, and systems that differ in weights alone share the bare lower layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hhh_router.model.base import Backbone
from hhh_router.model.int8 import Phase
from hhh_router.model.mixture import Gates
from hhh_router.model.stack import DecoderStack, Pass
from hhh_router.types import Message, ReadRequest, Weights

BATCH_TOKENS = 2048
"""Most tokens of a scored batch, padding included."""
GENERATED_ROWS = 32
"""Most replies that are written together."""
_SMALLEST_CUT = 8  # rows: fewer are not worth copying the cache for when half of a batch has ended


@dataclass(frozen=True, slots=True)
class Reply:
    """A prompt with a reply that is to be scored."""

    ids: tuple[int, ...]
    """Tokens of prompt and reply."""
    start: int
    """The reply's first token."""

    @property
    def tokens(self) -> int:
        """Tokens of the reply."""
        return len(self.ids) - self.start


def as_reply(
    backbone: Backbone, messages: Sequence[Message], reply: str, max_tokens: int, *, end: bool = True
) -> Reply:
    """Tokens of a conversation and its reply, cut to ``max_tokens``.

    Args:
        backbone: Whose tokenizer and template are used.
        messages: The conversation, a user's turn last.
        reply: What is scored.
        max_tokens: Longest prompt + reply.
        end: Whether the mark that ends the turn is scored too.

    Raises:
        ContextTooLong: The conversation alone fills the model's window.
    """
    prompt = backbone.encoder.encode(ReadRequest(messages=tuple(messages))).ids
    tail = [*backbone.encoder.response_ids(reply), *([backbone.encoder.end_id] if end else [])]
    return Reply((*prompt, *tail)[:max_tokens], min(len(prompt), max_tokens))


class Runner:
    """A backbone with or without experts. Used by one thread."""

    def __init__(
        self, backbone: Backbone, gates: Gates | None, first_adapted_layer: int, phase: Phase | None = None
    ) -> None:
        """Wrap a loaded backbone.

        Args:
            backbone: Weights and tokenizer.
            gates: Of the experts that were put into its layers; None for the bare backbone.
            first_adapted_layer: l_r; the layers below are the same under all weights.
            phase: Of the backbone's int8 layers, for replies to be made through them as a server's are; None for
                replies through the base weights.
        """
        self.backbone = backbone
        self._stack: DecoderStack = backbone.stack
        self._gates = gates
        self._phase = phase or Phase()
        self._first = first_adapted_layer
        self._ends = {backbone.encoder.end_id, *self._stack.end_ids}

    @torch.inference_mode()
    def log_likelihoods(
        self,
        replies: Sequence[Reply],
        systems: Mapping[str, Sequence[Weights]],
        *,
        on_rows: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, list[float]]:
        """Sum of the log-probabilities of each reply's tokens, in nats, per system.

        Args:
            replies: What is scored; a reply without tokens scores 0.
            systems: Name → weights of each reply. The lower layers run once for all of them, and a row whose weights
                two systems share is run once.
            on_rows: Told how many replies have been scored under all systems, of how many.
        """
        found = {name: [0.0] * len(replies) for name in systems}
        done = 0
        for batch in _by_length([len(r.ids) for r in replies], BATCH_TOKENS):
            rows = [replies[i] for i in batch]
            ids, mask = self._stack.padded([r.ids for r in rows])
            state = self._stack.begin(ids, attention_mask=mask)
            lower = self._stack.run(state, self._first)
            known: dict[tuple[int, Weights], float] = {}
            for name, weights in systems.items():
                wanted = [k for k, i in enumerate(batch) if (k, weights[i]) not in known]
                if wanted:
                    scores = self._upper(state, lower, rows, wanted, [weights[batch[k]] for k in wanted])
                    known |= {(k, weights[batch[k]]): s for k, s in zip(wanted, scores, strict=True)}
                for k, i in enumerate(batch):
                    found[name][i] = known[k, weights[i]]
            done += len(batch)
            on_rows(done, len(replies))
        return found

    def _upper(
        self, state: Pass, lower: Tensor, rows: Sequence[Reply], wanted: Sequence[int], weights: Sequence[Weights]
    ) -> list[float]:
        """Run the upper layers for some rows of a batch whose lower layers have run."""
        index = torch.tensor(list(wanted), device=lower.device)
        part = replace(
            state,
            hidden=lower[index],
            position_ids=state.position_ids[index],
            masks={k: None if m is None else m[index] for k, m in state.masks.items()},
            rotary={k: (c[index], s[index]) if len(c) > 1 else (c, s) for k, (c, s) in state.rotary.items()},
            next_layer=self._first,
        )
        self._set(weights)
        hidden = self._stack.run(part, self._stack.depth)
        return [float(log_likelihood(self._stack, hidden[k], rows[i])) for k, i in enumerate(wanted)]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        weights: Sequence[Weights] | None,
        *,
        max_tokens: int,
        on_rows: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[str]:
        """Greedy replies, in order.

        Args:
            prompts: Tokens of each prompt, the template's opening of the reply included.
            weights: Of each prompt; None for the bare backbone.
            max_tokens: Most tokens of a reply.
            on_rows: Told how many replies are done, of how many.
        """
        replies = [""] * len(prompts)
        budget = GENERATED_ROWS * (256 + max_tokens)
        done = 0
        for batch in _by_length([len(p) + max_tokens for p in prompts], budget, most=GENERATED_ROWS):
            given = None if weights is None else [weights[i] for i in batch]
            for i, tokens in zip(batch, self._continue([prompts[i] for i in batch], given, max_tokens), strict=True):
                replies[i] = self.backbone.encoder.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            done += len(batch)
            on_rows(done, len(prompts))
        return replies

    def _continue(
        self, prompts: Sequence[Sequence[int]], weights: Sequence[Weights] | None, max_tokens: int
    ) -> list[list[int]]:
        """Tokens of the replies of one batch; rows that have ended leave the batch when half of it has."""
        stack = self._stack
        ids, mask = stack.padded(prompts, left=True)
        replies: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        cache = stack.new_cache()
        for step in range(max_tokens):
            state = stack.begin(ids, attention_mask=mask, cache=cache)
            self._set(None if weights is None else [weights[i] for i in rows])
            # more rows than a server decodes in int8 are no other replies: each row comes out the same
            with self._phase.decoding(any_rows=True) if step else nullcontext():
                hidden = stack.run(state, stack.depth)
                drawn = stack.logits(hidden[:, -1]).argmax(-1)
            going = []
            for k, token in enumerate(drawn.tolist()):
                row = replies[rows[k]]
                if row[-1:] == [-1]:
                    continue
                row.append(-1 if token in self._ends else token)  # -1 marks a reply that has ended
                if row[-1] != -1:
                    going.append(k)
            if not going:
                break
            ids, mask = drawn[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if len(going) <= len(rows) // 2 and len(rows) > _SMALLEST_CUT:
                kept = torch.tensor(going, device=stack.device)
                cache.batch_select_indices(kept)
                ids, mask, rows = ids[kept], mask[kept], [rows[k] for k in going]
        return [[t for t in reply if t != -1] for reply in replies]

    def _set(self, weights: Sequence[Weights] | None) -> None:
        if self._gates is not None:
            self._gates.set(weights)


def log_likelihood(stack: DecoderStack, hidden: Tensor, row: Reply) -> Tensor:
    """Sum of the log-probabilities of one reply's tokens, from the row's last states (T, D): a scalar, float32."""
    if not row.tokens:
        return hidden.new_zeros((), dtype=torch.float32)
    logits = stack.logits(hidden[row.start - 1 : len(row.ids) - 1]).float()
    targets = torch.tensor(row.ids[row.start :], device=hidden.device)
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _by_length(lengths: Sequence[int], max_tokens: int, most: int | None = None) -> Iterator[list[int]]:
    """Places of items of like length, longest first (what does not fit shows at once), padded size bounded."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = most is not None and len(batch) == most
        if batch and (full or lengths[batch[0]] * (len(batch) + 1) > max_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
