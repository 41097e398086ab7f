"""The deployment's policies as a mode of the sidecar needs them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

from hhh_router.errors import PolicyError
from hhh_router.pipeline import PolicyStore
from hhh_router.pipeline.parts import Parts
from hhh_router.policy import Policy
from hhh_router.policy.rules import Rule
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

    def candidate(self, name: str) -> Policy:
        """See `PolicyStore.candidate`."""
        return self._change(self._store.candidate(name))


def shadowed(parts: Parts) -> Parts:
    """A deployment that records what its policies would do, and does none of it."""
    return replace(parts, policies=_Changed(parts.policies, lambda policy: replace(policy, mode="shadow")))


def compared(parts: Parts, policy: str | None, candidate: str | None) -> Parts:
    """A deployment with the candidate of one route, where it has its own.

    Args:
        parts: The deployment; its own candidate stands beside its default policy.
        policy: The route's.
        candidate: The route's.
    """
    return parts if candidate is None else replace(parts, candidate=candidate, candidate_of=policy)


def escalated(parts: Parts) -> Parts:
    """The deployment once a rule has escalated: who answers now is whom it escalates to, so such a rule flags."""
    return replace(parts, policies=_Changed(parts.policies, _flagging))


def _flagging(policy: Policy) -> Policy:
    def flagging(checkpoints: Mapping[str, tuple[Rule, ...]]) -> dict[str, tuple[Rule, ...]]:
        return {
            checkpoint: tuple(
                replace(rule, then=Action.FLAG, message=None, upstream=None) if rule.then is Action.ESCALATE else rule
                for rule in its
            )
            for checkpoint, its in checkpoints.items()
        }

    overlays = tuple(replace(overlay, checkpoints=flagging(overlay.checkpoints)) for overlay in policy.overlays)
    return replace(policy, checkpoints=flagging(policy.checkpoints), overlays=overlays)


def rules_of(policy: Policy) -> Iterator[Rule]:
    """Every rule, those of overlays too."""
    for checkpoints in (policy.checkpoints, *(overlay.checkpoints for overlay in policy.overlays)):
        for its in checkpoints.values():
            yield from its


def check_upstreams(policy: Policy, names: Collection[str]) -> None:
    """Refuse a policy that escalates to somebody who is not there.

    Raises:
        PolicyError: One line for each such rule.
    """
    wrong = [
        f"{policy.source or policy.name}:{rule.line or 1}  {rule.place}.upstream: {rule.upstream!r} is no upstream here"
        for rule in rules_of(policy)
        if rule.upstream is not None and rule.upstream not in names
    ]
    if wrong:
        raise PolicyError("\n".join(wrong), hint=f"use {', '.join(sorted(names)) or 'none'}, or name it in proxy.yaml")
