"""JSON schemas of what the endpoints read, made of the tables that the wires read by.

A wire says which fields it acts on and which it refuses unless they are neutral; here stands what a field looks like.
Limits come from the checks themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hhh_router.interfaces.parse import ROLE_NAMES, TOOL_NAME
from hhh_router.interfaces.server import anthropic, completions, openai, responses
from hhh_router.interfaces.server.choices import MOST_CHOICES
from hhh_router.interfaces.server.completions import MOST_PROMPTS
from hhh_router.interfaces.server.models import AUTO, MODEL_NAMES
from hhh_router.interfaces.tools import MOST_TOOLS
from hhh_router.pipeline.answers import MOST_CHOICES as MOST_OPTIONS
from hhh_router.pipeline.answers import MOST_LEVELS, MOST_QUESTIONS, PRESETS
from hhh_router.pipeline.validate import (
    MAX_BIAS,
    MAX_BIASES,
    MAX_SEED,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    ROLES,
)
from hhh_router.trace.feedback import LABELS, LEAST_PROBABILITY, MAX_ID, MAX_NAME
from hhh_router.types import EXPERTS

Schema = dict[str, Any]


def maybe(schema: Schema) -> Schema:
    """The same, or null, which every wire takes for a field that is not there."""
    return {"anyOf": [schema, {"type": "null"}]}


def listed(items: Schema, **more: Any) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **more}


def an_object(properties: Mapping[str, Schema], required: Sequence[str] = (), **more: Any) -> Schema:
    """An object; what else it may hold is left open unless ``additionalProperties`` says so."""
    return {"type": "object", "properties": dict(properties), "required": list(required), **more}


TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
POLICY: Schema = {"type": "string", "description": "a policy's name, as /v1/policies lists them"}
MODEL: Schema = {
    "type": "string",
    "pattern": rf"^({'|'.join(MODEL_NAMES)}|hhh@[0-9]{{1,2}}(-[0-9]{{1,2}}){{{len(EXPERTS) - 1}}})(:.+)?$",
    "description": "which mixture answers, and after a colon under which policy",
    "examples": [AUTO, "hhh-auto:honest-first", "hhh@2-6-5-3"],
}
PART: Schema = an_object({"type": {"type": "string"}, "text": {"description": "where the part is a text"}}, ["type"])
"""Of a message; a part that is no text is accepted, not read, and listed as such."""
MESSAGE: Schema = an_object(
    {
        "role": {"enum": [*ROLES, *ROLE_NAMES]},
        "content": {"anyOf": [{"type": "string"}, listed(PART), {"type": "null"}]},
    },
    ["role"],
)
MESSAGES: Schema = listed(MESSAGE, minItems=1)
WEIGHTS: Schema = {
    "anyOf": [
        {"type": "string", "pattern": "^hhh@", "examples": ["hhh@2-6-5-3"]},
        an_object({e: {"type": "number", "minimum": 0, "maximum": 1} for e in EXPERTS}, additionalProperties=False),
    ],
    "description": "shares that sum to 1, or a mixture's name",
}
OURS: Schema = an_object({"policy": maybe(POLICY), "weights": maybe(WEIGHTS)}, additionalProperties=False)

_NAME: Schema = {"type": "string", "pattern": f"^{TOOL_NAME}$"}
_FUNCTION = {"name": _NAME, "description": maybe({"type": "string"}), "strict": maybe(FLAG)}
_PARAMETERS = maybe({"type": "object", "description": "JSON schema of an object"})
TOOLS: Schema = maybe(
    listed(
        an_object(
            {"type": {"const": "function"}, "function": an_object({**_FUNCTION, "parameters": _PARAMETERS}, ["name"])},
            ["type", "function"],
        ),
        maxItems=MOST_TOOLS,
    )
)
FLAT_TOOLS: Schema = maybe(
    listed(
        an_object({"type": {"const": "function"}, **_FUNCTION, "parameters": _PARAMETERS}, ["type", "name"]),
        maxItems=MOST_TOOLS,
    )
)
THEIR_TOOLS: Schema = maybe(
    listed(an_object({**_FUNCTION, "input_schema": _PARAMETERS}, ["name", "input_schema"]), maxItems=MOST_TOOLS)
)
_CHOICE: Schema = {
    "anyOf": [
        {"enum": [None, "none", "auto", "required"]},
        an_object({"type": {"enum": ["function", "allowed_tools"]}}, ["type"]),
    ]
}
_THEIR_CHOICE = maybe(
    an_object({"type": {"enum": ["auto", "any", "tool", "none"]}, "disable_parallel_tool_use": maybe(FLAG)}, ["type"])
)

_COUNT: Schema = {"type": "integer", "minimum": 1}
_FIELDS: Mapping[str, Schema] = {
    "messages": MESSAGES,
    "model": MODEL,
    "hhh": maybe(OURS),
    "stream": maybe(FLAG),
    "stream_options": maybe(an_object({"include_usage": maybe(FLAG)})),
    "max_tokens": maybe(_COUNT),
    "max_completion_tokens": maybe(_COUNT),
    "max_output_tokens": maybe(_COUNT),
    "temperature": maybe({"type": "number", "minimum": 0, "maximum": MAX_TEMPERATURE}),
    "top_p": maybe({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": maybe({"type": "integer", "minimum": 0}),
    "seed": maybe({"type": "integer", "minimum": -MAX_SEED, "maximum": MAX_SEED}),
    "stop": {"anyOf": [TEXT, listed(TEXT, maxItems=MAX_STOPS), {"type": "null"}]},
    "stop_sequences": maybe(listed(TEXT, maxItems=MAX_STOPS)),
    "logit_bias": maybe(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,18}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
            "maxProperties": MAX_BIASES,
        }
    ),
    "logprobs": maybe(FLAG),
    "top_logprobs": maybe({"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS}),
    "response_format": maybe(an_object({"type": {"enum": ["text", "json_object", "json_schema"]}}, ["type"])),
    "moderation": maybe({"type": "object"}),
    "n": maybe({"type": "integer", "minimum": 1, "maximum": MOST_CHOICES}),
    "echo": maybe(FLAG),
    "tools": TOOLS,
    "tool_choice": _CHOICE,
    "parallel_tool_calls": maybe(FLAG),
    "system": {"anyOf": [{"type": "string"}, listed(PART), {"type": "null"}]},
    "input": {"anyOf": [TEXT, MESSAGES]},
    "instructions": maybe({"type": "string"}),
    "text": maybe(an_object({"format": maybe({"type": "object"})})),
    "include": maybe(listed({"type": "string"})),
    "store": maybe(FLAG),
    "previous_response_id": maybe({"type": "string"}),
    "metadata": maybe({"type": "object"}),
}
"""Field → what it looks like, the same on every wire that has it."""


def _wire(
    read: Collection[str], neutral: Mapping[str, Sequence[object]], required: Sequence[str], **own: Schema
) -> Schema:
    """A body of a wire, of the very tables that `parse.check_supported` goes by."""
    known = {name: _FIELDS.get(name, {}) for name in sorted(set(read) - set(neutral))}
    refused = {
        name: {"enum": [None, *values], "description": "anything else is not supported yet"}
        for name, values in sorted(neutral.items())
    }
    return an_object({**known, **refused, **own}, required)


CHAT = _wire(openai.READ_FIELDS, openai.NEUTRAL_VALUES, ["model", "messages"])
_TOKENS: Schema = listed({"type": "integer", "minimum": 0}, minItems=1)
COMPLETION = _wire(
    completions.READ_FIELDS,
    completions.NEUTRAL_VALUES,
    ["model", "prompt"],
    prompt={"anyOf": [TEXT, _TOKENS, listed({"anyOf": [TEXT, _TOKENS]}, minItems=1, maxItems=MOST_PROMPTS)]},
    logprobs=maybe({"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS}),
    max_tokens=maybe({"type": "integer", "minimum": 0, "description": "0 only with echo"}),
)
RESPONSE = _wire(responses.READ_FIELDS, responses.NEUTRAL_VALUES, ["model", "input"], tools=FLAT_TOOLS)
MESSAGES_BODY = _wire(
    anthropic.READ_FIELDS,
    anthropic.NEUTRAL_VALUES,
    ["model", "messages", "max_tokens"],
    max_tokens=_COUNT,
    tools=THEIR_TOOLS,
    tool_choice=_THEIR_CHOICE,
)
COUNT_TOKENS = an_object(
    {name: MESSAGES_BODY["properties"][name] for name in ("model", "messages", "system", "tools", "tool_choice")},
    ["model", "messages"],
)
_JUDGED = {"prompt": maybe({"anyOf": [TEXT, listed(MESSAGE)]}), "response": maybe(TEXT), "policy": maybe(POLICY)}
JUDGED: Schema = {
    "anyOf": [
        an_object(_JUDGED, additionalProperties=False),
        an_object(
            {"items": listed(an_object(_JUDGED, additionalProperties=False)), "policy": maybe(POLICY)},
            ["items"],
            additionalProperties=False,
        ),
    ]
}
MODERATED: Schema = an_object(
    {
        "input": {"anyOf": [TEXT, listed(TEXT, minItems=1), listed(PART, minItems=1)]},
        "model": maybe(MODEL),
        "policy": maybe(POLICY),
    },
    ["input"],
    additionalProperties=False,
)

_OPTION: Schema = {
    "anyOf": [
        {"type": "string"},
        FLAG,
        an_object({"value": {"type": ["string", "boolean"]}, "description": maybe({"type": "string"})}, ["value"]),
        an_object({"label": {"type": ["string", "boolean"]}, "description": maybe({"type": "string"})}, ["label"]),
    ]
}
_TEXTS = listed(an_object({"text": {"type": "string"}}, ["text"]))
_NAMED = {"name": maybe({"type": "string"}), "instructions": {"anyOf": [{"type": "string"}, _TEXTS, {"type": "null"}]}}
_QUESTION: Schema = {
    "anyOf": [
        an_object({**_NAMED, "type": {"const": "predicate"}}, ["type"]),
        an_object(
            {**_NAMED, "type": {"const": "choice"}, "choices": listed(_OPTION, minItems=2, maxItems=MOST_OPTIONS)},
            ["type", "instructions", "choices"],
        ),
        an_object(
            {**_NAMED, "type": {"const": "score"}, "levels": listed(_OPTION, minItems=2, maxItems=MOST_LEVELS)},
            ["type", "instructions", "levels"],
        ),
    ],
    "description": f"a predicate named {', '.join(PRESETS)} is answered by the calibrated heads",
}
_ITEM: Schema = {
    "anyOf": [
        MESSAGE,
        an_object({"type": {"const": "function_call"}, "name": TEXT, "arguments": {"type": "string"}}, ["type"]),
        an_object({"type": {"const": "function_call_output"}, "output": {"type": "string"}}, ["type", "output"]),
    ]
}
DECIDED: Schema = an_object(
    {
        "model": maybe(MODEL),
        "input": {"anyOf": [TEXT, listed(_ITEM, minItems=1)]},
        "questions": listed(_QUESTION, minItems=1, maxItems=MOST_QUESTIONS),
    },
    ["input", "questions"],
)
_NOUL: dict[str, Schema] = {"instructions": {}, "criteria": {}}
SYSTEMONE: Schema = an_object(
    {
        "model": maybe(MODEL),
        "state": {"description": "what the questions are about: any JSON"},
        "questions": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": MOST_QUESTIONS,
            "additionalProperties": an_object({**_NOUL, "type": {"enum": ["noul", "choice", "score"]}}, ["type"]),
        },
    },
    ["state", "questions"],
)
LITELLM: Schema = an_object(
    {
        "input_type": {"enum": ["request", "response"]},
        "texts": maybe(listed({"type": "string"})),
        "structured_messages": maybe(listed({"type": "object"}, description="read where there are texts")),
        "litellm_call_id": maybe({"type": "string"}),
        "additional_provider_specific_params": maybe(an_object({"policy": maybe(POLICY)})),
    },
    ["input_type"],
)
FEEDBACK: Schema = an_object(
    {
        "request_id": {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_ID,
            "description": "hhh.request_id of a reply",
        },
        "labels": an_object(dict.fromkeys(LABELS, FLAG), additionalProperties=False, minProperties=1),
        "by": maybe({"type": "string", "maxLength": MAX_NAME, "description": "the labeller"}),
        "sampled": maybe({"type": "boolean", "description": "the request was drawn at random to be labelled"}),
        "probability": maybe({"type": "number", "minimum": LEAST_PROBABILITY, "maximum": 1}),
    },
    ["request_id", "labels"],
    additionalProperties=False,
)
