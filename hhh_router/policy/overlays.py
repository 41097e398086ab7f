"""A policy as it holds for one tenant."""

from __future__ import annotations

from dataclasses import replace

from hhh_router.policy.patterns import compile_glob
from hhh_router.policy.schema import Overlay, Policy


def for_tenant(policy: Policy, tenant: str | None) -> Policy:
    """The policy with the first overlay that names the tenant laid over it; itself where none does.

    Name, version and hash stay: the hash covers all overlays. Which one was applied is in ``overlay``.

    An overlay that only tightens has its rules asked beside the policy's own, and the stricter decision holds: whatever
    the rules say, nothing that was stopped goes through. One that may loosen has its rules asked first.

    Raises:
        ValueError: The policy has overlays, and nobody said whose traffic it is.
    """
    if not policy.overlays or policy.overlay is not None:
        return policy
    if tenant is None:
        raise ValueError(f"policy {policy.name} differs between tenants, and the tenant is not known")
    for overlay in policy.overlays:
        if any(compile_glob(glob).fullmatch(tenant) for glob in overlay.tenants):
            return apply_overlay(policy, overlay)
    return policy


def apply_overlay(policy: Policy, overlay: Overlay) -> Policy:
    """The policy with one overlay laid over it."""
    checkpoints, stricter = dict(policy.checkpoints), {}
    for checkpoint, rules in overlay.checkpoints.items():
        own = policy.checkpoints.get(checkpoint)
        if overlay.may_loosen and own is not None:
            checkpoints[checkpoint] = (*rules, *own)
        else:
            stricter[checkpoint] = rules
    return replace(
        policy,
        lower={**policy.lower, **overlay.lower},
        upper={**policy.upper, **overlay.upper},
        floors=(*policy.floors, *overlay.floors),
        checkpoints=checkpoints,
        stricter=stricter,
        on_error=overlay.on_error or policy.on_error,
        mode=overlay.mode or policy.mode,
        overlay=overlay.place,
    )
