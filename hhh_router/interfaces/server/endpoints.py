"""Every endpoint: where it is, whom it lets in, whose errors it speaks, what it takes and gives.

`app.create_app` binds work to this table and `openapi.document` describes it, so neither can tell of another server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from hhh_router.interfaces.server import fields, guardrail
from hhh_router.interfaces.server.fields import FLAG, Schema, an_object, listed, maybe
from hhh_router.interfaces.server.keys import Door
from hhh_router.types import EXPERTS, Action

Wire = Literal["openai", "anthropic"]
"""In whose shape an endpoint tells errors."""

HHH: Final[Schema] = {"$ref": "#/components/schemas/Metadata"}

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_ACTION: Schema = {"enum": [str(a) for a in Action]}


def _whole(properties: dict[str, Schema]) -> Schema:
    """A reply: all of these fields are there, and more may be."""
    return an_object(properties, list(properties))


_CHOICE = _whole({"index": _COUNT, "message": {"type": "object"}, "finish_reason": _TEXT})
_CHAT = _whole(
    {
        "id": _TEXT,
        "object": {"const": "chat.completion"},
        "created": _COUNT,
        "model": _TEXT,
        "choices": listed(_CHOICE, minItems=1),
        "usage": {"type": "object"},
        "hhh": HHH,
    }
)
_COMPLETION = _whole(
    {
        "id": _TEXT,
        "object": {"const": "text_completion"},
        "created": _COUNT,
        "model": _TEXT,
        "choices": listed(_whole({"index": _COUNT, "text": _TEXT, "finish_reason": _TEXT, "hhh": HHH}), minItems=1),
        "usage": {"type": "object"},
        "hhh": HHH,
    }
)
_RESPONSE = _whole(
    {
        "id": _TEXT,
        "object": {"const": "response"},
        "created_at": _COUNT,
        "status": {"enum": ["completed", "incomplete"]},
        "model": _TEXT,
        "output": listed({"type": "object"}),
        "usage": {"type": "object"},
        "hhh": HHH,
    }
)
_MESSAGE = _whole(
    {
        "id": _TEXT,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": _TEXT,
        "content": listed({"type": "object"}),
        "stop_reason": _TEXT,
        "usage": {"type": "object"},
        "hhh": HHH,
    }
)
_MODERATION = _whole(
    {
        "flagged": FLAG,
        "categories": {"type": "object", "additionalProperties": FLAG},
        "category_scores": {"type": "object", "additionalProperties": _SHARE},
        "hhh": HHH,
    }
)
_ANSWERS = {"model": _TEXT, "usage": {"type": "object"}, "hhh": {"type": "object"}}
_VERDICT = _whole({"object": {"const": "guard"}, "action": _ACTION, "message": maybe(_TEXT), "hhh": HHH})
_ROUTE = _whole(
    {
        "object": {"const": "route"},
        "action": _ACTION,
        "weights": _whole(dict.fromkeys(EXPERTS, _SHARE)),
        "mixture": _TEXT,
        "hhh": HHH,
    }
)
_POLICY = _whole(
    {
        "id": _TEXT,
        "object": {"const": "policy"},
        "version": _COUNT,
        "hash": _TEXT,
        "mode": {"enum": ["enforce", "shadow"]},
        "default": FLAG,
    }
)
_READY = _whole({"status": _TEXT, "policy": _TEXT, "bundle": _TEXT, "engine": {"type": "object"}})
_FEEDBACK = _whole(
    {
        "object": {"const": "feedback"},
        "request_id": _TEXT,
        "by": _TEXT,
        "labels": {"type": "object", "additionalProperties": FLAG},
        "status": {"enum": ["stored", "unchanged", "replaced"]},
        "durable": FLAG,
    }
)
_NUMBER = maybe({"type": "number"})
_FIGURE = _whole(
    {
        "name": _TEXT,
        "of": _TEXT,
        "n": _COUNT,
        **dict.fromkeys(("value", "low", "high", "least", "most"), _NUMBER),
        "level": _SHARE,
        "state": {"enum": ["inside", "outside", "open", "unbounded"]},
        "also": _COUNT,
    }
)


_PAIR = _whole(
    {
        "policy": _TEXT,
        "candidate": _TEXT,
        "requests": _COUNT,
        "disagreements": listed(
            _whole({"checkpoint": _TEXT, "enforced": _TEXT, "candidate": _TEXT, "n": _COUNT}),
        ),
    }
)
_DRIFT = _whole(
    {
        "object": {"const": "drift"},
        "labelled": _COUNT,
        "outside": _COUNT,
        "figures": listed(_FIGURE),
        "comparisons": listed(_PAIR),
    }
)


def _list(of: Schema) -> Schema:
    return _whole({"object": {"const": "list"}, "data": listed(of)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One method at one path."""

    method: Literal["GET", "POST"]
    path: str
    does: str
    """In a few words, as docs/server.md has it."""
    gives: Schema
    """The body of a reply that is no error."""
    takes: Schema | None = None
    """The body of a request."""
    streams: bool = False
    """With ``stream: true`` the reply comes as server-sent events."""
    media: str = "application/json"
    door: Door | None = None
    needs_key: bool = True
    wire: Wire = "openai"

    @property
    def generates(self) -> bool:
        """A model answers, so a repeated request costs something."""
        return self.streams


