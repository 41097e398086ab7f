"""What of an MCP message is text that a model will see, and what of it nobody here can read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_TELLS_NOTHING = frozenset({"type", "$schema", "$ref", "format", "required", "mimeType"})
"""Keys whose values are words of a schema, not of a person."""
_SEEN_APART = frozenset({"content", "structuredContent", "isError", "_meta", "resultType", "task"})


def leaves(value: Any) -> Iterator[str]:
    """Every text in a JSON value, in order.

    >>> list(leaves({"path": "a.txt", "type": "object", "tags": ["b", 1]}))
    ['a.txt', 'b']
    """
    waiting = [value]
    while waiting:  # no recursion: how deep it goes is up to whoever writes it
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            waiting.extend(inner for key, inner in reversed(list(one.items())) if key not in _TELLS_NOTHING)
        elif isinstance(one, list):
            waiting.extend(reversed(one))


def of_result(result: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The text of a tool's result, and its parts that are none."""
    texts: list[str] = []
    unread: list[str] = []
    content = result.get("content")
    for i, block in enumerate(content if isinstance(content, list) else [content] if content is not None else []):
        _read_block(block, f"content[{i}]", texts, unread)
    if (structured := result.get("structuredContent")) is not None and not _is_said(structured, texts):
        texts += leaves(structured)
    texts += leaves({k: v for k, v in result.items() if k not in _SEEN_APART})
    return "\n".join(text for text in texts if text.strip()), unread


def of_error(message: str, data: Any) -> str:
    """The text of a JSON-RPC error, which clients show to their model too."""
    return "\n".join(text for text in (message, *leaves(data)) if text.strip())


def of_definition(tool: Mapping[str, Any]) -> str:
    """The text of a tool's definition, as the model is told of it."""
    return "\n".join(text for text in leaves({k: v for k, v in tool.items() if k not in ("_meta", "icons")}) if text)


def _read_block(block: Any, place: str, texts: list[str], unread: list[str]) -> None:
    match block:
        case {"type": "text", "text": str(text)}:
            texts.append(text)
        case {"type": "resource", "resource": {"text": str(text)}}:
            texts.append(text)
        case {"type": "image" | "audio" as kind}:
            unread.append(f"{place}: {kind}")
        case {"type": "resource", "resource": {"blob": _}}:
            unread.append(f"{place}: blob")
        case _:  # a link to a resource, or a kind that is not known yet: whatever is text in it
            texts += leaves(block)


def _is_said(structured: Any, texts: list[str]) -> bool:
    """Whether a text already tells the same: servers send structured content as text too."""
    for text in texts:
        try:
            if json.loads(text) in (structured, structured.get("result") if isinstance(structured, dict) else None):
                return True
        except (ValueError, RecursionError):
            if isinstance(structured, dict) and structured == {"result": text}:
                return True
    return False
