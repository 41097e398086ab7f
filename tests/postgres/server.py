"""A Postgres server of the tests' own, which they may kill."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psycopg

VARIABLE = "HHH_ROUTER_TEST_POSTGRES"
"""Names the folder of the server's programs."""
PASSWORD = "swordfishcanary"
_USER = "hhh"


def programs() -> Path | None:
    """The folder with ``initdb`` and ``postgres``; None where there is none."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    found = [Path(on_path).resolve().parent] if (on_path := shutil.which("initdb")) else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in found if (folder / "postgres").exists()), None)


class Server:
    """One server with a folder of its own. It refuses to run as root, so root starts it as somebody else."""

    def __init__(self, folder: Path) -> None:
        self._programs = folder
        self._as = _somebody() if os.geteuid() == 0 else None
        self._home = Path(tempfile.mkdtemp(prefix="hhh-postgres-"))
        self._data = self._home / "data"
        secret = self._home / "password"
        secret.write_text(PASSWORD)
        if self._as is not None:
            for path in (self._home, secret):
                os.chown(path, self._as.pw_uid, self._as.pw_gid)
        self._run(
            "initdb", "--no-sync", "-D", str(self._data), "-U", _USER, "-A", "scram-sha-256", f"--pwfile={secret}",
            "--encoding=UTF8", "--no-locale",
        )  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port: int = taken.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres", *, port: int | None = None, password: str = PASSWORD) -> str:
        """Of one of its databases."""
        return f"postgresql://{_USER}:{password}@127.0.0.1:{port or self.port}/{database}"

    def start(self) -> None:
        """Run it until it answers."""
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self._home}
        given = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, *given], stdout=log, stderr=log, **self._who()
            )  # fmt: skip
        until = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > until or self._process.poll() is not None:
                    raise AssertionError((self._home / "log").read_text()) from None
                time.sleep(0.05)

    def stop(self) -> None:
        """End it at once, with every connection to it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None

    def remove(self) -> None:
        """Leave nothing behind."""
        self.stop()
        shutil.rmtree(self._home)

    def database(self, name: str) -> str:
        """The URL of a new database."""
        with psycopg.connect(self.url(), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return self.url(name)

    def _run(self, program: str, *given: str) -> None:
        done = subprocess.run([self._programs / program, *given], capture_output=True, text=True, **self._who())
        assert done.returncode == 0, done.stderr

    def _who(self) -> dict[str, object]:
        quiet: dict[str, object] = {"cwd": self._home, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
        if self._as is not None:
            quiet |= {"user": self._as.pw_uid, "group": self._as.pw_gid, "extra_groups": []}
        return quiet


def _somebody() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise AssertionError("Postgres does not run as root, and there is nobody else here")


class Relay:
    """A port that passes connections on to another, until it is told to lose the answer to a commit."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.loses = threading.Event()
        """While it is set, the next answer to a commit is lost with its connection."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if answers and self.loses.is_set() and b"COMMIT\x00" in data:
                    self.loses.clear()
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
