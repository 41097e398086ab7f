"""From ``--system`` on the command line to systems that can be measured."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import SecretStr

from hhh_router.bundle import Bundle
from hhh_router.data.examples import Example
from hhh_router.errors import MissingExtra, SettingsError
from hhh_router.evaluation.systems import (
    BundleReadings,
    BundleSystem,
    DetectorSystem,
    PolicySystem,
    RemoteSystem,
    System,
    Told,
)
from hhh_router.policy import load_policy
from hhh_router.policy.values import did_you_mean, either
from hhh_router.settings import Settings
from hhh_router.upstream.guards import WIRES, GuardClient, Wire, guard_endpoint

if TYPE_CHECKING:
    from hhh_router.evaluation.detection import Detector

_Named = BundleSystem | PolicySystem | RemoteSystem | DetectorSystem
Kind = Literal["bundle", "policy", "url", "baseline"]
KINDS: tuple[str, ...] = get_args(Kind)
BASELINES: tuple[str, ...] = ("tfidf", "minilm", "jailguard")
TRAINED = ("tfidf", "minilm")
"""Baselines that learn from a recipe's rows."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What systems are opened with."""

    settings: Settings
    bundle: str
    """The bundle that policies, and ``bundle`` without a name, read with."""
    heads: Sequence[str]
    """What the rows are labelled for: baselines learn no others."""
    recipe: Path | None = None
    """Whose router rows baselines learn from."""
    data: Path | None = None
    """Folder of the public data sets that those rows are drawn from."""
    wire: str = "native"
    api_key_env: Sequence[str] = ()
    """Names of variables that hold keys: ``NAME``, or ``HOST=NAME`` where several hosts are asked."""
    timeout_s: float = 120.0
    concurrency: int = 4
    on_progress: Told = field(default=lambda *_: None)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def open_systems(specs: Sequence[str], opening: Opening) -> list[System]:
    """The systems that ``--system`` names, checked as far as that is quick: models are loaded when they are asked.

    Args:
        specs: ``bundle[:NAME]``, ``policy:NAME``, ``url:URL``, ``baseline:NAME``.
        opening: What they are opened with.

    Raises:
        SettingsError: No such system, or an option that it needs is missing.
        PolicyError, BundleError: No such policy or bundle, or it is wrong.
    """
    parsed = [_parse(spec) for spec in dict.fromkeys(specs)]
    if opening.wire not in WIRES:
        raise SettingsError(f"--wire {opening.wire}: no such wire", hint=f"use {either(WIRES)}")
    endpoints = [guard_endpoint(value, opening.wire) for kind, value in parsed if kind == "url"]  # type: ignore[arg-type]
    keys = _keys([url for url, _ in endpoints], opening)
    readings: dict[Path, BundleReadings] = {}

    def read_by(name: str) -> BundleReadings:
        bundle = Bundle.load(name)
        return readings.setdefault(bundle.root, BundleReadings(bundle, opening.settings, opening.on_progress))

    drawn: list[list[Example]] = []  # once for all baselines
    places = iter(endpoints)
    systems: list[_Named] = []
    for kind, value in parsed:
        match kind:
            case "bundle":
                readings_of = read_by(value or opening.bundle)
                systems.append(BundleSystem(readings_of.name, readings_of))
            case "policy":
                systems.append(PolicySystem(load_policy(value), read_by(opening.bundle)))
            case "url":
                systems.append(_remote(*next(places), keys, opening))
            case "baseline":
                systems.append(_baseline(value, opening, drawn))
    return _told_apart(systems)


def _told_apart(systems: Sequence[_Named]) -> list[System]:
    """The same systems; of several with one name, such as two versions of a bundle, the later ones get a number."""
    seen: Counter[str] = Counter()
    for system in systems:
        seen[system.name] += 1
        if seen[system.name] > 1:
            system.name = f"{system.name} ({seen[system.name]})"
    return list(systems)


