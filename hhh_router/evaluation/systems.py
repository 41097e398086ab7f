"""What can be measured on a user's own rows: bundles, policies, guards behind a URL, and baselines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from hhh_router.assemble import load_calibrators
from hhh_router.bundle import Bundle
from hhh_router.calibration import Calibrators
from hhh_router.errors import InvalidRequest, MissingExtra
from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision, unread_plan
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.pipeline.situation import answered_situation, asked_situation
from hhh_router.policy import Policy, for_tenant
from hhh_router.settings import Settings
from hhh_router.types import OUTCOMES, Action, Caller, Decision, Plan, ReadRequest, Scores, Situation
from hhh_router.upstream.guards import GuardClient, Judged, Wire

if TYPE_CHECKING:
    from hhh_router.evaluation.detection import Detector

STOPPING_HEADS: frozenset[str] = frozenset({"harmless", "injection", *OUTCOMES})
"""Heads on which "it was stopped" is an answer: nobody stops a request because it needs honesty or help."""
_BATCH_TOKENS = 4096
_ABOUTS = 4  # a server that says something new each time would fill the report

Told = Callable[[str, int, int, str], None]
"""Told stage, done, total, note."""


class System(Protocol):
    """Something that judges texts: with probabilities, with verdicts, or with both."""

    @property
    def name(self) -> str:
        """As the tables name it."""

    @property
    def note(self) -> str:
        """What one must know to read its figures; complete once it was asked."""

    @property
    def verdict_heads(self) -> frozenset[str]:
        """The heads that its verdict is about."""

    def probabilities(self, requests: Sequence[ReadRequest], head: str) -> list[float] | None:
        """P(head) of each text, NaN for one it would not judge; None where it says nothing about this head."""

    def verdicts(self, requests: Sequence[ReadRequest]) -> list[bool | None] | None:
        """Whether it stops each text, None for one it would not judge; None for a system that stops nothing."""


class Readings(Protocol):
    """What reads texts for bundles and policies."""

    @property
    def calibrators(self) -> Calibrators:
        """What makes probabilities of the scores."""

    @property
    def about(self) -> str:
        """The bundle that reads, by name and hash."""

    def scores(self, requests: Sequence[ReadRequest]) -> list[Scores | None]:
        """Raw scores of each text; None for a conversation that the model's template does not take."""


class BundleReadings:
    """A bundle's readings: the model is loaded when first asked, and a text is read once. Nothing is kept on disk.

    Texts are read as a request would be. One that is longer than the model's window, which a request may not be, is
    cut.
    """

    def __init__(self, bundle: Bundle, settings: Settings, on_progress: Told = lambda *_: None) -> None:
        self._bundle = bundle
        self._settings = settings
        self._on_progress = on_progress
        self._known: dict[ReadRequest, Scores | None] = {}
        self._loaded: tuple[Any, Any, Calibrators] | None = None

    @property
    def name(self) -> str:
        """The bundle's."""
        return self._bundle.manifest.name

    @property
    def about(self) -> str:
        """The bundle that reads, by name and hash."""
        return f"bundle {self._bundle.manifest.name} ({self._bundle.sha256[:16]})"

    @property
    def calibrators(self) -> Calibrators:
        """The bundle's own."""
        return self._open()[2]

    def scores(self, requests: Sequence[ReadRequest]) -> list[Scores | None]:
        """Raw scores of each text; None for a conversation that the model's template does not take.

        Raises:
            BundleError: The bundle is not complete, or its backbone cannot be had.
        """
        reader, encoder, _ = self._open()
        from hhh_router.training.features import encode_cut  # torch: systems behind a URL do without

        encoded: dict[ReadRequest, Any] = {}
        for request in dict.fromkeys(requests):
            if request not in self._known:
                self._known[request] = None
                with suppress(InvalidRequest):
                    encoded[request] = encode_cut(encoder, request, encoder.context_tokens)
        new, texts = [*encoded], [*encoded.values()]
        done = 0
        for batch in reader.batches(texts, _BATCH_TOKENS):
            for i, scores in zip(batch, reader.score([texts[i] for i in batch]), strict=True):
                self._known[new[i]] = scores
            done += len(batch)
            self._on_progress(f"reading, {self._bundle.manifest.name}", done, len(new), "")
        return [self._known[r] for r in requests]

    def _open(self) -> tuple[Any, Any, Calibrators]:
        if self._loaded is None:
            self._bundle.verify()
            try:
                from hhh_router.model.worker import open_reader
            except ImportError as error:
                raise MissingExtra("model", needed_for="measuring a bundle") from error
            reader, encoder = open_reader(self._bundle, self._settings)
            self._loaded = reader, encoder, load_calibrators(self._bundle, self._settings, reader.dtype)
        return self._loaded


class BundleSystem:
    """A bundle's calibrated heads."""

    verdict_heads: frozenset[str] = frozenset()

    def __init__(self, name: str, readings: Readings) -> None:
        self.name = name
        self._readings = readings

    @property
    def note(self) -> str:
        """The bundle's hash."""
        return self._readings.about

    def probabilities(self, requests: Sequence[ReadRequest], head: str) -> list[float] | None:
        """P(head) of each text, calibrated."""
        calibrators = self._readings.calibrators
        found = []
        for scores in self._readings.scores(requests):
            evidence = None if scores is None else calibrators.evidence(scores)
            found.append(math.nan if evidence is None else {**evidence.needs, **evidence.outcomes}[head])
        return found

    def verdicts(self, requests: Sequence[ReadRequest]) -> list[bool | None] | None:
        """None: a bundle decides nothing."""
        return None


