"""What the tests of the MCP proxy share: a policy, a proxy in front of a server as processes, and what reached whom."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mcp import Client, StdioServerParameters
from mcp.types import ElicitResult

from hhh_router.trace.audit import read_rows

HERE = Path(__file__).parent
SERVER = [sys.executable, str(HERE / "mcp_server.py")]
PROXY = [sys.executable, str(HERE / "mcp_proxied.py"), *SERVER]

RULES = """
  tool_call:
    - when: {tool.name: [drop_*]}
      then: block
      message: "{tool} is never run here."
    - when: {conversation.tainted: true, tool.name: [read_*]}
      then: block
      message: "Nothing is read after an untrusted page."
    - when: {tool.name: [delete_*], tool.arguments.path: "/tmp/*"}
      then: allow
    - when: {tool.name: [delete_*]}
      then: hold
    - then: allow
  tool_result:
    - when: {needs.injection: ">= 0.80"}
      then: block
      message: "What {tool} brought back was withheld."
    - when: {tool.name: fetch}
      then: flag
    - then: allow
"""


def write_policy(folder: Path, rules: str = RULES, more: str = "") -> Path:
    file = folder / "tools.yaml"
    file.write_text(f"version: 1\nname: tools\nextends: balanced\n{more}\ncheckpoints:{rules}")
    return file


class World:
    """A folder with everything a test looks at afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.audit, self.queue = folder / "audit.sqlite3", folder / "held.sqlite3"
        self._calls = folder / "calls"
        self._calls.touch()

    @property
    def calls(self) -> list[list[Any]]:
        """What the server saw."""
        return [json.loads(line) for line in self._calls.read_text().splitlines()]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [json.loads(row.record) for row in read_rows(self.audit) if row.kind == kind]

    def environment(self, policy: Path, **options: Any) -> dict[str, str]:
        import os

        proxy = {"policy": str(policy), "audit": str(self.audit), "queue": str(self.queue), **options}
        return {**os.environ, "CALLS": str(self._calls), "PROXY": json.dumps(proxy)}

    @asynccontextmanager
    async def client(
        self,
        rules: str = RULES,
        more: str = "",
        *,
        command: list[str] | None = None,
        environ: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncIterator[Client]:
        """A client of the SDK's with the proxy as its server; ``command`` puts another in its place."""
        environment = self.environment(write_policy(self.folder, rules, more), **options) | (environ or {})
        command, *args = command or PROXY
        parameters = StdioServerParameters(command=command, args=args, env=environment)
        async with Client(parameters, **(settings or {})) as client:
            yield client


async def introduce(context: Any, params: Any) -> ElicitResult:
    """How the client answers a server that asks who it is."""
    return ElicitResult(action="accept", content={"name": "Bo"})


def said(result: Any) -> str:
    """The text of a result."""
    return "\n".join(block.text for block in result.content)
