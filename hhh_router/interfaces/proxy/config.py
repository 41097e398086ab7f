"""``proxy.yaml``: named upstreams and routes. Every mistake is told with its line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from hhh_router.errors import SettingsError
from hhh_router.interfaces.proxy.hedging import Hedge
from hhh_router.interfaces.proxy.places import node_at, path_of, place_of, plain, within
from hhh_router.interfaces.proxy.routes import MAX_REQUESTS, Mode, ProxyConfig, Route
from hhh_router.interfaces.proxy.translation import PREFIX, open_translator
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
from hhh_router.policy.tree import MAX_BYTES, Mistake, Node, read_tree, show
from hhh_router.policy.values import did_you_mean
from hhh_router.settings import Settings, read_secret
from hhh_router.trace.audit import Retention
from hhh_router.trace.pii import RECOGNISERS

OWN = "hhh"
"""Names the deployment's own mixture among fallbacks."""
_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_MODEL = r"^[^\s/]+/\S+$"
_URL = r"^https?://[^/\s@?#]+(/[^\s?#]*)?$"
_OF_THE_OTHER_KIND = {"url": {"api_base", "drop_params"}, "litellm": {"api_key_header", "model"}}
_WEBHOOK = r"^https?://[^/\s@?#]+(/[^\s#]*)?$"
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
    """One server that answers: ``url`` or ``litellm`` says which."""

    url: str | None = Field(default=None, pattern=_URL)
    """Base URL, as a client would have it, without credentials."""
    litellm: str | None = Field(default=None, pattern=_MODEL)
    """A model of any provider that LiteLLM knows, as it names it; requests and answers are translated."""
    api_base: str | None = Field(default=None, pattern=_URL)
    """Where that provider is, if not where LiteLLM knows it to be."""
    drop_params: bool = False
    """Leave out what that provider does not take, in place of an error."""
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
    candidate: str | None = None
    """Asked beside the route's policy and recorded; never acts."""
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
    """SQLite file, or ``postgresql://…`` without a password; ``none`` keeps nothing."""
    on_failure: Literal["closed", "open"] = "closed"
    """What holds when it cannot be written."""
    content: Literal["hashes", "full"] = "hashes"
    """``full`` keeps the texts of prompts and answers too, secrets replaced."""
    keep_days: float | None = Field(default=None, gt=0, le=36_500)
    """Older rows are removed; without it none are."""
    keep_mb: float | None = Field(default=None, ge=1, le=1e7)
    """The oldest rows are removed when all take more than so many megabytes."""
    redact: list[str] = []
    """Regular expressions of further secrets, which reach no record of any kind."""
    pii: list[str] = []
    """What says who somebody is and reaches no record either, such as ``EMAIL_ADDRESS``; needs the extra ``pii``."""


class HoldFile(_Part):
    """Where calls wait that a policy holds, and who is told."""

    path: str | None = Field(default=None, min_length=1)
    """The queue's SQLite file; without one the user's own, beside the audit."""
    wait_s: Seconds | None = None
    """Then the call is denied; without it ``HHH_ROUTER_HOLD_S``."""
    webhook: str | None = Field(default=None, pattern=_WEBHOOK)
    """Is told of every held call; without one ``HHH_ROUTER_HOLD_WEBHOOK``."""


class ProxyFile(_Part):
    """The file."""

    version: Literal[1]
    mode: Mode = "enforce"
    policy: str | None = None
    candidate: str | None = None
    """Asked beside that policy and recorded; never acts."""
    block: Literal["body", "headers", "none"] = "body"
    unread_paths: Literal["pass", "refuse"] = "pass"
    guard_timeout_s: Seconds = 30.0
    drain_s: Seconds = 30.0
    max_requests: int = Field(default=MAX_REQUESTS, ge=1, le=100_000)
    observe_queue: int = Field(default=256, ge=1, le=100_000)
    audit: AuditFile = AuditFile()
    hold: HoldFile = HoldFile()
    upstreams: dict[Name, UpstreamFile] = Field(min_length=1)
    routes: list[RouteFile] = Field(min_length=1)
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def place(self, upstream: str) -> str:
        """Where an upstream's ``litellm`` stands in the file."""
        return self._places.get(upstream, f"upstreams.{upstream}.litellm")


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
            found = ProxyFile.model_validate(plain(root))
        except ValidationError as error:
            mistakes += _told(error, root)
        else:
            _check_names(found, root, mistakes)
            _check_kinds(found, root, mistakes)
    if mistakes or found is None:
        ordered = sorted(dict.fromkeys(mistakes), key=lambda m: m.place.line)
        raise SettingsError("\n".join(map(str, ordered)), hint=_HINT)
    return found