ENDPOINTS: Final = (
    Endpoint(
        method="POST",
        path="/v1/chat/completions",
        does="answer, streamed or whole",
        takes=fields.CHAT,
        gives=_CHAT,
        streams=True,
        door="chat",
    ),
    Endpoint(
        method="GET", path="/v1/models", does="the model names", gives=an_object({"data": listed({"type": "object"})})
    ),
    Endpoint(
        method="POST",
        path="/v1/completions",
        does="go on with a text as it stands, and score it",
        takes=fields.COMPLETION,
        gives=_COMPLETION,
        streams=True,
        door="chat",
    ),
    Endpoint(
        method="POST",
        path="/v1/responses",
        does="the same in OpenAI's newer wire",
        takes=fields.RESPONSE,
        gives=_RESPONSE,
        streams=True,
        door="chat",
    ),
    Endpoint(
        method="POST",
        path="/v1/messages",
        does="the same in Anthropic's wire",
        takes=fields.MESSAGES_BODY,
        gives=_MESSAGE,
        streams=True,
        door="chat",
        wire="anthropic",
    ),
    Endpoint(
        method="POST",
        path="/v1/messages/count_tokens",
        does="tokens of a prompt, template included",
        takes=fields.COUNT_TOKENS,
        gives=_whole({"input_tokens": _COUNT}),
        door="chat",
        wire="anthropic",
    ),
    Endpoint(
        method="POST",
        path="/v1/moderations",
        does="scores of texts in OpenAI's shape",
        takes=fields.MODERATED,
        gives=_whole({"id": _TEXT, "model": _TEXT, "results": listed(_MODERATION)}),
        door="judge",
    ),
    Endpoint(
        method="POST",
        path="/v1/decisions",
        does="questions about a conversation, answered with probabilities",
        takes=fields.DECIDED,
        gives=_whole({**_ANSWERS, "answers": listed({"type": "object"})}),
        door="judge",
    ),
    Endpoint(
        method="POST",
        path="/v1/systemone",
        does="the same in System One's wire",
        takes=fields.SYSTEMONE,
        gives=_whole({**_ANSWERS, "answers": {"type": "object"}}),
        door="judge",
    ),
    Endpoint(
        method="POST",
        path=guardrail.PATH,
        does="the guardrail of a LiteLLM proxy",
        takes=fields.LITELLM,
        gives=an_object({"action": {"enum": ["NONE", "BLOCKED"]}, "blocked_reason": _TEXT, "hhh": HHH}, ["action"]),
        door="judge",
    ),
    Endpoint(
        method="POST",
        path="/v1/guard",
        does="judge a prompt and/or a response, one or many",
        takes=fields.JUDGED,
        gives={"anyOf": [_VERDICT, _list(_VERDICT)]},
        door="judge",
    ),
    Endpoint(
        method="POST",
        path="/v1/route",
        does="needs and weights of a prompt, one or many",
        takes=fields.JUDGED,
        gives={"anyOf": [_ROUTE, _list(_ROUTE)]},
        door="judge",
    ),
    Endpoint(
        method="POST",
        path="/v1/feedback",
        does="say whether an earlier request was harmful, or judged wrongly",
        takes=fields.FEEDBACK,
        gives=_FEEDBACK,
        door="feedback",
    ),
    Endpoint(
        method="GET",
        path="/v1/drift",
        does="which figures have left their bounds, on readings and on labels",
        gives=_DRIFT,
        door="metrics",
    ),
    Endpoint(method="GET", path="/v1/policies", does="the policies a caller may pick", gives=_list(_POLICY)),
    Endpoint(
        method="GET",
        path="/v1/schema",
        does="JSON schema of the `hhh` block",
        gives={"type": "object"},
        needs_key=False,
    ),
    Endpoint(
        method="GET",
        path="/openapi.json",
        does="this table as an OpenAPI document",
        gives=_whole({"openapi": _TEXT, "paths": {"type": "object"}}),
        needs_key=False,
    ),
    Endpoint(
        method="GET",
        path="/metrics",
        does="counters and histograms for Prometheus",
        gives=_TEXT,
        media="text/plain",
        door="metrics",
    ),
    Endpoint(
        method="GET",
        path="/health/live",
        does="the process answers",
        gives=_whole({"status": {"const": "ok"}}),
        needs_key=False,
    ),
    Endpoint(
        method="GET",
        path="/health/ready",
        does="the model takes requests (503 while it is started again or drained), and how busy it is",
        gives=_READY,
        needs_key=False,
    ),
)
