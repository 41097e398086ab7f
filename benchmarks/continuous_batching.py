"""Our batch beside transformers' own continuous batching: the numbers behind docs/adr.

``python -m benchmarks.continuous_batching``; transformers runs the bare backbone, for its manager knows no adapters,
ours runs mixtures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks import baselines
from benchmarks.decoding import mixed_lengths
from benchmarks.figures import Figure, Measured
from benchmarks.lab import MIXTURES, Lab, by_turns, plan_for
from benchmarks.present import present
from benchmarks.run import leave, parse, run
from benchmarks.timing import medians, ratios
from hhh_router.errors import HHHRouterError
from hhh_router.model.base import quiet_transformers
from hhh_router.types import Message

_PAGE_TOKENS = 256  # transformers' default
_BATCH_TOKENS = 256  # its mask is dense: more made it slower on a CPU
_NO_END = -1  # a token that is never drawn


def manager_seconds(lab: Lab, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds for transformers' manager to answer all prompts, its start and end left out."""
    with _manager(lab, model, prompts, tokens) as manager:
        started = perf_counter()
        manager.add_requests(inputs=[list(p) for p in prompts], max_new_tokens=tokens)
        open_requests = len(prompts)
        while open_requests:
            found = manager.get_result(timeout=1)
            if found is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before its requests did")
            if found is not None and found.is_finished():
                if found.error or len(found.generated_tokens) != tokens:
                    raise RuntimeError(f"{len(found.generated_tokens)} tokens came back: {found.error}")
                open_requests -= 1
        return perf_counter() - started


@contextmanager
def _manager(lab: Lab, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[Any]:
    pages = sum(-(-(len(p) + tokens) // _PAGE_TOKENS) for p in prompts)
    config = ContinuousBatchingConfig(
        page_size=_PAGE_TOKENS,
        num_blocks=pages + 1,
        max_batch_tokens=_BATCH_TOKENS,
        allow_block_sharing=False,  # what one prompt spares another would not be decoding
    )
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=tokens, eos_token_id=_NO_END, pad_token_id=0
    )
    with (
        quiet_transformers(),
        model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config, warmup=lab.device.type == "cuda", timeout=60
        ) as manager,
    ):
        yield manager


def chats(lab: Lab) -> Measured:
    """Tokens/s of concurrent chats of mixed length, prompts read too."""
    count, tokens = lab.sizes.chats, lab.sizes.chat_tokens
    prompts = [lab.prompts(1, n)[0] for n in mixed_lengths(lab)]
    ids = lab.ids(prompts)
    model = baselines.load(lab)
    found = lab.compare(
        {
            "ours": lambda: lab.chats_rate(prompts, by_turns(MIXTURES, count), tokens),
            "transformers": lambda: count * tokens / manager_seconds(lab, model, ids, tokens),
        }
    )
    note = f"{count} chats of {tokens} tokens; ours under mixtures, transformers on the bare backbone"
    return Measured(values=ratios(found, "ours", "transformers"), sides=medians(found, "tokens/s"), note=note)


def prefill(lab: Lab) -> Measured:
    """Seconds of transformers over ours until several prompts each have their first token."""
    count, length = lab.sizes.cached_prompts
    prompts = lab.prompts(count, length)
    ids = lab.ids(prompts)
    model = baselines.load(lab)
    found = lab.compare(
        {
            "ours": lambda: first_tokens_s(lab, prompts),
            "transformers": lambda: manager_seconds(lab, model, ids, 1),
        }
    )
    note = f"{count} prompts of {length} tokens; ours are routed and under mixtures"
    return Measured(values=ratios(found, "transformers", "ours"), sides=medians(found, "s"), note=note)


def first_tokens_s(lab: Lab, prompts: Sequence[Sequence[Message]]) -> float:
    """Seconds until our batch has answered every prompt with one token."""
    started = perf_counter()
    for prompt, weights in zip(prompts, by_turns(MIXTURES, len(prompts)), strict=True):
        lab.put(prompt, plan_for(weights), tokens=1)
    while lab.batcher.busy:
        lab.turn()
    lab.sync()
    return perf_counter() - started


FIGURES = (
    Figure(
        name="chats-16-over-manager",
        title="16 concurrent chats over transformers' continuous batching",
        unit="x",
        target=None,
        measure=chats,
    ),
    Figure(
        name="prefill-8-over-manager",
        title="Prefill of 8 prompts, speed over transformers' continuous batching",
        unit="x",
        target=None,
        measure=prefill,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; exit codes as of `benchmarks.engine`."""
    about = "Our batch beside transformers' continuous batching."
    options = parse("benchmarks.continuous_batching", about, FIGURES, argv)
    try:
        records, failed = run(options, FIGURES)
    except (HHHRouterError, ValueError) as error:
        return leave(error)
    present(records, options.out, chart=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