def make_config(
    file: ProxyFile,
    *,
    environ: Mapping[str, str] | None = None,
    mode: Mode | None = None,
    max_bytes: int = Settings.model_fields["max_body_bytes"].default,
) -> ProxyConfig:
    """What the file means.

    Args:
        file: From `read_proxy_file`.
        environ: Where keys are looked up, before the folder of secrets that it names; the process's environment by
            default.
        mode: Holds in place of the file's, for every route.
        max_bytes: Largest body that is translated.

    Raises:
        SettingsError: A variable that holds a key is not set, or LiteLLM does not know a provider.
        MissingExtra: LiteLLM is not installed.
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
    upstreams = {
        name: _upstream(name, u, keys, place=file.place(name), max_bytes=max_bytes)
        for name, u in file.upstreams.items()
    }
    routes = []
    for i, route in enumerate(file.routes):
        routes.append(
            Route(
                name=route.name or f"routes[{i}]",
                paths=tuple(route.paths),
                models=tuple(route.models),
                mode=mode or route.mode or file.mode,
                policy=route.policy,
                candidate=route.candidate,
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
        hold_path=Path(file.hold.path) if file.hold.path else None,
        hold_s=file.hold.wait_s,
        hold_webhook=file.hold.webhook,
    )


def simple_config(url: str, settings: Settings, *, mode: Mode = "enforce") -> ProxyConfig:
    """One upstream for everything."""
    key = settings.upstream_api_key
    translator = None
    if url.startswith(PREFIX):
        model = url.removeprefix(PREFIX)
        secret = key.get_secret_value() if key else None
        translator = open_translator(
            model, place=f"--upstream {url}", api_key=secret, max_bytes=settings.max_body_bytes
        )
    upstream = Upstream(
        name="upstream",
        url=url,
        translator=translator,
        timeouts=Timeouts(idle_s=settings.request_timeout_s),
        otherwise={"authorization": f"Bearer {key.get_secret_value()}"} if key and translator is None else {},
    )
    return ProxyConfig(routes=[Route(name="all", mode=mode, to=((upstream, 1.0),))])


def retention(file: ProxyFile) -> Retention:
    """How long the audit's rows are kept."""
    return Retention(days=file.audit.keep_days, megabytes=file.audit.keep_mb)


def patterns(file: ProxyFile) -> tuple[re.Pattern[str], ...]:
    """Further secrets of the deployment."""
    return tuple(re.compile(p) for p in file.audit.redact)


