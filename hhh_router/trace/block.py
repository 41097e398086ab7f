"""The metadata block every reply carries under the one key ``hhh``, on every wire, and its JSON schema."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from hhh_router.types import Action, Mode

SCHEMA: Final = "hhh-router/metadata/1"

Relation = Literal["same", "stricter", "looser", "unknown"]
"""How a candidate decides beside the policy in force. ``unknown``: alike as far as was measured, which is not all."""


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


class Compared(_Block):
    """What both policies said at one checkpoint: where they first differed, or else lastly."""

    checkpoint: str
    enforced: str
    candidate: str


class CandidateRecord(_Block):
    """What a candidate policy would have decided on the same readings; none of it acted."""

    policy: PolicyRef
    decisions: list[DecisionRecord] = Field(description="about the reply that was given, where it was read")
    weights: dict[str, float] = Field(description="what it would have applied; sums to 1")
    confidence: float = Field(ge=0, le=1)
    compared: list[Compared] = Field(
        description="the actions of both at each checkpoint; who asks nothing there allows"
    )
    relation: Relation = Field(description="stricter or looser where they first differ; unknown: see `unknown`")
    unknown: list[str] = Field(
        default_factory=list, description="what it would have needed and was not measured, such as the rest of a reply"
    )


class ReadingRecord(_Block):
    """One reading as the heads gave it, before calibration: decisions are made again from it, to the last digit."""

    mode: Mode
    needs: dict[str, float] = Field(description="logits")
    outcomes: dict[str, float] = Field(description="logits")
    distance: float | None = Field(description="from the router's training data; null where the reading failed")
    tokens: int = Field(description="tokens read")
    reply_tokens: int | None = Field(default=None, description="of the reply that it covers; null for a prompt")
    is_final: bool = Field(default=False, description="it covers the whole reply")
    logprobs: tuple[float, float] | None = Field(
        default=None, description="mean and least log-probability of the reply's tokens, each at least -20 nats"
    )


class ResultRecord(_Block):
    """What a tool brought back, but for its text."""

    name: str | None = Field(description="of the tool; null where it is not known")
    reading: ReadingRecord | None = Field(
        default=None, description="of the result by itself, where a rule asks for one"
    )
    unread: str | None = Field(default=None, description="why there is none although a rule asks for one")


class ConversationRecord(_Block):
    """What the conversation had used up before, the turn's own messages included; null where nobody counts it."""

    turns: int | None = None
    tool_calls: int | None = None
    tokens: int | None = None
    refusals: int | None = None
    minutes: float | None = None
    tainted: bool | None = None


class Basis(_Block):
    """What the decisions came from, as far as it is no text: enough to put another policy to it later."""

    attempts: list[list[ReadingRecord]] = Field(description="per attempt at the reply its readings, the prompt's first")
    left_out: int = Field(default=0, description="windows beyond those that are kept")
    chat: bool = Field(description="false where a finished text was judged")
    stream: bool = Field(default=False, description="whether text left before the reply had ended")
    mixes: bool = Field(default=True, description="false where another model answered, whose reply no weights change")
    at: str | None = Field(default=None, description="when the request came, ISO 8601")
    role: str | None = None
    tenant: str | None = None
    route: str | None = None
    model: str | None = None
    key_scopes: list[str] | None = None
    sticky: str | None = Field(default=None, description="what rollouts go by")
    conversation: ConversationRecord = ConversationRecord()
    calls: list[str] = Field(
        default_factory=list, description="tools that the reply calls, as far as that was looked at"
    )
    unseen_calls: bool = Field(default=False, description="the reply calls tools, and nobody looked at the calls")
    results: list[ResultRecord] = Field(default_factory=list, description="what tools brought since the last reply")
    earlier: list[ResultRecord] = Field(default_factory=list, description="what they brought before, where it counts")
    pinned: dict[str, float] | None = Field(default=None, description="weights that the caller pinned")


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
    mode: Mode = Field(description="what the latest reading saw")
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
    candidate: CandidateRecord | None = Field(
        default=None, description="what a candidate policy would have decided; only there where one is asked and told"
    )
    basis: Basis | None = Field(default=None, description="what the decisions came from; in records only")
    not_inspected: list[str] = Field(default_factory=list)
    redacted: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="what was taken out at input and output, and how often; never the text"
    )
    layers_run: int = Field(default=0, description="decoder layers the prompt's pass ran")
    timing_ms: dict[str, float] = Field(default_factory=dict)
    receipt: Receipt

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    _recorded: Metadata | None = PrivateAttr(default=None)

    @property
    def recorded(self) -> Metadata:
        """The block as it is recorded: with what the caller is not told."""
        return self._recorded or self

    def told(self, *, candidate: bool) -> Metadata:
        """The block as the caller gets it.

        Args:
            candidate: Tell what the candidate policy would have decided.
        """
        told = self.model_copy(update={"basis": None} if candidate else {"basis": None, "candidate": None})
        told._recorded = self
        return told

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
        block = self.model_dump(mode="json", by_alias=True)
        for name in ("candidate", "basis"):
            if block[name] is None:  # replies look as they always did
                del block[name]
        return block

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
