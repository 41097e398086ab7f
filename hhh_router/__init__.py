"""Guardrail and routing middleware for LLM apps, around a calibrated mixture of helpful, harmless and honest experts.

The public names are loaded when they are first used: ``import hhh_router`` itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hhh_router.errors import (
        BackendError,
        Blocked,
        ConfigError,
        HHHRouterError,
        MissingExtra,
        RequestError,
    )
    from hhh_router.interfaces.aio import AsyncHHHRouter
    from hhh_router.interfaces.sdk import ChatStream, HHHRouter
    from hhh_router.pipeline.results import ChatResult, GuardResult, RouteResult
    from hhh_router.settings import Settings
    from hhh_router.trace.block import Metadata
    from hhh_router.types import Action, Message, Weights

__all__ = [
    "Action",
    "AsyncHHHRouter",
    "BackendError",
    "Blocked",
    "ChatResult",
    "ChatStream",
    "ConfigError",
    "GuardResult",
    "HHHRouter",
    "HHHRouterError",
    "Message",
    "Metadata",
    "MissingExtra",
    "RequestError",
    "RouteResult",
    "Settings",
    "Weights",
]

_HOMES = {
    "errors": ("BackendError", "Blocked", "ConfigError", "HHHRouterError", "MissingExtra", "RequestError"),
    "interfaces.aio": ("AsyncHHHRouter",),
    "interfaces.sdk": ("ChatStream", "HHHRouter"),
    "pipeline.results": ("ChatResult", "GuardResult", "RouteResult"),
    "settings": ("Settings",),
    "trace.block": ("Metadata",),
    "types": ("Action", "Message", "Weights"),
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
