"""What people say of requests that were answered, and what is remembered of a request so that it can be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from hhh_router.errors import InvalidRequest
from hhh_router.trace.block import Metadata
from hhh_router.types import NEED_LABELS, OUTCOMES, Action, Scores

VERDICTS: Final = ("refused_wrongly", "passed_wrongly")
"""Labels about what the policy did: it stopped what should have been answered, or let pass what should not."""
LABELS: Final = (*NEED_LABELS, *OUTCOMES, *VERDICTS)
MAX_NAME: Final = 100
"""Characters of a labeller's name."""
MAX_ID: Final = 200
_SHOWN = 40  # characters of a found number in a message
LEAST_PROBABILITY: Final = 0.001
"""A rarer draw would weigh a thousand requests: one such label would be the whole figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What one labeller says of one request."""

    request_id: str
    labels: Mapping[str, bool]
    """Some of `LABELS`."""
    by: str = ""
    """Who says so; a labeller's second word on a request takes the place of the first."""
    probability: float | None = None
    """How likely this request was to be drawn for labelling, in (0, 1]; None where it was not drawn at random (somebody
    complained, say), so that it stands for no other request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """One finished request as its policy saw it; never a word of it unless the deployment keeps texts."""

    request_id: str
    time: float
    """Seconds since 1970."""
    policy: str
    policy_version: int
    policy_sha256: str
    bundle_sha256: str
    calibration_id: str
    heads_sha256: str | None
    """Of the heads that made the scores."""
    dtype: str | None
    """Precision of the backbone under them."""
    action: str
    stopped: bool
    """A checkpoint stopped it, or would have if the policy were not in shadow mode."""
    prompt: Scores | None
    """The reading of the prompt alone."""
    reply: Scores | None
    """The last reading that saw a reply; None where there was none."""
    texts: Mapping[str, Any] | None = None
    """Request and reply, secrets replaced, where the deployment keeps them."""

    def as_json(self) -> dict[str, Any]:
        """For storage. One is made of every request, so nothing is copied: see that it is not changed."""
        told = {name: getattr(self, name) for name in _FIELDS}
        for name in ("prompt", "reply"):
            scores: Scores | None = told[name]
            if scores is not None:
                told[name] = {part: getattr(scores, part) for part in _SCORE_FIELDS}
        return told

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Remembered:
        """What `as_json` gave.

        Raises:
            TypeError: It did not give this.
        """
        read = {k: None if record[k] is None else Scores(**record[k]) for k in ("prompt", "reply")}
        return cls(**{**record, **read})


_FIELDS = tuple(f.name for f in fields(Remembered))
_SCORE_FIELDS = tuple(f.name for f in fields(Scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A remembered request and everything that was said of it."""

    request: Remembered
    said: tuple[Label, ...]
    """In the order in which it was said."""

    @property
    def weight(self) -> float | None:
        """How many requests it stands for: 1 / the probability with which it was drawn; None where it was not drawn."""
        drawn = [label.probability for label in self.said if label.probability is not None]
        return 1 / min(drawn) if drawn else None

    def verdict(self, name: str) -> bool | None:
        """What most labellers say; None where nobody says anything, or as many say the opposite."""
        votes = [label.labels[name] for label in self.said if name in label.labels]
        ayes = sum(votes)
        return None if 2 * ayes == len(votes) else 2 * ayes > len(votes)

    @property
    def should_stop(self) -> bool | None:
        """Whether it should have been stopped: the verdict on what the policy did, else whether it is harmful."""
        if self.request.stopped and (wrongly := self.verdict("refused_wrongly")) is not None:
            return not wrongly
        if not self.request.stopped and (wrongly := self.verdict("passed_wrongly")) is not None:
            return wrongly
        return self.verdict("harmful")


