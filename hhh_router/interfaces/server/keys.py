"""Who may call: API keys, each with the doors and policies it opens and how much it may ask for.

One key for everything comes from ``HHH_ROUTER_API_KEY``; any number of them, hashed, from the YAML file that
``HHH_ROUTER_API_KEYS_FILE`` names. Without either nobody is asked for a key, and the server listens on loopback alone.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from hhh_router.errors import Overloaded, PolicyNotAllowed, SettingsError
from hhh_router.interfaces.server.http import WireError
from hhh_router.pipeline import Pipeline
from hhh_router.settings import Settings
from hhh_router.types import Caller, GuardRequest

Door = Literal["chat", "judge", "feedback", "metrics"]
"""``chat``: what generates; ``judge``: guard, route, moderations, decisions and LiteLLM's guardrail; ``feedback``:
labels of requests, anybody's whose id the caller knows; ``metrics``: figures of the whole deployment."""
MINUTE = 60.0
_ANYTHING = "everything"
CONVERSATION = b"x-hhh-conversation"
"""Header in which a client tells the id of a conversation, for policies that ask what it has used up."""
_CREDENTIALS = (b"authorization", b"x-api-key", b"api-key")


class Key(BaseModel):
    """One caller."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """For logs and messages; the key itself is nowhere."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key, in UTF-8."""
    doors: tuple[Door, ...] | None = None
    """None opens all of them."""
    policies: tuple[str, ...] | None = None
    """Names; None opens those that the deployment allows."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Of prompts and replies of chats. Counted once they are known, so the request that goes over is still answered."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = Field(min_length=1)


class KeyRing:
    """The keys of a deployment, and what each has used of late. For one event loop."""

    def __init__(self, keys: tuple[Key, ...], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._requests = {k.name: _Bucket(k.requests_per_minute, clock) for k in keys}
        self._tokens = {k.name: _Bucket(k.tokens_per_minute, clock) for k in keys}

    @classmethod
    def open(cls, settings: Settings) -> KeyRing:
        """The keys that the settings name.

        Raises:
            SettingsError: The file is missing, or has mistakes; each is named.
        """
        keys: tuple[Key, ...] = ()
        if settings.api_key is not None:
            secret = settings.api_key.get_secret_value()
            keys = (Key(name=_ANYTHING, sha256=hashlib.sha256(secret.encode()).hexdigest()),)
        if settings.api_keys_file is not None:
            keys += _read(settings.api_keys_file)
        return cls(keys)

    @property
    def required(self) -> bool:
        """False where anybody may call."""
        return bool(self._keys)

    def caller(self, request: Request) -> Key | None:
        """Whose key the request holds; None where none is needed.

        Raises:
            WireError: 401, no key or a wrong one.
        """
        if not self._keys:
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not given and (own := request.headers.get("x-api-key")):  # how Anthropic's clients and LiteLLM send it
            scheme, given = "bearer", own
        digest = hashlib.sha256(given.strip().encode()).hexdigest() if scheme.lower() == "bearer" else ""
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        if not found:
            said = "a wrong key" if given else "no key"
            raise WireError(401, f"{said}; send 'Authorization: Bearer <key>'", code="invalid_api_key")
        return found[0]

    def admit(self, key: Key, door: Door | None) -> None:
        """Let a caller through a door, and count it.

        Raises:
            WireError: 403, the key does not open this door.
            Overloaded: It has asked for too much of late.
        """
        if door is not None and key.doors is not None and door not in key.doors:
            raise WireError(
                403, f"the key {key.name!r} does not open this endpoint; it opens {', '.join(key.doors) or 'none'}",
                code="door_not_allowed",
            )  # fmt: skip
        for bucket, limit, what in (
            (self._requests[key.name], key.requests_per_minute, "requests"),
            (self._tokens[key.name], key.tokens_per_minute, "tokens"),
        ):
            if (wait := bucket.wait_s) > 0:
                raise Overloaded(
                    f"the key {key.name!r} has used its {limit:,} {what} a minute",
                    hint=f"try again in {wait:.0f} s",
                    retry_after_s=wait,
                )
        self._requests[key.name].take(1)

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of a chat."""
        self._tokens[key.name].take(tokens)


