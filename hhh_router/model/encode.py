"""From messages to tokens, with the spans that the heads pool over."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hhh_router.errors import ContextTooLong, InvalidRequest
from hhh_router.types import Message, ReadRequest

_NO_PROMPT = (Message(role="user", content=""),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Token ids of one text and where its views are; spans are half-open."""

    ids: tuple[int, ...]
    prompt_tokens: int
    """Tokens up to the end of the generation prompt; the response follows."""
    focus: tuple[int, int]
    """The last turn's own text, without template and system prompt: where the prompt's view begins."""
    has_prompt: bool
    """False when only a response is read, behind an empty turn."""

    @property
    def prompt_span(self) -> tuple[int, int]:
        """Tokens the heads read of the prompt: the last turn's text and the template's marks behind it."""
        return (self.focus[0], self.prompt_tokens)

    @property
    def has_response(self) -> bool:
        """True when response tokens follow the prompt."""
        return len(self.ids) > self.prompt_tokens


class Encoder:
    """Applies a backbone's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self._marks = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)

    def reply_tokens(self, prompt_tokens: int, wanted: int) -> int:
        """Tokens that a reply may have behind a prompt.

        Raises:
            ContextTooLong: The prompt leaves no room for any.
        """
        left = self.context_tokens - prompt_tokens
        if left < 1:
            raise ContextTooLong(
                f"the prompt is {prompt_tokens} tokens and fills the model's window of {self.context_tokens}",
                hint="shorten the conversation",
            )
        return min(wanted, left)

    def encode(self, request: ReadRequest) -> Encoded:
        """Tokens of a prompt, a response, or both, in one sequence.

        Raises:
            InvalidRequest: The model's template refuses the conversation (its own words are given).
            ContextTooLong: More tokens than the model's window.
        """
        messages = request.messages or _NO_PROMPT
        if any(mark in m.content for m in messages for mark in self._marks):
            ids, focus = self._apart(messages)
        else:
            ids, focus = self._together(messages)
        prompt_tokens = len(ids)
        if request.response is not None:
            ids += self.response_ids(request.response)
        if len(ids) > self.context_tokens:
            raise ContextTooLong(
                f"the text is {len(ids)} tokens, the model's window is {self.context_tokens}",
                hint="shorten the conversation or the document",
            )
        return Encoded(ids=tuple(ids), prompt_tokens=prompt_tokens, focus=focus, has_prompt=bool(request.messages))

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a reply, without an end marker; an empty reply is one end-of-text token, so that it can be read."""
        return self._plain_ids(text) or [self.end_id]

    @property
    def end_id(self) -> int:
        """The token that ends a turn."""
        return int(self.tokenizer.eos_token_id)

    def _together(self, messages: Sequence[Message]) -> tuple[list[int], tuple[int, int]]:
        """Tokens of the rendered conversation, and the span of the last turn's text."""
        text = self._render(messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), _span(text, messages[-1].content, encoded["offset_mapping"])

    def _apart(self, messages: Sequence[Message]) -> tuple[list[int], tuple[int, int]]:
        """The same with every turn's text in tokens of its own.

        A turn that spells out the template's marks, such as ``<|im_end|>``, must not become one: its writer could end
        the turn and speak as somebody else.
        """
        name = secrets.token_hex(8)
        stand_ins = [Message(role=m.role, content=f"{name}-{i}-") for i, m in enumerate(messages)]
        ids: list[int] = []
        focus = None
        for i, piece in enumerate(re.split(rf"{name}-(\d+)-", self._render(stand_ins))):
            if i % 2 == 0:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
                continue
            start = len(ids)
            ids += self._plain_ids(messages[int(piece)].content)
            if int(piece) == len(messages) - 1:
                focus = (start, len(ids))
        return ids, focus or (0, len(ids))

    def _plain_ids(self, text: str) -> list[int]:
        """Tokens of text in which nothing is a special token, whatever it spells."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _render(self, messages: Sequence[Message]) -> str:
        turns: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise jinja2 errors of any kind; all mean the same to the caller
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}",
                hint="check the order of roles; some models know no system or tool turns",
            ) from error
        return str(rendered)


def _span(text: str, content: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Tokens that cover the last occurrence of ``content`` in ``text``; templates may strip it."""
    needle = content if content in text else content.strip()
    start = text.rfind(needle) if needle else -1
    if start < 0:
        return (0, len(offsets))
    stop = start + len(needle)
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop]
    return (inside[0], inside[-1] + 1) if inside else (0, len(offsets))
