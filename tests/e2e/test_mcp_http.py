"""The MCP proxy over streamable HTTP, on either side of it."""

import asyncio
import hashlib
import hmac
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import httpx
import pytest
from mcp import Client, ClientSession, MCPError, StdioServerParameters, stdio_client

from hhh_router.interfaces.held import HeldCalls

from .mcp_guarded import HERE, PROXY, RULES, World, introduce, said, write_policy

pytestmark = pytest.mark.e2e


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@asynccontextmanager
async def serving(world: World, *, command: list[str] = PROXY, environ=None, **options) -> AsyncIterator[str]:
    """A proxy that listens; gives its URL."""
    environment = world.environment(write_policy(world.folder, RULES), port=0, **options) | (environ or {})
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        yield (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 30)


@asynccontextmanager
async def http_server(world: World) -> AsyncIterator[str]:
    """The server of the tests over HTTP."""
    port = free_port()
    environment = world.environment(Path("unused"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "mcp_server.py"), "--http", str(port), env=environment
    )
    try:
        for _ in range(300):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            except OSError:
                await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 30)


async def check_all(client: Client, world: World) -> None:
    progress: list[float] = []

    async def note(done: float, total: float | None, message: str | None) -> None:
        progress.append(done)

    offered = [tool.name for tool in (await client.list_tools()).tools]
    assert "read_file" in offered
    assert not {"drop_all", "poisoned"} & set(offered)
    assert said(await client.call_tool("read_file", {"path": "a"})) == "contents of a"
    assert (await client.call_tool("drop_all", {})).is_error
    assert said(await client.call_tool("slow", {"seconds": 0.2}, progress_callback=note)) == "done"
    assert progress == [1, 2, 3, 4]
    assert said(await client.call_tool("fetch", {"url": "evil"})) == "What fetch brought back was withheld."
    assert said(await client.call_tool("read_file", {"path": "b"})) == "Nothing is read after an untrusted page."
    assert (await client.get_prompt("hello", {"name": "Bo"})).messages
    assert [name for name, _ in world.calls] == ["read_file", "slow", "fetch"]


async def test_clients_over_http_have_a_session_and_a_server_each(world: World) -> None:
    async with serving(world) as url, Client(url, elicitation_callback=introduce) as first, Client(url) as second:
        await check_all(first, world)
        asked = await first.call_tool("greet", {})
        other = await second.call_tool("read_file", {"path": "mine"})

    assert said(asked) == "Hello Bo"
    assert said(other) == "contents of mine", "another session is not tainted"


async def test_a_server_over_http_is_guarded_for_a_client_over_stdio(world: World) -> None:
    async with http_server(world) as url, world.client(command=PROXY[:2], url=url) as client:
        await check_all(client, world)


async def test_a_server_over_http_is_guarded_for_a_client_over_http(world: World) -> None:
    async with (
        http_server(world) as url,
        serving(world, command=PROXY[:2], url=url) as proxied,
        Client(proxied) as client,
    ):
        await check_all(client, world)


async def test_a_server_that_dies_ends_one_session_over_http_and_no_other(world: World) -> None:
    async with serving(world) as url, Client(url) as bystander:
        await bystander.call_tool("read_file", {"path": "a"})
        async with Client(url) as client:
            with pytest.raises(Exception, match=r"has ended|closed|terminated"):
                await asyncio.wait_for(client.call_tool("crash", {}), 20)
        alive = await bystander.call_tool("read_file", {"path": "b"})

    assert not alive.is_error


async def test_a_server_that_is_not_there_is_told(world: World) -> None:
    url = f"http://127.0.0.1:{free_port()}/mcp"
    parameters = StdioServerParameters(
        command=PROXY[0], args=PROXY[1:2], env=world.environment(write_policy(world.folder), url=url)
    )
    async with stdio_client(parameters) as streams, ClientSession(*streams) as session:
        with pytest.raises(MCPError, match="cannot be reached"):
            await session.initialize()
        with pytest.raises(MCPError, match="cannot be reached"):
            await session.initialize()


async def test_http_asks_for_the_key_and_refuses_what_a_browser_would_send(world: World) -> None:
    headers = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
    hello = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    async with (
        serving(world, environ={"HHH_ROUTER_API_KEY": "hush"}) as url,
        httpx.AsyncClient(headers=headers) as http,
    ):
        without = await http.post(url, json=hello)
        key = {"authorization": "Bearer hush"}
        rebound = await http.post(url, json=hello, headers={**key, "host": "evil.example"})
        foreign = await http.post(url, json=hello, headers={**key, "origin": "https://evil.example"})
        unknown = await http.post(url, json=hello, headers={**key, "mcp-session-id": "guessed"})
        elsewhere = await http.post(url + "/other", json=hello, headers=key)
        large = await http.post(url, content=b"x" * 5_000_000, headers=key)

    statuses = [r.status_code for r in (without, rebound, foreign, unknown, elsewhere, large)]
    assert statuses == [401, 421, 403, 404, 404, 413]


class Hook(BaseHTTPRequestHandler):
    received: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        Hook.received.append((self.headers["x-hhh-signature"], body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


async def test_a_webhook_is_told_of_a_held_call_signed_and_without_secrets(world: World) -> None:
    hook = HTTPServer(("127.0.0.1", 0), Hook)
    Thread(target=hook.serve_forever, daemon=True).start()
    environ = {
        "HHH_ROUTER_HOLD_WEBHOOK": f"http://127.0.0.1:{hook.server_port}/held",
        "HHH_ROUTER_WEBHOOK_SECRET": "hush",
    }
    Hook.received.clear()
    async with world.client(environ=environ, hold_s=30) as client:
        path = "/etc/sk-canary0123456789abcdef"
        task = asyncio.create_task(client.call_tool("delete_file", {"path": path}))
        while not Hook.received:
            await asyncio.sleep(0.02)
        signed, body = Hook.received[0]
        told = json.loads(body)
        HeldCalls(world.queue).settle(told["call"]["id"], "approved", by="hook")
        result = await task
    hook.shutdown()
    hook.server_close()

    at = signed.split(",")[0].removeprefix("t=")
    expected = hmac.new(b"hush", f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    assert signed == f"t={at},v1={expected}"
    assert (told["event"], told["call"]["tool"]) == ("held", "delete_file")
    assert b"canary" not in body
    assert not result.is_error
    assert world.calls == [["delete_file", {"path": path}]], "what runs is what was asked, secrets and all"
