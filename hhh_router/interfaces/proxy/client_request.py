"""What is known of one client's request while it is answered."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.parse import our_fields
from hhh_router.interfaces.proxy.entry import Entry
from hhh_router.interfaces.proxy.headers import find
from hhh_router.interfaces.proxy.hedging import Hedge, may_be_asked_twice
from hhh_router.interfaces.proxy.incoming import Incoming, Out
from hhh_router.interfaces.proxy.observe import parsed
from hhh_router.interfaces.proxy.routes import Mode, Route
from hhh_router.interfaces.proxy.upstreams import Asking
from hhh_router.interfaces.proxy.wires import Asked, Wire
from hhh_router.interfaces.proxy.wires.reading import conversing
from hhh_router.interfaces.proxy.wires.texts import rewritten
from hhh_router.interfaces.server.keys import Key, as_caller, check_policy
from hhh_router.policy import Policy, headers_read
from hhh_router.trace.spans import redacted
from hhh_router.types import Caller

if TYPE_CHECKING:
    from hhh_router.interfaces.proxy.app import Sidecar


class ClientRequest:
    """One request: what came, whose it is, where it goes, and what is kept of it."""

    def __init__(self, app: Sidecar, scope: Scope, receive: Receive, send: Send) -> None:
        self.app = app
        self.scope = scope
        self.request_id = app.pipeline.parts.new_id()
        self.incoming = Incoming(scope, receive)
        self.entry = Entry(app.audit, self.request_id, app.config.audit_failure, app.keep)
        self.out = Out(send, self.entry.stored)
        self.asking = Asking()
        self.wire: Wire | None = None
        """None where nobody can read it."""
        self.asked = Asked(messages=())
        self.key: Key | None = None
        self.body: bytes | None = None
        """All of it; None where it is not read, or too large to be."""
        self.rewritten: Mapping[str, Any] | None = None
        """The body without what a decision redacts; None where nothing was taken out."""
        self._route: Route | None = None
        self._parsed: Mapping[str, Any] | None = None

    @property
    def route(self) -> Route:
        """Whose rules hold; there is one once the request has begun to be answered."""
        assert self._route is not None
        return self._route

    @route.setter
    def route(self, route: Route) -> None:
        self._route = route

    @property
    def mode(self) -> Mode:
        """Of its route."""
        return self.route.mode

    @property
    def path(self) -> str:
        """As the framework decoded it, short enough for a message."""
        return str(self.scope["path"][:200])

    @property
    def encoding(self) -> bytes | None:
        """The body's ``Content-Encoding``."""
        return find(self.incoming.headers, b"content-encoding")

    def model(self) -> str | None:
        """The model that the body names, where it can be read."""
        try:
            return str(self.object().get("model")) if self.body else None
        except InvalidRequest:
            return None

    def object(self) -> Mapping[str, Any]:
        """The body.

        Raises:
            InvalidRequest: It is no object.
        """
        if self._parsed is None:
            strict = self._route is None or self.mode == "enforce"
            limit = self.app.pipeline.settings.max_body_bytes
            self._parsed = parsed(self.body or b"", self.encoding, max_bytes=limit, strict=strict)
        return self._parsed

    def hedge(self) -> Hedge | None:
        """Who else may be asked for an answer, where the route has somebody and the body is one that allows it."""
        if self.route.hedge is None or self.wire is None or self.body is None:
            return None
        try:
            allowed = may_be_asked_twice(self.wire.name, self.object())
        except InvalidRequest:
            return None
        return self.route.hedge if allowed else None

    def redact(self, kinds: Sequence[str]) -> Mapping[str, int]:
        """Take texts of these kinds out of what goes on; returns what was taken out, and how often."""
        assert self.wire is not None
        counts: Counter[str] = Counter()
        body = rewritten(self.wire.name, self.object(), lambda text: redacted(text, kinds, counts))
        self.rewritten = body if counts else None
        return counts

    def own_policy(self) -> str | None:
        """Which policy the caller picks in ``hhh``, or else the route's.

        Raises:
            InvalidRequest: What is said in ``hhh`` is not understood.
            PolicyNotAllowed: It may not be picked.
        """
        assert self.body is not None
        policy = self.route.policy
        if b'"hhh"' in self.body and self.encoding is None:
            ours = our_fields(self.object())
            if ours.get("weights") is not None:
                raise InvalidRequest("hhh.weights: no mixture answers here", hint="leave the weights out")
            if (given := ours.get("policy")) is not None:
                if not isinstance(given, str):
                    raise InvalidRequest("hhh.policy: no string", hint="send a policy's name")
                policy = given
        found = self.app.pipeline.policies.get(policy)
        if self.key is not None:
            check_policy(self.key, found.name)
        return policy

    def caller(self, policy: Policy) -> Caller:
        """What policies may ask of whoever sent this; of headers only those that this one reads, or the candidate."""
        policies = self.app.pipeline.policies
        name = (self._route.candidate if self._route else None) or self.app.pipeline.parts.candidate
        asked = [policy] if name is None else [policy, policies.candidate(name)]
        wanted = {header.encode() for p in asked for header in headers_read(p)}
        headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in self.incoming.headers if n in wanted}
        caller = as_caller(self.key, self.scope["path"], self.incoming.headers)
        return conversing(replace(caller, headers=headers), self.asked)

    def start_intent(self, policy: str | None) -> None:
        """Begin to store what is about to be done."""
        found = self.app.pipeline.policies.get(policy)
        self.entry.begin(
            {
                "method": self.incoming.method,
                "path": self.incoming.path,
                "wire": self.wire.name if self.wire else None,
                "route": self.route.name,
                "mode": self.mode,
                "policy": f"{found.name}@{found.version}",
                "policy_sha256": found.hash,
                "body_sha256": hashlib.sha256(self.body).hexdigest() if self.body else None,
            }
        )
