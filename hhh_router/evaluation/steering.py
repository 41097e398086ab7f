"""Measure what the experts and their weights do: likelihood suites and behaviour, for every system in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hhh_router.data.examples import Example, ask
from hhh_router.evaluation.behaviour import behaviour_figures, behaviour_prompts
from hhh_router.evaluation.ifeval import ifeval_figures, read_ifeval
from hhh_router.evaluation.judge import RefusalJudge, agreement, labelled_replies
from hhh_router.evaluation.likelihood import (
    LIKELIHOOD_SUITES,
    Item,
    LikelihoodSuite,
    item_values,
    likelihood_figures,
    likelihood_suites,
    suite_items,
)
from hhh_router.evaluation.weightings import Weighting, weightings
from hhh_router.model.base import Backbone
from hhh_router.model.experts import load_experts
from hhh_router.model.mixture import install_mixture
from hhh_router.model.runner import Runner
from hhh_router.policy import list_policies, load_policy, parse_policy
from hhh_router.training.features import BATCH_TOKENS, encode_cut
from hhh_router.types import ReadRequest, Scores

if TYPE_CHECKING:
    from hhh_router.evaluation.measure import Bench

STEERING: tuple[str, ...] = ("honesty", "hhh", "helpful", "general", "behaviour")
"""Parts of an evaluation that this module adds to."""
_TRUTHFUL = "TruthfulQA MC2"
_READ_TOKENS = 384
_IFEVAL_TOKENS = 128
_ECHO = "the prompt repeated, as a floor"
_WRITERS = ("bare backbone", "helpful alone", "uniform thirds", "router, no policy", "policy balanced")
# no bounds, no rules: the router's own weights are applied unchanged
_UNBOUND = """\
version: 1
name: unbound
weights: {helpful: 1.0, harmless: 1.0, honest: 1.0}
strength: 0.0
checkpoints:
  input: [{then: allow}]
  output: [{then: allow}]
on_error: closed
"""


class Steering:
    """The bench's bundle with its experts on the backbone, ready to be compared with fixed weights."""

    def __init__(self, bench: Bench) -> None:
        """Put the experts into the upper layers of the bench's own backbone; its heads read below them."""
        self._bench = bench
        stack = bench.detector.reader.stack
        gates = install_mixture(stack.model, load_experts(bench.bundle))
        backbone = Backbone(stack=stack, encoder=bench.detector.encoder)
        self.runner = Runner(backbone, gates, bench.bundle.manifest.first_adapted_layer)
        self._unbound = parse_policy(_UNBOUND, source="unbound")
        self._policies = [load_policy(name) for name in list_policies()]

    def part(self, name: str) -> dict[str, Any]:
        """Figures of one part of `STEERING`: lists of rows by their key in ``figures.json``, and plain values."""
        if name == "behaviour":
            return self._behaviour()
        return {"likelihood": self._likelihood(name) + (self._ifeval() if name == "helpful" else [])}

    def _likelihood(self, part: str) -> list[dict[str, Any]]:
        bench = self._bench
        rows: list[dict[str, Any]] = []
        for suite in likelihood_suites(part):
            items = suite_items(suite, bench.data, rows=bench.items, seed=bench.seed)
            systems = {w.name: w.weights for w in self._systems([_as_example(suite, i) for i in items])}
            rows += likelihood_figures(suite, items, systems, self.runner, seed=bench.seed, on_rows=bench.told(part))
        return rows

    def _ifeval(self) -> list[dict[str, Any]]:
        """Whether replies do what can be checked without a judge, for the systems a user would choose between."""
        bench = self._bench
        rows = read_ifeval(bench.data)
        rows = rows[:: max(1, len(rows) // bench.rows)][: bench.rows]
        examples = [Example(source="ifeval", split="eval", messages=ask(r.prompt)) for r in rows]
        prompts = [self.runner.backbone.encoder.encode(ReadRequest(messages=e.messages)).ids for e in examples]
        systems = [w for w in self._systems(examples) if w.name in _WRITERS]
        written = {_ECHO: [r.prompt for r in rows]}
        for number, system in enumerate(systems, start=1):
            bench.told("IFEval")(number, len(systems), system.name)
            replies = self.runner.generate(prompts, system.weights, max_tokens=_IFEVAL_TOKENS)
            written[system.name] = ["" if stop else r for r, stop in zip(replies, system.stops, strict=True)]
        found = []
        for name, replies in written.items():
            made = ifeval_figures(rows, replies, seed=bench.seed)
            found.append(
                {"suite": "helpful", "task": f"IFEval, replies of {_IFEVAL_TOKENS} tokens", "system": name}
                | {"unit": "instructions followed", "value": made["instruction_strict"]}
                | {
                    "interval": made["instruction_strict_interval"],
                    **{k: made[k] for k in ("n", "seed", "data_sha256")},
                }
            )
        return found

    def _behaviour(self) -> dict[str, Any]:
        bench = self._bench
        suite = next(s for s in LIKELIHOOD_SUITES if s.name == _TRUTHFUL)
        items = suite_items(suite, bench.data, rows=bench.items, seed=bench.seed)
        systems = {w.name: w.weights for w in self._systems([_as_example(suite, i) for i in items])}
        truthful = item_values(suite, items, systems, self.runner, on_rows=bench.told("truthfulness"))
        asked = behaviour_prompts(bench.data, bench.rows)
        judge = RefusalJudge.train(labelled_replies(bench.data, "calibrate"))

        def says_no(replies: Sequence[str]) -> list[bool]:
            return [p >= 0.5 for p in judge.probabilities(replies)]

        overall, by_set = behaviour_figures(
            asked, self._systems([a.example for a in asked]), truthful, self.runner, says_no,
            max_tokens=bench.max_tokens, seed=bench.seed, on_rows=bench.told("behaviour"),
        )  # fmt: skip
        return {
            "behaviour_max_tokens": bench.max_tokens,
            "judge": agreement(bench.data, seed=bench.seed),
            "behaviour": overall,
            "behaviour_sets": by_set,
        }

    def _systems(self, examples: Sequence[Example]) -> list[Weighting]:
        calibrators = self._bench.detector.calibrators
        return weightings(examples, self._scores(examples), calibrators, self._unbound, self._policies)

    def _scores(self, examples: Sequence[Example]) -> list[Scores]:
        reader, encoder = self._bench.detector.reader, self._bench.detector.encoder
        texts = [encode_cut(encoder, ReadRequest(messages=e.messages), _READ_TOKENS) for e in examples]
        found: dict[int, Scores] = {}
        for batch in reader.batches(texts, BATCH_TOKENS):
            found |= dict(zip(batch, reader.score([texts[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(texts))]


def _as_example(suite: LikelihoodSuite, item: Item) -> Example:
    """With the labels that the oracle looks at: misconceptions call for honesty, nothing else is known."""
    needs = {"honest": 1.0} if suite.part == "honesty" else {}
    return Example(source=suite.name, split="eval", messages=item.messages, needs=needs)
