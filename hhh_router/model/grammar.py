"""Replies that must follow a JSON schema, or call tools: which tokens may come next, worked out by llguidance."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hhh_router.errors import InvalidRequest, MissingExtra
from hhh_router.model.encode import Encoder
from hhh_router.tools import call_grammar
from hhh_router.types import Toolset

_MOST_REMAINDERS = 10_000  # compiling `multipleOf` takes time in their square: 0.5 s here, 45 s for a million


class Grammars:
    """Compiles schemas for one tokenizer. Used by one thread, the model's own."""

    def __init__(self, encoder: Encoder, vocabulary: int, ends: frozenset[int]) -> None:
        """For logits of ``vocabulary`` entries, some more than the tokenizer has words; ``ends`` end a reply."""
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._ends = ends
        self._made: Any = None

    def follow(self, schema: str | None, tools: Toolset | None = None) -> Following | None:
        """A matcher at the beginning of a reply; None where the reply is free.

        Args:
            schema: JSON schema, as text, of a reply in words; its size has been checked.
            tools: What may be called; the sizes of their schemas have been checked.

        Raises:
            InvalidRequest: No JSON, or a schema that cannot be followed.
            MissingExtra: llguidance is not installed.
        """
        if schema is None and tools is None:
            return None
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            needed_for = "response_format" if tools is None else "tools"
            raise MissingExtra("model", needed_for=needed_for) from error
        if self._made is None:  # takes a second
            self._made = from_tokenizer(self._encoder.tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._ends))
        if tools is not None:
            grammar, where = self._calls(tools, schema), "tools"
        else:
            assert schema is not None
            grammar, where = _of_schema(schema), "response_format"
        for text in [*([schema] if schema else []), *(t.parameters for t in (tools.callable if tools else ()))]:
            _check_multiples(json.loads(text), where)
        matcher = llguidance.LLMatcher(self._made, grammar, log_level=0)
        if matcher.is_error():
            raise _beyond(matcher, where)
        return Following(matcher, self._vocabulary, where)

    def _calls(self, tools: Toolset, schema: str | None) -> str:
        return call_grammar(
            tools.callable,
            required=tools.required,
            parallel=tools.parallel,
            listed=not self._encoder.writes_tools,
            marks=self._encoder.call_marks,
            reply=schema,
        )


class Following:
    """One reply under a schema."""

    def __init__(self, matcher: Any, vocabulary: int, where: str) -> None:
        """Follow a matcher; ``where`` names the field that asks for it."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._where = where

    def mask(self, logits: Tensor) -> Tensor:
        """The logits, (V,), with every token that may not come next at minus infinity."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on behind a token that the mask let through.

        Raises:
            InvalidRequest: The schema turned out too large to be followed further.
        """
        if not self._matcher.consume_token(token):
            raise _beyond(self._matcher, self._where)


def _of_schema(schema: str) -> str:
    """
    Raises:
        InvalidRequest: No JSON schema.
    """
    import llguidance

    try:
        # a bounded run of blanks: a small model may otherwise write them to the end of its budget
        return str(
            llguidance.LLMatcher.grammar_from_json_schema(
                schema, defaults={"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{0,2}"}
            )
        )
    except ValueError as error:
        raise InvalidRequest(f"response_format: {error}", hint="send a JSON schema") from error


def _beyond(matcher: Any, where: str) -> InvalidRequest:
    said = matcher.get_error().split("\n", 1)[0]  # its own state follows
    return InvalidRequest(f"{where}: {said}", hint="make the schema simpler, or leave that part out")


def _check_multiples(schema: object, where: str) -> None:
    """Refuse what would take the model's thread for long: one bad number, or several that have to hold together."""
    found: set[int] = set()
    rest = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            found.add(_remainders(value.get("multipleOf")))
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    if math.prod(found) > _MOST_REMAINDERS:
        raise InvalidRequest(
            f"{where}: multipleOf with {max(found)} and {len(found)} different values in all",
            hint=f"the product of their digits' values may be {_MOST_REMAINDERS} at most",
        )


def _remainders(multiple: object) -> int:
    """How many remainders a reply's digits can leave; trailing zeros and the decimal point add none.

    >>> _remainders(7), _remainders(0.25), _remainders(1000), _remainders(None)
    (7, 25, 1, 1)
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not math.isfinite(multiple):
        return 1
    digits = Decimal(repr(multiple)).normalize().as_tuple().digits
    return max(1, int("".join(map(str, digits))))
