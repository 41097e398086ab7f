"""Servers on loopback for the tests of this folder."""

import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from hhh_router.interfaces.server.run import listen, make_server
from hhh_router.pipeline import Pipeline
from hhh_router.settings import Settings


@contextmanager
def served(pipeline: Pipeline) -> Iterator[str]:
    """The base URL of a pipeline's own server."""
    ready = threading.Event()
    with running(make_server(pipeline, on_ready=ready.set), ready) as url:
        yield url


@contextmanager
def served_app(app: ASGIApp) -> Iterator[str]:
    """The base URL of any other application, such as a stand-in for an upstream."""
    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            ready.set()

    config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    with running(Server(config), ready) as url:
        yield url


@contextmanager
def running(server: uvicorn.Server, ready: threading.Event) -> Iterator[str]:
    """The base URL of a server that sets ``ready`` once it listens."""
    with listen("127.0.0.1", 0, Settings.load()) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert ready.wait(20)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def listening(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a command that says ``listens on <URL>`` once it does; yields that URL."""
    with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody reads would block it once full
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=cwd, env=env)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"listens on (\S+)", line):
                    yield found.group(1)
                    break
            else:
                log.seek(0)
                raise RuntimeError(f"never listened: {log.read()[-2000:]}")
        finally:
            process.terminate()
            process.communicate(timeout=30)
