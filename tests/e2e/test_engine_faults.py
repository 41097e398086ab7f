"""The installed server when its engine dies, is drained, or gets more than it can take: through OpenAI's own client."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from hhh_router.testing.tiny import tiny_bundle

pytestmark = pytest.mark.e2e
COMMAND = str(Path(sys.executable).with_name("hhh-router"))
ASK = [{"role": "user", "content": "tell me something"}]
END_OF_TURN = "256"
LONG = {"max_tokens": 400, "logit_bias": {END_OF_TURN: -100}}
POLICY = """
version: 1
name: anything
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0
checkpoints: {input: [{then: allow}], output: [{then: allow}]}
stream: {window_tokens: 1}
"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="unused", max_retries=0, timeout=120)

    @property
    def engine(self) -> int:
        """Its engine's process, the only child it has."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def ready(self) -> httpx.Response:
        return httpx.get(self.url.removesuffix("/v1") + "/health/ready")


@contextmanager
def serving(folder: Path, bundle: Path, *command: str, **settings: str) -> Iterator[Server]:
    policy = folder / "anything.yaml"
    policy.write_text(POLICY)
    environment = {
        **os.environ,
        "HHH_ROUTER_THREADS": "1",
        "HHH_ROUTER_CACHE_DIR": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
        **{f"HHH_ROUTER_{name.upper()}": value for name, value in settings.items()},
    }
    arguments = [*(command or ("serve",)), "--port", "0", "--bundle", str(bundle), "--policy", str(policy)]
    with subprocess.Popen(
        [COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"listens on (\S+)", line):
                    yield Server(process, found.group(1))
                    break
            else:
                pytest.fail("never listened")
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("faults") / "tiny").root


@pytest.fixture
def server(tmp_path: Path, bundle: Path) -> Iterator[Server]:
    with serving(tmp_path, bundle, max_rows="4", max_waiting="2") as running:
        yield running


class Reading(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, server: Server, number: int, **fields: object) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._number = number
        self._fields = fields
        self.pieces = 0
        self.begun = threading.Event()
        self.error: Exception | None = None
        self.reason: str | None = None
        self.start()

    def run(self) -> None:
        asked = [{"role": "user", "content": f"tell me something, {self._number}"}]
        try:
            with (
                self._server.client as client,
                client.chat.completions.create(  # type: ignore[call-overload]
                    model="hhh-auto", messages=asked, stream=True, **self._fields
                ) as stream,
            ):
                for chunk in stream:
                    self._take(chunk)
        except Exception as error:  # each is looked at by its test
            self.error = error
        self.begun.set()

    def _take(self, chunk: ChatCompletionChunk) -> None:
        self.pieces += 1
        if self.pieces > 2:
            self.begun.set()
        if chunk.choices and chunk.choices[0].finish_reason:
            self.reason = chunk.choices[0].finish_reason


def wait(holds: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_a_killed_engine_ends_each_open_stream_with_an_error_and_is_replaced(server: Server) -> None:
    streams = [Reading(server, i, **LONG) for i in range(3)]
    for stream in streams:
        assert stream.begun.wait(60)
    assert [s.error for s in streams] == [None] * 3

    os.kill(server.engine, signal.SIGKILL)
    for stream in streams:
        stream.join(60)

    assert [type(s.error) for s in streams] == [openai.APIError] * 3
    assert "signal 9" in str(streams[0].error)
    refused = server.ready()
    assert (refused.status_code, refused.json()["status"]) == (503, "starting")
    assert int(refused.headers["retry-after"]) >= 1
    with server.client as client, pytest.raises(openai.InternalServerError) as told:
        client.chat.completions.create(model="hhh-auto", messages=ASK)  # type: ignore[arg-type]
    assert told.value.status_code == 503
    assert told.value.code == "unavailable"
    assert int(told.value.response.headers["retry-after-ms"]) > 0
    wait(lambda: server.ready().status_code == 200)
    with server.client as client:
        reply = client.chat.completions.create(model="hhh-auto", messages=ASK, max_tokens=4)  # type: ignore[arg-type]
    assert reply.usage is not None
    assert reply.usage.completion_tokens >= 1


def test_ten_times_the_load_gives_only_answers_and_429_with_retry_after(server: Server) -> None:
    crowd = [Reading(server, i, max_tokens=24, logit_bias={END_OF_TURN: -100}) for i in range(60)]
    for stream in crowd:
        stream.join(120)

    answered = [s for s in crowd if s.error is None]
    turned_away = [s.error for s in crowd if s.error is not None]
    assert {s.reason for s in answered} == {"length"}
    assert len(answered) >= 4
    assert turned_away
    for error in turned_away:
        assert isinstance(error, openai.RateLimitError)
        assert error.code == "overloaded"
        assert int(error.response.headers["retry-after"]) >= 1
    wait(lambda: server.ready().json()["engine"] == {"rows": 0, "waiting": 0, "waiting_texts": 0}, 10)


def test_sigterm_lets_replies_end_and_leaves_no_process(server: Server) -> None:
    short = Reading(server, 1, max_tokens=60, logit_bias={END_OF_TURN: -100})
    assert short.begun.wait(60)
    engine = server.engine

    server.process.send_signal(signal.SIGTERM)
    short.join(60)

    assert short.error is None
    assert short.reason == "length"
    server.process.wait(30)
    wait(lambda: not Path(f"/proc/{engine}").exists(), 20)


def test_a_sidecar_that_is_ended_lets_the_upstreams_reply_come_to_its_end(
    server: Server, tmp_path: Path, bundle: Path
) -> None:
    folder = tmp_path / "sidecar"
    folder.mkdir()
    with serving(folder, bundle, "proxy", "--upstream", server.url) as sidecar:
        reply = Reading(sidecar, 1, max_tokens=60, logit_bias={END_OF_TURN: -100})
        assert reply.begun.wait(60)

        sidecar.process.send_signal(signal.SIGTERM)
        reply.join(60)

    assert reply.error is None
    assert reply.reason == "length"
