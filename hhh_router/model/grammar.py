"""Replies that must follow a JSON schema: which tokens may come next, worked out by llguidance."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hhh_router.errors import InvalidRequest, MissingExtra

_MOST_REMAINDERS = 10_000  # compiling `multipleOf` takes time in their square: 0.5 s here, 45 s for a million


class Grammars:
    """Compiles schemas for one tokenizer. Used by one thread, the model's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: frozenset[int]) -> None:
        """For logits of ``vocabulary`` entries, some more than the tokenizer has words; ``ends`` end a reply."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = ends
        self._made: Any = None

    def follow(self, schema: str) -> Following:
        """A matcher at the beginning of a reply.

        Args:
            schema: JSON schema, as text; its size has been checked.

        Raises:
            InvalidRequest: No JSON, or a schema that cannot be followed.
            MissingExtra: llguidance is not installed.
        """
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingExtra("model", needed_for="response_format") from error
        if self._made is None:  # takes a second
            self._made = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._ends))
        try:
            # a bounded run of blanks: a small model may otherwise write them to the end of its budget
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                schema, defaults={"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{0,2}"}
            )
        except ValueError as error:
            raise InvalidRequest(f"response_format: {error}", hint="send a JSON schema") from error
        _check_multiples(json.loads(schema))
        matcher = llguidance.LLMatcher(self._made, grammar, log_level=0)
        if matcher.is_error():
            raise _beyond(matcher)
        return Following(matcher, self._vocabulary)


class Following:
    """One reply under a schema."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

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
            raise _beyond(self._matcher)


def _beyond(matcher: Any) -> InvalidRequest:
    said = matcher.get_error().split("\n", 1)[0]  # its own state follows
    return InvalidRequest(f"response_format: {said}", hint="make the schema simpler, or leave that part out")


def _check_multiples(schema: object) -> None:
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
            f"response_format: multipleOf with {max(found)} and {len(found)} different values in all",
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
