"""The policies one deployment may apply, and the same again when their files change."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hhh_router.errors import MissingExtra, PolicyError, PolicyNotAllowed
from hhh_router.pipeline.language import ready_language
from hhh_router.pipeline.situation import PIPELINE
from hhh_router.policy import Door, Policy, check_door, lacking, list_policies, load_policy
from hhh_router.policy.lock import Deployed, check_lock
from hhh_router.settings import Settings

_log = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]
"""Time of change in nanoseconds, size and inode of a file."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Every policy that is in force, as it was read at one moment. Replaced whole, never changed."""

    default: Policy
    named: dict[str, Policy]
    files: dict[str, Policy] = field(default_factory=dict)  # added by the process itself; callers are not told of them
    candidates: dict[str, Policy] = field(default_factory=dict)  # asked beside others; nobody can pick one
    generation: int = 1

    @property
    def all(self) -> tuple[Policy, ...]:
        return (*self.named.values(), *self.files.values(), *self.candidates.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """What the store has in force, for whoever looks after it."""

    generation: int
    """1 at start; one more with each reload that was taken over."""
    policies: dict[str, str]
    """Name → version and hash of what was named or picked so far."""
    candidates: dict[str, str]
    """The same of what is asked beside them."""
    error: str | None
    """Why the last reload was not taken over; None where it was."""


class PolicyStore:
    """Looks policies up by name. Callers choose among names; only whoever deploys names files.

    Files are looked at again every ``reload_s`` seconds, on a thread of their own. All policies are read and checked
    before any is taken over; where one is wrong, those before stay in force. A request keeps the policy it began with.

    Args:
        default: The policy of requests that name none: a shipped name, or a path.
        allowed: Further ones callers may pick, shipped names or paths; None allows every shipped one that the door can
            carry out.
        candidate: Asked beside others and never acting: a shipped name, or a path.
        door: Where the policies are used.
        reload_s: Seconds between two looks at the files; 0 never looks again.
        clock: Monotonic time, in seconds.

    Raises:
        PolicyError: One of these policies is wrong or missing, or asks what the door does not have.
        MissingExtra: One asks for languages, and what tells them is not installed.
    """

    def __init__(
        self,
        default: str | Path,
        *,
        allowed: Sequence[str] | None = None,
        candidate: str | Path | None = None,
        door: Door = PIPELINE,
        reload_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._door = door
        self._deployed: Deployed | None = None
        self._sources = (default, *(allowed or ()))
        self._shipped = frozenset(list_policies() if allowed is None else ())
        self._unfit: set[str] = set()  # shipped ones that ask what the door does not have
        self._reload_s, self._clock = reload_s, clock
        self._lock = threading.Lock()
        self._error: str | None = None
        self._stamps: dict[str, _Stamp | None] = {}
        self._loaded = self._read((), [] if candidate is None else [str(candidate)], 1)
        self._stamps = self._look()
        self._due = clock() + reload_s

    @classmethod
    def from_settings(cls, settings: Settings, *, door: Door = PIPELINE) -> PolicyStore:
        """The store a deployment's settings describe."""
        return cls(
            settings.policy,
            allowed=settings.allowed_policies,
            candidate=settings.candidate,
            door=door,
            reload_s=settings.policy_reload_s,
        )

    def bind(self, deployed: Deployed) -> None:
        """Say what is deployed, so that no limit is used on what it was not fitted on; from here on, too.

        Raises:
            PolicyError: The default or an allowed policy has a budget that nothing keeps, or a stale lock.
        """
        self._deployed = deployed
        for policy in self._loaded.all:
            check_lock(policy, deployed)

    @property
    def default(self) -> Policy:
        """The policy of requests that name none."""
        return self._now().default

    @property
    def names(self) -> list[str]:
        """What a caller may pick, the default first."""
        fitting = {name for name in self._shipped if self._shipped_policy(name) is not None}
        loaded = self._now()
        return [loaded.default.name, *sorted((set(loaded.named) | fitting) - {loaded.default.name})]

    @property
    def status(self) -> StoreStatus:
        """What is in force, and how the last reload went."""
        loaded = self._loaded
        policies, candidates = (
            {p.name: f"{p.version} {p.hash}" for p in its}
            for its in ((*loaded.named.values(), *loaded.files.values()), loaded.candidates.values())
        )
        return StoreStatus(generation=loaded.generation, policies=policies, candidates=candidates, error=self._error)

    def get(self, name: str | None) -> Policy:
        """The policy of that name; None means the default.

        Raises:
            PolicyNotAllowed: No policy of that name may be picked here; a path never may.
        """
        loaded = self._now()
        if name is None:
            return loaded.default
        if name in loaded.files:
            return loaded.files[name]
        if name in loaded.named:
            return loaded.named[name]
        policy = self._shipped_policy(name) if name in self._shipped else None
        if policy is None:
            raise PolicyNotAllowed(f"policy {name!r} cannot be picked here", hint=f"use one of {', '.join(self.names)}")
        return policy

    def add_file(self, path: str | Path) -> str:
        """Load a policy file on behalf of the process's own code; returns the name that now stands for it.

        Raises:
            PolicyError: The file is missing or has mistakes.
        """
        key = str(path)
        with self._lock:
            if key not in self._loaded.files:
                self._take(replace(self._loaded, files={**self._loaded.files, key: self._checked(path)}))
        return key

    def candidate(self, name: str) -> Policy:
        """A policy that is asked beside others, by the name or path that it was given as.

        Raises:
            KeyError: It was not given.
        """
        return self._now().candidates[name]

    def add_candidate(self, source: str | Path) -> str:
        """Have a further policy to ask beside others; returns the name for `candidate`.

        Raises:
            PolicyError: It is missing or wrong, or asks what the door does not have.
        """
        key = str(source)
        with self._lock:
            if key not in self._loaded.candidates:
                found = {**self._loaded.candidates, key: self._checked(source)}
                self._take(replace(self._loaded, candidates=found))
        return key

    def reload(self) -> bool:
        """Read every file again and take all policies over, or none; whether they were.

        What is wrong is logged and kept for `status`; nothing is raised, and what was in force stays.
        """
        with self._lock:
            stamps = self._look()
            try:
                loaded = self._read(self._loaded.files, self._loaded.candidates, self._loaded.generation + 1)
            except (PolicyError, MissingExtra) as error:
                self._error, self._stamps = error.message, stamps
                _log.error("policies not reloaded, those before stay in force: %s", error.message)
                return False
            found = _look_at(loaded)
            if any(stamps.get(file, stamp) != stamp for file, stamp in found.items()):
                return False  # written to while they were read, so perhaps half old and half new: at the next look
            before, self._loaded, self._error, self._stamps = self._loaded, loaded, None, found
            _tell_new(before.named, loaded.named, "is in force")
            _tell_new(before.candidates, loaded.candidates, "is the candidate")
            return True

    def _now(self) -> _Loaded:
        """What is in force; begins a look at the files when it is time, and waits for none."""
        loaded = self._loaded
        if self._reload_s > 0 and self._clock() >= self._due:
            self._due = self._clock() + self._reload_s
            threading.Thread(target=self._reload_changed, name="policy-reload", daemon=True).start()
        return loaded

    def _reload_changed(self) -> None:
        if self._look() != self._stamps:
            self.reload()

    def _read(self, files: Iterable[str], candidates: Iterable[str], generation: int) -> _Loaded:
        default, *others = [self._checked(source) for source in self._sources]
        named = {default.name: default}
        for policy in others:
            named.setdefault(policy.name, policy)
        return _Loaded(
            default,
            named,
            {path: self._checked(path) for path in files},
            {name: self._checked(name) for name in candidates},
            generation,
        )

    def _take(self, loaded: _Loaded) -> None:
        """Have further policies; those there were stay as they are, and so does what their files were last seen as."""
        self._loaded = loaded
        self._stamps = {**_look_at(self._loaded), **self._stamps}

    def _look(self) -> dict[str, _Stamp | None]:
        return _look_at(self._loaded)

    def _shipped_policy(self, name: str) -> Policy | None:
        """A shipped policy; None where the door could not carry it out whole."""
        with self._lock:
            if name not in self._loaded.named and name not in self._unfit:
                policy = load_policy(name)
                if lacking(policy, self._door) or not self._stands(policy):
                    self._unfit.add(name)
                else:
                    self._take(replace(self._loaded, named={**self._loaded.named, name: policy}))
            return self._loaded.named.get(name)

    def _checked(self, source: str | Path) -> Policy:
        policy = load_policy(source)
        check_door(policy, self._door)
        ready_language(policy)
        if self._deployed is not None:
            check_lock(policy, self._deployed)
        return policy

    def _stands(self, policy: Policy) -> bool:
        try:
            if self._deployed is not None:
                check_lock(policy, self._deployed)
        except PolicyError:
            return False
        return True


def _look_at(loaded: _Loaded) -> dict[str, _Stamp | None]:
    return {file: _stamp(file) for policy in loaded.all for file in policy.files}


def _tell_new(before: Mapping[str, Policy], now: Mapping[str, Policy], what: str) -> None:
    known = {p.name: p.hash for p in before.values()}
    for policy in now.values():
        if known.get(policy.name) != policy.hash:
            _log.info("policy %s@%d (%s) %s", policy.name, policy.version, policy.hash[:16], what)


def _stamp(file: str) -> _Stamp | None:
    try:
        found = Path(file).stat()
    except OSError:
        return None  # gone: a reload says so
    return found.st_mtime_ns, found.st_size, found.st_ino
