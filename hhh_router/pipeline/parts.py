"""What every path needs, put together once at start by `assemble`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from uuid import uuid4

from hhh_router.calibration import Calibrators
from hhh_router.pipeline.conversations import Conversations
from hhh_router.pipeline.people import Hold, Tell
from hhh_router.pipeline.redaction import Redacting, TextRedacting
from hhh_router.pipeline.store import PolicyStore
from hhh_router.protocols import Generator, Reader
from hhh_router.settings import Settings
from hhh_router.trace import Sink
from hhh_router.trace.block import BundleRef
from hhh_router.trace.feedback_store import FeedbackStore
from hhh_router.trace.redact import Redactor


def new_request_id() -> str:
    """A name for one request, unique without coordination."""
    return f"hhh-{uuid4().hex}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The collaborators of one deployment."""

    reader: Reader
    generator: Generator
    calibrators: Calibrators
    policies: PolicyStore
    bundle_ref: BundleRef
    backbone_sha256: str | None
    sinks: Sequence[Sink]
    settings: Settings
    memory: FeedbackStore | None = None
    """Remembers finished requests, so that people can say what they think of them; None remembers nothing."""
    candidate: str | None = None
    """Names a candidate of ``policies``: asked beside the policy in force, never acting. None where there is none."""
    candidate_of: str | None = None
    """The policy that it stands beside; None is the default. A request under another one has no candidate."""
    redactor: Redactor = field(default_factory=Redactor)
    """Replaces secrets in whatever is kept or told anywhere but to the caller."""
    redacting: Callable[[], Redacting] = field(default=TextRedacting)
    """Takes out of each answer what the policy redacts."""
    hold: Hold | None = None
    """Has people decide about held calls; None where nobody is there, and a held call is stopped."""
    tell: Tell | None = None
    """Tells webhooks of decisions; None where the door does not."""
    conversations: Conversations = field(default_factory=Conversations)
    """What conversations have used up, for policies that ask."""
    answers_elsewhere: bool = False
    """True when an upstream answers: no mixture is applied, and role order is the upstream's business."""
    clock: Callable[[], float] = field(default=perf_counter)
    """Monotonic time, in seconds."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    """The time of day, with a zone, for policies that ask for it."""
    new_id: Callable[[], str] = field(default=new_request_id)