def remembered(
    metadata: Metadata,
    *,
    time: float,
    prompt: Scores | None,
    reply: Scores | None,
    heads_sha256: str | None,
    dtype: str | None,
) -> Remembered:
    """What is kept of a request, from its final block and its raw readings."""
    return Remembered(
        request_id=metadata.request_id,
        time=time,
        policy=metadata.policy.name,
        policy_version=metadata.policy.version,
        policy_sha256=metadata.receipt.policy_sha256,
        bundle_sha256=metadata.receipt.bundle_sha256,
        calibration_id=metadata.receipt.calibration_id,
        heads_sha256=heads_sha256,
        dtype=dtype,
        action=metadata.action,
        stopped=any(Action(d.action).stops for d in metadata.decisions),
        prompt=prompt,
        reply=reply,
    )


def make_label(
    request_id: object,
    labels: object,
    by: object = "",
    sampled: object = False,
    probability: object = None,
) -> Label:
    """A label out of what somebody sent.

    Raises:
        InvalidRequest: Something is no such thing; the message says what and what would be.
    """
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID or not request_id.isprintable():
        raise InvalidRequest(
            f"request_id: no printable text of 1 to {MAX_ID} characters",
            hint="send hhh.request_id of the reply, or its header x-hhh-request-id",
        )
    if by is None:
        by = ""
    if not isinstance(by, str) or len(by) > MAX_NAME or not by.isprintable():
        raise InvalidRequest(f"by: no printable text of at most {MAX_NAME} characters", hint="name the labeller")
    if not isinstance(labels, Mapping) or not labels:
        raise InvalidRequest("labels: no object with at least one label", hint=f"use {', '.join(LABELS)}")
    if unknown := [ascii(name)[1:-1][:MAX_NAME] for name in labels if name not in LABELS]:
        raise InvalidRequest(f"labels.{unknown[0]}: no label", hint=f"use {', '.join(LABELS)}")
    if wrong := [name for name, value in labels.items() if not isinstance(value, bool)]:
        raise InvalidRequest(f"labels.{wrong[0]}: neither true nor false", hint="leave out what is not known")
    told = {name: labels[name] for name in LABELS if name in labels}
    _check_agreement(told)
    return Label(request_id=request_id, labels=told, by=by, probability=_probability(sampled, probability))


def _probability(sampled: object, probability: object) -> float | None:
    if sampled is not None and not isinstance(sampled, bool):
        raise InvalidRequest("sampled: neither true nor false", hint="true where the request was drawn at random")
    if not sampled:
        if probability is not None:
            raise InvalidRequest(
                "probability: only goes with sampled: true", hint="leave it out of labels that were not drawn at random"
            )
        return None
    if isinstance(probability, bool) or not isinstance(probability, int | float):
        raise InvalidRequest(
            "probability: has to be told where sampled is true", hint="1 where every request is labelled, 0.01 for 1 %"
        )
    if not LEAST_PROBABILITY <= probability <= 1:  # also false for NaN
        raise InvalidRequest(
            f"probability: {str(probability)[:_SHOWN]} is not between {LEAST_PROBABILITY} and 1", hint="draw more often"
        )
    return float(probability)


def _check_agreement(labels: Mapping[str, bool]) -> None:
    if all(name in labels for name in VERDICTS):
        raise InvalidRequest("labels: refused_wrongly and passed_wrongly", hint="a request was one or the other")
    if labels.get("refused_wrongly") and labels.get("harmful"):
        raise InvalidRequest(
            "labels: refused_wrongly and harmful", hint="a harmful request was refused rightly; keep one of the two"
        )


def check_fits(label: Label, request: Remembered) -> None:
    """Refuse to keep what cannot be said of this request.

    Raises:
        InvalidRequest: It had no reply to label, or ended the other way.
    """
    about_reply = [name for name in OUTCOMES if name in label.labels]
    if about_reply and request.reply is None:
        raise InvalidRequest(
            f"labels.{about_reply[0]}: no reply of request {request.request_id} was read",
            hint="label the prompt: " + ", ".join(NEED_LABELS),
        )
    wrong = "passed_wrongly" if request.stopped else "refused_wrongly"
    if wrong in label.labels:
        did = "stopped" if request.stopped else "not stopped"
        raise InvalidRequest(
            f"labels.{wrong}: request {request.request_id} was {did}", hint="see hhh.decisions of its reply"
        )
