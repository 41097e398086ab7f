"""What the files in ``deploy/`` say, read by as little of a parser as they need."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
MANIFESTS = tuple(sorted((DEPLOY / "kubernetes").glob("*.yaml")))
UNITS = tuple(sorted((DEPLOY / "systemd").glob("*.service")))
CONFIG = DEPLOY / "config"
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of the base image."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """How a container of a target starts."""

    env: dict[str, str]
    user: str
    workdir: str
    entrypoint: list[str]
    cmd: list[str]
    health: list[str] | None
    """What HEALTHCHECK runs."""


@dataclass
class _Stage:
    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)


def stages() -> dict[str, _Stage]:
    """Each stage of the Dockerfile: what it is built from, and its instructions."""
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOY / "Dockerfile").read_text()).replace("\\\n", " ")
    found: dict[str, _Stage] = {}
    stage = None
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = rest.split()
            stage = found[name] = _Stage(base)
        elif stage is not None:
            stage.lines.append((instruction, rest))
    return found


def image(target: str) -> Image:
    """What a target inherits and says."""
    found = stages()
    lines: list[tuple[str, str]] = []
    name = target
    while name in found:
        lines = found[name].lines + lines
        name = found[name].base
    env: dict[str, str] = {}
    said: dict[str, str] = {}
    for instruction, rest in lines:
        if instruction == "ENV":
            env |= dict(pair.split("=", 1) for pair in rest.split())
        else:
            said[instruction] = rest
    health = said.get("HEALTHCHECK")
    return Image(
        env={name: value.replace("$PATH", BASE_PATH) for name, value in env.items()},
        user=said["USER"],
        workdir=said["WORKDIR"],
        entrypoint=json.loads(said["ENTRYPOINT"]),
        cmd=json.loads(said["CMD"]),
        health=None if health is None else json.loads(health.split("CMD", 1)[1]),
    )


def compose() -> Any:
    """The compose file, variables unfilled."""
    return yaml.safe_load(COMPOSE.read_text())


def documents(manifest: Path) -> list[Any]:
    """The objects of a manifest."""
    return list(yaml.safe_load_all(manifest.read_text()))


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A workload's template with its containers."""

    manifest: Path
    spec: Any
    config: dict[str, str]
    """The files of the ConfigMap in the same manifest."""

    @property
    def containers(self) -> list[Any]:
        """All of them, the app's too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ours(self) -> Any:
        """The container that runs this project."""
        [container] = [c for c in self.containers if "hhh-router" in c["image"]]
        return container


def pods() -> Iterator[Pod]:
    """The workload of each manifest."""
    for manifest in MANIFESTS:
        found = {d["kind"]: d for d in documents(manifest)}
        workload = found.get("Deployment") or found["StatefulSet"]
        yield Pod(manifest=manifest, spec=workload["spec"]["template"]["spec"], config=found["ConfigMap"]["data"])


def unit(path: Path) -> dict[str, list[str]]:
    """The entries of a unit's [Service]; a key may stand there more than once."""
    section = path.read_text().split("[Service]\n", 1)[1].split("\n[", 1)[0]
    found: dict[str, list[str]] = {}
    for line in section.splitlines():
        if line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found