def owner(request: Request) -> str:
    """Whose things a request may name: its key's; everybody's where nobody needs a key."""
    key: Key | None = request.state.key
    return "" if key is None else key.name


def caller_of(request: Request) -> Caller:
    """Who asks, for the policies' conditions."""
    return as_caller(request.state.key, request.url.path, request.headers.raw)


def as_caller(key: Key | None, route: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> Caller:
    """The same from a key, None where nobody needs one: its name is the tenant, its doors are what it opens.

    Without a key, conversations are kept apart by a digest of whatever credentials the client sends.
    """
    doors: tuple[str, ...] = get_args(Door) if key is None or key.doors is None else key.doors
    sent = {name.lower(): value for name, value in headers}
    told = sent.get(CONVERSATION)
    secret = b"\0".join(sent.get(name, b"") for name in _CREDENTIALS)
    return Caller(
        tenant="" if key is None else key.name,
        route=route,
        key_scopes=doors,
        account=hashlib.sha256(secret).hexdigest() if key is None and secret.strip(b"\0") else None,
        conversation=f"header {told.decode('latin-1')}" if told else None,
    )


def called(request: Request, asked: Sequence[GuardRequest]) -> list[GuardRequest]:
    """Texts that are to be judged, with who asks."""
    return [replace(one, caller=caller_of(request)) for one in asked]


def check_policy(key: Key | None, policy: str) -> None:
    """Refuse a policy that the caller's key does not open.

    Raises:
        PolicyNotAllowed: It does not.
    """
    if key is not None and key.policies is not None and policy not in key.policies:
        raise PolicyNotAllowed(
            f"the key {key.name!r} does not open policy {policy!r}", hint=f"use one of {', '.join(key.policies)}"
        )


def check_policies(request: Request, pipeline: Pipeline, asked: Sequence[GuardRequest]) -> None:
    """The same for texts that are to be judged, the deployment's default where they name none.

    Raises:
        PolicyNotAllowed: One of the policies is not open to the caller, or to anybody.
    """
    key: Key | None = request.state.key
    for name in {r.policy for r in asked} if key is not None else ():
        check_policy(key, pipeline.policies.get(name).name)


class _Bucket:
    """So much a minute, refilled as time goes by; it may go below zero by what was taken last."""

    def __init__(self, limit: int | None, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit, clock
        self._left, self._at = float(limit or 0), clock()

    @property
    def wait_s(self) -> float:
        """Seconds until something is left."""
        if self._limit is None:
            return 0.0
        self._refill()
        return 0.0 if self._left >= 1 else (1 - self._left) * MINUTE / self._limit

    def take(self, amount: int) -> None:
        """Use some of it."""
        if self._limit is not None:
            self._refill()
            self._left -= amount

    def _refill(self) -> None:
        assert self._limit is not None
        now = self._clock()
        self._left = min(self._limit, self._left + (now - self._at) * self._limit / MINUTE)
        self._at = now


def _read(path: Path) -> tuple[Key, ...]:
    hint = "write 'keys:' and a list of entries, as hhh-router key new prints them"
    try:
        keys = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).keys
    except OSError as error:
        raise SettingsError(f"HHH_ROUTER_API_KEYS_FILE: {path}: {error.strerror}", hint=hint) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: no YAML: {' '.join(str(error).split())[:200]}", hint=hint) from error
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        raise SettingsError("\n".join(lines), hint=hint) from error
    for what in ("name", "sha256"):
        seen = [getattr(key, what) for key in keys]
        if twice := next((v for v in seen if seen.count(v) > 1), None):
            raise SettingsError(f"{path}: two keys have the {what} {twice[:40]!r}", hint="give each its own")
    if _ANYTHING in [key.name for key in keys]:
        raise SettingsError(f"{path}: {_ANYTHING!r} is the name of HHH_ROUTER_API_KEY's own key", hint="rename it")
    return keys
