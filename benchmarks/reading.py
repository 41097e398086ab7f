"""Figures of reading: prefill, routing, refusals, the guard, and what the experts take in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from benchmarks.figures import Figure, Measured
from benchmarks.lab import MIXTURES, Lab, plan_for
from benchmarks.llamacpp import open_llamacpp
from benchmarks.prompts import mixed
from benchmarks.timing import leaves_no_team, medians, ratios, seconds
from hhh_router.assemble import load_calibrators
from hhh_router.model.base import load_backbone
from hhh_router.model.experts import Expert, load_experts
from hhh_router.model.heads import Heads
from hhh_router.model.reads import ReadJob, Reads
from hhh_router.model.serving import install_serving
from hhh_router.pipeline.plan import make_planner
from hhh_router.policy import load_policy
from hhh_router.protocols import Planner
from hhh_router.settings import DEFAULT_POLICY
from hhh_router.types import Action, Decision, Plan, ReadRequest, Scores

_SLOW_REPEATS = 3  # the guard: a thousand prompts one by one
_REFUSAL_SLACK = 0.05  # over l_r / L: heads, template and queue cost something too
_ALLOW = Decision(checkpoint="input", action=Action.ALLOW, rule="benchmark", reason="benchmark")


def real_planner(lab: Lab) -> Planner:
    """The default policy's planner: evidence, weights, rules."""
    calibrators = load_calibrators(lab.bundle, lab.settings, lab.dtype)
    return make_planner(policy=load_policy(DEFAULT_POLICY), calibrators=calibrators)


class Stopwatch:
    """Adds up how long some functions run."""

    def __init__(self, sync: Callable[[], None]) -> None:
        """``sync`` waits for the device before the clock is read."""
        self._sync = sync
        self.elapsed_s = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._sync()
            started = perf_counter()
            found = function(*args, **kwargs)
            self._sync()
            self.elapsed_s += perf_counter() - started
            return found

        return run


def routing_share(lab: Lab) -> Measured:
    """Pooling, heads, calibration, gate and input policy, as a share of the time to the first token.

    Their parts are timed inside a real request: as the difference of two whole requests they would drown in noise. The
    layers below l_r are no part of it, the reply needs them anyway.
    """
    prompt = lab.prompts(1, lab.sizes.long_prompt_tokens)[0]
    planner, reader = real_planner(lab), lab.batcher.reader

    def turn() -> float:
        lab.first_token_s(prompt, plan_for(MIXTURES[0]))  # as in `Lab.warm_first_token_s`
        watch = Stopwatch(lab.sync)
        own: dict[str, Any] = {"pool": reader.prompt, "scores": reader.heads.scores}
        plan: Planner = watch.timed(planner)

        def allowed(scores: Scores) -> Plan:  # whatever the policy says of this prompt, its reply is wanted here
            return replace(plan(scores), decision=_ALLOW, weights=MIXTURES[0])

        setattr(reader, "prompt", watch.timed(own["pool"]))  # noqa: B010 - a method, to the type checker
        setattr(reader.heads, "scores", watch.timed(own["scores"]))  # noqa: B010
        try:
            first_token_s = lab.first_token_s(prompt, allowed)
        finally:
            del reader.prompt, reader.heads.scores  # the class's own again
        return watch.elapsed_s / first_token_s

    return Measured(values=lab.compare({"share": turn})["share"], note=f"{_length(lab)} tokens of prompt")


def refusal_cost(lab: Lab) -> Measured:
    """Time until a prompt is refused over the time to the first token of the same prompt when it is answered."""
    prompt = lab.prompts(1, lab.sizes.long_prompt_tokens)[0]
    refuse, allow = plan_for(MIXTURES[0], Action.REFUSE), plan_for(MIXTURES[0])
    found = lab.compare(
        {
            "refused": lambda: lab.warm_first_token_s(prompt, refuse),
            "answered": lambda: lab.warm_first_token_s(prompt, allow),
        }
    )
    return Measured(
        values=ratios(found, "refused", "answered"),
        sides=medians(found, "s"),
        note=f"{_length(lab)} tokens of prompt",
        target=refusal_target(lab.bundle.manifest.first_adapted_layer, lab.bundle.manifest.backbone.layers),
    )


def guard_over_one_by_one(lab: Lab) -> Measured:
    """Prompts/s of one guard call over as many calls of one prompt each; every one read, calibrated and decided."""
    prompts = mixed(lab.sizes.guard_prompts, lab.sizes.guard_chars)
    planner = real_planner(lab)

    def rate(calls: list[list[ReadRequest]]) -> float:
        reads = Reads(lab.batcher.reader, lab.encoder, lab.settings.guard_batch_tokens)  # one that remembers nothing
        return len(prompts) / seconds(lambda: _guard(reads, calls, planner))

    found = lab.compare(
        {"one call": lambda: rate([prompts]), "one by one": lambda: rate([[p] for p in prompts])}, most=_SLOW_REPEATS
    )
    note = f"{len(prompts)} prompts, the longest {lab.sizes.guard_chars} characters"
    return Measured(values=ratios(found, "one call", "one by one"), sides=medians(found, "prompts/s"), note=note)


