"""The metadata block every reply carries under the one key ``hhh``, on every wire, and its JSON schema."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from hhh_router.types import Action

SCHEMA: Final = "hhh-router/metadata/1"


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicyRef(_Block):
    """The policy that was applied."""

    name: str
    version: int
    hash: str = Field(description="sha256 of the policy as loaded, first 16 hex digits")
    mode: Literal["enforce", "shadow"] = Field(description="shadow: the decisions are recorded and stopped nothing")


class BundleRef(_Block):
    """The bundle that was read with."""

    name: str
    hash: str = Field(description="sha256 of the bundle's manifest, first 16 hex digits")


class CalibrationRef(_Block):
    """What made probabilities of the scores."""

    id: str = Field(description="names the calibrators that made these probabilities")
    method: str = Field(description="calibrator of the harmless need in this mode: temperature, platt, beta or none")
    n: int = Field(ge=0, description="calibration rows behind this mode")
    ece: float | None = Field(description="expected calibration error of the harmless need in this mode, held out")
    calibrated: bool
    in_distribution: bool = Field(description="false where the request lies outside the calibration data's support")


class DecisionRecord(_Block):
    """What one checkpoint concluded."""

    checkpoint: str
    action: str
    rule: str
    reason: str
    message: str | None = None


class Receipt(_Block):
    """Hashes that tie the record to what was asked, answered and used; sha256, hex."""

    request_sha256: str
    reply_sha256: str | None = Field(default=None, description="of the text that reached the caller; null without one")
    policy_sha256: str
    bundle_sha256: str
    backbone_sha256: str | None
    calibration_id: str


class WeightsFrom(_Block):
    """Weights that held from one token of the reply on."""

    from_token: int = Field(ge=0, description="tokens of the reply before")
    weights: dict[str, float]
    mixture: str


class Metadata(_Block):
    """What was measured (needs, posterior, outcomes), what was decided, and what was applied (weights)."""

    schema_: Literal["hhh-router/metadata/1"] = Field(default=SCHEMA, alias="schema")
    request_id: str
    mode: Literal["prompt", "response", "both"] = Field(description="what the latest reading saw")
    policy: PolicyRef
    bundle: BundleRef
    calibration: CalibrationRef
    needs: dict[str, float] = Field(description="P(the request needs this behaviour), calibrated")
    posterior: dict[str, float] = Field(description="the router's share per expert, before the policy")
    weights: dict[str, float] = Field(description="what the policy made of it, lastly; sums to 1")
    mixture: str | None = Field(
        description="weights in sixteenths, hhh@base-helpful-harmless-honest; null where no mixture answered"
    )
    trajectory: list[WeightsFrom] = Field(
        default_factory=list, description="weights from token to token, where a steer changed them; else empty"
    )
    policy_shift_nats: float = Field(ge=0, description="KL(weights || posterior)")
    outcomes: dict[str, float] = Field(
        description="P(the reply is unsafe, untruthful, unhelpful), calibrated; prompt-only until a reply was read"
    )
    confidence: float = Field(ge=0, le=1, description="calibrated P(every verdict enforced on this request is right)")
    decisions: list[DecisionRecord]
    shadow: list[DecisionRecord] = Field(
        default_factory=list, description="what rules in shadow mode would have decided; none of it acted"
    )
    not_inspected: list[str] = Field(default_factory=list)
    redacted: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="what was taken out at input and output, and how often; never the text"
    )
    layers_run: int = Field(default=0, description="decoder layers the prompt's pass ran")
    timing_ms: dict[str, float] = Field(default_factory=dict)
    receipt: Receipt

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @property
    def action(self) -> str:
        """The action that holds: the first that stops, a last ``regenerate``, a ``steer``, a flag, or else the last."""
        actions = [Action(d.action) for d in self.decisions]
        last = actions[-1:]
        telling = [a for a in actions if a.stops] + [a for a in last if a is Action.REGENERATE]
        telling += [a for a in actions if a is Action.STEER] + [a for a in actions if a is Action.FLAG] + last
        return str(telling[0]) if telling else "allow"

    def as_json(self) -> dict[str, Any]:
        """JSON-ready dict, keys in the order of the schema."""
        return self.model_dump(mode="json", by_alias=True)

    def headers(self) -> dict[str, str]:
        """The ``x-hhh-*`` headers that repeat the block's essentials on every reply."""
        return {
            "x-hhh-action": self.action,
            "x-hhh-policy": f"{self.policy.name}@{self.policy.version}",
            "x-hhh-weights": ",".join(f"{e}={w:.4f}" for e, w in self.weights.items()),
            "x-hhh-confidence": f"{self.confidence:.4f}",
            "x-hhh-mixture": self.mixture or "none",
            "x-hhh-request-id": self.request_id,
        }


def metadata_schema() -> dict[str, Any]:
    """The published JSON schema of the metadata block."""
    schema = Metadata.model_json_schema(by_alias=True)
    schema["$id"] = SCHEMA
    return schema
