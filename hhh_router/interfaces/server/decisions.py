"""``POST /v1/decisions`` and ``POST /v1/systemone``: questions about a conversation, answered with probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import kind_of, parse_messages
from hhh_router.interfaces.server.http import JsonReply, read_json, until_client_leaves
from hhh_router.interfaces.server.models import AUTO, parse_model
from hhh_router.pipeline import Pipeline
from hhh_router.pipeline.answers import MOST_CHOICES, MOST_LEVELS, PRESETS, Answer, Question, answer
from hhh_router.types import Message

_TOOL_TEXT = {"function_call": "arguments", "custom_tool_call": "input"}
_TOOL_RESULTS = frozenset({"function_call_output", "custom_tool_call_output"})
_ONE_TOKEN = 1
"""Tokens of an answer by the model; answers by the heads take none."""


async def decisions(request: Request, pipeline: Pipeline) -> Response:
    """``{model, input, questions: [{type, name?, instructions, …}]}`` → an answer per question, in order."""
    body = await read_json(request, max_bytes=pipeline.settings.max_body_bytes)
    model = AUTO if body.get("model") is None else body["model"]
    parse_model(model)
    messages, unread = _conversation(body.get("input"), "input")
    given = body.get("questions")
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InvalidRequest(f"questions: found {kind_of(given)}", hint="send a list of questions")
    questions = [_question(q, f"questions[{i}]") for i, q in enumerate(given)]
    found, tokens = await until_client_leaves(
        request.receive, answer(pipeline.parts, messages, [q for q, _ in questions])
    )
    answers = [_told(q, values, a) for (q, values), a in zip(questions, found, strict=True)]
    by_model = sum(a is not None and a.source == "model" for a in found)
    return JsonReply(
        {"model": model, "answers": answers, "usage": _usage(tokens, by_model), "hhh": {"not_inspected": list(unread)}}
    )


async def systemone(request: Request, pipeline: Pipeline) -> Response:
    """``{model, state, questions: {name: {type: noul|choice|score, …}}}`` → ``{answers: {name: …}}``.

    A question that cannot be answered has no answer, and is named in ``hhh.not_answered``.
    """
    body = await read_json(request, max_bytes=pipeline.settings.max_body_bytes)
    model = AUTO if body.get("model") is None else body["model"]
    parse_model(model)
    if "state" not in body:
        raise InvalidRequest("state: missing", hint="send what the questions are about: any JSON")
    messages, unread = _state(body["state"])
    given = body.get("questions")
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"questions: found {kind_of(given)}", hint="send an object, question by name")
    questions = [_from_systemone(q, name, f"questions.{name[:60]}") for name, q in given.items()]
    asked = [q for q, _ in questions]
    found, tokens = await until_client_leaves(request.receive, answer(pipeline.parts, messages, asked))
    answers = {
        str(q.name): _told_to_systemone(q, values, a)
        for (q, values), a in zip(questions, found, strict=True)
        if a is not None
    }
    told = {"not_inspected": list(unread), "not_answered": [q.name for q in asked if q.name not in answers]}
    usage = _usage(tokens, sum(a is not None and a.source == "model" for a in found))
    return JsonReply(
        {"model": model, "answers": answers, "usage": usage, "hhh": told},
        headers={"x-typesafe-request-id": pipeline.parts.new_id()},
    )


# -- what is asked ----------------------------------------------------------------------------------------------------


def _conversation(given: object, where: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Text, or messages with tool calls and their outputs between them, as turns that can be read."""
    if isinstance(given, str):
        return (Message(role="user", content=given),), ()
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise InvalidRequest(f"{where}: found {kind_of(given)}", hint="send text, or a list of messages")
    rows: list[Any] = []
    for row in given:
        kind = str(row.get("type")) if isinstance(row, Mapping) else None
        if kind in _TOOL_TEXT:
            rows.append({"role": "assistant", "content": f"{row.get('name', '')}({row.get(_TOOL_TEXT[kind], '')})"})
        elif kind in _TOOL_RESULTS:
            rows.append({"role": "tool", "content": row.get("output")})
        elif isinstance(row, Mapping):
            rows.append({k: v for k, v in row.items() if k not in ("type", "id", "status", "phase")})
        else:
            rows.append(row)
    return parse_messages(rows, where=where)