def _parse(spec: str) -> tuple[str, str]:
    kind, _, value = spec.partition(":")
    if kind not in KINDS:
        meant = "" if value.startswith("//") else did_you_mean(kind, KINDS)
        raise SettingsError(
            "--system: "
            + ("a URL is written url:http://…" if value.startswith("//") else f"{kind!r} is no kind of system{meant}"),
            hint="use bundle:NAME, policy:NAME, url:http://host:port or baseline:tfidf|minilm|jailguard",
        )
    if not value and kind != "bundle":
        raise SettingsError(f"--system {kind}: names nothing", hint=f"write {kind}: and what is meant behind it")
    return kind, value


def _keys(endpoints: Sequence[str], opening: Opening) -> dict[str, SecretStr]:
    """Host and port → key. A bare name is for the only host: with several, a key could reach the wrong one.

    Raises:
        SettingsError: A variable is not set, or it is not plain for whom it is.
    """
    hosts = list(dict.fromkeys(urlsplit(url).netloc for url in endpoints))
    keys = {}
    for given in opening.api_key_env:
        host, separator, name = given.rpartition("=")
        if not _VARIABLE.fullmatch(name):  # perhaps the key itself, so it is not shown
            raise SettingsError(
                "--api-key-env: takes the name of a variable, not a key", hint="export KEY=…, then --api-key-env KEY"
            )
        if separator and host not in hosts:
            raise SettingsError(
                f"--api-key-env {host}={name}: no --system asks {host}", hint=f"hosts are {', '.join(hosts) or 'none'}"
            )
        if not separator and len(hosts) != 1:
            raise SettingsError(
                f"--api-key-env {name}: {len(hosts)} hosts are asked, and a key is for one",
                hint=f"write HOST=NAME, such as {hosts[0]}={name}" if hosts else "add --system url:…, or leave it out",
            )
        value = opening.environ.get(name, "")
        if not value or not value.isascii() or not value.isprintable():
            found = "is not set" if not value else "holds what no header may (a line break, or no ASCII)"
            raise SettingsError(f"--api-key-env {name}: the variable {found}", hint=f"export {name}=…")
        keys[host or hosts[0]] = SecretStr(value)
    return keys


def _remote(endpoint: str, wire: Wire, keys: Mapping[str, SecretStr], opening: Opening) -> RemoteSystem:
    client = GuardClient(
        endpoint,
        wire,
        api_key=keys.get(urlsplit(endpoint).netloc),
        timeout_s=opening.timeout_s,
        concurrency=opening.concurrency,
    )
    return RemoteSystem(endpoint.removesuffix("/v1/guard"), client, wire, opening.on_progress)


def _baseline(name: str, opening: Opening, drawn: list[list[Example]]) -> DetectorSystem:
    if name not in BASELINES:
        raise SettingsError(
            f"--system baseline:{name}: no such baseline{did_you_mean(name, BASELINES)}",
            hint=f"use {either(BASELINES)}",
        )
    recipe, data = opening.recipe, opening.data
    if name in TRAINED:
        if recipe is None or data is None:
            raise SettingsError(
                f"--system baseline:{name} has to be trained first, on a recipe's rows of the public data sets",
                hint="add --baselines recipes/smollm2-135m.yaml, and set HHH_ROUTER_DATA to the folder of data sets",
            )
        if not data.is_dir():
            raise SettingsError(f"HHH_ROUTER_DATA is {data}: no such folder", hint="name the folder of data sets")
    try:
        from hhh_router.evaluation import baselines as b
        from hhh_router.training.recipe import load_recipe
    except ImportError as error:
        raise MissingExtra("train", needed_for="baselines") from error
    if name not in TRAINED:
        return DetectorSystem(b.JailguardDetector.name, b.JailguardDetector, "as the package comes")
    assert recipe is not None
    assert data is not None
    loaded, sha256 = load_recipe(recipe)

    def train() -> Detector:
        from hhh_router.training.mix import draw

        if not drawn:
            opening.on_progress("baselines", 0, 1, "drawing rows")
            drawn.append(draw(loaded.router.mix, data, seed=loaded.seed))
        opening.on_progress("baselines", 0, 1, f"training {kind.name}")
        made = kind.train(drawn[0], opening.heads)
        opening.on_progress("baselines", 1, 1, kind.name)
        return made

    kind: Any = {"tfidf": b.TfidfDetector, "minilm": b.MiniLMDetector}[name]
    return DetectorSystem(kind.name, train, f"trained on the router rows of {recipe.name} (sha256 {sha256[:16]})")
