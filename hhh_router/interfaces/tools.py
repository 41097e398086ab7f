"""Tools as OpenAI's wires tell of them, as `Toolset`; other wires translate into this form first."""

from __future__ import annotations

import json
from collections.abc import Mapping

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import checked_name, kind_of, rows_of
from hhh_router.types import Tool, Toolset

MOST_TOOLS = 128
"""As on OpenAI's wire."""
_CHOICES = "'none', 'auto', 'required', or a tool by its name"


def parse_tools(tools: object, choice: object = None, parallel: object = None) -> Toolset | None:
    """What a model may call; None where it may call nothing.

    Args:
        tools: ``{"type": "function", "function": {"name", "description", "parameters", "strict"}}``, or the same
            without the inner object, as the responses wire has it.
        choice: ``tool_choice``: a word, a tool, or a list of those that are allowed.
        parallel: ``parallel_tool_calls``; None stands for true.

    Raises:
        InvalidRequest: No list of tools with different names, or a choice of none of them.
    """
    if parallel is not None and not isinstance(parallel, bool):
        raise InvalidRequest(f"parallel_tool_calls: found {kind_of(parallel)}", hint="send true or false")
    found = _tools(tools)
    required, only = _choice(choice)
    names = [t.name for t in found]
    if unknown := [name for name in only if name not in names]:
        raise InvalidRequest(
            f"tool_choice: {unknown[0][:80]!r} is none of the tools", hint=f"there are {', '.join(names) or 'none'}"
        )
    if required and not found:
        raise InvalidRequest("tool_choice: a call is asked for, and there are no tools", hint="send tools with it")
    if not found or choice == "none":
        return None
    return Toolset(tools=found, required=required, only=only, parallel=parallel is not False)


def _tools(given: object) -> tuple[Tool, ...]:
    rows = rows_of(given, "tools", "send a list of tools", MOST_TOOLS)
    tools = tuple(_tool(row, f"tools[{i}]") for i, row in enumerate(rows))
    names = [t.name for t in tools]
    if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
        raise InvalidRequest(f"tools: {twice!r} is there twice", hint="give every tool a name of its own")
    return tools


def _tool(row: object, here: str) -> Tool:
    if not isinstance(row, Mapping):
        raise InvalidRequest(f"{here}: found {kind_of(row)}", hint='send {"type": "function", "function": {…}}')
    if row.get("type", "function") != "function":
        raise InvalidRequest(
            f"{here}.type: found {str(row['type'])[:40]!r}, not supported", hint="send tools of type 'function'"
        )
    inner, at = (row["function"], f"{here}.function") if "function" in row else (row, here)
    if not isinstance(inner, Mapping):
        raise InvalidRequest(f"{at}: found {kind_of(inner)}", hint='send {"name": "…", "parameters": {…}}')
    name = checked_name(inner.get("name"), f"{at}.name")
    description, strict = inner.get("description") or "", inner.get("strict")
    if not isinstance(description, str):
        raise InvalidRequest(f"{at}.description: found {kind_of(description)}", hint="send text")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(f"{at}.strict: found {kind_of(strict)}", hint="send true or false")
    return Tool(
        name=name,
        description=description,
        parameters=_parameters(inner.get("parameters"), f"{at}.parameters"),
        strict=bool(strict),
    )


def _parameters(schema: object, here: str) -> str:
    """A schema of an object, whatever else it says: arguments always are one."""
    if schema is None:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{here}: found {kind_of(schema)}", hint='send a JSON schema: {"type": "object", …}')
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{here}.type: found {str(schema['type'])[:40]!r}", hint="use 'object'")
    whole = {"type": "object", **schema}
    if not schema:
        whole["properties"] = {}
    try:
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{here}: no JSON: {type(error).__name__}", hint="send a JSON schema") from error


def _choice(given: object) -> tuple[bool, tuple[str, ...]]:
    """Whether a call is required, and the names of those allowed; none stands for all."""
    match given:
        case None | "auto" | "none":
            return False, ()
        case "required":
            return True, ()
        case {"type": "function", "function": {"name": name}} | {"type": "function", "name": name}:
            return True, (checked_name(name, "tool_choice.name"),)
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": rows}} | {
            "type": "allowed_tools", "mode": mode, "tools": rows,
        }:  # fmt: skip
            if mode not in ("auto", "required"):
                raise InvalidRequest("tool_choice.mode: is neither 'auto' nor 'required'", hint="use one of them")
            chosen = [_choice(row)[1] for row in rows_of(rows, "tool_choice.tools", "send a list", MOST_TOOLS)]
            return mode == "required", tuple(name for names in chosen for name in names)
    raise InvalidRequest(
        f"tool_choice: found {given[:40]!r}" if isinstance(given, str) else f"tool_choice: found {kind_of(given)}",
        hint=f"use {_CHOICES}",
    )
