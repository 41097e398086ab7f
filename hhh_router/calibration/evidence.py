"""``calibrators.json`` of a bundle, and what it makes of a reading: scores → evidence → confidence.

A calibrator holds for the heads, the backbone precision and the input mode it was fitted for. Heads and precision
are checked when the file is loaded, the mode on every reading; what does not fit is labelled ``calibrated: False``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from hhh_router.calibration.calibrators import HeadCalibration, probability
from hhh_router.calibration.confidence import Confidence, ConfidenceModel, confidence_features, unfitted_confidence
from hhh_router.errors import BundleError, ReaderError
from hhh_router.routing import posterior
from hhh_router.trace.block import CalibrationRef
from hhh_router.types import DIMENSIONS, EXPERTS, OUTCOMES, Evidence, Mode, Posterior, Scores, Weights

_log = logging.getLogger(__name__)

UNCALIBRATED = "none"
"""The id and the method that are reported where nothing was calibrated."""
UNFITTED_DISTANCE_LIMIT = 2.0  # distances are per root dimension, about 1 for a typical row whatever the heads
_ID_DIGITS = 12


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModeCalibration(_Part):
    """The calibrators of one input mode."""

    n: int = Field(ge=1)
    """Calibration rows of this mode."""
    distance_limit: float = Field(gt=0)
    """A reading is in distribution where ``scores.distance`` does not exceed this, see `fit.fit_distance_limit`."""
    needs: dict[str, HeadCalibration] = Field(default_factory=dict)
    outcomes: dict[str, HeadCalibration]
    confidence: ConfidenceModel | None = None


class PrecisionCheck(_Part):
    """How far the calibrated probabilities move when the backbone runs in another precision than that fitted for."""

    n: int = Field(ge=1)
    """Calibration rows read in both."""
    mean_shift: float = Field(ge=0)
    """Mean of |p − p'| over rows and heads."""
    worst_shift: float = Field(ge=0)
    """99th percentile of |p − p'| over rows and heads."""


class GateCandidate(_Part):
    """One of the gates that were compared, on rows it was not fitted to."""

    cross_entropy: float = Field(ge=0)
    """Mean −Σ target · ln share in nats."""
    standard_error: float = Field(ge=0)
    """Of that mean."""
    gap: float
    """Mean cross-entropy minus that of the gate that was chosen, in nats."""
    gap_error: float = Field(ge=0)
    """Standard error of the gap, over paired rows."""


class GateCalibration(_Part):
    """A gate fitted to soft targets, see `gates.compare_gates`, and what it was compared with."""

    name: str
    """A key of `hhh_router.routing.GATES`."""
    params: dict[str, float] = Field(default_factory=dict)
    """By the names in `hhh_router.routing.gate.GATE_PARAMETERS`."""
    n: int = Field(ge=1)
    """Rows it was fitted to."""
    cross_entropy: float = Field(ge=0)
    """Mean −Σ target · ln share in nats, cross-validated; its least value is the targets' own entropy."""
    candidates: dict[str, GateCandidate] = Field(default_factory=dict)
    """Every gate of the comparison, this one among them."""
    data_sha256: str
    """Names the rows and their targets."""
    seed: int
    """Of the splits into folds."""

    @model_validator(mode="after")
    def _check_params(self) -> Self:
        # certain needs make the largest logits there are: what is finite there is finite for every request
        for corner in itertools.product((0.0, 1.0), repeat=len(DIMENSIONS)):
            posterior(dict(zip(DIMENSIONS, corner, strict=True)), self.name, self.params)
        return self


def _gate_form(value: Any) -> str:
    return "name" if isinstance(value, str) else "fitted"


Gate = Annotated[
    Annotated[Literal["odds"], Tag("name")] | Annotated[GateCalibration, Tag("fitted")], Discriminator(_gate_form)
]
"""How needs become a posterior: ``odds``, which has nothing to fit, or a gate with its parameters."""


