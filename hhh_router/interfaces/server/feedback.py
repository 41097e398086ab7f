"""``POST /v1/feedback`` takes what people say of earlier requests; ``GET /v1/drift`` tells what follows from it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from hhh_router.calibration.monitor import Figure, State, reading_figures
from hhh_router.errors import InvalidRequest, Unavailable
from hhh_router.interfaces.server.http import JsonReply, read_json
from hhh_router.interfaces.server.keys import owner
from hhh_router.interfaces.server.metrics import Metrics
from hhh_router.pipeline import Pipeline
from hhh_router.pipeline.watch import bound_text, label_figures
from hhh_router.policy import Policy
from hhh_router.trace.feedback import Labelled, make_label

_log = logging.getLogger(__name__)

FIELDS: Final = ("request_id", "labels", "by", "sampled", "probability")
MAX_BODY_BYTES: Final = 65_536
"""A label is a few hundred bytes."""
EVERY_S: Final = 60.0
"""They are looked at that often although nobody asks, so that the log tells of changes."""
FRESH_S: Final = 10.0
"""Figures are worked out anew at most that often, however often they are asked for."""


async def feedback(request: Request, pipeline: Pipeline) -> Response:
    """``{request_id, labels, by?, sampled?, probability?}`` → what became of it."""
    body = await read_json(request, max_bytes=min(MAX_BODY_BYTES, pipeline.settings.max_body_bytes))
    if unknown := sorted(set(body) - set(FIELDS)):
        raise InvalidRequest(f"{unknown[0][:100]}: unknown field", hint=f"use {', '.join(FIELDS)}")
    label = make_label(**{"request_id": None, "labels": None, **body})
    result = await pipeline.feedback(label, key=owner(request))
    return JsonReply({"object": "feedback", **result.as_json()})


class Monitor:
    """The figures of a server's traffic beside their bounds; says in the log when one leaves its bound or comes back.

    Args:
        pipeline: Whose labels and policies.
        metrics: Have seen every reading since the start, and show the figures.
        clock: Monotonic, in seconds.
    """

    def __init__(self, pipeline: Pipeline, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pipeline, self._metrics, self._clock = pipeline, metrics, clock
        self._figures: list[Figure] = []
        self._labelled = 0
        self._looked: float | None = None
        self._took = 0.0
        self._states: dict[tuple[str, str], State] = {}
        self._one_at_a_time = asyncio.Lock()

    async def look(self, *, again: bool = False) -> list[Figure]:
        """The figures, at most `FRESH_S` old.

        Args:
            again: Something was said since; look a second after the last time already.
        """
        async with self._one_at_a_time:
            begun = self._clock()
            pause = max(FRESH_S / 10 if again else FRESH_S, 10 * self._took)  # a tenth of the time at most goes to this
            if self._looked is None or begun - self._looked >= pause:
                try:
                    await self._look()
                except Unavailable as error:  # metrics are told all the same
                    _log.error("drift: labels cannot be read (%s)", error.message)
                self._looked = self._clock()
                self._took = self._looked - begun
        return self._figures

    async def watch(self, every_s: float = EVERY_S) -> None:
        """Look now and then, for the log, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def _look(self) -> None:
        memory = self._pipeline.parts.memory
        rows = await memory.labelled() if memory is not None else []
        readings = reading_figures(self._metrics.drift, self._metrics.support) + self._metrics.comparisons.figures()
        self._figures = readings + await asyncio.to_thread(self._of_labels, rows)
        self._labelled = len(rows)
        self._metrics.show(self._figures)
        self._say()

    def told(self, figures: Sequence[Figure]) -> dict[str, Any]:
        """The reply of ``GET /v1/drift``."""
        return {
            "object": "drift",
            "labelled": self._labelled,
            "outside": sum(f.state == "outside" for f in figures),
            "figures": [f.as_json() for f in figures],
            "comparisons": [pair.as_json() for pair in self._metrics.comparisons.pairs],
        }

    def _of_labels(self, rows: Sequence[Labelled]) -> list[Figure]:
        calibrators = self._pipeline.parts.calibrators
        return label_figures(rows, calibrators, self._policies({row.request.policy for row in rows}))

    def _policies(self, asked: set[str]) -> list[Policy]:
        """Those that somebody's labelled request was decided by, and the default."""
        policies = self._pipeline.policies
        loaded = [policies.get(name) for name in policies.names]
        return [p for p in loaded if p.name in asked or p.name == policies.default.name]

    def _say(self) -> None:
        """One line where a figure has left its bound, and one where it no longer has."""
        for f in self._figures:
            before, self._states[f.name, f.of] = self._states.get((f.name, f.of), "open"), f.state
            if f.state == "outside" and before != "outside":
                _log.warning(
                    "drift: %s of %s left its bound: %.4f, bound %s, n=%d, confidence %g",
                    f.name, f.of, -1.0 if f.value is None else f.value, bound_text(f), f.n, f.level,
                )  # fmt: skip
            elif before == "outside" and f.state != "outside":
                _log.info("drift: %s of %s is no longer known to be outside its bound, n=%d", f.name, f.of, f.n)
