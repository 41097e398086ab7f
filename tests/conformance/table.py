"""docs/conformance.md: what came of every client, as one table with its reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.conformance.catalogue import FEATURES, Client

Result = Mapping[str, Any]

MARKS = {"pass": "pass", "fail": "**fail**", "not tested": "n. t."}
BY_STAND_IN = "*"
LONGEST = 400  # characters of a reason

_HEAD = """\
# Conformance

Other people's clients against `hhh-router serve`, written by `make conformance`; each client in an environment of its
own. **pass**: what it asked for came, by its own parsing. **fail** and **n. t.** (not tested) have their reason below
the table. An empty field: the client does not speak of it, or nobody has written a script for it. A star: a stand-in
answered (`tests/conformance/scripted.py`), which calls every tool once, for the default model of 135M parameters hardly
ever calls one by itself; everything else is the default bundle under `balanced`. What each script asserts:
`tests/conformance/clients/`.

"""
_EXPLAINED = {
    "example": "the example of [clients.md](clients.md)",
    "own checks": "what a suite itself measures; told below",
}


def page(clients: Sequence[Client], results: Mapping[str, Result]) -> str:
    """The whole page: one row a client, one column a feature, and below it versions and reasons.

    Args:
        clients: In the order of the rows.
        results: Name → what `run` kept of it; a client without one has not been run.
    """
    lines = [f"| client | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 1) + "|"]
    for client in clients:
        cells = [_cell(results.get(client.name), feature) for feature in FEATURES]
        lines.append(f"| {client.name} | {' | '.join(cells)} |")
    explained = "".join(f"\n`{name}`: {text}." for name, text in _EXPLAINED.items())
    told = "\n".join(_told(client, results.get(client.name)) for client in clients)
    return f"{_HEAD}" + "\n".join(lines) + f"\n{explained}\n\n## Versions, reasons and figures\n{told}\n"


def _cell(result: Result | None, feature: str) -> str:
    for found in (result or {}).get("found", ()):
        if found["feature"] == feature:
            return MARKS[found["outcome"]] + (BY_STAND_IN if found["by"] == "scripted" else "")
    return ""


def _told(client: Client, result: Result | None) -> str:
    if result is None:
        return f"- **{client.name}**: not run."
    if "obstacle" in result:
        return f"- **{client.name}** ({', '.join(client.packages)}): not tested: {result['obstacle']}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"- **{client.name}** ({versions or client.told})"]
    if "broke" in result:
        lines.append(f"  - **fail**: {_short(result['broke'])}")
    for found in result["found"]:
        if found["told"] or found["outcome"] != "pass":
            lines.append(f"  - {found['feature']}: {MARKS[found['outcome']]}: {_short(found['told'])}")
    return "\n".join(lines)


def _short(text: str) -> str:
    """One line, cut where it is too long.

    >>> _short("a\\nb")
    'a b'
    """
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
