"""What can be measured on a user's own rows: bundles, policies, guards behind a URL, and baselines."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, get_args
from urllib.parse import urlsplit

from pydantic import SecretStr

from hhh_router.assemble import load_calibrators
from hhh_router.bundle import Bundle
from hhh_router.calibration import Calibrators
from hhh_router.data.examples import Example
from hhh_router.errors import InvalidRequest, MissingExtra, SettingsError
from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision, unread_plan
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.pipeline.situation import answered_situation, asked_situation
from hhh_router.policy import Policy, for_tenant, load_policy
from hhh_router.policy.values import did_you_mean, either
from hhh_router.settings import Settings
from hhh_router.types import OUTCOMES, Action, Caller, Decision, Plan, ReadRequest, Scores, Situation
from hhh_router.upstream.guards import WIRES, GuardClient, Judged, Wire, guard_endpoint

if TYPE_CHECKING:
    from hhh_router.evaluation.detection import Detector

_Named = Union["BundleSystem", "PolicySystem", "RemoteSystem", "DetectorSystem"]
Kind = Literal["bundle", "policy", "url", "baseline"]
KINDS: tuple[str, ...] = get_args(Kind)
BASELINES: tuple[str, ...] = ("tfidf", "minilm", "jailguard")
TRAINED = ("tfidf", "minilm")
"""Baselines that learn from a recipe's rows."""
STOPPING_HEADS: frozenset[str] = frozenset({"harmless", "injection", *OUTCOMES})
"""Heads on which "it was stopped" is an answer: nobody stops a request because it needs honesty or help."""
_BATCH_TOKENS = 4096
_ABOUTS = 4  # a server that says something new each time would fill the report
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What systems are opened with."""

    settings: Settings
    bundle: str
    """The bundle that policies, and ``bundle`` without a name, read with."""
    heads: Sequence[str]
    """What the rows are labelled for: baselines learn no others."""
    recipe: Path | None = None
    """Whose router rows baselines learn from."""
    data: Path | None = None
    """Folder of the public data sets that those rows are drawn from."""
    wire: str = "native"
    api_key_env: Sequence[str] = ()
    """Names of variables that hold keys: ``NAME``, or ``HOST=NAME`` where several hosts are asked."""
    timeout_s: float = 120.0
    concurrency: int = 4
    on_progress: Told = field(default=lambda *_: None)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def open_systems(specs: Sequence[str], opening: Opening) -> list[System]:
    """The systems that ``--system`` names, checked as far as that is quick: models are loaded when they are asked.

    Args:
        specs: ``bundle[:NAME]``, ``policy:NAME``, ``url:URL``, ``baseline:NAME``.
        opening: What they are opened with.

    Raises:
        SettingsError: No such system, or an option that it needs is missing.
        PolicyError, BundleError: No such policy or bundle, or it is wrong.
    """
    parsed = [_parse(spec) for spec in dict.fromkeys(specs)]
    if opening.wire not in WIRES:
        raise SettingsError(f"--wire {opening.wire}: no such wire", hint=f"use {either(WIRES)}")
    endpoints = [guard_endpoint(value, opening.wire) for kind, value in parsed if kind == "url"]  # type: ignore[arg-type]
    keys = _keys([url for url, _ in endpoints], opening)
    readings: dict[Path, BundleReadings] = {}

    def read_by(name: str) -> BundleReadings:
        bundle = Bundle.load(name)
        return readings.setdefault(bundle.root, BundleReadings(bundle, opening.settings, opening.on_progress))

    drawn: list[list[Example]] = []  # once for all baselines
    places = iter(endpoints)
    systems: list[_Named] = []
    for kind, value in parsed:
        match kind:
            case "bundle":
                readings_of = read_by(value or opening.bundle)
                systems.append(BundleSystem(readings_of.name, readings_of))
            case "policy":
                systems.append(PolicySystem(load_policy(value), read_by(opening.bundle)))
            case "url":
                systems.append(_remote(*next(places), keys, opening))
            case "baseline":
                systems.append(_baseline(value, opening, drawn))
    return _told_apart(systems)


def _told_apart(systems: Sequence[_Named]) -> list[System]:
    """The same systems; of several with one name, such as two versions of a bundle, the later ones get a number."""
    seen: Counter[str] = Counter()
    for system in systems:
        seen[system.name] += 1
        if seen[system.name] > 1:
            system.name = f"{system.name} ({seen[system.name]})"
    return list(systems)


def _parse(spec: str) -> tuple[str, str]:
    kind, _, value = spec.partition(":")
    if kind not in KINDS:
        meant = "" if value.startswith("//") else did_you_mean(kind, KINDS)
        raise SettingsError(
            "--system: "
            + ("a URL is written url:http://…" if value.startswith("//") else f"{kind!r} is no kind of system{meant}"),
            hint="use bundle:NAME, policy:NAME, url:http://host:port or baseline:tfidf|minilm|jailguard",
        )
    if not value and kind != "bundle":
        raise SettingsError(f"--system {kind}: names nothing", hint=f"write {kind}: and what is meant behind it")
    return kind, value


def _keys(endpoints: Sequence[str], opening: Opening) -> dict[str, SecretStr]:
    """Host and port → key. A bare name is for the only host: with several, a key could reach the wrong one.

    Raises:
        SettingsError: A variable is not set, or it is not plain for whom it is.
    """
    hosts = list(dict.fromkeys(urlsplit(url).netloc for url in endpoints))
    keys = {}
    for given in opening.api_key_env:
        host, separator, name = given.rpartition("=")
        if not _VARIABLE.fullmatch(name):  # perhaps the key itself, so it is not shown
            raise SettingsError(
                "--api-key-env: takes the name of a variable, not a key", hint="export KEY=…, then --api-key-env KEY"
            )
        if separator and host not in hosts:
            raise SettingsError(
                f"--api-key-env {host}={name}: no --system asks {host}", hint=f"hosts are {', '.join(hosts) or 'none'}"
            )
        if not separator and len(hosts) != 1:
            raise SettingsError(
                f"--api-key-env {name}: {len(hosts)} hosts are asked, and a key is for one",
                hint=f"write HOST=NAME, such as {hosts[0]}={name}" if hosts else "add --system url:…, or leave it out",
            )
        value = opening.environ.get(name, "")
        if not value or not value.isascii() or not value.isprintable():
            found = "is not set" if not value else "holds what no header may (a line break, or no ASCII)"
            raise SettingsError(f"--api-key-env {name}: the variable {found}", hint=f"export {name}=…")
        keys[host or hosts[0]] = SecretStr(value)
    return keys


def _remote(endpoint: str, wire: Wire, keys: Mapping[str, SecretStr], opening: Opening) -> RemoteSystem:
    client = GuardClient(
        endpoint,
        wire,
        api_key=keys.get(urlsplit(endpoint).netloc),
        timeout_s=opening.timeout_s,
        concurrency=opening.concurrency,
    )
    return RemoteSystem(endpoint.removesuffix("/v1/guard"), client, wire, opening.on_progress)


def _baseline(name: str, opening: Opening, drawn: list[list[Example]]) -> DetectorSystem:
    if name not in BASELINES:
        raise SettingsError(
            f"--system baseline:{name}: no such baseline{did_you_mean(name, BASELINES)}",
            hint=f"use {either(BASELINES)}",
        )
    recipe, data = opening.recipe, opening.data
    if name in TRAINED:
        if recipe is None or data is None:
            raise SettingsError(
                f"--system baseline:{name} has to be trained first, on a recipe's rows of the public data sets",
                hint="add --baselines recipes/smollm2-135m.yaml, and set HHH_ROUTER_DATA to the folder of data sets",
            )
        if not data.is_dir():
            raise SettingsError(f"HHH_ROUTER_DATA is {data}: no such folder", hint="name the folder of data sets")
    try:
        from hhh_router.evaluation import baselines as b
        from hhh_router.training.recipe import load_recipe
    except ImportError as error:
        raise MissingExtra("train", needed_for="baselines") from error
    if name not in TRAINED:
        return DetectorSystem(b.JailguardDetector.name, b.JailguardDetector, "as the package comes")
    assert recipe is not None
    assert data is not None
    loaded, sha256 = load_recipe(recipe)

    def train() -> Detector:
        from hhh_router.training.mix import draw

        if not drawn:
            opening.on_progress("baselines", 0, 1, "drawing rows")
            drawn.append(draw(loaded.router.mix, data, seed=loaded.seed))
        opening.on_progress("baselines", 0, 1, f"training {kind.name}")
        made = kind.train(drawn[0], opening.heads)
        opening.on_progress("baselines", 1, 1, kind.name)
        return made

    kind: Any = {"tfidf": b.TfidfDetector, "minilm": b.MiniLMDetector}[name]
    return DetectorSystem(kind.name, train, f"trained on the router rows of {recipe.name} (sha256 {sha256[:16]})")
