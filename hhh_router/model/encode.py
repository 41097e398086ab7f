"""From messages to tokens, with the spans that the heads pool over."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from hhh_router.errors import ContextTooLong, InvalidRequest
from hhh_router.tools import OPEN, as_openai, as_text
from hhh_router.types import ChatRequest, Message, ReadRequest, Tool

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
        added = tokenizer.added_tokens_decoder.values()
        self._marks = tuple(t.content for t in added if t.special)
        template = tokenizer.chat_template
        self.writes_tools = isinstance(template, str) and "tools" in template and OPEN in template
        """Whether the chat template tells of tools, each call between marks of its own, as Hermes' and Qwen's do."""
        self.call_marks = OPEN in {t.content for t in added if not t.special}
        """Whether ``<tool_call>`` is a token of its own."""
        if OPEN in self._marks:  # its text would not be shown, so calls could not be told from words
            self.writes_tools = False

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
        messages, tools = request.messages or _NO_PROMPT, request.tools
        if self.writes_tools:
            self._check_calls(messages, tools)
        else:
            messages, tools = as_text(messages, tools), ()
        if any(mark in m.content for m in messages for mark in self._marks):
            ids, focus = self._apart(messages, tools)
        else:
            ids, focus = self._together(messages, tools)
        prompt_tokens = len(ids)
        if request.response is not None:
            ids += self.response_ids(request.response)
        self.check_length(len(ids))
        return Encoded(ids=tuple(ids), prompt_tokens=prompt_tokens, focus=focus, has_prompt=bool(request.messages))

    def check_length(self, tokens: int) -> None:
        """Whether a text can be read.

        Raises:
            ContextTooLong: More tokens than the model's window.
        """
        if tokens > self.context_tokens:
            raise ContextTooLong(
                f"the text is {tokens} tokens, the model's window is {self.context_tokens}",
                hint="shorten the conversation or the document",
            )

    def prompt(self, request: ChatRequest) -> Encoded:
        """Tokens of what a reply is to follow.

        Raises:
            InvalidRequest: The template refuses it, or a token is none of the vocabulary.
            ContextTooLong: More tokens than the model's window.
        """
        if not request.continues:
            tools = request.tools.tools if request.tools else ()
            return self.encode(ReadRequest(messages=request.messages, tools=tools))
        ids = request.prompt_ids
        if unknown := [i for i in ids if i >= len(self.tokenizer)]:
            raise InvalidRequest(
                f"prompt: found token {unknown[0]}", hint=f"this model's tokens are 0 to {len(self.tokenizer) - 1}"
            )
        if not ids:
            [message] = request.messages
            ids = tuple(self.tokenizer(message.content, split_special_tokens=True)["input_ids"])
        if len(ids) > self.context_tokens:
            raise ContextTooLong(
                f"the prompt is {len(ids)} tokens, the model's window is {self.context_tokens}", hint="shorten it"
            )
        return Encoded(ids=ids, prompt_tokens=len(ids), focus=(0, len(ids)), has_prompt=True)

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a reply, without an end marker; an empty reply is one end-of-text token, so that it can be read."""
        return self._plain_ids(text) or [self.end_id]

    def plain(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens of text in which nothing is a special token, and where each of them ends, in characters."""
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return list(found["input_ids"]), [end for _, end in found["offset_mapping"]]

    @property
    def end_id(self) -> int:
        """The token that ends a turn."""
        return int(self.tokenizer.eos_token_id)

    def _check_calls(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """The template writes tools and calls itself, so their text cannot be kept apart from its marks.

        Raises:
            InvalidRequest: A tool or a call spells out a mark.
        """
        given = [(f"tools[{i}]", [t.description, t.parameters]) for i, t in enumerate(tools)]
        given += [(f"messages[{i}].tool_calls", [c.arguments for c in m.tool_calls]) for i, m in enumerate(messages)]
        for where, texts in given:
            if found := next((mark for mark in self._marks for text in texts if mark in text), None):
                raise InvalidRequest(f"{where}: holds the model's own mark {found}", hint="leave it out")

    def _together(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[int], tuple[int, int]]:
        """Tokens of the rendered conversation, and the span of the last turn's text."""
        text = self._render(messages, tools)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), _span(text, messages[-1].content, encoded["offset_mapping"])

    def _apart(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[int], tuple[int, int]]:
        """The same with every turn's text in tokens of its own.

        A turn that spells out the template's marks, such as ``<|im_end|>``, must not become one: its writer could end
        the turn and speak as somebody else.
        """
        name = secrets.token_hex(8)
        stand_ins = [replace(m, content=f"{name}-{i}-") for i, m in enumerate(messages)]
        ids: list[int] = []
        focus = None
        for i, piece in enumerate(re.split(rf"{name}-(\d+)-", self._render(stand_ins, tools))):
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

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        told = [as_openai(tool) for tool in tools] or None
        turns = [_turn(m) for m in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(turns, tools=told, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise jinja2 errors of any kind; all mean the same to the caller
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}",
                hint="check the order of roles; some models know no system or tool turns",
            ) from error
        return str(rendered)


def _turn(message: Message) -> dict[str, Any]:
    """As chat templates take it: a call's arguments are an object there."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
            for c in message.tool_calls
        ]
    return turn


def _span(text: str, content: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Tokens that cover the last occurrence of ``content`` in ``text``; templates may strip it."""
    needle = content if content in text else content.strip()
    start = text.rfind(needle) if needle else -1
    if start < 0:
        return (0, len(offsets))
    stop = start + len(needle)
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop]
    return (inside[0], inside[-1] + 1) if inside else (0, len(offsets))
