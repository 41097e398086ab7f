"""LiteLLM's proxy as a process of its own, before servers of ours on loopback; the models behind are stand-ins."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hhh_router.pipeline.situation import SERVER
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from hhh_router.types import ChatRequest, ReadRequest, Scores
from tests.e2e.loopback import served

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks the network

Policies = Callable[..., Path]
Config = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
RULES = {"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}}
KEY = "key-of-the-server"
MASTER = f"sk-{secrets.token_hex(24)}"
STARTS_WITHIN_S = 120.0
SECRET = "sk-aaaabbbbccccddddeeee"
LATE = f"{' '.join(f'word{n}' for n in range(30))} poison {' '.join(f'tail{n}' for n in range(9))}"
"""What the other model says: long, and what must not reach anybody comes late."""

IN_PROCESS = """\
from hhh_router.interfaces.litellm import HHHRouterLLM
from hhh_router.pipeline.situation import SERVER
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

reader = FakeReader({rules!r})
handler = HHHRouterLLM(
    pipeline=fake_pipeline({policy!r}, reader=reader, generator=FakeGenerator("one two three four", reader=reader))
)
"""


class Watching(FakeReader):
    """Remembers what it was asked to read."""

    def __init__(self) -> None:
        super().__init__(RULES)
        self.seen: list[ReadRequest] = []

    def score(self, request: ReadRequest) -> Scores:
        self.seen.append(request)
        return super().score(request)


class Setting:
    """A proxy, what it stands before, and what those were asked."""

    def __init__(self, url: str, server: str, reader: Watching, answering: FakeGenerator, other: FakeGenerator) -> None:
        self.url, self.server, self.reader, self.answering, self.other = url, server, reader, answering, other

    def ask(self, wire: str, model: str, text: str = "Hello", *, stream: bool = False, **more: Any) -> httpx.Response:
        """One question on one of the proxy's wires."""
        return ask(f"{self.url}/v1", wire, model, text, stream=stream, key=MASTER, **more)


def ask(url: str, wire: str, model: str, text: str, *, stream: bool, key: str, **more: Any) -> httpx.Response:
    """One question on one wire, as its clients put it."""
    turns = [{"role": "user", "content": text}]
    body = {"input": text} if wire == "responses" else {"messages": turns, "max_tokens": 256}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(
        f"{url}/{wire}", json={"model": model, "stream": stream, **body, **more}, headers=headers, timeout=60
    )


def answers(request: ChatRequest) -> str:
    """Our model's reply."""
    text = request.messages[-1].content
    return "word " * 5000 if "for ever" in text else LATE if "late" in text else "one two three four"


def says(request: ChatRequest) -> str:
    """The other model's reply."""
    text = request.messages[-1].content
    if request.tools is not None:
        return '<tool_call>[{"name": "cook", "arguments": {"what": "poison"}}]</tool_call>'
    return f"Your key is {SECRET} and\nnothing else matters to me here" if "key" in text else LATE


@contextmanager
def proxy(config: Config, folder: Path) -> Iterator[str]:
    """LiteLLM's own command with this configuration; yields its base URL."""
    path = folder / "proxy.yaml"
    path.write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ, "LITELLM_MASTER_KEY": MASTER, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HHH_ROUTER_API_KEY": KEY,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("litellm")), "--config", str(path), "--port", str(port)]
    with (folder / "proxy.log").open("w") as log:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log, env=environment)
    try:
        _await(f"http://127.0.0.1:{port}", process, folder / "proxy.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN_S
    while process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(f"{url}/health/liveliness", timeout=5).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    pytest.fail(f"LiteLLM's proxy did not start:\n{log.read_text()[-3000:]}")


def shipped(server: str, other: str, *, policy: str = "watchful") -> Config:
    """docs/litellm-proxy.yaml with these addresses and this policy in place of its own."""
    text = (ROOT / "docs" / "litellm-proxy.yaml").read_text()
    config: Config = yaml.safe_load(text.replace("http://127.0.0.1:8000", server).replace("balanced", policy))
    [model] = [m for m in config["model_list"] if m["model_name"] == "other"]
    model["litellm_params"] = {"model": "openai/hhh-auto", "api_base": other, "api_key": "unused"}
    return config


@pytest.fixture(scope="module")
def setting(watchful: Policies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """The shipped configuration; beside it a model in the proxy's own process."""
    with started(watchful, tmp_path_factory.mktemp("litellm")) as made:
        yield made


@contextmanager
def started(
    watchful: Policies,
    folder: Path,
    guardrails: Sequence[Config] | None = None,
    *,
    overlay: str = "",
    general: Config | None = None,
    **settings: Any,
) -> Iterator[Setting]:
    """The same, with other guardrails if they are given; ``api_base`` and ``api_key`` are filled in.

    ``overlay`` is added to the policy, ``general`` to LiteLLM's ``general_settings``; the rest are settings of ours.
    """
    reader, other = Watching(), FakeGenerator(says, delay_s=0.002)
    answering = FakeGenerator(answers, reader=reader, delay_s=0.002)
    policy = folder / "watchful.yaml"
    policy.write_text(watchful().read_text() + overlay)
    with ExitStack() as stack:
        pipeline = fake_pipeline(policy, reader=reader, generator=answering, door=SERVER, api_key=KEY, **settings)
        ours = stack.enter_context(served(pipeline))
        theirs = stack.enter_context(served(fake_pipeline(watchful(mode="shadow"), generator=other)))
        server = ours.removesuffix("/v1")
        config = shipped(server, theirs)
        (folder / "own.py").write_text(IN_PROCESS.format(rules=RULES, policy=str(watchful())))
        config["litellm_settings"]["custom_provider_map"].append({"provider": "own", "custom_handler": "own.handler"})
        config["model_list"].append({"model_name": "own", "litellm_params": {"model": "own/hhh-auto"}})
        if general is not None:
            config["general_settings"] = {**config.get("general_settings", {}), **general}
        if guardrails is not None:
            config["guardrails"] = [
                {**g, "litellm_params": {"api_base": server, "api_key": KEY, **g["litellm_params"]}} for g in guardrails
            ]
        yield Setting(stack.enter_context(proxy(config, folder)), server, reader, answering, other)
