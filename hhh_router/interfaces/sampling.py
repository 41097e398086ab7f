"""How the next token is to be drawn, by the names OpenAI gave the fields, as `Sampling`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import kind_of, parse_stop
from hhh_router.types import Sampling

ANY_OBJECT = '{"type":"object"}'
"""The schema of JSON mode."""
_TOKEN_ID = re.compile(r"[0-9]{1,18}")  # JSON has no keys but strings


def parse_sampling(
    *,
    max_tokens: Any = None,
    temperature: Any = None,
    top_p: Any = None,
    top_k: Any = None,
    seed: Any = None,
    stop: Any = None,
    logit_bias: Any = None,
    logprobs: Any = None,
    top_logprobs: Any = None,
    response_format: Any = None,
) -> Sampling:
    """Sampling settings from what a door was given; None leaves the default. Ranges are checked by the pipeline.

    Args:
        max_tokens: See `Sampling`, as for the next four.
        temperature: As above.
        top_p: As above.
        top_k: As above.
        seed: As above.
        stop: One or several strings.
        logit_bias: Token id, a number or its digits → bias.
        logprobs: Whether log-probabilities are told.
        top_logprobs: Likeliest tokens told with each; alone it asks for log-probabilities too.
        response_format: OpenAI's object, or a pydantic model.

    Raises:
        InvalidRequest: A field is not built as it should be.
    """
    plain = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    return Sampling(
        stop=parse_stop(stop),
        logit_bias=_biases(logit_bias),
        top_logprobs=_top_logprobs(logprobs, top_logprobs),
        json_schema=_schema(response_format),
        **{name: value for name, value in plain.items() if value is not None},
    )


def _biases(given: object) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"logit_bias: found {kind_of(given)}", hint='send an object, such as {"50256": -100}')
    biases: dict[int, float] = {}
    for token, bias in given.items():
        if isinstance(token, str):
            if not _TOKEN_ID.fullmatch(token):
                raise InvalidRequest(f"logit_bias: found token {token[:40]!r}", hint="use token ids, not their text")
            token = int(token)
        biases[token] = bias
    return biases


def _top_logprobs(asked: object, top: Any) -> int | None:
    """
    >>> _top_logprobs(True, None), _top_logprobs(None, 3), _top_logprobs(False, 0), _top_logprobs(None, None)
    (0, 3, None, None)
    """
    if asked is not None and not isinstance(asked, bool):
        raise InvalidRequest(f"logprobs: found {kind_of(asked)}", hint="send true or false")
    if asked is False:
        if top:
            raise InvalidRequest("top_logprobs: found without logprobs", hint='send "logprobs": true with it')
        return None
    told: int | None = 0 if top is None and asked else top
    return told


def _schema(given: object) -> str | None:
    """The JSON schema a reply must follow, as text; None leaves it free.

    >>> _schema({"type": "json_object"})
    '{"type":"object"}'
    """
    if given is None:
        return None
    if isinstance(given, type) and hasattr(given, "model_json_schema"):
        given = {"type": "json_schema", "json_schema": {"schema": given.model_json_schema()}}
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            f"response_format: found {kind_of(given)}", hint='send an object, such as {"type": "json_object"}'
        )
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            return _given_schema(given.get("json_schema"))
        case other:
            found = repr(other[:40]) if isinstance(other, str) else kind_of(other)
            raise InvalidRequest(
                f"response_format.type: found {found}", hint="use 'text', 'json_object' or 'json_schema'"
            )


def _given_schema(named: object) -> str:
    here = "response_format.json_schema"
    if not isinstance(named, Mapping):
        raise InvalidRequest(f"{here}: found {kind_of(named)}", hint='send {"name": "…", "schema": {…}}')
    schema = named.get("schema")
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{here}.schema: found {kind_of(schema)}", hint='send an object, such as {"type": …}')
    try:
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"{here}.schema: no JSON: {said}", hint="send a JSON schema") from error
