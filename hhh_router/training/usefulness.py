"""Which expert helps with which request: shares by how likely each makes the reference answer.

These are the targets that a gate is fitted to and compared on. Where a data set came from says nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hhh_router.data.examples import Example
from hhh_router.errors import ContextTooLong, DataError
from hhh_router.model.runner import Runner, as_reply
from hhh_router.types import EXPERTS, Weights

VERTICES: dict[str, Weights] = {e: Weights.from_mapping({x: float(x == e) for x in EXPERTS}) for e in EXPERTS}
"""All weight on one expert, in ``EXPERTS`` order."""


@dataclass(frozen=True, slots=True)
class Usefulness:
    """Rows with what each expert makes of their reference answers."""

    rows: tuple[int, ...]
    """Places of the examples that fitted the window."""
    nll: NDArray[np.float64]
    """(n, 4): nats per token of the reference answer under each expert alone, columns as ``EXPERTS``."""

    def shares(self, temperature: float) -> NDArray[np.float64]:
        """(n, 4): softmax of -nll / temperature; rows sum to 1."""
        scaled = -self.nll / temperature
        raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def usefulness(
    examples: Sequence[Example],
    runner: Runner,
    *,
    max_tokens: int,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Usefulness:
    """Score every example's response under each expert alone.

    Args:
        examples: With the response that should be given.
        runner: Of the backbone with the bundle's experts.
        max_tokens: Longest prompt + response; what is behind is cut.
        on_rows: Told how many rows are done, of how many.

    Raises:
        DataError: A row has no response, or none is left.
    """
    if missing := [e for e in examples if e.response is None]:
        raise DataError(
            f"usefulness: {len(missing)} rows have no reference answer (first from {missing[0].source!r})",
            hint="name sets with replies, or give the share a reply",
        )
    kept, replies = [], []
    for place, example in enumerate(examples):
        try:
            reply = as_reply(runner.backbone, example.messages, example.response or "", max_tokens)
        except ContextTooLong:
            continue
        if reply.tokens:
            kept.append(place)
            replies.append(reply)
    if not replies:
        raise DataError("usefulness: no row is left", hint="raise max_tokens, or name other sets")
    found = runner.log_likelihoods(replies, {e: [w] * len(replies) for e, w in VERTICES.items()}, on_rows=on_rows)
    tokens = np.array([r.tokens for r in replies], dtype=np.float64)
    nll = -np.stack([np.array(found[e]) / tokens for e in EXPERTS], axis=1)
    return Usefulness(tuple(kept), nll)
