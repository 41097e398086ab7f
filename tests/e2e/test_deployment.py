"""The very commands of the images and of the systemd units, in surroundings like those they are written for."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deployed import BASE_PATH, CONFIG, UNITS, image, unit

from .containers import Container, container, lacking

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(lacking() is not None, reason=f"no container can be made here: {lacking()}"),
]

KEYS = {"HHH_ROUTER_API_KEY": "key-of-the-app", "OPENAI_API_KEY": "key-of-the-provider"}
SECRETS = {"HHH_ROUTER_SECRETS_DIR": "/run/secrets/hhh-router"}
UPSTREAM = "http://127.0.0.1:9000/v1"

STUB = """
import http.server, json, sys, time

class Model(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        print(json.dumps({"authorization": self.headers["authorization"], "body": body}), flush=True)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for i in range(20):
            chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m",
                     "choices": [{"index": 0, "delta": {"content": f"apples and pears, bowl number {i}. "}}]}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\n")
            time.sleep(0.15)
        chunk["choices"] = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\ndata: [DONE]\\n\\n")

    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", 9000), Model).serve_forever()
"""

CLIENT = """
import http.client, json, sys

path, key, body = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
connection.request("POST", path, body, headers)
answer = connection.getresponse()
print(answer.status, flush=True)
for line in answer:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
"""
CHAT = json.dumps({"model": "hhh-auto", "stream": True, "max_tokens": 48, "temperature": 0, "messages": [
    {"role": "user", "content": "Write a few sentences about apples and pears."}]})  # fmt: skip


def asking(
    inside: Container, path: str, body: str, *, key: str = KEYS["HHH_ROUTER_API_KEY"]
) -> "subprocess.Popen[str]":
    command = inside.beside(sys.executable, "-c", CLIENT, path, key, body)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def status(inside: Container, path: str, body: str, *, key: str) -> int:
    told, _ = asking(inside, path, body, key=key).communicate(timeout=60)
    return int(told.split()[0])


def first_event(client: "subprocess.Popen[str]") -> str:
    """What the client has read when a stream has begun."""
    assert client.stdout is not None
    read = ""
    while "data:" not in read:
        line = client.stdout.readline()
        assert line, read
        read += line
    return read


@contextmanager
def upstream(inside: Container) -> Iterator["subprocess.Popen[str]"]:
    """A model on the container's loopback; what it is asked comes out as lines."""
    with subprocess.Popen(inside.beside(sys.executable, "-c", STUB), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The files of deploy/config, with an upstream that is there."""
    folder = tmp_path / "config"
    folder.mkdir()
    for file in CONFIG.iterdir():
        (folder / file.name).write_text(file.read_text().replace("https://api.openai.com/v1", UPSTREAM))
    return folder


def confined(inside: Container) -> dict[str, str]:
    lines = Path(f"/proc/{inside.pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def assert_confined(inside: Container) -> None:
    told = confined(inside)
    assert told["Uid"].split() == ["65532"] * 4
    assert told["Groups"].strip() == ""
    assert (told["NoNewPrivs"], int(told["CapEff"], 16), int(told["CapBnd"], 16)) == ("1", 0, 0)
    for place in ("/", "/etc/hhh-router", "/opt/hhh-router", "/usr/bin"):
        assert "Read-only file system" in inside.run("touch", f"{place}/x", as_root=True).stderr


def test_the_servers_image_starts_answers_and_drains(tmp_path: Path, config: Path) -> None:
    of = image("serve")

    with container(
        [*of.entrypoint, *of.cmd], env={**of.env, **SECRETS}, folder=tmp_path, config=config,
        secrets=KEYS, user=of.user, workdir=of.workdir,
    ) as inside:  # fmt: skip
        assert of.health is not None
        inside.until_healthy(of.health)
        assert_confined(inside)
        guard = json.dumps({"prompt": "How do I bake bread?"})
        assert status(inside, "/v1/guard", guard, key="another") == 401
        assert status(inside, "/v1/guard", guard, key=KEYS["HHH_ROUTER_API_KEY"]) == 200
        client = asking(inside, "/v1/chat/completions", CHAT)
        begun = first_event(client)
        exit_status = inside.stop()
        rest, _ = client.communicate(timeout=60)

    assert exit_status == 0, inside.said()
    assert "data: [DONE]" in begun + rest
    assert "error" not in rest
    assert "key-of-" not in inside.said()


def test_the_sidecars_image_puts_the_providers_key_in_place_of_the_apps_and_drains(
    tmp_path: Path, config: Path
) -> None:
    of = image("proxy")

    with container(
        [*of.entrypoint, *of.cmd], env={**of.env, **SECRETS}, folder=tmp_path, config=config,
        secrets=KEYS, user=of.user, workdir=of.workdir,
    ) as inside:  # fmt: skip
        assert of.health is not None
        inside.until_healthy(of.health)
        assert_confined(inside)
        with upstream(inside) as model:
            assert status(inside, "/v1/chat/completions", CHAT, key="another") == 401
            client = asking(inside, "/v1/chat/completions", CHAT)
            begun = first_event(client)
            pid = inside.pid
            subprocess.run(["kill", "-TERM", str(pid)], check=True)
            time.sleep(0.3)  # long enough to see that it waits
            assert inside.process.poll() is None
            rest, _ = client.communicate(timeout=60)
            assert model.stdout is not None
            asked = json.loads(model.stdout.readline())
            exit_status = inside.process.wait(60)
    command = [str(Path(sys.executable).with_name("hhh-router")), "audit", "verify", "--audit"]
    verified = subprocess.run([*command, str(inside.state / "audit.sqlite3")], capture_output=True, text=True)

    assert exit_status == 0, inside.said()
    assert "bowl number 19" in rest
    assert "data: [DONE]" in begun + rest
    assert asked["authorization"] == "Bearer key-of-the-provider"
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "key-of-" not in inside.said() + verified.stdout
    assert (inside.state / "audit.sqlite3").stat().st_uid == 65532


def test_an_image_that_listens_outside_without_a_key_says_what_to_set(tmp_path: Path, config: Path) -> None:
    of = image("serve")

    with container(
        [*of.entrypoint, *of.cmd], env=of.env, folder=tmp_path, config=config, secrets={}, user=of.user
    ) as inside:
        exit_status = inside.process.wait(60)

    assert exit_status == 2
    assert "HHH_ROUTER_API_KEY" in inside.said()


def test_an_image_that_is_told_to_stop_while_its_model_is_loaded_ends_at_once(tmp_path: Path, config: Path) -> None:
    of = image("serve")

    with container(
        [*of.entrypoint, *of.cmd], env={**of.env, **SECRETS}, folder=tmp_path, config=config,
        secrets=KEYS, user=of.user, workdir=of.workdir,
    ) as inside:  # fmt: skip
        while not int(confined(inside)["SigCgt"], 16) & 1 << (signal.SIGTERM - 1):  # before, Python itself is loaded
            time.sleep(0.02)
        exit_status = inside.stop(within_s=5)

    assert exit_status == 0, inside.said()
    assert "listens on" not in inside.said()


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_a_units_command_starts_on_loopback_and_ends_on_sigterm(path: Path, tmp_path: Path, config: Path) -> None:
    said = unit(path)
    [command] = said["ExecStart"]
    env = dict(pair.split("=", 1) for line in said["Environment"] for pair in line.split())
    credentials = {name: KEYS[name] for name, _ in (c.split(":") for c in said["LoadCredential"])}
    check = ["/hhh/health/ready" if " proxy " in command else "/health/ready"]

    with container(
        command.split(), folder=tmp_path, config=config, secrets=credentials,
        env={"PATH": BASE_PATH, **env, "CREDENTIALS_DIRECTORY": "/run/secrets/hhh-router"},
    ) as inside:  # fmt: skip
        inside.until_healthy([sys.executable, "-IS", "/opt/hhh-router/health.py", *check])
        assert_confined(inside)
        live = inside.run(sys.executable, "-IS", "/opt/hhh-router/health.py", check[0].replace("ready", "live"))
        exit_status = inside.stop()

    assert live.stdout.startswith("200 ")
    assert exit_status == 0, inside.said()
