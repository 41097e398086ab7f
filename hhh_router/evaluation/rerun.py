"""A receipt's decision, made again from the text it was about: it must come out the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hhh_router.errors import DataError
from hhh_router.evaluation.systems import Readings
from hhh_router.pipeline.plan import make_plan
from hhh_router.pipeline.situation import asked_situation
from hhh_router.policy import Door, Policy, lacking
from hhh_router.types import Caller, Message, ReadRequest, Weights

TOLERANCE = 0.02
"""Most that a calibrated probability may differ: another precision or processor moves it a little."""

_KNOWN_AGAIN = Door(
    name="a receipt",
    checkpoints=frozenset({"input", "output", "tool_call", "tool_result", "session"}),
    reads_at=frozenset({"input", "output", "tool_call", "tool_result", "session"}),
    supplies=frozenset(
        {
            "role",
            "text",
            "length.characters",
            "length.tokens",
            "conversation.turns",
            "conversation.tool_calls",
            "rollout",
        }
    ),
    carries=frozenset({"upstream", "webhook", "redact", "steering", "hold"}),
    text_while_steering=True,
)
"""What of a request's surroundings can be told from its text alone."""


def request_hash(canonical: Mapping[str, Any]) -> str:
    """The ``request_sha256`` of a request, as `trace.build.canonical_request` gives it."""
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def canonical_prompt(prompt: str) -> dict[str, Any]:
    """The canonical request of a prompt that was guarded or routed alone."""
    return {"messages": [{"role": "user", "content": prompt}], "response": None}


def differences(
    block: Mapping[str, Any], canonical: Mapping[str, Any], policy: Policy, readings: Readings, *, bundle_sha256: str
) -> list[str]:
    """What comes out otherwise when a receipt's input decision is made again; empty where nothing does.

    Args:
        block: The receipt's metadata block.
        canonical: The request it is about.
        policy: The policy as it is today.
        readings: The bundle as it is today.
        bundle_sha256: Its hash.

    Raises:
        DataError: The request is another one, the policy or the bundle is no longer the same, or the policy asks for
            what only the moment knew.
    """
    receipt = block["receipt"]
    for what, mine, theirs in (
        ("request", request_hash(canonical), receipt["request_sha256"]),
        ("policy", policy.hash, receipt["policy_sha256"]),
        ("bundle", bundle_sha256, receipt["bundle_sha256"]),
        ("calibration", readings.calibrators.id, receipt["calibration_id"]),
    ):
        if mine != theirs:
            raise DataError(
                f"the receipt is about another {what} ({theirs[:16]}, here {mine[:16]})",
                hint=f"give the {what} it was made with",
            )
    if asked := lacking(policy, _KNOWN_AGAIN):
        raise DataError(f"cannot be made again: {asked[0]}", hint="the text alone does not tell it")
    messages = _messages(canonical)
    if not messages:
        raise DataError("cannot be made again: a response alone was judged", hint="only decisions at input are")
    [scores] = readings.scores([ReadRequest(messages=messages)])
    if scores is None:
        raise DataError("cannot be made again: the model's template does not take this conversation")
    pinned = canonical.get("weights")
    plan = make_plan(
        scores, policy=policy, calibrators=readings.calibrators, situation=asked_situation(messages, Caller(), None),
        pinned=None if pinned is None else Weights.from_mapping(pinned),
    )  # fmt: skip
    recorded = next((d for d in block["decisions"] if d["checkpoint"] == "input"), None)
    now = next(d for d in (plan.decision, *plan.others) if d.checkpoint == "input")
    found = []
    if recorded is None:
        found.append("no decision at input is recorded")
    elif (recorded["action"], recorded["rule"]) != (str(now.action), now.rule):
        was = f"{recorded['action']} by {recorded['rule']}"
        found.append(f"decision: recorded {was}, now {now.action} by {now.rule}")
    for need, value in block["needs"].items():
        again = plan.evidence.needs.get(need)
        if again is None or abs(again - value) > TOLERANCE:
            found.append(f"needs.{need}: recorded {value:.4f}, now {'none' if again is None else f'{again:.4f}'}")
    return found


def _messages(canonical: Mapping[str, Any]) -> tuple[Message, ...]:
    turns: Sequence[Mapping[str, Any]] = canonical.get("messages") or ()
    if any(set(turn) - {"role", "content"} for turn in turns):
        raise DataError("cannot be made again: the conversation has tool calls", hint="only plain turns are")
    return tuple(Message(role=str(turn["role"]), content=str(turn["content"])) for turn in turns)
