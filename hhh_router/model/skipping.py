"""``skipping.json`` of a bundle: which experts need not be run where, and what leaving them out changes.

Like ``quantisation.json`` it is a finding about the bundle, names what it was measured on, and does not change the
bundle's hash. It is used where ``HHH_ROUTER_SKIP_EXPERTS`` is set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError
from hhh_router.model.quantisation import measured_parts, read_record, write_record

SKIPPING = "skipping.json"
_AGAIN = "the file is written by hhh-router bundle skip; restore it, or remove it and fit again"


class SkipRecord(BaseModel):
    """Thresholds per block of layers, and the divergence they were found to cause."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    thresholds: tuple[float, ...] = Field(min_length=1)
    """An expert of a smaller weight is not run in that block; lowest block first."""
    parts: dict[str, str]
    """What was measured, see `measured_parts`."""
    budget_nats: float = Field(gt=0)
    """Mean KL divergence of the next token that was allowed."""
    mean_nats: float = Field(ge=0)
    """What it came to."""
    skipped: float = Field(ge=0, le=1)
    """Share of experts with a weight, over rows and blocks, that are not run."""
    idle: float = Field(ge=0, le=1)
    """Share of rows and blocks in which none is run, so that the block is the bare backbone's."""
    n: int = Field(ge=1)
    """Tokens."""
    replies: int = Field(ge=1)
    seed: int
    data_sha256: str
    dtype: str
    """Precision that the backbone ran in."""

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.mean_nats > self.budget_nats:
            raise ValueError(f"mean_nats {self.mean_nats:g} is over budget_nats {self.budget_nats:g}")
        if any(not 0 <= t <= 1 for t in self.thresholds):
            raise ValueError("a threshold is a weight, between 0 and 1")
        return self

    @classmethod
    def read(cls, path: Path) -> SkipRecord:
        """Read and check a file that is there.

        Raises:
            BundleError: Unreadable, not JSON, or with mistakes; each field is named.
        """
        return read_record(cls, path, _AGAIN)


def keep_skipping(bundle: Bundle, record: SkipRecord) -> Path:
    """Write the record into a bundle; returns the file.

    Raises:
        BundleError: It cannot be written.
    """
    return write_record(bundle.root / SKIPPING, record)


def require_skipping(bundle: Bundle) -> SkipRecord:
    """The record that lets a bundle be served with experts left out.

    Raises:
        BundleError: There is none, it is broken, or it was made for other parts than the bundle has.
    """
    path = bundle.root / SKIPPING
    hint = f"fit it: hhh-router bundle skip --bundle {bundle.root} --data DIR; or unset HHH_ROUTER_SKIP_EXPERTS"
    if not path.is_file():
        raise BundleError(f"{bundle.root}: which experts may be skipped has not been measured", hint=hint)
    record = SkipRecord.read(path)
    has = measured_parts(bundle)
    if other := [name for name in sorted({*has, *record.parts}) if has.get(name) != record.parts.get(name)]:
        raise BundleError(f"{path}: was measured with other {', '.join(other)} than the bundle has", hint=hint)
    return record
