"""The policies one deployment may apply, loaded once each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hhh_router.errors import PolicyError, PolicyNotAllowed
from hhh_router.pipeline.situation import PIPELINE
from hhh_router.policy import Door, Policy, check_door, lacking, list_policies, load_policy
from hhh_router.policy.lock import Deployed, check_lock
from hhh_router.settings import Settings


class PolicyStore:
    """Looks policies up by name. Callers choose among names; only whoever deploys names files.

    Args:
        default: The policy of requests that name none: a shipped name, or a path.
        allowed: Further ones callers may pick, shipped names or paths; None allows every shipped one that the door can
            carry out.
        door: Where the policies are used.

    Raises:
        PolicyError: One of these policies is wrong or missing, or asks what the door does not have.
    """

    def __init__(self, default: str | Path, *, allowed: Sequence[str] | None = None, door: Door = PIPELINE) -> None:
        self._door = door
        self._deployed: Deployed | None = None
        self._default = self._load(default)
        self._loaded: dict[str, Policy] = {self._default.name: self._default}
        self._unfit: set[str] = set()  # shipped ones that ask what the door does not have
        self._files: dict[str, Policy] = {}  # added by the process itself; not among the names callers are told
        self._shipped = frozenset(list_policies() if allowed is None else ())
        for source in allowed or ():
            policy = self._load(source)
            self._loaded.setdefault(policy.name, policy)

    @classmethod
    def from_settings(cls, settings: Settings, *, door: Door = PIPELINE) -> PolicyStore:
        """The store a deployment's settings describe."""
        return cls(settings.policy, allowed=settings.allowed_policies, door=door)

    def bind(self, deployed: Deployed) -> None:
        """Say what is deployed, so that no limit is used on what it was not fitted on; from here on, too.

        Raises:
            PolicyError: The default or an allowed policy has a budget that nothing keeps, or a stale lock.
        """
        self._deployed = deployed
        for policy in (*self._loaded.values(), *self._files.values()):
            check_lock(policy, deployed)

    @property
    def default(self) -> Policy:
        """The policy of requests that name none."""
        return self._default

    @property
    def names(self) -> list[str]:
        """What a caller may pick, the default first."""
        fitting = {name for name in self._shipped if self._shipped_policy(name) is not None}
        return [self._default.name, *sorted((set(self._loaded) | fitting) - {self._default.name})]

    def get(self, name: str | None) -> Policy:
        """The policy of that name; None means the default.

        Raises:
            PolicyNotAllowed: No policy of that name may be picked here; a path never may.
        """
        if name is None:
            return self._default
        if name in self._files:
            return self._files[name]
        if name not in self._loaded:
            policy = self._shipped_policy(name) if name in self._shipped else None
            if policy is None:
                raise PolicyNotAllowed(
                    f"policy {name!r} cannot be picked here", hint=f"use one of {', '.join(self.names)}"
                )
            return policy
        return self._loaded[name]

    def add_file(self, path: str | Path) -> str:
        """Load a policy file on behalf of the process's own code; returns the name that now stands for it.

        Raises:
            PolicyError: The file is missing or has mistakes.
        """
        key = str(path)
        if key not in self._files:
            self._files[key] = self._load(path)
        return key

    def _shipped_policy(self, name: str) -> Policy | None:
        """A shipped policy; None where the door could not carry it out whole."""
        if name not in self._loaded and name not in self._unfit:
            policy = load_policy(name)
            if lacking(policy, self._door) or not self._stands(policy):
                self._unfit.add(name)
            else:
                self._loaded[name] = policy
        return self._loaded.get(name)

    def _load(self, source: str | Path) -> Policy:
        policy = load_policy(source)
        check_door(policy, self._door)
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