class CalibrationFile(_Part):
    """``calibrators.json``: written by ``hhh-router calibrate``, read at start."""

    format: Literal[1] = 1
    id: str
    """``cal-`` and the first 12 hex digits of the sha256 of everything else, see `content_id`."""
    heads_sha256: str
    """Of the ``heads.safetensors`` whose logits were calibrated."""
    dtype: str
    """Precision of the backbone under those logits, such as ``bfloat16``."""
    also_dtypes: dict[str, PrecisionCheck] = Field(default_factory=dict)
    """Other precisions for which the calibrators were found to hold, and how closely."""
    data_sha256: str
    """Names the calibration rows."""
    seed: int
    gate: Gate = "odds"
    """How needs become a posterior, see `hhh_router.routing.posterior`."""
    train_prior: dict[str, float]
    """Mean posterior over the calibration rows: the mix of requests the router was calibrated on."""
    modes: dict[Mode, ModeCalibration]

    @field_validator("train_prior")
    @classmethod
    def _check_prior(cls, prior: dict[str, float]) -> dict[str, float]:
        if missing := [e for e in EXPERTS if e not in prior]:
            raise ValueError(f"no share for {', '.join(missing)}")
        if empty := [e for e in EXPERTS if prior[e] <= 0]:
            raise ValueError(f"the share of {empty[0]} must be > 0, found {prior[empty[0]]}")
        Posterior.from_mapping(prior)
        return prior

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if not self.modes:
            raise ValueError("modes: none; at least one of prompt, response, both is needed")
        for name, mode in self.modes.items():
            no_needs = [d for d in DIMENSIONS if d not in mode.needs]
            if no_needs and (name != "response" or mode.needs):
                raise ValueError(f"modes.{name}.needs: no calibrator for {', '.join(no_needs)}")
            # from a prompt alone the reply's faults are a mere outlook, which a bundle may do without
            if name != "prompt" and (no_outcome := [o for o in OUTCOMES if o not in mode.outcomes]):
                raise ValueError(f"modes.{name}.outcomes: no calibrator for {', '.join(no_outcome)}")
        return self

    @classmethod
    def create(
        cls,
        *,
        heads_sha256: str,
        dtype: str,
        data_sha256: str,
        seed: int,
        train_prior: Posterior,
        modes: Mapping[Mode, ModeCalibration],
        gate: Gate = "odds",
    ) -> CalibrationFile:
        """A file with its id worked out.

        Raises:
            pydantic.ValidationError: A mode lacks a required head, or a share of the prior is not above 0.
        """
        draft = cls(
            id="",
            heads_sha256=heads_sha256,
            dtype=dtype,
            data_sha256=data_sha256,
            seed=seed,
            gate=gate,
            train_prior=train_prior.as_dict(),
            modes=dict(modes),
        )
        return draft.model_copy(update={"id": draft.content_id()})

    def posterior_prior(self) -> Posterior:
        """``train_prior`` as shares of the experts."""
        return Posterior.from_mapping(self.train_prior)

    def with_precisions(self, checks: Mapping[str, PrecisionCheck]) -> CalibrationFile:
        """The same calibrators, found to hold in other precisions too."""
        draft = self.model_copy(update={"also_dtypes": dict(checks)})
        return draft.model_copy(update={"id": draft.content_id()})

    def content_id(self) -> str:
        """``cal-`` and 12 hex digits of the sha256 of the canonical JSON (sorted keys, no blanks) without ``id``."""
        content = self.model_dump(mode="json", exclude={"id"})
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return "cal-" + hashlib.sha256(canonical.encode()).hexdigest()[:_ID_DIGITS]

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> CalibrationFile:
        """Read and check a file.

        Raises:
            BundleError: Missing, unreadable, not JSON, or with mistakes; each field is named.
        """
        try:
            file = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BundleError(
                f"{path}: cannot be read ({error.strerror})",
                hint="restore the file, or fit calibrators with hhh-router calibrate",
            ) from error
        except ValidationError as error:
            lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
            raise BundleError(
                "\n".join(lines), hint="the file is written by hhh-router calibrate; restore it or fit again"
            ) from error
        if (expected := file.content_id()) != file.id:
            raise BundleError(
                f"{path}: id: found {file.id!r}, but the content makes it {expected!r}; it was changed after fitting",
                hint="restore the file or fit again with hhh-router calibrate",
            )
        return file


