"""A sidecar whose upstream LiteLLM translates to, before a provider on loopback."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hhh_router.interfaces.proxy.routes import Route
from hhh_router.interfaces.proxy.translation import open_translator
from hhh_router.interfaces.proxy.upstreams import Breaker, Timeouts, Upstream
from tests.e2e.loopback import served_app
from tests.e2e.sidecars import Asked, Said, Stub, sidecar

Policies = Callable[..., Path]
KEY = "key-of-the-provider"
PROVIDERS = {
    "anthropic": ("anthropic/claude-sonnet-4-5", "", ["/v1/messages"]),
    "openai": ("openai/gpt-4o", "/v1", ["/v1/chat/completions", "/v1/completions", "/v1/responses"]),
    "mistral": ("mistral/mistral-large-latest", "/v1", ["/v1/chat/completions"]),
}
"""Model, what its base URL ends in, and the paths on which it is asked."""


def translated(
    model: str,
    base: str,
    *,
    name: str = "a",
    timeouts: Timeouts | None = None,
    breaker: Breaker | None = None,
    **more: Any,
) -> Upstream:
    """An upstream that is translated to, of the name that the sidecar's tests use."""
    return Upstream(
        name=name,
        url=f"litellm:{model}",
        translator=open_translator(model, place="here", api_key=KEY, api_base=base, max_bytes=100_000, **more),
        timeouts=timeouts or Timeouts(first_byte_s=20, idle_s=20),
        breaker=breaker or Breaker(),
    )


@contextmanager
def guarded(
    watchful: Policies, provider: str, answer: Callable[[Asked], Said] | Said, mode: str = "enforce", **more: Any
) -> Iterator[tuple[str, Stub]]:
    """The base URL of a sidecar before a provider that answers so, and the provider."""
    model, end, _ = PROVIDERS[provider]
    stub = Stub(answer)
    with served_app(stub) as theirs:
        upstream = translated(model, theirs.removesuffix("/v1") + end, **more)
        route = Route(name="all", mode=mode, to=((upstream, 1.0),))  # type: ignore[arg-type]
        with sidecar(route, policy=watchful()) as (url, _):
            yield url, stub
