"""From options and files to a sidecar that can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from hhh_router.assemble import build_pipeline, check_upstream, open_raw_client, open_redactor
from hhh_router.errors import SettingsError
from hhh_router.interfaces.proxy.app import Sidecar
from hhh_router.interfaces.proxy.config import make_config, patterns, read_proxy_file, retention, simple_config
from hhh_router.interfaces.proxy.policies import check_upstreams, rules_of
from hhh_router.interfaces.proxy.routes import Mode, ProxyConfig
from hhh_router.interfaces.proxy.translation import PREFIX
from hhh_router.interfaces.proxy.upstreams import Upstreams
from hhh_router.pipeline import Pipeline, PolicyStore
from hhh_router.pipeline.situation import SIDECAR
from hhh_router.policy import check_door, load_policy
from hhh_router.settings import Settings
from hhh_router.trace.audit import Retention, check_place, default_audit, open_audit, shown_place
from hhh_router.trace.redact import Patterns, Redactor
from hhh_router.types import Action


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarPlan:
    """Everything that could be checked before a model is loaded."""

    settings: Settings
    config: ProxyConfig
    audit: str
    """A file, a URL, or ``none``. It may hold a password."""
    retention: Retention
    """Of the audit."""
    redactor: Redactor
    """Replaces secrets in whatever is kept."""

    def told(self, pipeline: Pipeline) -> list[str]:
        """What an operator wants to see at the start."""
        policy = pipeline.policies.default
        lines = [
            f"policy    {policy.name}@{policy.version} ({policy.mode})",
            f"bundle    {pipeline.parts.bundle_ref.name}",
        ]
        for route in self.config.routes:
            names = ", ".join(u.url for u, _ in route.to)
            lines.append(f"route     {route.name}: {route.mode} → {names}")
        if (name := self.settings.candidate) is not None:
            candidate = pipeline.policies.candidate(name)
            lines.insert(1, f"candidate {candidate.name}@{candidate.version} (asked, never acting)")
        lines.append(f"audit     {shown_place(self.audit)}")
        return lines


def plan_sidecar(
    *,
    policy: str | None,
    bundle: str | None,
    upstream: str | None,
    config: Path | None,
    mode: str | None,
    audit: str | None,
    candidate: str | None = None,
) -> SidecarPlan:
    """Check every option and file.

    Raises:
        ConfigError: One of them is wrong.
        MissingExtra: LiteLLM is not installed, and an upstream needs it.
    """
    if (upstream is None) == (config is None):
        raise SettingsError(
            "one of --upstream and --config is meant"
            if upstream is None
            else "--upstream and --config exclude each other",
            hint="name the server that answers with --upstream URL, or several in a proxy.yaml with --config FILE",
        )
    if mode is not None and mode not in get_args(Mode):
        raise SettingsError(f"--mode {mode!r} is not known", hint=f"use {', '.join(get_args(Mode))}")
    chosen = cast("Mode | None", mode)
    kept = Retention()
    own: Patterns = ()
    entities: list[str] = []
    if upstream is not None:
        if not upstream.startswith(PREFIX):
            check_upstream(upstream)
        settings = Settings.load(policy=policy, candidate=candidate, bundle=bundle)
        made, where = simple_config(upstream, settings, mode=chosen or "enforce"), audit
    else:
        assert config is not None
        file = read_proxy_file(config)
        settings = Settings.load(policy=policy or file.policy, candidate=candidate or file.candidate, bundle=bundle)
        made, where = make_config(file, mode=chosen, max_bytes=settings.max_body_bytes), audit or file.audit.path
        kept, own, entities = retention(file), patterns(file), file.audit.pii
    names = {u.name for u in made.upstreams()}
    store = PolicyStore.from_settings(settings, door=SIDECAR)
    named = [name for route in made.routes for name in (route.policy, route.candidate) if name is not None]
    beside = [] if settings.candidate is None else [store.candidate(settings.candidate)]
    for policy_ in [store.default, *beside, *map(load_policy, named)]:
        check_door(policy_, SIDECAR)
        check_upstreams(policy_, names)
    if where is not None:
        check_place(where)
    elif settings.audit_url is not None:
        where = settings.audit_url.get_secret_value()
    return SidecarPlan(
        settings=settings,
        config=made,
        audit=where or str(default_audit()),
        retention=kept,
        redactor=open_redactor(settings, own, entities),
    )


def open_sidecar(plan: SidecarPlan) -> Sidecar:
    """Load the model and open the audit. Blocks for seconds; may import torch.

    Raises:
        ConfigError: The bundle is wrong, or the audit cannot be written.
        MissingExtra: torch, aiohttp or the audit's database driver is not installed.
    """
    client = open_raw_client(2 * plan.config.max_requests)  # a request may ask two upstreams at once
    audit = open_audit(plan.audit, redactor=plan.redactor, retention=plan.retention)
    pipeline = build_pipeline(plan.settings, serving=True, door=SIDECAR, redactor=plan.redactor)
    for route in plan.config.routes:
        if route.policy is not None:
            pipeline.policies.add_file(route.policy)
        if route.candidate is not None:
            pipeline.policies.add_candidate(route.candidate)
    sidecar = Sidecar(pipeline, plan.config, Upstreams(client), audit)
    policies = [pipeline.policies.get(route.policy) for route in plan.config.routes]
    if any(rule.then is Action.HOLD for policy in policies for rule in rules_of(policy)):
        sidecar.approvals.open()
    return sidecar
