"""The deployment's policies as a mode of the sidecar needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hhh_router.pipeline import PolicyStore
from hhh_router.pipeline.parts import Parts
from hhh_router.policy import Policy
from hhh_router.types import Action


class _Changed(PolicyStore):
    """The same policies, each changed on its way out. Their hashes stay: they name the files."""

    def __init__(self, store: PolicyStore, change: Callable[[Policy], Policy]) -> None:
        self._store, self._change = store, change

    @property
    def default(self) -> Policy:
        """The policy of requests that name none."""
        return self.get(None)

    @property
    def names(self) -> list[str]:
        """What a caller may pick."""
        return self._store.names

    def get(self, name: str | None) -> Policy:
        """See `PolicyStore.get`."""
        return self._change(self._store.get(name))


def shadowed(parts: Parts) -> Parts:
    """A deployment that records what its policies would do, and does none of it."""
    return replace(parts, policies=_Changed(parts.policies, lambda policy: replace(policy, mode="shadow")))


def escalated(parts: Parts) -> Parts:
    """The deployment once a rule has escalated: who answers now is whom it escalates to, so such a rule flags."""
    return replace(parts, policies=_Changed(parts.policies, _flagging))


def _flagging(policy: Policy) -> Policy:
    rules = {
        checkpoint: tuple(
            replace(rule, then=Action.FLAG, message=None) if rule.then is Action.ESCALATE else rule for rule in its
        )
        for checkpoint, its in policy.checkpoints.items()
    }
    return replace(policy, checkpoints=rules)
