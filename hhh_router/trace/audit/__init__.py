"""The audit: what a proxy was about to let out, before the first byte left, and what became of it. Hash-chained."""

from hhh_router.trace.audit.chain import GENESIS, Anchor, Kind, Row, Verified, row_hash
from hhh_router.trace.audit.places import (
    check_place,
    default_audit,
    is_postgres,
    open_audit,
    open_writer,
    prune_audit,
    read_rows,
    shown_place,
    verify,
)
from hhh_router.trace.audit.sqlite import SqliteAudit
from hhh_router.trace.audit.writer import Audit, ChainedAudit, NoAudit, Retention

__all__ = [
    "GENESIS",
    "Anchor",
    "Audit",
    "ChainedAudit",
    "Kind",
    "NoAudit",
    "Retention",
    "Row",
    "SqliteAudit",
    "Verified",
    "check_place",
    "default_audit",
    "is_postgres",
    "open_audit",
    "open_writer",
    "prune_audit",
    "read_rows",
    "row_hash",
    "shown_place",
    "verify",
]
