"""What the sidecar does with which request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from hhh_router.interfaces.proxy.hedging import Hedge
from hhh_router.interfaces.proxy.upstreams import Upstream

Mode = Literal["observe", "annotate", "enforce"]
"""``observe`` reads beside the request and records; ``annotate`` tells the caller too; ``enforce`` acts."""

MAX_REQUESTS = 1000
"""Under way together, fewer than the connections to upstreams that `RawClient` opens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Requests that are treated alike."""

    name: str
    paths: tuple[str, ...] = ("*",)
    """Globs, one of which the path has to match."""
    models: tuple[str, ...] = ("*",)
    """Globs, one of which the body's ``model`` has to match. Where all pass, the body is not looked into for it."""
    mode: Mode = "enforce"
    policy: str | None = None
    """Name in the deployment's policies; None takes the default."""
    candidate: str | None = None
    """Name in the deployment's policies of what is asked beside the route's policy, and never acts."""
    to: tuple[tuple[Upstream, float], ...]
    """Upstreams with their weights; one of them is drawn for each request."""
    fallback: tuple[Upstream, ...] = ()
    """Asked in this order when that one fails."""
    answer_here: bool = False
    """When all of them fail, the deployment's own mixture answers."""
    escalate_to: Upstream | None = None
    """Answers where a rule says ``escalate``."""
    hedge: Hedge | None = None
    """Who is asked as well where the first is silent for long, of requests that may be asked twice."""
    instruct: bool = False
    """Tell the upstream in words what weights the router would have given: it cannot be mixed."""

    def takes(self, path: str, model: str | None) -> bool:
        """Whether a request is this route's."""
        if not any(fnmatchcase(path, glob) for glob in self.paths):
            return False
        return not self.asks_model or any(fnmatchcase(model or "", glob) for glob in self.models)

    @property
    def asks_model(self) -> bool:
        """Whether it depends on the body."""
        return "*" not in self.models

    def order(self, draw: Callable[[], float]) -> list[Upstream]:
        """Who is asked, first to last: one drawn by weight, then the others, then the fallbacks.

        >>> a, b = Upstream(name="a", url="http://a"), Upstream(name="b", url="http://b")
        >>> [u.name for u in Route(name="r", to=((a, 1), (b, 3))).order(lambda: 0.5)]
        ['b', 'a']
        """
        left = draw() * sum(weight for _, weight in self.to)
        first = self.to[-1][0]
        for upstream, weight in self.to:
            left -= weight
            if left < 0:
                first = upstream
                break
        rest = [upstream for upstream, weight in self.to if upstream is not first and weight > 0]
        return [first, *rest, *(u for u in self.fallback if u is not first and u not in rest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    """How one sidecar works."""

    routes: Sequence[Route]
    """The first that takes a request has it."""
    others: Sequence[Upstream] = ()
    """Upstreams that no route names, and that policies may escalate to."""
    block: Literal["body", "headers", "none"] = "body"
    """Where callers are told in ``annotate`` and ``enforce``: headers and the ``hhh`` block, headers alone, or not."""
    unread_paths: Literal["pass", "refuse"] = "pass"
    """What ``enforce`` does with paths that nobody can read: embeddings, files, …"""
    guard_timeout_s: float = 30.0
    """Longest wait for one reading."""
    drain_s: float = 30.0
    """How long answers under way may go on after SIGTERM."""
    max_requests: int = MAX_REQUESTS
    """Requests under way together; one more is told to come back."""
    observe_queue: int = 256
    """Exchanges that wait to be read in ``observe``; one more is not read, and counted."""
    audit_failure: Literal["closed", "open"] = "closed"
    """What holds when the audit cannot be written: nothing leaves, or it goes on and the loss is counted."""
    audit_content: Literal["hashes", "full"] = "hashes"
    """``full`` keeps texts of prompts and answers in the audit, secrets replaced."""
    hold_path: Path | None = None
    """Queue of calls that a policy holds; None takes the one beside the audit."""
    hold_s: float | None = None
    """How long such a call waits; None takes the deployment's ``hold_s``."""
    hold_webhook: str | None = None
    """URL that is told of every held call; None takes the deployment's ``hold_webhook``."""

    def upstreams(self) -> list[Upstream]:
        """All of them, each once."""
        found: dict[str, Upstream] = {u.name: u for u in self.others}
        for route in self.routes:
            hedged = None if route.hedge is None else route.hedge.to
            for upstream in (*(u for u, _ in route.to), *route.fallback, route.escalate_to, hedged):
                if upstream is not None:
                    found[upstream.name] = upstream
        return list(found.values())


def find_route(routes: Sequence[Route], path: str, model: Callable[[], str | None]) -> Route | None:
    """The first route that takes a request; ``model`` is only asked where it matters."""
    for route in routes:
        if route.takes(path, model() if route.asks_model else None):
            return route
    return None
