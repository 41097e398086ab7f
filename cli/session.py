"""The router behind a command: opened with its options, backbone fetched first, closed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hhh_router.interfaces.sdk import HHHRouter


@contextmanager
def opened(ctx: typer.Context, *, policy: str | None, bundle: str | None) -> Iterator[HHHRouter]:
    """A router, ready to be asked.

    ``ctx.obj`` may hold another way to make one, with the keywords of ``HHHRouter``: tests hand in fakes that way.
    """
    from .render import error_console

    make: Any = ctx.obj
    if make is None:
        from hhh_router.interfaces.sdk import HHHRouter as make

        ready_backbone(bundle)
    with error_console().status("loading the model"):  # shown on terminals only
        router = make(bundle=bundle, policy=policy)
    with router:
        yield router


def ready_backbone(bundle: str | None) -> None:
    """Fetch a bundle's backbone with a progress bar, if it is not there; nothing is shown when it is.

    Raises:
        BundleError: No such bundle, or its backbone cannot be had.
    """
    from hhh_router.bundle import Bundle
    from hhh_router.model.fetch import backbone_status, fetch_backbone
    from hhh_router.settings import Settings

    from .render import error_console, fetch_progress

    settings = Settings.load(bundle=bundle)
    loaded = Bundle.load(settings.bundle)
    spec = loaded.manifest.backbone
    if not backbone_status(spec, settings.cache_dir, root=loaded.root).present:
        with fetch_progress(error_console(), spec.source.rsplit("/", 1)[-1]) as progress:
            fetch_backbone(spec, settings.cache_dir, root=loaded.root, progress=progress)


def exit_status(result: Any) -> int:
    """0 when the reply reached the caller, 3 when a decision stopped it."""
    from hhh_router.errors import EXIT_ALLOW, Blocked, exit_code

    try:
        result.raise_for_decision()
    except Blocked as error:
        return exit_code(error)
    return EXIT_ALLOW
