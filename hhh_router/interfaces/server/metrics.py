"""``GET /metrics`` for Prometheus: what was asked, decided and applied, and how busy the engine is. No text, no ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hhh_router.calibration import HeadCalibration
from hhh_router.calibration.drift import Drift, Support
from hhh_router.calibration.monitor import Figure
from hhh_router.pipeline.comparison import Comparisons
from hhh_router.protocols import Load
from hhh_router.trace.block import CandidateRecord, Metadata
from hhh_router.trace.sinks import Request
from hhh_router.types import Action, ChatRequest, Mode

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHARES: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
_STATES: Final = ("ready", "starting", "draining")
_REASONS: Final = ("harmless", "injection")
"""Needs that a refusal answers. The larger of the two is a lower bound of the probability that one of them is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What another part counts, asked at every scrape."""

    name: str
    told: str
    labels: tuple[str, ...] = ()
    values: Callable[[], Mapping[tuple[str, ...], float]]
    """By their labels."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        """As Prometheus' client wants it."""
        family = CounterMetricFamily(f"hhh:{self.name}", self.told, labels=self.labels)
        for labels, value in self.values().items():
            family.add_metric(labels, value)
        yield family


class Metrics:
    """A sink that counts. Names mirror vLLM's where they mean the same, under ``hhh:``."""

    def __init__(
        self,
        load: Callable[[], Load],
        references: Mapping[tuple[Mode, str], HeadCalibration] = MappingProxyType({}),
    ) -> None:
        """Count from nothing.

        Args:
            load: How busy the engine is, asked at every scrape.
            references: What the heads were calibrated on, see `Calibrators.references`.
        """
        self.registry = CollectorRegistry()

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"hhh:{name}", told, labels, registry=self.registry)

        def histogram(name: str, told: str, *labels: str, buckets: Iterable[float] = _SHARES) -> Histogram:
            return Histogram(f"hhh:{name}", told, labels, registry=self.registry, buckets=tuple(buckets))

        self._requests = counter("requests", "Finished requests", "kind", "policy", "action")
        self._decisions = counter("decisions", "Decisions of checkpoints", "checkpoint", "action", "enforced")
        self._outside = counter("out_of_distribution", "Requests outside the calibration data", "kind")
        self._uncalibrated = counter("uncalibrated", "Requests whose numbers no calibrator stands behind", "kind")
        self._unread = counter("not_inspected", "Requests with parts that nobody read", "kind")
        self._latency = histogram("e2e_request_latency_seconds", "Whole request", "kind", buckets=_SECONDS)
        self._router = histogram("router_latency_seconds", "Reading until the plan", "kind", buckets=_SECONDS)
        self._weight = histogram("mixture_weight", "Share of an expert in a chat", "expert")
        self._need = histogram("need_probability", "Calibrated need of a request", "need")
        self._outcome = histogram("outcome_probability", "Calibrated fault of a reply", "outcome")
        self._confidence = histogram("decision_confidence", "Calibrated confidence of a request's verdicts", "kind")
        self._stopped = counter("stopped_prompts", "Calibrated prompts stopped before an answer", "kind", "policy")
        self._over = counter("expected_over_refusals", "Of these, expected to need no refusal", "kind", "policy")
        self._passed = counter("passed", "Calibrated requests that were not stopped", "kind", "policy")
        self._harm = counter("expected_harm_passed", "Of these, expected to be harmful", "kind", "policy")
        self.support = {mode: Support() for mode in dict.fromkeys(mode for mode, _ in references)}
        """What was read in each mode since the start, beside the calibration rows' support."""
        self.drift = {place: Drift(reference) for place, reference in references.items()}
        """The same of each head in each mode, beside those rows' probabilities."""
        self.comparisons = Comparisons()
        """What a candidate would have decided otherwise, see `hhh_router.pipeline.comparison`."""
        self._compared = counter("policy_comparisons", "Requests that a candidate was asked about", "checkpoint")
        self._differing = counter(
            "policy_disagreements", "Of these, decided otherwise", "checkpoint", "enforced", "candidate"
        )
        self._related = counter("policy_compared_requests", "The same, by who is stricter first", "relation")
        figure = ("figure", "of")
        self._figure = Gauge("hhh:drift_value", "Figure that GET /v1/drift tells", figure, registry=self.registry)
        self._left = Gauge("hhh:drift_outside", "1 where it has left its bound", figure, registry=self.registry)
        self._responses = counter("http_responses", "HTTP replies", "path", "status")
        for name, told, of in (
            ("num_requests_running", "Replies being decoded", lambda: load().rows),
            ("num_requests_waiting", "Chats waiting for a row", lambda: load().waiting),
            ("num_texts_waiting", "Texts waiting to be read", lambda: load().waiting_texts),
            ("num_prompt_tokens_waiting", "Tokens of waiting prompts", lambda: load().waiting_tokens),
            ("kv_cache_tokens", "Tokens that keys and values have room for", lambda: load().slot_tokens),
            ("estimated_wait_seconds", "Wait of a chat that comes now", lambda: load().wait_s),
        ):
            Gauge(f"hhh:{name}", told, registry=self.registry).set_function(of)
        self._show_drift()
        states = Gauge("hhh:engine_state", "1 for the state that the engine is in", ["state"], registry=self.registry)
        for state in _STATES:
            states.labels(state).set_function(lambda state=state: float(load().state == state))  # type: ignore[misc]

    def write(self, metadata: Metadata, request: Request, reply: str | None) -> None:
        """Count a finished request."""
        kind = "chat" if isinstance(request, ChatRequest) else "guard"
        self._requests.labels(kind, metadata.policy.name, metadata.action).inc()
        enforced = str(metadata.policy.mode == "enforce").lower()
        for decision in metadata.decisions:
            self._decisions.labels(decision.checkpoint, decision.action, enforced).inc()
        for counter, counts in (
            (self._outside, not metadata.calibration.in_distribution),
            (self._uncalibrated, not metadata.calibration.calibrated),
            (self._unread, bool(metadata.not_inspected)),
        ):
            counter.labels(kind).inc(int(counts))
        for histogram, stage in ((self._latency, "total"), (self._router, "read")):
            if (took := metadata.timing_ms.get(stage)) is not None:
                histogram.labels(kind).observe(took / 1000)
        self._confidence.labels(kind).observe(metadata.confidence)
        if kind == "chat":
            for expert, weight in metadata.weights.items():
                self._weight.labels(expert).observe(weight)
        for need, p in metadata.needs.items():
            self._need.labels(need).observe(p)
        if metadata.calibration.calibrated:
            self._watch(kind, metadata)
        if metadata.candidate is not None:
            self._compare(metadata, metadata.candidate)
        if metadata.mode != "prompt":  # of a prompt alone they say how it might be answered, not how it was
            for outcome, p in metadata.outcomes.items():
                self._outcome.labels(outcome).observe(p)

    def _compare(self, metadata: Metadata, candidate: CandidateRecord) -> None:
        self.comparisons.add(metadata)
        self._related.labels(candidate.relation).inc()
        for at in candidate.compared:
            self._compared.labels(at.checkpoint).inc()
            if at.enforced != at.candidate:
                self._differing.labels(at.checkpoint, at.enforced, at.candidate).inc()

    def _show_drift(self) -> None:
        def gauge(name: str, told: str, *labels: str) -> Gauge:
            return Gauge(f"hhh:{name}", told, labels, registry=self.registry)

        reference = gauge("calibration_base_rate", "Mean probability of the calibration rows", "head", "mode")
        shift = gauge("calibration_shift", "Mean of the latest probabilities minus that", "head", "mode")
        index = gauge("calibration_psi", "Stability index of the latest against those rows", "head", "mode")
        inside = gauge("in_distribution_share", "Of the latest readings; 0.99 of the calibration rows", "mode")
        for (mode, head), drift in self.drift.items():
            reference.labels(head, mode).set(drift.reference.base_rate)
            shift.labels(head, mode).set_function(lambda drift=drift: drift.shift)  # type: ignore[misc]
            if drift.reference.bins is not None:
                index.labels(head, mode).set_function(lambda drift=drift: drift.index)  # type: ignore[misc]
        for mode, latest in self.support.items():
            inside.labels(mode).set_function(lambda latest=latest: latest.share)  # type: ignore[misc]

    def _watch(self, kind: str, metadata: Metadata) -> None:
        """What a calibrated reading says of both errors, and of drift."""
        mode, policy = metadata.mode, metadata.policy.name
        for place, p in _probabilities(metadata):
            if (drift := self.drift.get((mode, place))) is not None:
                drift.add(p)
        if mode in self.support:
            self.support[mode].add(metadata.calibration.in_distribution)
        stops = [d.checkpoint for d in metadata.decisions if Action(d.action).stops]
        harm = max((metadata.needs[need] for need in _REASONS if need in metadata.needs), default=None)
        if "input" in stops and harm is not None:
            self._stopped.labels(kind, policy).inc()
            self._over.labels(kind, policy).inc(1 - harm)
        elif not stops:
            passed = harm if mode == "prompt" else metadata.outcomes.get("unsafe")
            if passed is not None:
                self._passed.labels(kind, policy).inc()
                self._harm.labels(kind, policy).inc(passed)

    def watch(self, counts: Counts) -> None:
        """Tell of what another part counts."""
        self.registry.register(counts)  # type: ignore[arg-type]

    def show(self, figures: Iterable[Figure]) -> None:
        """Take over what the monitors found last."""
        for gauge in (self._figure, self._left):
            gauge.clear()
        for figure in figures:
            if figure.value is not None:
                self._figure.labels(figure.name, figure.of).set(figure.value)
            self._left.labels(figure.name, figure.of).set(float(figure.state == "outside"))

    def answered(self, path: str, status: int) -> None:
        """Count an HTTP reply."""
        self._responses.labels(path, str(status)).inc()

    def page(self) -> Response:
        """What Prometheus scrapes."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


def _probabilities(metadata: Metadata) -> Iterator[tuple[str, float]]:
    for kind, heads in (("needs", metadata.needs), ("outcomes", metadata.outcomes)):
        for head, p in heads.items():
            yield f"{kind}.{head}", p


class CountReplies:
    """ASGI middleware: counts replies by path and status; paths that are not served are all ``other``."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(path, message["status"])
            await send(message)

        await self._app(scope, receive, count)
