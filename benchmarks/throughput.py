"""Tokens/s of whole batches beside transformers' own ``generate``: what a GPU is for, reported without a target."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import baselines
from benchmarks.figures import Figure, Measured
from benchmarks.lab import MIXTURES, Lab, by_turns
from benchmarks.timing import medians

BATCHES = (1, 16, 64)


def tokens_per_s(rows: int) -> Callable[[Lab], Measured]:
    """Measures so many chats asked at once, mixtures by turns; beside it one padless batch of the bare backbone."""

    def measure(lab: Lab) -> Measured:
        tokens = lab.sizes.gpu_tokens
        prompts = lab.prompts(rows, lab.sizes.prompt_tokens)
        batch = baselines.prompt_batch(lab, rows)
        model = baselines.load(lab)
        found = lab.compare(
            {
                "ours": lambda: lab.chats_rate(prompts, by_turns(MIXTURES, rows), tokens),
                "transformers generate": lambda: baselines.generate_rate(lab, model, [batch], tokens),
            }
        )
        note = f"{tokens} tokens each, prompts read too; transformers runs the bare backbone in one batch"
        return Measured(values=found["ours"], sides=medians(found, "tokens/s"), note=note)

    return measure


FIGURES = tuple(
    Figure(
        name=f"tokens-per-s-{rows}",
        title=f"{rows} {'chat' if rows == 1 else 'chats'} at once under mixtures",
        unit="tokens/s",
        target=None,
        measure=tokens_per_s(rows),
    )
    for rows in BATCHES
)