def _guard(reads: Reads, calls: list[list[ReadRequest]], planner: Planner) -> None:
    for call in calls:
        ended: list[list[Scores] | Exception] = []
        reads.put(ReadJob(requests=call, end=ended.append))
        while reads.busy:
            reads.turn()
        (found,) = ended
        if isinstance(found, Exception):
            raise found
        for scores in found:
            planner(scores)


def prefill_over_llamacpp(lab: Lab) -> Measured:
    """Prompt tokens/s until the first token, under a mixture and routed, over llama.cpp's on the bare backbone."""
    prompt = lab.prompts(1, lab.sizes.long_prompt_tokens)[0]
    ids = lab.ids([prompt])[0]
    allow = plan_for(MIXTURES[0])
    with open_llamacpp(lab, len(ids) + 8) as (llama, _):
        found = lab.compare(
            {
                "ours": lambda: len(ids) / lab.warm_first_token_s(prompt, allow),
                "llama.cpp": lambda: len(ids) / llama.prefill_s(ids),
            }
        )
        note = f"{len(ids)} tokens of prompt; {llama.built_for}"
    return Measured(values=ratios(found, "ours", "llama.cpp"), sides=medians(found, "tokens/s"), note=note)


@leaves_no_team
def added_memory(lab: Lab) -> Measured:
    """Bytes of tensors that heads and three experts add to a backbone as it is served, as a share of the backbone's.

    Counted over all tensors alive, each storage once, so that nobody has to know where the layers keep their factors.
    """
    manifest = lab.bundle.manifest
    assert manifest.heads is not None
    experts = load_experts(lab.bundle)
    alone, plain = _served_bytes(lab, [])
    start = live_bytes()
    heads = Heads.load(
        lab.bundle.root / manifest.heads.path, layers=len(manifest.heads.read_layers), dim=manifest.backbone.hidden_size
    ).to(lab.device)
    read = live_bytes() - start
    mixed, _ = _served_bytes(lab, experts)
    del heads
    lab.on_step()
    added = mixed - alone + read
    return Measured(
        values=[added / plain],
        sides={"added (bytes)": float(added), "backbone (bytes)": float(plain)},
        note=f"counted, not timed; of the heads {read / 1e6:.0f} MB",
    )


def _served_bytes(lab: Lab, experts: Sequence[Expert]) -> tuple[int, int]:
    """Bytes of a backbone as it is served with these experts, and as it is loaded."""
    before = live_bytes()
    backbone = load_backbone(lab.folder, lab.bundle.manifest.backbone, device=str(lab.device), dtype=lab.dtype)
    loaded = live_bytes() - before
    kept = install_serving(backbone.stack.model, experts, "none")
    served = live_bytes() - before
    del kept
    return served, loaded


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor):  # isinstance would wake lazy modules
            continue
        if str(item.layout) == "torch._mkldnn":  # packed weights have no storage that can be asked for
            found[id(item)] = item.nbytes
        else:
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _length(lab: Lab) -> int:
    return len(lab.ids(lab.prompts(1, lab.sizes.long_prompt_tokens))[0])


def refusal_target(layers_below: int, depth: int) -> float:
    """l_r / L and some slack.

    >>> round(refusal_target(16, 30), 3)
    0.583
    """
    return layers_below / depth + _REFUSAL_SLACK


FIGURES = (
    Figure(
        name="routing-share",
        title="Routing and input guard, share of the time to the first token",
        unit="share",
        target=0.03,
        at="most",
        measure=routing_share,
    ),
    Figure(
        name="refusal-cost",
        title="A refused prompt over its full prefill",
        unit="share",
        target=refusal_target(16, 30),
        at="most",
        measure=refusal_cost,
    ),
    Figure(
        name="guard-1000",
        title="Guard of 1,000 mixed prompts over one by one",
        unit="x",
        target=4.0,
        measure=guard_over_one_by_one,
    ),
    Figure(
        name="added-memory",
        title="Memory of three experts and heads, share of the backbone",
        unit="share",
        target=0.10,
        at="most",
        measure=added_memory,
    ),
    Figure(
        name="prefill-over-llamacpp",
        title="Prefill under a mixture over llama.cpp on the bare backbone",
        unit="x",
        target=2.5,
        measure=prefill_over_llamacpp,
    ),
)
