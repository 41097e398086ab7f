"""``proxy.yaml``: named upstreams and routes. Every mistake is told with its line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hhh_router.errors import SettingsError
from hhh_router.interfaces.proxy.hedging import Hedge
from hhh_router.interfaces.proxy.routes import MAX_REQUESTS, Mode, ProxyConfig, Route
from hhh_router.interfaces.proxy.upstreams import (
    BREAK_AFTER,
    BREAK_S,
    CONNECT_S,
    FIRST_BYTE_S,
    IDLE_S,
    Breaker,
    Timeouts,
    Upstream,
)
from hhh_router.policy.tree import MAX_BYTES, Listing, Mistake, Node, Place, Table, join, read_tree, show
from hhh_router.policy.values import did_you_mean
from hhh_router.settings import Settings, read_secret
from hhh_router.trace.redact import Redactor

OWN = "hhh"
"""Names the deployment's own mixture among fallbacks."""
_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_URL = r"^https?://[^/\s@?#]+(/[^\s?#]*)?$"
_HINT = "correct the file; docs/proxy.md explains each key"

Name = Annotated[str, Field(pattern=_NAME)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TimeoutsFile(_Part):
    """How long an upstream may take, in seconds."""

    connect_s: Seconds = CONNECT_S
    """Until a connection stands."""
    first_byte_s: Seconds = FIRST_BYTE_S
    """Until the head of the answer is there."""
    idle_s: Seconds = IDLE_S
    """Of silence within an answer."""


class BreakerFile(_Part):
    """When an upstream is left alone."""

    after: int = Field(default=BREAK_AFTER, ge=1, le=1000)
    """Failures in a row."""
    pause_s: Seconds = BREAK_S
    """Then it is not asked for so long."""


class UpstreamFile(_Part):
    """One server that answers."""

    url: str = Field(pattern=_URL)
    """Base URL, as a client would have it, without credentials."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable, or file among the secrets, that holds the key sent in place of the client's own."""
    api_key_header: Literal["authorization", "x-api-key", "api-key"] = "authorization"
    """Where that key goes; ``authorization`` has ``Bearer`` before it."""
    model: str | None = None
    """Replaces the ``model`` of requests that come here."""
    retries: int = Field(default=0, ge=0, le=5)
    """How often it is asked again when nothing was sent, or when it turned the request away."""
    timeouts: TimeoutsFile = TimeoutsFile()
    breaker: BreakerFile = BreakerFile()


class TargetFile(_Part):
    """An upstream with its share of a route."""

    upstream: Name
    weight: float = Field(default=1.0, ge=0, le=1e6)


def _one_name(given: object) -> object:
    return [{"upstream": given}] if isinstance(given, str) else given


class HedgeFile(_Part):
    """A second upstream that is asked where the first is silent for long."""

    after_ms: Annotated[float, Field(ge=1, le=600_000)]
    """Without the head of an answer."""
    to: Name


class RouteFile(_Part):
    """Requests that are treated alike; the first route that takes a request has it."""

    name: Name | None = None
    paths: list[str] = Field(default=["*"], min_length=1)
    """Globs on the path."""
    models: list[str] = Field(default=["*"], min_length=1)
    """Globs on the body's ``model``."""
    mode: Mode | None = None
    policy: str | None = None
    to: Annotated[list[TargetFile], BeforeValidator(_one_name), Field(min_length=1)]
    """One name, or several upstreams with their weights."""
    fallback: list[Name] = []
    """Asked in this order when the first fails; ``hhh`` is the deployment's own mixture."""
    escalate_to: Name | None = None
    """Answers where a rule says ``escalate``."""
    hedge: HedgeFile | None = None
    """Asked as well where the first is silent for long."""
    instruct: bool = False
    """Tell the upstream in words what weights the router gives."""


class AuditFile(_Part):
    """What is kept of requests."""

    path: str | None = None
    """SQLite file; ``none`` keeps nothing."""
    on_failure: Literal["closed", "open"] = "closed"
    """What holds when it cannot be written."""
    content: Literal["hashes", "full"] = "hashes"
    """``full`` keeps the texts of prompts and answers too, secrets replaced."""
    redact: list[str] = []
    """Regular expressions of further secrets, which reach no record."""


class ProxyFile(_Part):
    """The file."""

    version: Literal[1]
    mode: Mode = "enforce"
    policy: str | None = None
    block: Literal["body", "headers", "none"] = "body"
    unread_paths: Literal["pass", "refuse"] = "pass"
    guard_timeout_s: Seconds = 30.0
    drain_s: Seconds = 30.0
    max_requests: int = Field(default=MAX_REQUESTS, ge=1, le=100_000)
    observe_queue: int = Field(default=256, ge=1, le=100_000)
    audit: AuditFile = AuditFile()
    upstreams: dict[Name, UpstreamFile] = Field(min_length=1)
    routes: list[RouteFile] = Field(min_length=1)


def read_proxy_file(path: str | Path) -> ProxyFile:
    """Read and check a ``proxy.yaml``.

    Raises:
        SettingsError: It is missing or has mistakes; the message has a line for each, as ``file:line  key: …``.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SettingsError(f"{path}:1  file: cannot be read ({why}); a proxy.yaml is meant") from error
    return parse_proxy_file(raw, source=str(path))


def parse_proxy_file(raw: bytes, *, source: str = "proxy.yaml") -> ProxyFile:
    """The same for its bytes."""
    mistakes: list[Mistake] = []
    root = read_tree(raw, source, mistakes)
    found: ProxyFile | None = None
    if root is not None and not mistakes:
        try:
            found = ProxyFile.model_validate(_plain(root))
        except ValidationError as error:
            mistakes += _told(error, root)
        else:
            _check_names(found, root, mistakes)
    if mistakes or found is None:
        ordered = sorted(dict.fromkeys(mistakes), key=lambda m: m.place.line)
        raise SettingsError("\n".join(map(str, ordered)), hint=_HINT)
    return found


def make_config(file: ProxyFile, *, environ: Mapping[str, str] | None = None, mode: Mode | None = None) -> ProxyConfig:
    """What the file means.

    Args:
        file: From `read_proxy_file`.
        environ: Where keys are looked up, before the folder of secrets that it names; the process's environment by
            default.
        mode: Holds in place of the file's, for every route.

    Raises:
        SettingsError: A variable that holds a key is not set.
    """
    environ = os.environ if environ is None else environ
    keys = {
        n: read_secret(n, environ) for n in sorted({u.api_key_env for u in file.upstreams.values() if u.api_key_env})
    }
    if missing := [name for name, key in keys.items() if key is None]:
        raise SettingsError(
            f"{', '.join(missing)}: not set; an upstream's key is meant to be in it",
            hint="export it, or put it into a file of that name in the folder that HHH_ROUTER_SECRETS_DIR names",
        )
    upstreams = {name: _upstream(name, u, keys) for name, u in file.upstreams.items()}
    routes = []
    for i, route in enumerate(file.routes):
        routes.append(
            Route(
                name=route.name or f"routes[{i}]",
                paths=tuple(route.paths),
                models=tuple(route.models),
                mode=mode or route.mode or file.mode,
                policy=route.policy,
                to=tuple((upstreams[t.upstream], t.weight) for t in route.to),
                fallback=tuple(upstreams[name] for name in route.fallback if name != OWN),
                answer_here=OWN in route.fallback,
                escalate_to=upstreams[route.escalate_to] if route.escalate_to else None,
                hedge=Hedge(after_s=route.hedge.after_ms / 1000, to=upstreams[route.hedge.to]) if route.hedge else None,
                instruct=route.instruct,
            )
        )
    return ProxyConfig(
        routes=routes,
        others=tuple(upstreams.values()),
        block=file.block,
        unread_paths=file.unread_paths,
        guard_timeout_s=file.guard_timeout_s,
        drain_s=file.drain_s,
        max_requests=file.max_requests,
        observe_queue=file.observe_queue,
        audit_failure=file.audit.on_failure,
        audit_content=file.audit.content,
        redactor=Redactor(patterns=patterns(file)),
    )


def simple_config(url: str, settings: Settings, *, mode: Mode = "enforce") -> ProxyConfig:
    """One upstream for everything."""
    key = settings.upstream_api_key
    upstream = Upstream(
        name="upstream",
        url=url,
        timeouts=Timeouts(idle_s=settings.request_timeout_s),
        otherwise={"authorization": f"Bearer {key.get_secret_value()}"} if key else {},
    )
    return ProxyConfig(routes=[Route(name="all", mode=mode, to=((upstream, 1.0),))])


def patterns(file: ProxyFile) -> tuple[re.Pattern[str], ...]:
    """Further secrets of the deployment."""
    return tuple(re.compile(p) for p in file.audit.redact)


def _upstream(name: str, file: UpstreamFile, keys: Mapping[str, str | None]) -> Upstream:
    headers: dict[str, str] = {}
    if file.api_key_env is not None:
        key = keys[file.api_key_env] or ""
        headers[file.api_key_header] = f"Bearer {key}" if file.api_key_header == "authorization" else key
    return Upstream(
        name=name,
        url=file.url,
        timeouts=Timeouts(**file.timeouts.model_dump()),
        retries=file.retries,
        headers=headers,
        breaker=Breaker(after=file.breaker.after, pause_s=file.breaker.pause_s),
        model=file.model,
    )


def _check_names(file: ProxyFile, root: Node, mistakes: list[Mistake]) -> None:
    """What only the whole file can tell: names that name nothing, patterns that are none."""
    names = list(file.upstreams)

    def check(name: str, wanted: tuple[str | int, ...], known: list[str]) -> None:
        loc = _within(root, wanted)
        if name not in known:
            said = f"{name!r} is no upstream{did_you_mean(name, known)}; use {', '.join(known)}"
            mistakes.append(Mistake(_place(root, loc), _path(loc), said))

    if OWN in names:
        loc: tuple[str | int, ...] = ("upstreams", OWN)
        mistakes.append(Mistake(_place(root, loc), _path(loc), f"{OWN!r} is the own mixture's name; use another"))
    for i, route in enumerate(file.routes):
        for j, target in enumerate(route.to):
            check(target.upstream, ("routes", i, "to", j, "upstream"), names)
        if not any(t.weight for t in route.to):
            loc = ("routes", i, "to")
            mistakes.append(Mistake(_place(root, loc), _path(loc), "no target has a weight; give one more than 0"))
        for j, name in enumerate(route.fallback):
            check(name, ("routes", i, "fallback", j), [*names, OWN])
        if route.escalate_to is not None:
            check(route.escalate_to, ("routes", i, "escalate_to"), names)
        if route.hedge is not None:
            check(route.hedge.to, ("routes", i, "hedge", "to"), names)
    for i, pattern in enumerate(file.audit.redact):
        try:
            re.compile(pattern)
        except re.error as error:
            loc = ("audit", "redact", i)
            mistakes.append(Mistake(_place(root, loc), _path(loc), f"no regular expression: {error}"))


def _told(error: ValidationError, root: Node) -> list[Mistake]:
    mistakes = []
    for e in error.errors():
        loc = _within(root, e["loc"])
        node = _at(root, loc)
        path = _path(e["loc"] if e["type"] in ("missing", "extra_forbidden") else loc)
        if e["type"] == "extra_forbidden":
            said = f"not a key here{did_you_mean(str(e['loc'][-1]), _keys(e['loc'][:-1]))}"
        elif e["type"] == "missing":
            said = "missing"
        elif e["type"] == "string_pattern_mismatch":
            meant = {_NAME: "lower-case letters, digits, dots and dashes", _URL: "an http(s) URL without credentials"}
            pattern = str((e.get("ctx") or {}).get("pattern"))
            said = f"found {show(node)}; {meant.get(pattern, 'a name')} is meant"
        else:
            message = e["msg"]
            said = f"found {show(node)}; {message[:1].lower()}{message[1:]}"
        mistakes.append(Mistake(_place(root, loc), path or "file", said))
    return mistakes


def _keys(loc: tuple[str | int, ...]) -> list[str]:
    """The keys that are known at a place of the file."""
    kinds: dict[str, type[BaseModel]] = {"upstreams": UpstreamFile, "routes": RouteFile, "audit": AuditFile}
    kinds |= {"timeouts": TimeoutsFile, "breaker": BreakerFile, "to": TargetFile, "hedge": HedgeFile}
    kind: type[BaseModel] = ProxyFile
    for step in loc:
        kind = kinds.get(str(step), kind)
    return list(kind.model_fields)


def _plain(node: Node) -> Any:
    if isinstance(node, Table):
        return {key: _plain(inner) for key, inner in node.entries.items()}
    if isinstance(node, Listing):
        return [_plain(item) for item in node.items]
    return node.text if node.holds_text else yaml.safe_load(node.text)


def _within(root: Node, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The part of a location that stands in the file; pydantic names branches of unions too."""
    found: list[str | int] = []
    node = root
    for step in loc:
        if isinstance(node, Table) and step in node.entries:
            node = node.entries[str(step)]
        elif isinstance(node, Listing) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            continue
        found.append(step)
    return tuple(found)


def _at(root: Node, loc: tuple[str | int, ...]) -> Node:
    node = root
    for step in loc:
        node = node.entries[str(step)] if isinstance(node, Table) else node.items[int(step)]  # type: ignore[union-attr]
    return node


def _place(root: Node, loc: tuple[str | int, ...]) -> Place:
    node, place = root, root.place
    for step in loc:
        if isinstance(node, Table) and step in node.entries:
            place = node.keys[str(step)]
            node = node.entries[str(step)]
        elif isinstance(node, Listing) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
            place = node.place
        else:
            break
    return place


def _path(loc: tuple[str | int, ...]) -> str:
    path = ""
    for step in loc:
        path = f"{path}[{step}]" if isinstance(step, int) else join(path, str(step))
    return path
