"""Where requests go: several upstreams, each with a circuit breaker, asked in an order until one answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from hhh_router.errors import BackendError, BackendTimeout, NotReached, Unavailable, UpstreamError
from hhh_router.interfaces.proxy.headers import Headers, replaced, target
from hhh_router.interfaces.proxy.hedging import Hedge, race

RETRIED = frozenset({429, 502, 503, 504, 529})
"""Statuses with which an upstream says that it did not take the request up; another may."""
BREAKS = frozenset({500, 502, 503, 504, 529})
"""Statuses that count against an upstream. 429 speaks of the caller's quota."""
KEYS = frozenset({b"authorization", b"x-api-key", b"api-key"})
"""Headers that hold somebody's key."""
CONNECT_S, FIRST_BYTE_S, IDLE_S = 10.0, 600.0, 120.0
BREAK_AFTER = 5
BREAK_S = 10.0
PAUSE_S = 0.2
"""Before the same upstream is asked again; doubled each time, and spread by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long an upstream may take."""

    connect_s: float = CONNECT_S
    """Until a connection stands."""
    first_byte_s: float = FIRST_BYTE_S
    """Until the head of the answer is there: models think for long."""
    idle_s: float = IDLE_S
    """Of silence within an answer."""


class Answer(Protocol):
    """An upstream's answer, as `upstream.raw` gives it."""

    status: int
    headers: Headers

    def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives."""
        ...

    def close(self) -> None:
        """Cut the connection, if the answer has not come to its end."""
        ...


class Translator(Protocol):
    """Asks a provider with another wire; see `translation`."""

    async def send(self, request: Outgoing, timeouts: Timeouts) -> Answer:
        """Send a request and wait until its answer begins."""
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...


class Client(Protocol):
    """Sends requests as they are; see `upstream.raw`."""

    async def send(
        self,
        method: str,
        url: str,
        headers: Headers,
        body: bytes | AsyncIterable[bytes] | None,
        *,
        connect_s: float,
        first_byte_s: float,
        idle_s: float,
    ) -> Answer:
        """Send a request and wait for the head of its answer."""
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...


class Breaker:
    """Stops asking who has failed several times in a row; after a while one request tries again.

    >>> now = [0.0]
    >>> breaker = Breaker(after=2, pause_s=10, clock=lambda: now[0])
    >>> breaker.failed(); breaker.failed(); breaker.wait_s
    10.0
    >>> now[0] = 10.0; breaker.wait_s, breaker.take(), breaker.take()
    (0.0, True, False)
    """

    def __init__(
        self, *, after: int = BREAK_AFTER, pause_s: float = BREAK_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._after, self._pause_s, self._clock = after, pause_s, clock
        self._failures = 0
        self._until = 0.0
        self._trying = False

    @property
    def wait_s(self) -> float:
        """Seconds until somebody may try; 0 when it may be asked."""
        return max(0.0, self._until - self._clock()) if self._failures >= self._after else 0.0

    def take(self) -> bool:
        """Whether a request may be sent; of those after a pause only one until its outcome is known."""
        if self._failures < self._after:
            return True
        if self._trying or self.wait_s > 0:
            return False
        self._trying = True
        return True

    def succeeded(self) -> None:
        """It answered."""
        self._failures, self._trying = 0, False

    def failed(self) -> None:
        """It did not answer, or with an error of its own."""
        self._failures += 1
        self._trying = False
        if self._failures >= self._after:
            self._until = self._clock() + self._pause_s

    def released(self) -> None:
        """Nobody knows how it went: the client left first."""
        self._trying = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """One server that answers."""

    name: str
    url: str
    """Base URL as a client would have it; of a translated one ``litellm:`` and the model's name."""
    translator: Translator | None = field(default=None, compare=False, repr=False)
    """Sends what comes here in its provider's wire; None sends it as it is."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: int = 0
    """How often it is asked again when nothing was sent, or when it said that it had not begun."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent in place of the client's own: keys of the deployment."""
    otherwise: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent where the client sends no key of its own."""
    breaker: Breaker = field(default_factory=Breaker, compare=False)
    model: str | None = None
    """Replaces the body's ``model``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A request as it is sent on."""

    method: str
    path: str
    query: str
    headers: Headers
    body: bytes | AsyncIterable[bytes] | None
    changes_nothing: bool = False
    """Whether another upstream may be asked although the first may have begun: it costs, and does no harm."""

    @property
    def can_repeat(self) -> bool:
        """Whether its body is still at hand after it was sent."""
        return not isinstance(self.body, AsyncIterable)


@dataclass(slots=True)
class Asking:
    """What became of a request: who was asked, and who answered."""

    tried: list[str] = field(default_factory=list)
    """Names and outcomes in order, such as ``main: 503``."""
    answered_by: str | None = None
    hedge: Literal["won", "lost"] | None = None
    """What became of the second upstream that was asked beside the first; None where none was."""


