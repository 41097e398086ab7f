"""``POST /v1/moderations``: OpenAI's shape, filled by the calibrated heads and the policy's input checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import kind_of, parse_messages
from hhh_router.interfaces.server.http import JsonReply, read_json, until_client_leaves
from hhh_router.interfaces.server.keys import called, check_policies
from hhh_router.interfaces.server.models import AUTO, parse_model
from hhh_router.pipeline import GuardResult, Pipeline
from hhh_router.trace.block import Metadata
from hhh_router.types import Action, GuardRequest, Message, ReadRequest

CATEGORIES: Mapping[str, str] = {"harmful": "harmless", "injection": "injection"}
"""Category → the need whose probability is its score. OpenAI's own categories are not among them: nothing here tells
harassment from violence, and a score of 0 would say that it was looked for."""
FIELDS = frozenset({"input", "model", "policy"})


async def moderations(request: Request, pipeline: Pipeline) -> Response:
    """``{input, model?, policy?}`` → a result per text: flagged by the policy, scores by the heads."""
    body = await read_json(request, max_bytes=pipeline.settings.max_body_bytes)
    if unknown := sorted(set(body) - FIELDS):
        raise InvalidRequest(f"{unknown[0][:100]}: unknown field", hint=f"use {', '.join(sorted(FIELDS))}")
    model = AUTO if body.get("model") is None else body["model"]
    policy = parse_model(model).policy or body.get("policy")
    if policy is not None and not isinstance(policy, str):
        raise InvalidRequest("policy: no string", hint="send a policy's name")
    asked = [
        GuardRequest(read=ReadRequest(messages=messages), policy=policy, not_inspected=unread)
        for messages, unread in _inputs(body.get("input"))
    ]
    check_policies(request, pipeline, asked)
    results = await until_client_leaves(request.receive, pipeline.guard(called(request, asked)))
    told = [moderation(r) for r in results]
    return JsonReply({"id": f"modr-{pipeline.parts.new_id()}", "model": model, "results": told})


def moderation(result: GuardResult) -> dict[str, Any]:
    """One result. A category is true where its probability is one half or more, whatever the policy makes of it."""
    needs = result.metadata.needs
    scores = {category: needs[need] for category, need in CATEGORIES.items() if need in needs}
    return {
        "flagged": _flags(result.action),
        "categories": {category: p >= 0.5 for category, p in scores.items()},
        "category_scores": scores,
        "category_applied_input_types": {category: ["text"] for category in scores},
        "hhh": result.metadata.as_json(),
    }


def parse_moderation(given: object) -> bool:
    """Whether a chat asks for scores of its input and output, OpenAI's ``moderation`` field.

    Raises:
        InvalidRequest: It is no object, or asks for blocking, which is the policy's to decide.
    """
    if given is None:
        return False
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            f"moderation: found {kind_of(given)}", hint='send an object, such as {"model": "hhh-auto"}'
        )
    policy = given.get("policy") or {}
    sides = policy.values() if isinstance(policy, Mapping) else [policy]
    for side in sides:
        mode = side.get("mode") if isinstance(side, Mapping) else None
        if side is not None and mode != "score":
            raise InvalidRequest(
                f"moderation.policy: found mode {str(mode)[:40]!r}", hint="use 'score'; the policy says what is stopped"
            )
    return True


def moderated(metadata: Metadata, model: str) -> dict[str, Any]:
    """What OpenAI's chat completions tell under ``moderation``, from the readings that the reply was judged by."""
    harm = {c: metadata.needs[need] for c, need in CATEGORIES.items() if need in metadata.needs}
    outcomes = metadata.outcomes if metadata.mode == "both" else {}
    return {
        "input": _side(harm, metadata, "input", model, missing="the prompt could not be read"),
        "output": _side(outcomes, metadata, "output", model, missing="no reply was read"),
    }


def _side(
    scores: Mapping[str, float], metadata: Metadata, checkpoint: str, model: str, *, missing: str
) -> dict[str, Any]:
    if not scores:
        return {"type": "error", "code": "not_read", "message": missing}
    actions = [Action(d.action) for d in metadata.decisions if d.checkpoint == checkpoint]
    result = {
        "type": "moderation_result",
        "model": model,
        "flagged": any(map(_flags, actions)),
        "categories": {category: p >= 0.5 for category, p in scores.items()},
        "category_scores": dict(scores),
        "category_applied_input_types": {category: ["text"] for category in scores},
    }
    return {"type": "moderation_results", "model": model, "results": [result]}


def _flags(action: Action) -> bool:
    return action.stops or action in (Action.FLAG, Action.REGENERATE)


def _inputs(given: object) -> list[tuple[tuple[Message, ...], tuple[str, ...]]]:
    """The texts asked about, each as a user's turn, with what of it nobody reads.

    A list of strings is as many texts; a list of parts is one text, as OpenAI has it.
    """
    hint = "send text, a list of texts, or a list of parts with a 'type'"
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes) or not given:
        raise InvalidRequest(f"input: found {kind_of(given)}", hint=hint)
    if all(isinstance(text, str) for text in given):
        return [((Message(role="user", content=str(text)),), ()) for text in given]
    if not all(isinstance(part, Mapping) for part in given):
        raise InvalidRequest("input: found texts and other things in one list", hint=hint)
    messages, unread = parse_messages([{"role": "user", "content": list(given)}], where="input")
    return [(messages, tuple(u.replace("input[0].content", "input") for u in unread))]
