"""A receipt's decisions, made again from the texts they were about: they must come out the same.

Prompt and reply are read anew. What lies between, windows of a reply that was still being made, is decided again from
the readings in the receipt: which text a window saw is not known. What cannot be made again at all is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from hhh_router.errors import DataError
from hhh_router.evaluation.recorded import calls_in, canonical_message, is_part
from hhh_router.evaluation.systems import Readings
from hhh_router.pipeline.again import Again, decide_again
from hhh_router.pipeline.basis import Notes, Texts
from hhh_router.pipeline.situation import asked_situation
from hhh_router.policy import Door, Policy, lacking
from hhh_router.trace import text_sha256
from hhh_router.trace.block import Basis, Metadata, ReadingRecord
from hhh_router.types import Action, Caller, ChatRequest, GuardRequest, ReadRequest, Scores, Tool, Weights

TOLERANCES: Mapping[str, float] = {"needs": 0.02, "outcomes": 0.05, "weights": 0.05}
"""Most that a number may differ: another precision or processor moves it a little. A reply's states were made token
by token, beside other replies, and are read at once now, which moved an outcome by .03; weights hang on odds, and move
more than the needs that they come from."""

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
"""What of a request's surroundings can be told from its text alone: of a receipt of an earlier version."""


def request_hash(canonical: Mapping[str, Any]) -> str:
    """The ``request_sha256`` of a request, as `trace.build.canonical_request` gives it."""
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def canonical_prompt(prompt: str) -> dict[str, Any]:
    """The canonical request of a prompt that was guarded or routed alone."""
    return {"messages": [{"role": "user", "content": prompt}], "response": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Remade:
    """A receipt's decisions, made again."""

    decisions: tuple[str, ...]
    """As they come out now, such as ``refuse at input by checkpoints.input[0]``."""
    differences: tuple[str, ...]
    """What comes out otherwise; empty where nothing does."""
    not_remade: tuple[str, ...]
    """What was not read anew, and why."""


def differences(
    block: Mapping[str, Any], canonical: Mapping[str, Any], policy: Policy, readings: Readings, *, bundle_sha256: str
) -> list[str]:
    """What comes out otherwise when a receipt's decisions are made again; see `remake`."""
    return list(remake(block, canonical, policy, readings, bundle_sha256=bundle_sha256).differences)


def remake(
    block: Mapping[str, Any],
    canonical: Mapping[str, Any],
    policy: Policy,
    readings: Readings,
    *,
    bundle_sha256: str,
    response: str | None = None,
) -> Remade:
    """Read prompt and reply again, and decide again at every checkpoint.

    Args:
        block: The receipt's metadata block.
        canonical: The request it is about.
        policy: The policy as it is today.
        readings: The bundle as it is today.
        bundle_sha256: Its hash.
        response: The whole reply of a chat; None decides its end from the reading in the receipt.

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
    found = Metadata.model_validate(block)
    if found.basis is None and (asked := lacking(policy, _KNOWN_AGAIN)):
        raise DataError(f"cannot be made again: {asked[0]}", hint="the text alone does not tell it")
    return _Remaking(found, canonical, policy, readings, response).run()


class _Remaking:
    """One receipt that is made again."""

    def __init__(
        self,
        block: Metadata,
        canonical: Mapping[str, Any],
        policy: Policy,
        readings: Readings,
        response: str | None,
    ) -> None:
        self._block, self._policy, self._readings = block, policy, readings
        self._messages = tuple(canonical_message(turn) for turn in canonical.get("messages") or ())
        self._judged = canonical.get("response")
        self._response = response if self._judged is None else self._judged
        self._is_chat = "sampling" in canonical
        pinned = canonical.get("weights")
        self._pinned = None if pinned is None else Weights.from_mapping(pinned)
        tools = (canonical.get("tools") or {}).get("tools") or ()
        self._tools = tuple(Tool(**tool) for tool in tools)
        self._differences: list[str] = []
        self._not_remade: list[str] = []

    def run(self) -> Remade:
        prompt = self._read(None) if self._messages else None
        reply = None if self._response is None else self._read(self._response)
        if self._is_chat and self._response is not None:
            self._check_reply(self._response)
        basis = self._basis(prompt, reply)
        calls = calls_in(self._response, basis.calls or [t.name for t in self._tools], self._block.request_id)
        texts = Texts(messages=self._messages, response=self._response, calls=calls)
        block = self._block.model_copy(update={"basis": basis})
        again = decide_again(block, self._policy, self._readings.calibrators, texts=texts, own=True)
        self._compare_decisions(again)
        self._compare_readings(prompt, reply, again)
        return Remade(
            decisions=tuple(f"{d.action} at {d.checkpoint} by {d.rule}" for d in again.decisions),
            differences=tuple(self._differences),
            not_remade=tuple(dict.fromkeys((*self._not_remade, *again.unknown))),
        )

    def _read(self, response: str | None) -> Scores:
        [scores] = self._readings.scores([ReadRequest(messages=self._messages, response=response, tools=self._tools)])
        if scores is None:
            raise DataError("cannot be made again: the model's template does not take this conversation")
        return scores

    def _check_reply(self, response: str) -> None:
        if text_sha256(response) == self._block.receipt.reply_sha256:
            return
        stopped = any(Action(d.action).stops or d.action == Action.REGENERATE for d in self._block.decisions)
        if stopped and self._block.policy.mode == "enforce":
            self._not_remade.append("the reply: the caller got another text, so no hash tells that this one was judged")
        else:
            self._differences.append("reply: its hash is not that of the receipt")

    def _basis(self, prompt: Scores | None, reply: Scores | None) -> Basis:
        """The receipt's, with the readings that were made anew in place of its own."""
        kept = self._block.basis
        if kept is None:  # an earlier version's: the first and the last reading are all there is
            kept = self._bare_basis(prompt, reply)
            if self._is_chat and reply is None:
                self._not_remade.append("output: no reply was given, and the receipt keeps no readings")
        attempts = []
        for i, readings in enumerate(kept.attempts):
            own = [self._renewed(r, prompt, reply, is_last=i + 1 == len(kept.attempts)) for r in readings]
            attempts.append(own)
        if any(result.reading is not None for result in (*kept.results, *kept.earlier)):
            self._not_remade.append("tool_result: decided from the receipt's readings of the results")
        windows = sum(r.mode == "both" and not r.is_final for readings in kept.attempts for r in readings)
        if windows:
            self._not_remade.append(f"output: {windows} windows before the end, decided from the receipt's readings")
        if self._is_chat and reply is None and any(r.is_final for r in kept.attempts[-1]):
            self._not_remade.append("output: no reply was given; its end is decided from the receipt's reading")
        return kept.model_copy(update={"attempts": attempts})

    def _renewed(
        self, reading: ReadingRecord, prompt: Scores | None, reply: Scores | None, *, is_last: bool
    ) -> ReadingRecord:
        new = prompt if reading.mode == "prompt" else reply
        of_end = reading.mode == "prompt" or (is_last and (reading.is_final or not self._is_chat))
        if new is None or not of_end or reading.distance is None:
            return reading
        update = {
            "needs": dict(new.needs),
            "outcomes": dict(new.outcomes),
            "distance": new.distance,
            "tokens": new.tokens,
        }
        return reading.model_copy(update=update)

    def _bare_basis(self, prompt: Scores | None, reply: Scores | None) -> Basis:
        read = ReadRequest(messages=self._messages, response=self._response)
        is_chat = self._is_chat
        request = ChatRequest(messages=self._messages, weights=self._pinned) if is_chat else GuardRequest(read=read)
        notes = Notes(request, mixes=self._block.mixture is not None)
        notes.asked(asked_situation(self._messages, Caller(), None), stream=False)
        for scores in (prompt if prompt is not None else reply, reply):
            if scores is not None:
                notes.read(scores, is_final=scores.mode != "prompt")
        return notes.basis()

    def _compare_decisions(self, again: Again) -> None:
        then = [(d.checkpoint, d.action, d.rule) for d in self._block.decisions]
        now = [(d.checkpoint, str(d.action), d.rule) for d in again.decisions]
        cut_short = self._is_chat and self._response is None and self._block.basis is None  # only its prompt is known
        if (again.unknown or cut_short) and is_part(now, then):
            return
        for was, comes_out in zip_longest(then, now):
            if was != comes_out:
                self._differences.append(f"decision: recorded {_said(was)}, now {_said(comes_out)}")

    def _compare_readings(self, prompt: Scores | None, reply: Scores | None, again: Again) -> None:
        calibrators, block = self._readings.calibrators, self._block
        compared: list[tuple[str, Mapping[str, float], Mapping[str, float]]] = []
        if prompt is not None:
            compared.append(("needs", block.needs, calibrators.evidence(prompt).needs))
        latest = prompt if block.mode == "prompt" else reply
        if latest is not None and block.mode == latest.mode:
            compared.append(("outcomes", block.outcomes, calibrators.evidence(latest).outcomes))
        regenerated = any(d.action == Action.REGENERATE for d in block.decisions)
        if again.weights is not None and not regenerated and block.posterior:
            first = block.trajectory[0].weights if block.trajectory else block.weights
            compared.append(("weights", first, again.weights.as_dict()))
        for kind, then, now in compared:
            for name, value in then.items():
                found = now.get(name)
                if found is None or abs(found - value) > TOLERANCES[kind]:
                    told = "none" if found is None else f"{found:.4f}"
                    self._differences.append(f"{kind}.{name}: recorded {value:.4f}, now {told}")


def _said(decision: tuple[str, str, str] | None) -> str:
    if decision is None:
        return "none"
    checkpoint, action, rule = decision
    return f"{action} by {rule}" if checkpoint == "input" else f"{action} at {checkpoint} by {rule}"
