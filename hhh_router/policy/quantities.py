"""The closed list of what conditions can ask about.

A new condition is one row in ``QUANTITIES``, and its row in docs/policies.md. Two rows stand for many names each:
``headers.NAME`` and ``tool.arguments.PATH``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from hhh_router.policy.arguments import ROOT, parse_path, select
from hhh_router.types import EXPERTS, NEEDS, OUTCOMES, Mode, Situation, Weights

Kind = Literal["number", "boolean", "choice", "count", "names", "patterns", "hours", "argument"]
"""What the right-hand side of a condition may be."""

CHECKPOINTS: tuple[str, ...] = ("input", "output", "tool_call", "tool_result", "session")
"""Where rules are asked: before the reply, for each window and the end of it, before a tool runs, before the model sees
what came back from it, and once a turn about the conversation as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the rules of one checkpoint may ask about."""

    needs: Mapping[str, float]
    """P(the request needs this behaviour), calibrated."""
    outcomes: Mapping[str, float]
    """P(the reply is unsafe / untruthful / unhelpful), calibrated; at ``input`` those of the prompt alone."""
    weights: Weights
    """What is applied."""
    confidence: float | None
    """Calibrated P(every verdict so far is right); None where it is not known yet."""
    in_distribution: bool | None
    """False where the reading lies outside the calibration data; None where nothing was read."""
    mode: Mode | None
    """What the reading saw; None where nothing was read."""
    situation: Situation = field(default_factory=Situation)
    """What surrounds the reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One thing a condition can ask about."""

    kind: Kind
    read: Callable[[Facts], Any]
    """Its value; None where it was not measured or is not known."""
    meaning: str
    """One line for people."""
    choices: tuple[str, ...] = ()
    """The values of a ``choice``."""
    before_weights: bool = True
    """True when it is known before the weights are, so that a floor may ask about it."""
    checkpoints: tuple[str, ...] = CHECKPOINTS
    """Where it can be asked."""
    of_reading: bool = False
    """True when the model measures it; all else has to come from the door, see `doors`."""


_INJECTION = "P(the request tries to override its instructions)"
_TOOLS = ("tool_call", "tool_result")
_HEADER = re.compile(r"headers\.[a-z0-9][a-z0-9_-]{0,63}")
_SECRET_HEADERS = re.compile(r"authorization|cookie|api-?_?key|token|secret|password|signature|credential")


def _readings() -> Iterator[tuple[str, Quantity]]:
    def number(meaning: str, read: Callable[[Facts], float | None], *, before_weights: bool = True) -> Quantity:
        return Quantity(kind="number", read=read, meaning=meaning, before_weights=before_weights, of_reading=True)

    for need in NEEDS:
        meaning = _INJECTION if need == "injection" else f"P(the request needs {need} behaviour)"
        yield f"needs.{need}", number(meaning, lambda facts, need=need: facts.needs.get(need))  # type: ignore[misc]
    for o in OUTCOMES:
        yield f"outcomes.{o}", number(f"P(the reply is {o})", lambda facts, o=o: facts.outcomes.get(o))  # type: ignore[misc]
    yield "confidence", number("P(every verdict so far is right)", lambda f: f.confidence, before_weights=False)
    yield (
        "in_distribution",
        Quantity(
            kind="boolean",
            read=lambda facts: facts.in_distribution,
            meaning="whether the reading lies inside the calibration data's support",
            of_reading=True,
        ),
    )
    for e in EXPERTS:
        meaning = f"applied weight of {'the model without adapters' if e == 'base' else f'the {e} expert'}"
        yield f"weights.{e}", number(meaning, lambda facts, e=e: getattr(facts.weights, e), before_weights=False)  # type: ignore[misc]
    yield (
        "mode",
        Quantity(
            kind="choice",
            read=lambda facts: facts.mode,
            meaning="what the reading saw",
            choices=("prompt", "response", "both"),
            of_reading=True,
        ),
    )


def _situations() -> Iterator[tuple[str, Quantity]]:
    def of(kind: Kind, meaning: str, read: Callable[[Situation], Any], **more: Any) -> Quantity:
        return Quantity(kind=kind, meaning=meaning, read=lambda facts: read(facts.situation), **more)

    roles = ("system", "user", "assistant", "tool")
    yield "role", of("choice", "who wrote what is judged", lambda s: s.role, choices=roles)
    yield (
        "language",
        of("names", "ISO 639-1 code of the text's language, or und", lambda s: s.language),
    )
    yield "length.characters", of("count", "characters of the text", lambda s: None if s.text is None else len(s.text))
    yield "length.tokens", of("count", "tokens that the reading saw", lambda s: s.tokens)
    yield "text", of("patterns", "the text holds one of some patterns", lambda s: s.text)
    yield "model", of("names", "the model the client named", lambda s: s.caller.model)
    yield "route", of("names", "the endpoint's path", lambda s: s.caller.route)
    yield "tenant", of("names", "whose traffic it is", lambda s: s.caller.tenant)
    yield "key.scope", of("names", "what the client's key opens", lambda s: s.caller.key_scopes)
    yield "headers.NAME", of("names", "a header of the request", lambda s: None)
    yield "time", of("hours", "the time of the week", lambda s: s.at)
    for name, meaning in (
        ("turns", "messages of the user in the conversation"),
        ("tool_calls", "tool calls in the conversation"),
        ("tokens", "tokens of the conversation"),
        ("refusals", "replies of the conversation that a policy stopped"),
        ("minutes", "minutes since the conversation began"),
    ):
        yield (
            f"conversation.{name}",
            of("count", meaning, lambda s, name=name: getattr(s.conversation, name)),  # type: ignore[misc]
        )
    yield (
        "conversation.tainted",
        of("boolean", "a tool has brought back what was not simply allowed", lambda s: s.conversation.tainted),
    )
    yield "tool.name", of("names", "the tool", lambda s: None if s.tool is None else s.tool.name, checkpoints=_TOOLS)
    yield "tool.arguments.PATH", of("argument", "an argument of the call", lambda s: None, checkpoints=_TOOLS)


QUANTITIES: Mapping[str, Quantity] = dict(_readings()) | dict(_situations())
"""Every condition there is."""

FAMILIES: Mapping[str, str] = {"headers.": "headers.NAME", "tool.arguments": "tool.arguments.PATH"}
"""How the names of a row that stands for many begin → the row."""


@lru_cache(maxsize=4096)
def find_quantity(name: str) -> Quantity | None:
    """The row that a condition's name belongs to, reading just what the name says; None where there is none.

    >>> find_quantity("needs.harmless").kind, find_quantity("headers.x-team").kind, find_quantity("headers.cookie")
    ('number', 'names', None)
    """
    if name in FAMILIES.values():
        return None
    if name.startswith("headers."):
        if not _HEADER.fullmatch(name) or _SECRET_HEADERS.search(name):
            return None
        row, header = QUANTITIES["headers.NAME"], name.removeprefix("headers.")
        return _like(row, lambda facts: _header(facts.situation, header))
    if name.startswith(ROOT):
        path = parse_path(name)
        if path is None:
            return None
        return _like(QUANTITIES["tool.arguments.PATH"], lambda facts: _argument(facts.situation, path))
    return QUANTITIES.get(name)


def row_of(name: str) -> str:
    """The row's own name, for a name that it stands for.

    >>> row_of("headers.x-team"), row_of("needs.honest")
    ('headers.NAME', 'needs.honest')
    """
    return next((row for start, row in FAMILIES.items() if name.startswith(start)), name)


def _like(row: Quantity, read: Callable[[Facts], Any]) -> Quantity:
    return Quantity(kind=row.kind, read=read, meaning=row.meaning, checkpoints=row.checkpoints)


def _header(situation: Situation, name: str) -> tuple[str, ...] | None:
    headers = situation.caller.headers
    if headers is None:
        return None
    return (headers[name],) if name in headers else ()


def _argument(situation: Situation, path: Any) -> tuple[Any, ...] | None:
    if situation.tool is None or situation.tool.arguments is None:
        return None
    return select(situation.tool.arguments, path)
