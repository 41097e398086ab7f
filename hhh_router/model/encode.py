"""From messages to tokens, with the spans that the heads pool over."""

from __future__ import annotations

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
    """The last turn's own text, without template and system prompt: what the prompt view averages over."""
    has_prompt: bool
    """False when only a response is read, behind an empty turn."""

    @property
    def has_response(self) -> bool:
        """True when response tokens follow the prompt."""
        return len(self.ids) > self.prompt_tokens


class Encoder:
    """Applies a backbone's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens

    def encode(self, request: ReadRequest) -> Encoded:
        """Tokens of a prompt, a response, or both, in one sequence.

        Raises:
            InvalidRequest: The model's template refuses the conversation (its own words are given).
            ContextTooLong: More tokens than the model's window.
        """
        messages = request.messages or _NO_PROMPT
        text = self._render(messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        focus = _span(text, messages[-1].content, encoded["offset_mapping"])
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
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids or [self.end_id]

    @property
    def end_id(self) -> int:
        """The token that ends a turn."""
        return int(self.tokenizer.eos_token_id)

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
