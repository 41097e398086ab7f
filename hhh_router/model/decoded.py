"""A given reply as decode steps would see it, to compare weights that are quantised or left out with all of them.

Decode steps take a token at a time. A row of a product comes out the same however many rows it has, so here all tokens
of a reply go through in one pass, behind a prompt that the base weights read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hhh_router.model.base import Backbone
from hhh_router.model.encode import Encoded
from hhh_router.model.heads import Ragged, Views
from hhh_router.model.int8 import Phase
from hhh_router.model.mixture import Gates, Skip
from hhh_router.model.reader import HeadReader, mode_of
from hhh_router.model.runner import Reply
from hhh_router.types import Scores, Weights


@torch.inference_mode()
def read_decoded(reader: HeadReader, text: Encoded, phase: Phase) -> Scores:
    """Scores of a prompt with its response, or of a response alone, as if the response had just been decoded."""
    stack, heads = reader.stack, reader.heads
    cache = stack.new_cache()
    begun = stack.begin(_row(text.ids[: text.prompt_tokens], stack.device), cache=cache)
    prompt = _tokens(list(reader.states(begun)), text.prompt_span[0] if text.has_prompt else text.prompt_tokens)
    with phase.decoding(any_rows=True):
        state = stack.begin(_row(text.ids[text.prompt_tokens :], stack.device), cache=cache)
        response = _tokens(list(reader.states(state)), 0)
    views = Views(heads.pool(prompt, "prompt"), heads.pool(response, "response"), [mode_of(text)])
    return heads.scores(views, tokens=[len(text.ids)], layers_run=max(reader.read_layers))[0]


@torch.inference_mode()
def next_token_nats(backbone: Backbone, gates: Gates, phase: Phase, row: Reply, weights: Weights) -> Tensor:
    """KL(base || quantised) of what follows each token of a reply, in nats: (reply's tokens,), float32."""
    stack = backbone.stack
    found = []
    for quantised in (False, True):
        cache = stack.new_cache()
        gates.set([weights])
        stack.run(stack.begin(_row(row.ids[: row.start], stack.device), cache=cache), stack.depth)
        with phase.decoding(any_rows=True) if quantised else nullcontext():
            state = stack.begin(_row(row.ids[row.start :], stack.device), cache=cache)
            logits = stack.logits(stack.run(state, stack.depth)[0])  # (T, V)
        found.append(logits.float().log_softmax(-1))
    base, other = found
    return (base.exp() * (base - other)).sum(-1)


@torch.inference_mode()
def skipped_nats(backbone: Backbone, gates: Gates, row: Reply, weights: Weights, trials: Sequence[Skip]) -> list[float]:
    """Per trial the sum over a reply's tokens of KL(whole mixture || experts left out), in nats.

    The layers below the first adapted one run once. ``gates`` keep the last trial.
    """
    stack = backbone.stack
    state = stack.begin(_row(row.ids, stack.device))
    first = trials[0].first
    entering = stack.run(state, first)
    found = []
    for skip in (None, *trials):
        gates.skip = skip or Skip((0.0,) * len(trials[0].thresholds), first, stack.depth)
        gates.set([weights])
        state.hidden, state.next_layer = entering, first
        logits = stack.logits(stack.run(state, stack.depth)[0, row.start - 1 : -1])  # what each token was drawn from
        found.append(logits.float().log_softmax(-1))
    whole, *others = found
    return [float((whole.exp() * (whole - other)).sum()) for other in others]


def _tokens(layers: Sequence[Tensor], start: int) -> Ragged:
    """One row's token states from ``start`` on, of all layers read."""
    states = torch.stack([s[0, start:] for s in layers], dim=1)  # (T, L, D)
    return Ragged(states, [len(states)])


def _row(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([list(ids)], device=device)
