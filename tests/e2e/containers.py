"""A command in the surroundings of a container, by Linux' own means: no image is built and no daemon asked.

The file system of this machine lies under an overlay that gets what the image adds and is then read-only; /tmp is
empty, the state folder the only other place to write. The command is process 1, its user has no name and no rights, and
its loopback is its own.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hhh_router.settings import Settings
from tests.deployed import DEPLOY, ROOT

_NEEDED = ("chroot", "ip", "mount", "nsenter", "setpriv", "unshare")
_NAMESPACES = ("--mount", "--net", "--pid")
_HARDENED = ("--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")

_SETUP = """\
set -eu
mount -t tmpfs -o mode=0755 tmpfs "$BASE"
new="$BASE/root"
mkdir "$BASE/upper" "$BASE/work" "$new"
mount -t overlay -o "lowerdir=/,upperdir=$BASE/upper,workdir=$BASE/work" overlay "$new"
mount -t proc proc "$new/proc"
mount --rbind /dev "$new/dev"
mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
for path in $VISIBLE; do
    mkdir -p "$new$path"
    mount --bind "$path" "$new$path"
    mount -o remount,ro,bind "$new$path"
    while path=$(dirname "$path"); [ "$path" != / ]; do chmod o+x "$new$path" 2>/dev/null || true; done
done
mkdir -p "$new/opt/hhh-router" "$new/etc/hhh-router" "$new/run/secrets/hhh-router" "$new/var/lib/hhh-router"
for entry in "$PREFIX"/*; do ln -s "$entry" "$new/opt/hhh-router/"; done
mkdir "$new/opt/hhh-router/cache"
cp -r "$CACHE/backbones" "$new/opt/hhh-router/cache/"  # safetensors writes for its owner alone
chmod -R a+rX "$new/opt/hhh-router/cache"
cp "$HEALTH" "$new/opt/hhh-router/health.py"
mount --bind "$CONFIG" "$new/etc/hhh-router"
mount -o remount,ro,bind "$new/etc/hhh-router"
mount --bind "$SECRETS" "$new/run/secrets/hhh-router"
mount -o remount,ro,bind "$new/run/secrets/hhh-router"
mount -o remount,ro "$new"
mount --bind "$STATE" "$new/var/lib/hhh-router"
ip link set lo up
exec chroot "$new" {command}
"""


@cache
def lacking() -> str | None:
    """Why no container can be made here; None where one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make namespaces"
    if missing := [tool for tool in _NEEDED if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    overlay = (
        "mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w /mnt/r"
        " && mount -t overlay -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w o /mnt/r"
    )
    tried = subprocess.run(["unshare", *_NAMESPACES, "--fork", "sh", "-c", overlay], capture_output=True, text=True)
    return (
        None if tried.returncode == 0 else f"namespaces or overlays may not be made here: {tried.stderr.strip()[:200]}"
    )


@dataclass(frozen=True, kw_only=True)
class Container:
    """One that runs."""

    process: "subprocess.Popen[str]"
    state: Path
    """Of this machine; the container's /var/lib/hhh-router."""
    log: Path
    _start: tuple[str, ...]

    @property
    def pid(self) -> int:
        """Of its process 1, as this machine counts."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (found := children.read_text().split()):
            assert self.process.poll() is None, self.said()
            time.sleep(0.01)
        return int(found[0])

    def run(self, *command: str, as_root: bool = False) -> "subprocess.CompletedProcess[str]":
        """A further command inside, as `docker exec` does it."""
        enter = ["nsenter", f"--target={self.pid}", *_NAMESPACES, "--root"]
        start = ["env"] if as_root else self._start
        return subprocess.run([*enter, *start, *command], capture_output=True, text=True, timeout=60)

    def beside(self, *command: str) -> list[str]:
        """A command of this machine that shares the container's loopback alone."""
        return ["nsenter", f"--target={self.pid}", "--net", *command]

    def until_healthy(self, check: Sequence[str], *, within_s: float = 180) -> None:
        """Ask the health check until it is content."""
        until = time.monotonic() + within_s
        while self.run(*check).returncode != 0:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.3)

    def stop(self, *, within_s: float = 60) -> int:
        """SIGTERM to its process 1, and the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(within_s)

    def said(self) -> str:
        """Everything it wrote."""
        return self.log.read_text()


@contextmanager
def container(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    folder: Path,
    config: Path,
    secrets: Mapping[str, str],
    user: str = "65532:65532",
    workdir: str = "/var/lib/hhh-router",
) -> Iterator[Container]:
    """Start it; it is gone afterwards.

    Args:
        command: What it runs.
        env: All of its environment; what the suite needs to find the code that is tested is added.
        folder: An empty one, for what belongs to the container.
        config: Lies at /etc/hhh-router.
        secrets: Files in /run/secrets/hhh-router.
        user: Numbers of user and group.
        workdir: Where it starts.
    """
    uid, gid = map(int, user.split(":"))
    base, state, kept = folder / "base", folder / "state", folder / "secrets"
    for made in (base, state, kept):
        made.mkdir()
    os.chown(state, uid, gid)
    state.chmod(0o750)
    for name, value in secrets.items():
        (kept / name).write_text(value)
        os.chown(kept / name, 0, gid)
        (kept / name).chmod(0o440)
    given = {"PYTHONPATH": str(ROOT), **env}
    start = (
        "setpriv", f"--reuid={uid}", f"--regid={gid}", *_HARDENED,
        "env", "-i", f"--chdir={workdir}", *(f"{k}={v}" for k, v in given.items()),
    )  # fmt: skip
    visible = dict.fromkeys(map(str, (ROOT, sys.base_prefix, sys.prefix)))
    surroundings = {
        "PATH": os.environ["PATH"],
        "BASE": str(base),
        "VISIBLE": " ".join(visible),
        "PREFIX": sys.prefix,
        "CACHE": str(Settings.load().cache_dir.expanduser()),
        "HEALTH": str(DEPLOY / "health.py"),
        "CONFIG": str(config),
        "SECRETS": str(kept),
        "STATE": str(state),
    }
    log = folder / "log"
    unshare = ["unshare", *_NAMESPACES, "--fork", "sh", "-c"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*unshare, _SETUP.format(command=shlex.join([*start, *command]))],
            env=surroundings, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True,
        )  # fmt: skip
    inside = Container(process=process, state=state, log=log, _start=start)
    try:
        yield inside
    finally:
        if process.poll() is None:  # killing unshare would not do: a process whose user changed outlives its parent
            os.kill(inside.pid, signal.SIGKILL)
        process.wait(10)
