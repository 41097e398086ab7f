"""What ``serve`` and ``proxy`` share: settings, socket, model, and what is printed at start."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import NoReturn

import typer


def run_server(*, host: str, port: int, policy: str | None, candidate: str | None, bundle: str | None) -> None:
    """Serve until interrupted; the cheap checks come before the model is loaded.

    Raises:
        ConfigError: A setting, policy or bundle is wrong, or the address cannot be used.
        MissingExtra: The web framework or torch is not installed.
    """
    from hhh_router.errors import MissingExtra
    from hhh_router.pipeline.store import PolicyStore
    from hhh_router.settings import Settings

    try:
        from hhh_router.interfaces.server.run import listen, run
    except ImportError as error:
        raise MissingExtra("serve", needed_for="a server") from error
    from hhh_router.assemble import build_pipeline
    from hhh_router.pipeline.situation import SERVER
    from hhh_router.trace.logs import log_to_stderr

    from .session import ready_backbone

    settings = Settings.load(policy=policy, candidate=candidate, bundle=bundle)
    policies = PolicyStore.from_settings(settings, door=SERVER)
    with listen(host, port, settings) as listening:
        _end_on_sigterm()
        ready_backbone(bundle)
        pipeline = build_pipeline(settings, serving=True, door=SERVER)
        log_to_stderr(pipeline.parts.redactor)
        logging.getLogger("hhh_router").setLevel(logging.INFO)
        name = pipeline.parts.bundle_ref.name

        def announce(url: str) -> None:
            typer.echo(f"hhh-router listens on {url}/v1")
            typer.echo(f"  policy    {policies.default.name}@{policies.default.version} ({policies.default.mode})")
            if settings.candidate is not None:
                beside = policies.candidate(settings.candidate)
                typer.echo(f"  candidate {beside.name}@{beside.version} (asked, never acting)")
            typer.echo(f"  bundle    {name}")

        run(pipeline, listening, on_ready=announce)


def run_proxy(
    *,
    host: str,
    port: int,
    policy: str | None,
    candidate: str | None,
    bundle: str | None,
    upstream: str | None,
    config: Path | None,
    mode: str | None,
    audit: str | None,
) -> None:
    """Guard another server until interrupted; the cheap checks come before the model is loaded.

    Raises:
        ConfigError: A setting, policy, bundle or the proxy.yaml is wrong, or the address cannot be used.
        MissingExtra: The web framework, aiohttp or torch is not installed.
    """
    from hhh_router.errors import MissingExtra

    try:
        from hhh_router.interfaces.proxy.open import open_sidecar, plan_sidecar
        from hhh_router.interfaces.proxy.run import run
        from hhh_router.interfaces.server.run import listen
    except ImportError as error:
        raise MissingExtra("serve", needed_for="a proxy") from error
    from hhh_router.trace.logs import log_to_stderr

    from .session import ready_backbone

    plan = plan_sidecar(
        policy=policy, candidate=candidate, bundle=bundle, upstream=upstream, config=config, mode=mode, audit=audit
    )
    with listen(host, port, plan.settings) as listening:
        _end_on_sigterm()
        ready_backbone(bundle)
        sidecar = open_sidecar(plan)
        log_to_stderr(plan.redactor)
        logging.getLogger("hhh_router").setLevel(logging.INFO)

        def announce(url: str) -> None:
            typer.echo(f"hhh-router listens on {url}/v1")
            for line in plan.told(sidecar.pipeline):
                typer.echo(f"  {line}")

        run(sidecar, listening, on_ready=announce)


def _end_on_sigterm() -> None:
    """Make SIGTERM end the process with 0, whenever it comes.

    While the model is loaded nobody else listens to it, and process 1 of a container would not even die of it. uvicorn
    listens while it serves; when it has let everything end, it raises the signal once more.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(0)
