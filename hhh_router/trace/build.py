"""Put the metadata block together, and the hashes that tie it to what was asked, answered and used."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol

from hhh_router.trace.block import (
    Basis,
    BundleRef,
    CalibrationRef,
    CandidateRecord,
    Compared,
    DecisionRecord,
    Metadata,
    PolicyRef,
    Receipt,
    Relation,
    WeightsFrom,
)
from hhh_router.types import (
    ChatRequest,
    Decision,
    Evidence,
    GuardRequest,
    Message,
    Posterior,
    ReadRequest,
    Sampling,
    Weights,
)

SHORT_HASH_DIGITS = 16  # 64 bits tell any two policies or bundles apart; the receipt has all 256
_DECIMALS = 6  # finer than any estimate here, and what keeps shares summing to 1 within 1e-6
_UNITS = 10**_DECIMALS


class PolicyIdentity(Protocol):
    """What the block needs to know of a policy."""

    @property
    def name(self) -> str:
        """As in its file."""
        ...

    @property
    def version(self) -> int:
        """As in its file."""
        ...

    @property
    def mode(self) -> Literal["enforce", "shadow"]:
        """``shadow`` records decisions and enforces none."""
        ...

    @property
    def hash(self) -> str:
        """The whole sha256, hex."""
        ...


class CalibrationSource(Protocol):
    """What the block needs to know of the calibrators."""

    def reference(self, evidence: Evidence) -> CalibrationRef:
        """Which calibrators made this evidence."""
        ...


def build_metadata(
    *,
    request_id: str,
    policy: PolicyIdentity,
    bundle: BundleRef,
    backbone_sha256: str | None,
    calibrators: CalibrationSource,
    evidence: Evidence,
    weights: Weights,
    mixture: str | None,
    trajectory: Sequence[tuple[int, Weights]] = (),
    policy_shift_nats: float,
    confidence: float,
    decisions: Sequence[Decision],
    request: ChatRequest | GuardRequest | ReadRequest,
    reply_text: str | None = None,
    not_inspected: Sequence[str] = (),
    layers_run: int = 0,
    timing_ms: Mapping[str, float] | None = None,
    candidate: CandidateRecord | None = None,
    basis: Basis | None = None,
    redacted: Mapping[str, Mapping[str, int]] | None = None,
) -> Metadata:
    """The block of one request as it stands now.

    Args:
        request_id: Names the request in every trace.
        policy: The policy that was applied.
        bundle: Name and *whole* sha256; the block shows its first 16 digits, the receipt all.
        backbone_sha256: Of the backbone's weights file; None where only a revision is pinned.
        calibrators: Those that made ``evidence``.
        evidence: Of the latest reading.
        weights: What is applied.
        mixture: ``weights.mixture``, or None where no mixture answered.
        trajectory: Tokens of the reply before, and the weights from there on, where they changed.
        policy_shift_nats: KL(weights ‖ posterior).
        confidence: P(every verdict enforced so far is right).
        decisions: In the order they were made; the last one holds.
        request: What was asked, for its hash.
        reply_text: What reached the caller; None where there is no reply (yet).
        not_inspected: What the client sent that nobody read.
        layers_run: Decoder layers the prompt's pass ran.
        timing_ms: Stage → milliseconds.
        candidate: What a candidate policy would have decided.
        basis: What the decisions came from.
        redacted: Checkpoint → what was taken out there → how often.

    Raises:
        ValueError: A number is not finite; the block must be JSON.
    """
    calibration = calibrators.reference(evidence)
    return Metadata(
        request_id=request_id,
        mode=evidence.mode,
        policy=_policy_ref(policy),
        bundle=BundleRef(name=bundle.name, hash=bundle.hash[:SHORT_HASH_DIGITS]),
        calibration=calibration,
        needs=_rounded("needs", evidence.needs),
        posterior=round_shares(evidence.posterior),
        weights=round_shares(weights),
        mixture=mixture,
        trajectory=[
            WeightsFrom(from_token=tokens, weights=round_shares(w), mixture=w.mixture) for tokens, w in trajectory
        ],
        policy_shift_nats=max(0.0, _finite("policy_shift_nats", policy_shift_nats)),
        outcomes=_rounded("outcomes", evidence.outcomes),
        confidence=_finite("confidence", confidence),
        decisions=[_recorded(d) for d in decisions],
        shadow=[_recorded(s) for d in decisions for s in d.shadow],
        candidate=candidate,
        basis=basis,
        not_inspected=list(not_inspected),
        redacted={checkpoint: dict(counts) for checkpoint, counts in (redacted or {}).items()},
        layers_run=layers_run,
        timing_ms=_rounded("timing_ms", timing_ms or {}, decimals=3),
        receipt=Receipt(
            request_sha256=request_sha256(request),
            reply_sha256=None if reply_text is None else text_sha256(reply_text),
            policy_sha256=policy.hash,
            bundle_sha256=bundle.hash,
            backbone_sha256=backbone_sha256,
            calibration_id=calibration.id,
        ),
    )


def candidate_record(
    policy: PolicyIdentity,
    *,
    decisions: Sequence[Decision],
    weights: Weights,
    confidence: float,
    compared: Sequence[Compared],
    relation: Relation,
    unknown: Sequence[str],
) -> CandidateRecord:
    """What a candidate would have decided, as the block has it.

    Args:
        policy: The candidate.
        decisions: Its own, in the order they were made.
        weights: What it would have applied.
        confidence: P(every verdict of its own is right).
        compared: Its actions beside those in force.
        relation: What comes of that.
        unknown: What it would have needed and was not measured.
    """
    return CandidateRecord(
        policy=_policy_ref(policy),
        decisions=[_recorded(d) for d in decisions],
        weights=round_shares(weights),
        confidence=_finite("candidate.confidence", confidence),
        compared=list(compared),
        relation=relation,
        unknown=list(unknown),
    )


def _policy_ref(policy: PolicyIdentity) -> PolicyRef:
    return PolicyRef(name=policy.name, version=policy.version, hash=policy.hash[:SHORT_HASH_DIGITS], mode=policy.mode)


def _recorded(d: Decision) -> DecisionRecord:
    return DecisionRecord(checkpoint=d.checkpoint, action=d.action, rule=d.rule, reason=d.reason, message=d.message)


def request_sha256(request: ChatRequest | GuardRequest | ReadRequest) -> str:
    """Hash of what was asked: the sha256 of its canonical JSON, see `canonical_request`."""
    canonical = json.dumps(canonical_request(request), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def canonical_request(request: ChatRequest | GuardRequest | ReadRequest) -> dict[str, Any]:
    """The parts of a request that decide its answer, as plain JSON values.

    Policy, bundle and request id are left out: the first two have hashes of their own, the last decides nothing.
    """
    if isinstance(request, GuardRequest):
        return canonical_request(request.read)
    if isinstance(request, ReadRequest):
        return {"messages": [canonical_turn(m) for m in request.messages], "response": request.response}
    sampling = request.sampling
    return {
        "messages": [canonical_turn(m) for m in request.messages],
        "response": None,
        "sampling": {
            "max_tokens": sampling.max_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            **_set_only(sampling),
        },
        "weights": request.weights.as_dict() if request.weights else None,
        "passthrough": dict(request.passthrough),
        **({} if request.tools is None else {"tools": asdict(request.tools)}),
        **({"continues": True, "prompt_ids": list(request.prompt_ids)} if request.continues else {}),
    }


def text_sha256(text: str) -> str:
    """Hash of a text's UTF-8 bytes.

    >>> text_sha256("Paris")[:12]
    '5dd272b4f316'
    """
    # a tokenizer may emit half a surrogate pair; hashing must not be what fails then
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def round_shares(shares: Posterior | Weights) -> dict[str, float]:
    """Shares in millionths that sum to exactly one million: the largest remainders are rounded up.

    >>> round_shares(Weights(0.0, 1 / 3, 1 / 3, 1 / 3))
    {'base': 0.0, 'helpful': 0.333334, 'harmless': 0.333333, 'honest': 0.333333}
    """
    exact = {e: s * _UNITS for e, s in shares.as_dict().items()}
    units = {e: math.floor(x) for e, x in exact.items()}
    by_remainder = sorted(exact, key=lambda e: units[e] - exact[e])  # a stable sort: ties go to the first expert
    for e in by_remainder[: max(0, _UNITS - sum(units.values()))]:
        units[e] += 1
    return {e: n / _UNITS for e, n in units.items()}


def _set_only(sampling: Sampling) -> dict[str, Any]:
    """Fields that are there only when set, so that hashes of requests without them are what they always were."""
    fields: dict[str, Any] = {}
    if sampling.top_k:
        fields["top_k"] = sampling.top_k
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): float(bias) for token, bias in sampling.logit_bias.items()}
    if sampling.json_schema is not None:
        fields["json_schema"] = sampling.json_schema
    return fields


def canonical_turn(message: Message) -> dict[str, Any]:
    """A turn as plain JSON values.

    >>> canonical_turn(Message(role="user", content="Hi"))
    {'role': 'user', 'content': 'Hi'}
    """
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [asdict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _rounded(field: str, values: Mapping[str, float], *, decimals: int = _DECIMALS) -> dict[str, float]:
    return {name: _finite(f"{field}.{name}", value, decimals=decimals) for name, value in values.items()}


def _finite(field: str, value: float, *, decimals: int = _DECIMALS) -> float:
    if not math.isfinite(value):
        raise ValueError(f"metadata {field} is {value}")
    return round(float(value), decimals)