class Calibrators:
    """Turns raw scores into evidence and confidence. Immutable and free of I/O once loaded."""

    def __init__(
        self,
        file: CalibrationFile | None,
        *,
        matches: bool = True,
        heads_sha256: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self._file = file
        self.heads_sha256 = heads_sha256 or (file.heads_sha256 if file else None)
        """Of the heads whose scores come in; None where nobody said."""
        self.dtype = dtype or (file.dtype if file else None)
        """Precision of the backbone under them."""
        self._matches = matches and file is not None
        self._spread: Mapping[tuple[Mode, str], tuple[int, ...]] = {}
        self.id = file.id if file else UNCALIBRATED
        fitted = file.gate if file and isinstance(file.gate, GateCalibration) else None
        self.gate = fitted.name if fitted else "odds"
        self._gate_params = fitted.params if fitted else {}
        self.train_prior = file.posterior_prior() if file else Posterior(*(1 / len(EXPERTS) for _ in EXPERTS))

    @classmethod
    def load(cls, path: str | Path, *, heads_sha256: str, dtype: str, allow_uncalibrated: bool = False) -> Calibrators:
        """Load the calibrators of a bundle and check that they fit what is about to run.

        Args:
            path: ``calibrators.json``.
            heads_sha256: Of the heads that will make the scores.
            dtype: Precision the backbone runs in.
            allow_uncalibrated: Start in spite of a mismatch. Other heads: no calibrator is applied, numbers are plain
                σ(logit). Another precision: these are applied. Either way all evidence says ``calibrated=False``.

        Raises:
            BundleError: Missing or corrupt, or (unless allowed) fitted for other heads or another precision.
        """
        path = Path(path)
        file = CalibrationFile.read(path)
        wrong = []
        if file.heads_sha256 != heads_sha256:
            wrong.append(
                f"heads_sha256: fitted for {file.heads_sha256[:12]}…, the bundle's heads are {heads_sha256[:12]}…"
            )
        if dtype not in (file.dtype, *file.also_dtypes):
            held = " and ".join((file.dtype, *file.also_dtypes))
            wrong.append(f"dtype: fitted for {held}, the backbone runs in {dtype}")
        if not wrong:
            return cls(file, heads_sha256=heads_sha256, dtype=dtype)
        if not allow_uncalibrated:
            raise BundleError(
                "\n".join(f"{path}: {line}" for line in wrong),
                hint="fit again with hhh-router calibrate, run what they were fitted for, or set "
                "HHH_ROUTER_ALLOW_UNCALIBRATED=true to start with every number labelled uncalibrated",
            )
        _log.warning("%s does not fit (%s): every number is labelled uncalibrated", path, "; ".join(wrong))
        own = file.heads_sha256 == heads_sha256
        return cls(file if own else None, matches=False, heads_sha256=heads_sha256, dtype=dtype)

    @classmethod
    def none(cls) -> Calibrators:
        """No calibrators at all: plain σ(logit), every number labelled ``calibrated=False``."""
        return cls(None)

    def evidence(self, scores: Scores) -> Evidence:
        """Calibrated probabilities of one reading.

        Where the mode has calibrators, heads without one there are left out, so that ``calibrated`` speaks for every
        number reported. A mode without any reports plain σ(logit) of every head with ``calibrated=False``, and a
        nominal limit stands for the support of the data. Where no needs are reported (mode ``response``), the
        posterior is ``train_prior``: nothing was learned about the request.

        Raises:
            ReaderError: A logit or the distance is not finite, or a calibrated head is not among the scores.
        """
        _check_finite(scores)
        mode = self._mode(scores.mode)
        if mode is None:
            needs = {name: probability(x) for name, x in scores.needs.items()}
            outcomes = {name: probability(x) for name, x in scores.outcomes.items()}
        else:
            needs = _apply(mode.needs, scores.needs, kind="need")
            outcomes = _apply(mode.outcomes, scores.outcomes, kind="outcome")
        known: dict[str, float] = {d: needs[d] for d in DIMENSIONS if d in needs}
        return Evidence(
            mode=scores.mode,
            needs=needs,
            posterior=self._posterior(known) if len(known) == len(DIMENSIONS) else self.train_prior,
            outcomes=outcomes,
            in_distribution=scores.distance <= (mode.distance_limit if mode else UNFITTED_DISTANCE_LIMIT),
            calibrated=mode is not None and self._matches,
            scores=scores,
        )

    def confidence(
        self,
        evidence: Evidence,
        *,
        weights: Weights,
        policy_shift_nats: float,
        limits: Sequence[tuple[float, float]],
        logprobs: Sequence[float] = (),
    ) -> Confidence:
        """P(every verdict enforced so far is right); see `confidence_features` for the arguments.

        A mode without a fitted model gets `unfitted_confidence`, labelled ``calibrated=False``.
        """
        mode = self._mode(evidence.mode)
        if mode is None or mode.confidence is None:
            return unfitted_confidence(evidence, limits)
        features = confidence_features(
            evidence, weights=weights, policy_shift_nats=policy_shift_nats, limits=limits, logprobs=logprobs
        )
        found = mode.confidence.apply(features)
        return Confidence(value=found.value, contributions=found.contributions, calibrated=self._matches)

    def reference(self, evidence: Evidence) -> CalibrationRef:
        """What the metadata block says about these calibrators.

        Method and ECE are those of the harmless need; of the ``unsafe`` outcome where the mode reports no needs.
        Evidence without any number (a reading that failed) has method ``none`` and n 0.
        """
        mode = self._mode(evidence.mode) if evidence.outcomes else None
        head = (mode.needs.get("harmless") or mode.outcomes["unsafe"]) if mode else None
        return CalibrationRef(
            id=self.id,
            method=head.method if head else UNCALIBRATED,
            n=mode.n if mode else 0,
            ece=head.ece if head and evidence.calibrated else None,
            calibrated=evidence.calibrated,
            in_distribution=evidence.in_distribution,
        )

    def references(self) -> dict[tuple[Mode, str], HeadCalibration]:
        """What every head was fitted to, by mode and by name, such as ``needs.harmless``; empty where nothing fits."""
        modes = self._file.modes if self._file and self._matches else {}
        found = {
            (name, f"{kind}.{head}"): calibration
            for name, mode in modes.items()
            for kind, heads in (("needs", mode.needs), ("outcomes", mode.outcomes))
            for head, calibration in heads.items()
        }
        return {
            place: fitted.model_copy(update={"bins": self._spread[place]}) if place in self._spread else fitted
            for place, fitted in found.items()
        }

    def with_spread(self, spread: Mapping[tuple[Mode, str], tuple[int, ...]]) -> Self:
        """The same calibrators, with the histograms of rows that their file came without; see `drift.histograms`."""
        known = copy(self)
        known._spread = dict(spread)
        return known

    def _posterior(self, needs: Mapping[str, float]) -> Posterior:
        return posterior(needs, self.gate, self._gate_params)

    def _mode(self, name: Mode) -> ModeCalibration | None:
        return self._file.modes.get(name) if self._file else None


def _apply(calibrations: Mapping[str, HeadCalibration], logits: Mapping[str, float], *, kind: str) -> dict[str, float]:
    if missing := [name for name in calibrations if name not in logits]:
        raise ReaderError(
            f"the reading has no {kind} head {missing[0]!r} (found: {', '.join(logits) or 'none'})",
            hint="heads and calibrators belong to one bundle; check it with hhh-router bundle verify",
        )
    return {name: calibration.apply(logits[name]) for name, calibration in calibrations.items()}


def _check_finite(scores: Scores) -> None:
    found = {f"needs.{name}": x for name, x in scores.needs.items()}
    found |= {f"outcomes.{name}": x for name, x in scores.outcomes.items()} | {"distance": scores.distance}
    if wrong := [f"{name} = {x}" for name, x in found.items() if not math.isfinite(x)]:
        raise ReaderError(
            f"the reading is not finite: {', '.join(wrong)}",
            hint="an adapter or head with NaN or inf makes such states; check the bundle with hhh-router bundle verify",
        )