def _state(given: object) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Messages where the state is a list of them, else its JSON as one turn."""
    if isinstance(given, list) and given and all(isinstance(row, Mapping) and "role" in row for row in given):
        return _conversation(given, "state")
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return (Message(role="user", content=text),), ()


def _question(given: object, where: str) -> tuple[Question, tuple[object, ...]]:
    """A question, and the values of its options as they are told back."""
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where}: found {kind_of(given)}", hint='send an object, such as {"type": "predicate"}')
    name, instructions, kind = (
        given.get("name"),
        _text(given.get("instructions"), f"{where}.instructions"),
        given.get("type"),
    )
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"{where}.name: found {kind_of(name)}", hint="send text")
    if kind not in ("predicate", "choice", "score"):
        raise InvalidRequest(f"{where}.type: found {str(kind)[:40]!r}", hint="use predicate, choice or score")
    options: tuple[str, ...] = ()
    values: tuple[object, ...] = (False, True)
    if kind != "predicate":
        key, most = ("choices", MOST_CHOICES) if kind == "choice" else ("levels", MOST_LEVELS)
        rows = given.get(key)
        if not isinstance(rows, Sequence) or isinstance(rows, str | bytes) or not 2 <= len(rows) <= most:
            found = f"{len(rows)} of them" if isinstance(rows, list) else kind_of(rows)
            raise InvalidRequest(f"{where}.{key}: found {found}", hint=f"send a list of 2 to {most}")
        named = [_option(row, f"{where}.{key}[{i}]") for i, row in enumerate(rows)]
        values, options = tuple(v for v, _ in named), tuple(told for _, told in named)
        if kind == "choice" and len({(type(v), v) for v in values}) < len(values):
            raise InvalidRequest(f"{where}.choices: one is there twice", hint="send each choice once")
    question = Question(kind=kind, name=name, instructions=instructions or "", options=options)
    if instructions is None and question.preset is None:
        raise InvalidRequest(
            f"{where}.instructions: missing",
            hint=f"send what is to be decided, or name a preset: {', '.join(PRESETS)}",
        )
    return question, values


def _option(given: object, where: str) -> tuple[object, str]:
    """The value of a choice or the label of a level, and how it is described to the model."""
    if isinstance(given, str | bool):
        return given, str(given)
    if isinstance(given, Mapping):
        value = given.get("value", given.get("label"))
        if isinstance(value, str | bool):
            description = given.get("description")
            if description is not None and not isinstance(description, str):
                raise InvalidRequest(f"{where}.description: found {kind_of(description)}", hint="send text, or none")
            return value, f"{value}: {description}" if description else str(value)
    raise InvalidRequest(f"{where}: found {kind_of(given)}", hint="send a text, or an object with 'value' or 'label'")


def _text(given: object, where: str) -> str | None:
    """Instructions are text, or a list of parts of text."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in given]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(map(str, texts))
    raise InvalidRequest(f"{where}: found {kind_of(given)}", hint="send text, or a list of parts with 'text'")


def _from_systemone(given: object, name: str, where: str) -> tuple[Question, tuple[object, ...]]:
    """System One's question in the words of the other wire: its ``criteria`` are choices, levels, or what yes means."""
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where}: found {kind_of(given)}", hint='send an object, such as {"type": "noul"}')
    kind, criteria = given.get("type"), given.get("criteria")
    asked = [_content(given["instructions"])] if given.get("instructions") is not None else []
    question: dict[str, Any] = {"type": kind, "name": name}
    match kind:
        case "noul":
            question["type"] = "predicate"
            if isinstance(criteria, Mapping):
                meant = {"true": "yes", "false": "no"}
                asked += [f"{meant[k]}: {_content(v)}" for k, v in criteria.items() if k in meant and v is not None]
        case "choice":
            rows = criteria.items() if isinstance(criteria, Mapping) else ()
            question["choices"] = [{"value": k, "description": v and _content(v)} for k, v in rows]
        case "score":
            levels = criteria if isinstance(criteria, Sequence) and not isinstance(criteria, str) else ()
            question["levels"] = [_content(level) for level in levels]
        case _:
            raise InvalidRequest(f"{where}.type: found {str(kind)[:40]!r}", hint="use noul, choice or score")
    if asked or kind != "noul":
        question["instructions"] = "\n".join(asked) or "Which of these fits?"
    return _question(question, where)


def _content(given: object) -> str:
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


# -- what is answered -------------------------------------------------------------------------------------------------


def _told(question: Question, values: Sequence[object], found: Answer | None) -> dict[str, Any]:
    if found is None:
        return {"type": "refusal", "name": question.name}
    p = found.probabilities
    made = {"source": found.source, "calibrated": found.calibrated, "in_distribution": found.in_distribution}
    head = {"type": question.kind, "name": question.name, "hhh": made}
    if question.kind == "predicate":
        return {**head, "probability": p[1]}
    best = max(range(len(p)), key=p.__getitem__)
    if question.kind == "choice":
        rows = [{"value": v, "probability": x} for v, x in zip(values, p, strict=True)]
        return {**head, "choice": values[best], "confidence": p[best], "probabilities": rows}
    levels = [{"value": i, "label": str(v), "probability": x} for i, (v, x) in enumerate(zip(values, p, strict=True))]
    return {**head, "score": sum(i * x for i, x in enumerate(p)), "confidence": p[best], "probabilities": levels}


def _told_to_systemone(question: Question, values: Sequence[object], found: Answer) -> dict[str, Any]:
    told = _told(question, values, found)
    made, p = {"hhh": told["hhh"]}, found.probabilities
    match question.kind:
        case "predicate":
            return {"type": "noul", "noul": told["probability"], **made}
        case "choice":
            chances = dict(zip(map(str, values), p, strict=True))
            return {
                "type": "choice", "choice": told["choice"], "confidence": told["confidence"],
                "probabilities": chances, **made,
            }  # fmt: skip
    numbers = [str(i) for i in range(len(values))]
    return {
        "type": "score", "score": told["score"], "confidence": told["confidence"],
        "legend": dict(zip(numbers, values, strict=True)), "probabilities": dict(zip(numbers, p, strict=True)), **made,
    }  # fmt: skip


def _usage(tokens: int, by_model: int) -> dict[str, Any]:
    said = by_model * _ONE_TOKEN
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens + said,
    }
