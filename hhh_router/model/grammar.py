"""Replies that must follow a JSON schema: which tokens may come next, worked out by llguidance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hhh_router.errors import GeneratorError, InvalidRequest, MissingExtra

_LONGEST_SCHEMA = 65_536  # characters: compiling takes time in proportion


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
            schema: JSON schema, as text.

        Raises:
            InvalidRequest: Too long, no JSON, or a schema that cannot be followed.
            MissingExtra: llguidance is not installed.
        """
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingExtra("model", needed_for="response_format") from error
        if len(schema) > _LONGEST_SCHEMA:
            raise InvalidRequest(
                f"response_format: a schema of {len(schema)} characters", hint=f"use at most {_LONGEST_SCHEMA}"
            )
        if self._made is None:  # takes a second
            self._made = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._ends))
        try:
            # a bounded run of blanks: a small model may otherwise write them to the end of its budget
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                schema, defaults={"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{0,2}"}
            )
        except ValueError as error:
            raise InvalidRequest(f"response_format: {error}", hint="send a JSON schema") from error
        matcher = llguidance.LLMatcher(self._made, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(
                f"response_format: {matcher.get_error()}", hint="leave out what the schema asks beyond this"
            )
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
        """Go on behind a token that was drawn.

        Raises:
            GeneratorError: It may not come here.
        """
        if not self._matcher.consume_token(token):
            raise GeneratorError(f"the reply left its schema: {self._matcher.get_error()}")
