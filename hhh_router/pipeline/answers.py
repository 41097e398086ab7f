"""Questions about a conversation: some are answered by the calibrated heads, any other by the model's next token.

A question that carries the name of a preset is read by the heads, in one pass that stops at l_r. Any other is put to
the bare model after the conversation, and the probabilities of the offered answers' first tokens are compared: what a
small model makes of it is told as not calibrated.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hhh_router.errors import BackendTimeout, InvalidRequest
from hhh_router.pipeline.onerror import check_scores
from hhh_router.pipeline.parts import Parts
from hhh_router.pipeline.plan import make_plan
from hhh_router.pipeline.validate import MAX_TOP_LOGPROBS, check_messages
from hhh_router.protocols import Delta
from hhh_router.tools import as_text
from hhh_router.types import Action, ChatRequest, Evidence, Message, Plan, ReadRequest, Sampling, Scores, Weights

PRESETS: Mapping[str, tuple[str | None, str | None]] = {
    "harmful": ("harmless", "unsafe"),
    "injection": ("injection", None),
    "dishonest": (None, "untruthful"),
    "unhelpful": (None, "unhelpful"),
    "over-refusing": (None, "unhelpful"),
}
"""Name → the need that answers where the conversation ends with the user, and the outcome where it ends with a reply.
None: it cannot be told then. Replies that are unhelpful and those that refuse too much are one head's."""
MOST_QUESTIONS = 400
MOST_CHOICES = 26
"""Of a question to the model, which answers with a letter."""
MOST_LEVELS = 10
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BASE = Weights(1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a conversation."""

    kind: Literal["predicate", "choice", "score"]
    name: str | None
    instructions: str
    options: tuple[str, ...] = ()
    """Of a choice or a score, described; the lowest level first."""

    @property
    def preset(self) -> str | None:
        """The preset it names, if any."""
        if self.kind != "predicate":
            return None
        for text in (self.name, self.instructions):
            if text is not None and (found := text.strip().lower().replace("_", "-")) in PRESETS:
                return found
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How likely each option is."""

    probabilities: tuple[float, ...]
    """Of the options in order, summing to 1; of a predicate: no, yes."""
    source: str
    """``needs.harmless`` and the like, or ``model``."""
    calibrated: bool
    in_distribution: bool | None = None
    """None where the model answered."""


async def answer(
    parts: Parts, messages: Sequence[Message], questions: Sequence[Question]
) -> tuple[list[Answer | None], int]:
    """Answer each question, and tell how many tokens the conversation has.

    Args:
        parts: Of the deployment.
        messages: The conversation. Where it ends with the assistant, that reply is what is asked about.
        questions: At least one.

    Returns:
        An answer per question, in order, None where it cannot be told; and the tokens of the conversation.

    Raises:
        InvalidRequest: Nothing is asked, too much, or of nothing.
        ReaderError, GeneratorError: The model failed.
        BackendTimeout: It took longer than ``settings.request_timeout_s``.
    """
    if not 1 <= len(questions) <= MOST_QUESTIONS:
        raise InvalidRequest(f"questions: found {len(questions)}", hint=f"ask 1 to {MOST_QUESTIONS}")
    check_messages(messages, max_bytes=parts.settings.max_body_bytes, any_order=True, where="input")
    messages = [m for m in as_text(messages, ()) if m.content.strip()]
    if not messages:
        raise InvalidRequest("input: holds no text", hint="send what the questions are about")
    try:
        async with asyncio.timeout(parts.settings.request_timeout_s) as deadline:
            evidence, tokens = await _read(parts, messages)
            found: list[Answer | None] = []
            for question in questions:
                name = question.preset
                found.append(_by_heads(name, evidence) if name else await _by_model(parts, messages, question))
            return found, tokens
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise BackendTimeout(
            f"{len(questions)} questions took longer than {parts.settings.request_timeout_s:g} s",
            hint="ask fewer at once, or raise HHH_ROUTER_REQUEST_TIMEOUT_S",
        ) from error


async def _read(parts: Parts, messages: Sequence[Message]) -> tuple[Evidence, int]:
    *before, last = messages
    if last.role == "assistant":
        wanted = ReadRequest(messages=tuple(before), response=last.content)
    else:
        wanted = ReadRequest(messages=tuple(messages))
    [scores] = await parts.reader.read([wanted])
    check_scores(scores)
    return parts.calibrators.evidence(scores), scores.tokens


def _by_heads(name: str, evidence: Evidence) -> Answer | None:
    need, outcome = PRESETS[name]
    if evidence.mode == "prompt":
        source, p = f"needs.{need}", evidence.needs.get(need) if need else None
    else:
        source, p = f"outcomes.{outcome}", evidence.outcomes.get(outcome) if outcome else None
        if p is None and need and evidence.mode == "both":  # an injection stays one when it was answered
            source, p = f"needs.{need}", evidence.needs.get(need)
    if p is None:
        return None
    return Answer(
        probabilities=(1 - p, p),
        source=source,
        calibrated=evidence.calibrated,
        in_distribution=evidence.in_distribution,
    )


async def _by_model(parts: Parts, messages: Sequence[Message], question: Question) -> Answer | None:
    """What the bare model would say first. None where none of the options is likely."""
    labels, told = _offered(question)
    text = "\n".join(f"{m.role}: {m.content}" for m in messages)
    asked = Message(role="user", content=f"{text}\n\n{question.instructions}\n{told}")
    request = ChatRequest(
        messages=(asked,),
        sampling=Sampling(max_tokens=1, top_logprobs=MAX_TOP_LOGPROBS),
        request_id=parts.new_id(),
    )
    policy = replace(parts.policies.default, floors=())  # the bare model answers: no rule and no floor has a say

    def planner(scores: Scores) -> Plan:
        plan = make_plan(scores, policy=policy, calibrators=parts.calibrators)
        return replace(plan, decision=replace(plan.decision, action=Action.ALLOW), weights=_BASE)

    mass = dict.fromkeys(labels, 0.0)
    events = parts.generator.generate(request, planner, window_tokens=policy.window_tokens)
    try:
        async for event in events:
            for token in event.told[:1] if isinstance(event, Delta) else ():
                for other in token.top_logprobs:
                    if (label := other.token.strip().upper()) in mass:
                        mass[label] += math.exp(other.logprob)
    finally:
        await events.aclose()
    total = sum(mass.values())
    if total <= 0:
        return None
    return Answer(probabilities=tuple(m / total for m in mass.values()), source="model", calibrated=False)


def _offered(question: Question) -> tuple[tuple[str, ...], str]:
    """Labels of the options, one token each, and how they are told."""
    if question.kind == "predicate":
        return ("NO", "YES"), "Answer with one word, yes or no."
    if question.kind == "score":
        labels = tuple(str(i) for i in range(len(question.options)))
        told = "; ".join(f"{label}: {option}" for label, option in zip(labels, question.options, strict=True))
        return labels, f"Answer with one digit. {told}"
    labels = tuple(_LETTERS[: len(question.options)])
    told = "\n".join(f"{label}. {option}" for label, option in zip(labels, question.options, strict=True))
    return labels, f"{told}\nAnswer with one letter."
