"""What ``serve`` and ``proxy`` share: settings, socket, model, and what is printed at start."""

from __future__ import annotations

import logging

import typer


def run_server(*, host: str, port: int, policy: str | None, bundle: str | None, upstream: str | None = None) -> None:
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
    from hhh_router.assemble import build_pipeline, check_upstream

    from .session import ready_backbone

    settings = Settings.load(policy=policy, bundle=bundle)
    if upstream is not None:
        check_upstream(upstream)
    policies = PolicyStore.from_settings(settings)
    with listen(host, port, settings) as listening:
        ready_backbone(bundle)
        pipeline = build_pipeline(settings, upstream=upstream, serving=True)
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("hhh_router").setLevel(logging.INFO)
        name = pipeline.parts.bundle_ref.name

        def announce(url: str) -> None:
            typer.echo(f"hhh-router listens on {url}/v1")
            typer.echo(f"  policy    {policies.default.name}@{policies.default.version} ({policies.default.mode})")
            typer.echo(f"  bundle    {name}")
            if upstream is not None:
                typer.echo(f"  upstream  {upstream}")

        run(pipeline, listening, on_ready=announce)