class Upstreams:
    """Asks upstreams in an order until one answers.

    Args:
        client: Sends.
        draw: A number in [0, 1), for the pauses between tries.
        sleep: Waits.
    """

    def __init__(
        self,
        client: Client,
        *,
        draw: Callable[[], float] = random.random,
        sleep: Callable[[float], object] = asyncio.sleep,
    ) -> None:
        self._client = client
        self._draw = draw
        self._sleep = sleep
        self.hedges: Counter[tuple[str, str]] = Counter()
        """How often each upstream was asked beside another, and ``won`` or ``lost``."""

    async def ask(
        self,
        order: Sequence[Upstream],
        make: Callable[[Upstream], Outgoing],
        asking: Asking,
        hedge: Hedge | None = None,
    ) -> Answer:
        """The answer of the first that gives one; the last one's own words when all of them fail.

        An answer that has begun is never asked for again. The same upstream is asked again only where nothing was sent,
        or where it turned the request away; another one also where the first fell silent or broke off, if the request
        changes nothing. With a hedge, somebody else is asked as well when the first of them is silent for long.

        Raises:
            NotReached, UpstreamError, BackendTimeout: The last one failed without an answer.
            Unavailable: All of them have failed so often of late that nobody asks them for a while.
        """
        failure: BackendError | None = None
        open_for = [u for u in order if u.breaker.wait_s == 0]
        for i, upstream in enumerate(open_for):
            is_last = i == len(open_for) - 1
            for again in range(upstream.retries + 1):
                if not upstream.breaker.take():
                    break
                request = make(upstream)
                who = upstream
                try:
                    if hedge is not None and i == again == 0 and hedge.to is not upstream and request.can_repeat:
                        who, answer = await self._hedged(upstream, request, hedge, make, asking)
                    else:
                        answer = await self._send(upstream, request)
                except NotReached as error:
                    failure = error
                    asking.tried.append(f"{upstream.name}: not reached")
                except (UpstreamError, BackendTimeout) as error:
                    asking.tried.append(f"{upstream.name}: {error.code}")
                    if not request.can_repeat or not request.changes_nothing:
                        raise
                    failure = error
                    break
                else:
                    final = is_last and again == upstream.retries
                    if answer.status not in RETRIED or final or not request.can_repeat:
                        asking.answered_by = who.name
                        asking.tried.append(f"{who.name}: {answer.status}")
                        return answer
                    asking.tried.append(f"{who.name}: {answer.status}")
                    answer.close()
                if again < upstream.retries:
                    await self._pause(again)
        if failure is not None:
            raise failure
        wait_s = min((u.breaker.wait_s for u in order), default=0.0)
        names = ", ".join(u.name for u in order)
        raise Unavailable(
            f"no upstream is asked at the moment ({names}): each failed several times in a row",
            hint="try again later",
            retry_after_s=max(1.0, wait_s),
        )

    async def _hedged(
        self,
        upstream: Upstream,
        request: Outgoing,
        hedge: Hedge,
        make: Callable[[Upstream], Outgoing],
        asking: Asking,
    ) -> tuple[Upstream, Answer]:
        async def second() -> Answer:
            if not hedge.to.breaker.take():
                raise Unavailable(f"{hedge.to.name} is not asked at the moment")
            asking.hedge = "lost"
            asking.tried.append(f"{hedge.to.name}: asked beside {upstream.name}")
            return await self._send(hedge.to, make(hedge.to))

        try:
            answer, by_second = await race(
                lambda: self._send(upstream, request),
                second,
                after_s=hedge.after_s,
                turned_away=lambda answer: answer.status in RETRIED,
            )
            asking.hedge = "won" if by_second else asking.hedge
        finally:
            if asking.hedge is not None:
                self.hedges[hedge.to.name, asking.hedge] += 1
        return (hedge.to if by_second else upstream), answer

    async def _pause(self, again: int) -> None:
        waited = self._sleep(PAUSE_S * 2**again * (0.5 + self._draw()))
        if asyncio.iscoroutine(waited):
            await waited

    async def _send(self, upstream: Upstream, request: Outgoing) -> Answer:
        known = False
        try:
            answer = await self._answer(upstream, request)
            known = True
        except BackendError:
            known = True
            upstream.breaker.failed()
            raise
        finally:
            if not known:
                upstream.breaker.released()
        if answer.status in BREAKS:
            upstream.breaker.failed()
        else:
            upstream.breaker.succeeded()
        return answer

    async def _answer(self, upstream: Upstream, request: Outgoing) -> Answer:
        if upstream.translator is not None:
            return await upstream.translator.send(request, upstream.timeouts)
        return await self._client.send(
            request.method,
            target(upstream.url, request.path, request.query),
            _with_keys(upstream, request.headers),
            request.body,
            connect_s=upstream.timeouts.connect_s,
            first_byte_s=upstream.timeouts.first_byte_s,
            idle_s=upstream.timeouts.idle_s,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _with_keys(upstream: Upstream, headers: Headers) -> list[tuple[bytes, bytes]]:
    """The client's headers with the deployment's own keys; a client's key never goes where the deployment has one."""
    given = dict(upstream.headers)
    if upstream.otherwise and not KEYS & {name for name, _ in headers}:
        given |= upstream.otherwise
    kept = [(n, v) for n, v in headers if n not in KEYS] if KEYS & {k.lower().encode() for k in given} else headers
    return replaced(kept, [(k.lower().encode(), v.encode()) for k, v in given.items()])