class PolicySystem:
    """What a policy's checkpoints make of a bundle's readings: the input's of prompts, the output's of responses."""

    verdict_heads = STOPPING_HEADS

    def __init__(self, policy: Policy, readings: Readings) -> None:
        self.name = f"policy {policy.name}"
        self._policy = for_tenant(policy, "")
        self._readings = readings

    @property
    def note(self) -> str:
        """Policy and bundle with their hashes."""
        shadow = ", in shadow mode: what it would stop" if self._policy.mode == "shadow" else ""
        policy = f"policy {self._policy.name}@{self._policy.version} ({self._policy.hash[:16]})"
        return f"{policy}, {self._readings.about}{shadow}"

    def probabilities(self, requests: Sequence[ReadRequest], head: str) -> list[float] | None:
        """None: a policy says yes or no."""
        return None

    def verdicts(self, requests: Sequence[ReadRequest]) -> list[bool | None] | None:
        """Whether the policy stops each text; as in `pipeline.guard`, a reply that should be made anew is stopped."""
        prompts = self._readings.scores([ReadRequest(messages=r.messages) for r in requests])
        found: list[bool | None] = []
        for request, prompt, scores in zip(requests, prompts, self._readings.scores(requests), strict=True):
            if prompt is None or scores is None:
                found.append(None)
                continue
            about = asked_situation(request.messages, Caller(tenant=""), None)
            plan = self._plan(prompt, about)
            if request.response is None:
                decision = plan.decision
            else:
                decision = self._judge_response(scores, plan, answered_situation(about, request.response))
            found.append(decision.action.stops or decision.action is Action.REGENERATE)
        return found

    def _plan(self, scores: Scores, situation: Situation) -> Plan:
        try:
            check_scores(scores)
            return make_plan(scores, policy=self._policy, calibrators=self._readings.calibrators, situation=situation)
        except JUDGING_FAILURES as error:
            return unread_plan(self._policy, failed_decision(self._policy, "input", error))

    def _judge_response(self, scores: Scores, plan: Plan, situation: Situation) -> Decision:
        try:
            check_scores(scores)
            calibrators = self._readings.calibrators
            _, _, decision = judge_output(
                scores, plan=plan, policy=self._policy, calibrators=calibrators, situation=situation
            )
            return decision
        except JUDGING_FAILURES as error:
            return failed_decision(self._policy, "output", error)


class RemoteSystem:
    """A guard behind a URL. A text is sent once, whatever is asked about it."""

    def __init__(self, name: str, client: GuardClient, wire: Wire, on_progress: Told = lambda *_: None) -> None:
        self.name = name
        self.verdict_heads = STOPPING_HEADS if wire == "native" else frozenset({"harmless", "unsafe"})
        self._client = client
        self._wire = wire
        self._on_progress = on_progress
        self._known: dict[ReadRequest, Judged | None] = {}

    @property
    def note(self) -> str:
        """What it says it judges with, each answer that differed."""
        told = list(dict.fromkeys(j.about for j in self._known.values() if j is not None and j.about))
        if len(told) > _ABOUTS:
            told[_ABOUTS:] = [f"and {len(told) - _ABOUTS} more"]
        if self._wire == "moderations":
            told.append("its score is the largest of its categories', no calibrated probability")
        return "; ".join(told)

    def probabilities(self, requests: Sequence[ReadRequest], head: str) -> list[float] | None:
        """What it states for each text; None where it states nothing for any.

        Raises:
            UpstreamError: Nobody answers, the key is wrong, it is another kind of server, or it failed.
            BackendTimeout: It took too long.
        """
        if self._wire == "moderations" and head not in self.verdict_heads:
            return None  # it would cost a call a text to learn nothing
        answers = self._answers(requests)
        found = [math.nan if a is None else {**a.needs, **a.outcomes}.get(head, math.nan) for a in answers]
        return None if all(map(math.isnan, found)) else found

    def verdicts(self, requests: Sequence[ReadRequest]) -> list[bool | None] | None:
        """Whether it stops each text; raises what `probabilities` does."""
        return [None if a is None else a.stopped for a in self._answers(requests)]

    def _answers(self, requests: Sequence[ReadRequest]) -> list[Judged | None]:
        new = [r for r in dict.fromkeys(requests) if r not in self._known]
        answers = asyncio.run(self._client.judge(new, lambda done, of: self._on_progress(self.name, done, of, "")))
        self._known |= zip(new, answers, strict=True)
        return [self._known[r] for r in requests]


class DetectorSystem:
    """A baseline, made when it is first asked."""

    verdict_heads: frozenset[str] = frozenset()

    def __init__(self, name: str, make: Callable[[], Detector], note: str) -> None:
        self.name = name
        self.note = note
        self._make = make
        self._detector: Detector | None = None

    def probabilities(self, requests: Sequence[ReadRequest], head: str) -> list[float] | None:
        """P(head) of each text; None for a head it does not know.

        Raises:
            BackendError: It is not installed, or cannot load its model.
        """
        self._detector = self._detector or self._make()
        return self._detector.probabilities(requests, head) if head in self._detector.heads else None

    def verdicts(self, requests: Sequence[ReadRequest]) -> list[bool | None] | None:
        """None: a baseline decides nothing."""
        return None