def _upstream(name: str, file: UpstreamFile, keys: Mapping[str, str | None], *, place: str, max_bytes: int) -> Upstream:
    headers: dict[str, str] = {}
    key = keys[file.api_key_env] if file.api_key_env is not None else None
    translator = None
    if file.litellm is not None:
        translator = open_translator(
            file.litellm,
            place=place,
            api_key=key,
            api_base=file.api_base,
            drop_params=file.drop_params,
            max_bytes=max_bytes,
        )
    elif key is not None:
        headers[file.api_key_header] = f"Bearer {key}" if file.api_key_header == "authorization" else key
    return Upstream(
        name=name,
        url=file.url or f"{PREFIX}{file.litellm}",
        translator=translator,
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
        loc = within(root, wanted)
        if name not in known:
            said = f"{name!r} is no upstream{did_you_mean(name, known)}; use {', '.join(known)}"
            mistakes.append(Mistake(place_of(root, loc), path_of(loc), said))

    if OWN in names:
        loc: tuple[str | int, ...] = ("upstreams", OWN)
        mistakes.append(Mistake(place_of(root, loc), path_of(loc), f"{OWN!r} is the own mixture's name; use another"))
    for i, route in enumerate(file.routes):
        for j, target in enumerate(route.to):
            check(target.upstream, ("routes", i, "to", j, "upstream"), names)
        if not any(t.weight for t in route.to):
            loc = ("routes", i, "to")
            mistakes.append(Mistake(place_of(root, loc), path_of(loc), "no target has a weight; give one more than 0"))
        for j, name in enumerate(route.fallback):
            check(name, ("routes", i, "fallback", j), [*names, OWN])
        if route.escalate_to is not None:
            check(route.escalate_to, ("routes", i, "escalate_to"), names)
        if route.hedge is not None:
            check(route.hedge.to, ("routes", i, "hedge", "to"), names)
    for i, entity in enumerate(file.audit.pii):
        if entity not in RECOGNISERS:
            loc = ("audit", "pii", i)
            said = f"{entity!r} is not known{did_you_mean(entity, [*RECOGNISERS])}; use {', '.join(RECOGNISERS)}"
            mistakes.append(Mistake(place_of(root, loc), path_of(loc), said))
    for i, pattern in enumerate(file.audit.redact):
        try:
            re.compile(pattern)
        except re.error as error:
            loc = ("audit", "redact", i)
            mistakes.append(Mistake(place_of(root, loc), path_of(loc), f"no regular expression: {error}"))


def _check_kinds(file: ProxyFile, root: Node, mistakes: list[Mistake]) -> None:
    """Each upstream has a URL or is translated, and only the keys of its kind."""
    for name, upstream in file.upstreams.items():
        loc: tuple[str | int, ...] = ("upstreams", name)
        given = upstream.model_fields_set
        if (upstream.url is None) == (upstream.litellm is None):
            said = "one of url and litellm is meant" if upstream.url is None else "url and litellm exclude each other"
            mistakes.append(Mistake(place_of(root, loc), path_of(loc), said))
            continue
        kind = "url" if upstream.litellm is None else "litellm"
        for key in sorted(_OF_THE_OTHER_KIND[kind] & given):
            where = (*loc, key)
            mistakes.append(Mistake(place_of(root, where), path_of(where), f"does not go with {kind}"))
        if upstream.litellm is not None:
            where = (*loc, "litellm")
            place = place_of(root, where)
            file._places[name] = f"{place.file}:{place.line}  {path_of(where)}"


def _told(error: ValidationError, root: Node) -> list[Mistake]:
    mistakes = []
    for e in error.errors():
        loc = within(root, e["loc"])
        node = node_at(root, loc)
        path = path_of(e["loc"] if e["type"] in ("missing", "extra_forbidden") else loc)
        if e["type"] == "extra_forbidden":
            said = f"not a key here{did_you_mean(str(e['loc'][-1]), _keys(e['loc'][:-1]))}"
        elif e["type"] == "missing":
            said = "missing"
        elif e["type"] == "string_pattern_mismatch":
            meant = {
                _NAME: "lower-case letters, digits, dots and dashes",
                _URL: "an http(s) URL without credentials",
                _WEBHOOK: "an http(s) URL without credentials",
                _MODEL: "provider/model",
            }
            pattern = str((e.get("ctx") or {}).get("pattern"))
            said = f"found {show(node)}; {meant.get(pattern, 'a name')} is meant"
        else:
            message = e["msg"]
            said = f"found {show(node)}; {message[:1].lower()}{message[1:]}"
        mistakes.append(Mistake(place_of(root, loc), path or "file", said))
    return mistakes


def _keys(loc: tuple[str | int, ...]) -> list[str]:
    """The keys that are known at a place of the file."""
    kinds: dict[str, type[BaseModel]] = {"upstreams": UpstreamFile, "routes": RouteFile, "audit": AuditFile}
    kinds["hold"] = HoldFile
    kinds |= {"timeouts": TimeoutsFile, "breaker": BreakerFile, "to": TargetFile, "hedge": HedgeFile}
    kind: type[BaseModel] = ProxyFile
    for step in loc:
        kind = kinds.get(str(step), kind)
    return list(kind.model_fields)
