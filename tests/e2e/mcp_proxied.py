"""The MCP proxy as its own process, with a public fake in place of the model: the options are those of the command."""

import functools
import json
import os
import sys
from pathlib import Path

import anyio

from hhh_router.errors import ReaderError
from hhh_router.interfaces.mcp.open import plan_mcp, run_http, run_stdio
from hhh_router.interfaces.server.run import listen
from hhh_router.testing import FakeReader, fake_pipeline

RULES = {"IGNORE ALL PREVIOUS": {"needs.injection": 6.0}, "EVIL DEFINITION": {"needs.injection": 6.0}}


def broken(request):
    raise ReaderError("the model is gone")


if __name__ == "__main__":
    options = json.loads(os.environ["PROXY"])
    port = options.pop("port", None)
    reader = FakeReader(broken if options.pop("broken", False) else RULES)
    given = {"url": None, "bundle": None, "guard_url": None, "hold_s": None, "command": sys.argv[1:], **options}
    plan = plan_mcp(**{**given, "queue": Path(given["queue"])})
    guards = fake_pipeline(reader=reader)
    if port is None:
        sys.exit(anyio.run(run_stdio, plan, guards))
    with listen("127.0.0.1", port, plan.settings) as listening:
        ready = functools.partial(print, flush=True)
        anyio.run(functools.partial(run_http, plan, listening, guards, on_ready=ready))
