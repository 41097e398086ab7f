"""The installed command between the SDK's client and a server, reading with a real (tiny) model, here and elsewhere."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from hhh_router.assemble import build_pipeline
from hhh_router.interfaces.mcp.reading import read
from hhh_router.settings import Settings
from hhh_router.testing.tiny import tiny_bundle

from .mcp_guarded import SERVER, World, said, write_policy

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

COMMAND = str(Path(sys.executable).with_name("hhh-router"))
RULES = """
  tool_result:
    - when: {text: "page fine", needs.injection: ">= 0"}
      then: block
      message: measured
    - then: allow
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("mcp") / "tiny").root


def measured_here(bundle: Path, text: str) -> dict[str, float]:
    async def measure() -> dict[str, float]:
        pipeline = build_pipeline(Settings.load(bundle=str(bundle)))
        try:
            return dict((await read(pipeline, text)).needs)
        finally:
            await pipeline.aclose()

    return asyncio.run(measure())


def guard(world: World, bundle: Path, *options: str) -> tuple[str, str, dict[str, float]]:
    """What a client gets of two tools, and what the audit says was measured of the second's result."""
    given = ["--policy", str(write_policy(world.folder, RULES)), "--audit", str(world.audit), "--queue"]
    command = [COMMAND, "mcp-proxy", *given, str(world.queue), *options, "--", *SERVER]

    async def ask() -> tuple[str, str]:
        async with world.client(RULES, command=command) as client:
            read = await client.call_tool("read_file", {"path": "a"})
            fetched = await client.call_tool("fetch", {"url": "fine"})
            return said(read), said(fetched)

    first, second = asyncio.run(ask())
    return first, second, world.rows("outcome")[1]["hhh"]["readings"]["tool_result"]["needs"]


def test_the_command_reads_with_a_model_of_its_own(tmp_path: Path, bundle: Path) -> None:
    expected = measured_here(bundle, "page fine")

    first, second, needs = guard(World(tmp_path), bundle, "--bundle", str(bundle))

    assert (first, second) == ("contents of a", "measured")
    assert needs == pytest.approx(expected, abs=1e-4)


def test_the_command_lets_a_server_elsewhere_read(tmp_path: Path, bundle: Path) -> None:
    expected = measured_here(bundle, "page fine")
    served = subprocess.Popen(
        [COMMAND, "serve", "--port", "0", "--bundle", str(bundle)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert served.stdout is not None
        url = served.stdout.readline().split()[-1]
        first, second, needs = guard(World(tmp_path), bundle, "--guard-url", url)
    finally:
        served.terminate()
        served.wait(30)
        served.stdout.close()

    assert (first, second) == ("contents of a", "measured")
    assert needs == pytest.approx(expected, abs=1e-4)


def test_a_guard_that_is_gone_is_no_permission(tmp_path: Path, bundle: Path) -> None:
    world = World(tmp_path)

    with pytest.raises(KeyError):  # nothing was measured
        guard(world, bundle, "--guard-url", "http://127.0.0.1:9")

    decisions = world.rows("outcome")[1]["hhh"]["decisions"]
    assert (decisions[-1]["action"], decisions[-1]["rule"]) == ("block", "on_error")
