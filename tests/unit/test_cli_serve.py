"""``serve`` and ``proxy`` before any model is loaded: what is wrong is named at once, with exit status 2."""

import signal
import socket
import subprocess
import sys

import pytest

RUN = "from hhh_router.cli.main import run; run()"


def hhh_router(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *args], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (("serve", "--host", "0.0.0.0", "--port", "0"), "HHH_ROUTER_API_KEY"),
        (("serve", "--host", "no.such.host.invalid", "--port", "0"), "HHH_ROUTER_API_KEY"),
        (("serve", "--port", "70000"), "--port 70000 is no port"),
        (("serve", "--policy", "nope"), "policy 'nope' not found"),
        (("serve", "--port", "0", "--bundle", "/nowhere/at/all"), "not found"),
        (("proxy", "--upstream", "ftp://x", "--policy", "balanced"), "no http(s) URL"),
        (("proxy", "--upstream", "http://me:secret@host/v1", "--policy", "balanced"), "HHH_ROUTER_UPSTREAM_API_KEY"),
        (("proxy",), "--upstream"),
        (("proxy", "--upstream", "http://x", "--config", "p.yaml"), "exclude each other"),
        (("proxy", "--upstream", "http://x", "--mode", "watch"), "use observe, annotate, enforce"),
        (("proxy", "--config", "/nowhere/p.yaml"), "/nowhere/p.yaml:1  file: cannot be read"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(args: tuple[str, ...], found: str) -> None:
    done = hhh_router(*args)

    assert done.returncode == 2
    assert found in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        done = hhh_router("serve", "--port", str(port))

    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


SERVING = """
from hhh_router.cli.listen import _end_on_sigterm
from hhh_router.interfaces.server.run import listen, run
from hhh_router.testing import fake_pipeline

pipeline = fake_pipeline()
_end_on_sigterm()
run(pipeline, listen("127.0.0.1", 0, pipeline.settings), on_ready=lambda url: print(url, flush=True))
"""
LOADING = """
import time
from hhh_router.cli.listen import _end_on_sigterm

_end_on_sigterm()
print("loading", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("code", [SERVING, LOADING], ids=["serving", "loading"])
def test_sigterm_ends_a_server_with_0(code: str) -> None:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()

        process.send_signal(signal.SIGTERM)

        assert process.wait(30) == 0
