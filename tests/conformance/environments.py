"""An environment of its own for each client: their packages do not go together with ours, nor with each other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from tests.conformance.catalogue import Client

INSTALL_WITHIN_S = 1200.0


class Obstacle(Exception):
    """Why a client could not be had here."""


def prepare(client: Client, folder: Path) -> Path:
    """The interpreter that runs a client's script, after its packages were installed into ``folder``, once.

    Raises:
        Obstacle: There is no npm, or the packages cannot be installed.
    """
    if not client.packages:
        return Path(sys.executable)
    root = folder / client.slug
    stamp = root / ".installed"
    python = client.language == "python"
    interpreter = root / "bin" / "python" if python else Path(shutil.which("node") or "")
    if not python and not shutil.which("npm"):
        raise Obstacle("there is no npm here")
    if stamp.exists() and json.loads(stamp.read_text("utf-8")) == list(client.packages):
        return _brought(root) or interpreter
    root.mkdir(parents=True, exist_ok=True)
    if python:
        if not interpreter.exists():
            venv.create(root, with_pip=True)
        _install([str(interpreter), "-m", "pip", "install", "--quiet", *client.packages], root)
    else:
        (root / "package.json").write_text('{"private": true}', "utf-8")
        _install(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *client.packages], root)
    stamp.write_text(json.dumps(client.packages), "utf-8")
    return _brought(root) or interpreter


def _brought(root: Path) -> Path | None:
    """The Node that came among a client's packages (npm's ``node``), for one that wants a newer one than is here."""
    node = root / "node_modules" / ".bin" / "node"
    return node if node.exists() else None


def _install(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Obstacle(f"installing did not end within {INSTALL_WITHIN_S:.0f} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no reason was given"]
        raise Obstacle(f"could not be installed: {lines[0][:300]}")
